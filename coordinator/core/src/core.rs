//! The coordinator's state and its transitions.

use crate::accused::{Accusation, Accusations};
use crate::away::Away;
use crate::corrupt::Disputes;
use crate::fallback::Fallback;
use crate::hang::{self, Culprit};
use crate::members::{Members, Worker};
use crate::non_finite::Halt;
use crate::pace::Balance;
use crate::planner::{self, Candidate, Demand};
use crate::regroup::{self, Agreement};
use crate::saves::Saves;
use crate::{Config, Input, Millis, Output, Record, Restored, Session};
use caravan_types::message::{
    Committed, Farewell, FromWorker, Hello, PROTOCOL_VERSION, Refusal, Report, ToWorker,
};
use caravan_types::progress::Doing;
use caravan_types::status::{Event, LossReason, Phase, WorkerStatus};
use caravan_types::timing::millis;
use caravan_types::{
    Generation, Member, NotFinite, Part, Plan, SliceId, SliceSet, SliceTable, Source, Step, Transfer,
    WorkerId, cost,
};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// FLOP/s of a worker that says that its speed is 1: an ordinary core, with vectors of fp32.
/// Only its ratio to the speed of the links decides anything.
const FLOPS_OF_SPEED_1: f64 = 5e10;

/// The coordinator's decisions. See the crate's head for the driver's duties.
#[derive(Clone, Debug)]
pub struct Core {
    pub(crate) config: Config,
    demand: Demand,
    pub(crate) table: SliceTable,
    pub(crate) phase: Phase,
    pub(crate) members: Members,
    pub(crate) next_worker: u64,
    /// The newest generation that was announced.
    pub(crate) generation: Generation,
    /// The plan in force: none before the first one and after all its members died.
    pub(crate) plan: Option<Arc<Plan>>,
    /// While regrouping: whether the step in flight is finished first.
    pub(crate) boundary: bool,
    /// When gathering ends with fewer workers than wanted, or a stop must be answered.
    pub(crate) deadline: Option<Millis>,
    /// The newest committed step, as told.
    pub(crate) committed: Option<Committed>,
    pub(crate) checkpoint: Option<Step>,
    pub(crate) saves: Saves,
    pub(crate) fallback: Fallback,
    pub(crate) accusations: Accusations,
    pub(crate) balance: Balance,
    pub(crate) disputes: Disputes,
    pub(crate) away: Away,
    /// When it was last looked for members that stand still.
    looked: Millis,
    pub(crate) draining: bool,
    /// The next step is not finite, and the run is to end before it.
    pub(crate) halt: Option<Halt>,
    /// The step that is written down before everybody goes.
    pub(crate) saving: Option<Step>,
    /// While recovering: members that are not back yet.
    pub(crate) awaited: BTreeSet<WorkerId>,
    /// While recovering: what members said of others that they have lost.
    pub(crate) missed: BTreeSet<Accusation>,
    #[cfg(feature = "mutants")]
    pub(crate) mutant: Option<crate::Mutant>,
}

