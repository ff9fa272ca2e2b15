//! The walls: which crate may know which, read from the Cargo.toml files.

use crate::files::{File, files, has_word};
use crate::nothing_wrong;
use toml::{Table, Value};

/// Each package's folder, its name, and the packages of this workspace that it may know.
/// Dependencies point inwards: edges to cores, engine and wire, and those to types.
const WALLS: [(&str, &str, &[&str]); 13] = [
    ("proto/types", "caravan-types", &[]),
    ("proto/wire", "caravan-wire", &["caravan-types"]),
    ("kernels", "caravan-kernels", &[]),
    ("coordinator/core", "caravan-coordinator-core", &["caravan-types"]),
    ("worker/core", "caravan-worker-core", &["caravan-types"]),
    ("worker/engine", "caravan-engine", &["caravan-kernels", "caravan-types"]),
    ("worker/data", "caravan-data", &["caravan-types"]),
    ("worker/checkpoint", "caravan-checkpoint", &["caravan-types"]),
    ("worker/pretrained", "caravan-pretrained", &["caravan-types"]),
    (
        "coordinator",
        "caravan-coordinator",
        &["caravan-checkpoint", "caravan-coordinator-core", "caravan-types", "caravan-wire"],
    ),
    (
        "worker",
        "caravan-worker",
        &[
            "caravan-checkpoint",
            "caravan-data",
            "caravan-engine",
            "caravan-kernels",
            "caravan-pretrained",
            "caravan-types",
            "caravan-wire",
            "caravan-worker-core",
        ],
    ),
    ("cli", "caravan", EVERYTHING),
    ("tests", "tests", EVERYTHING),
];

/// The binary puts the parts together, and the tests look at all of them.
const EVERYTHING: &[&str] = &[
    "caravan-checkpoint",
    "caravan-coordinator",
    "caravan-coordinator-core",
    "caravan-data",
    "caravan-engine",
    "caravan-kernels",
    "caravan-pretrained",
    "caravan-types",
    "caravan-wire",
    "caravan-worker",
    "caravan-worker-core",
];

/// Pure by build: these have no other dependencies than [`PURE_DEPENDENCIES`], so there is no
/// runtime, no clock and no randomness that they could ask.
const PURE: [&str; 3] = ["proto/types", "coordinator/core", "worker/core"];

/// Derives for data and errors, and arithmetic that has the same bits everywhere.
const PURE_DEPENDENCIES: [&str; 4] = ["caravan-types", "libm", "serde", "thiserror"];

/// What the standard library has of the outside world, and of orders that differ from run to
/// run. Time and randomness are arguments of a core; its outputs are data.
const IMPURE: [&str; 12] = [
    "Instant",
    "SystemTime",
    "HashMap",
    "HashSet",
    "env",
    "fs",
    "io",
    "net",
    "process",
    "sync",
    "thread",
    "unsafe",
];

/// Below the edges nothing waits for a network.
const NO_RUNTIME: [&str; 5] =
    ["kernels", "worker/engine", "worker/data", "worker/checkpoint", "worker/pretrained"];

/// Crates that bring a runtime or a network.
const RUNTIMES: [&str; 8] =
    ["async-std", "axum", "futures", "hyper", "smol", "tokio", "tokio-stream", "tonic"];

/// Files outside of `kernels/` that need `unsafe`, because a library demands it.
const UNSAFE: [&str; 1] = ["worker/engine/tests/allocations.rs"];

fn manifest(files: &[File], folder: &str) -> Table {
    let path = format!("{folder}/Cargo.toml");
    let file = files.iter().find(|file| file.path == path);
    let file = file.unwrap_or_else(|| panic!("WALLS names {folder}, where there is no package"));
    file.text.parse().unwrap()
}

/// The names under these tables of a manifest, with what each one says.
fn dependencies(manifest: &Table, tables: &[&str]) -> Vec<(String, Value)> {
    let entries = tables.iter().filter_map(|table| manifest.get(*table)?.as_table());
    entries.flatten().map(|(name, value)| (name.clone(), value.clone())).collect()
}

const ALL: [&str; 3] = ["dependencies", "build-dependencies", "dev-dependencies"];

