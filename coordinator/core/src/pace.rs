//! Who computes slower than it said.
//!
//! Workers say how fast they are when they join, and the plan believes them. What they really do
//! comes with their heartbeats: time spent in forward and backward tasks, and the work of these.
//! Speeds differ by model and machine, so a member is compared with the others and not with a
//! number: its *ratio* is measured over declared speed, and its *factor* is how many times the
//! usual ratio is larger than its own. The usual one is the median, of two in the middle the
//! larger one, so that of two members the slower is the slow one.

use crate::members::Worker;
use crate::{Core, Millis, Output};
use caravan_types::progress::{EngineProgress, Stragglers};
use caravan_types::status::{Event, Phase};
use caravan_types::timing::millis;
use caravan_types::{Step, WorkerId};

/// Steps in a window at least: one that a disk or a neighbour disturbed does not decide.
const STEPS: u64 = 4;

/// Busy time in a window at least. It is told in whole milliseconds, so a ratio is right to one
/// percent.
const BUSY_MS: u64 = 100;

/// From here on a member is slow. Stages of equal work differ by some ten percent, and a plan
/// that is given whole lanes cannot make use of less.
const SLOW: f64 = 1.5;

/// Below this a slow one has recovered. Between the two it stays what it was.
const RECOVERED: f64 = 1.25;

/// Windows in a row that say the same before it is believed.
const ROW: u32 = 3;

/// Steps from one rebalancing to the next at least. Healing may take as long as a few steps, and
/// this many make that a few percent.
const REST: u64 = 64;

/// What a member has computed up to a heartbeat.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    pub(crate) at: Millis,
    pub(crate) applied: Step,
    pub(crate) engine: EngineProgress,
}

/// How fast a member is.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pace {
    /// Where the window began.
    start: Option<Sample>,
    /// FLOPs a millisecond over declared speed, in the last whole window.
    ratio: Option<f64>,
    /// Windows in a row that say something else than `factor`.
    row: u32,
    /// How many times it is slower than the others, where it is slow.
    factor: Option<f64>,
}

/// What has become of a member.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Turn {
    Slow(f64),
    Recovered,
}

impl Pace {
    /// A new plan: what is measured across it would be of two stages.
    pub(crate) fn restart(&mut self) {
        self.start = None;
    }

    /// What the declared speed is to be divided by.
    pub(crate) fn factor(&self) -> f64 {
        self.factor.unwrap_or(1.0)
    }

    /// Takes a heartbeat; says whether a window ended with it.
    fn sample(&mut self, now: Sample, least_ms: u64, declared: f64) -> bool {
        let Some(start) = self.start else {
            self.start = Some(now);
            return false;
        };
        let busy_ms = now.engine.busy_ms.checked_sub(start.engine.busy_ms);
        let work = now.engine.work.checked_sub(start.engine.work);
        let (Some(busy_ms), Some(work)) = (busy_ms, work) else {
            self.start = Some(now);
            return false;
        };
        let long = now.at >= start.at + least_ms && now.applied.0 >= start.applied.0 + STEPS;
        if !long || busy_ms < BUSY_MS || work == 0 {
            return false;
        }
        self.ratio = Some(work as f64 / busy_ms as f64 / declared);
        self.start = Some(now);
        true
    }

    /// Compares the window that has ended with the usual ratio.
    fn compare(&mut self, usual: f64) -> Option<Turn> {
        let factor = usual / self.ratio?;
        let other = if self.factor.is_some() { factor < RECOVERED } else { factor >= SLOW };
        self.row = if other { self.row + 1 } else { 0 };
        if self.row < ROW {
            return None;
        }
        self.row = 0;
        // Two digits are what is measured, and what people read.
        let factor = (factor * 100.0).round() / 100.0;
        self.factor = if self.factor.is_some() { None } else { Some(factor) };
        Some(self.factor.map_or(Turn::Recovered, Turn::Slow))
    }
}

/// The usual ratio of those that have one; none where there is nobody to compare with.
fn usual<'a>(workers: impl Iterator<Item = &'a Worker>) -> Option<f64> {
    let mut ratios: Vec<f64> = workers.filter_map(|w| w.pace.ratio).collect();
    let middle = ratios.len() / 2;
    (ratios.len() > 1).then(|| *ratios.select_nth_unstable_by(middle, f64::total_cmp).1)
}

/// When the plan was last made for measured speeds, and whether it should be again.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Balance {
    stale: bool,
    at: Option<Step>,
    /// The usual ratio, and when it was found out.
    usual: Option<(Millis, f64)>,
}

