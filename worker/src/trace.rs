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
            Output::Task(Task::Forward { step, .. }) if self.step.as_ref().is_none_or(|(s, _)| s != step) => {
                // Not under the step before: a span keeps its parent open, and so on to the first.
                let parent = self.generation.as_ref().unwrap_or(&self.run);
                let span = info_span!(parent: parent, "step", step = step.0);
                self.step = Some((*step, span));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::Log;
    use caravan_types::message::Committed;
    use caravan_types::peer::Prepared;
    use caravan_types::{Generation, MicroId};

    /// The spans that are open, outermost first, as a log line shows them.
    fn open(trace: &Trace, log: &Log) -> String {
        trace.current().in_scope(|| tracing::info!("here"));
        let text = log.text();
        let line = text.lines().last().unwrap();
        line.split_once("INFO ").unwrap().1.split_once(": caravan").unwrap().0.to_owned()
    }

    #[test]
    fn work_belongs_to_the_step_of_the_generation_of_the_run() {
        let log = Log::default();
        let _guard = log.listen();
        let mut trace = Trace::new("tiny", WorkerId(3));
        assert_eq!(open(&trace, &log), "run{run=\"tiny\" worker=w3}");
        let (generation, peers) = (Generation(2), Vec::new());
        let run = open(&trace, &log);
        trace.observe(&Output::Connect { generation, peers });
        assert_eq!(open(&trace, &log), format!("{run}:generation{{generation=2 peers=0}}"));
        let micro = MicroId { lane: 0, index: 0 };
        let compute = |step| Output::Task(Task::Forward { generation, step: Step(step), micro });
        for step in [7, 8] {
            trace.observe(&compute(step));
            let inside = format!("{run}:generation{{generation=2 peers=0}}:step{{step={step}}}");
            assert_eq!(open(&trace, &log), inside);
        }
        trace.observe(&Output::Fence(Generation(3)));
        assert_eq!(open(&trace, &log), run);
    }

    #[test]
    fn waiting_for_votes_is_measured_from_the_first_vote_to_the_commit() {
        let log = Log::default();
        let _guard = log.listen();
        let mut trace = Trace::new("tiny", WorkerId(3));
        let vote = Prepared {
            step: Step(1),
            slices: Vec::new(),
            weights: caravan_types::Opinion(0),
            lanes: Vec::new(),
            stop_for: None,
        };
        let vote = |to| Output::Send { to: WorkerId(to), message: PeerMessage::Prepared(vote.clone()) };
        trace.observe(&vote(1));
        let first = trace.prepare.as_ref().unwrap().id();
        assert!(first.is_some());
        trace.observe(&vote(2));
        assert_eq!(trace.prepare.as_ref().unwrap().id(), first);
        let (generation, step) = (Generation(1), Step(1));
        let committed = Committed { generation, step, loss: 1.0, norm: 1.0, tokens: 1, took_ms: 1 };
        trace.observe(&Output::Tell(FromWorker::Committed(committed)));
        assert!(trace.prepare.is_none());
    }
}
