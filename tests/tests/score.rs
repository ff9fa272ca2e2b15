//! `caravan score` as a user starts it, on a run that was trained.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails where it stands")]

use serde_json::Value;
use std::fs::{self, File};
use tests::process::{Ended, Place, Running};

/// `score` with the file `in.jsonl` on its standard input.
fn score(place: &Place, args: &[&str]) -> Ended {
    let mut command = place.command(&[&["score", "--checkpoint", "run"], args].concat());
    command.stdin(File::open(place.dir.path().join("in.jsonl")).unwrap());
    Running::start(command).end()
}

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_trained_run_scores_what_it_was_trained_on_above_noise_and_the_same_on_any_number_of_threads() {
    let place = Place::new();
    assert!(place.train("run", &[]).end().status.success());
    let text = "{\"text\": \"caravan moves on the\", \"continuation\": \" weights come out\"}\n";
    let noise = "{\"text\": \"caravan moves on the\", \"continuation\": \" zq{;jx\"}\n";
    let many: String = (1..200).map(|n| format!("{{\"tokens\": {:?}}}\n", vec![n; n % 97 + 1])).collect();
    fs::write(place.dir.path().join("in.jsonl"), format!("{text}{noise}{many}")).unwrap();

    let ended = score(&place, &[]);
    assert!(ended.status.success(), "{ended:?}");
    let scores = lines(&ended.stdout);
    assert_eq!(scores.len(), 201);
    for (n, line) in (1..200).zip(&scores[2..]) {
        assert_eq!(line["tokens"], Value::from(vec![n; n % 97 + 1]), "output is in the order of the input");
    }
    let per_token = |line: &Value| {
        let counted = line["tokens"].as_array().unwrap().len() as f64 - line["from"].as_f64().unwrap();
        line["sum"].as_f64().unwrap() / counted
    };
    let (text, noise) = (per_token(&scores[0]), per_token(&scores[1]));
    assert!(text > noise + 1.0, "{text} {noise}");
    assert!(ended.stderr.contains("scored 201 lines, ") && ended.stderr.contains("perplexity"), "{ended:?}");

    let one = score(&place, &["--threads", "1"]);
    assert!(one.stdout == ended.stdout, "the number of threads changes bits");
    let to_file = score(&place, &["--input", "in.jsonl", "--output", "out.jsonl", "--threads", "3"]);
    assert!(to_file.status.success() && to_file.stdout.is_empty(), "{to_file:?}");
    assert_eq!(fs::read_to_string(place.dir.path().join("out.jsonl")).unwrap(), ended.stdout);

    fs::write(place.dir.path().join("in.jsonl"), "{\"tokens\": [1, 2]}\n{\"tokens\": [1, 320]}\n").unwrap();
    let failed = score(&place, &[]);
    assert_eq!(lines(&failed.stdout).len(), 1);
    let error = failed.error();
    assert!(error.contains("error: standard input, line 2: token 320 at position 1"), "{error}");
}