impl Balance {
    /// Whether a new plan is due.
    pub(crate) fn is_due(self, step: Step) -> bool {
        self.stale && self.at.is_none_or(|at| step.0 >= at.0 + REST)
    }

    /// A plan was made, with what is known of speeds.
    pub(crate) fn planned(&mut self, base: Step) {
        if std::mem::take(&mut self.stale) {
            self.at = Some(base);
        }
    }
}

impl Core {
    /// The speed that a member is planned with.
    pub(crate) fn believed(&self, worker: &Worker) -> f64 {
        match self.config.stragglers {
            Stragglers::Report => worker.speed,
            Stragglers::Rebalance => worker.speed / worker.pace.factor(),
        }
    }

    /// A member has told how far its engine is.
    pub(crate) fn keep_pace(&mut self, now: Millis, worker: WorkerId, out: &mut Vec<Output>) {
        let stepping = self.phase == Phase::Running && self.plan.as_ref().is_some_and(|p| p.has(worker));
        let least_ms = millis(self.config.timing.detect());
        let Some(known) = self.members.get_mut(worker).filter(|_| stepping) else { return };
        let sample = Sample { at: now, applied: known.applied, engine: known.engine };
        if !known.pace.sample(sample, least_ms, known.speed) {
            return;
        }
        // The middle of so many does not move much in [`Members::pause`].
        let pause = self.members.pause();
        let fresh = self.balance.usual.filter(|(at, _)| now < at + pause);
        let found = fresh.or_else(|| Some((now, usual(self.members.iter().map(|(_, w)| w))?)));
        self.balance.usual = found;
        let Some((_, usual)) = found else { return };
        let turn = self.members.get_mut(worker).and_then(|w| w.pace.compare(usual));
        match turn {
            None => return,
            Some(Turn::Slow(factor)) => out.push(Output::Note(Event::Slow { worker, factor })),
            Some(Turn::Recovered) => out.push(Output::Note(Event::Recovers { worker })),
        }
        if self.config.stragglers == Stragglers::Rebalance {
            self.balance.stale = true;
            if self.balance.is_due(self.step()) {
                self.consider(now, out);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A heartbeat after so many steps of 50 ms of computing and 1000 FLOPs.
    fn sample(at: Millis, steps: u64) -> Sample {
        let engine = EngineProgress { busy_ms: 50 * steps, work: 1000 * steps, ..EngineProgress::default() };
        Sample { at, applied: Step(steps), engine }
    }

    #[test]
    fn a_window_is_long_enough_in_time_steps_and_computing() {
        let mut pace = Pace::default();
        assert!(!pace.sample(sample(0, 0), 1000, 2.0), "nothing to compare with");
        assert!(!pace.sample(sample(999, 8), 1000, 2.0), "too short");
        assert!(!pace.sample(sample(2000, 3), 1000, 2.0), "too few steps");
        assert!(pace.sample(sample(1000, 4), 1000, 2.0));
        assert_eq!(pace.ratio, Some(10.0), "20 FLOPs a millisecond over a declared speed of 2");
        assert!(!pace.sample(sample(3000, 1), 1000, 2.0), "counters went back: a new window");
        assert!(pace.sample(sample(4000, 5), 1000, 2.0));
        pace.restart();
        assert!(!pace.sample(sample(9000, 50), 1000, 2.0), "a new plan: a new window");
    }

    #[test]
    fn a_turn_needs_three_windows_in_a_row_and_is_told_once() {
        let mut pace = Pace { ratio: Some(10.0), ..Pace::default() };
        let mut turns = |usual: &[f64]| usual.iter().filter_map(|u| pace.compare(*u)).collect::<Vec<_>>();
        assert_eq!(turns(&[15.0, 15.0, 14.9, 20.0, 20.0]), []);
        assert_eq!(turns(&[20.0, 30.0, 30.0, 30.0, 30.0]), [Turn::Slow(2.0)]);
        assert_eq!(turns(&[12.0, 12.0, 13.0, 12.0, 12.0]), []);
        assert_eq!(turns(&[12.0, 12.0]), [Turn::Recovered]);
        assert_eq!(turns(&[16.0, 16.0, 16.0]), [Turn::Slow(1.6)]);
    }

    #[test]
    fn plans_are_made_anew_at_most_once_in_a_while() {
        let mut balance = Balance::default();
        assert!(!balance.is_due(Step(100)));
        balance.stale = true;
        assert!(balance.is_due(Step(1)));
        balance.planned(Step(10));
        assert!(!balance.is_due(Step(1000)));
        balance.stale = true;
        assert!(!balance.is_due(Step(10 + REST - 1)) && balance.is_due(Step(10 + REST)));
    }
}
