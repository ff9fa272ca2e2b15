//! The run as spans and log lines: run > generation > step.
//!
//! Spans follow what the coordinator sees, which is membership and commits: a generation lasts
//! from its plan to the next stop, a step from one commit to the next. With OTLP the time that a
//! change of membership costs is the gap between two generations.

use caravan_types::message::Committed;
use caravan_types::status::Event;
use caravan_types::{RunSpec, Step};
use tracing::field::Empty;
use tracing::{Span, info, info_span, warn};

pub(crate) struct Trace {
    run: Span,
    generation: Span,
    step: Span,
}

impl Trace {
    /// A run begins, or goes on.
    pub(crate) fn new(spec: &RunSpec) -> Self {
        let parameters = spec.model.parameters();
        let (name, steps, class) = (spec.name.as_str(), spec.recipe.steps, &spec.numerics);
        let run =
            info_span!(parent: None, "run", name, parameters, steps, numerics = %class, seed = spec.seed);
        Self { run, generation: Span::none(), step: Span::none() }
    }

    /// Logs an event, and opens and closes the generation's span.
    pub(crate) fn happened(&mut self, event: &Event) {
        if let Event::Planned { generation, base, members, .. } = event {
            self.generation = info_span!(
                parent: &self.run, "generation",
                generation = generation.0, base = base.0, workers = members.len()
            );
            self.begin(base.next());
        }
        let span = if self.generation.is_none() { &self.run } else { &self.generation };
        match event {
            Event::Refused { .. }
            | Event::Lost { .. }
            | Event::RolledBack { .. }
            | Event::CheckpointFailed { .. }
            | Event::CheckpointRefused { .. }
            | Event::LoadFailed { .. }
            | Event::Diverged { .. }
            | Event::Corrupt { .. }
            | Event::Skipped { .. }
            | Event::NonFinite { .. }
            | Event::Failed { .. }
            | Event::NoPlan { .. } => warn!(parent: span, "{event}"),
            _ => info!(parent: span, "{event}"),
        }
        if let Event::Stopping { boundary: false, .. } = event {
            self.step = Span::none();
            self.generation = Span::none();
        }
    }

    /// Logs a commit; its span ends and the next one's begins.
    pub(crate) fn committed(&mut self, committed: &Committed, workers: u32) {
        let Committed { generation, step, loss, norm, took_ms, .. } = *committed;
        self.step.record("loss", loss);
        self.step.record("norm", norm);
        let span = if self.step.is_none() { &self.run } else { &self.step };
        info!(parent: span, generation = generation.0, step = step.0, loss, norm, workers, took_ms, "committed");
        self.begin(step.next());
    }

    fn begin(&mut self, step: Step) {
        self.step = info_span!(parent: &self.generation, "step", step = step.0, loss = Empty, norm = Empty);
    }
}
