//! Bad input to real processes: a clear error, and nothing is lost.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails where it stands")]

use std::fs;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use tests::process::{Place, Running, caravan, until};

/// What `train` says of its failure with these arguments.
fn refused(place: &Place, args: &[&str]) -> String {
    place.train("run", args).end().error().to_owned()
}

#[test]
fn data_that_cannot_be_trained_on_is_named_with_what_is_wrong() {
    let place = Place::new();
    let here = |name: &str| place.dir.path().join(name);
    fs::create_dir(here("empty")).unwrap();
    fs::write(here("latin1.txt"), b"caf\xe9 au lait").unwrap();
    fs::write(here("short.txt"), "too short").unwrap();
    fs::write(here("bad.jsonl"), "{\"text\": \"fine\"}\n{\"txet\": 1}\n").unwrap();
    for (path, said) in
        [("nowhere", "nowhere"), ("empty", "empty"), ("latin1.txt", "UTF-8"), ("bad.jsonl", "2")]
    {
        let error = refused(&place, &["--data", path]);
        assert!(error.contains(path) && error.contains(said), "{path}: {error}");
    }
    let error = refused(&place, &["--data", "short.txt"]);
    assert!(error.contains("one sequence needs 129"), "{error}");
}

#[test]
fn every_wrong_setting_of_a_file_is_told_at_once_with_what_would_be_right() {
    let place = Place::new();
    let sets =
        ["batch.lanes=6", "model.heads=7", "recipe.warmup_steps=900", "cluster.wrokers=2", "model.dim=\"x\""];
    let args: Vec<&str> = sets.iter().flat_map(|s| ["--set", *s]).collect();
    let error = refused(&place, &args);
    for said in
        ["batch.lanes", "power of two", "recipe.warmup_steps", "cluster.wrokers", "workers", "model.dim"]
    {
        assert!(error.contains(said), "{said}: {error}");
    }
    assert!(!place.dir.path().join("run").exists(), "nothing was started");
}

#[test]
fn a_shape_that_does_not_fit_into_memory_is_refused_before_anything_is_prepared_with_what_would_fit() {
    let place = Place::new();
    let sets = ["model.dim=16384", "model.layers=200", "model.heads=128", "model.hidden=53248"];
    let args: Vec<&str> = sets.iter().flat_map(|s| ["--set", *s]).collect();
    let error = refused(&place, &args);
    for said in
        ["does not fit into the memory of this machine", "the shape of model.preset", "caravan coordinator"]
    {
        assert!(error.contains(said), "{said}: {error}");
    }
    assert!(!place.dir.path().join("run").exists() && !place.dir.path().join(".caravan").exists());
}

#[test]
fn a_taken_port_is_named() {
    let place = Place::new();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let error = refused(&place, &["--set", &format!("cluster.listen=\"{address}\"")]);
    assert!(error.contains(&address) && error.contains("another process"), "{error}");
}

#[test]
fn a_run_folder_takes_one_process_and_one_run() {
    let place = Place::new();
    let first = place.train("run", &["--steps", "2000"]);
    place.reach("run", 1);
    let error = refused(&place, &["--steps", "2000"]);
    assert!(error.contains("run/store"), "{error}");
    first.signal("INT");
    let drained = first.end();
    assert!(drained.status.success(), "{drained:?}");
    let error = refused(&place, &["--steps", "300", "--set", "seed=8"]);
    assert!(error.contains("recipe.steps: 2000 there, 300 here") && error.contains("seed"), "{error}");
}

#[test]
fn a_damaged_checkpoint_is_refused_by_name_and_the_one_before_it_is_used() {
    let place = Place::new();
    let quiet = place.train("run", &[]).end().weights();
    let checkpoints = place.dir.path().join("run/checkpoints");
    let part = largest(&checkpoints.join("step-00000050"));
    let file = fs::OpenOptions::new().write(true).open(&part).unwrap();
    let middle = file.metadata().unwrap().len() / 2;
    file.write_all_at(b"rot", middle).unwrap();
    truncate(&largest(&checkpoints.join("step-00000040")));
    let ended = place.train("run", &[]).end();
    for said in [
        "checkpoint step-00000050 is damaged",
        "checkpoint step-00000040 is damaged",
        "going on from the checkpoint of step 30",
    ] {
        assert!(ended.stderr.contains(said), "{said}: {}", ended.stderr);
    }
    assert_eq!(ended.weights(), quiet);
}

fn largest(folder: &Path) -> PathBuf {
    let files = fs::read_dir(folder).unwrap().map(|f| f.unwrap().path());
    files.max_by_key(|f| f.metadata().unwrap().len()).unwrap()
}

fn truncate(file: &Path) {
    let file = fs::OpenOptions::new().write(true).open(file).unwrap();
    file.set_len(file.metadata().unwrap().len() - 1).unwrap();
}

/// `train` with a limit on the size of files: what a full disk says, without filling one.
fn train_on_a_small_disk(place: &Place, kib: u32) -> Running {
    let mut shell = Command::new("bash");
    let script =
        format!("trap '' XFSZ; ulimit -f {kib}; exec {} train run.toml --run run", caravan().display());
    shell.args(["-c", &script]).current_dir(place.dir.path());
    Running::start(shell)
}

#[test]
fn a_full_disk_stops_a_preparation_and_leaves_nothing_that_looks_finished() {
    let place = Place::new();
    let failed = train_on_a_small_disk(&place, 64).end();
    assert!(failed.error().contains("too large") && failed.error().contains(".caravan/data"), "{failed:?}");
    assert!(place.train("run", &["--steps", "6"]).end().status.success());
}

#[test]
fn a_full_disk_fails_the_checkpoint_and_not_the_ones_before_it() {
    let place = Place::new();
    let quiet = place.train("quiet", &[]).end().weights();
    let first = place.train("run", &[]);
    place.save("run", 10);
    first.signal("INT");
    assert!(first.end().status.success());
    let failed = train_on_a_small_disk(&place, 512).end();
    assert!(
        failed.error().contains("could not be written") && failed.error().contains("too large"),
        "{failed:?}"
    );
    assert_eq!(place.train("run", &[]).end().weights(), quiet);
}

#[test]
fn garbage_at_every_port_disturbs_nobody() {
    let place = Place::new();
    let quiet = place.train("quiet", &[]).end().weights();
    let train = place.train("run", &[]);
    place.reach("run", 5);
    let log = || fs::read_to_string(place.dir.path().join("run/logs/worker-1.log")).ok();
    let fabric = until("a fabric's port", || {
        log()?.split("fabric=").nth(1)?.split_whitespace().next().map(str::to_owned)
    });
    let noise: Vec<u8> = (0..100_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    for port in [place.address("run").unwrap(), fabric] {
        for bytes in [&noise[..], &noise[..7], &[0; 4096][..], b"GET / HTTP/1.1\r\n\r\n", b""] {
            // The other end may hang up in the middle, as it should.
            TcpStream::connect(&port).unwrap().write_all(bytes).ok();
        }
    }
    let ended = train.end();
    assert_eq!(ended.weights(), quiet);
    assert!(!ended.stderr.contains("is gone"), "{}", ended.stderr);
}

#[test]
fn a_worker_without_a_coordinator_says_where_it_looked() {
    let place = Place::new();
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let ended = place.run(&["worker", "--join", &nobody]);
    assert!(ended.error().contains(&nobody), "{ended:?}");
    let error = place.run(&["worker", "--join", "not an address"]);
    assert!(error.error().contains("not an address"), "{error:?}");
}
