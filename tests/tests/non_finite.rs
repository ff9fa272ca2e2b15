//! Steps that are not finite, on real processes: a learning rate with which the weights grow a
//! hundredfold a step.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails where it stands")]

use std::fs;
use tests::process::{Place, kill};

/// Weights are multiplied by 1 - learning rate · decay at each step.
const GROWING: [&str; 6] =
    ["--set", "recipe.learning_rate=10.0", "--set", "recipe.weight_decay=10.0", "--steps", "24"];

#[test]
fn a_run_stops_before_a_step_that_is_not_finite_with_the_cause_and_a_checkpoint_of_the_step_before() {
    let place = Place::new();
    let ended = place.train("run", &GROWING).end();
    // `Exit::NonFinite`, which no other end has.
    assert_eq!(ended.status.code(), Some(16), "{}", ended.stderr);
    let reason = ended.stderr.lines().find(|l| l.starts_with("the run cannot go on: step ")).unwrap();
    assert!(reason.contains("went bad first") && reason.contains("recipe.non_finite = \"skip\""), "{reason}");
    let step: u64 = reason.split_whitespace().nth(6).unwrap().parse().unwrap();
    assert!(reason.contains("lane 0, micro-batch 0, sequence 0"), "{reason}");
    let saved = place.dir.path().join(format!("run/checkpoints/step-{:08}", step - 1));
    assert!(saved.join("manifest.json").exists(), "{}", saved.display());
    let audit = place.run(&["audit", "run"]);
    assert!(audit.status.success(), "{audit:?}");
    assert!(audit.stdout.contains("it stopped once before a step that was not finite"), "{}", audit.stdout);
    // Started again, it goes on from there, and comes to the same end.
    let again = place.train("run", &GROWING).end();
    assert_eq!(again.status.code(), Some(16), "{}", again.stderr);
    assert!(again.stderr.contains(&format!("going on from the checkpoint of step {}", step - 1)));
    let words = |line: &str| line.split(". On ").next().unwrap().to_owned();
    assert!(again.stderr.contains(&words(reason)), "{}", again.stderr);
}

#[test]
fn skipped_steps_are_in_the_ledger_and_a_kill_between_them_changes_no_bit() {
    let place = Place::new();
    let args = [&GROWING[..], &["--set", "recipe.non_finite=skip"]].concat();
    let alone = place.train("quiet", &[&args[..], &["--workers", "1"]].concat()).end();
    let quiet = alone.weights();
    let first =
        alone.stderr.lines().find(|l| l.contains("was skipped, and its samples are used up")).unwrap();
    let first: u64 = first.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(alone.stderr.contains("went bad first"), "{}", alone.stderr);

    let train = place.train("run", &args);
    place.reach("run", first + 1);
    kill(train.children()[0], "KILL");
    let ended = train.end();
    assert_eq!(ended.weights(), quiet);
    let skipped = |run: &str| -> Vec<u64> {
        let ledger = fs::read_to_string(place.dir.path().join(run).join("ledger.jsonl")).unwrap();
        let entries = ledger.lines().map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap());
        let skips = entries.filter(|e| e["entry"]["kind"] == "skip");
        skips.map(|e| e["entry"]["step"].as_u64().unwrap()).collect()
    };
    assert_eq!(skipped("quiet"), (first..=24).collect::<Vec<_>>(), "weights do not get better by themselves");
    let audit = place.run(&["audit", "run"]);
    assert!(audit.status.success() && audit.stdout.contains("were skipped: "), "{audit:?}");
}
