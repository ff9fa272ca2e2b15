//! A whole caravan in one thread: the real cores of a coordinator and its workers, a virtual
//! network, clock and store, and a toy engine whose values say exactly how they were computed.
//!
//! One seed decides everything: which message is delivered next, when a worker is killed, when
//! one joins. Links deliver in order, as TCP does, and different links overtake each other
//! freely; a killed worker's last messages arrive up to a random point. What every member
//! applies is compared with a run of one worker without faults.

mod network;
mod random;
mod toy;

pub use random::Random;

use caravan_coordinator_core as coordinator;
use caravan_types::message::{Farewell, Hello, PROTOCOL_VERSION};
use caravan_types::peer::PeerMessage;
use caravan_types::progress::Stragglers;
use caravan_types::status::Event;
use caravan_types::task::Done;
use caravan_types::{BatchShape, Generation, ModelShape, Plan, SliceId, SliceTable, Step, Timing, WorkerId};
use caravan_worker_core as worker;
use network::{Frame, Network};
use std::collections::{BTreeMap, VecDeque};
use toy::{Job, Toy};

/// The instruction family that everyone has here.
const FAMILY: &str = "toy";

/// One run's size and faults.
#[derive(Clone, Debug)]
pub struct Options {
    /// Key of all that is random.
    pub seed: u64,
    /// Workers at the start.
    pub workers: u32,
    /// Lanes.
    pub lanes: u32,
    /// Micro-batches of each.
    pub micro_batches: u32,
    /// Stages of each pipeline; the planner's choice where none.
    pub stages: Option<u32>,
    /// Steps.
    pub steps: u64,
    /// Owners per slice.
    pub redundancy: u32,
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
    /// Workers to kill, at random moments.
    pub kills: u32,
    /// Workers to add, at random moments.
    pub joins: u32,
    /// Workers to ask to leave, at random moments.
    pub leaves: u32,
    /// Whether the run is drained at a random moment.
    pub drain: bool,
}

impl Options {
    /// Steps on one worker without faults.
    #[must_use]
    pub fn quiet(lanes: u32, steps: u64) -> Self {
        let (seed, workers, redundancy, checkpoint_every) = (0, 1, 1, 0);
        let (kills, joins, leaves, drain) = (0, 0, 0, false);
        Self {
            seed,
            workers,
            lanes,
            micro_batches: 2,
            stages: None,
            steps,
            redundancy,
            checkpoint_every,
            kills,
            joins,
            leaves,
            drain,
        }
    }

    fn batch(&self) -> BatchShape {
        BatchShape { lanes: self.lanes, micro_batches: self.micro_batches, sequences: 1, sequence_length: 1 }
    }

    /// A random cluster with random faults.
    #[must_use]
    pub fn random(seed: u64) -> Self {
        let mut r = Random::new(seed);
        Self {
            seed,
            workers: r.below(4) as u32 + 1,
            lanes: 1 << r.below(4),
            micro_batches: 2,
            stages: Some(r.below(5) as u32).filter(|s| *s > 0),
            steps: r.below(8) + 3,
            redundancy: r.below(3) as u32 + 1,
            checkpoint_every: r.below(4),
            kills: r.below(5) as u32,
            joins: r.below(4) as u32,
            leaves: r.below(2) as u32,
            drain: r.below(8) == 0,
        }
    }
}

/// What came of a run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// How it ended.
    pub farewell: Option<Farewell>,
    /// Each slice's final value, from the last checkpoint.
    pub weights: BTreeMap<SliceId, u64>,
    /// The step of the last checkpoint.
    pub checkpoint: Option<Step>,
    /// What happened.
    pub events: Vec<Event>,
    /// Hash of everything that was delivered, in order.
    pub trace: u64,
}

/// By step and slice: the value of a quiet run.
pub type Truth = BTreeMap<(Step, SliceId), u64>;

struct Node {
    core: worker::Core,
    toy: Toy,
    session: coordinator::Session,
}

