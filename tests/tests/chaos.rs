//! `caravan chaos` on a tiny model: twenty-two seeds over all kinds of faults and several shapes of a
//! caravan, each of which must come to the bits of one quiet run; and what is said where a run
//! does not come to its end, or there is nothing to compare with.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails where it stands")]

use serde_json::Value;
use std::sync::OnceLock;
use tests::process::{Place, Running};

/// Steps of every run here: enough for two faults after each other, few enough for twenty runs.
const STEPS: &str = "60";
const ALL: &str = "kill,stop,slow,partition,disk,corrupt";

/// A folder with a quiet run that all seeds are compared with: the weights do not depend on the
/// shape of the caravan.
fn quiet() -> &'static Place {
    static QUIET: OnceLock<Place> = OnceLock::new();
    QUIET.get_or_init(|| {
        let place = Place::new();
        let ended = place.train("quiet", &["--workers", "1", "--steps", STEPS]).end();
        assert!(ended.status.success(), "{ended:?}");
        place
    })
}

/// A caravan and what is done to it.
struct Seed {
    seed: u32,
    workers: u32,
    kinds: &'static str,
    faults: u32,
    /// Of `cluster.redundancy` and so on.
    set: &'static [&'static str],
    pile_up: bool,
}

/// One kind after the other, on three workers.
const PLAIN: Seed = Seed { seed: 0, workers: 3, kinds: ALL, faults: 2, set: &[], pile_up: false };

impl Seed {
    fn name(&self) -> String {
        format!("seed-{}", self.seed)
    }

    /// Does it: the weights must come out as the quiet run's, the samples must all have counted
    /// once, the report must add up, and each fault must have been noticed that has to be. Returns
    /// the report.
    fn stands(&self) -> Value {
        let [seed, workers, faults] = [self.seed, self.workers, self.faults].map(|n| n.to_string());
        let name = self.name();
        let mut args = vec!["chaos", "run.toml", "--quiet", "quiet", "--json", "--steps", STEPS];
        args.extend(["--run", &name, "--seed", &seed, "--workers", &workers, "--faults", &faults]);
        args.extend(["--kinds", self.kinds, "--set", "cluster.detect=\"0.5s\""]);
        args.extend(self.set.iter().flat_map(|set| ["--set", set]));
        args.extend(self.pile_up.then_some("--pile-up"));
        let ended = Running::start(quiet().command(&args)).end();
        assert!(ended.status.success(), "{ended:?}");
        let report: Value = serde_json::from_str(&ended.stdout).unwrap();
        assert_eq!(report["verdict"], "equal", "{report:#}");
        assert!(report["weights"].is_string() && report["weights"] == report["quiet"], "{report:#}");
        assert_eq!(report["audit"]["holds"], true, "{report:#}");
        let percent: f64 = report["percent"].as_object().unwrap().values().map(|v| v.as_f64().unwrap()).sum();
        assert!((percent - 100.0).abs() < 1e-6, "{report:#}");
        let faults = done(&report);
        assert!(!faults.is_empty(), "nothing was done: {report:#}");
        for fault in faults {
            assert!(self.kinds.contains(fault["kind"].as_str().unwrap()), "{report:#}");
            assert!(fault["detection"].is_number() || fault["unnoticed"].is_string(), "{report:#}");
            assert!(fault["unnoticed"] != "missed", "{report:#}");
        }
        report
    }

    /// What the process of a slot logged in the run with faults.
    fn log(&self, slot: &Value) -> String {
        let path = quiet().dir.path().join(self.name()).join(format!("chaos/logs/worker-{slot}.log"));
        std::fs::read_to_string(path).unwrap()
    }
}

/// The faults of a report that were done to a process. Not all are on a machine that is so busy
/// that the run is over before the caravan is whole again.
fn done(report: &Value) -> Vec<&Value> {
    report["faults"].as_array().unwrap().iter().filter(|f| f["reached"] == true).collect()
}

