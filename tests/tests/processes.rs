//! The main job in real processes: whatever is killed, the weights have the same bits.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails where it stands")]

use tests::process::{Place, Running, kill};

#[test]
fn fifty_steps_have_the_same_bits_on_one_two_three_workers_and_when_one_dies_and_others_join() {
    let place = Place::new();
    let quiet = place.train("one", &["--workers", "1"]).end().weights();
    for workers in ["2", "3"] {
        assert_eq!(place.train(workers, &["--workers", workers]).end().weights(), quiet, "{workers} workers");
    }

    let mut train = place.train("chaos", &["--workers", "3"]);
    place.reach("chaos", 8);
    let victim = train.children()[1];
    kill(victim, "KILL");
    train.wait_for("starting it again");
    let joined = Running::start(place.command(&["worker", "--join", &place.address("chaos").unwrap()]));
    train.wait_for("with 4 workers");
    let ended = train.end();
    assert_eq!(ended.weights(), quiet, "{}", ended.stderr);
    assert!(joined.end().status.success());
    let audit = place.run(&["audit", "chaos", "--json"]);
    assert!(audit.status.success(), "{audit:?}");
    let report: serde_json::Value = serde_json::from_str(&audit.stdout).unwrap();
    assert_eq!((report["holds"].as_bool(), report["steps"].as_u64()), (Some(true), Some(50)), "{report}");

    let replay = place.run(&["replay", "chaos"]);
    assert!(replay.status.success() && replay.stdout.contains("were decided the same"), "{replay:?}");
    let path = place.dir.path().join("chaos/control.jsonl");
    let whole = std::fs::read_to_string(&path).unwrap();
    // The death of the worker is taken out: what follows from it makes no sense any more.
    let death = whole.lines().position(|line| line.contains("Closed")).unwrap();
    let without = whole.split_inclusive('\n').enumerate().filter(|(n, _)| *n != death).map(|(_, line)| line);
    std::fs::write(&path, without.collect::<String>()).unwrap();
    let replay = place.run(&["replay", "chaos"]);
    assert!(replay.error().contains("the core decides otherwise in line "), "{replay:?}");
    assert!(replay.stdout.contains("the first input that was decided otherwise"), "{replay:?}");
}

#[test]
fn when_all_die_the_same_command_goes_on_from_the_checkpoint() {
    let place = Place::new();
    let quiet = place.train("quiet", &[]).end().weights();
    let train = place.train("killed", &[]);
    place.save("killed", 10);
    let workers = train.children();
    train.signal("KILL");
    workers.iter().for_each(|w| kill(*w, "KILL"));
    drop(train);
    let ended = place.train("killed", &[]).end();
    assert!(ended.stderr.contains("going on from the checkpoint of step"), "{}", ended.stderr);
    assert_eq!(ended.weights(), quiet);
}

#[test]
fn an_audit_proves_a_run_that_went_back_and_finds_what_was_done_to_its_ledger() {
    let place = Place::new();
    let train = place.train("run", &[]);
    place.save("run", 10);
    // Further than the checkpoint, so that there is something to go back from.
    place.reach("run", 12);
    let workers = train.children();
    train.signal("KILL");
    workers.iter().for_each(|w| kill(*w, "KILL"));
    drop(train);
    let ended = place.train("run", &[]).end();
    assert!(ended.status.success() && ended.stderr.contains("the run goes back from step"), "{ended:?}");

    let audit = place.run(&["audit", "run"]);
    assert!(audit.status.success(), "{audit:?}");
    assert!(audit.stdout.contains("steps 1 to 50, each once; the run went back once"), "{}", audit.stdout);
    assert!(
        audit.stdout.contains("each of the 400 samples of its 50 steps counted exactly once"),
        "{audit:?}"
    );

    let replay = place.run(&["replay", "run"]);
    assert!(replay.status.success(), "{replay:?}");
    assert_eq!(replay.stdout.matches("were decided the same").count(), 2, "one for each start: {replay:?}");

    let path = place.dir.path().join("run/ledger.jsonl");
    let whole = std::fs::read_to_string(&path).unwrap();
    let without: Vec<&str> =
        whole.split_inclusive('\n').enumerate().filter(|(n, _)| *n != 5).map(|(_, l)| l).collect();
    std::fs::write(&path, without.concat()).unwrap();
    let audit = place.run(&["audit", "run"]);
    assert!(audit.stdout.contains("step 6 follows step 4: step 5 is missing"), "{audit:?}");
    assert!(audit.error().contains("checks do not hold"), "{audit:?}");
}

#[test]
fn ctrl_c_writes_a_checkpoint_after_the_step_and_the_same_command_goes_on_from_there() {
    let place = Place::new();
    let quiet = place.train("quiet", &[]).end().weights();
    let train = place.train("drained", &[]);
    place.reach("drained", 13);
    train.signal("INT");
    let first = train.end();
    assert!(first.stderr.contains("stopped at step"), "{}", first.stderr);
    assert_ne!(first.weights(), quiet);
    let step =
        first.stdout.lines().find_map(|l| l.strip_prefix("step ")?.split(' ').next()?.parse::<u64>().ok());
    let second = place.train("drained", &[]).end();
    assert!(
        second.stderr.contains(&format!("going on from the checkpoint of step {}", step.unwrap())),
        "{}",
        second.stderr
    );
    assert_eq!(second.weights(), quiet);
    // A finished run is finished, and says the same again.
    assert_eq!(place.train("drained", &[]).end().weights(), quiet);
}

#[test]
fn a_worker_that_is_asked_to_leave_leaves_and_the_run_ends_as_if_it_had_not() {
    let place = Place::new();
    let quiet = place.train("quiet", &[]).end().weights();
    let mut train = place.train("left", &["--workers", "1"]);
    place.reach("left", 3);
    let guest = Running::start(place.command(&["worker", "--join", &place.address("left").unwrap()]));
    train.wait_for("with 2 workers");
    guest.signal("TERM");
    assert!(guest.end().status.success());
    train.wait_for("asked to leave");
    assert_eq!(train.end().weights(), quiet);
}
