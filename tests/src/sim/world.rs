//! Time, and what is on its way.

use super::checks::{Checks, Truth, one_step_apart};
use super::coordinator::Leader;
use super::engine::{Disk, table};
use super::network::{End, Frame, Line, Network};
use super::options::{DETECT_MS, Fault, Mutant};
use super::random::{self, Random};
use super::worker::Node;
use super::{Options, Outcome};
use caravan_coordinator_core::Session;
use caravan_types::message::Farewell;
use caravan_types::{Generation, RunSpec, SliceTable, Step, WorkerId};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

/// After the last fault a run may take this long, in virtual milliseconds: some failure budgets
/// for what is still noticed, and a second a step.
const PATIENCE_MS: u64 = 120 * DETECT_MS;

/// How long nothing else goes wrong where a wrong value is to be found: a few dozen steps.
pub(super) const QUIET_MS: u64 = 3 * DETECT_MS;

/// Something that is due at a time.
#[derive(Debug)]
pub(super) enum Due {
    Frame(Line, Frame),
    /// A worker's engine has done its first job.
    Engine(u64),
    Fault(Fault),
    /// A worker process starts.
    Start,
    /// A worker looks for its coordinator again.
    Attach(u64),
    /// A paused worker goes on.
    Resume(u64),
    /// A partition ends.
    Mend(Vec<(End, End)>),
    /// What was cut for as long as the failure budget breaks.
    Snap(Vec<(End, End)>),
    /// The coordinator starts again.
    Lead,
    /// A manifest is written or not, for this incarnation of the coordinator.
    Completed(u64, Generation, Step, bool),
    /// An intact checkpoint was looked for, for this incarnation of the coordinator.
    Found(u64, Step),
}

pub(super) struct World<'a> {
    pub(super) options: Options,
    pub(super) spec: RunSpec,
    pub(super) table: SliceTable,
    pub(super) now: u64,
    pub(super) random: Random,
    due: BTreeMap<(u64, u64), Due>,
    number: u64,
    pub(super) network: Network,
    pub(super) leader: Option<Leader>,
    pub(super) store: super::coordinator::Store,
    /// The store before the newest generation was announced.
    pub(super) stale: super::coordinator::Store,
    pub(super) nodes: BTreeMap<u64, Node>,
    pub(super) processes: u64,
    pub(super) sessions: u64,
    /// The worker process at the other end of each session.
    pub(super) homes: BTreeMap<Session, u64>,
    /// Sessions of workers that want to go on with an id.
    pub(super) resuming: BTreeSet<Session>,
    pub(super) disk: Rc<RefCell<Disk>>,
    pub(super) checks: Checks<'a>,
    pub(super) outcome: Outcome,
    /// How often a coordinator was started.
    pub(super) incarnation: u64,
    last_fault: u64,
    /// Workers with wrong training state that nobody has found yet.
    pub(super) suspects: BTreeSet<WorkerId>,
    /// The step before which the run has stopped.
    pub(super) halted: Option<Step>,
    /// Until when nothing else goes wrong, so that a wrong value has somebody to be compared with.
    pub(super) quiet_until: u64,
}

impl<'a> World<'a> {
    pub(super) fn new(options: Options, truth: Option<&'a Truth>) -> Result<Self, String> {
        let spec = options.spec();
        let mut world = Self {
            table: table(&spec),
            now: 0,
            random: Random::new(options.seed ^ 0x5eed),
            due: BTreeMap::new(),
            number: 0,
            network: Network::new(options.seed),
            leader: None,
            store: super::coordinator::Store::default(),
            stale: super::coordinator::Store::default(),
            nodes: BTreeMap::new(),
            processes: 0,
            sessions: 0,
            homes: BTreeMap::new(),
            resuming: BTreeSet::new(),
            disk: Rc::default(),
            incarnation: 0,
            checks: Checks::new(truth),
            outcome: Outcome::default(),
            last_fault: options.faults.iter().map(|(at, _)| *at).max().unwrap_or(0),
            suspects: BTreeSet::new(),
            halted: None,
            quiet_until: 0,
            spec,
            options,
        };
        world.lead();
        for _ in 0..world.options.workers {
            world.at(0, Due::Start);
        }
        for (at, fault) in world.options.faults.clone() {
            world.at(at, Due::Fault(fault));
        }
        Ok(world)
    }

    pub(super) fn is_over(&self) -> bool {
        self.outcome.farewell.is_some()
    }

    pub(super) fn is(&self, mutant: Mutant) -> bool {
        self.options.mutant == Some(mutant)
    }

    /// Has something happen in so many milliseconds.
    pub(super) fn at(&mut self, after: u64, due: Due) {
        self.number += 1;
        self.due.insert((self.now + after, self.number), due);
    }

    /// Puts a frame on its way.
    pub(super) fn send(&mut self, line: Line, frame: Frame) {
        let at = self.network.arrival(self.now, line);
        self.at(at - self.now, Due::Frame(line, frame));
    }

