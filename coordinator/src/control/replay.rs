//! Telling the core again what it was told.

use super::{FORMAT, Record, Start, digest};
use crate::lines::{Lines, RawLine};
use caravan_coordinator_core::{Core, Input, Millis, Output};
use caravan_types::Digest;
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

/// Inputs that are shown before and after one that was decided otherwise.
const AROUND: usize = 3;

/// Why a recording cannot be replayed.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// There is none.
    #[error(
        "there is no recording at {}: the run has not been started since there are recordings, or the file was \
         moved away", .0.display()
    )]
    None(PathBuf),
    /// The disk said no.
    #[error("cannot read the recording {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system answered.
        source: io::Error,
    },
    /// Another program wrote it.
    #[error(
        "line {line} of the recording {} is of format {found}, this program reads {FORMAT}: replay it with the \
         version of caravan that wrote it ({build})", path.display()
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// The line.
        line: u64,
        /// Its version.
        found: u64,
        /// The program that wrote it.
        build: String,
    },
    /// A line makes no sense.
    #[error(
        "line {line} of the recording {} is not as it was written ({why}): what was decided from there on cannot be \
         told", path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The line.
        line: u64,
        /// What is wrong with it.
        why: String,
    },
}

/// How one start of a coordinator was replayed.
#[derive(Debug)]
pub struct Replayed {
    /// What the coordinator started with.
    pub start: Start,
    /// The line of its start.
    pub line: u64,
    /// Inputs that were decided the same.
    pub inputs: u64,
    /// How far its clock went.
    pub until: Millis,
    /// How its recording ends.
    pub stop: Stop,
    /// Where it was decided otherwise. What follows was not replayed.
    pub difference: Option<Box<Difference>>,
}

/// How the recording of a start ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// With its last record; whether the coordinator was told more cannot be seen from it.
    End,
    /// In the middle of a record, as a crash leaves it.
    Torn,
    /// The file had its full size.
    Full,
}

/// An input that was decided otherwise.
#[derive(Debug)]
pub struct Difference {
    /// What came before it, oldest first.
    pub before: Vec<Shown>,
    /// The input.
    pub at: Shown,
    /// What is answered to it now.
    pub outputs: Vec<Output>,
    /// The digest of that.
    pub digest: Option<Digest>,
    /// What came after it.
    pub after: Vec<Shown>,
}

/// An input as it was recorded.
#[derive(Clone, Debug)]
pub struct Shown {
    /// The line.
    pub line: u64,
    /// When the core was told.
    pub now: Millis,
    /// What it was told.
    pub input: Input,
    /// The digest of what it answered then; none where that was nothing.
    pub answered: Option<Digest>,
}

/// Replays the recording in a file, start by start.
///
/// # Errors
/// Where it cannot be read. What was decided otherwise is no error of the replay.
pub fn replay(path: &Path) -> Result<Vec<Replayed>, ReplayError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => ReplayError::None(path.to_owned()),
        _ => ReplayError::Io { path: path.to_owned(), source },
    };
    let mut lines = File::open(path).and_then(Lines::new).map_err(failed)?;
    let mut starts: Vec<Running> = Vec::new();
    while let Some(raw) = lines.next().map_err(failed)? {
        let number = raw.number;
        let damaged = |why: String| ReplayError::Damaged { path: path.to_owned(), line: number, why };
        match (parse(path, raw)?, starts.last_mut()) {
            (Some(Record::Start(start)), _) => starts.push(Running::new(number, *start)),
            (_, None) => return Err(damaged("there is no start before it".into())),
            (None, Some(running)) => running.replayed.stop = Stop::Torn,
            (Some(Record::Full(_)), Some(running)) => running.replayed.stop = Stop::Full,
            (Some(_), Some(running)) if running.replayed.stop != Stop::End => {
                return Err(damaged("an input follows where recording had stopped".into()));
            }
            (Some(record), Some(running)) => {
                if let Some((now, input, answered)) = record.told() {
                    running.take(Shown { line: number, now, input, answered });
                }
            }
        }
    }
    Ok(starts.into_iter().map(|running| running.replayed).collect())
}

/// One line; none where it is half a line.
fn parse(path: &Path, raw: RawLine<'_>) -> Result<Option<Record>, ReplayError> {
    if !raw.whole {
        return Ok(None);
    }
    let json: Result<serde_json::Value, _> = serde_json::from_slice(raw.text);
    let damaged = |why: String| ReplayError::Damaged { path: path.to_owned(), line: raw.number, why };
    if raw.text.starts_with(b"{\"start\"") {
        let start = &json.map_err(|e| damaged(e.to_string()))?["start"];
        let found = start["version"].as_u64().ok_or_else(|| damaged("it has no version".into()))?;
        if found != u64::from(FORMAT) {
            let build = start["build"].as_str().unwrap_or("unknown").to_owned();
            return Err(ReplayError::Version { path: path.to_owned(), line: raw.number, found, build });
        }
    }
    serde_json::from_slice(raw.text).map(Some).map_err(|e| damaged(e.to_string()))
}

/// A start that is being replayed.
struct Running {
    replayed: Replayed,
    core: Core,
    recent: VecDeque<Shown>,
}

impl Running {
    fn new(line: u64, start: Start) -> Self {
        let core = Core::new(start.config.clone(), start.restored.clone(), 0);
        let replayed = Replayed { start, line, inputs: 0, until: 0, stop: Stop::End, difference: None };
        Self { replayed, core, recent: VecDeque::with_capacity(AROUND) }
    }

    /// Tells the core one more thing, unless it went another way before.
    fn take(&mut self, shown: Shown) {
        if let Some(difference) = &mut self.replayed.difference {
            if difference.after.len() < AROUND {
                difference.after.push(shown);
            }
            return;
        }
        let mut outputs = Vec::new();
        self.core.handle(shown.now, shown.input.clone(), &mut outputs);
        let digest = digest(&outputs);
        if digest != shown.answered {
            let before = self.recent.drain(..).collect();
            let difference = Difference { before, at: shown, outputs, digest, after: Vec::new() };
            self.replayed.difference = Some(Box::new(difference));
            return;
        }
        self.replayed.inputs += 1;
        self.replayed.until = shown.now;
        if self.recent.len() == AROUND {
            self.recent.pop_front();
        }
        self.recent.push_back(shown);
    }
}
