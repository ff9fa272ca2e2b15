//! The loop around the core: input → core → ledger → persist → send → publish.
//!
//! One actor owns the core, the store, the ledger and the ends of all sessions. It is the only place that
//! carries outputs out, so that the core's contract can be read off [`Driver::run`]: one input at
//! a time, and every record of an input durable before anything that the input led to is seen
//! outside. A store or a ledger that fails ends the run: going on would mean answering without
//! knowing what is remembered.

use crate::CoordinatorError;
use crate::checkpoints::Checkpoints;
use crate::control::Recorder;
use crate::journal::{JournalHandle, View};
use crate::ledger::{Ledger, LedgerError};
use crate::store::Store;
use crate::trace::Trace;
use caravan_coordinator_core::{Core, Input, Millis, Output, Record, Session};
use caravan_types::message::{Farewell, FromWorker, Hello, ToWorker, Welcome};
use caravan_types::status::{Event, Phase};
use caravan_types::task::SavedPart;
use caravan_types::{Generation, Peak, Plan, Step, WorkerId, peak};
use caravan_wire::{Down, pb};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout_at};
use tonic::Status;

/// Requests that may wait for the driver. A worker says a few things a second; this lets a
/// thousand of them speak at once before sessions have to wait.
const MAILBOX: usize = 1024;

/// Messages that may wait for one worker. A generation takes four at most (stop, save, plan,
/// goodbye); whoever is sixteen generations behind does not read.
pub(crate) const OUTBOX: usize = 64;

/// How often viewers are shown how things stand while something happens: as often as a
/// terminal is redrawn without flicker.
const VIEW_EVERY: Duration = Duration::from_millis(200);

/// What goes down a session, as it is on the wire: a plan is the same bytes for all.
pub(crate) type Outbox = mpsc::Sender<Result<pb::ToWorker, Status>>;

/// What sessions and viewers ask of the driver.
pub(crate) enum Request {
    /// A session began.
    Hello { session: Session, hello: Hello, outbox: Outbox },
    /// A worker said something.
    Message { session: Session, message: FromWorker },
    /// A session ended.
    Closed { session: Session },
    /// The run is to stop.
    Drain { reply: oneshot::Sender<Phase> },
}

/// The other end of a session.
struct Link {
    /// Gone when everything that it is to be told has been said.
    outbox: Option<Outbox>,
    /// Set when it was taken on.
    worker: Option<WorkerId>,
    /// What the worker could compute at most, once it has said so.
    peak: Option<Peak>,
}

/// What the driver works with.
pub(crate) struct Parts<S> {
    pub core: Core,
    pub store: S,
    pub ledger: Ledger,
    pub control: Recorder,
    pub journal: JournalHandle,
    pub checkpoints: Arc<Checkpoints>,
    /// What a worker is welcomed with, but for its id.
    pub welcome: Welcome,
    /// The clock that the core was made on, at 0.
    pub origin: Instant,
}

pub(crate) struct Driver<S> {
    parts: Parts<S>,
    mailbox: mpsc::Receiver<Request>,
    links: BTreeMap<Session, Link>,
    /// The sessions of those who were taken on.
    sessions: BTreeMap<WorkerId, Session>,
    /// The plan that was sent last, as it was sent.
    encoded: Option<(Arc<Plan>, pb::ToWorker)>,
    /// Sessions that did not take what they were told, to be cut.
    slow: Vec<Session>,
    /// Whoever waits for an answer to the input at hand.
    asking: Option<oneshot::Sender<Phase>>,
    /// Checkpoints to be completed, oldest first: one at a time, since completing one removes
    /// what is left of older ones. A few kilobytes for each that the disk is behind.
    incomplete: VecDeque<(Generation, Step, Vec<SavedPart>)>,
    /// The one that is being completed.
    saving: JoinSet<Input>,
    /// The search for an intact checkpoint, which reads all of it.
    finding: JoinSet<Input>,
    trace: Trace,
    shown: Shown,
    /// Whether the store or the ledger failed.
    broken: bool,
}