#[test]
fn a_package_knows_only_what_its_side_of_the_wall_allows() {
    let files = files();
    let mut wrong = Vec::new();
    for (folder, package, allowed) in WALLS {
        let manifest = manifest(&files, folder);
        assert_eq!(manifest["package"]["name"].as_str(), Some(package));
        for (name, _) in dependencies(&manifest, &ALL) {
            if EVERYTHING.contains(&name.as_str()) && !allowed.contains(&name.as_str()) {
                wrong.push(format!("{folder}: {package} must not know {name}"));
            }
        }
    }
    nothing_wrong(&wrong);
}

#[test]
fn every_package_stands_behind_a_wall() {
    let files = files();
    let found: Vec<&str> = files.iter().filter(|f| f.name() == "Cargo.toml").map(File::folder).collect();
    let stray = found.iter().filter(|at| !at.is_empty() && !WALLS.iter().any(|(folder, ..)| folder == *at));
    nothing_wrong(&stray.map(|at| format!("{at}: not in WALLS of tidy")).collect::<Vec<_>>());
}

#[test]
fn every_package_has_the_lints_and_the_versions_of_the_workspace() {
    let files = files();
    let mut wrong = Vec::new();
    for (folder, ..) in WALLS {
        let manifest = manifest(&files, folder);
        let shared = |value: &Value| value.get("workspace").and_then(Value::as_bool) == Some(true);
        if !manifest.get("lints").is_some_and(shared) {
            wrong.push(format!("{folder}: its Cargo.toml has no `[lints] workspace = true`"));
        }
        for (name, value) in dependencies(&manifest, &ALL) {
            if !shared(&value) {
                wrong.push(format!("{folder}: {name} has a version of its own; put it in the workspace's"));
            }
        }
    }
    nothing_wrong(&wrong);
}

#[test]
fn the_cores_have_no_runtime_no_clock_and_no_chance() {
    let files = files();
    let mut wrong = Vec::new();
    for folder in PURE {
        for (name, _) in dependencies(&manifest(&files, folder), &["dependencies", "build-dependencies"]) {
            if !PURE_DEPENDENCIES.contains(&name.as_str()) {
                wrong.push(format!("{folder}: depends on {name}, and is pure"));
            }
        }
        let source = format!("{folder}/src");
        for file in files.iter().filter(|file| file.below(&source)) {
            for (number, line) in file.code() {
                let named = |word: &&&str| has_word(line, word) && is_std(line, word);
                for word in IMPURE.iter().filter(named) {
                    wrong.push(format!("{}:{number}: `{word}` in a pure crate", file.path));
                }
            }
        }
    }
    nothing_wrong(&wrong);
}

/// A module of the standard library counts where `std` is named; a type or keyword always. A
/// value that is shared and that nobody changes is as pure as a copy of it.
fn is_std(line: &str, word: &str) -> bool {
    let module = word.starts_with(|c: char| c.is_lowercase()) && word != "unsafe";
    !module || has_word(line, "std") && !line.contains("std::sync::Arc;")
}

#[test]
fn below_the_edges_there_is_no_runtime() {
    let files = files();
    let mut wrong = Vec::new();
    for folder in NO_RUNTIME {
        for (name, _) in dependencies(&manifest(&files, folder), &ALL) {
            if RUNTIMES.contains(&name.as_str()) {
                wrong.push(format!("{folder}: depends on {name}, and waits for no network"));
            }
        }
        for file in files.iter().filter(|file| file.below(folder) && file.extension() == "rs") {
            for (number, line) in file.code() {
                if has_word(line, "net") && has_word(line, "std") {
                    wrong.push(format!("{}:{number}: uses the network", file.path));
                }
            }
        }
    }
    nothing_wrong(&wrong);
}

#[test]
fn unsafe_lives_in_the_kernels_and_gives_its_reason() {
    let files = files();
    let mut wrong = Vec::new();
    for file in files.iter().filter(|file| file.extension() == "rs" && !file.below("tests/tests/tidy")) {
        let found: Vec<usize> =
            file.code().filter(|(_, line)| has_word(line, "unsafe")).map(|(number, _)| number).collect();
        let listed = UNSAFE.contains(&file.path.as_str());
        if listed && found.is_empty() {
            wrong.push(format!("{}: needs no place in UNSAFE of tidy any more", file.path));
        }
        if listed || file.below("kernels") {
            continue;
        }
        wrong.extend(found.iter().map(|number| format!("{}:{number}: unsafe outside of kernels", file.path)));
    }
    nothing_wrong(&wrong);
}
