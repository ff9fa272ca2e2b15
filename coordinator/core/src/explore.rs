//! The state as an exhaustive exploration compares it: without what decides nothing, and with
//! all times told anew, so that what was reached in different ways can be seen to be the same.

use crate::away::Away;
use crate::{Core, Millis, Session};
use caravan_types::WorkerId;
use caravan_types::message::{FromWorker, Report};
use caravan_types::status::Phase;
use std::fmt::Debug;

impl Core {
    /// The same state with other times: everybody was heard and moved at `heard`, and whatever
    /// is waited for is due at `due`.
    pub fn set_times(&mut self, heard: Millis, due: Millis) {
        self.members.set_heard(heard, None);
        // It is never late itself.
        self.away = Away::default();
        self.deadline = self.deadline.map(|_| due);
        self.accusations.until = self.accusations.until.map(|_| due);
    }

    /// Everybody but one is heard.
    pub fn hear(&mut self, now: Millis, but: Option<WorkerId>) {
        self.members.set_heard(now, but);
    }

    /// The workers that have a session.
    #[must_use]
    pub fn members(&self) -> Vec<WorkerId> {
        self.members.ids()
    }

    /// Whether it was asked to stop.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.draining
    }

    /// Whether a deadline stands, and whether a verdict about accusations does.
    #[must_use]
    pub fn is_due(&self) -> (bool, bool) {
        (self.deadline.is_some(), self.accusations.until.is_some())
    }

    /// Whether a message changes nothing, now or later: it is of a generation that is over, or tells
    /// what is known.
    #[must_use]
    pub fn is_stale(&self, message: &FromWorker) -> bool {
        let planned = self.plan.as_ref().map_or(self.generation, |plan| plan.generation);
        match message {
            FromWorker::Report(report) => {
                let awaited = report.generation == self.generation && self.phase == Phase::Regrouping;
                report.generation <= self.generation && !awaited
            }
            FromWorker::Committed(committed) => {
                let here = self.plan.is_some() && committed.generation == planned;
                committed.generation <= planned && !(here && committed.step > self.step())
            }
            FromWorker::Vouched { generation, step, .. } => {
                Some(*step) <= self.checkpoint || self.plan.is_some() && *generation < planned
            }
            FromWorker::PeerLost { generation, .. } => {
                let stopping = self.phase == Phase::Regrouping && !self.boundary;
                let here = self.plan.is_some() && *generation == planned;
                *generation <= planned && (stopping || !here)
            }
            _ => false,
        }
    }

    /// All that decides what it will do with the inputs to come, but for its configuration, times,
    /// and what heartbeats say.
    pub fn essence(&self) -> impl Debug + '_ {
        let regrouping = self.phase == Phase::Regrouping;
        // Reports are forgotten before they are asked for again.
        let member =
            |(id, w): (WorkerId, &'_ crate::members::Worker)| -> (WorkerId, Session, bool, Option<Report>) {
                (id, w.session, w.leaving, w.report.clone().filter(|_| regrouping))
            };
        let members: Vec<_> = self.members.iter().map(member).collect();
        let (deadline, verdict) = self.is_due();
        let ids = (self.phase, members, self.next_worker, self.generation, &self.plan);
        let stop = (self.boundary, deadline, verdict, &self.accusations);
        let saves = (!self.over()).then(|| self.saves.essence(self.checkpoint));
        let run = (&self.committed, self.checkpoint, saves, &self.disputes, &self.fallback);
        let end = (self.draining, self.saving, &self.awaited, &self.missed, &self.halt);
        (ids, stop, run, end)
    }
}