/// What viewers were shown last.
struct Shown {
    at: Instant,
    what: (Phase, Generation, Option<Step>),
    stale: bool,
}

impl<S: Store> Driver<S> {
    /// A driver, and where its requests go.
    pub(crate) fn new(parts: Parts<S>) -> (Self, mpsc::Sender<Request>) {
        let (requests, mailbox) = mpsc::channel(MAILBOX);
        let trace = Trace::new(&parts.welcome.spec);
        let shown = Shown { at: parts.origin, what: (Phase::Gathering, Generation(0), None), stale: true };
        let (links, slow, asking, saving) = (BTreeMap::new(), Vec::new(), None, JoinSet::new());
        let (sessions, encoded, incomplete, finding) =
            (BTreeMap::new(), None, VecDeque::new(), JoinSet::new());
        let driver = Self {
            parts,
            mailbox,
            links,
            sessions,
            encoded,
            slow,
            asking,
            incomplete,
            saving,
            finding,
            trace,
            shown,
            broken: false,
        };
        (driver, requests)
    }

    /// Runs until the run is over; says how it ended.
    pub(crate) async fn run(mut self) -> Result<Farewell, CoordinatorError> {
        let mut outputs = Vec::new();
        let farewell = loop {
            let (input, now) = (self.next_input().await?, self.now());
            let told = self.parts.control.told(now, &input);
            self.parts.core.handle(now, input, &mut outputs);
            self.parts.control.answered(told, &outputs);
            if let Err(error) = self.persist(&outputs).await {
                break Err(error);
            }
            let mut end = None;
            for output in outputs.drain(..) {
                end = end.or(self.carry_out(output).await);
            }
            self.publish().await;
            if let Some(farewell) = end {
                break Ok(farewell);
            }
        };
        if let Err(error) = &farewell {
            self.broken = true;
            let failed = Event::Failed { reason: error.to_string() };
            self.parts.journal.happened(failed, self.step()).await;
        }
        self.see_off().await;
        self.parts.control.finish().await;
        self.parts.journal.flush().await;
        farewell
    }

    /// The newest committed step as people may know it: it is in the ledger.
    fn step(&self) -> Step {
        self.parts.core.step().min(self.parts.ledger.last())
    }

    fn now(&self) -> Millis {
        u64::try_from(self.parts.origin.elapsed().as_millis()).unwrap_or(Millis::MAX)
    }

    /// Waits for whatever wakes the core next.
    async fn next_input(&mut self) -> Result<Input, CoordinatorError> {
        loop {
            if let Some(session) = self.slow.pop() {
                // The session's own end comes later and is then that of nobody.
                if self.close(session) {
                    tracing::warn!(
                        session = session.0,
                        "cut a worker's session: it does not read what it is told"
                    );
                    return Ok(Input::Closed { session });
                }
            }
            let deadline =
                self.parts.core.next_deadline().map(|ms| self.parts.origin + Duration::from_millis(ms));
            let show = self.shown.at + VIEW_EVERY;
            tokio::select! {
                request = self.mailbox.recv() => {
                    let request = request.ok_or(CoordinatorError::Abandoned)?;
                    if let Some(input) = self.accept(request) {
                        return Ok(input);
                    }
                }
                Some(Ok(completed)) = self.saving.join_next() => {
                    self.complete_next();
                    return Ok(completed);
                }
                Some(Ok(found)) = self.finding.join_next() => return Ok(found),
                () = sleep_until(deadline.unwrap_or(show)), if deadline.is_some() => return Ok(Input::Tick),
                () = sleep_until(show), if self.shown.stale => self.publish().await,
            }
        }
    }

    /// What a request means to the core; nothing where it comes from a session that is over or
    /// was not taken on.
    fn accept(&mut self, request: Request) -> Option<Input> {
        match request {
            Request::Hello { session, hello, outbox } => {
                self.links.insert(session, Link { outbox: Some(outbox), worker: None, peak: None });
                Some(Input::Hello { session, hello })
            }
            // For people: the core decides without it.
            Request::Message { session, message: FromWorker::Peak(peak) } => {
                self.links.get_mut(&session)?.peak = Some(peak);
                None
            }
            Request::Message { session, message } => {
                let worker = self.links.get(&session)?.worker?;
                Some(Input::Message { worker, message })
            }
            Request::Closed { session } => self.close(session).then_some(Input::Closed { session }),
            Request::Drain { reply } => {
                self.asking = Some(reply);
                Some(Input::Drain)
            }
        }
    }

