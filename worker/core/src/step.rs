//! The life of a step: compute, reduce, prepare, commit, publish.

use crate::ballot::Ballot;
use crate::core::hold;
use crate::part::Place;
use crate::round::{Direction, Round, Stream, Tally, count};
use crate::schedule::{Op, Schedule};
use crate::{Core, Millis, Output};
use caravan_types::lanes::cover;
use caravan_types::message::{Committed, Farewell, FromWorker};
use caravan_types::peer::{Key, PeerMessage, Prepared, SliceVote};
use caravan_types::task::{Done, Task};
use caravan_types::{Generation, MicroId, Node, Opinion, SliceId, SliceSet, Step};

impl Core {
    /// Whatever comes next, once everything that it needs is here: stop, finish, or compute.
    pub(crate) fn go_on(&mut self, now: Millis, out: &mut Vec<Output>) {
        let Some(place) = &self.place else { return };
        if !self.heal.is_done() || !self.weights.is_superset(&place.computed) || self.round.schedule.is_some()
        {
            return;
        }
        if let Some(generation) = self.stopping {
            // What others may be healed from here has been looked at.
            return if self.has_looked(out) {
                self.promise(generation, out)
            };
        }
        if self.applied.0 >= self.config.steps {
            return self.finish(out);
        }
        self.round.schedule = Some(Schedule::new(place.lanes.clone(), &self.config.batch, place.depth));
        let owned: Vec<SliceId> = place.owned.iter().collect();
        self.reduce(&owned, out);
        self.compute(out);
        self.prepare(now, out);
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
        if !self.has_looked(out) {
            return;
        }
        self.vouch(out);
        if let Some(generation) = self.wanted {
            self.promise(generation, out);
        }
    }

    pub(crate) fn done(&mut self, now: Millis, done: Done, out: &mut Vec<Output>) {
        let here = |g: Generation, place: &Option<Place>| place.as_ref().is_some_and(|p| p.generation() == g);
        match done {
            Done::Lane { generation, step, result } => {
                if here(generation, &self.place) && step == self.applied.next() {
                    self.round.lanes.push(result);
                    self.prepare(now, out);
                }
            }
            Done::Reduced { generation, step, slice, norms, gradient } => {
                if here(generation, &self.place) && step == self.applied.next() {
                    self.round.reduced.insert(slice, (norms, gradient));
                    self.prepare(now, out);
                }
            }
            Done::Applied { step, sums } => {
                // One of an older plan says nothing of what this one has put there.
                let ours = self.place.as_ref().is_some_and(|place| step > place.base());
                if ours && step == self.applied {
                    self.looked(now, sums, out);
                }
            }
            Done::Verified { generation, step, sums } => {
                if here(generation, &self.place) && step == self.applied {
                    self.round.verified = self.round.verifying;
                    self.looked(now, sums, out);
                    self.prepare(now, out);
                }
            }
            Done::Diagnosed { generation, step, finding } => self.diagnosed(generation, step, finding, out),
            Done::Loaded { generation, slices, part } => {
                if here(generation, &self.place) {
                    self.heal.local(part, &slices);
                    hold(&mut self.state, &mut self.weights, part, &slices);
                    self.go_on(now, out);
                }
            }
            Done::LoadFailed { generation, step, reason } => {
                if here(generation, &self.place) {
                    let failed = FromWorker::LoadFailed { generation, step, reason };
                    self.memory.load_failed(failed.clone());
                    out.push(Output::Tell(failed));
                }
            }
            Done::Saved { generation, step, part } => {
                let saved = FromWorker::Saved { generation, step, part };
                self.memory.saved(saved.clone());
                out.push(Output::Tell(saved));
            }
        }
    }

    /// Whether a micro-batch is one of this member's.
    pub(crate) fn has_micro(&self, micro: MicroId) -> bool {
        let lanes = self.place.as_ref().map_or(0..0, |place| place.lanes.clone());
        lanes.contains(&micro.lane) && micro.index < self.config.batch.micro_batches
    }

