//! Where the time of a run went.
//!
//! The time between two commits belongs to the later one. Where no plan came in between, all of
//! it was stepping. Where one did, it falls into parts:
//!
//! ```text
//!  commit ──── fault ──────── noticed ──────── plan ─────────────────────── commit
//!      redone work │ detection    │ regrouping   │ regrouping (heal) │ a step │
//! ```
//!
//! What was computed of the step in flight until the fault is lost, and so is *redone work*; a
//! step that takes place again after a way back to a checkpoint is so as a whole. From the fault
//! until a worker is named is *detection*. From then until the plan is *regrouping*, and so is
//! what the first step after a plan takes longer than a step does (the median of the others):
//! the heal. Before the first plan and after the last commit is *other*.

use caravan_types::Step;
use serde::Serialize;
use std::time::Duration;

/// What happened, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// Something was done to a worker.
    Fault,
    /// A worker was named as hanging or gone.
    Noticed,
    /// All were told to stop at once.
    Stopped,
    /// A new plan is in force.
    Planned,
    /// A step was committed.
    Committed(Step),
}

/// What happened when, since the start of the run; ascending.
pub type Timeline = Vec<(Duration, Mark)>;

/// Where the time went, in seconds and in shares of all of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Shares {
    /// Steps that count.
    pub useful: f64,
    /// Work that was done again.
    pub redone: f64,
    /// From a fault until somebody noticed.
    pub detection: f64,
    /// From then until the first new step could begin.
    pub regrouping: f64,
    /// Start and end.
    pub other: f64,
}

impl Shares {
    /// The names, in the order of [`values`](Self::values).
    pub const NAMES: [&'static str; 5] = [
        "useful stepping",
        "redone work",
        "waiting for detection",
        "regrouping and healing",
        "start and end",
    ];

    /// The values.
    #[must_use]
    pub fn values(&self) -> [f64; 5] {
        [self.useful, self.redone, self.detection, self.regrouping, self.other]
    }

    /// In tenths of a percent that add up to 1000: each rounded down, and what is missing given to
    /// those that lost most.
    #[must_use]
    pub fn per_mille(&self) -> [u32; 5] {
        let sum: f64 = self.values().iter().sum();
        if sum <= 0.0 {
            return [0, 0, 0, 0, 1000];
        }
        let exact = self.values().map(|v| v / sum * 1000.0);
        let mut rounded = exact.map(|v| v as u32);
        let mut order = [0, 1, 2, 3, 4];
        order.sort_by(|a, b| exact[*b].fract().total_cmp(&exact[*a].fract()));
        let missing = 1000u32.saturating_sub(rounded.iter().sum()) as usize;
        for at in order.into_iter().cycle().take(missing) {
            rounded[at] += 1;
        }
        rounded
    }
}

/// What a timeline adds up to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Sum {
    /// Seconds of each.
    pub seconds: Shares,
    /// Steps that were committed again after a way back to a checkpoint.
    pub committed_again: u64,
    /// Steps in flight that were given up and done again.
    pub in_flight_again: u64,
    /// Plans.
    pub generations: u64,
    /// What a step takes, in seconds: the median over those before which there was no plan.
    pub step: f64,
}

/// Adds up the time of a run that took `wall`.
#[must_use]
pub fn add_up(timeline: &Timeline, wall: Duration) -> Sum {
    let mut sum = Sum { step: typical(timeline), ..Sum::default() };
    let mut walk = Walk::default();
    for (at, mark) in timeline {
        walk.mark(at.as_secs_f64(), *mark, &mut sum);
    }
    sum.seconds.other += (wall.as_secs_f64() - walk.from).max(0.0);
    sum
}

/// The way along a timeline, from commit to commit.
#[derive(Default)]
struct Walk {
    /// The last commit, or the start.
    from: f64,
    /// The newest step that was committed.
    newest: Step,
    /// Whether there was a commit at all.
    stepping: bool,
    /// The last fault that nobody has noticed.
    fault: Option<f64>,
    /// Since the last commit: when it was first noticed that a worker fails, or all were told to
    /// stop; and the last plan.
    noticed: Option<f64>,
    planned: Option<f64>,
}

impl Walk {
    fn mark(&mut self, at: f64, mark: Mark, sum: &mut Sum) {
        match mark {
            Mark::Fault => self.fault = Some(at),
            Mark::Noticed | Mark::Stopped => self.noticed = self.noticed.or(Some(at)),
            Mark::Planned => {
                sum.generations += 1;
                self.planned = Some(at);
            }
            Mark::Committed(step) => self.commit(at, step, sum),
        }
    }