impl Core {
    /// A coordinator that has no workers yet.
    #[must_use]
    pub fn new(config: Config, restored: Restored, now: Millis) -> Self {
        let table = SliceTable::new(&config.shape);
        let plan = restored.plan.filter(|plan| plan.generation <= restored.generation);
        let awaited: BTreeSet<WorkerId> =
            plan.iter().flat_map(|plan| &plan.members).map(|m| m.worker).collect();
        let finished = restored.checkpoint.is_some_and(|step| step.0 >= config.steps);
        let demand = Demand {
            shape: config.shape.clone(),
            batch: config.batch,
            precision: config.numerics.precision,
            recompute: config.recompute,
            redundancy: config.redundancy,
            stages: config.stages,
            link_bytes_per_s: planner::LINK_BYTES_PER_S,
        };
        Self {
            deadline: (finished || plan.is_some()).then(|| now + millis(config.timing.reattach())),
            config,
            demand,
            table,
            disputes: Disputes::of(plan.as_deref()),
            phase: match &plan {
                _ if finished => Phase::Finished,
                Some(_) => Phase::Recovering,
                None => Phase::Gathering,
            },
            members: Members::default(),
            next_worker: restored.next_worker.max(1),
            generation: restored.generation,
            plan,
            boundary: false,
            committed: restored.committed,
            checkpoint: restored.checkpoint,
            saves: Saves::default(),
            fallback: Fallback::default(),
            accusations: Accusations::default(),
            balance: Balance::default(),
            away: Away::default(),
            looked: now,
            draining: false,
            halt: None,
            saving: None,
            awaited,
            missed: BTreeSet::new(),
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
        if self.over() {
            return self.turn_away(now, input, out);
        }
        self.is_back(now);
        match input {
            Input::Hello { session, hello } => self.hello(now, session, hello, out),
            Input::Message { worker, message } => self.message(now, worker, message, out),
            Input::Closed { session } => {
                if let Some(worker) = self.members.by_session(session) {
                    self.lose(now, worker, LossReason::SessionClosed, out);
                }
            }
            Input::Completed { generation, step, result } => {
                self.completed(now, generation, step, result, out)
            }
            Input::Found { until, found } => self.found(now, until, found, out),
            Input::Drain => self.drain(now, out),
            Input::Tick => self.tick(now, out),
        }
        self.will_be_back();
    }

    /// When a [`Input::Tick`] is wanted, if nothing else happens.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Millis> {
        if self.over() {
            return self.deadline;
        }
        let silence = millis(self.config.timing.silence());
        let silent = self.members.all_heard_since().map(|heard| heard + silence);
        silent.into_iter().chain(self.deadline).chain(self.accusations.until).min()
    }

    /// Where the run is in its life.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// The newest generation that was announced.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// The newest step that is known to be committed.
    #[must_use]
    pub fn step(&self) -> Step {
        let planned = self.plan.as_ref().map(|p| p.base);
        let told = self.committed.as_ref().map(|c| c.step);
        told.max(planned).or(self.checkpoint).unwrap_or_default()
    }

    /// The newest complete checkpoint.
    #[must_use]
    pub fn checkpoint(&self) -> Option<Step> {
        self.checkpoint
    }

    /// The workers as people are shown them, ascending by id.
    #[must_use]
    pub fn workers(&self, now: Millis) -> Vec<WorkerStatus> {
        let mut owned: BTreeMap<WorkerId, u32> = BTreeMap::new();
        for worker in self.plan.iter().flat_map(|p| p.owners.iter().flatten()) {
            *owned.entry(*worker).or_default() += 1;
        }
        let mut lanes: BTreeMap<WorkerId, (u32, u32)> = BTreeMap::new();
        for pipeline in self.plan.iter().flat_map(|p| &p.pipelines) {
            let range = (pipeline.lanes.start, pipeline.lanes.end);
            lanes.extend(pipeline.stages.iter().map(|stage| (stage.worker, range)));
        }
        let status = |(id, w): (WorkerId, &crate::members::Worker)| WorkerStatus {
            worker: id,
            name: w.name.clone(),
            member: self.plan.as_ref().is_some_and(|p| p.has(id)),
            lanes: lanes.get(&id).copied().unwrap_or_default(),
            owned_slices: owned.get(&id).copied().unwrap_or(0),
            activity: w.activity,
            applied: w.applied,
            silent_ms: now.saturating_sub(w.heard),
        };
        self.members.iter().map(status).collect()
    }

    pub(crate) fn over(&self) -> bool {
        matches!(self.phase, Phase::Drained | Phase::Finished | Phase::Failed)
    }

    // ---- membership ----

