//! The rules of CONTRIBUTING.md that a program can check, checked like any other behaviour.
//!
//! A rule that only people keep is forgotten in a hurry. Each test here collects everything
//! that is against one rule and says it with file and line. Limits may be lowered when there
//! is room below them; raising one takes a reason in the commit message.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a failed test panics")]

mod files;
mod walls;

use files::{File, files, has_word};

/// Lines of a file without its test module. What grows past that has a second subject.
const MOST_LINES: usize = 600;

/// Bytes of a file: a clone stays small, and no data set slips in. The largest picture of the
/// documentation needs about half of it.
const MOST_BYTES: u64 = 512 << 10;

/// Packages in Cargo.lock. Compile time is a feature on two cores: a release build from
/// nothing takes about a second a package.
const MOST_PACKAGES: usize = 330;

/// What lies at the root, and everything below these folders; a new entry needs a reason that
/// somebody who looks for something would accept.
const ROOT: [&str; 24] = [
    ".ci",
    ".gitignore",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE",
    "README.md",
    "bench",
    "cli",
    "clippy.toml",
    "coordinator",
    "deny.toml",
    "deploy",
    "docs",
    "examples",
    "kernels",
    "proto",
    "rust-toolchain.toml",
    "rustfmt.toml",
    "test",
    "tests",
    "worker",
];

/// Marks of unfinished work, tests that do not run, and queues that grow without end.
const FORBIDDEN: [(&str, &str); 8] = [
    ("#[ignore", "a test that is not run proves nothing"),
    ("todo!", "finish it or leave it out"),
    ("unimplemented!", "finish it or leave it out"),
    ("FIXME", "fix it, or file an issue"),
    ("TODO", "do it, or file an issue"),
    ("XXX", "say what is wrong, or file an issue"),
    ("unbounded_channel", "every queue has a bound, and the bound has a reason"),
    ("UnboundedSender", "every queue has a bound, and the bound has a reason"),
];

/// Places that exist on one person's machine only, and hosts of package registries, which
/// differ from place to place and belong into the clients' settings.
const PRIVATE: [&str; 11] = [
    "/home/",
    "/root/",
    "/Users/",
    "/work/",
    ".pyenv",
    "index.crates.io",
    "static.crates.io",
    "pypi.org",
    "pythonhosted.org",
    "deb.debian.org",
    "registry.npmjs.org",
];

/// Fails with everything that is wrong, a line each.
fn nothing_wrong(wrong: &[String]) {
    assert!(wrong.is_empty(), "\n{}\n", wrong.join("\n"));
}

/// The files that people of this project write and read, less this test's own lists.
fn written() -> Vec<File> {
    files().into_iter().filter(|file| !file.foreign() && !file.below("tests/tests/tidy")).collect()
}

fn is_source(file: &File) -> bool {
    ["rs", "py", "sh", "js", "css", "html", "proto", "cu", "cuh"].contains(&file.extension())
        || file.text.starts_with("#!")
}

#[test]
fn no_file_is_too_long() {
    let sources = files().into_iter().filter(|file| is_source(file) && !file.foreign());
    let long = sources.map(|file| (file.lines_without_tests(), file.path)).filter(|(n, _)| *n > MOST_LINES);
    let wrong =
        long.map(|(n, path)| format!("{path}: {n} lines, at most {MOST_LINES}: find its second subject"));
    nothing_wrong(&wrong.collect::<Vec<_>>());
}

#[test]
fn no_file_is_too_large() {
    let large = files().into_iter().filter(|file| file.bytes > MOST_BYTES);
    let wrong = large.map(|file| format!("{}: {} bytes, at most {MOST_BYTES}", file.path, file.bytes));
    nothing_wrong(&wrong.collect::<Vec<_>>());
}

#[test]
fn the_dependency_tree_does_not_grow_unseen() {
    let files = files();
    let lock = files.iter().find(|file| file.path == "Cargo.lock").unwrap();
    let packages = lock.text.lines().filter(|line| *line == "[[package]]").count();
    assert!(packages <= MOST_PACKAGES, "Cargo.lock has {packages} packages, at most {MOST_PACKAGES}");
}

#[test]
fn every_source_begins_by_saying_what_it_is() {
    let begins = |file: &File| match file.extension() {
        "rs" => file.text.starts_with("//! "),
        "py" => file.text.lines().take(2).any(|line| line.starts_with("\"\"\"")),
        "proto" | "js" | "cu" | "cuh" => file.text.starts_with("//") || file.text.starts_with("/*"),
        "css" => file.text.starts_with("/*"),
        "html" => file.text.lines().take(10).any(|line| line.contains("<title>")),
        _ => file.text.lines().nth(1).is_some_and(|line| line.starts_with("# ")),
    };
    let silent = written().into_iter().filter(|file| is_source(file) && !begins(file));
    let wrong = silent.map(|file| format!("{}: its first lines do not say what it is for", file.path));
    nothing_wrong(&wrong.collect::<Vec<_>>());
}

