//! The driver around the coordinator's core: input, then what it made durable, then the rest.

use super::engine::Engine;
use super::network::{End, Frame, Line};
use super::options::{DETECT_MS, Mutant};
use super::world::{Due, World};
use caravan_coordinator_core::{Config, Core, Input, Output, Record, Restored, Session};
use caravan_types::message::{Committed, Farewell, FromWorker, ToWorker};
use caravan_types::progress::Stragglers;
use caravan_types::status::{Event, Phase};
use caravan_types::timing::Timing;
use caravan_types::{Generation, NonFinitePolicy, Plan, Step, Subject, Verdict, WorkerId};
use std::sync::Arc;

/// What survives the coordinator.
#[derive(Clone, Debug, Default)]
pub(super) struct Store {
    generation: Generation,
    next_worker: u64,
    plan: Option<Arc<Plan>>,
    /// The ledger.
    committed: Vec<Committed>,
}

impl Store {
    fn newest(&self) -> Step {
        self.committed.last().map_or(Step(0), |c| c.step)
    }
}

pub(super) struct Leader {
    core: Core,
    /// The coordinator's clock has an origin of its own.
    origin: u64,
    sessions: Vec<(Session, Option<WorkerId>)>,
    /// Set where the process dies after so many more outputs.
    dying: Option<u64>,
}

impl Leader {
    pub(super) fn deadline(&self) -> Option<u64> {
        self.core.next_deadline().map(|at| at + self.origin)
    }

    /// The generation whose plan is in force, where nothing else is going on.
    pub(super) fn stepping(&self) -> Option<Generation> {
        (self.core.phase() == Phase::Running).then(|| self.core.generation())
    }

    pub(super) fn situation(&self) -> String {
        format!("{} {} step {}", self.core.phase(), self.core.generation(), self.core.step())
    }
}

