//! `cargo:PATH/Cargo.lock`: the Rust sources of a lock file's crates, as Cargo unpacked them.
//!
//! Text that every machine that built Caravan already has. Only crates that are unpacked are
//! used: which of a lock file's crates Cargo fetches depends on the platform, and a missing
//! one is no error as long as some are there.

use crate::error::{Action, DataError};
use crate::find::{InputFile, walk};
use serde::Deserialize;
use std::fs;
use std::path::{Path, PathBuf};

#[derive(Deserialize)]
struct Lock {
    #[serde(default)]
    package: Vec<Package>,
}

/// Path dependencies have no `source`.
#[derive(Deserialize, PartialEq, Eq, PartialOrd, Ord)]
struct Package {
    name: String,
    version: String,
    source: Option<String>,
}

/// Adds the `*.rs` files of the crates of `lock`, sorted by crate and path. They are called
/// `NAME-VERSION/…`, so that the table of sources is the same on every machine.
pub(crate) fn find(
    lock: &Path,
    cargo_home: Option<&Path>,
    files: &mut Vec<InputFile>,
) -> Result<(), DataError> {
    let text = match fs::read_to_string(lock) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(DataError::Missing { path: lock.to_owned() });
        }
        Err(e) => return Err(DataError::io(Action::Read, lock)(e)),
    };
    let bad = |why: String| DataError::BadLock { path: lock.to_owned(), why };
    let mut parsed: Lock = toml::from_str(&text).map_err(|e| bad(e.to_string()))?;
    parsed.package.retain(|p| p.source.as_deref().is_some_and(|s| s.starts_with("registry+")));
    parsed.package.sort();
    let home = match cargo_home {
        Some(home) => home.to_owned(),
        None => default_home().ok_or_else(|| bad("neither CARGO_HOME nor HOME is set".into()))?,
    };
    let looked_in = home.join("registry/src");
    let registries = registries(&looked_in)?;
    let before = files.len();
    for package in &parsed.package {
        let name = format!("{}-{}", package.name, package.version);
        if let Some(folder) = registries.iter().map(|r| r.join(&name)).find(|f| f.is_dir()) {
            walk(&folder, &name, &["rs".to_owned()], files)?;
        }
    }
    if files.len() == before {
        let (lock, named) = (lock.to_owned(), parsed.package.len());
        return Err(DataError::NoCrates { lock, named, looked_in });
    }
    Ok(())
}

fn default_home() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    set("CARGO_HOME").or_else(|| Some(set("HOME")?.join(".cargo")))
}

/// One folder per registry (an index and its mirrors), sorted. None at all is not an error
/// here: the caller finds no crate and says so.
fn registries(looked_in: &Path) -> Result<Vec<PathBuf>, DataError> {
    let listing = match fs::read_dir(looked_in) {
        Ok(listing) => listing,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(DataError::io(Action::Find, looked_in)(e)),
    };
    let mut found = listing
        .map(|entry| entry.map(|e| e.path()))
        .collect::<Result<Vec<_>, _>>()
        .map_err(DataError::io(Action::Find, looked_in))?;
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOCK: &str = r#"
version = 4
[[package]]
name = "zeta"
version = "1.0.0"
source = "registry+https://github.com/rust-lang/crates.io-index"
[[package]]
name = "alpha"
version = "0.2.0"
source = "registry+https://github.com/rust-lang/crates.io-index"
[[package]]
name = "not-fetched"
version = "9.9.9"
source = "registry+https://github.com/rust-lang/crates.io-index"
[[package]]
name = "local"
version = "0.1.0"
"#;

    #[test]
    fn the_rust_files_of_unpacked_registry_crates_are_found_and_others_ignored() {
        let dir = tempfile::tempdir().unwrap();
        let lock = dir.path().join("Cargo.lock");
        fs::write(&lock, LOCK).unwrap();
        let home = dir.path().join("home");
        for (krate, file) in [
            ("zeta-1.0.0", "lib.rs"),
            ("alpha-0.2.0", "main.rs"),
            ("local-0.1.0", "a.rs"),
            ("other-1.0.0", "b.rs"),
        ] {
            let src = home.join("registry/src/some-registry-0").join(krate).join("src");
            fs::create_dir_all(&src).unwrap();
            fs::write(src.join(file), "fn main() {}").unwrap();
            fs::write(src.join("README.md"), "no Rust").unwrap();
        }
        let mut files = Vec::new();
        find(&lock, Some(&home), &mut files).unwrap();
        let names: Vec<_> = files.iter().map(|f| f.name.as_str()).collect();
        assert_eq!(names, ["alpha-0.2.0/src/main.rs", "zeta-1.0.0/src/lib.rs"]);
    }

    #[test]
    fn no_crate_a_missing_lock_and_a_broken_lock_each_say_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let lock = dir.path().join("Cargo.lock");
        let error = |home: &Path| find(&lock, Some(home), &mut Vec::new()).unwrap_err().to_string();
        assert!(error(dir.path()).contains("no such file"));
        fs::write(&lock, LOCK).unwrap();
        let text = error(&dir.path().join("home"));
        assert!(text.contains("3 registry crates") && text.contains("cargo fetch"), "{text}");
        fs::write(&lock, "not [ toml").unwrap();
        assert!(error(dir.path()).contains("is no Cargo.lock"));
    }
}
