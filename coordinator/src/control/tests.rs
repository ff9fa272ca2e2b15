//! What is recorded is decided the same again; what was changed is found where it was.

use super::record::Recorder;
use super::*;
use crate::journal::tests::spec;
use caravan_coordinator_core::{Core, Session};
use caravan_types::message::{Committed, Hello, PROTOCOL_VERSION, Report};
use caravan_types::progress::{EngineProgress, Stragglers, Wait};
use caravan_types::{Generation, SliceSet, Timing};
use std::fs;
use std::path::Path;

fn config() -> Config {
    let spec = spec();
    Config {
        shape: spec.model,
        batch: spec.batch,
        stages: None,
        steps: spec.recipe.steps,
        numerics: spec.numerics,
        recompute: false,
        redundancy: 2,
        workers: 2,
        timing: Timing::from_millis(1000),
        stragglers: Stragglers::Report,
    }
}

fn hello(session: u64) -> Input {
    let hello = Hello {
        protocol: PROTOCOL_VERSION,
        build: "test".into(),
        name: format!("session {session}"),
        host: "here".into(),
        fabric: format!("here:{session}"),
        families: vec!["portable".into()],
        threads: 1,
        memory: 0,
        speed: 1.0,
        resume: None,
    };
    Input::Hello { session: Session(session), hello }
}

fn says(worker: u64, message: FromWorker) -> Input {
    Input::Message { worker: WorkerId(worker), message }
}

fn reports(worker: u64, generation: u64) -> Input {
    let (state, weights) = (SliceSet::default(), SliceSet::default());
    let generation = Generation(generation);
    let report =
        Report { generation, applied: Step(0), verdict: None, state, weights, prepared: None, sums: vec![] };
    says(worker, FromWorker::Report(report))
}

/// Two workers join, commit a step with a loss that is no number, beat, and one goes.
fn inputs() -> Vec<Input> {
    let (generation, step) = (Generation(1), Step(1));
    let committed = Committed { generation, step, loss: f64::NAN, norm: 1.5, tokens: 9, took_ms: 3 };
    let engine = EngineProgress::default();
    let beat =
        FromWorker::Heartbeat { applied: Step(1), activity: Activity::Computing, wait: Wait::Engine, engine };
    vec![
        hello(1),
        hello(2),
        reports(1, 1),
        reports(2, 1),
        says(1, FromWorker::Committed(committed)),
        says(2, beat.clone()),
        says(1, beat),
        Input::Tick,
        Input::Closed { session: Session(2) },
        reports(1, 2),
    ]
}

/// A coordinator of the two workers, recorded in a file of at most so many bytes.
async fn record(path: &Path, most: u64) {
    let (config, restored) = (config(), Restored::default());
    let mut recorder = Recorder::with_bound(path, &config, &restored, most);
    let mut core = Core::new(config, restored, 0);
    let mut outputs = Vec::new();
    for (now, input) in (10..).step_by(10).zip(inputs()) {
        let told = recorder.told(now, &input);
        core.handle(now, input, &mut outputs);
        recorder.answered(told, &outputs);
        outputs.clear();
    }
    recorder.finish().await;
}

const AMPLE: u64 = 1 << 20;

fn lines(path: &Path) -> Vec<String> {
    fs::read_to_string(path).unwrap().split_inclusive('\n').map(str::to_owned).collect()
}

#[tokio::test]
async fn every_start_is_decided_the_same_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("control.jsonl");
    record(&path, AMPLE).await;
    record(&path, AMPLE).await;
    let starts = replay(&path).unwrap();
    let told = starts.iter().map(|s| (s.line, s.inputs, s.until, s.stop));
    assert_eq!(told.collect::<Vec<_>>(), [(1, 10, 100, Stop::End), (12, 10, 100, Stop::End)]);
    assert!(starts.iter().all(|s| s.difference.is_none()));
    assert_eq!((&starts[0].start.config, &starts[0].start.restored), (&config(), &Restored::default()));
    let beat = &lines(&path)[6];
    assert_eq!(
        beat,
        "{\"beat\":[60,2,1,\"Computing\",\"Engine\",{\"moved\":0,\"doing\":\"Nothing\",\"busy_ms\":0,\"work\":0},null]}\n",
        "most inputs are as short as this"
    );
}