macro_rules! seeds {
    ($($name:ident: $seed:expr;)*) => {
        $(#[test] fn $name() { $seed.stands(); })*
    };
}

seeds! {
    seed_01_kills_of_two_workers_that_have_the_same: Seed { seed: 1, workers: 2, kinds: "kill", ..PLAIN };
    seed_02_kills_of_three_workers_with_one_owner_a_slice:
        Seed { seed: 2, kinds: "kill", set: &["cluster.redundancy=1"], ..PLAIN };
    seed_03_kills_of_four_workers_with_three_owners_a_slice:
        Seed { seed: 3, workers: 4, kinds: "kill", set: &["cluster.redundancy=3"], ..PLAIN };
    seed_04_kills_in_two_pipelines_of_two_stages:
        Seed { seed: 4, workers: 4, kinds: "kill", set: &["cluster.stages=2"], ..PLAIN };
    seed_05_kills_in_the_only_pipeline: Seed { seed: 5, kinds: "kill", set: &["cluster.stages=3"], ..PLAIN };
    seed_07_stops_with_one_owner_a_slice:
        Seed { seed: 7, workers: 2, kinds: "stop", set: &["cluster.redundancy=1"], ..PLAIN };
    seed_08_stops_in_two_pipelines_of_two_stages:
        Seed { seed: 8, workers: 4, kinds: "stop", set: &["cluster.stages=2"], ..PLAIN };
    seed_09_slow_workers: Seed { seed: 9, kinds: "slow", ..PLAIN };
    seed_10_slow_stages: Seed { seed: 10, kinds: "slow", set: &["cluster.stages=3"], ..PLAIN };
    seed_11_partitions_of_two_workers: Seed { seed: 11, workers: 2, kinds: "partition", ..PLAIN };
    seed_12_partitions_of_three_workers: Seed { seed: 12, kinds: "partition", ..PLAIN };
    seed_13_partitions_with_one_owner_a_slice:
        Seed { seed: 13, kinds: "partition", set: &["cluster.redundancy=1"], ..PLAIN };
    seed_14_partitions_of_pipelines:
        Seed { seed: 14, workers: 4, kinds: "partition", set: &["cluster.stages=2"], ..PLAIN };
    seed_16_full_disks_and_kills_with_one_owner_a_slice:
        Seed { seed: 16, kinds: "disk,kill", set: &["cluster.redundancy=1"], ..PLAIN };
    seed_21_flipped_bits_with_two_owners: Seed { seed: 21, kinds: "corrupt", faults: 3, ..PLAIN };
    seed_22_flipped_bits_with_three_owners_in_two_pipelines: Seed {
        seed: 22, workers: 4, kinds: "corrupt", faults: 3,
        set: &["cluster.redundancy=3", "cluster.stages=2"], ..PLAIN
    };
    seed_17_everything_with_three_owners_a_slice:
        Seed { seed: 17, workers: 4, faults: 3, set: &["cluster.redundancy=3"], ..PLAIN };
    seed_18_everything_at_once: Seed { seed: 18, faults: 5, pile_up: true, ..PLAIN };
    seed_19_everything_at_once_with_one_owner_a_slice:
        Seed { seed: 19, workers: 4, faults: 5, pile_up: true, set: &["cluster.redundancy=1"], ..PLAIN };
    seed_20_everything_at_once_in_pipelines:
        Seed { seed: 20, workers: 4, faults: 5, pile_up: true, set: &["cluster.stages=2"], ..PLAIN };
}

#[test]
fn seed_06_a_worker_that_was_stopped_for_too_long_finds_itself_shut_out_says_so_and_joins_again() {
    let seed = Seed { seed: 6, kinds: "stop", ..PLAIN };
    let report = seed.stands();
    let first = done(&report)[0];
    assert!(first["detection"].is_number() && first["whole"].is_number(), "{report:#}");
    let log = seed.log(&first["slot"]);
    assert!(log.contains("went on without this worker"), "{log}");
}

#[test]
fn seed_15_a_full_disk_costs_a_checkpoint_and_no_more() {
    let report = Seed { seed: 15, kinds: "disk", ..PLAIN }.stands();
    let events: Vec<&str> = done(&report).iter().filter_map(|fault| fault["event"].as_str()).collect();
    assert!(events.iter().any(|event| event.contains("too large")), "{report:#}");
    assert_eq!(report["generations"], 1, "{report:#}");
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

#[test]
fn a_run_of_another_seed_or_one_that_is_not_finished_is_nothing_to_compare_with() {
    let place = Place::new();
    let steps = ["--steps", "2000"];
    let train = place.train("half", &steps);
    place.reach("half", 3);
    train.signal("INT");
    assert!(train.end().status.success());
    let chaos = |quiet: &str, args: &[&str]| {
        let what = ["chaos", "run.toml", "--run", "chaos", "--quiet", quiet];
        let error = place.run(&[&what[..], &steps, args].concat()).error().to_owned();
        std::fs::remove_dir_all(place.dir.path().join("chaos")).unwrap();
        error
    };
    let error = chaos("half", &[]);
    assert!(error.contains("half is at step") && error.contains("of 2000: finish it first"), "{error}");
    let error = chaos("half", &["--set", "seed=8"]);
    assert!(error.contains("half is another run") && error.contains("seed: 7 there, 8 here"), "{error}");
    let error = chaos("nowhere", &[]);
    assert!(error.contains("nowhere is no run's folder"), "{error}");
}
