//! Silent corruption: owners of one slice say different things, and one of them is wrong.
//!
//! Where more than half agree, the others are cut out. Where no majority says who is right, it
//! is computed again: a gradient by doing the step again, with one owner more to make a
//! majority where there is somebody; training state from the newest checkpoint, since no copy
//! of the slice can be trusted. What then comes out says who was wrong. So does a worker that
//! says one thing and then another where the other owner repeats itself.
//!
//! A worker that finds its own memory changed says so and ends; no other one has to agree.

use crate::{Core, Millis, Output};
use caravan_types::message::{Farewell, Report};
use caravan_types::status::{Event, LossReason, Phase};
use caravan_types::{
    Dispute, Generation, Opinion, Plan, SliceId, SliceSet, SliceSum, Step, Subject, WorkerId,
};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

/// Owners of one slice that differ this often without a step in between cannot be told apart;
/// going on would write bad weights.
const MOST_DIVERGENCES: u32 = 3;

/// What nobody has decided yet.
#[derive(Clone, Debug, Default)]
pub(crate) struct Disputes {
    /// The newest of each slice and subject: whoever computes it again says who was wrong.
    pub(crate) open: Vec<Dispute>,
    /// Those that are about training state which others are not to heal from.
    doubted: Vec<Dispute>,
    /// Slices whose owners have differed: weights of them that others have got may be wrong, too.
    tainted: BTreeSet<SliceId>,
    /// What was told before all members were back with a restarted coordinator: by whom, in which
    /// generation, and what.
    pub(crate) early: Option<(WorkerId, Generation, Vec<Dispute>)>,
    /// How often owners differed since a step was committed.
    pub(crate) times: u32,
}

impl Disputes {
    /// Those that a plan in force is to settle.
    pub(crate) fn of(plan: Option<&Plan>) -> Self {
        let open = plan.map(|plan| plan.disputes.clone()).unwrap_or_default();
        Self { open, ..Self::default() }
    }

    /// Whom an earlier dispute about the same thing shows to be wrong: the only one who does not
    /// say the same again.
    fn inconstant(&self, now: &Dispute) -> Option<WorkerId> {
        let same = |d: &&Dispute| (d.slice, d.step, d.subject) == (now.slice, now.step, now.subject);
        let before = self.open.iter().find(same)?;
        let said =
            |worker: &WorkerId| before.said.iter().find(|(w, _)| w == worker).map(|(_, opinion)| *opinion);
        let known = now.said.iter().filter_map(|(w, opinion)| Some((*w, said(w)? == *opinion)));
        let (same, other): (Vec<_>, Vec<_>) = known.partition(|(_, same)| *same);
        match (same.as_slice(), other.as_slice()) {
            ([_, ..], [(worker, _)]) => Some(*worker),
            _ => None,
        }
    }

    fn add(&mut self, dispute: Dispute) {
        self.open.retain(|d| (d.slice, d.subject) != (dispute.slice, dispute.subject));
        if dispute.subject == Subject::State {
            self.doubted.push(dispute.clone());
        }
        self.open.push(dispute);
    }

    /// A plan is in force: nothing that was doubted is in it.
    pub(crate) fn planned(&mut self) {
        self.doubted.clear();
        self.tainted.clear();
    }

    /// It is corrupt: what it has said does not matter any more.
    pub(crate) fn forget(&mut self, culprit: WorkerId) {
        self.open.retain(|d| d.said.iter().all(|(w, _)| *w != culprit));
        self.doubted.retain(|d| d.said.iter().all(|(w, _)| *w != culprit));
    }

    /// Whether nobody is to heal from a worker's training state of a slice at a step.
    fn is_doubted(&self, worker: WorkerId, slice: SliceId, step: Step) -> bool {
        let about = |d: &&Dispute| d.slice == slice && d.step == step;
        self.doubted.iter().filter(about).any(|d| d.said.iter().any(|(w, _)| *w == worker))
    }