#[tokio::test]
async fn what_was_changed_is_found_where_it_was_with_what_stands_around_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("control.jsonl");
    record(&path, AMPLE).await;
    let whole = lines(&path);
    // Line n is whole[n - 1]: line 5 is the report that leads to the plan.
    let with = |change: &dyn Fn(&mut Vec<String>)| {
        let mut lines = whole.clone();
        change(&mut lines);
        fs::write(&path, lines.concat()).unwrap();
        let replayed = replay(&path).unwrap().remove(0);
        *replayed.difference.unwrap()
    };

    let changed = with(&|l| l[2] = l[2].replace("here:2", "there:2"));
    assert_eq!(changed.at.line, 5, "where a worker listens matters once there is a plan");
    assert_eq!(changed.before.iter().map(|s| s.line).collect::<Vec<_>>(), [2, 3, 4]);
    assert_eq!(changed.after.iter().map(|s| s.line).collect::<Vec<_>>(), [6, 7, 8]);
    assert!(changed.digest.is_some() && changed.digest != changed.at.answered);
    assert!(changed.outputs.iter().any(|o| matches!(o, Output::Persist(Durable::Plan(_)))));

    let removed = with(&|l| drop(l.remove(9)));
    assert_eq!((removed.at.line, removed.digest), (10, None), "nobody asked for that report");
    assert!(removed.at.answered.is_some());

    let forged = with(&|l| l[7] = l[7].replace("null", &format!("\"{}\"", "0".repeat(64))));
    assert_eq!((forged.at.line, forged.digest), (8, None));
}

#[tokio::test]
async fn a_torn_record_ends_its_start_and_is_cut_off_at_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("control.jsonl");
    record(&path, AMPLE).await;
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() - 7]).unwrap();
    let starts = replay(&path).unwrap();
    assert_eq!((starts[0].inputs, starts[0].stop), (9, Stop::Torn));
    record(&path, AMPLE).await;
    let starts = replay(&path).unwrap();
    assert_eq!(
        starts.iter().map(|s| (s.inputs, s.stop)).collect::<Vec<_>>(),
        [(9, Stop::End), (10, Stop::End)]
    );
}

#[tokio::test]
async fn a_full_file_says_so_and_grows_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("control.jsonl");
    let most = 1500;
    record(&path, most).await;
    let whole = lines(&path);
    assert!(whole.last().unwrap().starts_with("{\"full\":"), "{whole:?}");
    assert!(whole[..whole.len() - 2].concat().len() < most as usize);
    let starts = replay(&path).unwrap();
    assert_eq!((starts[0].stop, starts[0].difference.is_none()), (Stop::Full, true));
    assert!((1..10).contains(&starts[0].inputs));
    record(&path, most).await;
    assert_eq!(lines(&path), whole);
}

#[tokio::test]
async fn a_disk_that_says_no_disturbs_nobody() {
    let dir = tempfile::tempdir().unwrap();
    record(&dir.path().join("no/such/folder"), AMPLE).await;
    record(dir.path(), AMPLE).await;
    // The device that is always full.
    record(Path::new("/dev/full"), AMPLE).await;
}

#[tokio::test]
async fn recordings_that_cannot_be_read_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("control.jsonl");
    assert!(replay(&path).unwrap_err().to_string().starts_with("there is no recording at "));
    record(&path, AMPLE).await;
    let whole = lines(&path);
    let with = |change: &dyn Fn(&mut Vec<String>)| {
        let mut lines = whole.clone();
        change(&mut lines);
        fs::write(&path, lines.concat()).unwrap();
        replay(&path).unwrap_err().to_string()
    };
    let error = with(&|l| l[0] = l[0].replace(&format!("\"version\":{FORMAT}"), "\"version\":9"));
    assert!(error.contains(&format!("is of format 9, this program reads {FORMAT}")), "{error}");
    let error = with(&|l| l[3] = "rubbish\n".into());
    assert!(error.contains("line 4 of the recording") && error.contains("not as it was written"), "{error}");
    let error = with(&|l| drop(l.remove(0)));
    assert!(error.contains("line 1 of the recording") && error.contains("no start before it"), "{error}");
}