    fn hello(&mut self, now: Millis, session: Session, hello: Hello, out: &mut Vec<Output>) {
        let refusal = if hello.protocol != PROTOCOL_VERSION {
            Some(Refusal::Protocol { ours: PROTOCOL_VERSION, theirs: hello.protocol })
        } else if !hello.families.contains(&self.config.numerics.family) {
            Some(Refusal::Numerics {
                needed: self.config.numerics.family.clone(),
                offered: hello.families.clone(),
            })
        } else if let Some(worker) = hello.resume {
            let awaited = self.awaited.contains(&worker);
            (!awaited).then_some(Refusal::Fenced { worker, generation: self.generation })
        } else {
            self.draining.then_some(Refusal::NotTaking)
        };
        if let Some(refusal) = refusal {
            out.push(Output::Note(Event::Refused { name: hello.name, reason: refusal.clone() }));
            return out.push(Output::Refuse { session, refusal });
        }
        if let Some(worker) = hello.resume {
            return self.reattach(now, session, worker, hello, out);
        }
        let worker = WorkerId(self.next_worker);
        self.next_worker += 1;
        out.push(Output::Persist(Record::Worker(self.next_worker)));
        out.push(Output::Welcome { session, worker, committed: self.step() });
        out.push(Output::Note(Event::Joined { worker, name: hello.name.clone() }));
        self.members.add(worker, session, hello, now);
        if self.phase == Phase::Regrouping {
            let stop = ToWorker::Stop { generation: self.generation, boundary: self.boundary };
            out.push(Output::Send { worker, message: stop });
        }
        self.consider(now, out);
    }

    fn message(&mut self, now: Millis, worker: WorkerId, message: FromWorker, out: &mut Vec<Output>) {
        let Some(known) = self.members.get_mut(worker) else { return };
        known.heard = now;
        match message {
            FromWorker::Heartbeat { applied, activity, wait, engine } => {
                self.members.beat(worker, now, (applied, activity, wait, engine));
                self.keep_pace(now, worker, out);
                self.look_for_hang(now, out);
            }
            // For people.
            FromWorker::Peak(_) => {}
            FromWorker::Report(report) => self.report(now, worker, report, out),
            FromWorker::Committed(committed) => self.commit(now, worker, committed, out),
            FromWorker::PeerLost { generation, peer } => self.suspect(now, generation, worker, peer, out),
            FromWorker::Diverged { generation, disputes, .. } => {
                self.diverged(now, worker, generation, disputes, out)
            }
            FromWorker::Settled { generation, disputes } => self.settled(now, generation, &disputes, out),
            FromWorker::NonFinite(told) => self.non_finite(now, worker, told, out),
            FromWorker::Corrupt { what } => {
                self.disputes.forget(worker);
                out.push(Output::Note(Event::Corrupt { worker, what }));
                self.lose(now, worker, LossReason::Corrupt, out);
            }
            FromWorker::Saved { generation, step, part } => self.saved(now, generation, step, part, out),
            FromWorker::Vouched { generation, step, sums } => {
                self.vouched(now, worker, generation, step, sums, out)
            }
            FromWorker::LoadFailed { generation, step, reason } => {
                self.load_failed(now, worker, (generation, step), reason, out)
            }
            FromWorker::Leaving => {
                known.leaving = true;
                self.consider(now, out);
            }
        }
    }

    pub(crate) fn lose(&mut self, now: Millis, worker: WorkerId, reason: LossReason, out: &mut Vec<Output>) {
        if !self.members.remove(worker) {
            return;
        }
        let farewell = if reason == LossReason::Corrupt { Farewell::Corrupt } else { Farewell::Fenced };
        if reason != LossReason::SessionClosed {
            out.push(Output::Send { worker, message: ToWorker::Goodbye(farewell) });
        }
        out.push(Output::Note(Event::Lost { worker, reason }));
        self.consider(now, out);
    }

