//! The two cores together, under random schedules and faults.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails where it stands")]

use caravan_types::Step;
use caravan_types::message::Farewell;
use std::collections::BTreeMap;
use tests::cluster::{Options, Truth, run};

/// Values of a quiet run on one worker, by lanes; long enough for every random run.
fn truths() -> BTreeMap<u32, Truth> {
    let one = |lanes| (lanes, run(Options::quiet(lanes, 10), None).unwrap().1);
    [1, 2, 4, 8].map(one).into()
}

#[test]
fn the_same_seed_twice_gives_the_same_run() {
    let once = run(Options::random(7), None).unwrap();
    assert_eq!(once, run(Options::random(7), None).unwrap());
}

#[test]
fn any_number_of_workers_gives_the_bits_of_one() {
    let truths = truths();
    for workers in 1..=5 {
        for redundancy in 1..=3 {
            let options = Options { workers, redundancy, seed: 1, ..Options::quiet(8, 6) };
            let (outcome, _) = run(options, Some(&truths[&8])).unwrap();
            assert_eq!(outcome.farewell, Some(Farewell::Finished));
        }
    }
}

#[test]
fn whatever_dies_joins_or_leaves_the_run_ends_with_the_same_bits() {
    let truths = truths();
    let mut ends = BTreeMap::new();
    for seed in 0..2000 {
        let options = Options::random(seed);
        let (outcome, _) = run(options.clone(), Some(&truths[&options.lanes]))
            .unwrap_or_else(|e| panic!("seed {seed}: {e}\n{options:?}"));
        let end = outcome.farewell.unwrap();
        *ends.entry(format!("{end:?}")).or_insert(0) += 1;
        if end == Farewell::Finished {
            assert_eq!(outcome.checkpoint, Some(Step(options.steps)), "seed {seed}");
        }
    }
    assert!(ends["Finished"] > 1500 && ends["Drained"] > 50, "{ends:?}");
    assert!(!ends.contains_key("Failed"), "{ends:?}");
}