/// The cluster. Run it with [`run`].
struct Cluster<'a> {
    options: Options,
    shape: ModelShape,
    table: SliceTable,
    random: Random,
    now: u64,
    coordinator: coordinator::Core,
    nodes: BTreeMap<WorkerId, Node>,
    network: Network,
    /// Hellos on their way.
    greetings: VecDeque<coordinator::Session>,
    sessions: u64,
    /// By generation and step, as written; a checkpoint counts once it is complete.
    parts: BTreeMap<(Generation, Step), BTreeMap<SliceId, u64>>,
    checkpoints: BTreeMap<Step, BTreeMap<SliceId, u64>>,
    truth: Option<&'a Truth>,
    seen: Truth,
    /// The newest plan, and the newest one that committed a step: all its members were healed.
    planned: Option<Plan>,
    proven: Option<Plan>,
    outcome: Outcome,
}

/// A shape so small that every unit is one slice.
#[must_use]
pub fn shape() -> ModelShape {
    ModelShape {
        dim: 8,
        layers: 3,
        heads: 2,
        kv_heads: 1,
        hidden: 8,
        vocab: 16,
        context: 8,
        norm_eps: 1e-5,
        rope_theta: 1e4,
    }
}

/// Runs a cluster to its end and checks every value that anybody applies against `truth`.
///
/// # Errors
/// What went wrong, with the moment; a run that does not end is one such thing.
pub fn run(options: Options, truth: Option<&Truth>) -> Result<(Outcome, Truth), String> {
    let mut cluster = Cluster::new(options, truth);
    for _ in 0..cluster.options.workers {
        cluster.arrive();
    }
    let mut faults = cluster.faults();
    // A step of four workers takes a few hundred events; a run that needs more than this many
    // for its dozen steps and faults goes round in circles.
    for event in 0..400_000u64 {
        if cluster.outcome.farewell.is_some() {
            return Ok((cluster.outcome, cluster.seen));
        }
        while faults.last().is_some_and(|(at, _)| *at <= event) {
            if let Some((_, fault)) = faults.pop() {
                cluster.strike(fault)?;
            }
        }
        cluster.step().map_err(|e| format!("event {event}: {e}"))?;
    }
    Err(format!("did not end: {:?} {:?}", cluster.coordinator.phase(), cluster.outcome.events.last()))
}

#[derive(Clone, Copy, Debug)]
enum Fault {
    Kill,
    Join,
    Leave,
    Drain,
}

impl<'a> Cluster<'a> {
    fn new(options: Options, truth: Option<&'a Truth>) -> Self {
        let shape = shape();
        let config = coordinator::Config {
            shape: shape.clone(),
            batch: BatchShape { lanes: options.lanes, micro_batches: 1, sequences: 1, sequence_length: 8 },
            steps: options.steps,
            family: FAMILY.into(),
            redundancy: options.redundancy,
            stages: options.stages,
            workers: options.workers,
            timing: Timing::from_millis(1000),
            stragglers: Stragglers::Report,
        };
        Self {
            table: SliceTable::new(&shape),
            random: Random::new(options.seed ^ 0x5eed),
            now: 0,
            coordinator: coordinator::Core::new(config, coordinator::Restored::default(), 0),
            nodes: BTreeMap::new(),
            network: Network::default(),
            greetings: VecDeque::new(),
            sessions: 0,
            parts: BTreeMap::new(),
            checkpoints: BTreeMap::new(),
            truth,
            seen: Truth::new(),
            planned: None,
            proven: None,
            outcome: Outcome::default(),
            shape,
            options,
        }
    }

    /// Faults with their moments, the last one first.
    fn faults(&mut self) -> Vec<(u64, Fault)> {
        let o = self.options.clone();
        let kinds = [
            (Fault::Kill, o.kills),
            (Fault::Join, o.joins),
            (Fault::Leave, o.leaves),
            (Fault::Drain, u32::from(o.drain)),
        ];
        let mut all: Vec<(u64, Fault)> = Vec::new();
        for (fault, count) in kinds {
            all.extend((0..count).map(|_| (self.random.below(120 * o.steps), fault)));
        }
        all.sort_by_key(|(at, _)| std::cmp::Reverse(*at));
        all
    }