    /// Forgets a session; whether there was one.
    fn close(&mut self, session: Session) -> bool {
        let Some(link) = self.links.remove(&session) else { return false };
        // A worker may have come back in another one.
        if let Some(worker) = link.worker.filter(|worker| self.sessions.get(worker) == Some(&session)) {
            self.sessions.remove(&worker);
        }
        true
    }

    /// Writes down what an input led to before anybody sees it: the ledger first, so that
    /// whatever the store remembers has its history there.
    async fn persist(&mut self, outputs: &[Output]) -> Result<(), CoordinatorError> {
        self.enter(outputs).await?;
        // All records of an input at once, which is earlier than the core's contract asks.
        let records = outputs.iter().filter_map(|output| match output {
            Output::Persist(record) => Some(record.clone()),
            _ => None,
        });
        let records: Vec<Record> = records.collect();
        if records.is_empty() {
            return Ok(());
        }
        Ok(self.parts.store.append(&records).await?)
    }

    /// Writes committed steps and ways back into the ledger, and makes it durable where something
    /// follows that outlives a crash of the host.
    async fn enter(&mut self, outputs: &[Output]) -> Result<(), LedgerError> {
        let ledger = &mut self.parts.ledger;
        for output in outputs {
            match output {
                Output::Committed { committed, members } => ledger.step(committed, members).await?,
                Output::Persist(Record::Plan(plan)) => ledger.goes_on_from(plan.base).await?,
                Output::Halted { step, what } => ledger.halt(*step, *what).await?,
                _ => {}
            }
        }
        // A checkpoint has its own sync, before its manifest and beside this loop: a disk that is
        // slow must not keep a death from being noticed.
        let outlives = |o: &Output| match o {
            Output::Persist(record) => !matches!(record, Record::Checkpoint(_)),
            other => matches!(other, Output::End(_)),
        };
        if outputs.iter().any(outlives) { ledger.sync().await } else { Ok(()) }
    }

    /// Starts to complete the oldest checkpoint that waits, unless another one is at it.
    fn complete_next(&mut self) {
        if !self.saving.is_empty() {
            return;
        }
        let Some((generation, step, parts)) = self.incomplete.pop_front() else { return };
        let checkpoints = Arc::clone(&self.parts.checkpoints);
        let durable = self.parts.ledger.durable();
        self.saving.spawn(async move {
            let result = match durable.await {
                Ok(()) => checkpoints.complete(generation, step, parts).await,
                Err(error) => Err(error.to_string()),
            };
            Input::Completed { generation, step, result }
        });
    }

    /// Does one thing that the core wants done; says so when that was the last one.
    async fn carry_out(&mut self, output: Output) -> Option<Farewell> {
        match output {
            // Written down already.
            Output::Persist(_) | Output::Halted { .. } => {}
            Output::Welcome { session, worker, committed } => self.welcome(session, worker, committed),
            Output::Refuse { session, refusal } => {
                self.tell(session, Down::Refused(refusal).into());
                self.hang_up(session);
            }
            Output::Send { worker, message } => self.send(worker, message),
            Output::Complete { generation, step, parts } => {
                self.incomplete.push_back((generation, step, parts));
                self.complete_next();
            }
            Output::Find { until } => {
                let checkpoints = Arc::clone(&self.parts.checkpoints);
                self.finding.spawn(async move {
                    Input::Found { until, found: checkpoints.newest_until(until).await }
                });
            }
            Output::Note(event) => {
                self.trace.happened(&event);
                self.parts.journal.happened(event, self.step()).await;
            }
            Output::Committed { committed, members } => {
                let workers = members.len() as u32;
                self.trace.committed(&committed, workers);
                let peak = self.peak(&members);
                self.parts.journal.committed(committed, (workers, peak), Instant::now()).await;
            }
            Output::End(farewell) => return Some(farewell),
        }
        None
    }

