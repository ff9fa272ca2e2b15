//! Writing the ledger.

use super::error::{Flaw, LedgerError};
use super::read::{Reader, after};
use super::{Entry, FORMAT, line, spec_digest};
use crate::clock::unix_ms;
use caravan_types::message::Committed;
use caravan_types::{Digest, NotFinite, RunSpec, Step, Verdict, WorkerId};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A ledger that is open for writing. The coordinator's store keeps a second one away.
#[derive(Debug)]
pub struct Ledger {
    file: Arc<File>,
    path: PathBuf,
    /// Length of the file: all of it whole lines.
    bytes: u64,
    /// Of the last line.
    hash: Digest,
    /// The newest step of the history.
    last: Step,
    /// Steps of the history that passed without an update.
    skipped: Vec<Step>,
    /// Samples of a step.
    samples: u64,
    /// Whether there is something that a crash of the host could take away.
    dirty: bool,
}

/// What a ledger was found to say.
struct Contents {
    bytes: u64,
    hash: Digest,
    last: Option<Step>,
    skipped: Vec<Step>,
    /// The newest step, unless that is the one that the run last went back to.
    tail: Option<Committed>,
    /// Bytes at the end that are half a line.
    torn: u64,
}

impl Ledger {
    /// Opens the ledger of a run that goes on from `checkpoint`, or begins one, and says which
    /// step was committed last. Blocks on the disk, and reads all of the file: a gigabyte, which
    /// are four million steps of eight members, takes some seconds.
    ///
    /// # Errors
    /// Where the file cannot be used, or does not say what was written to it.
    pub fn open(
        path: &Path,
        spec: &RunSpec,
        checkpoint: Option<Step>,
    ) -> Result<(Self, Option<Committed>), LedgerError> {
        let file = OpenOptions::new().create(true).read(true).append(true).open(path);
        let file = file.map_err(io_error("open", path))?;
        let found = read(path, &file, spec)?;
        if found.torn > 0 {
            tracing::warn!(
                file = %path.display(), bytes = found.torn,
                "the ledger ends in a line that was not written to its end (a crash, or a full disk); nobody was \
                 told of that step, it is cut off"
            );
            let cut = file.set_len(found.bytes).and_then(|()| file.sync_all());
            cut.map_err(io_error("cut off the end of", path))?;
        }
        let mut ledger = Self {
            file: Arc::new(file),
            path: path.to_owned(),
            bytes: found.bytes,
            hash: found.hash,
            last: found.last.unwrap_or_default(),
            skipped: found.skipped,
            samples: spec.batch.sequences_per_step(),
            dirty: false,
        };
        let base = checkpoint.unwrap_or_default();
        if found.last.is_none() {
            ledger.begin(spec, base)?;
        } else if ledger.last < base {
            return Err(LedgerError::Behind { path: ledger.path, last: ledger.last, base });
        }
        let tail = match found.tail {
            None => committed(path, &ledger.file, ledger.last)?,
            tail => tail,
        };
        Ok((ledger, tail))
    }

    /// Writes the first line, and makes the file and its name durable.
    fn begin(&mut self, spec: &RunSpec, base: Step) -> Result<(), LedgerError> {
        if base > Step(0) {
            tracing::warn!(
                step = base.0,
                "the run goes on from a checkpoint and has no ledger of the steps before it: what it was trained on \
                 until there cannot be proved"
            );
        }
        let entry = Entry::Open { version: FORMAT, spec: spec_digest(spec), base, unix_ms: unix_ms() };
        let (bytes, hash) = line(self.hash, &entry);
        let written = (&*self.file).write_all(&bytes).and_then(|()| self.file.sync_all());
        written.map_err(io_error("write", &self.path))?;
        let folder = self.path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let synced = File::open(folder).and_then(|folder| folder.sync_all());
        synced.map_err(io_error("make durable the folder of", &self.path))?;
        (self.bytes, self.hash, self.last) = (self.bytes + bytes.len() as u64, hash, base);
        Ok(())
    }

    /// The newest step of the history.
    #[must_use]
    pub fn last(&self) -> Step {
        self.last
    }

    /// Steps of the history that passed without an update.
    #[must_use]
    pub fn skipped(&self) -> u64 {
        self.skipped.len() as u64
    }

