//! Every setting that cannot work, with what it is told, and what the rest becomes.

use super::problem::Fault;
use super::{ConfigError, Kernels, Override, Settings, parse};
use caravan_types::{DataSpec, Digest, Initial, ModelShape, Recipe, Timing};
use std::path::{Path, PathBuf};
use std::time::Duration;

const GOOD: &str = r#"
[model]
dim = 64
layers = 2
heads = 4
vocab = 512
[data]
paths = ["texts"]
[batch]
lanes = 4
sequence_length = 32
[recipe]
steps = 1000
"#;

fn load(text: &str, sets: &[&str]) -> Result<Settings, ConfigError> {
    let overrides: Vec<_> = sets.iter().map(|s| Override::set(s)).collect();
    parse(Path::new("dir/tiny.toml"), text, &overrides)
}

fn good(sets: &[&str]) -> Settings {
    load(GOOD, sets).unwrap_or_else(|e| panic!("{e}"))
}

/// The problems as lines.
fn problems(text: &str, sets: &[&str]) -> Vec<String> {
    match load(text, sets) {
        Err(ConfigError::Problems { problems, .. }) => problems.iter().map(ToString::to_string).collect(),
        other => panic!("{other:?}"),
    }
}

/// The one problem that a setting causes in an otherwise good file.
fn problem(set: &str) -> String {
    let found = problems(GOOD, &[set]);
    assert_eq!(found.len(), 1, "{found:?}");
    found[0].clone()
}

#[test]
fn few_settings_are_enough_and_the_rest_is_the_papers() {
    let s = good(&[]);
    assert_eq!((s.name.as_str(), s.seed), ("tiny", 0));
    assert_eq!((s.model.kv_heads, s.model.hidden, s.model.context), (4, 256, 32));
    let paper = Recipe::default();
    assert_eq!(s.recipe, Recipe { steps: 1000, warmup_steps: 100, ..paper });
    assert_eq!((s.batch.lanes, s.batch.micro_batches, s.batch.sequences), (4, 1, 1));
    assert_eq!(s.data.paths, [PathBuf::from("dir/texts")]);
    assert_eq!((s.cluster.workers, s.cluster.redundancy, s.cluster.timing), (2, 2, Timing::default()));
    assert_eq!((s.recompute, s.kernels, s.notes), (false, Kernels::Auto, vec![]));
}

#[test]
fn presets_are_taken_whole_or_changed_key_by_key() {
    let preset = |changes: &str| {
        let text = format!(
            "[model]\npreset = \"7b\"\n{changes}\n[data]\npaths = [\"x\"]\n[recipe]\nsteps = 20000\n[cluster]\nthreads = 1"
        );
        load(&text, &[]).unwrap_or_else(|e| panic!("{e}"))
    };
    let s = preset("");
    assert_eq!(Some(s.model), ModelShape::preset("7b"));
    assert_eq!((s.batch.sequence_length, s.recipe.warmup_steps, s.recipe.learning_rate), (4096, 2000, 3e-4));
    assert_eq!(preset("layers = 2").model.hidden, 11008);
    assert_eq!(
        preset("dim = 5120\nheads = 40").model,
        ModelShape { layers: 32, ..ModelShape::preset("13b").unwrap() }
    );
    let text = "[model]\npreset = \"70b\"\n[data]\npaths = \"x\"\n[recipe]\nsteps = 1";
    assert_eq!(load(text, &[]).unwrap().recipe.learning_rate, 1.5e-4);
}