    fn strike(&mut self, fault: Fault) -> Result<(), String> {
        let victim = self.random.pick(self.nodes.keys().copied());
        match fault {
            Fault::Join => self.arrive(),
            Fault::Drain => self.coordinate(coordinator::Input::Drain)?,
            Fault::Leave => {
                if let Some(victim) = victim {
                    self.work(victim, worker::Input::Leave, None)?;
                }
            }
            Fault::Kill => {
                if let Some(victim) = victim {
                    self.kill(victim);
                    // Whoever started it starts it again.
                    self.arrive();
                }
            }
        }
        Ok(())
    }

    fn arrive(&mut self) {
        self.sessions += 1;
        self.greetings.push_back(coordinator::Session(self.sessions));
    }

    fn kill(&mut self, victim: WorkerId) {
        if let Some(node) = self.nodes.remove(&victim) {
            self.network.kill(victim, node.session, &mut self.random);
        }
    }

    /// One event: something that is due, chosen at random; else time passes.
    fn step(&mut self) -> Result<(), String> {
        self.now += self.random.below(2);
        let busy: Vec<WorkerId> = self.nodes.iter().filter(|(_, n)| n.toy.busy()).map(|(w, _)| *w).collect();
        let deliverable =
            self.network.deliverable(&self.nodes.iter().map(|(w, n)| (*w, n.toy.generation)).collect());
        let ticks = self.due();
        let choices = busy.len() + deliverable.len() + ticks.len() + usize::from(!self.greetings.is_empty());
        if choices == 0 {
            return self.wait();
        }
        let mut choice = self.random.below(choices as u64) as usize;
        self.outcome.trace = random::mix(self.outcome.trace ^ choice as u64);
        if choice < busy.len() {
            return self.compute(busy[choice]);
        }
        choice -= busy.len();
        if choice < deliverable.len() {
            let frame = self.network.take(deliverable[choice]);
            return self.deliver(frame);
        }
        choice -= deliverable.len();
        if choice < ticks.len() {
            return match ticks[choice] {
                None => self.coordinate(coordinator::Input::Tick),
                Some(worker) => self.work(worker, worker::Input::Tick, None),
            };
        }
        let Some(session) = self.greetings.pop_front() else { return Ok(()) };
        let hello = Hello {
            protocol: PROTOCOL_VERSION,
            build: "test".into(),
            name: format!("session {}", session.0),
            host: "here".into(),
            fabric: format!("here:{}", session.0),
            families: vec![FAMILY.into()],
            threads: 1,
            resume: None,
            memory: 0,
            speed: 1.0,
        };
        self.coordinate(coordinator::Input::Hello { session, hello })
    }

    /// Whose deadline has passed; none stands for the coordinator.
    fn due(&self) -> Vec<Option<WorkerId>> {
        let workers = self.nodes.iter().map(|(w, n)| (Some(*w), n.core.next_deadline()));
        let all = workers.chain([(None, self.coordinator.next_deadline())]);
        all.filter(|(_, at)| at.is_some_and(|at| at <= self.now)).map(|(who, _)| who).collect()
    }

    /// Nothing is due: the clock jumps to the next deadline. Where all have left, one comes.
    fn wait(&mut self) -> Result<(), String> {
        if self.nodes.is_empty() {
            self.arrive();
            return Ok(());
        }
        let workers = self.nodes.values().filter_map(|n| n.core.next_deadline());
        let next = workers.chain(self.coordinator.next_deadline()).min();
        self.now = next.ok_or("nothing can ever happen any more")?.max(self.now);
        Ok(())
    }

