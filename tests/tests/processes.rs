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
