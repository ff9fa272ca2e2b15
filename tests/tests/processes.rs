//! The main job in real processes: whatever is killed, the weights have the same bits.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails where it stands")]

use tests::process::{Place, Running, kill, until};

#[test]
fn fifty_steps_have_the_same_bits_on_one_two_three_workers_and_when_one_dies_and_others_join() {
    let place = Place::new();
    let quiet = place.train("one", &["--workers", "1"]).end().weights();
    for workers in ["2", "3"] {
        assert_eq!(place.train(workers, &["--workers", workers]).end().weights(), quiet, "{workers} workers");
    }

    let mut train = place.train("chaos", &["--workers", "3"]);
    place.reach("chaos", 8);
    let mfu = place.get("chaos", "/api/snapshot")["last"]["mfu"].as_f64();
    assert!(mfu.is_some_and(|share| share > 0.0 && share < 1.5), "{mfu:?} of what the machine can do");
    let victim = train.children()[1];
    kill(victim, "KILL");
    train.wait_for("starting it again");
    let joined = Running::start(place.command(&["worker", "--join", &place.address("chaos").unwrap()]));
    train.wait_for("with 4 workers");
    let ended = train.end();
    assert_eq!(ended.weights(), quiet, "{}", ended.stderr);
    assert!(ended.stderr.contains(" tokens/s  mfu "), "{}", ended.stderr);
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
fn one_to_four_pipelines_of_one_to_four_stages_have_the_same_bits() {
    let place = Place::new();
    let steps = ["--steps", "12", "--set", "recipe.warmup_steps=4"];
    let run = |pipelines: u32, stages: u32| {
        let (workers, set) = ((pipelines * stages).to_string(), format!("cluster.stages={stages}"));
        let args = [&["--workers", &workers, "--set", &set][..], &steps].concat();
        place.train(&format!("{pipelines}x{stages}"), &args).end()
    };
    let quiet = run(1, 1).weights();
    for (pipelines, stages) in (1..=4).flat_map(|p| (1..=4).map(move |s| (p, s))).skip(1) {
        let ended = run(pipelines, stages);
        assert_eq!(ended.weights(), quiet, "{pipelines} pipelines of {stages} stages: {}", ended.stderr);
    }
}

#[test]
fn mixed_precision_has_the_same_bits_in_pipelines_that_recompute_and_when_a_worker_dies() {
    let place = Place::new();
    let train = |run: &str, args: &[&str]| place.train(run, &[&["--set", "precision=mixed"], args].concat());
    let quiet = train("one", &["--workers", "1"]).end().weights();
    let pipelines = ["--workers", "4", "--set", "cluster.stages=2", "--set", "recompute=true"];
    let pipelines = train("pipelines", &pipelines).end();
    assert_eq!(pipelines.weights(), quiet, "{}", pipelines.stderr);

    let mut killed = train("killed", &["--workers", "3"]);
    place.reach("killed", 8);
    kill(killed.children()[1], "KILL");
    killed.wait_for("starting it again");
    let killed = killed.end();
    assert_eq!(killed.weights(), quiet, "{}", killed.stderr);
    let fp32 = place.train("fp32", &["--workers", "1"]).end().weights();
    assert_ne!(fp32, quiet, "another numerics class");
    let text = place.run(&["generate", "--checkpoint", "killed", "--prompt", "a", "--max-tokens", "3"]);
    assert!(text.status.success() && text.stdout.starts_with('a'), "{text:?}");
}

#[test]
fn a_machine_without_tiles_computes_what_they_would_with_the_same_bits_when_a_worker_dies() {
    let place = Place::new();
    let config = |set: &str| place.run(&["config", "run.toml", "--set", "precision=mixed", "--set", set]);
    let amx = config("kernels=amx-bf16");
    if !amx.status.success() {
        // Without AVX-512 there are no vectors that could.
        assert!(amx.error().contains("what this machine has"), "{amx:?}");
        return;
    }
    if config("kernels=auto").stdout.contains("amx-bf16 on this machine") {
        // With tiles this is what mixed precision takes, and too fast for anybody to die in it.
        return;
    }
    // Some thirty times as slow as the fastest family: twelve steps of 256 tokens are enough.
    let small = ["--steps", "12", "--set", "recipe.warmup_steps=4", "--set", "batch.sequence_length=32"];
    let train = |run: &str, workers: &str, kernels: &str| {
        let args = ["--set", "precision=mixed", "--set", kernels, "--workers", workers];
        place.train(run, &[&args[..], &small].concat())
    };
    let quiet = train("one", "1", "kernels=amx-bf16").end().weights();
    let mut killed = train("killed", "2", "kernels=amx-bf16");
    place.reach("killed", 3);
    kill(killed.children()[1], "KILL");
    killed.wait_for("starting it again");
    let killed = killed.end();
    assert_eq!(killed.weights(), quiet, "{}", killed.stderr);
    let fastest = train("fastest", "1", "kernels=auto").end().weights();
    assert_ne!(fastest, quiet, "another numerics class");
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
    // What changes no bits may be changed here.
    let ended = place.train("killed", &["--set", "recompute=true"]).end();
    assert!(ended.stderr.contains("going on from the checkpoint of step"), "{}", ended.stderr);
    assert_eq!(ended.weights(), quiet);
}

#[test]
fn workers_go_on_while_their_coordinator_is_dead_and_a_new_one_takes_them_back_and_changes_nothing() {
    let place = Place::new();
    let set = ["--set", "recipe.steps=400", "--set", "cluster.checkpoint_every=20"];
    let quiet = place.train("quiet", &set).end().weights();
    let listen = format!("cluster.listen=\"{}\"", free_address());
    let start = || coordinator(&place, &listen, &set);
    let (mut first, workers) = (start(), three_workers(&place));
    // Whoever is to be missed must have been a member.
    first.wait_for("with 3 workers");
    place.reach("run", 20);
    first.signal("KILL");
    drop(first);
    let died_at = last_step(&place);
    // They go on without anybody who could tell, but for what they save.
    until("a part of a checkpoint of a later step", || saved(&place).filter(|step| *step > died_at + 3));

    let mut second = start();
    second.wait_for("all members are there");
    // What they did meanwhile is told at once, and shown together.
    let told = until("what was done without a coordinator", || {
        place.get("run", "/api/snapshot")["step"].as_u64().filter(|step| *step > died_at)
    });
    assert!(told > died_at + 3, "{died_at} {told}");
    let ended = second.end();
    assert!(ended.status.success(), "{ended:?}");
    assert!(!ended.stderr.contains("stopping"), "a new generation: {}", ended.stderr);
    workers.into_iter().for_each(|w| assert!(w.end().status.success()));
    assert_eq!(place.train("run", &set).end().weights(), quiet);
    sound(&place);
}

#[test]
fn a_coordinator_and_a_worker_that_die_together_cost_one_regrouping_and_no_step() {
    let place = Place::new();
    let set = ["--set", "recipe.steps=400", "--set", "cluster.checkpoint_every=0"];
    let quiet = place.train("quiet", &set).end().weights();
    let listen = format!("cluster.listen=\"{}\"", free_address());
    let start = || coordinator(&place, &listen, &set);
    let (mut first, mut workers) = (start(), three_workers(&place));
    // Whoever is to be missed must have been a member.
    first.wait_for("with 3 workers");
    place.reach("run", 20);
    first.signal("KILL");
    workers[1].signal("KILL");
    drop((first, workers.remove(1)));
    let mut second = start();
    second.wait_for("did not come back");
    second.wait_for("with 2 workers");
    let ended = second.end();
    assert_eq!(ended.stderr.matches("stopping at once").count(), 1, "{}", ended.stderr);
    assert!(!ended.stderr.contains("goes back"), "{}", ended.stderr);
    workers.into_iter().for_each(|w| assert!(w.end().status.success()));
    assert_eq!(place.train("run", &set).end().weights(), quiet);
    sound(&place);
}

#[test]
fn a_coordinator_that_is_started_on_a_finished_run_tells_its_workers_so_and_they_end_well() {
    let place = Place::new();
    let set = ["--set", "recipe.steps=400", "--set", "cluster.checkpoint_every=0"];
    assert!(place.train("quiet", &set).end().status.success());
    let listen = format!("cluster.listen=\"{}\"", free_address());
    let start = || coordinator(&place, &listen, &set);
    let (mut first, workers) = (start(), three_workers(&place));
    first.wait_for("with 3 workers");
    place.reach("run", 20);
    first.signal("KILL");
    drop(first);
    // As if it had died right after it completed the last checkpoint.
    let last = "checkpoints/step-00000400";
    std::fs::create_dir_all(place.dir.path().join("run").join(last)).unwrap();
    for file in std::fs::read_dir(place.dir.path().join("quiet").join(last)).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), place.dir.path().join("run").join(last).join(file.file_name())).unwrap();
    }
    std::fs::copy(place.dir.path().join("quiet/ledger.jsonl"), place.dir.path().join("run/ledger.jsonl"))
        .unwrap();

    let mut second = start();
    second.wait_for("this run is finished already");
    for worker in workers {
        let ended = worker.end();
        assert!(ended.status.success() && ended.stderr.contains("the run is finished"), "{ended:?}");
    }
    assert!(second.end().status.success());

    // Nobody is known to look for it any more, and it ends all the same.
    let mut third = start();
    third.wait_for("this run is finished already");
    let late = place.run(&["worker", "--join", &place.address("run").unwrap()]);
    assert!(late.status.success() && late.stderr.contains("the run is finished"), "{late:?}");
    assert!(third.end().status.success());
}