#[test]
fn overrides_win_and_are_named_in_errors() {
    let s =
        good(&["recipe.steps=7", "name=other", "model={preset=\"15m\"}", "model.dim = 288", "model.heads=6"]);
    assert_eq!((s.recipe.steps, s.name.as_str(), s.model.dim), (7, "other", 288));
    let flag = [Override::new("--workers", "cluster.workers", 0)];
    let Err(ConfigError::Problems { problems, .. }) = parse(Path::new("x.toml"), GOOD, &flag) else {
        panic!()
    };
    assert_eq!(problems[0].to_string(), "cluster.workers = 0 (from --workers): must be from 1 to 4096");
    assert!(
        problem("recipe.steps=many").starts_with("recipe.steps = \"many\" (from --set): must be a whole")
    );
    assert!(problem("recipe.steps").contains("must be key=value"));
    assert!(problem("a..b=1").contains("must be key=value"));
    let here =
        parse(Path::new("dir/x.toml"), GOOD, &[Override::set("data.paths=cargo:a/Cargo.lock")]).unwrap();
    assert_eq!(here.data.paths, [PathBuf::from("cargo:a/Cargo.lock")], "from the current folder");
    let text = GOOD.replace("texts", "cargo:../Cargo.lock");
    assert_eq!(load(&text, &[]).unwrap().data.paths, [PathBuf::from("cargo:dir/../Cargo.lock")]);
}

#[test]
fn a_value_with_a_line_break_sets_one_key_only() {
    let found = problems(GOOD, &["seed=1\n[recipe]\nsteps=3"]);
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].starts_with("seed = "), "{found:?}");
}

#[test]
fn recomputation_is_on_or_off_and_no_part_of_the_run_spec() {
    assert!(problem("recompute=layers").contains("must be true or false"));
    let data = DataSpec { digest: Digest::default(), tokens: 1 };
    let [without, with] = ["recompute=false", "recompute=true"].map(|set| good(&[set]));
    assert!(with.recompute && !without.recompute);
    let spec = |s: &Settings| s.spec(Initial::Seed, data.clone(), "portable");
    assert_eq!(spec(&with), spec(&without));
}

#[test]
fn every_value_that_cannot_work_is_told_with_one_that_would() {
    for (set, expected) in [
        ("batch.lanes=6", "must be a power of two, such as 4 or 8"),
        ("batch.lanes=0", "must be from 1 to 4096"),
        ("batch.size=10", "must be a multiple of batch.lanes × batch.sequences = 4 × 1 = 4: 8 or 12"),
        ("batch.size=3", "= 4: 4, for example"),
        ("batch.sequence_length=0", "must be from 1"),
        ("model.heads=5", "5 heads cannot share model.dim = 64 evenly; 4 or 8 would"),
        (
            "model.heads=64",
            "a head would have 1 dimensions, and rotary positions need an even number; 32 heads would do",
        ),
        ("model.kv_heads=3", "4 query heads cannot share 3 key and value heads evenly; 2 or 4 would"),
        ("model.context=16", "is longer than model.context = 16"),
        ("model.rope_scaling={type=\"yarn\"}", "must be one of \"linear\", \"llama3\""),
        ("model.rope_scaling.factor=8", "is missing: how the frequencies are scaled"),
        (
            "model.rope_scaling={type=\"llama3\",low_freq_factor=5}",
            "low_freq_factor must be above 0 and high_freq_factor above that",
        ),
        ("model.preset=8b", "must be one of \"260k\", \"15m\""),
        ("model.vocab=100", "must be from 260"),
        ("model.dim=-5", "must be from 2"),
        ("model.dim=6.5", "must be a whole number"),
        ("recipe.warmup_steps=1000", "must be less than recipe.steps = 1000"),
        ("recipe.final_ratio=1.5", "must be from 0 to 1"),
        ("recipe.learning_rate=nan", "must be from 0.000000001 to 10"),
        ("recipe.beta2=1", "must be from 0 to"),
        ("recipe.learning_rate=fast", "must be a number"),
        ("cluster.workers=0", "must be from 1"),
        ("cluster.redundancy=0", "must be from 1"),
        ("cluster.stages=1000", "the model's layers with its embedding and its head"),
        ("cluster.keep=0", "must be from 1"),
        ("cluster.detect=10ms", "must be from 100ms to 600s"),
        ("cluster.detect=20m", "must be from 100ms to 600s"),
        ("cluster.detect=3", "must be a time with its unit, such as \"3s\""),
        ("cluster.detect=-3s", "must be a time with its unit"),
        ("cluster.stragglers=kill", "must be one of \"report\", \"rebalance\""),
        (
            "cluster.heartbeat=2s",
            "two heartbeats (4s) must not be longer than silence (2.85s): one heartbeat may be late",
        ),
        ("cluster.heartbeat=2s", "with cluster.detect = \"3s\" it may be from 1ms to 1.425s"),
        ("cluster.heartbeat=soon", "must be a time with its unit"),
        (
            "cluster.reattach=500ms",
            "two retries (1s) must not be longer than reattach (500ms): members try at least",
        ),
        ("cluster.reattach=1000s", "with cluster.detect = \"3s\" it may be from 1s to 600s"),
        (
            "cluster.listen=localhost",
            "must be an address of this machine with a port, such as \"127.0.0.1:7070\"",
        ),
        ("data.paths=[]", "needs folders, files or \"cargo:LOCKFILE\""),
        ("data.paths=[1]", "must be a list of texts"),
        ("data.include=[]", "needs extensions"),
        ("precision=bf16", "must be one of \"fp32\", \"mixed\""),
        ("kernels=cuda", "what this machine has: "),
        ("name=../x", "a folder is named after it"),
        ("name=7", "must be a text in quotes"),
        ("seed=-1", "must be from 0"),
        ("batch=3", "is a table, with the keys sequence_length, lanes"),
        ("batch.lane=4", "there is no such setting; did you mean batch.lanes?"),
        ("lanes=4", "did you mean batch.lanes?"),
        ("cluster.warmup=4", "did you mean recipe.warmup_steps?"),
        ("xyzzy=4", "there is no such setting"),
        ("\"batch.lanes\"=4", "there is no such setting"),
    ] {
        let told = problem(set);
        assert!(told.contains(expected), "{set}: {told}");
    }
}