    /// Who is wrong, with the reason; what nobody can say yet stays open.
    fn judge(&mut self, disputes: Vec<Dispute>, out: &mut Vec<Output>) -> BTreeMap<WorkerId, String> {
        let mut culprits = BTreeMap::new();
        let mut open = Vec::new();
        for dispute in disputes {
            let Dispute { slice, step, subject, .. } = dispute;
            if subject == Subject::State {
                self.tainted.insert(slice);
            }
            let named = |why: &str| format!("its {subject} of {slice} at step {step} is not what {why}");
            if let Some(truth) = dispute.majority() {
                culprits.extend(dispute.wrong(truth).map(|w| (w, named("most of its owners have"))));
            } else if let Some(worker) = self.inconstant(&dispute) {
                culprits.insert(worker, named("it was before, and the other owner's is"));
            } else {
                open.push(dispute);
            }
        }
        for dispute in open {
            if dispute.said.iter().any(|(w, _)| culprits.contains_key(w)) {
                continue;
            }
            let Dispute { slice, step, subject, .. } = dispute;
            let owners = dispute.said.iter().map(|(w, _)| *w).collect();
            out.push(Output::Note(Event::Diverged { slice, step, subject, owners }));
            self.add(dispute);
        }
        culprits
    }

    /// What of a report others may heal from.
    fn trusted_of<'a>(&self, worker: WorkerId, report: &'a Report) -> Cow<'a, Report> {
        let doubted = |slice: SliceId| self.is_doubted(worker, slice, report.applied);
        let read = |slice: SliceId| self.tainted.contains(&slice) && !report.state.contains(slice);
        if !report.state.iter().any(doubted) && !report.weights.iter().any(read) {
            return Cow::Borrowed(report);
        }
        let kept = |set: &SliceSet| set.iter().filter(|slice| !doubted(*slice)).collect();
        Cow::Owned(Report {
            state: kept(&report.state),
            prepared: report.prepared.as_ref().map(kept),
            weights: report.weights.iter().filter(|slice| !read(*slice)).collect(),
            ..report.clone()
        })
    }

    /// What the reports say of training state: those who are wrong, by majority, and what is left
    /// of the reports where nobody can say who is.
    pub(crate) fn trusted<'a>(
        &mut self,
        reports: &BTreeMap<WorkerId, &'a Report>,
        out: &mut Vec<Output>,
    ) -> (BTreeMap<WorkerId, String>, BTreeMap<WorkerId, Cow<'a, Report>>) {
        let newest = reports.values().map(|r| r.applied).max().unwrap_or_default();
        let at_front = reports.iter().filter(|(_, r)| r.applied == newest);
        let sums: BTreeMap<_, _> = at_front.map(|(w, r)| (*w, r.sums.as_slice())).collect();
        let known = |d: &Dispute| self.open.contains(d);
        let disputes = compare(&sums, newest).into_iter().filter(|d| !known(d)).collect();
        let culprits = self.judge(disputes, out);
        let trusted = reports.iter().map(|(w, r)| (*w, self.trusted_of(*w, r)));
        (culprits, trusted.collect())
    }
}

impl Core {
    /// Owners differ in what they voted on, or in what goes into a checkpoint.
    pub(crate) fn diverged(
        &mut self,
        now: Millis,
        worker: WorkerId,
        generation: Generation,
        disputes: Vec<Dispute>,
        out: &mut Vec<Output>,
    ) {
        let Some(plan) = self.plan.as_ref().filter(|p| p.generation == generation) else { return };
        match self.phase {
            Phase::Regrouping if !self.boundary => return,
            // Nobody goes on without it, and those who are not back yet are as alive as before.
            Phase::Recovering => {
                self.disputes.early = Some((worker, generation, disputes));
                return;
            }
            _ => {}
        }
        let owner =
            |slice: SliceId, w: &WorkerId| plan.owners.get(slice.0 as usize).is_some_and(|o| o.contains(w));
        let sound = |d: &Dispute| {
            let differ = d.said.windows(2).any(|pair| pair[0].1 != pair[1].1);
            differ && d.said.iter().all(|(w, _)| owner(d.slice, w))
        };
        if disputes.is_empty() || !disputes.iter().all(sound) {
            return self.lose(now, worker, LossReason::Misbehaved, out);
        }
        self.disputes.times += 1;
        let culprits = self.disputes.judge(disputes, out);
        if self.disputes.times >= MOST_DIVERGENCES && culprits.is_empty() {
            let reason = format!(
                "owners of one slice had different bits {MOST_DIVERGENCES} times in a row, and nothing says who is \
                 wrong: one of these machines computes wrong values. Start again with one of them left out, or with \
                 redundancy = 3, where the majority names it"
            );
            return self.end(Phase::Failed, Event::Failed { reason }, Farewell::Failed, out);
        }
        if culprits.is_empty() {
            self.stop(now, false, out);
        } else {
            self.cut_out(now, culprits, out);
        }
    }

