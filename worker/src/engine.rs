//! The engine actor: one thread that owns the model and does its jobs strictly in order.
//!
//! Tasks, received payloads and payloads to send go through one queue, so whatever is sent
//! has seen the effect of every earlier task. Three rules keep the thread free of deadlock:
//! the driver never waits for this queue (a full one is an error, see [`Overrun`]); a
//! payload is handed to a [`Link`] without waiting; and this thread waits only for the driver
//! to take a [`Report`], which it always does, and for the disk. Checkpoints are copied here
//! and written by a second thread ([`Saver`]), since a disk may take longer than a step.

mod saver;

use crate::fabric::Link;
use caravan_engine::{Flaw, Watch};
use caravan_types::peer::{Key, PeerMessage};
use caravan_types::progress::{Doing, EngineProgress, Place};
use caravan_types::task::{Done, Task};
use caravan_types::{BatchShape, Generation, ModelShape, SliceTable, cost};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;
use std::{fmt, io, thread};
use tokio::sync::mpsc;
use tracing::{Span, info_span};

pub use saver::{Save, Saver};

/// What a [`Machine`] could not do.
pub type Fault = Box<dyn std::error::Error + Send + Sync>;

/// What the actor drives: model and optimiser on one device.
pub trait Machine {
    /// Does a task.
    ///
    /// # Errors
    /// Where the task cannot be done; the machine is in no defined state after it.
    fn run(&mut self, task: Task) -> Result<Option<Done>, Fault>;

    /// Stores a payload that a peer sent.
    ///
    /// # Errors
    /// Where the payload has the wrong length for its key.
    fn put(&mut self, key: Key, payload: Vec<f32>) -> Result<(), Fault>;

    /// A copy of a stored payload.
    ///
    /// # Errors
    /// Where there is nothing under this key.
    fn get(&mut self, key: Key) -> Result<Vec<f32>, Fault>;

    /// Has something go wrong, to try what comes of it.
    fn fail(&mut self, flaw: Flaw);
}

/// What the engine tells the driver.
#[derive(Debug)]
pub enum Report {
    /// A task is done.
    Done(Done),
    /// A job could not be done: the last report.
    Failed {
        /// What it was doing.
        doing: String,
        /// Why it could not.
        fault: Fault,
    },
}

/// The queue of jobs is full: the plan asks for more than two steps' worth of data, or the
/// engine thread is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the engine's queue of {capacity} jobs is full: more is asked of it than two steps can need")]
pub struct Overrun {
    /// Jobs that the queue holds.
    pub capacity: usize,
}

/// Most peers that the queue is sized for; a caravan of more workers than this needs more
/// lanes than any recipe has.
const MOST_PEERS: usize = 1024;

/// Reports that wait for the driver. Any number is right; this many let the engine run ahead
/// while the driver is busy with a burst of votes.
const REPORTS: usize = 256;

/// How many frames one peer can have to say in two steps: in each, every node of the lane
/// tree (2 · lanes − 1), the weights and the state of every slice, and every micro-batch.
#[must_use]
pub fn frames_of_two_steps(table: &SliceTable, batch: &BatchShape) -> usize {
    let (lanes, micro_batches) = (batch.lanes as usize, batch.micro_batches as usize);
    2 * (table.len() * (2 * lanes + 1) + lanes * micro_batches)
}

/// What is needed to say what a pass is worth.
#[derive(Clone, Debug)]
pub struct Costs {
    /// The model.
    pub model: ModelShape,
    /// Its global batch.
    pub batch: BatchShape,
}

enum Job {
    Run(Task),
    Put(Key, Vec<f32>),
    Send(Key, Link),
    Fail(Flaw),
}

impl fmt::Display for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Run(task) => write!(f, "{task:?}"),
            Self::Put(key, _) => write!(f, "storing, of {key}"),
            Self::Send(key, _) => write!(f, "sending, of {key}"),
            Self::Fail(flaw) => write!(f, "failing on purpose: {flaw:?}"),
        }
    }
}

struct Queued {
    job: Job,
    /// The span that the job's own span hangs under.
    parent: Span,
}

/// Handle of the engine actor.
#[derive(Clone, Debug)]
pub struct Engine {
    jobs: mpsc::Sender<Queued>,
    watch: Arc<Watch>,
}

