//! The loop around the core: what wakes a worker, and what it does about it.
//!
//! One input at a time; outputs in order. Nothing here waits but [`Driver::next`]: the queues
//! to the engine, to the peers and to the coordinator are filled without waiting, and a full
//! one ends what it belongs to.

use crate::engine::{Engine, Report};
use crate::error::WorkerError;
use crate::fabric::{self, Fabric};
use crate::session::{Said, Session};
use crate::signals::Signals;
use crate::trace::Trace;
use caravan_engine::{EngineError, Flaw};
use caravan_types::message::{Farewell, FromWorker};
use caravan_types::peer::PeerMessage;
use caravan_types::{RunSpec, WorkerId};
use caravan_worker_core::{Core, Input, Millis, Output};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

/// Everything that wakes a worker.
enum Event {
    /// The coordinator said something, is gone or back, or there is no going on with it.
    Coordinator(Result<Said, WorkerError>),
    /// A peer said something, or is lost.
    Fabric(fabric::Event),
    /// The engine has done something, or failed.
    Engine(Report),
    /// Something is to go wrong.
    Flaw(Flaw),
    /// Somebody wants this process to go.
    Signal,
    /// The core's deadline.
    Tick,
}

/// The tensor data that came with an input.
type Payload = Option<Vec<f32>>;

/// The parts of a worker that has been taken on.
pub(crate) struct Driver {
    pub core: Core,
    pub session: Session,
    pub fabric: Fabric,
    pub engine: Engine,
    pub reports: mpsc::Receiver<Report>,
    pub signals: Signals,
    /// What is to go wrong, to try what comes of it.
    pub flaws: mpsc::Receiver<Flaw>,
    pub trace: Trace,
    /// The run that this worker belongs to.
    pub spec: RunSpec,
    /// When the core's clock was 0.
    pub started: Instant,
}

impl Driver {
    /// Runs until the coordinator says farewell or the worker cannot go on.
    pub async fn run(mut self) -> Result<Farewell, WorkerError> {
        let (mut outputs, mut leaving) = (Vec::new(), false);
        loop {
            let event = self.next().await;
            if matches!(event, Event::Signal) && std::mem::replace(&mut leaving, true) {
                return Err(WorkerError::Interrupted);
            }
            let (input, mut payload) = match self.input(event) {
                Ok(Some(input)) => input,
                Ok(None) => continue,
                Err(error) => return Err(self.last_words(error).await),
            };
            self.core.handle(self.now(), input, &mut outputs);
            for output in outputs.drain(..) {
                self.trace.observe(&output);
                if let Some(farewell) = self.execute(output, &mut payload)? {
                    self.session.close().await;
                    return Ok(farewell);
                }
            }
        }
    }

    /// What the others should know of why this worker ends: they would take a broken machine for
    /// one that went away.
    async fn last_words(mut self, error: WorkerError) -> WorkerError {
        let WorkerError::Corrupt { what, .. } = &error else { return error };
        self.session.tell(FromWorker::Corrupt { what: what.clone() });
        self.session.close().await;
        error
    }

    async fn next(&mut self) -> Event {
        let deadline = self.core.next_deadline().map(|at| self.started + Duration::from_millis(at));
        tokio::select! {
            said = self.session.next() => Event::Coordinator(said),
            event = self.fabric.next() => Event::Fabric(event),
            Some(report) = self.reports.recv() => Event::Engine(report),
            Some(flaw) = self.flaws.recv() => Event::Flaw(flaw),
            () = self.signals.next() => Event::Signal,
            () = sleep_until(deadline.unwrap_or(self.started)), if deadline.is_some() => Event::Tick,
        }
    }

    fn execute(&mut self, output: Output, payload: &mut Payload) -> Result<Option<Farewell>, WorkerError> {
        match output {
            Output::Tell(FromWorker::Heartbeat { applied, activity, wait, .. }) => {
                let engine = self.engine.progress();
                self.session.tell(FromWorker::Heartbeat { applied, activity, wait, engine });
            }
            Output::Tell(message) => {
                if let FromWorker::LoadFailed { step, reason, .. } = &message {
                    tracing::error!(step = step.0, reason, "cannot load the checkpoint");
                }
                self.session.tell(message);
            }
            Output::Fence(generation) => {
                self.engine.fence(generation);
                self.fabric.fence(generation);
            }
            Output::Connect { generation, peers } => self.fabric.connect(generation, peers),
            Output::Send { to, message } => self.send(to, message)?,
            Output::Keep(key) => match payload.take() {
                Some(payload) => self.engine.put(self.trace.current(), key, payload)?,
                None => tracing::error!(?key, "the core keeps a payload that did not come"),
            },
            Output::Task(task) => self.engine.run(self.trace.current(), task)?,
            Output::Exit(farewell) => return Ok(Some(farewell)),
        }
        Ok(None)
    }

    /// What is for a lost peer goes nowhere: the core has been told, and a new plan comes.
    fn send(&self, to: WorkerId, message: PeerMessage) -> Result<(), WorkerError> {
        let Some(link) = self.fabric.link(to) else { return Ok(()) };
        match message {
            PeerMessage::Data(key) => self.engine.send(self.trace.current(), key, link.clone())?,
            PeerMessage::Prepared(_) => link.send(message, Vec::new()),
        }
        Ok(())
    }

    /// What an event means to the core, and the payload that came with it.
    fn input(&self, event: Event) -> Result<Option<(Input, Payload)>, WorkerError> {
        let input = match event {
            Event::Coordinator(said) => match said? {
                Said::Message(message) => Input::Message(message),
                Said::Lost(_) => return Ok(None),
                Said::Back(welcome) if welcome.spec != self.spec => return Err(WorkerError::OtherRun),
                Said::Back(welcome) => {
                    tracing::info!(committed = welcome.committed.0, "the coordinator is back");
                    Input::Attached { committed: welcome.committed }
                }
            },
            Event::Fabric(fabric::Event::Message { generation, from, message, payload }) => {
                return Ok(Some((Input::Peer { generation, from, message }, Some(payload))));
            }
            Event::Fabric(fabric::Event::Lost { generation, peer }) => Input::PeerLost { generation, peer },
            Event::Engine(Report::Done(done)) => Input::Done(done),
            Event::Engine(Report::Failed { doing, fault }) => {
                return Err(match fault.downcast_ref() {
                    Some(EngineError::Corrupt { .. }) => {
                        WorkerError::Corrupt { doing, what: fault.to_string() }
                    }
                    _ => WorkerError::Engine { doing, fault },
                });
            }
            Event::Flaw(flaw) => {
                self.engine.fail(flaw)?;
                return Ok(None);
            }
            Event::Signal => {
                tracing::info!("asked to go: leaving at the end of this step; a second signal ends at once");
                Input::Leave
            }
            Event::Tick => Input::Tick,
        };
        Ok(Some((input, None)))
    }

    fn now(&self) -> Millis {
        self.started.elapsed().as_millis() as Millis
    }
}

#[cfg(test)]
mod tests;
