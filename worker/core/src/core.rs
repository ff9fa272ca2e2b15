//! A member's life across generations; the steps in between are in [`crate::step`].

use crate::heal::Heal;
use crate::memory::Memory;
use crate::part::Place;
use crate::round::{Direction, Inbox, Round};
use crate::schedule::Schedule;
use crate::{Config, Input, Millis, Output};
use caravan_types::message::{Activity, FromWorker, Report, ToWorker};
use caravan_types::peer::{Key, PeerMessage, Prepared};
use caravan_types::progress::EngineProgress;
use caravan_types::task::Task;
use caravan_types::timing::millis;
use caravan_types::{
    Generation, NonFinite, Part, Plan, SliceId, SliceSet, SliceSum, SliceTable, Source, Step, Verdict,
    WorkerId,
};
use std::collections::BTreeMap;
use std::sync::Arc;

/// The worker's decisions. See the crate's head for the driver's duties.
#[derive(Clone, Debug)]
pub struct Core {
    pub(crate) config: Config,
    pub(crate) table: SliceTable,
    /// Nothing older than this is obeyed or done any more.
    pub(crate) promised: Generation,
    /// The plan in force; none between a report and the next plan.
    pub(crate) place: Option<Place>,
    pub(crate) applied: Step,
    /// How the last applied step was applied, where known.
    pub(crate) verdict: Option<Verdict>,
    /// Slices whose training state is here, at `applied`.
    pub(crate) state: SliceSet,
    /// Slices whose weights are here, at `applied`.
    pub(crate) weights: SliceSet,
    /// What the engine found of slices when it last looked, at `applied`.
    pub(crate) sums: BTreeMap<SliceId, SliceSum>,
    /// Owned slices whose final gradients for the next step are here, after a vote.
    pub(crate) prepared: Option<SliceSet>,
    pub(crate) heal: Heal,
    pub(crate) round: Round,
    pub(crate) inbox: Inbox,
    /// A generation that the coordinator wants at a step boundary.
    pub(crate) wanted: Option<Generation>,
    /// The boundary at which all members stop, by their votes: this step is applied.
    pub(crate) stopping: Option<Generation>,
    /// Whether the last checkpoint was ordered in this generation.
    pub(crate) finished: bool,
    /// The step at which the engine was asked to look at what it has, before a stop or the end.
    pub(crate) looking: Option<Step>,
    /// A step that is not finite, of which it tells once its engine has looked for the cause.
    pub(crate) bad: Option<NonFinite>,
    pub(crate) since: Millis,
    beat: Millis,
    pub(crate) memory: Memory,
    #[cfg(feature = "mutants")]
    pub(crate) mutant: Option<crate::Mutant>,
}

impl Core {
    /// A worker that has nothing yet.
    #[must_use]
    pub fn new(config: Config, now: Millis) -> Self {
        let table = SliceTable::new(&config.shape);
        Self {
            config,
            table,
            promised: Generation(0),
            place: None,
            applied: Step(0),
            verdict: None,
            state: SliceSet::default(),
            weights: SliceSet::default(),
            sums: BTreeMap::new(),
            prepared: None,
            heal: Heal::default(),
            round: Round::default(),
            inbox: Inbox::default(),
            wanted: None,
            stopping: None,
            finished: false,
            looking: None,
            bad: None,
            since: now,
            beat: now,
            memory: Memory::default(),
            #[cfg(feature = "mutants")]
            mutant: None,
        }
    }

    /// Switches a bug on.
    #[cfg(feature = "mutants")]
    #[must_use]
    pub fn with_mutant(mut self, mutant: Option<crate::Mutant>) -> Self {
        self.mutant = mutant;
        self
    }

    /// Takes one input; what is to be done about it is appended to `out`, in order.
    pub fn handle(&mut self, now: Millis, input: Input, out: &mut Vec<Output>) {
        match input {
            Input::Message(message) => self.message(now, message, out),
            Input::Peer { generation, from, message } => self.peer(now, generation, from, message, out),
            Input::PeerLost { generation, peer } => {
                if self.place.as_ref().is_some_and(|p| p.generation() == generation) {
                    self.memory.lost(peer);
                    out.push(Output::Tell(FromWorker::PeerLost { generation, peer }));
                }
            }
            Input::Done(done) => self.done(now, done, out),
            Input::Leave => {
                self.memory.leaving();
                out.push(Output::Tell(FromWorker::Leaving));
            }
            Input::Attached { committed } => {
                let generation = self.place.as_ref().map(Place::generation);
                self.memory.tell(generation, committed, out);
                // The others' votes may have stopped it before it was taken back.
                if generation.is_none() && self.promised > Generation(0) {
                    out.push(Output::Tell(FromWorker::Report(self.report())));
                }
            }
            Input::Tick => {}
        }
        if now >= self.beat {
            self.beat = now + millis(self.config.timing.heartbeat());
            let (applied, activity, wait) = (self.applied, self.activity(), self.wait());
            let engine = EngineProgress::default();
            out.push(Output::Tell(FromWorker::Heartbeat { applied, activity, wait, engine }));
        }
    }

