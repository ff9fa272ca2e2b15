//! What the steps of a ledger were trained on, recomputed from the data.

use super::history::Counted;
use super::{Check, Faults, Subject};
use crate::estimate::grouped;
use caravan_data::Sampler;
use caravan_types::Step;
use std::collections::BTreeMap;

/// Checks the sample numbers, and gives back the steps that have the right ones: what a step
/// with wrong ones was trained on cannot be looked up.
pub fn samples(steps: &[Counted], base: Step, per_step: u64) -> (Check, Vec<Counted>) {
    let mut faults = Faults::default();
    let mut next = base.0.saturating_mul(per_step);
    let mut sound = Vec::with_capacity(steps.len());
    for counted in steps {
        let Counted { step, line, first, end, .. } = *counted;
        let at = || format!("line {line}: step {step} has the samples {first}..{end}");
        if first > next {
            faults.add(|| format!("{}; the samples {next}..{first} are in no step", at()));
        } else if first < next {
            faults.add(|| format!("{}; those below {next} counted before", at()));
        }
        let of_step = step.0.checked_mul(per_step);
        if Some(end) != of_step || Some(first) != of_step.and_then(|end| end.checked_sub(per_step)) {
            faults.add(|| format!("{}, which are not the {per_step} of that step", at()));
        } else {
            sound.push(*counted);
        }
        next = end;
    }
    let check = faults.check(Subject::Samples, || match sound.first().zip(sound.last()) {
        Some((first, last)) => {
            format!("{} to {}, without gap or overlap, {per_step} a step", first.first, last.end - 1)
        }
        None => "none yet".to_owned(),
    });
    (check, sound)
}

/// The sequences of one epoch that were used.
struct Used {
    /// A bit for each; given up once all are set.
    bits: Vec<u64>,
    count: u64,
}

/// Every sample is a sequence of its epoch that no other one was.
pub fn sequences(sampler: &Sampler, steps: &[Counted]) -> Check {
    let mut faults = Faults::default();
    let windows = sampler.windows();
    let mut epochs: BTreeMap<u64, Used> = BTreeMap::new();
    for counted in steps {
        for index in 0..sampler.shape().sequences_per_step() {
            let place = match sampler.place(counted.step, index) {
                Ok(place) => place,
                Err(error) => {
                    faults.add(|| format!("step {}: {error}", counted.step));
                    break;
                }
            };
            let used = epochs
                .entry(place.epoch)
                .or_insert_with(|| Used { bits: vec![0; windows.div_ceil(64) as usize], count: 0 });
            if !used.insert(place.window, windows) {
                faults.add(|| {
                    format!(
                        "line {}: sample {index} of step {} is sequence {} of epoch {}, which was used before",
                        counted.line, counted.step, place.window, place.epoch
                    )
                });
            }
        }
    }
    // An epoch is gone through to its end before the next one begins; the first one of a ledger
    // that begins later is not all there.
    let newest = epochs.keys().next_back().copied();
    let begins_early = steps.first().is_none_or(|first| first.first == 0);
    for (epoch, used) in &epochs {
        if begins_early && Some(*epoch) != newest && used.count < windows {
            let (epoch, missing) = (*epoch, windows - used.count);
            faults.add(|| {
                format!("epoch {epoch} is over, and {missing} of its {windows} sequences were not used")
            });
        }
    }
    faults.check(Subject::Sequences, || {
        let total = grouped(windows);
        let open = newest.and_then(|epoch| Some((epoch, epochs.get(&epoch)?.count)));
        match open {
            None => format!("none of {total} yet"),
            Some((0, count)) => format!("epoch 0 used {} of its {total}, each once", grouped(count)),
            Some((epoch, count)) => format!(
                "{epoch} epochs used each of their {total} once; epoch {epoch} used {}, each once",
                grouped(count)
            ),
        }
    })
}

impl Used {
    /// False where it was there.
    fn insert(&mut self, window: u64, windows: u64) -> bool {
        if self.count == windows {
            return false;
        }
        let Some(word) = self.bits.get_mut((window / 64) as usize) else { return false };
        let bit = 1 << (window % 64);
        if *word & bit != 0 {
            return false;
        }
        *word |= bit;
        self.count += 1;
        if self.count == windows {
            self.bits = Vec::new();
        }
        true
    }
}

/// Every step counted as many tokens as its sequences have.
pub fn tokens(sampler: &Sampler, steps: &[Counted]) -> Check {
    let mut faults = Faults::default();
    let mut total = 0u64;
    for counted in steps {
        let (line, step, told) = (counted.line, counted.step, counted.tokens);
        match sampler.counted_tokens(step) {
            Ok(found) if found == told => total = total.saturating_add(found),
            Ok(found) => faults.add(|| {
                format!("line {line}: step {step} counted {told} tokens, its sequences have {found}")
            }),
            Err(error) => {
                faults.add(|| format!("step {step}: {error}"));
                break;
            }
        }
    }
    faults.check(Subject::Tokens, || {
        format!("{} counted, in each step as many as the data has", grouped(total))
    })
}