    /// A stage beside this one sent what it computed.
    pub(crate) fn stream(&mut self, key: Key, step: Step, stream: Stream, out: &mut Vec<Output>) {
        if self.inbox.stream(step, stream) {
            out.push(Output::Keep(key));
            self.compute(out);
        }
    }

    /// Follows the schedule as far as what has come in allows. The engine does tasks in order,
    /// so nothing waits for an answer of it: what is sent is sent when it is there.
    fn compute(&mut self, out: &mut Vec<Output>) {
        let (Some(place), Some(schedule)) = (&self.place, &mut self.round.schedule) else { return };
        let (generation, step) = (place.generation(), self.applied.next());
        let mut ended = Vec::new();
        // Every turn advances the schedule, which is finite.
        while let Some(op) = schedule.next() {
            let (task, from, to, key) = match op {
                Op::Forward(micro) => (
                    Task::Forward { generation, step, micro },
                    place.before.map(|_| (Direction::Forward, micro)),
                    place.after,
                    Key::Activation { step, micro },
                ),
                Op::Backward(micro) => (
                    Task::Backward { generation, step, micro },
                    place.after.map(|_| (Direction::Backward, micro)),
                    place.before,
                    Key::ActivationGradient { step, micro },
                ),
            };
            if from.is_some_and(|stream| !self.inbox.has_stream(step, stream)) {
                break;
            }
            out.push(Output::Task(task));
            if let Some(to) = to {
                out.push(Output::Send { to, message: PeerMessage::Data(key) });
            }
            if let Op::Backward(micro) = op
                && schedule.ends_lane(micro)
            {
                let node = cover(place.lanes.clone())
                    .into_iter()
                    .find(|n| n.lanes().end == u64::from(micro.lane) + 1);
                node.iter().for_each(|node| send_partials(place, step, *node, out));
                ended.extend(node);
            }
            schedule.advance();
        }
        let mine: Vec<SliceId> = place.owned.iter().filter(|s| place.computed.contains(*s)).collect();
        for node in &ended {
            for slice in &mine {
                self.inbox.partial(step, *slice, *node);
            }
        }
        if !ended.is_empty() {
            self.reduce(&mine, out);
        }
        self.verify(out);
    }

