//! Reading a ledger back: the chain, and what may follow what.

use super::error::{Disorder, Flaw};
use super::{Entry, FORMAT, HEAD, MIDDLE, TAIL, chained};
use crate::lines::{Lines, RawLine};
use caravan_types::{Digest, Step};
use serde::Deserialize;
use std::fs::File;
use std::io;
use std::path::Path;

/// Hexadecimal digits of a hash.
const DIGITS: usize = 64;

/// Reads a ledger line by line, also where it is damaged: whoever looks for what is wrong wants
/// to see what is behind it, too.
#[derive(Debug)]
pub struct Reader {
    lines: Lines,
    before: Digest,
}

/// A line as it stands in the file.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    /// From 1.
    pub number: u64,
    /// Where it starts in the file.
    pub offset: u64,
    /// The hash that it gives itself, if any.
    pub hash: Option<Digest>,
    /// What it says, where that can be read, whether or not its hash fits.
    pub entry: Option<Entry>,
    /// The version of the format where it is another one.
    pub other_version: Option<u64>,
    /// The first thing that is wrong with it.
    pub flaw: Option<Flaw>,
}

impl Reader {
    /// Opens a ledger.
    ///
    /// # Errors
    /// Where the file cannot be opened.
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::new(File::open(path)?)
    }

    pub(crate) fn new(file: File) -> io::Result<Self> {
        Ok(Self { lines: Lines::new(file)?, before: Digest::default() })
    }

    /// Where the next line starts.
    pub(crate) fn offset(&self) -> u64 {
        self.lines.offset()
    }

    /// The next line; none at the end.
    ///
    /// # Errors
    /// Where the file cannot be read.
    pub fn next_line(&mut self) -> io::Result<Option<Line>> {
        let Some(raw) = self.lines.next()? else { return Ok(None) };
        let line = parse(raw, self.before);
        self.before = line.hash.unwrap_or(self.before);
        Ok(Some(line))
    }
}

fn parse(raw: RawLine<'_>, before: Digest) -> Line {
    let RawLine { number, offset, text, whole } = raw;
    let mut line = Line { number, offset, hash: None, entry: None, other_version: None, flaw: None };
    if !whole {
        line.flaw = Some(Flaw::Torn);
        return line;
    }
    let Some((hash, json)) = parts(text) else {
        line.flaw = Some(Flaw::Form);
        return line;
    };
    line.hash = Some(hash);
    if chained(before, json) != hash {
        line.flaw = Some(Flaw::Chain);
    }
    if number == 1 {
        line.other_version = version(json).filter(|version| *version != u64::from(FORMAT));
    }
    match serde_json::from_slice(json) {
        Ok(entry) => line.entry = Some(entry),
        Err(error) => line.flaw = line.flaw.or(Some(Flaw::Entry(error.to_string()))),
    }
    line
}

/// The hash and the entry's bytes.
fn parts(text: &[u8]) -> Option<(Digest, &[u8])> {
    let (hex, rest) = text.strip_prefix(HEAD.as_bytes())?.split_at_checked(DIGITS)?;
    let hash: Digest = std::str::from_utf8(hex).ok()?.parse().ok()?;
    if hash.to_string().as_bytes() != hex {
        // A digest has one text form, in lower case.
        return None;
    }
    Some((hash, rest.strip_prefix(MIDDLE.as_bytes())?.strip_suffix(TAIL.as_bytes())?))
}

/// The version in an entry that may be of any version.
fn version(json: &[u8]) -> Option<u64> {
    #[derive(Deserialize)]
    struct AnyVersion {
        version: u64,
    }
    serde_json::from_slice(json).ok().map(|any: AnyVersion| any.version)
}

/// The newest step of the history in a ledger, as far as it can be read; none where there is no
/// ledger. A checkpoint of a later step is of steps that the run has given up.
///
/// # Errors
/// Where the file is there and cannot be read.
pub fn newest(path: &Path) -> io::Result<Option<Step>> {
    let mut reader = match Reader::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        reader => reader?,
    };
    let mut last = None;
    while let Some(line) = reader.next_line()? {
        // What does not fit is for whoever opens the ledger to refuse.
        let Some(Ok(step)) = line.entry.map(|entry| after(last, &entry)) else { break };
        last = Some(step);
    }
    Ok(last)
}

/// The newest step of the history with one more entry. `last` is the newest one before it, none
/// at the very beginning.
///
/// # Errors
/// Where the entry cannot follow.
pub fn after(last: Option<Step>, entry: &Entry) -> Result<Step, Disorder> {
    let next = |last: Step| last.0.checked_add(1).map(Step);
    match (*last.as_ref().unwrap_or(&Step(0)), entry) {
        (_, Entry::Open { base, .. }) if last.is_none() => Ok(*base),
        (_, Entry::Open { .. }) => Err(Disorder::OpenedTwice),
        _ if last.is_none() => Err(Disorder::NotOpened),
        (last, Entry::Step { step, .. } | Entry::Skip { step, .. }) if next(last) == Some(*step) => Ok(*step),
        (last, Entry::Halt { step, .. }) if next(last) == Some(*step) => Ok(last),
        (last, Entry::Step { step, .. } | Entry::Skip { step, .. } | Entry::Halt { step, .. }) => {
            Err(Disorder::Step { last, found: *step })
        }
        (last, Entry::Back { from, to, .. }) if *from == last && to < from => Ok(*to),
        (last, Entry::Back { from, to, .. }) => Err(Disorder::Back { last, from: *from, to: *to }),
    }
}