    /// When an [`Input::Tick`] is wanted, if nothing else happens.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Millis> {
        Some(self.beat)
    }

    /// The newest step that was applied here.
    #[must_use]
    pub fn applied(&self) -> Step {
        self.applied
    }

    /// What it is doing.
    #[must_use]
    pub fn activity(&self) -> Activity {
        let Some(place) = &self.place else { return Activity::Waiting };
        if !self.heal.is_done() {
            Activity::Healing
        } else if self.finished {
            Activity::Finished
        } else if !self.weights.is_superset(&place.computed) {
            Activity::Publishing
        } else if self.round.voted {
            Activity::Preparing
        } else if self.round.schedule.as_ref().is_some_and(Schedule::is_done) {
            Activity::Reducing
        } else {
            Activity::Computing
        }
    }

    // ---- across generations ----

    fn message(&mut self, now: Millis, message: ToWorker, out: &mut Vec<Output>) {
        match message {
            ToWorker::Stop { generation, boundary } => self.stop(generation, boundary, out),
            ToWorker::Plan(plan) => self.adopt(now, plan, out),
            ToWorker::Save { generation, step, slices } => {
                if generation == self.promised && step == self.applied && self.state.is_superset(&slices) {
                    out.push(Output::Task(Task::Save { generation, step, slices }));
                }
            }
            ToWorker::Goodbye(farewell) => out.push(Output::Exit(farewell)),
        }
    }

    fn stop(&mut self, generation: Generation, boundary: bool, out: &mut Vec<Output>) {
        // Also where the members' votes were faster than the coordinator's word.
        if generation <= self.promised {
            return;
        }
        if boundary && self.place.is_some() {
            self.wanted = self.wanted.max(Some(generation));
            if self.finished {
                self.promise(generation, out);
            }
        } else {
            out.push(Output::Fence(generation));
            self.promise(generation, out);
        }
    }

    /// The report is a promise: nothing more is done in an older generation. At a step boundary
    /// nothing is being computed, and the connections stay open until the next plan: what this
    /// member has just published may still be on its way.
    pub(crate) fn promise(&mut self, generation: Generation, out: &mut Vec<Output>) {
        self.promised = generation;
        if !mutant!(self, ReportAndGoOn) {
            self.place = None;
        }
        self.wanted = None;
        self.stopping = None;
        self.finished = false;
        out.push(Output::Tell(FromWorker::Report(self.report())));
    }

    /// What it has, with the promise that it has made.
    fn report(&self) -> Report {
        Report {
            generation: self.promised,
            applied: self.applied,
            verdict: self.verdict,
            state: self.state.clone(),
            weights: self.weights.clone(),
            prepared: self.prepared.clone(),
            sums: self
                .sums
                .iter()
                .filter(|(id, _)| self.state.contains(**id))
                .map(|(id, s)| (*id, *s))
                .collect(),
        }
    }

    /// Takes a plan into force: finish the step that others have applied, then heal.
    fn adopt(&mut self, now: Millis, plan: Arc<Plan>, out: &mut Vec<Output>) {
        let stale = plan.generation != self.promised || self.place.is_some();
        if stale && !mutant!(self, StalePlan) {
            return;
        }
        let units = self.config.shape.units();
        let Some(place) = Place::new(self.config.worker, plan, &self.table, units) else { return };
        self.arrive_at(place.base(), place.plan.verdict, out);
        out.push(Output::Task(Task::Place { units: place.stage.clone(), recompute: place.plan.recompute }));
        let peers = place.plan.members.iter().filter(|m| m.worker != place.me).cloned().collect();
        out.push(Output::Connect { generation: place.generation(), peers });
        for (to, part, slices) in place.given() {
            for slice in slices.iter() {
                let message = PeerMessage::Data(piece(part, self.applied, slice));
                out.push(Output::Send { to, message });
            }
        }
        if mutant!(self, DropBeforeCommit) {
            let stale: SliceSet = self.state.iter().filter(|s| !place.owned.contains(*s)).collect();
            self.state = self.state.iter().filter(|s| !stale.contains(*s)).collect();
            out.push(Output::Task(Task::Drop(stale)));
        }
        self.memory.start();
        self.sums.clear();
        self.looking = None;
        self.bad = None;
        self.heal = Heal::new(&place);
        self.round = Round::default();
        self.inbox = Inbox::default();
        self.since = now;
        for (from, part, slices) in place.wanted() {
            let (generation, step, slices) = (place.generation(), place.base(), slices.clone());
            match from {
                Source::Peer(_) => {}
                Source::Init => {
                    self.heal.local(part, &slices);
                    hold(&mut self.state, &mut self.weights, part, &slices);
                    out.push(Output::Task(Task::Init { slices, part }));
                }
                Source::Checkpoint => out.push(Output::Task(Task::Load { generation, step, slices, part })),
            }
        }
        self.place = Some(place);
        self.go_on(now, out);
    }

    /// Brings what is held to the plan's base: by applying the prepared step, or by forgetting
    /// what is of another step.
    fn arrive_at(&mut self, base: Step, verdict: Option<Verdict>, out: &mut Vec<Output>) {
        let prepared = self.prepared.take();
        if base == self.applied {
            return;
        }
        let finish = prepared.zip(verdict).filter(|_| base == self.applied.next());
        let kept = match finish {
            Some((slices, verdict)) => {
                let verdict = match verdict {
                    Verdict::Skip if mutant!(self, ApplySkipped) => Verdict::Update { norm: 1.0 },
                    verdict => verdict,
                };
                out.push(Output::Task(Task::Apply { step: base, verdict, slices: slices.clone() }));
                slices
            }
            None => SliceSet::default(),
        };
        let stale: SliceSet = self.state.iter().filter(|s| !kept.contains(*s)).collect();
        if !stale.is_empty() {
            out.push(Output::Task(Task::Drop(stale)));
        }
        self.state = kept.clone();
        self.weights = kept;
        self.verdict = verdict;
        self.applied = base;
    }

    // ---- messages of members ----

    fn peer(
        &mut self,
        now: Millis,
        generation: Generation,
        from: WorkerId,
        message: PeerMessage,
        out: &mut Vec<Output>,
    ) {
        let Some(place) = &self.place else { return };
        if generation != place.generation() && !mutant!(self, OldFrames) {
            return;
        }
        let understood = match message {
            PeerMessage::Data(key) => self.data(now, from, key, out),
            PeerMessage::Prepared(vote) => self.vote(now, from, vote, out),
        };
        if !understood {
            self.memory.lost(from);
            out.push(Output::Tell(FromWorker::PeerLost { generation, peer: from }));
        }
    }

    /// False where the sender had no business sending it.
    fn data(&mut self, now: Millis, from: WorkerId, key: Key, out: &mut Vec<Output>) -> bool {
        let Some(place) = &self.place else { return true };
        let base = place.base();
        if let Some((slice, part)) = self.heal.arrives(from, key, base) {
            out.push(Output::Keep(key));
            out.push(Output::Task(Task::Install(key)));
            hold(&mut self.state, &mut self.weights, part, &[slice].into_iter().collect());
            self.go_on(now, out);
            return true;
        }
        let next = self.applied.next();
        let in_time = (next..=next.next()).contains(&key.step());
        match key {
            Key::Partial { step, slice, node } => {
                let sent_by = place.senders(slice).and_then(|s| s.get(&node));
                if sent_by != Some(&from) || !place.owned.contains(slice) || !in_time {
                    return false;
                }
                if self.inbox.partial(step, slice, node) {
                    out.push(Output::Keep(key));
                    self.reduce(&[slice], out);
                }
            }
            Key::Weights { step, slice } => {
                if place.owners(slice).first() != Some(&from) || !place.computed.contains(slice) {
                    return false;
                }
                if step == self.applied && !self.weights.contains(slice) {
                    out.push(Output::Keep(key));
                    out.push(Output::Task(Task::Install(key)));
                    self.weights.insert(slice);
                    self.go_on(now, out);
                } else if step == next && self.inbox.early(step, slice) {
                    out.push(Output::Keep(key));
                }
            }
            Key::State { .. } => return false,
            Key::Activation { step, micro } => {
                if place.before != Some(from) || !self.has_micro(micro) || !in_time {
                    return false;
                }
                self.stream(key, step, (Direction::Forward, micro), out);
            }
            Key::ActivationGradient { step, micro } => {
                if place.after != Some(from) || !self.has_micro(micro) || !in_time {
                    return false;
                }
                self.stream(key, step, (Direction::Backward, micro), out);
            }
        }
        true
    }

    /// False where the vote does not fit the plan.
    fn vote(&mut self, now: Millis, from: WorkerId, vote: Prepared, out: &mut Vec<Output>) -> bool {
        let Some(place) = &self.place else { return true };
        let next = self.applied.next();
        let in_time = (next..=next.next()).contains(&vote.step);
        if !in_time || !place.vote_fits(from, &vote, &self.table) {
            return false;
        }
        let mut vote = vote;
        if mutant!(self, VoteOfAnotherStep) {
            vote.step = next;
        }
        if self.inbox.vote(from, vote) {
            self.try_commit(now, out);
        }
        true
    }
}

/// The key under which a part of a slice travels.
fn piece(part: Part, step: Step, slice: SliceId) -> Key {
    match part {
        Part::Weights => Key::Weights { step, slice },
        Part::State => Key::State { step, slice },
    }
}

/// Notes that a part of some slices is here. Whoever has the state has the weights.
pub(crate) fn hold(state: &mut SliceSet, weights: &mut SliceSet, part: Part, slices: &SliceSet) {
    weights.extend(slices.iter());
    if part == Part::State {
        state.extend(slices.iter());
    }
}