#[test]
fn nothing_is_left_unfinished_and_no_queue_is_endless() {
    let mut wrong = Vec::new();
    for file in written() {
        for (line, number) in file.text.lines().zip(1..) {
            for (mark, reason) in FORBIDDEN.iter().filter(|(mark, _)| has_mark(line, mark)) {
                wrong.push(format!("{}:{number}: {mark}: {reason}", file.path));
            }
        }
    }
    nothing_wrong(&wrong);
}

/// Marks that are words count as whole words only.
fn has_mark(line: &str, mark: &str) -> bool {
    if mark.chars().all(char::is_alphanumeric) { has_word(line, mark) } else { line.contains(mark) }
}

#[test]
fn nothing_knows_the_machine_it_was_written_on() {
    let mut wrong = Vec::new();
    for file in written() {
        for (line, number) in file.text.lines().zip(1..) {
            for place in PRIVATE.iter().filter(|place| line.contains(**place)) {
                wrong.push(format!("{}:{number}: names {place}", file.path));
            }
        }
    }
    nothing_wrong(&wrong);
}

#[test]
fn everything_at_the_root_is_known() {
    let files = files();
    let strays = files.iter().filter(|file| !ROOT.iter().any(|entry| file.below(entry)));
    nothing_wrong(&strays.map(|file| format!("{}: not in ROOT of tidy", file.path)).collect::<Vec<_>>());
}

#[test]
fn every_rust_file_is_compiled() {
    let files = files();
    let mut wrong = Vec::new();
    for file in files.iter().filter(|file| file.extension() == "rs") {
        let (module, folder) = match file.name() {
            "mod.rs" => {
                let (parent, name) = file.folder().rsplit_once('/').unwrap_or(("", file.folder()));
                (name, parent)
            }
            name => (name.trim_end_matches(".rs"), file.folder()),
        };
        let roots = ["main", "lib", "build"].contains(&module)
            || ["tests", "examples", "benches", "bin"]
                .iter()
                .any(|kind| folder.ends_with(&format!("/{kind}")));
        let parents = [
            format!("{folder}/mod.rs"),
            format!("{folder}/lib.rs"),
            format!("{folder}/main.rs"),
            format!("{folder}.rs"),
        ];
        let declares = |parent: &&File| {
            parent.code().any(|(_, line)| line.trim_end().ends_with(&format!("mod {module};")))
        };
        if !roots && !files.iter().filter(|file| parents.contains(&file.path)).any(|parent| declares(&parent))
        {
            wrong.push(format!("{}: no `mod {module};` brings it in", file.path));
        }
    }
    nothing_wrong(&wrong);
}

/// Cargo, git and people know these by their names alone.
const KNOWN_BY_NAME: [&str; 14] = [
    ".ci/run",
    ".gitignore",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE",
    "README.md",
    "clippy.toml",
    "deny.toml",
    "rust-toolchain.toml",
    "rustfmt.toml",
    "test",
];

#[test]
fn every_other_file_is_named_by_someone_who_reads_it() {
    let files = files();
    let mut wrong = Vec::new();
    for file in files.iter().filter(|file| file.extension() != "rs") {
        if KNOWN_BY_NAME.contains(&file.path.as_str()) || file.name() == "Cargo.toml" {
            continue;
        }
        // Either the file is named, or the folder whose entries are read one by one.
        let folder = file.folder().rsplit_once('/').map_or(file.folder(), |(_, name)| name);
        let reads = |other: &&File| {
            other.path != file.path
                && (other.text.contains(file.name())
                    || has_word(&other.text, folder) && other.extension() == "rs")
        };
        if !files.iter().any(|other| reads(&other)) {
            wrong.push(format!("{}: nobody names it", file.path));
        }
    }
    nothing_wrong(&wrong);
}

#[test]
fn links_between_documents_lead_somewhere() {
    let files = files();
    let mut wrong = Vec::new();
    for file in files.iter().filter(|file| file.extension() == "md") {
        for (line, number) in file.text.lines().zip(1..) {
            for link in line.split("](").skip(1).filter_map(|rest| rest.split([')', '#', ' ']).next()) {
                if link.is_empty() || link.contains("://") || link.starts_with("mailto:") {
                    continue;
                }
                let target = resolve(file.folder(), link);
                if !files.iter().any(|other| other.below(&target)) {
                    wrong.push(format!("{}:{number}: {link} is not there", file.path));
                }
            }
        }
    }
    nothing_wrong(&wrong);
}

/// A relative link from a folder, as a path from the root.
fn resolve(folder: &str, link: &str) -> String {
    let mut parts: Vec<&str> = folder.split('/').filter(|part| !part.is_empty()).collect();
    for part in link.trim_end_matches('/').split('/') {
        match part {
            "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join("/")
}
