//! The simulation: whatever fails, the run ends with the bits of a quiet one; and classic bugs,
//! reintroduced one at a time, are found.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails where it stands")]
#![allow(clippy::print_stdout, reason = "the table of what is found, where")]

use caravan_coordinator_core::Mutant as C;
use caravan_engine::Flaw;
use caravan_types::message::Farewell;
use caravan_types::status::Event;
use caravan_worker_core::Mutant as W;
use std::mem::discriminant;
use tests::sim::{Fault, Mutant, Options, run};
use tests::sweep::{Sweep, Truths};

#[test]
fn the_same_seed_twice_gives_the_same_bytes() {
    let truths = Truths::default();
    for seed in [7, 8, 9] {
        let options = Options::random(seed);
        let truth = truths.of(&options);
        let once = run(&options, Some(&truth)).unwrap();
        assert_eq!(once, run(&options, Some(&truth)).unwrap(), "{options}");
    }
}

#[test]
fn any_number_of_workers_stages_and_owners_gives_the_bits_of_one_with_and_without_recompute() {
    let truths = Truths::default();
    for (workers, recompute) in (1..=5).flat_map(|workers| [(workers, [false; 4]), (workers, [true; 4])]) {
        for (stages, redundancy) in [(None, 1), (Some(1), 2), (Some(2), 3), (Some(5), 2)] {
            let quiet = Options::quiet(8, 2, 6);
            let options = Options { workers, stages, redundancy, recompute, seed: 1, ..quiet };
            let (outcome, _) = run(&options, Some(&truths.of(&options))).unwrap();
            assert_eq!(outcome.farewell, Some(Farewell::Finished), "{options}");
        }
    }
}

#[test]
fn half_of_all_seeds_recompute_layers_and_half_change_that_with_a_restart() {
    assert_eq!(Options::quiet(8, 2, 6).recompute, [false; 4], "what they are compared with");
    let drawn: Vec<_> = (0..1000).map(|seed| Options::random(seed).recompute).collect();
    let first = drawn.iter().filter(|turns| turns[0]).count();
    let changed = drawn.iter().filter(|turns| turns[0] != turns[1]).count();
    assert!((400..600).contains(&first) && (400..600).contains(&changed), "{first} and {changed} of 1000");
}

#[test]
fn whatever_fails_every_invariant_holds_and_the_run_ends() {
    let sweep = Sweep::run(0..1000, None).unwrap_or_else(|failure| panic!("{failure}"));
    assert!(sweep.faults >= 5 * 1000 * 9 / 10, "most faults strike before the end: {sweep}");
    assert!(sweep.ends["Finished"] > 800 && sweep.ends["Drained"] > 10, "{sweep}");
    assert!(!sweep.ends.contains_key("Failed"), "{sweep}");
}

#[test]
fn whoever_computes_something_wrong_is_named_and_cut_out_and_the_bits_are_right() {
    let truths = Truths::default();
    // Not all are named: weights that flip just before they are replaced harm nobody, and another
    // fault of the network may have a step done again before anybody compares.
    for (name, flaw, least) in [
        ("a bit of memory", Flaw::Memory as fn(u64) -> Flaw, 0.4),
        ("a gradient", Flaw::Sum as fn(u64) -> Flaw, 0.9),
        ("an update", Flaw::Update as fn(u64) -> Flaw, 0.9),
    ] {
        let (mut named, mut tried) = (0, 0);
        // Two owners recompute, three have a majority.
        for (workers, redundancy) in [(2, 2), (3, 2), (3, 3), (4, 2)] {
            for seed in 0..10 {
                let faults = vec![(60, Fault::Corrupt(flaw(seed * 7919 + 31)))];
                let options = Options { workers, redundancy, seed, faults, ..Options::quiet(4, 1, 12) };
                let options = Options { checkpoint_every: 3, ..options };
                let (outcome, _) =
                    run(&options, Some(&truths.of(&options))).unwrap_or_else(|e| panic!("{options}: {e}"));
                assert_eq!(outcome.farewell, Some(Farewell::Finished), "{options}");
                // Where nobody could compare, it was another one.
                if outcome.flaws.iter().any(|done| discriminant(done) == discriminant(&flaw(0))) {
                    tried += 1;
                    named += u32::from(outcome.events.iter().any(|e| matches!(e, Event::Corrupt { .. })));
                }
            }
        }
        println!("{name}: named {named} times of {tried}");
        assert!(tried >= 15 && f64::from(named) >= least * f64::from(tried), "{name}: {named} of {tried}");
    }
}

/// Every bug with seeds within which it is found.
const MUTANTS: [(&str, Mutant); 18] = [
    ("generations forgotten by a restarted coordinator", Mutant::ForgetGenerations),
    ("a step applied before all are prepared", Mutant::Worker(W::ApplyEarly)),
    ("a stale plan accepted", Mutant::Worker(W::StalePlan)),
    ("a vote counted for another step", Mutant::Worker(W::VoteOfAnotherStep)),
    ("an old member's frame accepted", Mutant::OldConnections),
    ("news lost and never told again", Mutant::LostNews),
    ("liveness by the clock of another host", Mutant::ForeignClock),
    ("healing from a holder of another step", Mutant::Coordinator(C::HealFromAnotherStep)),
    ("a manifest before its data", Mutant::SavedBeforeWritten),
    ("other data when a step is redone", Mutant::OtherData),
    ("the norm summed member by member", Mutant::Worker(W::NormByMember)),
    ("two leaders", Mutant::TwoLeaders),
    ("a leaver's slices dropped", Mutant::Coordinator(C::DropLeaversSlices)),
    ("old slices dropped before the first commit", Mutant::Worker(W::DropBeforeCommit)),
    ("votes counted and not compared", Mutant::Worker(W::BlindVote)),
    ("a report that is no promise", Mutant::Worker(W::ReportAndGoOn)),
    ("a skipped step applied by who was only prepared", Mutant::Worker(W::ApplySkipped)),
    ("a restarted coordinator that tells no plan again", Mutant::Coordinator(C::PlanToldOnce)),
];

#[test]
fn every_classic_bug_is_found_within_two_thousand_seeds() {
    let mut survivors = Vec::new();
    for (name, mutant) in MUTANTS {
        match Sweep::run(0..2000, Some(mutant)) {
            Ok(_) => survivors.push(name),
            Err(failure) => {
                let reason: String = failure.reason.chars().take(100).collect();
                println!("| {name} | {} | {reason} |", failure.seed);
            }
        }
    }
    assert!(survivors.is_empty(), "not found: {survivors:?}");
}