impl World<'_> {
    /// A coordinator starts, with what its store remembers.
    pub(super) fn lead(&mut self) {
        let turn = self.incarnation as usize % self.options.recompute.len();
        let recompute = self.options.recompute[turn];
        let config = Config {
            shape: self.spec.model.clone(),
            batch: self.spec.batch,
            stages: self.options.stages,
            steps: self.options.steps,
            numerics: self.spec.numerics.clone(),
            recompute,
            redundancy: self.options.redundancy,
            workers: self.options.workers,
            timing: Timing::from_millis(DETECT_MS),
            stragglers: Stragglers::Report,
        };
        let store = if self.is(Mutant::TwoLeaders) { self.stale.clone() } else { self.store.clone() };
        let forgets = self.is(Mutant::ForgetGenerations);
        let restored = Restored {
            generation: if forgets { Generation(0) } else { store.generation },
            next_worker: store.next_worker,
            // As a start looks for one: intact, and not after the history's end.
            checkpoint: self
                .disk
                .borrow()
                .complete
                .range(..=store.newest())
                .next_back()
                .map(|(step, _)| *step),
            committed: store.committed.last().cloned(),
            plan: store.plan.filter(|_| !forgets),
        };
        let mutant = match self.options.mutant {
            Some(Mutant::Coordinator(mutant)) => Some(mutant),
            _ => None,
        };
        let core = Core::new(config, restored, 0).with_mutant(mutant);
        self.incarnation += 1;
        self.leader = Some(Leader { core, origin: self.now, sessions: Vec::new(), dying: None });
    }

    /// The coordinator's process is gone; whoever started it starts it again.
    pub(super) fn depose(&mut self, after: u64) {
        let Some(leader) = self.leader.take() else { return };
        // Whoever knocks at a dead door is not kept waiting.
        let knocking: Vec<Session> = self
            .network
            .held
            .iter()
            .filter_map(|(_, frame)| match frame {
                Frame::Hello(session, _) => Some(*session),
                _ => None,
            })
            .collect();
        self.forget(End::Coordinator);
        knocking.into_iter().for_each(|session| self.close_to_worker(session));
        for (session, _) in &leader.sessions {
            self.close_to_worker(*session);
        }
        self.at(after, Due::Lead);
    }

    /// The next input is the last one, and only so many of its outputs are carried out.
    pub(super) fn doom(&mut self, outputs: u64) {
        if let Some(leader) = &mut self.leader {
            leader.dying = Some(outputs);
        }
    }

    fn close_to_worker(&mut self, session: Session) {
        if let Some(process) = self.homes.get(&session).copied() {
            let line = Line { from: End::Coordinator, to: End::Worker(process), generation: 0 };
            self.send(line, Frame::Closed(session));
        }
    }

    pub(super) fn tick_coordinator(&mut self) -> Result<(), String> {
        self.coordinate(Input::Tick, None)
    }

    /// A frame for the coordinator; it may be of a session with one that is gone.
    pub(super) fn tell_coordinator(&mut self, frame: Frame) -> Result<(), String> {
        let Some(leader) = &mut self.leader else {
            if let Frame::Hello(session, _) = frame {
                self.close_to_worker(session);
            }
            return Ok(());
        };
        let known = |s: Session| leader.sessions.iter().find(|(known, _)| *known == s).map(|(_, w)| *w);
        match frame {
            Frame::Hello(session, hello) => {
                leader.sessions.push((session, None));
                if hello.resume.is_some() {
                    self.resuming.insert(session);
                }
                self.coordinate(Input::Hello { session, hello }, None)
            }
            Frame::Up(session, message) => {
                let Some(Some(worker)) = known(session) else { return Ok(()) };
                let clock = matches!(message, FromWorker::Heartbeat { .. }).then(|| {
                    self.process_of(worker).and_then(|p| self.nodes.get(&p)).map(|n| n.clock(self.now))
                });
                self.coordinate(Input::Message { worker, message }, clock.flatten())
            }
            Frame::Closed(session) => {
                if known(session).is_none() {
                    return Ok(());
                }
                leader.sessions.retain(|(s, _)| *s != session);
                self.coordinate(Input::Closed { session }, None)
            }
            _ => Ok(()),
        }
    }

    /// Gives the core an input and carries its outputs out.
    pub(super) fn coordinate(&mut self, input: Input, clock: Option<u64>) -> Result<(), String> {
        let foreign = self.is(Mutant::ForeignClock);
        let Some(leader) = &mut self.leader else { return Ok(()) };
        let now = clock.filter(|_| foreign).unwrap_or(self.now - leader.origin);
        let mut outputs = Vec::new();
        leader.core.handle(now, input, &mut outputs);
        let dying = leader.dying;
        for (i, output) in outputs.into_iter().enumerate() {
            if dying.is_some_and(|after| i as u64 >= after) {
                break;
            }
            self.carry_out(output)?;
        }
        if dying.is_some() {
            let after = self.random.below(2 * DETECT_MS);
            self.depose(after);
        }
        Ok(())
    }

    fn carry_out(&mut self, output: Output) -> Result<(), String> {
        match output {
            Output::Persist(record) => self.persist(record)?,
            Output::Welcome { session, worker, committed } => {
                let again = self.resuming.contains(&session);
                self.checks.welcomed(worker, again)?;
                if let Some(leader) = &mut self.leader
                    && let Some(entry) = leader.sessions.iter_mut().find(|(s, _)| *s == session)
                {
                    entry.1 = Some(worker);
                }
                self.down(session, Frame::Welcome(session, worker, committed));
            }
            Output::Refuse { session, .. } => {
                self.down(session, Frame::Refused(session));
                self.hang_up(session);
            }
            Output::Send { worker, message } => self.tell(worker, message),
            Output::Complete { generation, step, .. } => self.complete(generation, step)?,
            Output::Find { until } => {
                let after = self.random.below(20);
                self.at(after, Due::Found(self.incarnation, until));
            }
            Output::Note(event) => self.note(event)?,
            Output::Committed { committed, .. } => {
                self.checks.committed(committed.generation, committed.step)?;
                self.check_verdict(&committed)?;
                self.store.committed.push(committed);
                self.outcome.took_ms = self.now;
            }
            Output::Halted { step, .. } => self.halted = Some(step),
            // The last checkpoint was lost: somebody reads why, and starts the run again.
            Output::End(Farewell::Failed) if self.bereft() => self.depose(1),
            Output::End(farewell) => {
                self.outcome.farewell = Some(farewell);
                let disk = self.disk.borrow();
                self.outcome.checkpoint = disk.complete.last_key_value().map(|(step, _)| *step);
            }
        }
        Ok(())
    }

    /// A step is skipped where its data are marked, and nowhere else.
    fn check_verdict(&self, committed: &Committed) -> Result<(), String> {
        let is_bad = self.options.bad.iter().any(|bad| bad.step == committed.step);
        let skipped = committed.verdict() == Verdict::Skip;
        match (is_bad, skipped, self.options.non_finite) {
            (true, true, NonFinitePolicy::Skip) | (false, false, _) => Ok(()),
            _ => Err(format!(
                "N-1: step {} was committed: skipped {skipped}, not finite {is_bad}",
                committed.step
            )),
        }
    }

    fn persist(&mut self, record: Record) -> Result<(), String> {
        match record {
            Record::Generation(generation) => {
                self.stale = self.store.clone();
                self.store.generation = self.store.generation.max(generation);
            }
            Record::Worker(next) => self.store.next_worker = self.store.next_worker.max(next),
            Record::Plan(plan) => {
                self.checks.planned(&plan)?;
                self.checks.starts(&plan)?;
                self.store.generation = self.store.generation.max(plan.generation);
                self.store.committed.retain(|c| c.step <= plan.base);
                self.store.plan = Some(plan);
            }
            Record::Disbanded => self.store.plan = None,
            Record::Checkpoint(_) => {}
        }
        Ok(())
    }

    fn down(&mut self, session: Session, frame: Frame) {
        if let Some(process) = self.homes.get(&session).copied() {
            let line = Line { from: End::Coordinator, to: End::Worker(process), generation: 0 };
            self.send(line, frame);
        }
    }

    fn tell(&mut self, worker: WorkerId, message: ToWorker) {
        let session = self.leader.as_ref().and_then(|leader| {
            leader.sessions.iter().find(|(_, w)| *w == Some(worker)).map(|(session, _)| *session)
        });
        let Some(session) = session else { return };
        let last = matches!(message, ToWorker::Goodbye(_));
        if self.is(Mutant::LostNews) && matches!(message, ToWorker::Plan(_)) && self.random.below(4) == 0 {
            return;
        }
        self.down(session, Frame::Down(session, message));
        if last {
            self.hang_up(session);
        }
    }

    /// The session ends after what was said.
    fn hang_up(&mut self, session: Session) {
        self.close_to_worker(session);
        if let Some(leader) = &mut self.leader {
            leader.sessions.retain(|(s, _)| *s != session);
        }
    }

    /// All parts of a checkpoint were told to be written: it is complete.
    fn complete(&mut self, generation: Generation, step: Step) -> Result<(), String> {
        let parts = self.disk.borrow_mut().parts.remove(&(generation, step)).unwrap_or_default();
        let gone = parts.is_empty() && self.disk.borrow().lost.contains(&step);
        if !gone {
            self.checks.saved(step, &Engine::digests(&parts), self.table.len())?;
            self.disk.borrow_mut().complete.insert(step, parts);
        }
        let after = self.random.below(20);
        self.at(after, Due::Completed(self.incarnation, generation, step, !gone));
        Ok(())
    }

    /// A coordinator that has died meanwhile is told nothing.
    pub(super) fn completed(
        &mut self,
        of: u64,
        generation: Generation,
        step: Step,
        written: bool,
    ) -> Result<(), String> {
        if of != self.incarnation {
            return Ok(());
        }
        let result = if written { Ok(()) } else { Err("its parts are gone".into()) };
        self.coordinate(Input::Completed { generation, step, result }, None)
    }

    fn bereft(&self) -> bool {
        let disk = self.disk.borrow();
        disk.complete.is_empty() && !disk.lost.is_empty()
    }

    /// The search for a checkpoint is over.
    pub(super) fn found(&mut self, of: u64, until: Step) -> Result<(), String> {
        if of != self.incarnation {
            return Ok(());
        }
        let found = self.disk.borrow().complete.range(..=until).next_back().map(|(step, _)| *step);
        self.coordinate(Input::Found { until, found: Ok(found) }, None)
    }

    fn note(&mut self, event: Event) -> Result<(), String> {
        match &event {
            Event::Lost { worker, .. } => {
                self.checks.lost(*worker);
                self.suspects.remove(worker);
            }
            Event::Diverged { subject: Subject::State, .. } => self.checks.doubted(),
            Event::RolledBack { from, to } => {
                let alive: Vec<WorkerId> = self.nodes.values().filter_map(|n| n.worker).collect();
                self.checks.rolled_back(*from, *to, |w| alive.contains(&w))?;
            }
            _ => {}
        }
        self.outcome.events.push(event);
        Ok(())
    }
}
