//! What came of each fault, and which event is about which of them.
//!
//! Where faults pile up, an event may have several causes. It is credited to one of them: the
//! oldest fault of the worker that it names; others of the same worker are then over with it, and
//! say so. An event that names a worker to which nothing was done is noted at the newest fault that
//! the caravan has not got over. A commit that several faults were waiting for is the recovery of
//! the oldest one.

use super::schedule::{Act, Fault};
use caravan_types::{Generation, WorkerId};
use serde::Serialize;
use std::fmt;
use std::time::Duration;

/// Events about other workers that are kept of a fault.
const MOST_OTHERS: usize = 8;

/// What came of a fault. Times are since the start of the run.
#[derive(Clone, Debug)]
pub struct Told {
    /// What was done.
    pub fault: Fault,
    /// When.
    pub at: Duration,
    /// The newest committed step then.
    pub at_step: u64,
    /// Whether there was a process that it reached; not known while it goes on.
    pub reached: Option<bool>,
    /// When it was over.
    pub over: Option<Duration>,
    /// When an event named the worker, and the event.
    pub noticed: Option<(Duration, String)>,
    /// The fault of the same worker that the event was credited to.
    pub same: Option<usize>,
    /// Workers to which nothing was done and that were named, with the first event of each.
    pub others: Vec<(WorkerId, String)>,
    /// When the next step was committed; that of a newer generation, where somebody was named.
    pub committed: Option<Duration>,
    /// When a step was committed by all workers again.
    pub whole: Option<Duration>,
    /// The worker that it was done to; none where the process had not joined.
    worker: Option<WorkerId>,
    /// The generation that it hit.
    generation: Generation,
}

/// Why no event names the worker that something was done to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Unnoticed {
    /// There was no process.
    NoProcess,
    /// The process was no worker of the run yet.
    NoWorker,
    /// The event is credited to another fault of the worker.
    Same,
    /// The run goes on as if nothing were wrong.
    Harmless,
    /// Others were named instead.
    Others,
    /// The run ended first.
    RunOver,
    /// It should have been.
    Missed,
}

impl fmt::Display for Unnoticed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoProcess => "there was no process",
            Self::NoWorker => "the process had not joined yet",
            Self::Same => "noticed as one with another fault of this worker",
            Self::Harmless => "nothing had to notice it",
            Self::Others => "others were named instead",
            Self::RunOver => "the run was over first",
            Self::Missed => "NOT NOTICED",
        })
    }
}

impl Told {
    /// Whether somebody was named.
    fn seen(&self) -> bool {
        self.noticed.is_some() || self.same.is_some() || !self.others.is_empty()
    }

    /// Why no event names its worker, in a run that ended at `end`; nothing where one does. What
    /// is not noticed for so long as `grace` after it is over will not be.
    #[must_use]
    pub fn unnoticed(&self, end: Duration, grace: Duration) -> Option<Unnoticed> {
        let early = self.over.is_none_or(|over| end < over + grace) && self.whole.is_none();
        match self {
            Self { noticed: Some(_), .. } => None,
            Self { reached: Some(false), .. } => Some(Unnoticed::NoProcess),
            Self { same: Some(_), .. } => Some(Unnoticed::Same),
            Self { worker: None, .. } => Some(Unnoticed::NoWorker),
            _ if !self.fault.act.is_noticed() => Some(Unnoticed::Harmless),
            _ if !self.others.is_empty() => Some(Unnoticed::Others),
            _ if early => Some(Unnoticed::RunOver),
            _ => Some(Unnoticed::Missed),
        }
    }
}

/// A step was committed.
#[derive(Clone, Copy, Debug)]
pub struct Commit {
    /// When.
    pub at: Duration,
    /// By which generation.
    pub generation: Generation,
    /// Whether all workers did.
    pub all: bool,
}

/// All faults so far.
#[derive(Debug)]
pub struct Notes {
    told: Vec<Told>,
    /// A fault that is over for so long, and that nobody has noticed, will not be.
    grace: Duration,
}

impl Notes {
    /// Of no fault yet.
    #[must_use]
    pub fn new(grace: Duration) -> Self {
        Self { told: Vec::new(), grace }
    }

