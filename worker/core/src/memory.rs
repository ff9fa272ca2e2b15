//! What was told to the coordinator and may have to be told again.
//!
//! Stepping goes on while there is no coordinator. One that was restarted knows what it had
//! written down; what it was told since then, or while it was not there, it is told again.

use crate::Output;
use caravan_types::message::{Committed, FromWorker};
use caravan_types::{Generation, Step, WorkerId};
use std::collections::{BTreeSet, VecDeque};

/// Commits that are remembered: a coordinator that is away for an hour at 18 steps a second
/// misses none. About 4 MiB.
const COMMITS: usize = 1 << 16;

/// Parts of checkpoints that are remembered: of the newest one and, where steps are faster than
/// disks, the one before it.
const PARTS: usize = 2;

#[derive(Clone, Debug, Default)]
pub(crate) struct Memory {
    commits: VecDeque<Committed>,
    /// [`FromWorker::Saved`].
    parts: VecDeque<FromWorker>,
    /// Members of the generation in force that this one has lost.
    lost: BTreeSet<WorkerId>,
    /// [`FromWorker::Diverged`], where the generation in force cannot go on because of it.
    diverged: Option<FromWorker>,
    /// [`FromWorker::NonFinite`], where the generation in force cannot go on because of it.
    non_finite: Option<FromWorker>,
    /// [`FromWorker::Settled`], of the generation in force.
    settled: Option<FromWorker>,
    /// [`FromWorker::Vouched`], of the newest checkpoint.
    vouched: Option<FromWorker>,
    /// [`FromWorker::LoadFailed`], where the generation in force cannot begin because of it.
    load_failed: Option<FromWorker>,
    leaving: bool,
}

impl Memory {
    /// A new plan is in force: what was wrong with the old one is over.
    pub(crate) fn start(&mut self) {
        self.lost.clear();
        self.diverged = None;
        self.non_finite = None;
        self.settled = None;
        self.load_failed = None;
    }

    pub(crate) fn committed(&mut self, committed: Committed) {
        if self.commits.len() == COMMITS {
            self.commits.pop_front();
        }
        self.commits.push_back(committed);
    }

    pub(crate) fn saved(&mut self, message: FromWorker) {
        if self.parts.len() == PARTS {
            self.parts.pop_front();
        }
        self.parts.push_back(message);
    }

    pub(crate) fn lost(&mut self, peer: WorkerId) {
        self.lost.insert(peer);
    }

    pub(crate) fn diverged(&mut self, message: FromWorker) {
        self.diverged = Some(message);
    }

    pub(crate) fn non_finite(&mut self, message: FromWorker) {
        self.non_finite = Some(message);
    }

    pub(crate) fn settled(&mut self, message: FromWorker) {
        self.settled = Some(message);
    }

    /// False where that was told already.
    pub(crate) fn vouched(&mut self, message: &FromWorker) -> bool {
        let new = self.vouched.as_ref() != Some(message);
        self.vouched = Some(message.clone());
        new
    }

    pub(crate) fn load_failed(&mut self, message: FromWorker) {
        self.load_failed = Some(message);
    }

    pub(crate) fn leaving(&mut self) {
        self.leaving = true;
    }

    /// Tells everything again that a coordinator may not know.
    pub(crate) fn tell(&self, generation: Option<Generation>, known: Step, out: &mut Vec<Output>) {
        let news = self.commits.iter().filter(|c| c.step > known);
        out.extend(news.map(|c| Output::Tell(FromWorker::Committed(c.clone()))));
        out.extend(self.parts.iter().cloned().chain(self.vouched.clone()).map(Output::Tell));
        if let Some(generation) = generation {
            let lost = self.lost.iter().map(|&peer| FromWorker::PeerLost { generation, peer });
            let wrong = [&self.diverged, &self.non_finite, &self.settled, &self.load_failed];
            let others = wrong.into_iter().flatten().cloned();
            out.extend(lost.chain(others).map(Output::Tell));
        }
        if self.leaving {
            out.push(Output::Tell(FromWorker::Leaving));
        }
    }

    /// What may be told again; what is wrong with a generation only while one is in force.
    #[cfg(feature = "explore")]
    pub(crate) fn essence(&self, in_force: bool) -> impl std::fmt::Debug + '_ {
        let wrong = (&self.diverged, &self.non_finite, &self.settled, &self.load_failed);
        let wrong = in_force.then_some((&self.lost, wrong));
        (&self.commits, &self.parts, &self.vouched, wrong, self.leaving)
    }
}