    /// The next thing that happens.
    pub(super) fn step(&mut self) -> Result<(), String> {
        let tick = self.next_tick();
        let due = self.due.first_key_value().map(|((at, _), _)| *at);
        match (due, tick) {
            (Some(at), tick) if tick.is_none_or(|(t, _)| at <= t) => {
                self.now = self.now.max(at);
                let Some((_, due)) = self.due.pop_first() else { return Ok(()) };
                self.trace(&due);
                self.happen(due)
            }
            (_, Some((at, end))) => {
                self.now = self.now.max(at);
                if self.now > self.last_fault.max(self.outcome.took_ms) + PATIENCE_MS {
                    return Err(format!("L-1: no end in sight: {}", self.situation()));
                }
                match end {
                    End::Coordinator => self.tick_coordinator(),
                    End::Worker(process) => self.tick_worker(process),
                }
            }
            // All have left: somebody starts one more, as a person would.
            (_, None) if self.nodes.is_empty() => {
                self.at(0, Due::Start);
                Ok(())
            }
            (_, None) => Err("L-1: nothing can ever happen any more".into()),
        }
    }

    fn trace(&mut self, due: &Due) {
        let mut hash = self.outcome.trace ^ self.now;
        for byte in format!("{due:?}").bytes() {
            hash = random::mix(hash ^ u64::from(byte));
        }
        self.outcome.trace = hash;
    }

    /// Whose deadline comes first.
    fn next_tick(&self) -> Option<(u64, End)> {
        let workers = self.nodes.iter().filter_map(|(p, n)| Some((n.deadline()?, End::Worker(*p))));
        let leader = self.leader.as_ref().and_then(Leader::deadline).map(|at| (at, End::Coordinator));
        workers.chain(leader).min()
    }

    fn happen(&mut self, due: Due) -> Result<(), String> {
        match due {
            Due::Frame(line, frame) => self.deliver(line, frame),
            Due::Engine(process) => self.compute(process),
            Due::Fault(fault) if self.now < self.quiet_until => {
                self.last_fault = self.last_fault.max(self.now + QUIET_MS);
                self.at(QUIET_MS, Due::Fault(fault));
                Ok(())
            }
            Due::Fault(fault) => self.strike(fault),
            Due::Start => self.start_worker(),
            Due::Attach(process) => self.attach(process),
            Due::Resume(process) => self.resume(process),
            Due::Mend(ends) => {
                ends.iter().for_each(|(a, b)| self.network.set_cut(*a, *b, false));
                for (line, frame) in self.network.take_open() {
                    self.send(line, frame);
                }
                Ok(())
            }
            Due::Snap(ends) => self.snap(&ends),
            Due::Completed(of, generation, step, written) => self.completed(of, generation, step, written),
            Due::Found(of, until) => self.found(of, until),
            Due::Lead => {
                self.lead();
                Ok(())
            }
        }
    }

    /// A frame arrives, unless its way is cut: then it waits for the way to be mended.
    fn deliver(&mut self, line: Line, frame: Frame) -> Result<(), String> {
        if self.network.is_cut(line.from, line.to) {
            self.network.held.push((line, frame));
            return Ok(());
        }
        match line.to {
            End::Coordinator => self.tell_coordinator(frame),
            End::Worker(process) => self.tell_worker(process, line, frame),
        }
    }

    /// A process is gone: what waited for its way to be mended is lost, and so is what was sent
    /// after that.
    pub(super) fn forget(&mut self, end: End) {
        let broken: BTreeSet<Line> =
            self.network.held.iter().map(|(line, _)| *line).filter(|l| l.from == end).collect();
        self.due.retain(|_, due| !matches!(due, Due::Frame(line, _) if broken.contains(line)));
        self.network.forget(end);
    }

    /// The invariants that hold after every event.
    pub(super) fn check(&self) -> Result<(), String> {
        one_step_apart(self.nodes.values().filter_map(Node::step))
    }

    /// What must hold once the run is over: whoever had wrong training state was named.
    pub(super) fn check_end(&self) -> Result<(), String> {
        if self.outcome.farewell == Some(Farewell::NonFinite) {
            let (newest, saved) = (self.checks.newest(), self.outcome.checkpoint);
            if self.halted != Some(newest.next()) || saved != Some(newest) {
                let halted = self.halted;
                return Err(format!(
                    "stopped before {halted:?}, with history to {newest} and checkpoint {saved:?}"
                ));
            }
        }
        match self.suspects.first() {
            Some(worker) => Err(format!("S-1: {worker} had wrong training state, and nobody said so")),
            None => Ok(()),
        }
    }

    /// The process of a worker.
    pub(super) fn process_of(&self, worker: WorkerId) -> Option<u64> {
        self.nodes.iter().find(|(_, n)| n.worker == Some(worker)).map(|(p, _)| *p)
    }

    /// For people who look at a failed run.
    pub(super) fn situation(&self) -> String {
        let leader = self.leader.as_ref().map_or("no coordinator".into(), Leader::situation);
        let nodes: Vec<String> = self.nodes.values().map(Node::situation).collect();
        format!(
            "{leader}; {}; last events {:?}",
            nodes.join("; "),
            self.outcome.events.iter().rev().take(4).collect::<Vec<_>>()
        )
    }
}
