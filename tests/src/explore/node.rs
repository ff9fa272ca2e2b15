//! A worker process: the real core, its driver, and an engine that makes values instead of tensors.
//!
//! The engine's queue is done by itself up to the next task that has an answer; that answer is a
//! choice of the exploration. What is sent without waiting for an answer is sent at once, since
//! a frame that is late in the engine and one that is late on its way are the same to everybody.

use super::engine::{Engine, Value};
use super::frame::{Effect, Frame, Frames, Line, fabric_of, slot_of};
use super::setting::Setting;
use crate::sim::Mutant;
use caravan_types::message::{Activity, FromWorker, Hello, PROTOCOL_VERSION};
use caravan_types::peer::{Key, PeerMessage};
use caravan_types::task::{Done, Task};
use caravan_types::{Generation, NonFinitePolicy, Step, WorkerId};
use caravan_worker_core::{Config, Core, Input, Output};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt::Debug;

/// Something for the engine to do.
#[derive(Clone, Debug)]
enum Job {
    Task(Task),
    Put(Key, Value),
    Send(WorkerId, Generation, Key),
}

/// What a worker process is told.
#[derive(Clone, Copy, Debug)]
pub(super) enum NodeInput {
    /// A frame of the coordinator.
    Down(u32),
    /// A frame of a peer, in a generation.
    Peer(usize, u16, u32),
    /// A connection with a peer is lost.
    PeerClosed(usize),
    /// The session has ended.
    Closed,
    /// The engine finishes its task.
    Engine,
    /// A part of a checkpoint is written.
    Saved,
    /// It looks for the coordinator.
    Attach,
    /// It is asked to go.
    Leave,
}

/// Whether there is a session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Link {
    /// No.
    #[default]
    Lost,
    /// It has said hello.
    Attaching,
    /// It was welcomed.
    Open,
}

/// A worker process.
#[derive(Clone)]
pub(super) struct Node {
    slot: usize,
    core: Option<Core>,
    worker: WorkerId,
    engine: Engine,
    jobs: VecDeque<Job>,
    /// Answers that its core has not heard of, of tasks that nothing has to wait for.
    answers: VecDeque<Done>,
    /// Parts of checkpoints that are being written, on a thread of their own.
    saving: VecDeque<Done>,
    /// Sessions so far.
    session: u16,
    link: Link,
    generation: Generation,
    fence: Generation,
    peers: BTreeMap<WorkerId, usize>,
    lost: BTreeSet<WorkerId>,
    /// Whether it was asked to go.
    leaving: bool,
}

/// What others have to know of a worker process.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct View {
    pub(super) alive: bool,
    pub(super) worker: WorkerId,
    pub(super) applied: Step,
    /// Whether it has voted for the step after that.
    pub(super) prepared: bool,
    pub(super) session: u16,
    pub(super) link: Link,
    /// The generation that was connected last, and the oldest that is not fenced.
    pub(super) generation: u16,
    pub(super) fence: u16,
    /// The generation whose frames its core takes; 0 where none.
    pub(super) live: u16,
    /// Peers of that generation, and those that were lost, by slot.
    pub(super) peers: u8,
    pub(super) lost: u8,
    pub(super) computing: bool,
    pub(super) saving: bool,
    pub(super) leaving: bool,
    /// What the engine does next is part of a step in flight, and nothing is reported of it.
    pub(super) gathering: bool,
}

impl View {
    /// The oldest generation of which a frame can still reach its core.
    pub(super) fn floor(&self) -> u16 {
        if self.live > 0 { self.live } else { (self.generation + 1).max(self.fence) }
    }
}

impl View {
    /// What a step in flight may change of its report.
    pub(super) fn reported(&self) -> (u16, Step, bool) {
        (self.live, self.applied, self.prepared)
    }
}

fn mask(slots: impl Iterator<Item = usize>) -> u8 {
    slots.fold(0, |mask, slot| mask | 1 << slot)
}

impl Node {
    pub(super) fn new(setting: &Setting, slot: usize) -> Self {
        Self {
            slot,
            core: None,
            worker: WorkerId(0),
            engine: Engine::new(setting),
            jobs: VecDeque::new(),
            answers: VecDeque::new(),
            saving: VecDeque::new(),
            session: 0,
            link: Link::Lost,
            generation: Generation(0),
            fence: Generation(0),
            peers: BTreeMap::new(),
            lost: BTreeSet::new(),
            leaving: false,
        }
    }

    pub(super) fn view(&self) -> View {
        let placed = self.core.as_ref().is_some_and(|core| core.activity() != Activity::Waiting);
        let live = placed && self.generation >= self.fence && self.generation > Generation(0);
        View {
            alive: true,
            worker: self.worker,
            applied: self.core.as_ref().map_or(Step(0), Core::applied),
            prepared: self.core.as_ref().is_some_and(Core::is_prepared),
            session: self.session,
            link: self.link,
            generation: self.generation.0 as u16,
            fence: self.fence.0 as u16,
            live: if live { self.generation.0 as u16 } else { 0 },
            peers: mask(self.peers.values().copied()),
            lost: mask(self.lost.iter().filter_map(|worker| self.peers.get(worker)).copied()),
            computing: !self.jobs.is_empty() || !self.answers.is_empty(),
            saving: !self.saving.is_empty(),
            leaving: self.leaving,
            gathering: self.is_gathering(),
        }
    }

