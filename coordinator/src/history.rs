//! What happened, in bounded memory: the curve of the whole run and the newest events.
//!
//! The curve is what people look at, so it always reaches from the first step to the last; when
//! it grows past its bound, its older part is thinned, and loses detail instead of its beginning.
//! The complete history is in the metrics file.

use caravan_types::Step;
use caravan_types::status::{LoggedEvent, StepMetrics};
use std::collections::VecDeque;

/// Points kept of the curve: 32 Ki × 88 bytes is 2.9 MB, and more than any screen is wide.
const MAX_STEPS: usize = 32 * 1024;

/// Points given out at once: a curve of 4,096 points is finer than a 4K screen, and as JSON
/// below 1 MB.
const MAX_POINTS: usize = 4096;

/// Events kept. They come with changes of membership and with checkpoints; at a few hundred
/// bytes each this is below 1 MB.
const MAX_EVENTS: usize = 4096;

/// Commits that the estimate of the time left looks back on: enough to even out single slow
/// steps, few enough to follow a change of the number of workers within a minute or so.
const PACE_STEPS: usize = 32;

/// See the module's head.
#[derive(Debug, Default)]
pub(crate) struct History {
    /// Ascending by step, each step once.
    steps: Vec<StepMetrics>,
    /// Ascending by number.
    events: VecDeque<LoggedEvent>,
}

impl History {
    /// Adds a committed step. Steps from this one on that were there before were rolled back and
    /// are forgotten here.
    pub(crate) fn add_step(&mut self, metrics: StepMetrics) {
        self.forget_from(metrics.step);
        if self.steps.len() >= MAX_STEPS {
            self.thin();
        }
        self.steps.push(metrics);
    }

    /// Forgets `step` and all later ones.
    pub(crate) fn forget_from(&mut self, step: Step) {
        let keep = self.steps.partition_point(|m| m.step < step);
        self.steps.truncate(keep);
    }

    /// Drops every other point of all but the newest quarter.
    fn thin(&mut self) {
        let newest = self.steps.len() - MAX_STEPS / 4;
        let mut index = 0;
        self.steps.retain(|_| {
            index += 1;
            index > newest || index % 2 == 1
        });
    }

    /// Adds an event; the oldest one goes when there are too many.
    pub(crate) fn add_event(&mut self, event: LoggedEvent) {
        if self.events.len() >= MAX_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    /// The number of the next event.
    pub(crate) fn next_event(&self) -> u64 {
        self.events.back().map_or(0, |e| e.number + 1)
    }

    /// The newest step.
    pub(crate) fn last(&self) -> Option<StepMetrics> {
        self.steps.last().copied()
    }

    /// Steps after `since`, evenly thinned to at most [`MAX_POINTS`], the newest one always there.
    pub(crate) fn steps_after(&self, since: Step) -> Vec<StepMetrics> {
        let from = self.steps.partition_point(|m| m.step <= since);
        let steps = &self.steps[from..];
        let stride = steps.len().div_ceil(MAX_POINTS).max(1);
        let mut newest_first: Vec<_> = steps.iter().rev().step_by(stride).copied().collect();
        newest_first.reverse();
        newest_first
    }

    /// Events with this number or a higher one.
    pub(crate) fn events_from(&self, number: u64) -> Vec<LoggedEvent> {
        let from = self.events.partition_point(|e| e.number < number);
        self.events.range(from..).cloned().collect()
    }

    /// Seconds that `steps` more steps take at the pace of the last ones; `None` where there is
    /// no pace yet.
    pub(crate) fn seconds_for(&self, steps: u64) -> Option<f64> {
        let recent = self.steps.len().saturating_sub(PACE_STEPS);
        let each = self.steps[recent..].iter().map(|m| m.tokens as f64 / m.tokens_per_second);
        let known: Vec<f64> = each.filter(|seconds| seconds.is_finite()).collect();
        let mean = known.iter().sum::<f64>() / known.len() as f64;
        mean.is_finite().then_some(mean * steps as f64)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use caravan_types::Generation;
    use caravan_types::status::Event;
    use proptest::prelude::*;

    pub(crate) fn metrics(step: u64) -> StepMetrics {
        StepMetrics {
            step: Step(step),
            generation: Generation(1),
            loss: 9.0 / step as f64,
            norm: 1.0,
            learning_rate: 1e-4,
            tokens: 4096,
            tokens_per_second: 2048.0,
            mfu: Some(0.5),
            workers: 2,
            unix_ms: 1_000 * step,
        }
    }

    fn numbers(steps: &[StepMetrics]) -> Vec<u64> {
        steps.iter().map(|m| m.step.0).collect()
    }

    #[test]
    fn a_long_run_keeps_its_beginning_and_every_newest_step() {
        let mut history = History::default();
        for step in 1..=10 * MAX_STEPS as u64 {
            history.add_step(metrics(step));
            assert!(history.steps.len() <= MAX_STEPS);
        }
        let end = 10 * MAX_STEPS as u64;
        assert_eq!(history.steps[0].step, Step(1));
        assert_eq!(numbers(&history.steps_after(Step(end - 3))), [end - 2, end - 1, end]);
        let all = history.steps_after(Step(0));
        assert!(all.len() <= MAX_POINTS && all.last().unwrap().step == Step(end));
    }

    #[test]
    fn a_rollback_takes_the_undone_steps_off_the_curve() {
        let mut history = History::default();
        (1..=5).for_each(|s| history.add_step(metrics(s)));
        history.add_step(StepMetrics { generation: Generation(2), ..metrics(3) });
        assert_eq!(numbers(&history.steps_after(Step(0))), [1, 2, 3]);
        assert_eq!(history.last().unwrap().generation, Generation(2));
    }

    #[test]
    fn the_time_left_follows_the_pace_and_is_unknown_without_one() {
        let mut history = History::default();
        assert_eq!(history.seconds_for(10), None);
        history.add_step(StepMetrics { tokens_per_second: 0.0, ..metrics(1) });
        assert_eq!(history.seconds_for(10), None);
        (2..100).for_each(|s| history.add_step(metrics(s)));
        assert_eq!(history.seconds_for(10), Some(20.0));
    }

    #[test]
    fn events_are_numbered_on_and_the_oldest_go() {
        let mut history = History::default();
        for _ in 0..MAX_EVENTS + 10 {
            let number = history.next_event();
            let event = Event::Draining;
            history.add_event(LoggedEvent {
                number,
                unix_ms: 0,
                step: Step(0),
                text: event.to_string(),
                event,
            });
        }
        let events = history.events_from(0);
        assert_eq!((events.len(), events[0].number), (MAX_EVENTS, 10));
        assert_eq!(history.events_from(MAX_EVENTS as u64 + 9).len(), 1);
        assert!(history.events_from(u64::MAX).is_empty());
    }

    proptest! {
        #[test]
        fn whatever_comes_the_curve_is_ascending(steps in proptest::collection::vec(1u64..50, 0..200), since in 0u64..60) {
            let mut history = History::default();
            steps.iter().for_each(|&s| history.add_step(metrics(s)));
            let given = numbers(&history.steps_after(Step(since)));
            prop_assert!(given.windows(2).all(|w| w[0] < w[1]));
            prop_assert!(given.iter().all(|&s| s > since));
        }
    }
}
