//! The driver around a worker's core: session, fabric and engine, as the real ones are.

use super::engine::{Engine, Job, Ran};
use super::network::{End, Frame, Line};
use super::options::{DETECT_MS, Mutant};
use super::world::{Due, World};
use caravan_coordinator_core::Session;
use caravan_types::message::{Activity, Farewell, FromWorker, Hello, PROTOCOL_VERSION, ToWorker};
use caravan_types::peer::PeerMessage;
use caravan_types::task::Task;
use caravan_types::timing::Timing;
use caravan_types::{Generation, Step, WorkerId};
use caravan_worker_core::{Config, Core, Input, Output};
use std::collections::{BTreeMap, BTreeSet};

/// A worker process.
pub(super) struct Node {
    process: u64,
    pub(super) worker: Option<WorkerId>,
    core: Option<Core>,
    pub(super) engine: Engine,
    /// Whether the engine's thread has a job in hand.
    computing: bool,
    /// The session, while it is open.
    pub(super) session: Option<Session>,
    /// Whether the coordinator has answered in it; before that nothing is told.
    open: bool,
    /// Where this process's clock was at the start of time.
    pub(super) offset: u64,
    /// What comes while the process stands still.
    pub(super) paused: Option<Vec<Due>>,
    fence: Generation,
    /// The generation that is connected, and its peers.
    pub(super) generation: Generation,
    pub(super) peers: BTreeSet<WorkerId>,
    lost: BTreeSet<WorkerId>,
    /// Frames of generations that are not connected yet.
    parked: BTreeMap<Generation, Vec<(Line, Frame)>>,
}

impl Node {
    pub(super) fn clock(&self, now: u64) -> u64 {
        now + self.offset
    }

    pub(super) fn deadline(&self) -> Option<u64> {
        let at = self.core.as_ref().filter(|_| self.paused.is_none())?.next_deadline()?;
        Some(at.saturating_sub(self.offset))
    }

    /// Generation and step of a member.
    pub(super) fn step(&self) -> Option<(Generation, WorkerId, Step)> {
        let (core, worker) = (self.core.as_ref()?, self.worker?);
        (self.generation > Generation(0)).then(|| (self.generation, worker, core.applied()))
    }

    /// Whether its core has the plan that it is connected for.
    pub(super) fn is_stepping(&self) -> bool {
        self.core.as_ref().is_some_and(|core| core.activity() != Activity::Waiting)
    }

    pub(super) fn situation(&self) -> String {
        let core = self.core.as_ref().map_or("no core".into(), |core| {
            format!("step {} {} {:?}", core.applied(), core.activity(), core.wait())
        });
        format!(
            "{:?} {} session {:?} paused {} {core}",
            self.worker,
            self.generation,
            self.session,
            self.paused.is_some()
        )
    }
}

