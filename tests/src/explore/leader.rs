//! The coordinator: the real core, its driver, and what survives it.

use super::frame::{CLOSED, Effect, Frame, Frames, Line};
use super::setting::{SLOTS, Setting, WORKERS};
use crate::sim::Mutant;
use caravan_coordinator_core::{Config, Core, Input, Output, Record, Restored, Session};
use caravan_types::message::{Committed, Farewell, ToWorker};
use caravan_types::progress::Stragglers;
use caravan_types::status::Event;
use caravan_types::{Generation, NumericsClass, Plan, Precision, Source, Step, WorkerId};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt::Debug;
use std::sync::Arc;

/// What a coordinator is told.
#[derive(Clone, Copy, Debug)]
pub(super) enum LeaderInput {
    /// A frame of a worker's session.
    Up(usize, u16, u32),
    /// A manifest is written.
    Completed,
    /// Whatever is waited for is due, and everybody was heard a moment ago.
    Due,
    /// A worker was not heard for as long as the failure budget, all others were.
    Silent(usize),
    /// Somebody asks for a stop.
    Drain,
    /// The process dies.
    Die,
    /// It is started again.
    Start,
}

/// What survives the coordinator.
#[derive(Clone, Debug, Default)]
struct Store {
    generation: Generation,
    next_worker: u64,
    plan: Option<Arc<Plan>>,
    /// The ledger.
    committed: Vec<Committed>,
    /// Complete checkpoints.
    complete: BTreeSet<Step>,
}

impl Store {
    fn newest(&self) -> Step {
        self.committed.last().map_or(Step(0), |committed| committed.step)
    }
}

/// A coordinator, or its store while there is none.
#[derive(Clone)]
pub(super) struct Leader {
    core: Option<Core>,
    /// Open sessions by slot and number, with the worker that was taken on.
    sessions: BTreeMap<(usize, u16), Option<WorkerId>>,
    /// Manifests that are being written.
    writing: VecDeque<(Generation, Step)>,
    store: Store,
    /// The store before the newest generation, only where a bug needs it.
    stale: Option<Box<Store>>,
    /// Whose process a worker is.
    slots: BTreeMap<WorkerId, usize>,
    /// Owners of each slice in the newest plan that has committed a step.
    proven: Vec<Vec<WorkerId>>,
    gone: BTreeSet<WorkerId>,
    /// The generation of the newest plan that there ever was.
    planned: Generation,
    /// Where the input at hand has gone back to.
    back: Option<Step>,
    end: Option<Farewell>,
}

/// What others have to know of it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct LeaderView {
    pub(super) up: bool,
    pub(super) ended: bool,
    /// A deadline stands.
    pub(super) deadline: bool,
    /// A verdict about accusations is waited for.
    pub(super) verdict: bool,
    pub(super) writing: bool,
    pub(super) draining: bool,
    /// Slots of members that have a session.
    pub(super) members: u8,
    /// By slot: the numbers of open sessions; 0 where none. A worker has two for as long as the
    /// coordinator does not know that the first one is over.
    pub(super) sessions: [[u16; 2]; SLOTS],
    pub(super) committed: Step,
}

/// Later than everything else.
fn due(setting: &Setting) -> u64 {
    2 * setting.detect
}

impl Leader {
    pub(super) fn new(setting: &Setting) -> Self {
        let mut leader = Self {
            core: None,
            sessions: BTreeMap::new(),
            writing: VecDeque::new(),
            store: Store::default(),
            stale: None,
            slots: BTreeMap::new(),
            proven: Vec::new(),
            gone: BTreeSet::new(),
            planned: Generation(0),
            back: None,
            end: None,
        };
        leader.start(setting);
        leader
    }

    pub(super) fn view(&self) -> LeaderView {
        let (deadline, verdict) = self.core.as_ref().map_or((false, false), Core::is_due);
        let mut sessions = [[0; 2]; SLOTS];
        for (slot, number) in self.sessions.keys() {
            sessions[*slot] = [*number, sessions[*slot][0]];
        }
        let members = self.core.iter().flat_map(Core::members);
        let members = members.filter_map(|worker| self.slots.get(&worker));
        LeaderView {
            up: self.core.is_some(),
            ended: self.end.is_some(),
            deadline,
            verdict,
            writing: !self.writing.is_empty(),
            draining: self.core.as_ref().is_some_and(Core::is_draining),
            members: members.fold(0, |mask, slot| mask | 1 << slot),
            sessions,
            committed: self.store.newest(),
        }
    }