    /// FLOP/s that these workers could reach together, where that is known.
    fn peak(&self, members: &[WorkerId]) -> Option<f64> {
        let link = |worker| self.links.get(self.sessions.get(worker)?);
        peak::together(members.iter().map(|worker| link(worker)?.peak.as_ref()))
    }

    fn welcome(&mut self, session: Session, worker: WorkerId, committed: Step) {
        if let Some(link) = self.links.get_mut(&session) {
            link.worker = Some(worker);
            self.sessions.insert(worker, session);
        }
        let welcome = Welcome { worker, committed, ..self.parts.welcome.clone() };
        self.tell(session, Down::from(welcome).into());
    }

    fn send(&mut self, worker: WorkerId, message: ToWorker) {
        let last = matches!(message, ToWorker::Goodbye(_));
        let Some(session) = self.sessions.get(&worker).copied() else { return };
        let message = match message {
            ToWorker::Plan(plan) => self.encode(plan),
            other => other.into(),
        };
        self.tell(session, message);
        if last {
            self.hang_up(session);
        }
    }

    /// A plan as it goes to each of its members. Encoding it for one after the other would take
    /// a square of their number.
    fn encode(&mut self, plan: Arc<Plan>) -> pb::ToWorker {
        if let Some((same, encoded)) = &self.encoded
            && Arc::ptr_eq(same, &plan)
        {
            return encoded.clone();
        }
        let encoded = pb::ToWorker::from(ToWorker::Plan(Arc::clone(&plan)));
        self.encoded = Some((plan, encoded.clone()));
        encoded
    }

    /// Queues a message. A session that ended meanwhile reports that itself.
    fn tell(&mut self, session: Session, message: pb::ToWorker) {
        let Some(outbox) = self.links.get(&session).and_then(|link| link.outbox.as_ref()) else { return };
        if let Err(mpsc::error::TrySendError::Full(_)) = outbox.try_send(Ok(message)) {
            self.slow.push(session);
        }
    }

    /// Ends a session's downward stream after what is queued.
    fn hang_up(&mut self, session: Session) {
        if let Some(link) = self.links.get_mut(&session) {
            link.outbox = None;
        }
    }

    /// Shows viewers how things stand: at once where the run took a turn, else now and then.
    async fn publish(&mut self) {
        let core = &self.parts.core;
        let phase = if self.broken { Phase::Failed } else { core.phase() };
        let what = (phase, core.generation(), core.checkpoint());
        if let Some(reply) = self.asking.take() {
            let _gone = reply.send(what.0);
        }
        let now = Instant::now();
        if what == self.shown.what && now < self.shown.at + VIEW_EVERY {
            self.shown.stale = true;
            return;
        }
        self.shown = Shown { at: now, what, stale: false };
        let (phase, generation, checkpoint) = what;
        let workers = core.workers(self.now());
        let skipped = self.parts.ledger.skipped();
        let view = View { phase, generation, step: self.step(), checkpoint, skipped, workers };
        self.parts.journal.view(view).await;
    }

    /// Ends all sessions, and waits a while until their ends were
    /// told: a process that ended at once would cut the goodbyes off.
    async fn see_off(&mut self) {
        self.shown.at -= VIEW_EVERY;
        self.publish().await;
        let deadline = Instant::now() + self.parts.welcome.timing.see_off();
        self.links.values_mut().for_each(|link| link.outbox = None);
        while !self.links.is_empty() {
            let Ok(Some(request)) = timeout_at(deadline, self.mailbox.recv()).await else { return };
            match request {
                Request::Hello { outbox, .. } => {
                    // The queue is new and has room.
                    let _gone = outbox.try_send(Ok(Down::Refused(self.parts.core.not_taking()).into()));
                }
                Request::Closed { session } => _ = self.close(session),
                Request::Drain { reply } => {
                    let _gone = reply.send(self.parts.core.phase());
                }
                Request::Message { .. } => {}
            }
        }
    }
}

#[cfg(test)]
mod tests;
