//! The workers that have a session, and what is known of each.

use crate::pace::Pace;
use crate::{Millis, Session};
use caravan_types::message::{Activity, Hello, Report};
use caravan_types::progress::{EngineProgress, Wait};
use caravan_types::{Generation, Step, WorkerId};
use std::collections::BTreeMap;

/// One worker.
#[derive(Clone, Debug)]
pub(crate) struct Worker {
    pub(crate) session: Session,
    pub(crate) name: String,
    pub(crate) fabric: String,
    pub(crate) host: String,
    /// Relative to one ordinary core.
    pub(crate) speed: f64,
    /// In bytes; 0 where not known.
    pub(crate) memory: u64,
    /// When it was last heard.
    pub(crate) heard: Millis,
    pub(crate) applied: Step,
    pub(crate) activity: Activity,
    pub(crate) wait: Wait,
    pub(crate) engine: EngineProgress,
    /// When anything of it last moved: its engine, its step, or what it waits for.
    pub(crate) moved: Millis,
    /// How fast it really is.
    pub(crate) pace: Pace,
    /// It asked to leave.
    pub(crate) leaving: bool,
    /// Its answer to the stop of this generation.
    pub(crate) report: Option<Report>,
}

/// What a heartbeat says.
pub(crate) type Beat = (Step, Activity, Wait, EngineProgress);

/// All workers, by id.
#[derive(Clone, Debug, Default)]
pub(crate) struct Members {
    workers: BTreeMap<WorkerId, Worker>,
    /// How many of them have reported.
    reported: usize,
    /// Nobody was heard for the last time before this. It is found out anew only when
    /// somebody would be silent if it were so: to look at all workers whenever one of them
    /// says something would take a square of their number.
    heard: Option<Millis>,
}

impl Members {
    pub(crate) fn add(&mut self, id: WorkerId, session: Session, hello: Hello, now: Millis) {
        let worker = Worker {
            session,
            name: hello.name,
            fabric: hello.fabric,
            host: hello.host,
            speed: hello.speed,
            memory: hello.memory,
            heard: now,
            applied: Step(0),
            activity: Activity::Waiting,
            wait: Wait::default(),
            engine: EngineProgress::default(),
            moved: now,
            pace: Pace::default(),
            leaving: false,
            report: None,
        };
        self.heard.get_or_insert(now);
        self.remove(id);
        self.workers.insert(id, worker);
    }

    /// No worker was heard for the last time before this; none where there is no worker.
    pub(crate) fn all_heard_since(&self) -> Option<Millis> {
        self.heard.filter(|_| !self.workers.is_empty())
    }

    /// Those that were heard before `since` for the last time.
    pub(crate) fn not_heard_since(&mut self, since: Millis) -> Vec<WorkerId> {
        if self.heard.is_some_and(|heard| heard >= since) {
            return Vec::new();
        }
        let silent = self.iter().filter(|(_, w)| w.heard < since).map(|(id, _)| id).collect();
        self.heard = self.workers.values().map(|w| w.heard).filter(|heard| *heard >= since).min();
        silent
    }

    /// So much time is nobody's silence, and nobody has stood still in it.
    pub(crate) fn excuse(&mut self, now: Millis, more: Millis) {
        let later = |at: Millis| (at + more).min(now);
        self.heard = self.heard.map(later);
        for worker in self.workers.values_mut() {
            worker.heard = later(worker.heard);
            worker.moved = later(worker.moved);
        }
    }

    /// Everybody but one was heard and moved at this moment.
    #[cfg(feature = "explore")]
    pub(crate) fn set_heard(&mut self, at: Millis, but: Option<WorkerId>) {
        for (_, worker) in self.workers.iter_mut().filter(|(id, _)| Some(**id) != but) {
            (worker.heard, worker.moved) = (at, at);
        }
        self.heard = self.workers.values().map(|w| w.heard).min();
    }

    /// How often what has to look at all workers may be done, of all that are said: looking
    /// takes about a tenth of a microsecond a worker, and so never more than a percent of the
    /// time. With few workers that is whenever one of them speaks.
    pub(crate) fn pause(&self) -> Millis {
        self.workers.len() as Millis / 64
    }

    /// A worker says how far it is.
    pub(crate) fn beat(&mut self, id: WorkerId, now: Millis, beat: Beat) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        let (applied, activity, wait, engine) = beat;
        let before = (worker.applied, worker.wait, worker.engine.moved);
        if before != (applied, wait, engine.moved) {
            worker.moved = now;
        }
        (worker.applied, worker.activity, worker.wait, worker.engine) = (applied, activity, wait, engine);
    }

    /// A plan is in force: from now on it counts whether they move, and how fast.
    pub(crate) fn start_moving(&mut self, now: Millis) {
        for worker in self.workers.values_mut() {
            worker.moved = now;
            worker.pace.restart();
        }
    }

    pub(crate) fn remove(&mut self, id: WorkerId) -> bool {
        let gone = self.workers.remove(&id);
        self.reported -= usize::from(gone.as_ref().is_some_and(|w| w.report.is_some()));
        gone.is_some()
    }

    pub(crate) fn get_mut(&mut self, id: WorkerId) -> Option<&mut Worker> {
        self.workers.get_mut(&id)
    }

    pub(crate) fn has(&self, id: WorkerId) -> bool {
        self.workers.contains_key(&id)
    }

    pub(crate) fn len(&self) -> usize {
        self.workers.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.workers.is_empty()
    }

    pub(crate) fn ids(&self) -> Vec<WorkerId> {
        self.workers.keys().copied().collect()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (WorkerId, &Worker)> {
        self.workers.iter().map(|(id, w)| (*id, w))
    }

    pub(crate) fn by_session(&self, session: Session) -> Option<WorkerId> {
        self.iter().find(|(_, w)| w.session == session).map(|(id, _)| id)
    }

    pub(crate) fn any_leaving(&self) -> bool {
        self.workers.values().any(|w| w.leaving)
    }

    /// Whether all of these, ascending, are there.
    pub(crate) fn have_all(&self, ids: impl IntoIterator<Item = WorkerId>) -> bool {
        let mut known = self.workers.keys();
        ids.into_iter().all(|id| known.find(|other| **other >= id) == Some(&id))
    }

    /// Forgets what was reported for older generations.
    pub(crate) fn clear_reports(&mut self) {
        self.workers.values_mut().for_each(|w| w.report = None);
        self.reported = 0;
    }

    /// A worker reports.
    pub(crate) fn report(&mut self, id: WorkerId, report: Report) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        worker.applied = report.applied;
        self.reported += usize::from(worker.report.replace(report).is_none());
    }

    /// All reports for `generation`, if everybody has sent one.
    pub(crate) fn reports(&self, generation: Generation) -> Option<BTreeMap<WorkerId, &Report>> {
        if self.reported < self.workers.len() {
            return None;
        }
        let said = |w: &'_ Worker| w.report.as_ref().is_some_and(|r| r.generation == generation);
        let complete = self.workers.values().all(said);
        let named = self.workers.iter().filter_map(|(id, w)| Some((*id, w.report.as_ref()?)));
        complete.then(|| named.collect())
    }
}
