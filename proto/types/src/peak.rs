//! What workers could compute at most, for people: utilisation is a share of it, and nothing is
//! decided by it.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::RangeInclusive;

/// FLOP/s of a thread that are believed: sums of very many of them stay far from the ends of fp64.
pub const FLOPS: RangeInclusive<f64> = 1.0..=1e21;

/// What the threads of one worker could compute at most, as it measured when it started.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Peak {
    /// FLOP/s of one thread in the products of the run's numerics class, while all threads of the
    /// worker are at it; one of [`FLOPS`].
    pub thread: f64,
    /// Compute threads, at least one.
    pub threads: u32,
    /// How many threads can run at a time where this worker runs, at least one.
    pub cores: u32,
    /// The host and which of its cores the threads may run on. Workers that say the same here
    /// share those cores.
    pub place: String,
}

/// FLOP/s that all these workers could reach together; none where that of one of them is not known,
/// or there is nobody. Workers in one place have no more than its cores, however many threads they
/// are; one that measured while others computed may have found too little, so the highest peak
/// of a thread in a place is that of all there.
#[must_use]
pub fn together<'a>(peaks: impl IntoIterator<Item = Option<&'a Peak>>) -> Option<f64> {
    // What one thread reaches, how many there are, and how many of them can run at a time.
    let mut places: BTreeMap<&str, (f64, u64, u64)> = BTreeMap::new();
    for peak in peaks {
        let peak = peak?;
        let (thread, threads, cores) = places.entry(&peak.place).or_default();
        *thread = thread.max(peak.thread);
        *threads += u64::from(peak.threads);
        *cores = u64::from(peak.cores).max(*cores);
    }
    let flops = places.values().map(|(thread, threads, cores)| thread * (*threads).min(*cores) as f64);
    (!places.is_empty()).then(|| flops.sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peak(place: &str, threads: u32, cores: u32, thread: f64) -> Peak {
        Peak { thread, threads, cores, place: place.into() }
    }

    fn sum(peaks: &[Peak]) -> Option<f64> {
        together(peaks.iter().map(Some))
    }

    #[test]
    fn workers_that_share_cores_have_no_more_than_these_together() {
        let two = peak("a 0-3", 2, 4, 100.0);
        assert_eq!(sum(std::slice::from_ref(&two)), Some(200.0), "as many threads as it has");
        assert_eq!(sum(&[two.clone(), two.clone()]), Some(400.0), "as many cores as there are");
        assert_eq!(sum(&[two.clone(), two.clone(), two.clone()]), Some(400.0), "no core twice");
        assert_eq!(sum(&[peak("a 0-3", 9, 4, 100.0)]), Some(400.0), "more threads than cores");
        let elsewhere = [peak("b 0-3", 2, 4, 100.0), peak("a 4-7", 2, 4, 100.0)];
        assert_eq!(sum(&[&[two.clone(), two], &elsewhere[..]].concat()), Some(800.0), "other cores count");
    }

    #[test]
    fn the_least_disturbed_measurement_counts_in_its_place_only() {
        let workers = [peak("a 0-1", 1, 2, 60.0), peak("a 0-1", 1, 2, 100.0), peak("b 0", 1, 1, 30.0)];
        assert_eq!(sum(&workers), Some(230.0));
    }

    #[test]
    fn without_the_peak_of_one_there_is_none() {
        let known = peak("a 0-3", 2, 4, 100.0);
        assert_eq!(together([Some(&known), None]), None);
        assert_eq!(sum(&[]), None);
        assert_eq!(
            sum(&vec![peak("a", u32::MAX, u32::MAX, *FLOPS.end()); 1000]),
            Some(u32::MAX as f64 * 1e21)
        );
    }
}
