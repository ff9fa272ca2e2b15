//! `caravan chaos` on a tiny model: the kinds of faults that come one after the other, and what is
//! said where a run does not come to its end.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails where it stands")]

use serde_json::Value;
use tests::process::{Place, Running};

const DETECT: [&str; 2] = ["--set", "cluster.detect=\"0.5s\""];

/// A chaos run with 3 workers, whose weights must come out as the quiet run's; its report.
fn chaos(place: &Place, kinds: &str, seed: &str, args: &[&str]) -> Value {
    let what =
        ["chaos", "run.toml", "--workers", "3", "--json", "--run", seed, "--kinds", kinds, "--seed", seed];
    let ended = Running::start(place.command(&[&what[..], &DETECT, args].concat())).end();
    assert!(ended.status.success(), "{ended:?}");
    let report: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(report["verdict"], "equal", "{report:#}");
    assert!(report["weights"].is_string() && report["weights"] == report["quiet"], "{report:#}");
    assert_eq!(report["audit"]["holds"], true, "{report:#}");
    let percent: f64 = report["percent"].as_object().unwrap().values().map(|v| v.as_f64().unwrap()).sum();
    assert!((percent - 100.0).abs() < 1e-6, "{report:#}");
    report
}

/// The faults of a report that were done to a process. Not all are on a machine that is so busy
/// that the run is over before the caravan is whole again.
fn done(report: &Value) -> Vec<&Value> {
    report["faults"].as_array().unwrap().iter().filter(|f| f["reached"] == true).collect()
}

#[test]
fn workers_that_are_killed_one_after_the_other_change_no_bit_and_each_death_is_noticed() {
    let report = chaos(&Place::new(), "kill", "1", &["--steps", "150", "--faults", "4"]);
    let faults = done(&report);
    assert!(faults.len() >= 2, "{report:#}");
    assert!(faults.iter().all(|f| f["kind"] == "kill" && f["detection"].is_number()), "{report:#}");
    assert!(faults[0]["recovery"].is_number() && faults[0]["whole"].is_number(), "{report:#}");
}

#[test]
fn a_worker_that_was_stopped_for_too_long_finds_itself_shut_out_says_so_and_joins_again() {
    let place = Place::new();
    let report = chaos(&place, "stop", "2", &["--steps", "150", "--faults", "2"]);
    let first = done(&report)[0];
    assert!(first["detection"].is_number() && first["whole"].is_number(), "{report:#}");
    let log = place.dir.path().join(format!("2/chaos/logs/worker-{}.log", first["slot"]));
    let log = std::fs::read_to_string(log).unwrap();
    assert!(log.contains("went on without this worker"), "{log}");
}

#[test]
fn workers_that_are_cut_off_change_no_bit() {
    let report = chaos(&Place::new(), "partition", "3", &["--steps", "200", "--faults", "4"]);
    assert!(done(&report).iter().filter(|f| f["whole"].is_number()).count() >= 2, "{report:#}");
}

#[test]
fn faults_may_pile_up_and_a_full_disk_costs_no_more_than_a_checkpoint() {
    let args = ["--steps", "100", "--faults", "6", "--pile-up"];
    chaos(&Place::new(), "kill,slow,disk", "4", &args);
}

#[test]
fn a_run_that_is_not_over_in_time_is_called_stuck_with_its_last_events() {
    let place = Place::new();
    let what = ["chaos", "run.toml", "--workers", "2", "--steps", "150", "--faults", "1", "--patience", "1"];
    let ended = Running::start(place.command(&what)).end();
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    assert!(ended.stdout.contains("the last events:") && ended.stdout.contains("w1 (worker-"), "{ended:?}");
    assert!(ended.error().contains("STUCK"), "{ended:?}");
}

#[test]
fn a_folder_with_an_earlier_chaos_run_is_refused() {
    let place = Place::new();
    std::fs::create_dir_all(place.dir.path().join("there/chaos")).unwrap();
    let ended = place.run(&["chaos", "run.toml", "--run", "there"]);
    assert!(ended.error().contains("there/chaos exists"), "{ended:?}");
}
