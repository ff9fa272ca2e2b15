//! Writing the record, beside the run.

use super::{FORMAT, Record, Start, digest};
use crate::clock::unix_ms;
use crate::lines::whole_end;
use caravan_coordinator_core::{Config, Input, Millis, Output, Restored};
use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout, timeout_at};

/// The file grows to this size, and recording stops. Eight workers that commit two steps a second
/// say 16 commits of 170 bytes and ten heartbeats of 90 in that second, which fills it in three
/// and a half days.
const MOST_BYTES: u64 = 1 << 30;

/// Records that may wait for the disk: a minute of a small caravan. A recording with a hole
/// cannot be replayed, so when a disk stalls for longer than that, it ends.
const WAITING: usize = 4096;

/// What is written at once, at most.
const BUFFER: usize = 1 << 16;

/// How long a record waits for others before it is written: what a crash takes away is no more
/// than what viewers were not shown yet.
const FLUSH: Duration = Duration::from_millis(200);

/// How long the end of a run waits for the last records to be written.
const CLOSING: Duration = Duration::from_secs(1);

/// Writes down what the core is told. Whatever goes wrong is logged once, and then nothing is
/// recorded any more.
#[derive(Debug)]
pub(crate) struct Recorder {
    path: PathBuf,
    /// Where records go; none once recording has stopped.
    lines: Option<mpsc::Sender<Vec<u8>>>,
    /// Writes them, to the last one.
    writer: Option<JoinHandle<()>>,
    /// Length of the file with what is on its way there.
    bytes: u64,
    most: u64,
}

impl Recorder {
    /// Opens or makes the file, and records that a coordinator starts.
    pub(crate) fn start(path: &Path, config: &Config, restored: &Restored) -> Self {
        Self::with_bound(path, config, restored, MOST_BYTES)
    }

    pub(crate) fn with_bound(path: &Path, config: &Config, restored: &Restored, most: u64) -> Self {
        let mut recorder = Self { path: path.to_owned(), lines: None, writer: None, bytes: 0, most };
        match open(path) {
            Ok((_, bytes)) if bytes >= most => {
                tracing::warn!(
                    file = %path.display(), bytes,
                    "what the coordinator is told is not recorded: the file has its full size. Move it away to \
                     record again from the next start on"
                );
            }
            Ok((file, bytes)) => {
                let (lines, queue) = mpsc::channel(WAITING);
                let file = tokio::fs::File::from_std(file);
                recorder.writer = Some(tokio::spawn(write(file, queue, path.to_owned())));
                recorder.lines = Some(lines);
                recorder.bytes = bytes;
            }
            Err(error) => recorder.failed(&error),
        }
        recorder.add(&Record::Start(Box::new(Start {
            version: FORMAT,
            build: env!("CARGO_PKG_VERSION").to_owned(),
            unix_ms: unix_ms(),
            config: config.clone(),
            restored: restored.clone(),
        })));
        recorder
    }

    /// What the core is about to be told.
    pub(crate) fn told(&self, now: Millis, input: &Input) -> Option<Record> {
        self.lines.is_some().then(|| Record::of(now, input))
    }

    /// What the core answered to that.
    pub(crate) fn answered(&mut self, told: Option<Record>, outputs: &[Output]) {
        if let Some(record) = told {
            self.add(&record.answered(digest(outputs)));
        }
    }

    /// Waits until what was recorded is written.
    pub(crate) async fn finish(&mut self) {
        self.lines = None;
        if let Some(writer) = self.writer.take() {
            // A disk that does not take it by then keeps nobody waiting.
            timeout(CLOSING, writer).await.ok();
        }
    }

    fn add(&mut self, record: &Record) {
        let Some(lines) = &self.lines else { return };
        let mut line = serde_json::to_vec(record).unwrap_or_default();
        line.push(b'\n');
        self.bytes += line.len() as u64;
        let full = self.bytes >= self.most;
        if full {
            let last = serde_json::to_vec(&Record::Full(self.bytes)).unwrap_or_default();
            line.extend([&last[..], b"\n"].concat());
            tracing::warn!(
                file = %self.path.display(), bytes = self.bytes,
                "what the coordinator is told is not recorded any more: the file has its full size"
            );
        }
        match lines.try_send(line) {
            Ok(()) if !full => {}
            // What waits is written all the same.
            Ok(()) => self.lines = None,
            Err(mpsc::error::TrySendError::Full(_)) => {
                self.failed(&io::Error::other(format!("{WAITING} records wait for the disk")));
            }
            // The writer has said why it ended.
            Err(mpsc::error::TrySendError::Closed(_)) => self.lines = None,
        }
    }

    fn failed(&mut self, error: &io::Error) {
        self.lines = None;
        warn(&self.path, error);
    }
}

fn warn(path: &Path, error: &io::Error) {
    tracing::warn!(
        file = %path.display(), %error,
        "what the coordinator is told cannot be recorded; the run goes on without, and cannot be replayed from here on"
    );
}

/// Opens the file behind its last whole line; says how long it is. A start follows, so that what
/// a crash tore off is missed by nobody.
fn open(path: &Path) -> io::Result<(File, u64)> {
    let mut file = OpenOptions::new().create(true).read(true).append(true).open(path)?;
    let (end, length) = whole_end(&mut file)?;
    if end < length {
        file.set_len(end)?;
    }
    Ok((file, end))
}

/// Writes lines as they come, some at once, until nobody is left to send any. The first one, the
/// start, is written at once.
async fn write(mut file: tokio::fs::File, mut lines: mpsc::Receiver<Vec<u8>>, path: PathBuf) {
    let mut buffer = Vec::with_capacity(BUFFER);
    let (mut open, mut wait) = (true, Duration::ZERO);
    while open {
        match lines.recv().await {
            Some(line) => buffer.extend(line),
            None => return,
        }
        let deadline = Instant::now() + wait;
        wait = FLUSH;
        while buffer.len() < BUFFER {
            match timeout_at(deadline, lines.recv()).await {
                Ok(Some(line)) => buffer.extend(line),
                Ok(None) => {
                    open = false;
                    break;
                }
                Err(_) => break,
            }
        }
        let written = match file.write_all(&buffer).await {
            Ok(()) => file.flush().await,
            Err(error) => Err(error),
        };
        if let Err(error) = written {
            return warn(&path, &error);
        }
        buffer.clear();
    }
}