impl Engine {
    /// Starts the thread. `build` runs on it, so that a worker that is still opening its
    /// data already answers the coordinator; it is given what the machine is to save with.
    /// `save` writes a part of a checkpoint, on a thread of its own. `watch` is what the
    /// machine looks at to give up a computation, and where it notes how far it is; `costs` says
    /// what its passes are worth.
    ///
    /// # Errors
    /// Where the system gives no more threads.
    pub fn start<M: Machine + 'static>(
        build: impl FnOnce(Saver) -> Result<M, Fault> + Send + 'static,
        save: Save,
        watch: Arc<Watch>,
        costs: Costs,
        frames_of_two_steps: usize,
    ) -> io::Result<(Self, mpsc::Receiver<Report>)> {
        let (jobs, queue) = mpsc::channel(frames_of_two_steps.saturating_mul(MOST_PEERS));
        let (reports, inbox) = mpsc::channel(REPORTS);
        let saver = Saver::start(save, reports.clone())?;
        let reports_of_thread = reports.clone();
        let passes = (0, 0);
        let actor = Actor { queue, reports, watch: Arc::clone(&watch), costs, passes };
        guarded("engine", reports_of_thread, move || actor.main(|| build(saver)))?;
        Ok((Self { jobs, watch }, inbox))
    }

    /// From now on, gives up what belongs to older generations.
    pub fn fence(&self, generation: Generation) {
        self.watch.raise(generation);
    }

    /// How far it is.
    pub fn progress(&self) -> EngineProgress {
        self.watch.progress()
    }

    /// Does a task after everything asked for so far.
    ///
    /// # Errors
    /// Where the queue is full.
    pub fn run(&self, parent: Span, task: Task) -> Result<(), Overrun> {
        self.queue(parent, Job::Run(task))
    }

    /// Stores a received payload after everything asked for so far.
    ///
    /// # Errors
    /// Where the queue is full.
    pub fn put(&self, parent: Span, key: Key, payload: Vec<f32>) -> Result<(), Overrun> {
        self.queue(parent, Job::Put(key, payload))
    }

    /// Sends what is stored under a key after everything asked for so far; not where the
    /// link's generation is fenced by then.
    ///
    /// # Errors
    /// Where the queue is full.
    pub fn send(&self, parent: Span, key: Key, link: Link) -> Result<(), Overrun> {
        self.queue(parent, Job::Send(key, link))
    }

    /// Has something go wrong after everything asked for so far.
    ///
    /// # Errors
    /// Where the queue is full.
    pub fn fail(&self, flaw: Flaw) -> Result<(), Overrun> {
        self.queue(Span::none(), Job::Fail(flaw))
    }

    fn queue(&self, parent: Span, job: Job) -> Result<(), Overrun> {
        match self.jobs.try_send(Queued { job, parent }) {
            Ok(()) => Ok(()),
            // The thread has ended, and its last report says why.
            Err(mpsc::error::TrySendError::Closed(_)) => Ok(()),
            Err(mpsc::error::TrySendError::Full(_)) => Err(Overrun { capacity: self.jobs.max_capacity() }),
        }
    }
}

struct Actor {
    queue: mpsc::Receiver<Queued>,
    reports: mpsc::Sender<Report>,
    watch: Arc<Watch>,
    costs: Costs,
    /// FLOPs of a micro-batch, forward and backward, in the stage of the generation at hand.
    passes: (u64, u64),
}

impl Actor {
    /// The thread: ends with the queue, when nobody takes reports, or with a fault.
    fn main<M: Machine>(mut self, build: impl FnOnce() -> Result<M, Fault>) {
        let mut machine = match build() {
            Ok(machine) => machine,
            Err(fault) => return self.fail("starting the engine".into(), fault),
        };
        while let Some(Queued { job, parent }) = self.queue.blocking_recv() {
            let _entered = phase(&parent, &job).entered();
            let doing = job.to_string();
            self.watch.begin(kind(&job));
            let done = match self.work(&mut machine, job) {
                Ok(done) => done,
                Err(fault) => return self.fail(doing, fault),
            };
            if done.is_some_and(|done| self.reports.blocking_send(Report::Done(done)).is_err()) {
                return;
            }
        }
    }

    fn work<M: Machine>(&mut self, machine: &mut M, job: Job) -> Result<Option<Done>, Fault> {
        match job {
            Job::Run(task) => self.run(machine, task),
            Job::Put(key, payload) => machine.put(key, payload).map(|()| None),
            Job::Fail(flaw) => {
                machine.fail(flaw);
                Ok(None)
            }
            // What a computation that was given up should have left is not there to be sent.
            Job::Send(_, link) if self.watch.is_fenced(link.generation()) => Ok(None),
            Job::Send(key, link) => {
                link.send(PeerMessage::Data(key), machine.get(key)?);
                Ok(None)
            }
        }
    }