    /// Notes that the run ends before a step that is not finite.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub async fn halt(&mut self, step: Step, what: NotFinite) -> Result<(), LedgerError> {
        self.add(Entry::Halt { step, what, unix_ms: unix_ms() }).await
    }

    /// Adds a step, or that it was skipped.
    ///
    /// # Errors
    /// [`LedgerError::Gap`] where it is not the next one, and where the disk says no. The ledger
    /// must not be used any more then, only opened anew.
    pub async fn step(&mut self, committed: &Committed, members: &[WorkerId]) -> Result<(), LedgerError> {
        let Committed { generation, step, loss, norm, tokens, took_ms: _ } = *committed;
        if Some(step.0) != self.last.0.checked_add(1) {
            return Err(self.gap(step));
        }
        let end = step.0.saturating_mul(self.samples);
        let first = end.saturating_sub(self.samples);
        let (members, unix_ms) = (members.to_vec(), unix_ms());
        let entry = match committed.verdict() {
            Verdict::Update { .. } => {
                Entry::Step { step, generation, loss, norm, tokens, first, end, members, unix_ms }
            }
            Verdict::Skip => {
                self.skipped.push(step);
                Entry::Skip { step, generation, loss, norm, tokens, first, end, members, unix_ms }
            }
        };
        self.add(entry).await?;
        self.last = step;
        Ok(())
    }

    /// A plan that starts from step `base` is about to be in force: where that is before the
    /// newest step, the run goes back.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub async fn goes_on_from(&mut self, base: Step) -> Result<(), LedgerError> {
        if base > self.last {
            return Err(self.gap(base));
        }
        if base < self.last {
            self.add(Entry::Back { from: self.last, to: base, unix_ms: unix_ms() }).await?;
            self.last = base;
            self.skipped.retain(|step| *step <= base);
        }
        Ok(())
    }

    /// Makes durable what is in it now, beside whatever else is done with it.
    ///
    /// # Errors
    /// Where the disk says no.
    pub fn durable(&self) -> impl Future<Output = Result<(), LedgerError>> + Send + use<> {
        let (file, path) = (Arc::clone(&self.file), self.path.clone());
        async move {
            let synced = blocking(move || file.sync_data()).await;
            synced.map_err(io_error("make durable", &path))
        }
    }

    /// Makes everything durable.
    ///
    /// # Errors
    /// Where the disk says no.
    pub async fn sync(&mut self) -> Result<(), LedgerError> {
        if self.dirty {
            let file = Arc::clone(&self.file);
            let synced = blocking(move || file.sync_data()).await;
            synced.map_err(io_error("make durable", &self.path))?;
            self.dirty = false;
        }
        Ok(())
    }

    /// From now on the disk is full.
    #[cfg(test)]
    pub(crate) fn fill_disk(&mut self) {
        // The device that is always full stands in for the file: the same system calls fail.
        self.file = Arc::new(OpenOptions::new().append(true).open("/dev/full").unwrap());
    }

    fn gap(&self, step: Step) -> LedgerError {
        LedgerError::Gap { path: self.path.clone(), step, last: self.last }
    }

    async fn add(&mut self, entry: Entry) -> Result<(), LedgerError> {
        let (bytes, hash) = line(self.hash, &entry);
        let (file, before, length) = (Arc::clone(&self.file), self.bytes, bytes.len() as u64);
        let write = move || {
            (&*file).write_all(&bytes).inspect_err(|_| {
                // Half a line is as good as none. Where it cannot be taken back, opening does it.
                file.set_len(before).ok();
            })
        };
        blocking(write).await.map_err(io_error("write to", &self.path))?;
        (self.bytes, self.hash, self.dirty) = (before + length, hash, true);
        Ok(())
    }
}

/// Lets a disk be slow without holding up sessions.
async fn blocking(work: impl FnOnce() -> io::Result<()> + Send + 'static) -> io::Result<()> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| Err(io::Error::other(e)))
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> LedgerError {
    let path = path.to_path_buf();
    move |source| LedgerError::Io { action, path, source }
}

/// Reads a ledger from end to end.
fn read(path: &Path, file: &File, spec: &RunSpec) -> Result<Contents, LedgerError> {
    let failed = |e| io_error("read", path)(e);
    let (last, tail, skipped) = (None, None, Vec::new());
    let mut found = Contents { bytes: 0, hash: Digest::default(), last, skipped, tail, torn: 0 };
    let mut reader = file.try_clone().and_then(Reader::new).map_err(failed)?;
    while let Some(line) = reader.next_line().map_err(failed)? {
        if let Some(found) = line.other_version {
            return Err(LedgerError::Version { path: path.to_owned(), found });
        }
        let damaged = |flaw| LedgerError::Damaged { path: path.to_owned(), line: line.number, flaw };
        let (hash, entry) = match (line.flaw, line.hash, line.entry) {
            (Some(Flaw::Torn), ..) => {
                found.torn = file.metadata().map_err(failed)?.len() - line.offset;
                break;
            }
            (None, Some(hash), Some(entry)) => (hash, entry),
            (flaw, ..) => return Err(damaged(flaw.unwrap_or(Flaw::Form))),
        };
        found.last = Some(after(found.last, &entry).map_err(|disorder| damaged(Flaw::Order(disorder)))?);
        match entry {
            Entry::Open { spec: theirs, .. } => {
                let ours = spec_digest(spec);
                if theirs != ours {
                    return Err(LedgerError::OtherRun { path: path.to_owned(), found: theirs, ours });
                }
            }
            Entry::Step { .. } => found.tail = told(&entry),
            Entry::Skip { step, .. } => {
                found.tail = told(&entry);
                found.skipped.push(step);
            }
            Entry::Halt { .. } => {}
            Entry::Back { to, .. } => {
                found.tail = None;
                found.skipped.retain(|step| *step <= to);
            }
        }
        found.hash = hash;
        found.bytes = reader.offset();
    }
    Ok(found)
}

/// What was told of a step, where an entry is one.
fn told(entry: &Entry) -> Option<Committed> {
    match *entry {
        Entry::Step { generation, step, loss, norm, tokens, .. }
        | Entry::Skip { generation, step, loss, norm, tokens, .. } => {
            Some(Committed { generation, step, loss, norm, tokens, took_ms: 0 })
        }
        Entry::Open { .. } | Entry::Halt { .. } | Entry::Back { .. } => None,
    }
}

/// The last entry of a step in a ledger that is sound; none for the step that it begins after.
/// A second reading, for the rare ledger that ends with a way back: to remember all steps in the
/// first one would take memory for what is hardly ever needed.
fn committed(path: &Path, file: &File, last: Step) -> Result<Option<Committed>, LedgerError> {
    let failed = |e| io_error("read", path)(e);
    let mut reader = file.try_clone().and_then(Reader::new).map_err(failed)?;
    let mut tail = None;
    while let Some(line) = reader.next_line().map_err(failed)? {
        if let Some(committed) = line.entry.as_ref().and_then(told).filter(|c| c.step == last) {
            tail = Some(committed);
        }
    }
    Ok(tail)
}
