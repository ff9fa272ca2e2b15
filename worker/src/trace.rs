//! Spans of a worker: run → generation → step → phase.
//!
//! What belongs to which step is visible in the order of the core's outputs, and nowhere
//! else. So the driver shows every output to a [`Trace`] and passes the span of the moment
//! on with each job; the engine hangs its phases under it (compute, reduce, apply, publish).
//! The phase in which nobody computes, waiting for the votes, is measured here.

use caravan_types::message::FromWorker;
use caravan_types::peer::PeerMessage;
use caravan_types::task::Task;
use caravan_types::{Step, WorkerId};
use caravan_worker_core::Output;
use tracing::{Span, info_span};

/// The spans that are open.
pub struct Trace {
    run: Span,
    generation: Option<Span>,
    step: Option<(Step, Span)>,
    prepare: Option<Span>,
}

impl Trace {
    /// Opens the span of the run.
    pub fn new(run: &str, worker: WorkerId) -> Self {
        let run = info_span!("run", run, %worker);
        Self { run, generation: None, step: None, prepare: None }
    }

    /// Opens and closes spans as an output says.
    pub fn observe(&mut self, output: &Output) {
        match output {
            Output::Fence(_) => (self.generation, self.step, self.prepare) = (None, None, None),
            Output::Connect { generation, peers } => {
                let peers = peers.len();
                let span = info_span!(parent: &self.run, "generation", generation = generation.0, peers);
                self.generation = Some(span);
            }
            Output::Task(Task::Compute { step, .. }) if self.step.as_ref().is_none_or(|(s, _)| s != step) => {
                self.step = Some((*step, info_span!(parent: self.current(), "step", step = step.0)));
            }
            Output::Send { message: PeerMessage::Prepared(vote), .. } if self.prepare.is_none() => {
                let span = info_span!(parent: self.current(), "prepare", step = vote.step.0);
                self.prepare = Some(span);
            }
            Output::Tell(FromWorker::Committed(_)) => self.prepare = None,
            _ => {}
        }
    }

    /// The span that new work belongs to.
    pub fn current(&self) -> Span {
        self.step.as_ref().map(|(_, span)| span).or(self.generation.as_ref()).unwrap_or(&self.run).clone()
    }
}
