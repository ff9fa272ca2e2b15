//! A member's life across generations, and the steps in between.

use crate::heal::Heal;
use crate::part::Place;
use crate::round::{Inbox, Round, Verdict, count};
use crate::{Config, Input, Millis, Output};
use caravan_types::lanes::cover;
use caravan_types::message::{Activity, Committed, FromWorker, Report, ToWorker};
use caravan_types::peer::{Key, PeerMessage, Prepared};
use caravan_types::task::{Done, Task};
use caravan_types::{Generation, Part, Plan, SliceId, SliceSet, SliceTable, Source, Step, WorkerId};

/// Heartbeats within the failure budget: three may be lost or late before one counts as dead.
const HEARTBEATS: u64 = 4;

/// The worker's decisions. See the crate's head for the driver's duties.
#[derive(Clone, Debug)]
pub struct Core {
    config: Config,
    table: SliceTable,
    /// Nothing older than this is obeyed or done any more.
    promised: Generation,
    /// The plan in force; none between a report and the next plan.
    place: Option<Place>,
    applied: Step,
    /// The norm of the last applied step, where known.
    norm: Option<f64>,
    /// Slices whose training state is here, at `applied`.
    state: SliceSet,
    /// Slices whose weights are here, at `applied`.
    weights: SliceSet,
    /// Owned slices whose final gradients for the next step are here, after a vote.
    prepared: Option<SliceSet>,
    heal: Heal,
    round: Round,
    inbox: Inbox,
    /// A generation that the coordinator wants at a step boundary.
    wanted: Option<Generation>,
    /// The boundary at which all members stop, by their votes: this step is applied.
    stopping: Option<Generation>,
    /// Whether the last checkpoint was ordered in this generation.
    finished: bool,
    since: Millis,
    beat: Millis,
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
            norm: None,
            state: SliceSet::default(),
            weights: SliceSet::default(),
            prepared: None,
            heal: Heal::default(),
            round: Round::default(),
            inbox: Inbox::default(),
            wanted: None,
            stopping: None,
            finished: false,
            since: now,
            beat: now,
        }
    }

    /// Takes one input; what is to be done about it is appended to `out`, in order.
    pub fn handle(&mut self, now: Millis, input: Input, out: &mut Vec<Output>) {
        match input {
            Input::Message(message) => self.message(now, message, out),
            Input::Peer { generation, from, message } => self.peer(now, generation, from, message, out),
            Input::PeerLost { generation, peer } => {
                if self.place.as_ref().is_some_and(|p| p.generation() == generation) {
                    out.push(Output::Tell(FromWorker::PeerLost { generation, peer }));
                }
            }
            Input::Done(done) => self.done(now, done, out),
            Input::Leave => out.push(Output::Tell(FromWorker::Leaving)),
            Input::Tick => {}
        }
        if now >= self.beat {
            self.beat = now + (self.config.detect_ms / HEARTBEATS).max(1);
            let (applied, activity) = (self.applied, self.activity());
            out.push(Output::Tell(FromWorker::Heartbeat { applied, activity }));
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
        } else if self.round.losses.is_some() {
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
        if generation < self.promised || (generation == self.promised && self.place.is_some()) {
            return;
        }
        if boundary && self.place.is_some() && !self.finished {
            self.wanted = self.wanted.max(Some(generation));
        } else {
            out.push(Output::Fence(generation));
            self.promise(generation, out);
        }
    }

    /// The report is a promise: nothing more is done in an older generation. At a step boundary
    /// nothing is being computed, and the connections stay open until the next plan: what this
    /// member has just published may still be on its way.
    fn promise(&mut self, generation: Generation, out: &mut Vec<Output>) {
        self.promised = generation;
        self.place = None;
        self.wanted = None;
        self.stopping = None;
        self.finished = false;
        out.push(Output::Tell(FromWorker::Report(Report {
            generation,
            applied: self.applied,
            norm: self.norm,
            state: self.state.clone(),
            weights: self.weights.clone(),
            prepared: self.prepared.clone(),
        })));
    }

    /// Takes a plan into force: finish the step that others have applied, then heal.
    fn adopt(&mut self, now: Millis, plan: Plan, out: &mut Vec<Output>) {
        if plan.generation != self.promised || self.place.is_some() {
            return;
        }
        let units = self.config.shape.units();
        let Some(place) = Place::new(self.config.worker, plan, &self.table, units) else { return };
        self.arrive_at(place.base(), place.plan.norm, out);
        out.push(Output::Task(Task::Reset));
        let peers = place.plan.members.iter().filter(|m| m.worker != place.me).cloned().collect();
        out.push(Output::Connect { generation: place.generation(), peers });
        for (to, part, slices) in place.given() {
            for slice in slices.iter() {
                let message = PeerMessage::Data(piece(part, self.applied, slice));
                out.push(Output::Send { to, message });
            }
        }
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
    fn arrive_at(&mut self, base: Step, norm: Option<f64>, out: &mut Vec<Output>) {
        let prepared = self.prepared.take();
        if base == self.applied {
            return;
        }
        let finish = prepared.zip(norm).filter(|_| base == self.applied.next());
        let kept = match finish {
            Some((slices, norm)) => {
                out.push(Output::Task(Task::Apply { step: base, norm, slices: slices.clone() }));
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
        self.norm = norm;
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
        if generation != place.generation() {
            return;
        }
        let understood = match message {
            PeerMessage::Data(key) => self.data(now, from, key, out),
            PeerMessage::Prepared(vote) => self.vote(now, from, vote, out),
        };
        if !understood {
            out.push(Output::Tell(FromWorker::PeerLost { generation, peer: from }));
        }
    }

    /// False where the sender had no business sending it.
    fn data(&mut self, now: Millis, from: WorkerId, key: Key, out: &mut Vec<Output>) -> bool {
        let Some(place) = &self.place else { return true };
        let base = place.base();
        if let Some(part) = self.heal.arrives(from, key, base) {
            out.push(Output::Keep(key));
            out.push(Output::Task(Task::Install(key)));
            hold(&mut self.state, &mut self.weights, part, &[key.slice()].into_iter().collect());
            self.go_on(now, out);
            return true;
        }
        let (step, slice) = (key.step(), key.slice());
        let next = self.applied.next();
        match key {
            Key::Partial { node, .. } => {
                let sent_by = place.senders(slice).and_then(|s| s.get(&node));
                if sent_by != Some(&from)
                    || !place.owned.contains(slice)
                    || !(next..=next.next()).contains(&step)
                {
                    return false;
                }
                if self.inbox.partial(step, slice, node) {
                    out.push(Output::Keep(key));
                    self.reduce(&[slice], out);
                }
            }
            Key::Weights { .. } => {
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
        }
        true
    }

    /// False where the vote does not fit the plan.
    fn vote(&mut self, now: Millis, from: WorkerId, vote: Prepared, out: &mut Vec<Output>) -> bool {
        let Some(place) = &self.place else { return true };
        let next = self.applied.next();
        let in_time = (next..=next.next()).contains(&vote.step);
        if !in_time || !place.vote_fits(from, &vote.norms, &vote.losses, &self.table) {
            return false;
        }
        if self.inbox.vote(from, vote) {
            self.try_commit(now, out);
        }
        true
    }

    // ---- the life of a step ----

    /// Whatever comes next, once everything that it needs is here: stop, finish, or compute.
    fn go_on(&mut self, now: Millis, out: &mut Vec<Output>) {
        let Some(place) = &self.place else { return };
        if !self.heal.is_done() || !self.weights.is_superset(&place.computed) || self.round.begun {
            return;
        }
        if let Some(generation) = self.stopping {
            return self.promise(generation, out);
        }
        if self.applied.0 >= self.config.steps {
            return self.finish(out);
        }
        let (generation, step, lanes) = (place.generation(), self.applied.next(), place.lanes.clone());
        self.round.begun = true;
        if lanes.is_empty() {
            self.round.losses = Some(Vec::new());
            let owned: Vec<SliceId> = place.owned.iter().collect();
            self.reduce(&owned, out);
            self.prepare(now, out);
        } else {
            out.push(Output::Task(Task::Compute { generation, step, lanes }));
        }
    }

    /// The last step is applied and everything is here: write it down. A stop that was wanted
    /// meanwhile need not wait for another step.
    fn finish(&mut self, out: &mut Vec<Output>) {
        let Some(place) = &self.place else { return };
        if !self.finished {
            self.finished = true;
            let (generation, step, slices) = (place.generation(), self.applied, place.primary.clone());
            if !slices.is_empty() {
                out.push(Output::Task(Task::Save { generation, step, slices }));
            }
        }
        if let Some(generation) = self.wanted {
            self.promise(generation, out);
        }
    }

    fn done(&mut self, now: Millis, done: Done, out: &mut Vec<Output>) {
        let here = |g: Generation, place: &Option<Place>| place.as_ref().is_some_and(|p| p.generation() == g);
        match done {
            Done::Computed { generation, step, losses } => {
                if here(generation, &self.place) && step == self.applied.next() {
                    self.computed(now, losses, out);
                }
            }
            Done::Reduced { generation, step, slice, norms } => {
                if here(generation, &self.place) && step == self.applied.next() {
                    self.round.norms.insert(slice, norms);
                    self.prepare(now, out);
                }
            }
            Done::Loaded { generation, slices, part } => {
                if here(generation, &self.place) {
                    self.heal.local(part, &slices);
                    hold(&mut self.state, &mut self.weights, part, &slices);
                    self.go_on(now, out);
                }
            }
            Done::Saved { generation, step, part } => {
                out.push(Output::Tell(FromWorker::Saved { generation, step, part }));
            }
        }
    }

    /// This member's lanes are computed: send each slice's partial sums to its owners.
    fn computed(&mut self, now: Millis, losses: Vec<(u32, f64)>, out: &mut Vec<Output>) {
        let Some(place) = &self.place else { return };
        let step = self.applied.next();
        self.round.losses = Some(losses);
        let nodes = cover(place.lanes.clone());
        for slice in place.computed.iter() {
            for owner in place.owners(slice).iter().filter(|w| **w != place.me) {
                for &node in &nodes {
                    let message = PeerMessage::Data(Key::Partial { step, slice, node });
                    out.push(Output::Send { to: *owner, message });
                }
            }
        }
        for slice in place.owned.iter().filter(|s| place.computed.contains(*s)) {
            for &node in &nodes {
                self.inbox.partial(step, slice, node);
            }
        }
        let owned: Vec<SliceId> = place.owned.iter().collect();
        self.reduce(&owned, out);
        self.prepare(now, out);
    }

    /// Orders the reduction of those slices whose partial sums are all here.
    fn reduce(&mut self, slices: &[SliceId], out: &mut Vec<Output>) {
        let Some(place) = &self.place else { return };
        let step = self.applied.next();
        if !self.round.begun || self.round.losses.is_none() {
            return;
        }
        for &slice in slices {
            let needed = place.senders(slice).map_or(usize::MAX, std::collections::BTreeMap::len);
            if self.inbox.partials(step, slice) == needed && self.round.reducing.insert(slice) {
                let generation = place.generation();
                out.push(Output::Task(Task::Reduce { generation, step, slice }));
            }
        }
    }

    /// Votes, once all owned slices have their final gradients.
    fn prepare(&mut self, now: Millis, out: &mut Vec<Output>) {
        let Some(place) = &self.place else { return };
        let Some(losses) = self.round.losses.clone() else { return };
        if self.round.voted || self.round.norms.len() != place.owned.len() {
            return;
        }
        self.round.voted = true;
        let norms = std::mem::take(&mut self.round.norms).into_iter().collect();
        let vote = Prepared { step: self.applied.next(), norms, losses, stop_for: self.wanted };
        for to in place.peers() {
            out.push(Output::Send { to, message: PeerMessage::Prepared(vote.clone()) });
        }
        self.prepared = Some(place.owned.clone());
        self.inbox.vote(place.me, vote);
        self.try_commit(now, out);
    }

    /// Everyone is prepared: that is the commit point.
    fn try_commit(&mut self, now: Millis, out: &mut Vec<Output>) {
        let Some(place) = &self.place else { return };
        let step = self.applied.next();
        if !self.round.voted {
            return;
        }
        let Some(votes) = self.inbox.unanimous(step, place.plan.members.len()) else { return };
        let stop_for = votes.values().filter_map(|v| v.stop_for).max();
        match count(votes, &self.table) {
            Verdict::Commit { norm, loss } => self.commit(now, norm, loss, stop_for, out),
            Verdict::Diverged(slice) => {
                let generation = place.generation();
                out.push(Output::Tell(FromWorker::Diverged { generation, step, slice }));
            }
        }
    }

    fn commit(
        &mut self,
        now: Millis,
        norm: f64,
        loss: f64,
        stop_for: Option<Generation>,
        out: &mut Vec<Output>,
    ) {
        let Some(place) = &self.place else { return };
        let (generation, step) = (place.generation(), self.applied.next());
        out.push(Output::Task(Task::Apply { step, norm, slices: place.owned.clone() }));
        let stale: SliceSet = self.state.iter().filter(|s| !place.owned.contains(*s)).collect();
        if !stale.is_empty() {
            // The first commit of a generation implies that everyone is healed: what only the
            // old plan needed here is needed no more.
            out.push(Output::Task(Task::Drop(stale)));
        }
        for slice in place.primary.iter() {
            for &to in place.readers(slice) {
                out.push(Output::Send { to, message: PeerMessage::Data(Key::Weights { step, slice }) });
            }
        }
        let took_ms = now.saturating_sub(self.since);
        out.push(Output::Tell(FromWorker::Committed(Committed { generation, step, loss, norm, took_ms })));
        let due = self.config.checkpoint_every > 0 && step.0.is_multiple_of(self.config.checkpoint_every);
        if due && step.0 < self.config.steps && !place.primary.is_empty() {
            out.push(Output::Task(Task::Save { generation, step, slices: place.primary.clone() }));
        }
        self.applied = step;
        self.norm = Some(norm);
        self.state = place.owned.clone();
        self.weights = place.owned.clone();
        self.prepared = None;
        self.round = Round::default();
        self.since = now;
        self.stopping = stop_for;
        for slice in self.inbox.take_early(step).iter() {
            out.push(Output::Task(Task::Install(Key::Weights { step, slice })));
            self.weights.insert(slice);
        }
        self.inbox.forget(step);
        self.go_on(now, out);
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
fn hold(state: &mut SliceSet, weights: &mut SliceSet, part: Part, slices: &SliceSet) {
    weights.extend(slices.iter());
    if part == Part::State {
        state.extend(slices.iter());
    }
}