    /// Whether the engine's next answer is of a lane or a slice, and not of a healed one.
    fn is_gathering(&self) -> bool {
        !self.answers.is_empty()
            || matches!(
                self.jobs.front(),
                Some(Job::Task(Task::Backward { .. } | Task::Reduce { .. } | Task::Verify { .. }))
            )
    }

    /// What decides what it will do.
    pub(super) fn essence(&self) -> impl Debug + '_ {
        let core = self.core.as_ref().map(Core::essence);
        let work = (&self.engine, &self.jobs, &self.answers, &self.saving);
        let session = (self.slot, self.worker, self.session, self.link);
        let fabric = (self.generation, self.fence, &self.peers, &self.lost);
        (core, work, session, fabric)
    }

    /// Takes an input.
    pub(super) fn take(&mut self, setting: &Setting, frames: &mut Frames, input: NodeInput) -> Vec<Effect> {
        let mut effects = Vec::new();
        let mut payload = None;
        let input = match input {
            NodeInput::Engine => match self.compute(setting, frames, &mut effects) {
                Ok(done) => done.map(Input::Done),
                Err(wrong) => return vec![refused(&wrong)],
            },
            NodeInput::Saved => self.saving.pop_front().map(Input::Done),
            NodeInput::Leave => {
                self.leaving = true;
                Some(Input::Leave)
            }
            NodeInput::Attach => {
                self.session += 1;
                self.link = Link::Attaching;
                let frame = frames.of(Frame::Hello(self.hello()));
                return vec![Effect::push(Line::Up(self.slot), self.session, frame)];
            }
            NodeInput::Closed => {
                self.link = Link::Lost;
                return effects;
            }
            NodeInput::PeerClosed(slot) => {
                let peer = self.peers.iter().find(|(_, s)| **s == slot).map(|(worker, _)| *worker);
                let peer = peer.filter(|peer| self.lost.insert(*peer));
                peer.map(|peer| Input::PeerLost { generation: self.generation, peer })
            }
            NodeInput::Peer(slot, generation, frame) => match frames.get(frame) {
                Frame::Peer(from, message, value) => {
                    debug_assert_eq!(slot, *self.peers.get(from).unwrap_or(&slot));
                    payload = Some(*value);
                    let generation = Generation(u64::from(generation));
                    Some(Input::Peer { generation, from: *from, message: message.clone() })
                }
                _ => None,
            },
            NodeInput::Down(frame) => match frames.get(frame).clone() {
                Frame::Welcome(worker, committed) => Some(self.welcome(setting, worker, committed)),
                Frame::Down(message) => Some(Input::Message(message)),
                Frame::Refused => return vec![Effect::Exit],
                _ => None,
            },
        };
        if let Some(input) = input {
            self.handle(setting, frames, (input, payload), &mut effects);
        }
        effects
    }

    fn hello(&self) -> Hello {
        Hello {
            protocol: PROTOCOL_VERSION,
            build: String::new(),
            name: format!("process {}", self.slot + 1),
            host: format!("host {}", self.slot + 1),
            fabric: fabric_of(self.slot),
            families: vec![super::FAMILY.into()],
            threads: 1,
            memory: 0,
            speed: 1.0,
            resume: self.core.is_some().then_some(self.worker),
        }
    }

    fn welcome(&mut self, setting: &Setting, worker: WorkerId, committed: Step) -> Input {
        self.link = Link::Open;
        if self.core.is_some() {
            return Input::Attached { committed };
        }
        let config = Config {
            worker,
            shape: setting.shape.clone(),
            batch: setting.batch,
            steps: setting.steps,
            checkpoint_every: 0,
            non_finite: NonFinitePolicy::Skip,
            timing: setting.timing,
        };
        self.worker = worker;
        self.core = Some(Core::new(config, 0).with_mutant(bug(setting.options.mutant)));
        Input::Tick
    }

    /// The same with a bug switched on.
    pub(super) fn with_bug(self, mutant: Option<Mutant>) -> Self {
        Self { core: self.core.map(|core| core.with_mutant(bug(mutant))), ..self }
    }

    fn handle(
        &mut self,
        setting: &Setting,
        frames: &mut Frames,
        (input, payload): (Input, Option<Value>),
        effects: &mut Vec<Effect>,
    ) {
        let Some(core) = &mut self.core else { return };
        let mut outputs = Vec::new();
        core.handle(0, input, &mut outputs);
        for output in outputs {
            match output {
                // How silent a worker is, is a choice of the exploration.
                Output::Tell(FromWorker::Heartbeat { .. }) => {}
                Output::Tell(message) if self.link == Link::Open => {
                    let frame = frames.of(Frame::Up(message));
                    effects.push(Effect::push(Line::Up(self.slot), self.session, frame));
                }
                Output::Tell(_) => {}
                Output::Fence(generation) => {
                    self.fence = self.fence.max(generation);
                    self.engine.fence = self.engine.fence.max(generation);
                }
                Output::Connect { generation, peers } => {
                    (self.generation, self.fence) = (generation, self.fence.max(generation));
                    self.peers = peers.iter().map(|p| (p.worker, slot_of(&p.fabric))).collect();
                    self.lost.clear();
                    effects.push(Effect::Connect);
                }
                Output::Send { to, .. } if self.lost.contains(&to) => {}
                Output::Send { to, message: PeerMessage::Data(key) } => {
                    self.jobs.push_back(Job::Send(to, self.generation, key));
                }
                Output::Send { to, message } => self.send(frames, to, self.generation, (message, 0), effects),
                Output::Keep(key) => match payload {
                    Some(value) => self.jobs.push_back(Job::Put(key, value)),
                    None => effects.push(Effect::Wrong("kept a payload that did not come".into())),
                },
                Output::Task(task) => self.jobs.push_back(Job::Task(task)),
                Output::Exit(_) => return effects.push(Effect::Exit),
            }
        }
        if let Err(wrong) = self.settle(setting, frames, effects) {
            effects.push(refused(&wrong));
        }
    }

    fn send(
        &self,
        frames: &mut Frames,
        to: WorkerId,
        generation: Generation,
        (message, value): (PeerMessage, Value),
        effects: &mut Vec<Effect>,
    ) {
        let Some(slot) = self.peers.get(&to) else { return };
        let frame = frames.of(Frame::Peer(self.worker, message, value));
        effects.push(Effect::push(Line::Peer(self.slot, *slot), generation.0 as u16, frame));
    }

    /// Does what is queued up to the next task that has an answer.
    fn settle(
        &mut self,
        setting: &Setting,
        frames: &mut Frames,
        effects: &mut Vec<Effect>,
    ) -> Result<(), String> {
        while let Some(job) = self.jobs.front() {
            if self.has_answer(setting, job) {
                return Ok(());
            }
            let Some(job) = self.jobs.pop_front() else { return Ok(()) };
            match job {
                Job::Put(key, value) => self.engine.put(key, value),
                Job::Send(_, generation, _) if self.engine.is_fenced(generation) => {}
                Job::Send(to, generation, key) => {
                    let value = self.engine.get(key)?;
                    self.send(frames, to, generation, (PeerMessage::Data(key), value), effects);
                }
                // Not given up by a fence; its answer says nothing to anybody then.
                Job::Task(Task::Verify { .. }) => {}
                Job::Task(task) => match self.engine.run(setting, task)? {
                    Some(applied @ Done::Applied { .. }) => self.answers.push_back(applied),
                    done => self.saving.extend(done),
                },
            }
        }
        let placed = self.core.as_ref().is_some_and(|core| core.activity() != Activity::Waiting);
        if !placed {
            let prepared = self.core.as_ref().is_some_and(Core::is_prepared);
            self.engine.forget(prepared);
            self.answers.clear();
        }
        Ok(())
    }

    fn has_answer(&self, setting: &Setting, job: &Job) -> bool {
        match job {
            Job::Task(Task::Backward { generation, micro, .. }) => {
                !self.engine.is_fenced(*generation) && micro.index + 1 == setting.batch.micro_batches
            }
            Job::Task(Task::Reduce { generation, .. } | Task::Verify { generation, .. }) => {
                !self.engine.is_fenced(*generation)
            }
            Job::Task(Task::Load { .. }) => true,
            _ => false,
        }
    }

    /// Finishes the task at the head of the queue, and what needs no answer behind it: the engine
    /// does not wait for the core.
    fn compute(
        &mut self,
        setting: &Setting,
        frames: &mut Frames,
        effects: &mut Vec<Effect>,
    ) -> Result<Option<Done>, String> {
        if let Some(answer) = self.answers.pop_front() {
            return Ok(Some(answer));
        }
        let Some(Job::Task(task)) = self.jobs.pop_front() else { return Ok(None) };
        let done = self.engine.run(setting, task)?;
        self.settle(setting, frames, effects)?;
        Ok(done)
    }
}

/// What of a bug is in the core.
fn bug(mutant: Option<Mutant>) -> Option<caravan_worker_core::Mutant> {
    match mutant? {
        Mutant::Worker(mutant) => Some(mutant),
        Mutant::OldConnections => Some(caravan_worker_core::Mutant::OldFrames),
        _ => None,
    }
}

/// An engine was asked for what it does not have, or has come to something else.
fn refused(wrong: &str) -> Effect {
    Effect::Wrong(format!("N-1: {wrong}"))
}
