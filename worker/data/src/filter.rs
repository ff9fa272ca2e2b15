//! Which documents are worth a token: no exact duplicates, no generated giants.
//!
//! A registry of crates holds many copies of the same file and a few megabytes of generated
//! tables; both would be learnt by heart. What the user names file by file is never judged,
//! only what a directory happens to contain; duplicates go in either case.

use crate::error::DataError;
use crate::find::{InputFile, Kind};
use crate::progress::{Progress, Stage};
use crate::read::{Body, Outcome, read};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::fmt;

/// The largest source file that is taken from a directory. Of the 8,338 Rust files of this
/// project's dependencies a handful are larger, all of them generated tables or bindings.
const GIANT_BYTES: usize = 1 << 20;

/// A source line longer than this was not typed: 80 times the customary width.
const LONG_LINE_BYTES: usize = 8_000;

/// The longest average line of a source file; hand-written ones are at 30 to 45, minified or
/// tabulated ones at several hundred.
const LONG_AVERAGE_BYTES: usize = 200;

/// Where generators sign their work: the head of the file. Beyond it, the words are more
/// likely to be talked about (rustfmt looks at the first five lines for the same reason).
const MARKER_BYTES: usize = 1 << 10;

/// The signatures in use: the one of rustfmt, Phabricator and others, and the one of Go.
const MARKERS: &[&str] = &["@generated", "DO NOT EDIT"];

/// What was read, and what was left out for which reason. Kept in the index of the result.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Report {
    /// Files found.
    pub files: u64,
    /// Documents kept.
    pub documents: u64,
    /// Bytes of kept text (4 per ready token).
    pub bytes: u64,
    /// Documents dropped as exact copies of an earlier one.
    pub duplicates: u64,
    /// Source files dropped as generated.
    pub generated: u64,
    /// Files found in directories that are not UTF-8 text.
    pub not_text: u64,
    /// Records without content.
    pub empty: u64,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} documents ({:.1} MB) of {} files",
            self.documents,
            self.bytes as f64 / 1e6,
            self.files
        )?;
        for (count, what) in [
            (self.duplicates, "duplicates"),
            (self.generated, "generated"),
            (self.not_text, "not UTF-8 text"),
            (self.empty, "empty"),
        ] {
            if count > 0 {
                write!(f, ", {count} {what} left out")?;
            }
        }
        Ok(())
    }
}

/// A document that was kept.
pub(crate) struct Document {
    /// Index of its file.
    pub source: usize,
    /// Row in that file, from 1; 0 for a whole file.
    pub row: u64,
    /// Content.
    pub body: Body,
}

/// Reads all files in order and hands on what is kept; `progress` counts bytes.
pub(crate) fn documents(
    files: &[InputFile],
    vocab: u32,
    progress: (&dyn Progress, Stage),
    each: &mut dyn FnMut(Document) -> Result<(), DataError>,
) -> Result<Report, DataError> {
    let mut report = Report { files: files.len() as u64, ..Report::default() };
    let mut seen = HashSet::new();
    let (total, mut done) = (files.iter().map(|f| f.size).sum(), 0);
    let (progress, stage) = progress;
    progress.update(stage, done, total);
    for (source, file) in files.iter().enumerate() {
        let outcome = read(file, vocab, &mut |row, body| {
            if body.is_empty() {
                report.empty += 1;
            } else if is_generated(file, &body) {
                report.generated += 1;
            } else if !seen.insert(content_key(&body)) {
                report.duplicates += 1;
            } else {
                report.documents += 1;
                report.bytes += match &body {
                    Body::Text(text) => text.len() as u64,
                    Body::Tokens(tokens) => 4 * tokens.len() as u64,
                };
                each(Document { source, row, body })?;
            }
            Ok(())
        })?;
        if outcome == Outcome::NotText {
            report.not_text += 1;
        }
        done += file.size;
        progress.update(stage, done, total);
    }
    Ok(report)
}

/// Half of a BLAKE3 hash: with 2^32 documents, the chance that any two differ and collide in
/// 128 bits is 2^(64 - 1 - 128), and this halves the memory.
fn content_key(body: &Body) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new();
    match body {
        Body::Text(text) => {
            hasher.update(b"text").update(text.as_bytes());
        }
        Body::Tokens(tokens) => {
            hasher.update(b"tokens");
            for token in tokens {
                hasher.update(&token.to_le_bytes());
            }
        }
    }
    let mut key = [0; 16];
    hasher.finalize_xof().fill(&mut key);
    key
}

fn is_generated(file: &InputFile, body: &Body) -> bool {
    let Body::Text(text) = body else { return false };
    if file.named || file.kind != Kind::Text || file.is_prose() {
        return false;
    }
    if text.len() > GIANT_BYTES {
        return true;
    }
    let head = text.floor_char_boundary(MARKER_BYTES.min(text.len()));
    if MARKERS.iter().any(|marker| text[..head].contains(marker)) {
        return true;
    }
    let (mut lines, mut longest) = (0, 0);
    for line in text.lines() {
        lines += 1;
        longest = longest.max(line.len());
    }
    longest > LONG_LINE_BYTES || text.len() > LONG_AVERAGE_BYTES * lines.max(1)
}