    /// What decides what it will do.
    pub(super) fn essence(&self) -> impl Debug + '_ {
        let core = self.core.as_ref().map(Core::essence);
        let now = (&self.sessions, &self.writing, self.end);
        let seen = (&self.slots, &self.proven, &self.gone, self.planned);
        (core, now, &self.store, &self.stale, seen)
    }

    /// Whether a frame of a session changes nothing, now or later.
    pub(super) fn is_stale(&self, frame: &Frame) -> bool {
        match (frame, &self.core) {
            (Frame::Up(message), Some(core)) => core.is_stale(message),
            _ => false,
        }
    }

    /// The same with a bug switched on.
    pub(super) fn with_bug(self, mutant: Option<Mutant>) -> Self {
        Self { core: self.core.map(|core| core.with_mutant(bug(mutant))), ..self }
    }

    /// Starts, with what the store remembers.
    fn start(&mut self, setting: &Setting) {
        let config = Config {
            shape: setting.shape.clone(),
            batch: setting.batch,
            steps: setting.steps,
            numerics: NumericsClass { precision: Precision::Fp32, family: super::FAMILY.into() },
            recompute: false,
            redundancy: setting.options.redundancy,
            stages: Some(setting.options.stages),
            workers: WORKERS as u32,
            timing: setting.timing,
            stragglers: Stragglers::Report,
        };
        let store = self.stale.as_deref().unwrap_or(&self.store);
        let forgets = setting.is(Mutant::ForgetGenerations);
        let restored = Restored {
            generation: if forgets { Generation(0) } else { store.generation },
            next_worker: store.next_worker,
            checkpoint: store.complete.range(..=store.newest()).next_back().copied(),
            plan: store.plan.clone().filter(|_| !forgets),
            committed: store.committed.last().cloned(),
        };
        let mut core = Core::new(config, restored, 0).with_mutant(bug(setting.options.mutant));
        core.set_times(0, due(setting));
        self.core = Some(core);
    }

    /// Takes an input. With `dies` the process dies before this one of the records, counted from
    /// 0, that the input makes durable. Says also how many there are.
    pub(super) fn take(
        &mut self,
        setting: &Setting,
        frames: &mut Frames,
        input: LeaderInput,
        dies: Option<u8>,
    ) -> (Vec<Effect>, u8) {
        let mut effects = Vec::new();
        let mut now = 0;
        let input = match input {
            LeaderInput::Start => {
                self.start(setting);
                None
            }
            LeaderInput::Die => {
                self.die(&mut effects);
                None
            }
            LeaderInput::Drain => Some(Input::Drain),
            LeaderInput::Completed => self.writing.pop_front().map(|(generation, step)| Input::Completed {
                generation,
                step,
                result: Ok(()),
            }),
            LeaderInput::Due => {
                now = due(setting);
                self.hear(now, None);
                Some(Input::Tick)
            }
            LeaderInput::Silent(slot) => {
                now = setting.detect;
                self.hear(now, self.slots.iter().find(|(_, s)| **s == slot).map(|(worker, _)| *worker));
                Some(Input::Tick)
            }
            LeaderInput::Up(slot, number, frame) => self.hear_from(frames.get(frame), slot, number),
        };
        let (Some(input), Some(core)) = (input, &mut self.core) else { return (effects, 0) };
        let mut outputs = Vec::new();
        core.handle(now, input, &mut outputs);
        core.set_times(0, due(setting));
        let mut records = 0;
        for output in outputs {
            if matches!(output, Output::Persist(_) | Output::Committed { .. }) {
                if dies == Some(records) {
                    self.die(&mut effects);
                    break;
                }
                records += 1;
            }
            if let Err(wrong) = self.carry_out(setting, frames, output, &mut effects) {
                effects.push(Effect::Wrong(wrong));
            }
        }
        self.back = None;
        (effects, records)
    }

    /// Everybody was heard just now, but for one.
    fn hear(&mut self, now: u64, but: Option<WorkerId>) {
        if let Some(core) = &mut self.core {
            core.hear(now, but);
        }
    }

    fn hear_from(&mut self, frame: &Frame, slot: usize, number: u16) -> Option<Input> {
        let session = Session(slot as u64 * 1000 + u64::from(number));
        match frame {
            Frame::Hello(hello) => {
                self.sessions.insert((slot, number), None);
                Some(Input::Hello { session, hello: hello.clone() })
            }
            Frame::Up(message) => {
                let worker = self.sessions.get(&(slot, number)).copied().flatten()?;
                Some(Input::Message { worker, message: message.clone() })
            }
            Frame::Closed | Frame::Broken => {
                self.sessions.remove(&(slot, number)).map(|_| Input::Closed { session })
            }
            _ => None,
        }
    }

    fn die(&mut self, effects: &mut Vec<Effect>) {
        self.core = None;
        self.sessions.clear();
        self.writing.clear();
        effects.push(Effect::Dead);
    }

    fn carry_out(
        &mut self,
        setting: &Setting,
        frames: &mut Frames,
        output: Output,
        effects: &mut Vec<Effect>,
    ) -> Result<(), String> {
        match output {
            Output::Persist(record) => return self.persist(setting, record),
            Output::Welcome { session, worker, committed } => {
                let (slot, number) = ((session.0 / 1000) as usize, (session.0 % 1000) as u16);
                if *self.slots.entry(worker).or_insert(slot) != slot {
                    return Err(format!("G-1: {worker} was given to two workers"));
                }
                self.sessions.insert((slot, number), Some(worker));
                let frame = frames.of(Frame::Welcome(worker, committed));
                effects.push(Effect::push(Line::Down(slot), number, frame));
            }
            Output::Refuse { session, .. } => {
                let (slot, number) = ((session.0 / 1000) as usize, (session.0 % 1000) as u16);
                effects.push(Effect::push(Line::Down(slot), number, frames.of(Frame::Refused)));
                self.hang_up((slot, number), effects);
            }
            Output::Send { worker, message } => {
                let found = self.sessions.iter().find(|(_, w)| **w == Some(worker));
                let Some(session) = found.map(|(session, _)| *session) else { return Ok(()) };
                let last = matches!(message, ToWorker::Goodbye(_));
                let frame = frames.of(Frame::Down(message));
                effects.push(Effect::push(Line::Down(session.0), session.1, frame));
                if last {
                    self.hang_up(session, effects);
                }
            }
            Output::Complete { generation, step, .. } => {
                self.store.complete.insert(step);
                self.writing.push_back((generation, step));
            }
            Output::Find { .. } => return Err("C-2: a checkpoint that is there could not be loaded".into()),
            Output::Note(event) => self.note(&event, effects),
            Output::Committed { committed, .. } => {
                let newest = self.store.newest();
                if committed.step != newest.next() {
                    return Err(format!("D-1: step {} follows step {newest}", committed.step));
                }
                self.proven = self.store.plan.as_ref().map(|plan| plan.owners.clone()).unwrap_or_default();
                self.store.committed.push(committed);
            }
            Output::Halted { step, .. } => {
                return Err(format!("N-1: stopped before step {step}, which is to be skipped"));
            }
            Output::End(farewell) => {
                self.end = Some(farewell);
                let whole = self.store.complete.contains(&Step(setting.steps));
                if farewell == Farewell::Failed || farewell == Farewell::Finished && !whole {
                    return Err(format!("L-1: the run ended as {farewell:?}"));
                }
            }
        }
        Ok(())
    }

    fn hang_up(&mut self, session: (usize, u16), effects: &mut Vec<Effect>) {
        self.sessions.remove(&session);
        effects.push(Effect::push(Line::Down(session.0), session.1, CLOSED));
    }

    fn persist(&mut self, setting: &Setting, record: Record) -> Result<(), String> {
        let store = &mut self.store;
        match record {
            Record::Generation(generation) => {
                self.stale = setting.is(Mutant::TwoLeaders).then(|| Box::new(store.clone()));
                store.generation = store.generation.max(generation);
            }
            Record::Worker(next) => store.next_worker = store.next_worker.max(next),
            Record::Plan(plan) => {
                if plan.generation <= self.planned {
                    return Err(format!(
                        "G-1: a plan for {} after one for {}",
                        plan.generation, self.planned
                    ));
                }
                let from = |source: Source| plan.transfers.iter().any(|t| t.from == source);
                let stored = !from(Source::Checkpoint) || store.complete.contains(&plan.base);
                if !stored || from(Source::Init) && plan.base > Step(0) {
                    return Err(format!(
                        "C-2: nobody has what {} needs of step {}",
                        plan.generation, plan.base
                    ));
                }
                self.planned = plan.generation;
                store.generation = store.generation.max(plan.generation);
                if store.newest() != plan.base && self.back != Some(plan.base) {
                    return Err(format!(
                        "D-1: {} starts after step {}, the history ends at step {}",
                        plan.generation,
                        plan.base,
                        store.newest()
                    ));
                }
                store.committed.retain(|committed| committed.step <= plan.base);
                store.plan = Some(plan);
            }
            Record::Disbanded => store.plan = None,
            Record::Checkpoint(_) => {}
        }
        Ok(())
    }

    fn note(&mut self, event: &Event, effects: &mut Vec<Effect>) {
        match event {
            Event::Lost { worker, .. } => _ = self.gone.insert(*worker),
            Event::RolledBack { from, to } => {
                self.back = Some(*to);
                let here = |w: &&WorkerId| !self.gone.contains(w);
                let mask = |owners: &Vec<WorkerId>| {
                    let slots = owners.iter().filter(here).filter_map(|w| self.slots.get(w));
                    slots.fold(0u8, |mask, slot| mask | 1 << slot)
                };
                let owners = self.proven.iter().map(mask).collect();
                effects.push(Effect::Back(owners, format!("went back from step {from} to {to}")));
            }
            _ => {}
        }
    }
}

/// What of a bug is in the core.
fn bug(mutant: Option<Mutant>) -> Option<caravan_coordinator_core::Mutant> {
    match mutant? {
        Mutant::Coordinator(mutant) => Some(mutant),
        _ => None,
    }
}