    /// What was in dispute was computed again, and all owners say the same now.
    pub(crate) fn settled(
        &mut self,
        now: Millis,
        generation: Generation,
        settled: &[Dispute],
        out: &mut Vec<Output>,
    ) {
        if self.plan.as_ref().is_some_and(|p| p.generation == generation) {
            let truths =
                settled.iter().filter_map(|d| Some(((d.slice, d.step, d.subject), d.said.first()?.1)));
            self.settle(now, &truths.collect(), out);
        }
    }

    /// Compares what was said in a dispute with what is known to be true since.
    fn settle(
        &mut self,
        now: Millis,
        truths: &BTreeMap<(SliceId, Step, Subject), Opinion>,
        out: &mut Vec<Output>,
    ) {
        let mut culprits = BTreeMap::new();
        let of = |d: &Dispute| truths.get(&(d.slice, d.step, d.subject)).copied();
        for dispute in &self.disputes.open {
            let Some(truth) = of(dispute) else { continue };
            let Dispute { slice, step, subject, .. } = dispute;
            let what = format!(
                "its {subject} of {slice} at step {step} was not what came out when it was computed again"
            );
            culprits.extend(dispute.wrong(truth).map(|w| (w, what.clone())));
        }
        self.disputes.open.retain(|d| of(d).is_none());
        self.cut_out(now, culprits, out);
    }

    /// All owners have said what they have at a checkpoint's step: whether it is the same.
    pub(crate) fn vouched_alike(
        &mut self,
        now: Millis,
        generation: Generation,
        step: Step,
        vouched: &BTreeMap<WorkerId, Vec<(SliceId, SliceSum)>>,
        out: &mut Vec<Output>,
    ) -> bool {
        let sums = vouched.iter().map(|(w, sums)| (*w, sums.as_slice())).collect();
        let disputes = compare(&sums, step);
        if let Some((&first, _)) = vouched.iter().next().filter(|_| !disputes.is_empty()) {
            let reason = "its owners differ in what is written".to_owned();
            out.push(Output::Note(Event::CheckpointFailed { step, reason }));
            self.diverged(now, first, generation, disputes, out);
            return false;
        }
        let truth =
            |(slice, sum): &(SliceId, SliceSum)| ((*slice, step, Subject::State), Opinion::of_state(*sum));
        self.settle(now, &vouched.values().flatten().map(truth).collect(), out);
        true
    }

    /// The others go on without these.
    pub(crate) fn cut_out(
        &mut self,
        now: Millis,
        culprits: BTreeMap<WorkerId, String>,
        out: &mut Vec<Output>,
    ) {
        let mut any = false;
        for (worker, what) in culprits {
            self.disputes.forget(worker);
            if self.members.has(worker) {
                out.push(Output::Note(Event::Corrupt { worker, what }));
                self.dismiss_as(worker, LossReason::Corrupt, Farewell::Corrupt, out);
                any = true;
            }
        }
        if any {
            self.consider(now, out);
        }
    }
}

/// Slices of which not all say the same.
fn compare(sums: &BTreeMap<WorkerId, &[(SliceId, SliceSum)]>, step: Step) -> Vec<Dispute> {
    let mut said: BTreeMap<SliceId, Vec<(WorkerId, Opinion)>> = BTreeMap::new();
    for (worker, sums) in sums {
        for (slice, sum) in *sums {
            said.entry(*slice).or_default().push((*worker, Opinion::of_state(*sum)));
        }
    }
    said.into_iter().filter_map(|(slice, said)| Dispute::find(slice, step, Subject::State, said)).collect()
}