    /// A fault begins, at a worker where there is one; its number, from 0.
    pub fn begins(
        &mut self,
        fault: Fault,
        (at, at_step): (Duration, u64),
        worker: Option<WorkerId>,
        generation: Generation,
    ) -> usize {
        self.told.push(Told {
            fault,
            at,
            at_step,
            reached: None,
            over: None,
            noticed: None,
            same: None,
            others: Vec::new(),
            committed: None,
            whole: None,
            worker,
            generation,
        });
        self.told.len() - 1
    }

    /// A fault is over.
    pub fn ends(&mut self, number: usize, at: Duration, reached: bool) {
        self.told[number].over = Some(at);
        self.told[number].reached = Some(reached);
    }

    /// Whether the caravan is over all of them.
    #[must_use]
    pub fn all_whole(&self) -> bool {
        self.told.iter().all(|told| told.whole.is_some())
    }

    /// An event of this generation names a worker as gone or hanging.
    pub fn named(
        &mut self,
        now: Duration,
        generation: Generation,
        (worker, slot): (WorkerId, Option<u32>),
        text: &str,
    ) {
        let known = |told: &Told| told.worker == Some(worker);
        // A worker that hangs is gone next: that is the same again.
        let again = |told: &Told| {
            known(told) && told.noticed.is_some() && told.fault.act.kind().regroups()
                || told.others.iter().any(|(other, _)| *other == worker)
        };
        if self.told.iter().any(again) {
            return;
        }
        let open = |told: &Told| {
            told.whole.is_none() && told.reached != Some(false) && told.fault.act.kind().regroups()
        };
        // A process may have joined after something was done to it.
        let unknown = |told: &Told| told.worker.is_none() && Some(told.fault.slot) == slot;
        let mut meant = (0..self.told.len())
            .filter(|n| open(&self.told[*n]) && (known(&self.told[*n]) || unknown(&self.told[*n])));
        let others: Vec<usize>;
        if let Some(first) = meant.next() {
            others = meant.filter(|n| known(&self.told[*n])).collect();
            let told = &mut self.told[first];
            told.worker = Some(worker);
            told.noticed = Some((now, text.to_owned()));
            told.uncommit(generation);
            for number in others {
                self.told[number].same = Some(first);
                self.told[number].uncommit(generation);
            }
        } else if let Some(told) = self.told.iter_mut().rfind(|told| open(told)) {
            if told.others.len() < MOST_OTHERS {
                told.others.push((worker, text.to_owned()));
            }
            told.uncommit(generation);
        }
    }

    /// A checkpoint could not be written: the event names no worker; the oldest one whose disk is
    /// full is meant.
    pub fn checkpoint_failed(&mut self, now: Duration, text: &str) {
        let waits = |told: &&mut Told| told.fault.act == Act::Disk && told.noticed.is_none();
        if let Some(told) = self.told.iter_mut().filter(|told| told.over.is_none()).find(waits) {
            told.noticed = Some((now, text.to_owned()));
        }
    }

    /// A step was committed.
    pub fn committed(&mut self, Commit { at, generation, all }: Commit) {
        let grace = self.grace;
        for told in &mut self.told {
            if !told.seen() || !told.fault.act.kind().regroups() || generation > told.generation {
                told.committed.get_or_insert(at);
            }
            let missed = told.reached == Some(false) || !told.fault.act.is_noticed();
            let quiet = |over: Duration| missed || at >= over + grace;
            if all && told.over.is_some_and(|over| told.seen() || quiet(over)) {
                told.whole.get_or_insert(at);
            }
        }
    }

    /// What came of them.
    #[must_use]
    pub fn told(self) -> Vec<Told> {
        self.told
    }
}

