//! The exploration: every interleaving over a step boundary keeps the invariants, what is left out
//! as equal is equal, and classic bugs are found, with a way there that can be told again.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails where it stands")]
#![allow(clippy::print_stdout, reason = "how much was explored, and the table of what is found")]

use tests::explore::{Kind, Options, Report, explore, mutant, replay};

/// Explores everything, and nothing is wrong.
fn all(options: &Options) -> Report {
    let report = explore(options, |_| {}).unwrap_or_else(|violation| panic!("{violation}"));
    println!("{options}\n    {report}");
    assert!(report.complete && report.ends > 0);
    report
}

#[test]
fn one_fault_of_any_kind_at_any_moment_breaks_nothing() {
    let usual = Options::default();
    for options in [
        usual.clone(),
        Options { steps: 3, ..usual.clone() },
        Options { lanes: 4, ..usual.clone() },
        Options { skipped: Some(2), ..usual.clone() },
        Options { redundancy: 1, ..usual.clone() },
        Options { redundancy: 3, ..usual.clone() },
        Options { stages: 2, lanes: 1, ..usual.clone() },
        Options { stages: 2, ..usual.clone() },
    ] {
        let report = all(&options);
        assert!(report.states > 50_000, "{report}");
    }
}

#[test]
fn two_deaths_or_silences_at_any_moments_break_nothing() {
    // All kinds together have a hundred times as many: `cargo run -p tests --release -- explore --faults 2`.
    let kinds = vec![Kind::Crash, Kind::Coordinator, Kind::Silence, Kind::Late];
    let report = all(&Options { faults: 2, kinds, ..Options::default() });
    assert!(report.states > 1_000_000, "{report}");
}

#[test]
fn what_happens_at_once_leads_to_the_same_ends() {
    // A broken connection alone has four million states without.
    for kind in Kind::ALL.into_iter().filter(|kind| *kind != Kind::Break) {
        let eager = Options { kinds: vec![kind], ..Options::default() };
        let (fewer, more) = (all(&eager), all(&Options { eager: false, ..eager.clone() }));
        assert!(fewer.states < more.states, "{kind}");
        assert_eq!(fewer.outcomes, more.outcomes, "{kind}");
    }
}

/// Bugs with the faults that it takes to find each, and the invariant that it breaks.
const FOUND: [(&str, usize, &[Kind], u64, &str); 13] = [
    ("ApplyEarly", 1, &[Kind::Crash], 2, "C-2"),
    ("StalePlan", 1, &[Kind::Coordinator], 2, "C-1"),
    ("VoteOfAnotherStep", 1, &[Kind::Join], 3, "L-1"),
    ("NormByMember", 0, &[], 2, "N-1"),
    ("DropBeforeCommit", 2, &[Kind::Join, Kind::Crash], 2, "C-2"),
    ("ReportAndGoOn", 1, &[Kind::Crash], 2, "L-1"),
    ("ApplySkipped", 1, &[Kind::Crash], 2, "N-1"),
    ("HealFromAnotherStep", 1, &[Kind::Break], 2, "L-1"),
    ("DropLeaversSlices", 2, &[Kind::Leave], 2, "C-2"),
    ("PlanToldOnce", 2, &[Kind::Crash, Kind::Coordinator], 2, "L-1"),
    ("OldConnections", 1, &[Kind::Break], 2, "C-2"),
    ("ForgetGenerations", 1, &[Kind::Coordinator], 2, "L-1"),
    ("TwoLeaders", 2, &[Kind::Coordinator, Kind::Silence], 2, "G-1"),
];

#[test]
fn classic_bugs_are_found_and_the_way_there_can_be_told_again() {
    for (name, faults, kinds, steps, invariant) in FOUND {
        let bug = mutant(name).unwrap();
        let options =
            Options { faults, kinds: kinds.to_vec(), steps, mutant: Some(bug), ..Options::default() };
        let skipped = (name == "ApplySkipped").then_some(2);
        let options = Options { skipped, ..options };
        let Err(violation) = explore(&options, |_| {}) else { panic!("{name} is not found") };
        let reason: String = violation.reason.chars().take(100).collect();
        println!("| {name} | {} choices | {reason} |", violation.trace.len());
        assert!(violation.reason.starts_with(invariant), "{name}: {violation}");
        let (trace, end) = replay(&options, &violation.word).unwrap();
        assert_eq!(trace, violation.trace, "{name}");
        let again = end.unwrap_err();
        assert!(again.starts_with(invariant), "{name}: {again}");
    }
}