impl World<'_> {
    fn up(process: u64) -> Line {
        Line { from: End::Worker(process), to: End::Coordinator, generation: 0 }
    }

    /// A worker process starts and looks for its coordinator.
    pub(super) fn start_worker(&mut self) -> Result<(), String> {
        self.processes += 1;
        let process = self.processes;
        let salt = if self.is(Mutant::OtherData) { process } else { 0 };
        let (late, bad) = (self.is(Mutant::SavedBeforeWritten), &self.options.bad);
        let engine = Engine::new(&self.spec, &self.disk, process, salt, late, bad)?;
        let node = Node {
            process,
            worker: None,
            core: None,
            engine,
            computing: false,
            session: None,
            open: false,
            offset: self.random.below(1_000_000),
            paused: None,
            fence: Generation(0),
            generation: Generation(0),
            peers: BTreeSet::new(),
            lost: BTreeSet::new(),
            parked: BTreeMap::new(),
        };
        self.nodes.insert(process, node);
        self.attach(process)
    }

    /// Looks for the coordinator, with the id that it may have.
    pub(super) fn attach(&mut self, process: u64) -> Result<(), String> {
        let Some(node) = self.nodes.get_mut(&process) else { return Ok(()) };
        if let Some(waiting) = &mut node.paused {
            waiting.push(Due::Attach(process));
            return Ok(());
        }
        self.sessions += 1;
        let session = Session(self.sessions);
        (node.session, node.open) = (Some(session), false);
        let hello = Hello {
            protocol: PROTOCOL_VERSION,
            build: "simulated".into(),
            name: format!("process {process}"),
            host: format!("host {}", process % 3),
            fabric: process.to_string(),
            families: vec![self.spec.numerics.family.clone()],
            threads: 1,
            memory: 0,
            speed: 1.0,
            resume: node.worker,
        };
        self.homes.insert(session, process);
        self.send(Self::up(process), Frame::Hello(session, hello));
        Ok(())
    }

    /// A frame for a worker.
    pub(super) fn tell_worker(&mut self, process: u64, line: Line, frame: Frame) -> Result<(), String> {
        let Some(node) = self.nodes.get_mut(&process) else { return Ok(()) };
        if let Some(waiting) = &mut node.paused {
            waiting.push(Due::Frame(line, frame));
            return Ok(());
        }
        match frame {
            Frame::Welcome(session, worker, committed) if node.session == Some(session) => {
                self.welcome(process, worker, committed)
            }
            Frame::Down(session, message) if node.session == Some(session) => {
                self.work(process, Input::Message(message), None)
            }
            Frame::Refused(session) if node.session == Some(session) => {
                self.end(process, Some(100));
                Ok(())
            }
            Frame::Closed(session) if node.session == Some(session) => {
                node.session = None;
                let after = self.random.below(300) + 20;
                self.at(after, Due::Attach(process));
                Ok(())
            }
            Frame::Peer { generation, from, message, payload } => {
                let old = self.options.mutant == Some(Mutant::OldConnections);
                if generation > node.generation {
                    let again = Frame::Peer { generation, from, message, payload };
                    node.parked.entry(generation).or_default().push((line, again));
                    return Ok(());
                }
                if (generation < node.generation || generation < node.fence) && !old {
                    return Ok(());
                }
                self.work(process, Input::Peer { generation, from, message }, Some(payload))
            }
            Frame::PeerLost { generation, peer } => {
                let open = generation == node.generation && node.peers.contains(&peer);
                if !open || generation < node.fence || !node.lost.insert(peer) {
                    return Ok(());
                }
                self.work(process, Input::PeerLost { generation, peer }, None)
            }
            _ => Ok(()),
        }
    }

    fn welcome(&mut self, process: u64, worker: WorkerId, committed: Step) -> Result<(), String> {
        let Some(node) = self.nodes.get_mut(&process) else { return Ok(()) };
        node.open = true;
        if node.core.is_some() {
            return self.work(process, Input::Attached { committed }, None);
        }
        let config = Config {
            worker,
            shape: self.spec.model.clone(),
            batch: self.spec.batch,
            steps: self.options.steps,
            checkpoint_every: self.options.checkpoint_every,
            non_finite: self.options.non_finite,
            timing: Timing::from_millis(DETECT_MS),
        };
        let mutant = match self.options.mutant {
            Some(Mutant::Worker(mutant)) => Some(mutant),
            Some(Mutant::OldConnections) => Some(caravan_worker_core::Mutant::OldFrames),
            _ => None,
        };
        node.worker = Some(worker);
        node.core = Some(Core::new(config, node.clock(self.now)).with_mutant(mutant));
        self.work(process, Input::Tick, None)
    }

    pub(super) fn tick_worker(&mut self, process: u64) -> Result<(), String> {
        self.work(process, Input::Tick, None)
    }

    /// Gives a core an input and carries its outputs out.
    pub(super) fn work(
        &mut self,
        process: u64,
        input: Input,
        payload: Option<Vec<f32>>,
    ) -> Result<(), String> {
        let now = self.now;
        let Some(node) = self.nodes.get_mut(&process) else { return Ok(()) };
        let clock = node.clock(now);
        let Some(core) = &mut node.core else { return Ok(()) };
        let planned = match &input {
            Input::Message(ToWorker::Plan(plan)) => Some(plan.recompute),
            _ => None,
        };
        let (mut outputs, mut payload) = (Vec::new(), payload);
        core.handle(clock, input, &mut outputs);
        for output in outputs {
            let Some(node) = self.nodes.get_mut(&process) else { return Ok(()) };
            match output {
                Output::Tell(message) => self.tell_up(process, message),
                Output::Fence(generation) => {
                    node.fence = node.fence.max(generation);
                    node.engine.watch.raise(generation);
                }
                Output::Connect { generation, peers } => {
                    self.connect(process, generation, peers.iter().map(|p| p.worker).collect());
                }
                Output::Send { to, message: PeerMessage::Data(key) } => {
                    let generation = node.generation;
                    self.queue(process, Job::Send(to, generation, key));
                }
                Output::Send { to, message } => {
                    let generation = node.generation;
                    self.send_peer(process, to, generation, message, Vec::new());
                }
                Output::Keep(key) => {
                    let payload = payload.take().ok_or("kept a payload that did not come")?;
                    self.queue(process, Job::Put(key, payload));
                }
                Output::Task(task) => {
                    if let Task::Place { recompute, .. } = &task
                        && planned != Some(*recompute)
                    {
                        return Err(format!(
                            "a place with recompute = {recompute}, planned with {planned:?}"
                        ));
                    }
                    self.queue(process, Job::Task(task));
                }
                Output::Exit(farewell) => {
                    let again = matches!(farewell, Farewell::Fenced | Farewell::Failed | Farewell::Corrupt);
                    self.end(process, again.then_some(100));
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn tell_up(&mut self, process: u64, message: FromWorker) {
        let Some(node) = self.nodes.get(&process) else { return };
        let message = match message {
            FromWorker::Heartbeat { applied, activity, wait, .. } => {
                let engine = node.engine.watch.progress();
                FromWorker::Heartbeat { applied, activity, wait, engine }
            }
            other => other,
        };
        if let Some(session) = node.session.filter(|_| node.open) {
            self.send(Self::up(process), Frame::Up(session, message));
        }
    }

    /// Opens the fabric of a generation: what was parked for it arrives, and whoever is not
    /// there is lost within the failure budget.
    fn connect(&mut self, process: u64, generation: Generation, peers: BTreeSet<WorkerId>) {
        let Some(node) = self.nodes.get_mut(&process) else { return };
        node.generation = generation;
        node.fence = node.fence.max(generation);
        node.lost.clear();
        node.peers.clone_from(&peers);
        let parked = node.parked.remove(&generation).unwrap_or_default();
        node.parked = node.parked.split_off(&generation);
        for (line, frame) in parked {
            self.at(0, Due::Frame(line, frame));
        }
        for peer in peers {
            if self.process_of(peer).is_none() {
                let after = self.random.below(DETECT_MS);
                let line = Line { from: End::Worker(0), to: End::Worker(process), generation: generation.0 };
                self.at(after, Due::Frame(line, Frame::PeerLost { generation, peer }));
            }
        }
    }

    fn send_peer(
        &mut self,
        process: u64,
        to: WorkerId,
        generation: Generation,
        message: PeerMessage,
        payload: Vec<f32>,
    ) {
        let Some(from) = self.nodes.get(&process).and_then(|n| n.worker) else { return };
        let Some(target) = self.process_of(to) else { return };
        let line = Line { from: End::Worker(process), to: End::Worker(target), generation: generation.0 };
        let frame = Frame::Peer { generation, from, message, payload };
        // The transport does not repeat itself; what does is a driver with a bug, and harmless.
        if self.random.below(60) == 0 {
            self.send(line, frame.clone());
        }
        self.send(line, frame);
    }

    fn queue(&mut self, process: u64, job: Job) {
        let Some(node) = self.nodes.get_mut(&process) else { return };
        node.engine.queue(job);
        if !std::mem::replace(&mut node.computing, true) {
            let after = self.random.below(3);
            self.at(after, Due::Engine(process));
        }
    }

    /// The engine's thread does its first job.
    pub(super) fn compute(&mut self, process: u64) -> Result<(), String> {
        let Some(node) = self.nodes.get_mut(&process) else { return Ok(()) };
        if let Some(waiting) = &mut node.paused {
            waiting.push(Due::Engine(process));
            return Ok(());
        }
        let ran = node.engine.run();
        node.computing = node.engine.busy();
        if node.computing {
            let after = u64::from(self.random.below(4) == 0);
            self.at(after, Due::Engine(process));
        }
        let who = self.nodes.get(&process).and_then(|n| n.worker).unwrap_or_default();
        match ran {
            Ok(Ran::Nothing) => Ok(()),
            Ok(Ran::Done(done)) => self.work(process, Input::Done(done), None),
            Ok(Ran::Send(to, generation, key, payload)) => {
                self.send_peer(process, to, generation, PeerMessage::Data(key), payload);
                Ok(())
            }
            Ok(Ran::Applied(step, states, done)) => {
                // What it computes wrong is to be found by the others.
                match self.checks.applied(who, step, &states) {
                    Err(_) if self.nodes.get(&process).is_some_and(|node| node.engine.is_wrong) => {
                        self.suspects.insert(who);
                    }
                    checked => checked?,
                }
                self.work(process, Input::Done(done), None)
            }
            Ok(Ran::Corrupt(what)) => {
                self.tell_up(process, FromWorker::Corrupt { what });
                self.end(process, Some(100));
                Ok(())
            }
            Err(reason) => Err(format!("the engine of {who} failed: {reason}")),
        }
    }

    /// A process ends: its connections break, and who started it may start it again.
    pub(super) fn end(&mut self, process: u64, again: Option<u64>) {
        let Some(node) = self.nodes.remove(&process) else { return };
        self.forget(End::Worker(process));
        if let Some(session) = node.session {
            self.send(Self::up(process), Frame::Closed(session));
        }
        if let Some(worker) = node.worker {
            self.break_with(process, worker, node.generation);
        }
        if let Some(after) = again {
            let after = after + self.random.below(200);
            self.at(after, Due::Start);
        }
    }

    /// Everybody who is connected with a worker loses it.
    fn break_with(&mut self, process: u64, worker: WorkerId, generation: Generation) {
        let others: Vec<u64> = self.nodes.values().map(|n| n.process).filter(|p| *p != process).collect();
        for other in others {
            let line = Line { from: End::Worker(process), to: End::Worker(other), generation: generation.0 };
            self.send(line, Frame::PeerLost { generation, peer: worker });
        }
    }
}