#[test]
fn times_may_be_set_within_what_the_failure_budget_allows() {
    let timing = good(&["cluster.detect=10s", "cluster.heartbeat=4s", "cluster.reattach=1m"]).cluster.timing;
    assert_eq!(timing.detect(), Duration::from_secs(10));
    assert_eq!((timing.heartbeat(), timing.reattach()), (Duration::from_secs(4), Duration::from_secs(60)));
    let found = problems(GOOD, &["cluster.detect=1s", "cluster.heartbeat=600ms", "cluster.reattach=1h"]);
    assert_eq!(found.len(), 2, "{found:?}");
}

#[test]
fn a_batch_size_gives_the_micro_batches_and_must_not_contradict_them() {
    assert_eq!(good(&["batch.size=24", "batch.sequences=2"]).batch.micro_batches, 3);
    assert_eq!(good(&["batch.size=8", "batch.micro_batches=2"]).batch.micro_batches, 2);
    let found = problems(GOOD, &["batch.size=16", "batch.micro_batches=2"]);
    assert!(
        found[0].contains("4 × 2 × 1 = 8: give batch.size or batch.micro_batches, not both"),
        "{found:?}"
    );
}

#[test]
fn all_problems_of_a_file_are_told_at_once() {
    let text = "nam = 1\n[model]\ndim = 100\nheads = 3\n[bacth]\nlanes = 4\n[batch]\nlanes = 3";
    let found = problems(text, &["cluster.workers=0"]);
    let keys: Vec<_> = found.iter().map(|p| p.split([' ', ':']).next().unwrap()).collect();
    let expected = [
        "model.layers",
        "model.vocab",
        "model.heads",
        "batch.sequence_length",
        "recipe.steps",
        "data.paths",
        "cluster.workers",
        "bacth.lanes",
        "nam",
    ];
    assert_eq!(keys, expected, "{found:#?}");
    let error = load(text, &[]).unwrap_err().to_string();
    assert!(error.starts_with("dir/tiny.toml has 8 problems; nothing was started\n  "), "{error}");
}