    fn compute(&mut self, worker: WorkerId) -> Result<(), String> {
        let Some(node) = self.nodes.get_mut(&worker) else { return Ok(()) };
        match node.toy.run(&self.table, &self.options.batch())? {
            toy::Ran::Nothing => Ok(()),
            toy::Ran::Done(done) => self.work(worker, worker::Input::Done(done), None),
            toy::Ran::Send(to, generation, key, value) => {
                let message = PeerMessage::Data(key);
                self.network.send(worker, to, generation, message, Some(value));
                Ok(())
            }
            toy::Ran::Applied(step, values) => self.check(worker, step, &values),
            toy::Ran::Save(generation, step, values) => self.save(worker, generation, step, values),
            toy::Ran::Load(generation, step, slices, part) => {
                let Some(values) = self.checkpoints.get(&step) else {
                    return Err(format!("{worker} wants the checkpoint of step {step}, which there is not"));
                };
                let Some(node) = self.nodes.get_mut(&worker) else { return Ok(()) };
                node.toy.load(step, &slices, part, values);
                self.work(worker, worker::Input::Done(Done::Loaded { generation, slices, part }), None)
            }
        }
    }

    /// N-1: what is applied is what a quiet run applies.
    fn check(&mut self, worker: WorkerId, step: Step, values: &BTreeMap<SliceId, u64>) -> Result<(), String> {
        for (slice, value) in values {
            let key = (step, *slice);
            let truth = self.truth.map_or(self.seen.get(&key), |t| t.get(&key));
            if truth.is_some_and(|t| t != value) {
                return Err(format!("N-1: {worker} has other bits in {slice} after step {step}"));
            }
            self.seen.insert(key, *value);
        }
        Ok(())
    }

    fn save(
        &mut self,
        worker: WorkerId,
        generation: Generation,
        step: Step,
        values: BTreeMap<SliceId, u64>,
    ) -> Result<(), String> {
        let hash = |v: &u64| {
            let mut digest = caravan_types::Digest::default();
            digest.0[..8].copy_from_slice(&v.to_le_bytes());
            digest
        };
        let slices = values.iter().map(|(s, v)| (*s, hash(v))).collect();
        self.parts.entry((generation, step)).or_default().extend(values);
        let part = caravan_types::task::SavedPart {
            file: worker.to_string(),
            bytes: 8,
            digest: caravan_types::Digest::default(),
            slices,
        };
        self.work(worker, worker::Input::Done(Done::Saved { generation, step, part: Ok(part) }), None)
    }

    fn deliver(&mut self, frame: Frame) -> Result<(), String> {
        match frame {
            Frame::Up(worker, message) => self.coordinate(coordinator::Input::Message { worker, message }),
            Frame::Closed(session) => self.coordinate(coordinator::Input::Closed { session }),
            Frame::Down(worker, message) => self.work(worker, worker::Input::Message(message), None),
            Frame::Peer { from, to, generation, message, value } => {
                self.work(to, worker::Input::Peer { generation, from, message }, value)
            }
            Frame::PeerLost { to, generation, peer } => {
                self.work(to, worker::Input::PeerLost { generation, peer }, None)
            }
        }
    }

    fn coordinate(&mut self, input: coordinator::Input) -> Result<(), String> {
        let mut outputs = Vec::new();
        self.coordinator.handle(self.now, input, &mut outputs);
        for output in outputs {
            match output {
                coordinator::Output::Persist(coordinator::Record::Plan(plan)) => self.planned = Some(plan),
                coordinator::Output::Persist(_) => {}
                coordinator::Output::Welcome { session, worker, .. } => self.welcome(session, worker),
                coordinator::Output::Refuse { session, .. } => {
                    self.nodes.retain(|_, n| n.session != session);
                }
                coordinator::Output::Send { worker, message } => self.network.down(worker, message),
                coordinator::Output::Complete { generation, step, .. } => {
                    let parts = self.parts.remove(&(generation, step)).unwrap_or_default();
                    if parts.len() != self.table.len() {
                        return Err(format!("checkpoint of step {step} lacks slices"));
                    }
                    self.check_saved(step, &parts)?;
                    self.checkpoints.insert(step, parts);
                    self.coordinate(coordinator::Input::Completed { generation, step, result: Ok(()) })?;
                }
                coordinator::Output::Note(event) => self.note(event)?,
                coordinator::Output::Committed { .. } => {
                    self.proven.clone_from(&self.planned);
                    self.check_steps()?;
                }
                coordinator::Output::End(farewell) => {
                    self.outcome.farewell = Some(farewell);
                    if let Some((step, weights)) = self.checkpoints.last_key_value() {
                        self.outcome.checkpoint = Some(*step);
                        self.outcome.weights = weights.clone();
                    }
                }
            }
        }
        Ok(())
    }