impl Told {
    /// Steps of the generation that it hit were committed as if there were no fault.
    fn uncommit(&mut self, generation: Generation) {
        if self.generation == generation {
            self.committed = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRACE: Duration = Duration::from_secs(2);
    const G1: Generation = Generation(1);

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// Faults of these workers (slot and id are the same number), a second apart.
    fn notes(faults: &[(u32, Act)]) -> Notes {
        let mut notes = Notes::new(GRACE);
        for (n, (slot, act)) in (0..).zip(faults) {
            let fault = Fault { slot: *slot, step: n, moment: 0.0, act: *act };
            notes.begins(fault, (s(n), n), Some(WorkerId(u64::from(*slot))), G1);
        }
        notes
    }

    fn named(notes: &mut Notes, at: u64, worker: u64) {
        notes.named(s(at), G1, (WorkerId(worker), Some(worker as u32)), &format!("w{worker} is gone"));
    }

    #[test]
    fn an_event_is_credited_to_the_oldest_fault_of_its_worker_and_the_others_say_so() {
        let stop = Act::Stop { budgets: 2.0 };
        let mut notes = notes(&[(1, stop), (2, Act::Kill), (1, Act::Kill)]);
        named(&mut notes, 3, 1);
        named(&mut notes, 4, 2);
        let told = notes.told();
        assert_eq!(told[0].noticed, Some((s(3), "w1 is gone".into())));
        assert_eq!(told[1].noticed, Some((s(4), "w2 is gone".into())));
        assert_eq!((told[2].noticed.as_ref(), told[2].same), (None, Some(0)));
        assert_eq!(told[2].unnoticed(s(9), GRACE), Some(Unnoticed::Same));
    }

    #[test]
    fn a_worker_that_hangs_and_then_is_gone_is_one_event() {
        let mut notes = notes(&[(1, Act::Kill), (1, Act::Kill)]);
        named(&mut notes, 3, 1);
        named(&mut notes, 4, 1);
        let told = notes.told();
        assert_eq!(told[0].noticed.as_ref().map(|n| n.0), Some(s(3)));
        assert_eq!(told[1].noticed, None);
        assert!(told.iter().all(|told| told.others.is_empty()));
    }

    #[test]
    fn a_worker_to_which_nothing_was_done_is_noted_once_at_the_newest_fault() {
        let mut notes = notes(&[(1, Act::Kill), (2, Act::Kill)]);
        named(&mut notes, 3, 3);
        named(&mut notes, 4, 3);
        let told = notes.told();
        assert!(told[0].others.is_empty());
        assert_eq!(told[1].others, [(WorkerId(3), "w3 is gone".into())]);
        assert_eq!(told[1].unnoticed(s(9), GRACE), Some(Unnoticed::Others));
    }

    #[test]
    fn why_nobody_noticed_is_said_and_a_fault_that_should_have_been_is_told_from_others() {
        let slow = Act::Slow { budgets: 0.1, pauses: 3 };
        let mut notes = notes(&[(1, Act::Kill), (2, slow), (3, Act::Kill), (4, Act::Kill)]);
        notes.ends(0, s(1), true);
        notes.ends(1, s(2), true);
        notes.ends(2, s(3), false);
        let told = notes.told();
        let why = |n: usize, end| told[n].unnoticed(s(end), GRACE).unwrap();
        assert_eq!((why(0, 2), why(0, 3)), (Unnoticed::RunOver, Unnoticed::Missed));
        assert_eq!((why(1, 9), why(2, 9)), (Unnoticed::Harmless, Unnoticed::NoProcess));
        assert_eq!(why(3, 9), Unnoticed::RunOver, "it goes on still");
    }

    #[test]
    fn each_full_disk_is_credited_with_one_checkpoint() {
        let mut notes = notes(&[(1, Act::Disk), (2, Act::Disk)]);
        notes.checkpoint_failed(s(3), "the first");
        notes.checkpoint_failed(s(4), "the second");
        let told = notes.told();
        assert_eq!(told[0].noticed, Some((s(3), "the first".into())));
        assert_eq!(told[1].noticed, Some((s(4), "the second".into())));
    }

    #[test]
    fn a_worker_that_dies_after_its_disk_was_full_is_noticed() {
        let mut notes = notes(&[(1, Act::Disk), (1, Act::Kill)]);
        notes.checkpoint_failed(s(1), "no room");
        named(&mut notes, 2, 1);
        assert_eq!(notes.told()[1].noticed, Some((s(2), "w1 is gone".into())));
    }

    #[test]
    fn a_recovery_is_the_first_commit_of_a_newer_generation_and_the_caravan_is_whole_with_all() {
        let mut notes = notes(&[(1, Act::Kill)]);
        let commit = |at, generation, all| Commit { at: s(at), generation: Generation(generation), all };
        notes.committed(commit(1, 1, true));
        notes.ends(0, s(1), true);
        named(&mut notes, 2, 1);
        notes.committed(commit(3, 2, false));
        assert!(!notes.all_whole());
        notes.committed(commit(4, 3, true));
        let told = notes.told();
        assert_eq!((told[0].committed, told[0].whole), (Some(s(3)), Some(s(4))));
    }
}