    /// Does a task, and notes what a pass took. One that was given up is worth nothing.
    fn run<M: Machine>(&mut self, machine: &mut M, task: Task) -> Result<Option<Done>, Fault> {
        let (generation, flops) = match &task {
            Task::Place { units, recompute } => {
                let Costs { model, batch } = &self.costs;
                self.passes = cost::passes(model, batch, *recompute, units.clone());
                return machine.run(task);
            }
            Task::Forward { generation, .. } => (*generation, self.passes.0),
            Task::Backward { generation, .. } => (*generation, self.passes.1),
            _ => return machine.run(task),
        };
        let began = Instant::now();
        let done = machine.run(task)?;
        if !self.watch.is_fenced(generation) {
            self.watch.worked(began.elapsed(), flops);
        }
        Ok(done)
    }

    fn fail(&self, doing: String, fault: Fault) {
        fail(&self.reports, doing, fault);
    }
}

fn fail(reports: &mpsc::Sender<Report>, doing: String, fault: Fault) {
    // Where this cannot be sent the driver has ended, with a reason of its own.
    if let Err(unsent) = reports.blocking_send(Report::Failed { doing, fault }) {
        tracing::warn!(report = ?unsent.0, "the engine failed after its worker had ended");
    }
}

/// Starts a thread whose panic is a report like any other fault.
fn guarded(
    name: &'static str,
    reports: mpsc::Sender<Report>,
    body: impl FnOnce() + Send + 'static,
) -> io::Result<()> {
    thread::Builder::new().name(name.into()).spawn(move || {
        // Nothing of what the body owned is looked at after its panic.
        if catch_unwind(AssertUnwindSafe(body)).is_err() {
            let fault = format!("the {name} thread panicked; the message is in this worker's log");
            fail(&reports, format!("running the {name} thread"), fault.into());
        }
    })?;
    Ok(())
}

/// What a job is, for those who wonder why it takes so long.
fn kind(job: &Job) -> Doing {
    match job {
        Job::Run(Task::Forward { micro, .. }) => Doing::Forward(Place { micro: *micro, unit: 0 }),
        Job::Run(Task::Backward { micro, .. }) => Doing::Backward(Place { micro: *micro, unit: 0 }),
        Job::Run(Task::Reduce { .. }) => Doing::Reducing,
        Job::Run(Task::Apply { .. }) => Doing::Applying,
        Job::Run(Task::Save { .. }) => Doing::Saving,
        Job::Run(Task::Load { .. } | Task::Init { .. }) => Doing::Loading,
        _ => Doing::Moving,
    }
}

/// The phase of a step that a job is part of, as a span.
fn phase(parent: &Span, job: &Job) -> Span {
    match job {
        Job::Run(Task::Forward { step, micro, .. }) => {
            info_span!(parent: parent, "forward", step = step.0, lane = micro.lane, micro = micro.index)
        }
        Job::Run(Task::Backward { step, micro, .. }) => {
            info_span!(parent: parent, "backward", step = step.0, lane = micro.lane, micro = micro.index)
        }
        Job::Run(Task::Reduce { step, slice, .. }) => {
            tracing::debug_span!(parent: parent, "reduce", step = step.0, slice = slice.0)
        }
        Job::Run(Task::Apply { step, slices, .. }) => {
            info_span!(parent: parent, "apply", step = step.0, slices = slices.len())
        }
        Job::Run(Task::Diagnose { step, lanes, .. }) => {
            info_span!(parent: parent, "diagnose", step = step.0, lanes = lanes.len())
        }
        Job::Run(Task::Save { step, slices, .. }) => {
            info_span!(parent: parent, "save", step = step.0, slices = slices.len())
        }
        Job::Run(Task::Load { step, slices, .. }) => {
            info_span!(parent: parent, "load", step = step.0, slices = slices.len())
        }
        Job::Run(Task::Init { slices, .. }) => info_span!(parent: parent, "init", slices = slices.len()),
        Job::Run(Task::Verify { step, slices, .. }) => {
            tracing::debug_span!(parent: parent, "verify", step = step.0, slices = slices.len())
        }
        Job::Run(Task::Place { .. } | Task::Install(_) | Task::Drop(_) | Task::Narrow { .. })
        | Job::Put(..)
        | Job::Fail(_) => {
            tracing::trace_span!(parent: parent, "store")
        }
        Job::Send(Key::Weights { step, slice }, _) => {
            tracing::debug_span!(parent: parent, "publish", step = step.0, slice = slice.0)
        }
        Job::Send(key, _) => tracing::debug_span!(parent: parent, "send", key = %key),
    }
}

#[cfg(test)]
mod tests;