/// A coordinator alone, at an address where its workers find it again.
fn coordinator(place: &Place, listen: &str, set: &[&str]) -> Running {
    let all = [&["coordinator", "run.toml", "--run", "run", "--set", listen][..], set].concat();
    Running::start(place.command(&all))
}

/// Workers that nobody starts again.
fn three_workers(place: &Place) -> Vec<Running> {
    let address = until("the coordinator's address", || place.address("run"));
    (0..3).map(|_| Running::start(place.command(&["worker", "--join", &address]))).collect()
}

/// Of a run with two starts: its history holds, though nobody wrote it while there was no
/// coordinator, and both decide the same again.
fn sound(place: &Place) {
    let audit = place.run(&["audit", "run"]);
    assert!(audit.status.success(), "{audit:?}");
    assert!(audit.stdout.contains("steps 1 to 400, each once\n"), "{audit:?}");
    let replay = place.run(&["replay", "run"]);
    assert!(replay.status.success(), "{replay:?}");
    assert_eq!(replay.stdout.matches("were decided the same").count(), 2, "{replay:?}");
}

/// A loopback address that nobody listens on.
fn free_address() -> String {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

/// The newest step that a part of a checkpoint is written of.
fn saved(place: &Place) -> Option<u64> {
    let folders = std::fs::read_dir(place.dir.path().join("run/checkpoints")).ok()?;
    let names = folders.filter_map(|folder| folder.ok()?.file_name().into_string().ok());
    names.filter_map(|name| name.strip_prefix("step-")?.split('.').next()?.parse().ok()).max()
}

/// The last step in a run's metrics file.
fn last_step(place: &Place) -> u64 {
    let text = std::fs::read_to_string(place.dir.path().join("run/metrics.jsonl")).unwrap();
    let lines = text.lines().filter_map(|l| serde_json::from_str::<serde_json::Value>(l).ok());
    lines.filter_map(|v| v["step"].as_u64()).next_back().unwrap()
}

#[test]
fn a_checkpoint_that_is_damaged_after_it_was_chosen_is_passed_over_and_without_another_one_the_run_ends() {
    let place = Place::new();
    let set = ["--set", "recipe.steps=150"];
    let quiet = place.train("quiet", &set).end().weights();
    drained(&place, &set);
    let mut coordinating = coordinator(&place, "cluster.listen=\"127.0.0.1:0\"", &set);
    coordinating.wait_for("workers join with");
    std::fs::write(newest_checkpoint(&place).join("part-w1.safetensors"), "rot").unwrap();
    let workers = three_workers(&place);
    coordinating.wait_for("cannot load the checkpoint of step");
    coordinating.wait_for("the run goes back from step");
    assert!(coordinating.end().status.success());
    workers.into_iter().for_each(|worker| assert!(worker.end().status.success()));
    assert_eq!(place.train("run", &set).end().weights(), quiet);

    let place = Place::new();
    // The first plan waits for all three workers: one that comes when the coordinator has ended
    // would find nobody who tells it why.
    let all = ["--set", "cluster.workers=3", "--set", "cluster.detect=\"10s\""];
    let set = [&["--set", "recipe.steps=150", "--set", "cluster.checkpoint_every=0"][..], &all].concat();
    drained(&place, &set);
    let mut coordinating = coordinator(&place, "cluster.listen=\"127.0.0.1:0\"", &set);
    coordinating.wait_for("workers join with");
    std::fs::remove_dir_all(newest_checkpoint(&place)).unwrap();
    let workers = three_workers(&place);
    let ended = coordinating.end();
    assert!(ended.error().contains("and there is no other one that is intact"), "{ended:?}");
    for worker in workers {
        let ended = worker.end();
        assert!(ended.error().contains("the run cannot go on"), "{ended:?}");
    }
}

/// A run that was stopped in the middle, with a checkpoint.
fn drained(place: &Place, set: &[&str]) {
    let train = place.train("run", set);
    place.reach("run", 21);
    train.signal("INT");
    let ended = train.end();
    assert!(ended.stderr.contains("stopped at step"), "{ended:?}");
}

fn newest_checkpoint(place: &Place) -> std::path::PathBuf {
    let folders = std::fs::read_dir(place.dir.path().join("run/checkpoints")).unwrap();
    folders.map(|folder| folder.unwrap().path()).max().unwrap()
}

#[test]
fn an_audit_proves_a_run_that_went_back_and_finds_what_was_done_to_its_ledger() {
    let place = Place::new();
    let train = place.train("run", &[]);
    place.save("run", 10);
    // Further than the checkpoint, so that there is something to go back from; and long enough
    // for the recording, which is written once a second, to have begun.
    place.reach("run", 12);
    let control = place.dir.path().join("run/control.jsonl");
    until("the recording", || std::fs::metadata(&control).ok().filter(|m| m.len() > 0));
    let workers = train.children();
    train.signal("KILL");
    workers.iter().for_each(|w| kill(*w, "KILL"));
    drop(train);
    // It may have been killed right at a later one.
    while newest_checkpoint(&place) != place.dir.path().join("run/checkpoints/step-00000010") {
        std::fs::remove_dir_all(newest_checkpoint(&place)).unwrap();
    }
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
