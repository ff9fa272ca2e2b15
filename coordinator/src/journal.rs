//! Tells people what happens: the metrics file, the history in memory, the live feed, Prometheus.
//!
//! An actor of its own, so that nothing that people look at stands in the way of a session: the
//! driver hands over what happened and goes on. The metrics file is for people too; when it
//! cannot be written the run goes on without it, and says so once.
//!
//! Every line of the metrics file is a JSON object with a `kind`: `step` for a committed step
//! ([`StepMetrics`]), any other for an event ([`LoggedEvent`]). Lines are only ever added. After a
//! rollback a step is there again, with a higher generation: the last line of a step counts.

mod file;

use crate::clock::unix_ms;
use crate::history::History;
use crate::metrics::Metrics;
use caravan_types::message::Committed;
use caravan_types::status::{Event, LoggedEvent, Phase, Snapshot, StepMetrics, WorkerStatus};
use caravan_types::{Generation, RunSpec, Step, Verdict};
use file::MetricsFile;
use serde::Serialize;
use std::io;
use std::path::Path;
use std::sync::Arc;
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::time::Instant;

/// What may wait for the journal: some seconds of a small caravan's steps. When the metrics
/// file's disk stalls for longer, the driver waits for it (as it would for its store, which is
/// on the same disk) rather than losing a line.
const MAILBOX: usize = 1024;

/// Requests handled per write to the metrics file.
const BATCH: usize = 256;

/// What a viewer may be behind before it misses something.
const FEED: usize = 1024;

/// Something new for viewers.
#[derive(Clone, Debug)]
pub enum Update {
    /// The run at this moment; several times a second while something happens.
    Snapshot(Arc<Snapshot>),
    /// A step was committed. After a rollback steps come again.
    Step(StepMetrics),
    /// Something happened.
    Event(Arc<LoggedEvent>),
}

/// The core's part of a [`Snapshot`].
#[derive(Clone, Debug, Default)]
pub(crate) struct View {
    pub phase: Phase,
    pub generation: Generation,
    pub step: Step,
    pub checkpoint: Option<Step>,
    pub skipped: u64,
    pub workers: Vec<WorkerStatus>,
}

/// How many members committed a step, and the FLOP/s that they could reach together, where that is
/// known.
pub(crate) type Members = (u32, Option<f64>);

enum Request {
    Committed { committed: Committed, members: Members, at: Instant },
    Happened { event: Event, step: Step },
    View(View),
    Steps { since: Step, reply: oneshot::Sender<Vec<StepMetrics>> },
    Events { since: u64, reply: oneshot::Sender<Vec<LoggedEvent>> },
    Scrape { reply: oneshot::Sender<Result<String, std::fmt::Error>> },
    Flush { reply: oneshot::Sender<()> },
}

/// Talks to the journal. A journal that has ended answers with nothing.
#[derive(Clone, Debug)]
pub(crate) struct JournalHandle {
    requests: mpsc::Sender<Request>,
    snapshot: watch::Receiver<Arc<Snapshot>>,
    feed: broadcast::WeakSender<Update>,
}

impl JournalHandle {
    /// Notes a commit that became known at `at`.
    pub(crate) async fn committed(&self, committed: Committed, members: Members, at: Instant) {
        self.tell(Request::Committed { committed, members, at }).await;
    }

    /// Notes an event; `step` is the newest committed one.
    pub(crate) async fn happened(&self, event: Event, step: Step) {
        self.tell(Request::Happened { event, step }).await;
    }

    /// Notes how things stand.
    pub(crate) async fn view(&self, view: View) {
        self.tell(Request::View(view)).await;
    }

    /// Returns when everything noted so far is in the file and in the feed.
    pub(crate) async fn flush(&self) {
        self.ask(|reply| Request::Flush { reply }).await;
    }

    /// Steps after `since`, thinned where they are many.
    pub(crate) async fn steps(&self, since: Step) -> Vec<StepMetrics> {
        self.ask(|reply| Request::Steps { since, reply }).await.unwrap_or_default()
    }

    /// Events from number `since` on.
    pub(crate) async fn events(&self, since: u64) -> Vec<LoggedEvent> {
        self.ask(|reply| Request::Events { since, reply }).await.unwrap_or_default()
    }

    /// All metrics in OpenMetrics' text format.
    pub(crate) async fn scrape(&self) -> Option<String> {
        self.ask(|reply| Request::Scrape { reply }).await.and_then(Result::ok)
    }

    /// The newest snapshot.
    pub(crate) fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.borrow().clone()
    }

    /// What comes from now on; nothing where the journal has ended.
    pub(crate) fn feed(&self) -> broadcast::Receiver<Update> {
        self.feed.upgrade().unwrap_or_else(|| broadcast::Sender::new(1)).subscribe()
    }

    /// A journal outlives the driver, and ends only with the process or with all handles: when it
    /// is gone there is nobody left to tell.
    async fn tell(&self, request: Request) {
        let _gone = self.requests.send(request).await;
    }

    async fn ask<T>(&self, request: impl FnOnce(oneshot::Sender<T>) -> Request) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.tell(request(reply)).await;
        answer.await.ok()
    }
}

/// Starts the journal: reads the end of the metrics file, and goes on writing it. Steps after
/// `base`, where the run goes on from, will be done again and are not shown.
///
/// # Errors
/// Where the file cannot be read or written.
pub(crate) fn start(path: &Path, spec: &RunSpec, base: Step) -> io::Result<JournalHandle> {
    let mut history = History::default();
    let file = MetricsFile::open(path, &mut history)?;
    history.forget_from(base.next());
    let run = spec.name.clone();
    let (steps, last) = (spec.recipe.steps, history.last());
    let first = Snapshot { run, steps, step: base, last, ..Snapshot::default() };
    let metrics = Metrics::new(&spec.name);
    metrics.observe(&first);
    let (requests, mailbox) = mpsc::channel(MAILBOX);
    let (publish, snapshot) = watch::channel(Arc::new(first));
    let feed = broadcast::Sender::new(FEED);
    let handle = JournalHandle { requests, snapshot, feed: feed.downgrade() };
    let spec = spec.clone();
    let journal =
        Journal { spec, history, metrics, file, publish, feed, last_commit: None, started: Instant::now() };
    tokio::spawn(journal.run(mailbox));
    Ok(handle)
}

