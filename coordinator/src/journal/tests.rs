//! What the journal keeps, counts and writes.

use super::*;
use caravan_types::{BatchShape, DataSpec, Digest, ModelShape, NumericsClass, Precision, Recipe};
use serde_json::Value;
use std::time::Duration;

pub(crate) fn spec() -> RunSpec {
    RunSpec {
        version: caravan_types::run_spec::RUN_SPEC_VERSION,
        name: "demo".into(),
        model: ModelShape::preset("260k").unwrap(),
        data: DataSpec { digest: Digest::default(), tokens: 1 << 20 },
        batch: BatchShape { lanes: 4, micro_batches: 1, sequences: 2, sequence_length: 128 },
        recipe: Recipe { steps: 100, warmup_steps: 10, ..Recipe::default() },
        init: caravan_types::Initial::Seed,
        seed: 1,
        numerics: NumericsClass { precision: Precision::Fp32, family: "portable".into() },
    }
}

fn committed(generation: u64, step: u64) -> Committed {
    Committed {
        generation: Generation(generation),
        step: Step(step),
        loss: 5.0,
        norm: 1.5,
        tokens: 100,
        took_ms: 500,
    }
}

fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().filter(|l| !l.is_empty()).map(|l| serde_json::from_str(l).unwrap()).collect()
}

#[tokio::test]
async fn commits_and_events_are_in_the_file_the_history_and_the_feed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run/metrics.jsonl");
    let journal = start(&path, &spec(), Step(0)).unwrap();
    let mut feed = journal.feed();
    let at = Instant::now();
    journal.committed(committed(1, 1), (2, None), at).await;
    // At this peak the model's own FLOPs take an eighth of the half second.
    let peak = Some(spec().model.train_flops_per_token(128) * 1024.0 * 16.0);
    journal.committed(committed(1, 2), (2, peak), at + Duration::from_millis(250)).await;
    journal.happened(Event::CheckpointWritten { step: Step(2) }, Step(2)).await;
    journal.view(View { phase: Phase::Running, step: Step(2), ..View::default() }).await;
    journal.flush().await;

    let steps = journal.steps(Step(0)).await;
    assert_eq!(steps.len(), 2);
    assert_eq!(
        steps[0].tokens_per_second, 2048.0,
        "1,024 tokens in the half second that the member measured"
    );
    assert_eq!(steps[1].tokens_per_second, 2048.0, "however soon after the first it was heard of");
    assert_eq!(steps[1].learning_rate, spec().recipe.learning_rate_at(Step(2)));
    assert_eq!(journal.events(0).await.len(), 1);
    let snapshot = journal.snapshot();
    assert_eq!((snapshot.step, snapshot.steps, snapshot.last), (Step(2), 100, Some(steps[1])));
    assert_eq!(snapshot.eta_seconds, Some(98.0 * 0.5));

    let lines = lines(&path);
    let kinds: Vec<_> = lines.iter().map(|l| l["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["step", "step", "checkpoint_written"]);
    assert_eq!(lines[1]["step"], 2);
    assert_eq!((steps[0].mfu, steps[1].mfu), (None, Some(0.125)));
    assert_eq!((lines[0].get("mfu"), lines[1]["mfu"].as_f64()), (None, Some(0.125)));
    assert!(matches!(feed.recv().await, Ok(Update::Step(m)) if m.step == Step(1)));
    assert!(journal.scrape().await.unwrap().contains("caravan_step{run=\"demo\"} 2"));
}

#[tokio::test]
async fn steps_that_are_too_fast_for_the_clock_of_members_are_measured_by_when_they_are_heard_of() {
    let dir = tempfile::tempdir().unwrap();
    let journal = start(&dir.path().join("metrics.jsonl"), &spec(), Step(0)).unwrap();
    let at = Instant::now();
    let fast = |step, took_ms| Committed { took_ms, ..committed(1, step) };
    journal.committed(fast(1, 1), (2, None), at).await;
    journal.committed(fast(2, 1), (2, None), at + Duration::from_micros(1250)).await;
    journal.committed(fast(3, 2), (2, None), at + Duration::from_micros(1250)).await;
    let rates: Vec<f64> = journal.steps(Step(0)).await.iter().map(|m| m.tokens_per_second).collect();
    assert_eq!(rates, [1024.0 / 0.001, 1024.0 / 0.001_25, 1024.0 / 0.002]);
}

#[tokio::test]
async fn a_resumed_run_continues_the_file_and_shows_what_counts() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics.jsonl");
    let journal = start(&path, &spec(), Step(0)).unwrap();
    for step in 1..=5 {
        journal.committed(committed(1, step), (2, None), Instant::now()).await;
    }
    journal.happened(Event::Draining, Step(5)).await;
    journal.flush().await;
    // A crash in the middle of a line.
    let mut text = std::fs::read(&path).unwrap();
    text.extend(b"{\"kind\":\"st");
    std::fs::write(&path, text).unwrap();

    let journal = start(&path, &spec(), Step(3)).unwrap();
    assert_eq!(journal.steps(Step(0)).await.len(), 3, "steps 4 and 5 will be done again");
    journal.committed(committed(2, 4), (1, None), Instant::now()).await;
    journal.happened(Event::Draining, Step(4)).await;
    journal.flush().await;
    let events: Vec<u64> = journal.events(0).await.iter().map(|e| e.number).collect();
    assert_eq!(events, [0, 1]);
    let text = std::fs::read_to_string(&path).unwrap();
    let fours = text.lines().filter(|l| l.contains("\"kind\":\"step\",\"step\":4,")).count();
    assert_eq!(fours, 2, "both times are in the file:\n{text}");
}

#[tokio::test]
async fn a_rollback_takes_undone_steps_off_the_curve_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let journal = start(&dir.path().join("m"), &spec(), Step(0)).unwrap();
    for step in 1..=5 {
        journal.committed(committed(1, step), (2, None), Instant::now()).await;
    }
    journal.happened(Event::RolledBack { from: Step(5), to: Step(2) }, Step(5)).await;
    assert_eq!(journal.steps(Step(0)).await.len(), 2);
}

#[tokio::test]
async fn a_full_disk_does_not_stop_the_journal() {
    let dir = tempfile::tempdir().unwrap();
    let link = dir.path().join("metrics.jsonl");
    std::os::unix::fs::symlink("/dev/full", &link).unwrap();
    let journal = start(&link, &spec(), Step(0)).unwrap();
    for step in 1..=3 {
        journal.committed(committed(1, step), (2, None), Instant::now()).await;
        journal.flush().await;
    }
    assert_eq!(journal.steps(Step(0)).await.len(), 3);
}

#[tokio::test]
async fn a_file_that_cannot_be_opened_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    assert!(start(dir.path(), &spec(), Step(0)).is_err());
}