    /// Where members of the plan stand still for longer than the failure budget, the first cause
    /// is cut out. They tell of it themselves, so this is looked at whenever one of them speaks.
    fn look_for_hang(&mut self, now: Millis, out: &mut Vec<Output>) {
        let stepping = match self.phase {
            Phase::Running => true,
            Phase::Regrouping => self.boundary,
            _ => false,
        };
        if !stepping || now < self.looked + self.members.pause() {
            return;
        }
        self.looked = now;
        let Some(plan) = &self.plan else { return };
        let timing = self.config.timing;
        // Opening data and reading a checkpoint are one task each, and as slow as a disk may be.
        let budget = |w: &Worker| match w.engine.doing {
            Doing::Nothing | Doing::Loading => millis(timing.slow_disk()),
            _ => millis(timing.hang()),
        };
        let still = |w: &Worker| now >= w.moved + budget(w);
        if !self.members.iter().any(|(id, w)| still(w) && plan.has(id)) {
            return;
        }
        let all: BTreeMap<WorkerId, &Worker> = self.members.iter().filter(|(id, _)| plan.has(*id)).collect();
        let Some(Culprit { worker, waiting }) = hang::culprit(&all, still) else { return };
        let Worker { moved, wait, engine, .. } = all[&worker];
        let (still_ms, doing, wait) = (now - moved, engine.doing, *wait);
        out.push(Output::Note(Event::Hung { worker, still_ms, doing, wait, waiting }));
        self.lose(now, worker, LossReason::Hung, out);
    }

    fn tick(&mut self, now: Millis, out: &mut Vec<Output>) {
        // Whoever was heard so long ago is lost, and not only who was heard before.
        let silence = millis(self.config.timing.silence());
        for worker in self.members.not_heard_since((now + 1).saturating_sub(silence)) {
            self.lose(now, worker, LossReason::Silent, out);
        }
        if self.accusations.until.is_some_and(|until| now >= until) {
            self.judge(now, out);
        }
        if self.deadline.is_some_and(|d| now >= d) {
            self.deadline = None;
            match self.phase {
                Phase::Gathering if !self.members.is_empty() => self.stop(now, false, out),
                Phase::Recovering => self.recover(now, true, out),
                Phase::Regrouping => {
                    let mute = self.members.iter().filter(|(_, w)| w.report.is_none());
                    for worker in mute.map(|(id, _)| id).collect::<Vec<_>>() {
                        self.lose(now, worker, LossReason::Silent, out);
                    }
                }
                _ => {}
            }
        }
    }

    // ---- generations ----

    /// Looks at who is there, and starts whatever that calls for.
    pub(crate) fn consider(&mut self, now: Millis, out: &mut Vec<Output>) {
        if self.over() {
            return;
        }
        if self.phase == Phase::Recovering {
            return self.recover(now, false, out);
        }
        if self.members.is_empty() {
            return self.empty(out);
        }
        let dead = || self.plan.iter().any(|p| !self.members.have_all(p.members.iter().map(|m| m.worker)));
        match self.phase {
            Phase::Gathering if self.members.len() >= self.config.workers as usize => {
                self.stop(now, false, out)
            }
            Phase::Gathering => {
                self.deadline.get_or_insert(now + millis(self.config.timing.answer()));
            }
            Phase::Regrouping if self.boundary && (dead() || self.is_halted()) => self.stop(now, false, out),
            Phase::Regrouping => self.decide(now, out),
            Phase::Running | Phase::Draining if dead() => self.stop(now, false, out),
            Phase::Running if self.is_halted() => self.stop(now, false, out),
            Phase::Running if self.wants_change() => self.stop(now, true, out),
            _ => {}
        }
    }

    /// Nobody is left: wait for workers, or be drained.
    pub(crate) fn empty(&mut self, out: &mut Vec<Output>) {
        if self.plan.take().is_some() {
            out.push(Output::Persist(Record::Disbanded));
        }
        self.deadline = None;
        self.phase = Phase::Gathering;
        if self.draining {
            let step = self.checkpoint.unwrap_or_default();
            self.end(Phase::Drained, Event::Drained { step }, Farewell::Drained, out);
        }
    }

    /// Whether the plan should be another one at the next step boundary.
    fn wants_change(&self) -> bool {
        let Some(plan) = &self.plan else { return false };
        let joined = self.members.iter().any(|(id, _)| !plan.has(id));
        joined || self.members.any_leaving() || self.draining || self.balance.is_due(self.step())
    }