    fn check_saved(&mut self, step: Step, parts: &BTreeMap<SliceId, u64>) -> Result<(), String> {
        let right = |(slice, value): (&SliceId, &u64)| match self.truth {
            Some(truth) if step.0 > 0 => truth.get(&(step, *slice)) == Some(value),
            _ => true,
        };
        if parts.iter().all(right) {
            Ok(())
        } else {
            Err(format!("N-1: checkpoint of step {step} has other bits"))
        }
    }

    /// C-2: the run goes back only where some slice has no living owner left.
    fn note(&mut self, event: Event) -> Result<(), String> {
        if let (Event::RolledBack { from, to }, Some(plan)) = (&event, &self.proven) {
            let survives = |owners: &Vec<WorkerId>| owners.iter().any(|w| self.nodes.contains_key(w));
            if plan.owners.iter().all(survives) {
                return Err(format!(
                    "C-2: went back from step {from} to {to}, though every slice had a living owner"
                ));
            }
        }
        self.outcome.events.push(event);
        Ok(())
    }

    /// C-1: members of one generation are never more than one step apart.
    fn check_steps(&self) -> Result<(), String> {
        let mut by_generation: BTreeMap<Generation, Vec<u64>> = BTreeMap::new();
        for node in self.nodes.values().filter(|n| n.toy.generation > Generation(0)) {
            by_generation.entry(node.toy.generation).or_default().push(node.core.applied().0);
        }
        for (generation, steps) in by_generation {
            let (least, most) = (steps.iter().min(), steps.iter().max());
            if least.zip(most).is_some_and(|(l, m)| m - l > 1) {
                return Err(format!("C-1: members of {generation} are at steps {steps:?}"));
            }
        }
        Ok(())
    }

    fn welcome(&mut self, session: coordinator::Session, worker: WorkerId) {
        let config = worker::Config {
            worker,
            shape: self.shape.clone(),
            batch: self.options.batch(),
            steps: self.options.steps,
            checkpoint_every: self.options.checkpoint_every,
            timing: Timing::from_millis(1000),
        };
        let core = worker::Core::new(config, self.now);
        self.nodes.insert(worker, Node { core, toy: Toy::default(), session });
    }

    fn work(&mut self, worker: WorkerId, input: worker::Input, value: Option<u64>) -> Result<(), String> {
        let Some(node) = self.nodes.get_mut(&worker) else { return Ok(()) };
        let mut outputs = Vec::new();
        node.core.handle(self.now, input, &mut outputs);
        for output in outputs {
            match output {
                worker::Output::Tell(message) => self.network.up(worker, message),
                worker::Output::Fence(generation) => node.toy.fence = generation,
                worker::Output::Connect { generation, peers } => {
                    node.toy.generation = generation;
                    let peers = peers.iter().map(|p| p.worker);
                    self.network.connect(worker, generation, peers);
                }
                worker::Output::Send { to, message: PeerMessage::Data(key) } => {
                    node.toy.queue(Job::Send(to, node.toy.generation, key));
                }
                worker::Output::Send { to, message } => {
                    self.network.send(worker, to, node.toy.generation, message, None);
                }
                worker::Output::Keep(key) => {
                    let value = value.ok_or("kept a payload that did not come")?;
                    node.toy.queue(Job::Put(key, value));
                }
                worker::Output::Task(task) => node.toy.queue(Job::Task(task)),
                worker::Output::Exit(_) => {
                    self.kill(worker);
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}
