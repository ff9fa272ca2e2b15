//! The folder of a run: what lies where, and that a run stays what it was.
//!
//! ```text
//! .caravan/
//!   data/                      prepared token streams, by content; shared by all runs
//!   runs/dependencies/
//!     spec.json                the run spec: what decides the weights
//!     data.json                where the prepared data is
//!     init.json                which weights it starts with, where these are not its seed's
//!     checkpoints/             see caravan-checkpoint
//!     store/                   the coordinator's records
//!     ledger.jsonl             what was committed; `caravan audit` reads it
//!     control.jsonl            what the coordinator was told; `caravan replay` reads it
//!     logs/                    one file a process
//!     metrics.jsonl            one line a committed step
//!     address                  the coordinator's URL while it runs
//! ```

use caravan_types::RunSpec;
use caravan_types::run_spec::RUN_SPEC_VERSION;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Where runs and prepared data are by default, below the current folder.
const HOME: &str = ".caravan";
const SPEC: &str = "spec.json";
const DATA: &str = "data.json";
const ADDRESS: &str = "address";

/// Why a folder cannot be used as a run's.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    /// The file system said no.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It holds no run.
    #[error(
        "{} is no run's folder: it has no spec.json. `caravan train FILE` makes one, by default .caravan/runs/NAME",
        .0.display()
    )]
    NotARun(PathBuf),
    /// A file in it makes no sense.
    #[error("{} is damaged: {why}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// Its spec was written by another version.
    #[error(
        "{} is of a run spec version {found}, this program reads version {RUN_SPEC_VERSION}: use the version of \
         caravan that started the run",
        path.display()
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u64,
    },
    /// It holds a run that is something else.
    #[error(
        "{} holds another run; what decides its weights is fixed when a run starts.{}\nGive the new run a folder of \
         its own (--run DIR), or go on with the old one's settings",
        path.display(),
        list(differences)
    )]
    Different {
        /// The folder.
        path: PathBuf,
        /// What differs.
        differences: Vec<Difference>,
    },
}

/// A key of the run spec that differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The dotted key.
    pub key: String,
    /// Its value in the folder.
    pub there: String,
    /// Its value now.
    pub here: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} there, {} here", self.key, self.there, self.here)
    }
}

fn list(differences: &[Difference]) -> String {
    differences.iter().map(|d| format!("\n  {d}")).collect()
}

/// The folder of a run.
#[derive(Clone, Debug)]
pub struct RunDir {
    path: PathBuf,
    spec: RunSpec,
}

#[derive(Serialize, Deserialize)]
struct DataFile {
    path: PathBuf,
}

impl RunDir {
    /// Where a run is unless told otherwise.
    #[must_use]
    pub fn default_path(name: &str) -> PathBuf {
        Path::new(HOME).join("runs").join(name)
    }

    /// Where prepared data is kept.
    #[must_use]
    pub fn data_cache() -> PathBuf {
        Path::new(HOME).join("data")
    }