    /// Announces a new generation: everybody stops, at once or after the step in flight.
    pub(crate) fn stop(&mut self, now: Millis, boundary: bool, out: &mut Vec<Output>) {
        self.generation = self.generation.next();
        self.phase = Phase::Regrouping;
        self.boundary = boundary;
        // A stop at once is answered at once. A step may take as long as it takes; a member
        // that dies in it is known by its session or its silence.
        self.deadline = (!boundary).then_some(now + millis(self.config.timing.answer()));
        if !boundary {
            self.accusations.stopped();
        }
        self.members.clear_reports();
        out.push(Output::Persist(Record::Generation(self.generation)));
        out.push(Output::Note(Event::Stopping { generation: self.generation, boundary }));
        for worker in self.members.ids() {
            let message = ToWorker::Stop { generation: self.generation, boundary };
            out.push(Output::Send { worker, message });
        }
    }

    fn report(&mut self, now: Millis, worker: WorkerId, report: Report, out: &mut Vec<Output>) {
        if self.phase != Phase::Regrouping || report.generation != self.generation {
            return;
        }
        let in_range =
            |set: &SliceSet| set.iter().last().is_none_or(|SliceId(i)| (i as usize) < self.table.len());
        let sums = report.sums.iter().map(|(slice, _)| *slice).collect();
        let sets = [&report.state, &report.weights, &sums];
        if !(sets.into_iter().all(in_range) && report.prepared.iter().all(in_range)) {
            return self.lose(now, worker, LossReason::Misbehaved, out);
        }
        self.members.report(worker, report);
        self.decide(now, out);
    }

    /// Once everybody has reported: goes on with a new plan, or saves and ends.
    pub(crate) fn decide(&mut self, now: Millis, out: &mut Vec<Output>) {
        let Some(reports) = self.members.reports(self.generation) else { return };
        if self.fallback.is_looking() {
            return;
        }
        let (culprits, trusted) = self.disputes.trusted(&reports, out);
        if !culprits.is_empty() {
            return self.cut_out(now, culprits, out);
        }
        let reports: BTreeMap<WorkerId, &Report> = trusted.iter().map(|(w, r)| (*w, &**r)).collect();
        let mut agreement =
            regroup::agree(&reports, self.committed.as_ref(), self.checkpoint, self.table.len());
        if mutant!(self, HealFromAnotherStep) {
            for (worker, report) in &reports {
                let (state, weights) = (report.state.clone(), report.weights.clone());
                agreement.holdings.insert(*worker, regroup::Holding { state, weights });
            }
        }
        self.deadline = None;
        self.accusations.stopped();
        let nobody_stays = self.members.iter().all(|(_, w)| w.leaving);
        let halts = self.halt.as_ref().is_some_and(|halt| halt.step == agreement.start.base.next());
        if (self.draining || nobody_stays || halts) && agreement.settled {
            return self.save(now, &agreement, out);
        }
        match self.fallback.falls_back(&mut agreement, self.checkpoint) {
            Ok(()) => self.adopt(now, agreement, out),
            Err(reason) => self.end(Phase::Failed, Event::Failed { reason }, Farewell::Failed, out),
        }
    }

