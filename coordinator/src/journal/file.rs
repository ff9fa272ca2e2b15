//! The metrics file: JSON lines, only ever added to.

use crate::history::History;
use caravan_types::status::{LoggedEvent, StepMetrics};
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use tokio::io::AsyncWriteExt;

/// How much of an earlier file's end is read back for the curve: 16 MiB are about 60,000 steps
/// at 270 bytes, more than the history keeps, and take a fraction of a second.
const TAIL_BYTES: u64 = 16 << 20;

/// What waits for a disk that does not take it; older lines are given up beyond that.
const MAX_PENDING: usize = 4 << 20;

/// A line as it is read back.
#[derive(Deserialize)]
#[serde(untagged)]
enum Line {
    Event(Box<LoggedEvent>),
    Step(StepMetrics),
}

#[derive(Debug)]
pub(super) struct MetricsFile {
    file: tokio::fs::File,
    path: PathBuf,
    /// Lines that are to be written.
    pending: Vec<u8>,
    /// Whether the last write failed; said once per outage.
    failing: bool,
}

impl MetricsFile {
    /// Opens or makes the file, and reads its end into the history.
    pub(super) fn open(path: &Path, history: &mut History) -> io::Result<Self> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let mut file = OpenOptions::new().create(true).read(true).append(true).open(path)?;
        let torn = read_tail(&mut file, path, history)?;
        let pending = if torn { b"\n".to_vec() } else { Vec::new() };
        let (file, path) = (tokio::fs::File::from_std(file), path.to_path_buf());
        Ok(Self { file, path, pending, failing: false })
    }

    /// Adds a line; [`Self::write`] writes it.
    pub(super) fn add(&mut self, line: &impl Serialize) {
        if self.pending.len() > MAX_PENDING {
            self.pending.clear();
            self.pending.push(b'\n');
        }
        match serde_json::to_writer(&mut self.pending, line) {
            Ok(()) => self.pending.push(b'\n'),
            Err(error) => tracing::warn!(%error, "a line of the metrics file could not be written"),
        }
    }

    /// Writes what was added. What the disk does not take is tried again next time, on a line of
    /// its own, since nobody knows how much of it was taken.
    pub(super) async fn write(&mut self) {
        if self.pending.is_empty() {
            return;
        }
        let written = match self.file.write_all(&self.pending).await {
            Ok(()) => self.file.flush().await,
            Err(error) => Err(error),
        };
        match written {
            Ok(()) => {
                self.pending.clear();
                self.failing = false;
            }
            Err(error) => {
                if !self.failing {
                    tracing::warn!(
                        file = %self.path.display(), %error,
                        "the metrics file cannot be written; the run goes on, its curve has a gap there if this lasts"
                    );
                    self.pending.insert(0, b'\n');
                }
                self.failing = true;
            }
        }
    }
}

/// Reads the last [`TAIL_BYTES`]. Says whether the file ends in the middle of a line.
fn read_tail(file: &mut File, path: &Path, history: &mut History) -> io::Result<bool> {
    let length = file.seek(SeekFrom::End(0))?;
    let start = length.saturating_sub(TAIL_BYTES);
    file.seek(SeekFrom::Start(start))?;
    let mut reader = BufReader::new(file.take(length - start));
    let (mut line, mut unreadable, mut torn) = (Vec::new(), 0u64, false);
    if start > 0 {
        reader.read_until(b'\n', &mut line)?;
        line.clear();
    }
    while reader.read_until(b'\n', &mut line)? > 0 {
        torn = line.last() != Some(&b'\n');
        match serde_json::from_slice(&line) {
            Ok(Line::Step(metrics)) => history.add_step(metrics),
            Ok(Line::Event(event)) if event.number >= history.next_event() => history.add_event(*event),
            Err(_) if line.trim_ascii().is_empty() => {}
            Ok(Line::Event(_)) | Err(_) => unreadable += 1,
        }
        line.clear();
    }
    if unreadable > 0 {
        tracing::warn!(
            file = %path.display(), lines = unreadable,
            "some lines of the metrics file are not shown: they cannot be read (a crash, a full disk, a loss that \
             is no number)"
        );
    }
    Ok(torn)
}
