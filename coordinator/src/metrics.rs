//! The run as Prometheus sees it (OpenMetrics text).
//!
//! Names follow Prometheus' conventions: base units in the name, `_total` on counters. The loss
//! and its kin are gauges: what a scrape sees is the newest committed step.

use caravan_types::Step;
use caravan_types::status::{Event, Snapshot, StepMetrics};
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};
use std::sync::atomic::AtomicU64;
use std::time::Duration;

/// Content type of [`Metrics::text`].
pub(crate) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

type Real = Gauge<f64, AtomicU64>;

/// All metrics of a run.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    registry: Registry,
    step: Gauge,
    steps: Gauge,
    generation: Gauge,
    workers: Gauge,
    members: Gauge,
    checkpoint_step: Gauge,
    loss: Real,
    norm: Real,
    learning_rate: Real,
    tokens_per_second: Real,
    /// Empty, and not in a scrape, where it is not known.
    mfu: Family<[(&'static str, String); 0], Real>,
    since_commit: Real,
    commits: Counter,
    tokens: Counter,
    checkpoints: Counter,
    events: Family<[(&'static str, String); 1], Counter>,
}

impl Metrics {
    /// All of them at zero, registered.
    pub(crate) fn new(run: &str) -> Self {
        let mut m = Self::default();
        let labels = [("run".into(), run.to_owned().into())];
        let mut all = Registry::with_prefix_and_labels("caravan", labels.into_iter());
        all.register("step", "Newest committed step", m.step.clone());
        all.register("steps", "Steps of the whole run", m.steps.clone());
        all.register("generation", "Generation in force", m.generation.clone());
        all.register("workers", "Workers with a session", m.workers.clone());
        all.register("members", "Members of the plan in force", m.members.clone());
        all.register("checkpoint_step", "Step of the newest checkpoint", m.checkpoint_step.clone());
        all.register("loss", "Mean loss of the newest step, in nats a token", m.loss.clone());
        let help = "Global gradient norm of the newest step, before clipping";
        all.register("gradient_norm", help, m.norm.clone());
        all.register("learning_rate", "Learning rate of the newest step", m.learning_rate.clone());
        let help = "Tokens a second over the newest step";
        all.register("tokens_per_second", help, m.tokens_per_second.clone());
        let help = "Model FLOPs utilisation of the newest step: 1 is all that its members could compute";
        all.register("mfu_ratio", help, m.mfu.clone());
        let help = "Time since the newest commit, or since the start where there is none";
        all.register_with_unit("since_commit", help, Unit::Seconds, m.since_commit.clone());
        let help = "Commits seen by this coordinator, steps done again counted again";
        all.register("commits", help, m.commits.clone());
        all.register("tokens", "Tokens in those commits", m.tokens.clone());
        all.register("checkpoints", "Checkpoints completed by this coordinator", m.checkpoints.clone());
        all.register("events", "Events by kind", m.events.clone());
        m.registry = all;
        m
    }

    /// One more commit.
    pub(crate) fn committed(&self, metrics: &StepMetrics) {
        self.step.set(signed(metrics.step.0));
        self.loss.set(metrics.loss);
        self.norm.set(metrics.norm);
        self.learning_rate.set(metrics.learning_rate);
        self.tokens_per_second.set(metrics.tokens_per_second);
        match metrics.mfu {
            Some(mfu) => _ = self.mfu.get_or_create(&[]).set(mfu),
            None => self.mfu.clear(),
        }
        self.commits.inc();
        self.tokens.inc_by(metrics.tokens);
    }

    /// One more event, with its name in JSON.
    pub(crate) fn happened(&self, event: &Event, kind: &str) {
        if matches!(event, Event::CheckpointWritten { .. }) {
            self.checkpoints.inc();
        }
        self.events.get_or_create(&[("kind", kind.to_owned())]).inc();
    }

    /// What a snapshot says.
    pub(crate) fn observe(&self, snapshot: &Snapshot) {
        self.step.set(signed(snapshot.step.0));
        self.steps.set(signed(snapshot.steps));
        self.generation.set(signed(snapshot.generation.0));
        self.workers.set(signed(snapshot.workers.len() as u64));
        self.members.set(signed(snapshot.workers.iter().filter(|w| w.member).count() as u64));
        self.checkpoint_step.set(signed(snapshot.checkpoint.unwrap_or(Step(0)).0));
    }

    /// The answer to a scrape.
    ///
    /// # Errors
    /// Never in practice: it is written to memory.
    pub(crate) fn text(&self, since_commit: Duration) -> Result<String, std::fmt::Error> {
        self.since_commit.set(since_commit.as_secs_f64());
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

/// Gauges are signed; no count here comes near the bound.
fn signed(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::tests::metrics;

    #[test]
    fn a_scrape_has_every_name_with_unit_and_label() {
        let m = Metrics::new("demo");
        m.committed(&metrics(3));
        m.happened(&Event::CheckpointWritten { step: Step(3) }, "checkpoint_written");
        let text = m.text(Duration::from_millis(1500)).unwrap();
        for line in [
            "caravan_step{run=\"demo\"} 3",
            "caravan_loss{run=\"demo\"} 3.0",
            "caravan_mfu_ratio{run=\"demo\"} 0.5",
            "caravan_tokens_total{run=\"demo\"} 4096",
            "caravan_since_commit_seconds{run=\"demo\"} 1.5",
            "caravan_checkpoints_total{run=\"demo\"} 1",
            "caravan_events_total{run=\"demo\",kind=\"checkpoint_written\"} 1",
            "# EOF",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        m.committed(&StepMetrics { mfu: None, ..metrics(4) });
        let text = m.text(Duration::ZERO).unwrap();
        assert!(!text.contains("mfu"), "a share of what is not known is in\n{text}");
    }
}