/// Where milliseconds are less exact than a tenth.
const COARSE_MS: u64 = 10;

struct Journal {
    spec: RunSpec,
    history: History,
    metrics: Metrics,
    file: MetricsFile,
    publish: watch::Sender<Arc<Snapshot>>,
    feed: broadcast::Sender<Update>,
    /// When this coordinator last saw a commit, and of which generation.
    last_commit: Option<(Instant, Generation)>,
    started: Instant,
}

impl Journal {
    /// Ends when all handles are gone.
    async fn run(mut self, mut mailbox: mpsc::Receiver<Request>) {
        let mut batch = Vec::with_capacity(BATCH);
        while mailbox.recv_many(&mut batch, BATCH).await > 0 {
            let mut flushed = Vec::new();
            for request in batch.drain(..) {
                self.handle(request, &mut flushed);
            }
            self.file.write().await;
            for reply in flushed {
                answer(reply, ());
            }
        }
    }

    fn handle(&mut self, request: Request, flushed: &mut Vec<oneshot::Sender<()>>) {
        match request {
            Request::Committed { committed, members, at } => self.committed(&committed, members, at),
            Request::Happened { event, step } => self.happened(event, step),
            Request::View(view) => self.view(view),
            Request::Steps { since, reply } => answer(reply, self.history.steps_after(since)),
            Request::Events { since, reply } => answer(reply, self.history.events_from(since)),
            Request::Scrape { reply } => {
                let since = self.last_commit.map_or(self.started, |(at, _)| at).elapsed();
                answer(reply, self.metrics.text(since));
            }
            Request::Flush { reply } => flushed.push(reply),
        }
    }

    fn committed(&mut self, committed: &Committed, (workers, peak): Members, at: Instant) {
        let Committed { generation, step, loss, norm, took_ms, .. } = *committed;
        // What the member measured: when a commit is heard of says nothing where the coordinator
        // was busy or away, and several come at once. Only for steps of few milliseconds its
        // clock is too coarse, and the time between two commits counts where that is longer.
        let measured = took_ms as f64 / 1e3;
        let seconds = match self.last_commit {
            Some((before, g)) if g == generation && took_ms < COARSE_MS => {
                measured.max((at - before).as_secs_f64())
            }
            _ => measured,
        };
        // A clock's resolution is the fastest that a step can be seen to be.
        let seconds = seconds.max(1e-6);
        self.last_commit = Some((at, generation));
        // A point of a curve it is not; what people are told of it is an event.
        if committed.verdict() == Verdict::Skip {
            return;
        }
        let tokens = self.spec.batch.tokens_per_step();
        let metrics = StepMetrics {
            step,
            generation,
            loss,
            norm,
            learning_rate: self.spec.recipe.learning_rate_at(step),
            tokens,
            tokens_per_second: tokens as f64 / seconds,
            mfu: peak.map(|peak| self.spec.mfu(seconds, peak)),
            workers,
            unix_ms: unix_ms(),
        };
        self.metrics.committed(&metrics);
        self.file.add(&StepLine { kind: "step", metrics });
        self.history.add_step(metrics);
        self.announce(Update::Step(metrics));
    }

    fn happened(&mut self, event: Event, step: Step) {
        if let Event::RolledBack { to, .. } = event {
            self.history.forget_from(to.next());
        }
        let (number, text) = (self.history.next_event(), event.to_string());
        let event = LoggedEvent { number, unix_ms: unix_ms(), step, text, event };
        self.metrics.happened(&event.event, &kind(&event.event));
        self.file.add(&event);
        self.history.add_event(event.clone());
        self.announce(Update::Event(Arc::new(event)));
    }

    fn view(&mut self, view: View) {
        let View { phase, generation, step, checkpoint, skipped, workers } = view;
        let (run, steps) = (self.spec.name.clone(), self.spec.recipe.steps);
        let ended = matches!(phase, Phase::Drained | Phase::Finished | Phase::Failed);
        let eta_seconds = if ended { None } else { self.history.seconds_for(steps.saturating_sub(step.0)) };
        let last = self.history.last();
        let snapshot =
            Snapshot { run, phase, generation, step, steps, last, eta_seconds, checkpoint, skipped, workers };
        self.metrics.observe(&snapshot);
        let snapshot = Arc::new(snapshot);
        self.publish.send_replace(Arc::clone(&snapshot));
        self.announce(Update::Snapshot(snapshot));
    }

    /// Without viewers nobody hears it, which is fine.
    fn announce(&self, update: Update) {
        let _viewers = self.feed.send(update);
    }
}

/// A step's line in the metrics file.
#[derive(Serialize)]
struct StepLine {
    kind: &'static str,
    #[serde(flatten)]
    metrics: StepMetrics,
}

/// Whoever asked may have gone meanwhile.
fn answer<T>(reply: oneshot::Sender<T>, value: T) {
    let _gone = reply.send(value);
}

/// The name of an event's kind, as in its JSON form.
fn kind(event: &Event) -> String {
    let json = serde_json::to_value(event).unwrap_or_default();
    json["kind"].as_str().unwrap_or("unknown").to_owned()
}

#[cfg(test)]
pub(crate) mod tests;