    /// Orders the reduction of those slices whose partial sums are all here.
    pub(crate) fn reduce(&mut self, slices: &[SliceId], out: &mut Vec<Output>) {
        let Some(place) = &self.place else { return };
        let step = self.applied.next();
        if self.round.schedule.is_none() {
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
        let computed = self.round.lanes.len() == place.lanes.len();
        let reduced = self.round.reduced.len() == place.owned.len();
        if !computed || !reduced || !self.round.verified || self.round.voted {
            return;
        }
        self.round.voted = true;
        let sums = &self.sums;
        let vote = |(slice, (norms, gradient))| {
            let state = sums.get(&slice).copied().unwrap_or_default();
            SliceVote { slice, norms, gradient, state }
        };
        let slices = std::mem::take(&mut self.round.reduced).into_iter().map(vote).collect();
        let read = place.computed.iter().map(|slice| sums.get(&slice).copied().unwrap_or_default().weights);
        let weights = Opinion::of_weights(read);
        let is_last = place.depth == 1;
        let lanes = if is_last { std::mem::take(&mut self.round.lanes) } else { Vec::new() };
        let vote = Prepared { step: self.applied.next(), slices, weights, lanes, stop_for: self.wanted };
        for to in place.peers() {
            out.push(Output::Send { to, message: PeerMessage::Prepared(vote.clone()) });
        }
        self.prepared = Some(place.owned.clone());
        self.inbox.vote(place.me, vote);
        self.try_commit(now, out);
    }

    /// Everyone is prepared: that is the commit point.
    pub(crate) fn try_commit(&mut self, now: Millis, out: &mut Vec<Output>) {
        let Some(place) = &self.place else { return };
        let step = self.applied.next();
        if !self.round.voted {
            return;
        }
        let members =
            place.plan.members.len() - usize::from(mutant!(self, ApplyEarly) && place.plan.members.len() > 2);
        let Some(votes) = self.inbox.unanimous(step, members) else { return };
        let stop_for = votes.values().filter_map(|v| v.stop_for).max();
        let generation = place.generation();
        let ballot = Ballot::new(step, votes);
        let disputes = if mutant!(self, BlindVote) { Vec::new() } else { ballot.disputes() };
        if !disputes.is_empty() {
            let diverged = FromWorker::Diverged { generation, step, disputes };
            self.memory.diverged(diverged.clone());
            return out.push(Output::Tell(diverged));
        }
        match ballot.misread(place) {
            Some(worker) if worker == place.me => {
                let what = format!("it computed step {step} with other weights than their owners have");
                out.push(Output::Tell(FromWorker::Corrupt { what }));
                return out.push(Output::Exit(Farewell::Corrupt));
            }
            // It sees the same votes, and goes.
            Some(_) => return,
            None => {}
        }
        let settled = ballot.settle(&place.plan.disputes);
        if !settled.is_empty() {
            let settled = FromWorker::Settled { generation, disputes: settled };
            self.memory.settled(settled.clone());
            out.push(Output::Tell(settled));
        }
        let Tally { norm, loss, tokens, lane } = count(votes, mutant!(self, NormByMember));
        let took_ms = now.saturating_sub(self.since);
        let committed = Committed { generation, step, loss, norm, tokens, took_ms };
        let goes_on = self.look_for_cause(&committed, lane, out);
        if goes_on {
            self.commit(now, committed, stop_for, out);
        }
    }

    fn commit(
        &mut self,
        now: Millis,
        committed: Committed,
        stop_for: Option<Generation>,
        out: &mut Vec<Output>,
    ) {
        let Some(place) = &self.place else { return };
        let (verdict, generation, step) = (committed.verdict(), committed.generation, committed.step);
        out.push(Output::Task(Task::Apply { step, verdict, slices: place.owned.clone() }));
        // The first commit of a generation implies that everyone is healed: what only the old plan
        // needed here is needed no more.
        let stale: SliceSet = self.state.iter().filter(|s| !place.owned.contains(*s)).collect();
        if !stale.is_empty() {
            out.push(Output::Task(Task::Drop(stale)));
        }
        if step == place.base().next() {
            out.push(Output::Task(Task::Narrow { units: place.stage.clone() }));
        }
        for slice in place.primary.iter() {
            for &to in place.readers(slice) {
                out.push(Output::Send { to, message: PeerMessage::Data(Key::Weights { step, slice }) });
            }
        }
        self.memory.committed(committed.clone());
        out.push(Output::Tell(FromWorker::Committed(committed)));
        let due = self.config.checkpoint_every > 0 && step.0.is_multiple_of(self.config.checkpoint_every);
        if due && step.0 < self.config.steps && !place.primary.is_empty() {
            out.push(Output::Task(Task::Save { generation, step, slices: place.primary.clone() }));
        }
        self.applied = step;
        self.verdict = Some(verdict);
        self.state = place.owned.clone();
        self.weights = place.owned.clone();
        self.sums.clear();
        self.looking = None;
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

/// A sub-tree of this member's lanes is computed: each slice's sum goes to its owners.
fn send_partials(place: &Place, step: Step, node: Node, out: &mut Vec<Output>) {
    for slice in place.computed.iter() {
        for &to in place.owners(slice).iter().filter(|w| **w != place.me) {
            let message = PeerMessage::Data(Key::Partial { step, slice, node });
            out.push(Output::Send { to, message });
        }
    }
}