#[test]
fn a_file_that_is_missing_or_no_toml_is_named() {
    let error = super::load(Path::new("no/such.toml"), &[]).unwrap_err().to_string();
    assert!(error.starts_with("cannot read the run file no/such.toml: "), "{error}");
    let error = load("[model\ndim = 1", &[]).unwrap_err().to_string();
    assert!(error.starts_with("dir/tiny.toml is no valid TOML: ") && error.contains("line 1"), "{error}");
    assert!(matches!(load("a = 1\na = 2", &[]), Err(ConfigError::Syntax { .. })));
}

#[test]
fn what_is_legal_but_maybe_not_meant_is_noted() {
    let notes: Vec<String> = good(&["cluster.workers=9", "cluster.redundancy=1", "cluster.listen=0.0.0.0:1"])
        .notes
        .iter()
        .map(ToString::to_string)
        .collect();
    assert!(
        notes[0].contains("cluster.workers = 9 is more than batch.lanes = 4: 5 would have nothing"),
        "{notes:?}"
    );
    assert!(notes[1].contains("cluster.redundancy = 1"), "{notes:?}");
    assert!(notes[2].contains("no password"), "{notes:?}");
}

#[test]
fn the_missing_key_is_a_fault_of_its_own() {
    let Err(ConfigError::Problems { problems, .. }) = load(&GOOD.replace("steps = 1000", ""), &[]) else {
        panic!()
    };
    assert!(matches!(problems[0].fault, Fault::Missing { .. }));
}

#[test]
fn a_run_that_starts_with_weights_has_their_model_and_says_nothing_else_of_it() {
    use caravan_pretrained::{Beside, Convention, Export, Flat};
    let dir = tempfile::TempDir::new().unwrap();
    let shape = ModelShape { layers: 2, vocab: 300, rope_theta: 5e5, ..ModelShape::preset("260k").unwrap() };
    let flat = Flat::new(shape.clone(), vec![0.5; shape.parameters() as usize]).unwrap();
    for (name, convention) in [("hf", Convention::HuggingFace), ("meta", Convention::Meta)] {
        let beside = Beside { tokens: serde_json::Map::new(), files: Vec::new(), shard_bytes: 1 << 30 };
        let export = Export::new(&flat, convention, None).unwrap();
        export.write(&dir.path().join(name), &beside).unwrap();
    }
    let text = "[data]\npaths = [\"x\"]\n[recipe]\nsteps = 9\n[batch]\nsequence_length = 16";
    let read = |name: &str, sets: &[&str]| {
        let text = format!("init = {name:?}\n{text}");
        let overrides: Vec<_> = sets.iter().map(|s| Override::set(s)).collect();
        parse(&dir.path().join("run.toml"), &text, &overrides)
    };
    let settings = read("hf", &[]).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!((&settings.model, settings.data.vocab_size), (&shape, 300));
    assert_eq!(settings.init, Some(dir.path().join("hf")));
    // All weights are alike, so the head is the embedding.
    let notes: Vec<String> = settings.notes.iter().map(ToString::to_string).collect();
    assert!(notes.iter().any(|n| n.contains("is trained on its own")), "{notes:?}");
    assert!(notes.iter().any(|n| n.contains("there is no tokenizer.json")), "{notes:?}");
    assert_eq!(read("meta", &["model.context=512", "model.dim=64"]).unwrap().model, shape);
    assert_eq!(read("meta", &[]).unwrap().model.context, 8192, "Llama 3's, by its theta");
    for (set, expected) in [
        ("model.dim=128", "model.dim = 128 (from --set): the model whose weights `init` names has 64 here"),
        ("model.context=128", "names has 512 here"),
        ("model.rope_theta=10000", "names has 500000 here"),
        ("model.rope_scaling={type=\"linear\",factor=2}", "names has none here"),
        ("model.preset=15m", "names has another shape, of "),
        ("init=nowhere", "is no folder of a model"),
        ("init=3", "must be a text in quotes"),
    ] {
        let error = read("hf", &[set]).unwrap_err().to_string();
        assert!(error.contains(expected), "{set}: {error}");
    }
}
