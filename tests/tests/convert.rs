//! Runs that start with weights of another run, by way of Hugging Face's and Meta's layouts.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails where it stands")]

use serde_json::Value;
use std::fs;
use tests::process::Place;

const STEPS: [&str; 4] = ["--steps", "12", "--set", "recipe.warmup_steps=4"];

/// The loss of the first step of a run.
fn first_loss(place: &Place, run: &str) -> f64 {
    let text = fs::read_to_string(place.dir.path().join(run).join("metrics.jsonl")).unwrap();
    let mut lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.find_map(|line| line["loss"].as_f64()).unwrap()
}

#[test]
fn a_run_goes_on_with_the_weights_of_another_by_way_of_any_layout_with_the_same_bits() {
    let place = Place::new();
    let trained = place.train("first", &STEPS).end().weights();
    for (source, destination, to) in [("first", "hf", "hf"), ("hf", "meta", "meta")] {
        let ended = place.run(&["convert", source, destination, "--to", to]);
        assert!(ended.status.success(), "{ended:?}");
    }
    let mut found = Vec::new();
    for (run, init, workers) in
        [("one", "init=hf", "1"), ("two", "init=hf", "2"), ("three", "init=meta", "3")]
    {
        let args = [&["--workers", workers, "--set", init][..], &STEPS].concat();
        let ended = place.train(run, &args).end();
        found.push(ended.weights());
        let spec = fs::read_to_string(place.dir.path().join(run).join("spec.json")).unwrap();
        let spec: Value = serde_json::from_str(&spec).unwrap();
        assert_eq!(
            spec["init"]["weights"]["digest"],
            trained.as_str(),
            "the hash that the first run ended with"
        );
        assert!(first_loss(&place, run) < first_loss(&place, "first") - 0.1);
    }
    assert!(found.iter().all(|weights| *weights == found[0] && *weights != trained), "{found:?}");

    let error = place.train("one", &["--set", "init=hf", "--set", "model.dim=32"]).end();
    assert!(error.error().contains("the model whose weights `init` names has 64 here"), "{error:?}");

    let path = place.dir.path().join("hf/model.safetensors");
    let mut weights = fs::read(&path).unwrap();
    let last = weights.len() - 3;
    weights[last] ^= 1;
    fs::write(&path, weights).unwrap();
    let error = place.train("one", &[&["--set", "init=hf"][..], &STEPS].concat()).end();
    assert!(error.error().contains("init.weights.digest: "), "{error:?}");
}