    /// Makes a plan of an agreement and puts it in force.
    fn adopt(&mut self, now: Millis, agreement: Agreement, out: &mut Vec<Output>) {
        let lost = agreement.lost;
        let (start, candidates) = self.candidates(agreement);
        let stays = |w: &WorkerId| candidates.binary_search_by_key(w, |c| c.member.worker).is_ok();
        let gone: Vec<WorkerId> = self.members.ids().into_iter().filter(|w| !stays(w)).collect();
        for worker in gone {
            self.dismiss(worker, out);
        }
        if candidates.is_empty() {
            return self.consider(now, out);
        }
        let before = self.plan.as_ref().map_or(&[][..], |plan| &plan.pipelines);
        let disputes = &self.disputes.open;
        let plan =
            planner::plan(&self.demand, &self.table, self.generation, start, &candidates, before, disputes);
        let plan = match plan {
            Ok(plan) => Arc::new(plan),
            // Everybody has stopped and keeps what it has: whoever comes or goes is asked to
            // report too, and then it is tried again.
            Err(reason) => return out.push(Output::Note(Event::NoPlan { reason: reason.to_string() })),
        };
        if let Some(from) = lost {
            out.push(Output::Note(Event::RolledBack { from, to: plan.base }));
        }
        self.committed = self.committed.take().filter(|c| c.step <= plan.base);
        out.push(Output::Persist(Record::Plan(Arc::clone(&plan))));
        out.push(Output::Note(planned(&plan, &self.table)));
        for worker in plan.members.iter().map(|m| m.worker) {
            out.push(Output::Send { worker, message: ToWorker::Plan(Arc::clone(&plan)) });
        }
        // Whatever was not finite is computed again, and told again.
        self.halt = None;
        self.balance.planned(plan.base);
        self.disputes.planned();
        self.saves.planned();
        self.plan = Some(plan);
        self.phase = Phase::Running;
        self.members.start_moving(now);
    }

    /// Who can be in the next plan. A leaver stays one more generation where the others lack
    /// something that it holds, and never where it would be alone.
    fn candidates(&self, agreement: Agreement) -> (planner::Start, Vec<Candidate>) {
        let Agreement { start, mut holdings, .. } = agreement;
        let mut all = Vec::with_capacity(self.members.len());
        for (id, worker) in self.members.iter() {
            let holding = holdings.remove(&id).unwrap_or_default();
            all.push(Candidate {
                member: Member { worker: id, fabric: worker.fabric.clone() },
                host: worker.host.clone(),
                speed: self.believed(worker) * FLOPS_OF_SPEED_1,
                memory: worker.memory,
                state: holding.state,
                weights: holding.weights,
                leaving: worker.leaving,
            });
        }
        let kept: SliceSet = all.iter().filter(|c| !c.leaving).flat_map(|c| c.state.iter()).collect();
        if all.iter().all(|c| c.leaving) || kept.len() == self.table.len() || mutant!(self, DropLeaversSlices)
        {
            all.retain(|c| !c.leaving);
        }
        (start, all)
    }

    fn commit(&mut self, now: Millis, worker: WorkerId, committed: Committed, out: &mut Vec<Output>) {
        if let Some(known) = self.members.get_mut(worker) {
            known.applied = known.applied.max(committed.step);
            known.moved = now;
        }
        let Some(plan) = &self.plan else { return };
        let newest = self.committed.as_ref().map_or(plan.base, |c| c.step.max(plan.base));
        if committed.generation != plan.generation || committed.step <= newest {
            return;
        }
        let members = plan.members.iter().map(|m| m.worker).collect();
        self.accusations.stepped();
        self.disputes.times = 0;
        self.committed = Some(committed.clone());
        let skipped = NotFinite::of(committed.norm, committed.loss);
        let step = committed.step;
        out.push(Output::Committed { committed, members });
        out.extend(skipped.map(|what| Output::Note(Event::Skipped { step, what })));
        self.consider(now, out);
    }
}

fn planned(plan: &Plan, table: &SliceTable) -> Event {
    let from_peers = || plan.transfers.iter().filter(|t| matches!(t.from, Source::Peer(_)));
    let bytes = |t: &Transfer| {
        let elements = t.slices.iter().filter_map(|id| table.get(id)).map(|slice| slice.len() as u64);
        let each = if t.part == Part::State { cost::STATE } else { cost::FP32 };
        each * elements.sum::<u64>()
    };
    Event::Planned {
        generation: plan.generation,
        base: plan.base,
        members: plan.members.iter().map(|m| m.worker).collect(),
        moved: from_peers().map(|t| t.slices.len() as u64).sum(),
        bytes: from_peers().map(bytes).sum(),
    }
}