    fn commit(&mut self, at: f64, step: Step, sum: &mut Sum) {
        let again = step <= self.newest;
        sum.committed_again += u64::from(again);
        let from = self.from;
        let begun = match self.planned.take() {
            None => from,
            Some(planned) if !self.stepping => {
                sum.seconds.other += planned - from;
                self.healed(planned, at, sum)
            }
            Some(planned) => {
                let noticed = self.noticed.filter(|noticed| *noticed <= planned);
                if let Some(noticed) = noticed {
                    let fault = self.fault.take().map_or(noticed, |fault| fault.clamp(from, noticed));
                    sum.in_flight_again += 1;
                    sum.seconds.redone += fault - from;
                    sum.seconds.detection += noticed - fault;
                }
                sum.seconds.regrouping += planned - noticed.unwrap_or(from);
                self.healed(planned, at, sum)
            }
        };
        let stepped = if again { &mut sum.seconds.redone } else { &mut sum.seconds.useful };
        *stepped += at - begun;
        *self = Self {
            from: at,
            newest: self.newest.max(step),
            stepping: true,
            fault: self.fault,
            ..Self::default()
        };
    }

    /// When the first step after a plan began, at the latest; the heal was before.
    fn healed(&self, planned: f64, committed: f64, sum: &mut Sum) -> f64 {
        let begun = (committed - sum.step).max(planned);
        sum.seconds.regrouping += begun - planned;
        begun
    }
}

/// The median time from commit to commit where no plan came in between, in seconds.
fn typical(timeline: &Timeline) -> f64 {
    let (mut from, mut times) = (None, Vec::new());
    for (at, mark) in timeline {
        match mark {
            Mark::Committed(_) => {
                times.extend(from.map(|from: Duration| at.saturating_sub(from).as_secs_f64()));
                from = Some(*at);
            }
            Mark::Planned => from = None,
            Mark::Fault | Mark::Noticed | Mark::Stopped => {}
        }
    }
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(ms: u64, mark: Mark) -> (Duration, Mark) {
        (Duration::from_millis(ms), mark)
    }

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() < 1e-9
    }

    #[test]
    fn a_kill_costs_the_step_in_flight_its_detection_and_the_regrouping() {
        let commit = |ms, step| at(ms, Mark::Committed(Step(step)));
        let timeline = vec![
            at(1000, Mark::Planned),
            commit(1100, 1),
            commit(1200, 2),
            commit(1300, 3),
            at(1340, Mark::Fault),
            at(1350, Mark::Noticed),
            at(1351, Mark::Stopped),
            at(1400, Mark::Planned),
            commit(1600, 4),
            // A join: at a boundary, so nothing is lost.
            at(1610, Mark::Planned),
            commit(1710, 5),
        ];
        let sum = add_up(&timeline, Duration::from_millis(2000));
        let s = sum.seconds;
        assert!(close(sum.step, 0.1), "{sum:?}");
        assert!(close(s.other, 1.0 + 0.29), "{sum:?}");
        assert!(close(s.useful, 0.5), "{sum:?}");
        assert!(close(s.redone, 0.04) && close(s.detection, 0.01), "{sum:?}");
        assert!(close(s.regrouping, 0.05 + 0.1 + 0.01), "{sum:?}");
        assert_eq!((sum.generations, sum.in_flight_again, sum.committed_again), (3, 1, 0));
    }

    #[test]
    fn after_a_way_back_steps_count_once() {
        let commit = |ms, step| at(ms, Mark::Committed(Step(step)));
        let timeline = vec![
            at(0, Mark::Planned),
            commit(100, 1),
            commit(200, 2),
            at(200, Mark::Fault),
            at(200, Mark::Noticed),
            at(200, Mark::Planned),
            commit(300, 1),
            commit(400, 2),
            commit(500, 3),
        ];
        let sum = add_up(&timeline, Duration::from_millis(500));
        assert!(close(sum.seconds.useful, 0.3) && close(sum.seconds.redone, 0.2), "{sum:?}");
        assert_eq!(sum.committed_again, 2);
    }

    proptest! {
        #[test]
        fn whatever_happens_the_shares_are_of_all_time_and_add_up(
            marks in proptest::collection::vec((0u64..500, 0u8..6), 0..60), rest in 0u64..500,
        ) {
            let (mut now, mut step) = (0, 0);
            let timeline: Timeline = marks.iter().map(|(wait, mark)| {
                now += wait;
                at(now, match mark {
                    0 => Mark::Fault,
                    1 => Mark::Noticed,
                    2 => Mark::Stopped,
                    3 => Mark::Planned,
                    _ => {
                        step = if *wait % 7 == 0 { step / 2 + 1 } else { step + 1 };
                        Mark::Committed(Step(step))
                    }
                })
            }).collect();
            let wall = Duration::from_millis(now + rest);
            let sum = add_up(&timeline, wall);
            prop_assert!(sum.seconds.values().iter().all(|s| *s >= -1e-9), "{:?}", sum);
            prop_assert!((sum.seconds.values().iter().sum::<f64>() - wall.as_secs_f64()).abs() < 1e-6, "{:?}", sum);
            prop_assert_eq!(sum.seconds.per_mille().iter().sum::<u32>(), 1000);
        }
    }
}