    /// The run spec in a folder, where there is a run already.
    ///
    /// # Errors
    /// Where it cannot be read.
    pub fn peek(path: &Path) -> Result<Option<RunSpec>, RunDirError> {
        match Self::open(path) {
            Ok(run) => Ok(Some(run.spec)),
            Err(RunDirError::NotARun(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Opens the folder of a run that was started before.
    ///
    /// # Errors
    /// Where there is none, or its spec cannot be read.
    pub fn open(path: &Path) -> Result<Self, RunDirError> {
        let file = path.join(SPEC);
        let text = match fs::read_to_string(&file) {
            Ok(text) => text,
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Err(RunDirError::NotARun(path.to_owned()));
            }
            Err(e) => return Err(failed("read", &file)(e)),
        };
        let damaged = |e: serde_json::Error| RunDirError::Damaged { path: file.clone(), why: e.to_string() };
        let value: serde_json::Value = serde_json::from_str(&text).map_err(damaged)?;
        match value["version"].as_u64() {
            Some(found) if found != u64::from(RUN_SPEC_VERSION) => {
                return Err(RunDirError::Version { path: file, found });
            }
            _ => {}
        }
        let spec = serde_json::from_str(&text).map_err(damaged)?;
        Ok(Self { path: path.to_owned(), spec })
    }

    /// Finds a run by its folder or, where there is none of that name, by the run's name.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn find(run: &Path) -> Result<Self, RunDirError> {
        let named = run.to_str().map(Self::default_path).filter(|p| !run.exists() && p.exists());
        Self::open(named.as_deref().unwrap_or(run))
    }

    /// Makes the folder of a new run, or goes on in that of the same run.
    ///
    /// # Errors
    /// [`RunDirError::Different`] with what differs, where it holds another run.
    pub fn start(path: &Path, spec: &RunSpec, data: &Path) -> Result<Self, RunDirError> {
        match Self::peek(path)? {
            Some(there) if there != *spec => {
                let differences = differences(&there, spec);
                return Err(RunDirError::Different { path: path.to_owned(), differences });
            }
            Some(_) => {}
            None => {
                fs::create_dir_all(path).map_err(failed("create", path))?;
                write_json(&path.join(SPEC), spec)?;
            }
        }
        let run = Self { path: path.to_owned(), spec: spec.clone() };
        for folder in [run.checkpoints(), run.store(), run.logs()] {
            fs::create_dir_all(&folder).map_err(failed("create", &folder))?;
        }
        let data = data.canonicalize().map_err(failed("find", data))?;
        write_json(&path.join(DATA), &DataFile { path: data })?;
        Ok(run)
    }

    /// The folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The run.
    #[must_use]
    pub fn spec(&self) -> &RunSpec {
        &self.spec
    }

    /// The list of the weights that it starts with, in the folder of a run.
    #[must_use]
    pub fn init(path: &Path) -> PathBuf {
        path.join("init.json")
    }

    /// The checkpoints.
    #[must_use]
    pub fn checkpoints(&self) -> PathBuf {
        self.path.join("checkpoints")
    }

    /// The coordinator's records.
    #[must_use]
    pub fn store(&self) -> PathBuf {
        self.path.join("store")
    }

    /// What the processes log.
    #[must_use]
    pub fn logs(&self) -> PathBuf {
        self.path.join("logs")
    }

    /// The ledger of what was committed.
    #[must_use]
    pub fn ledger(&self) -> PathBuf {
        self.path.join("ledger.jsonl")
    }

    /// The recording of what the coordinator was told.
    #[must_use]
    pub fn control(&self) -> PathBuf {
        self.path.join("control.jsonl")
    }

    /// The metrics file.
    #[must_use]
    pub fn metrics(&self) -> PathBuf {
        self.path.join("metrics.jsonl")
    }

    /// The folder of the prepared data.
    ///
    /// # Errors
    /// Where `data.json` cannot be read.
    pub fn data(&self) -> Result<PathBuf, RunDirError> {
        let path = self.path.join(DATA);
        let text = fs::read_to_string(&path).map_err(failed("read", &path))?;
        let file: DataFile = serde_json::from_str(&text)
            .map_err(|e| RunDirError::Damaged { path: path.clone(), why: e.to_string() })?;
        Ok(file.path)
    }

    /// The coordinator's URL, while one runs.
    ///
    /// # Errors
    /// Where the file is there and cannot be read.
    pub fn address(&self) -> Result<Option<String>, RunDirError> {
        let path = self.path.join(ADDRESS);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text.trim().to_owned())),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(failed("read", &path)(e)),
        }
    }

    /// Notes the coordinator's URL, or that there is none any more.
    ///
    /// # Errors
    /// Where the file cannot be written.
    pub fn set_address(&self, url: Option<&str>) -> Result<(), RunDirError> {
        let path = self.path.join(ADDRESS);
        match url {
            Some(url) => write(&path, format!("{url}\n").as_bytes()),
            None => match fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("remove", &path)(e)),
                _ => Ok(()),
            },
        }
    }
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RunDirError {
    let path = path.to_owned();
    move |source| RunDirError::Io { action, path, source }
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<(), RunDirError> {
    let mut json = serde_json::to_vec_pretty(value)
        .map_err(|e| RunDirError::Damaged { path: path.to_owned(), why: e.to_string() })?;
    json.push(b'\n');
    write(path, &json)
}

/// Whole or not at all: written aside, made durable, renamed.
fn write(path: &Path, content: &[u8]) -> Result<(), RunDirError> {
    let aside = path.with_extension("new");
    let mut file = File::create(&aside).map_err(failed("create", &aside))?;
    file.write_all(content).and_then(|()| file.sync_all()).map_err(failed("write", &aside))?;
    fs::rename(&aside, path).map_err(failed("rename", &aside))
}

/// The keys in which two run specs differ.
#[must_use]
pub fn differences(there: &RunSpec, here: &RunSpec) -> Vec<Difference> {
    let (there, here) = (flat(there), flat(here));
    let keys = there.keys().chain(here.keys().filter(|k| !there.contains_key(*k)));
    let value =
        |of: &BTreeMap<String, String>, key: &String| of.get(key).cloned().unwrap_or("nothing".into());
    keys.map(|key| Difference { key: key.clone(), there: value(&there, key), here: value(&here, key) })
        .filter(|d| d.there != d.here)
        .collect()
}

fn flat(spec: &RunSpec) -> BTreeMap<String, String> {
    fn walk(key: &str, value: &serde_json::Value, out: &mut BTreeMap<String, String>) {
        match value {
            serde_json::Value::Object(map) => {
                for (name, value) in map {
                    let key = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
                    walk(&key, value, out);
                }
            }
            value => _ = out.insert(key.to_owned(), value.to_string()),
        }
    }
    let mut out = BTreeMap::new();
    // A run spec has only text keys and finite numbers, so it always becomes a value.
    walk("", &serde_json::to_value(spec).unwrap_or_default(), &mut out);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use caravan_types::{BatchShape, DataSpec, Digest, ModelShape, NumericsClass, Precision, Recipe};
    use tempfile::TempDir;

    fn spec() -> RunSpec {
        RunSpec {
            version: RUN_SPEC_VERSION,
            name: "test".into(),
            model: ModelShape::preset("260k").unwrap(),
            data: DataSpec { digest: Digest([1; 32]), tokens: 10 },
            batch: BatchShape { lanes: 4, micro_batches: 1, sequences: 1, sequence_length: 32 },
            recipe: Recipe { steps: 100, learning_rate: 0.1 + 0.2, ..Recipe::default() },
            init: caravan_types::Initial::Seed,
            seed: 1,
            numerics: NumericsClass { precision: Precision::Fp32, family: "avx2".into() },
        }
    }

    #[test]
    fn the_same_run_goes_on_and_its_spec_keeps_every_bit() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("a/b");
        assert!(RunDir::peek(&path).unwrap().is_none());
        RunDir::start(&path, &spec(), dir.path()).unwrap();
        let run = RunDir::start(&path, &spec(), dir.path()).unwrap();
        assert_eq!(RunDir::peek(&path).unwrap(), Some(spec()));
        assert_eq!(run.data().unwrap(), dir.path().canonicalize().unwrap());
    }

    #[test]
    fn another_run_is_refused_with_every_key_that_differs() {
        let dir = TempDir::new().unwrap();
        RunDir::start(dir.path(), &spec(), dir.path()).unwrap();
        let mut other = spec();
        other.recipe.steps = 300;
        other.numerics.family = "avx512".into();
        let error = RunDir::start(dir.path(), &other, dir.path()).unwrap_err().to_string();
        assert!(error.contains("\n  numerics.family: \"avx2\" there, \"avx512\" here"), "{error}");
        assert!(error.contains("\n  recipe.steps: 100 there, 300 here"), "{error}");
        assert_eq!(error.matches(" there, ").count(), 2, "{error}");
    }

    #[test]
    fn a_folder_without_a_run_a_damaged_one_and_one_of_another_version_are_told_apart() {
        let dir = TempDir::new().unwrap();
        let error = |path: &Path| RunDir::open(path).unwrap_err();
        assert!(matches!(error(dir.path()), RunDirError::NotARun(_)));
        assert!(matches!(error(&dir.path().join("none")), RunDirError::NotARun(_)));
        fs::write(dir.path().join(SPEC), "{\"version\": 7, \"x\": 1}").unwrap();
        assert!(matches!(error(dir.path()), RunDirError::Version { found: 7, .. }));
        fs::write(dir.path().join(SPEC), "{\"version\": 1").unwrap();
        assert!(matches!(error(dir.path()), RunDirError::Damaged { .. }));
    }

    #[test]
    fn the_address_is_there_while_a_coordinator_runs() {
        let dir = TempDir::new().unwrap();
        let run = RunDir::start(dir.path(), &spec(), dir.path()).unwrap();
        assert_eq!(run.address().unwrap(), None);
        run.set_address(Some("http://127.0.0.1:1")).unwrap();
        assert_eq!(run.address().unwrap().as_deref(), Some("http://127.0.0.1:1"));
        run.set_address(None).unwrap();
        run.set_address(None).unwrap();
        assert_eq!(run.address().unwrap(), None);
    }
}
