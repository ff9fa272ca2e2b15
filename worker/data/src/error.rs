//! Everything that can go wrong between a data path and a batch, said so that the reader can
//! act on it: what happened, to which file, why, and what to do.

use crate::filter::Report;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// What was being done to a file when the operating system refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Listing a directory or looking at a file's size and time.
    Find,
    /// Opening or reading.
    Read,
    /// Creating, writing, syncing or renaming.
    Write,
    /// Removing leftovers.
    Remove,
    /// Taking the lock of the cache folder.
    Lock,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Find => "find",
            Self::Read => "read",
            Self::Write => "write",
            Self::Remove => "remove",
            Self::Lock => "lock",
        })
    }
}

/// Why prepared data is not what its index says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Damage {
    /// The file is not there.
    Gone,
    /// The file has another length in bytes.
    Length {
        /// Bytes that the index promises.
        expected: u64,
        /// Bytes that are there.
        found: u64,
    },
    /// The first bytes are no header of this format and version.
    Header,
    /// The bytes hash to something else.
    Hash,
    /// A token lies outside the vocabulary.
    Token {
        /// The token.
        token: u32,
        /// The size of the vocabulary.
        vocab: u32,
    },
    /// The index cannot be parsed, or is of another version.
    Index(String),
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gone => write!(f, "the file is missing"),
            Self::Length { expected, found } => {
                write!(f, "it should have {expected} bytes and has {found}")
            }
            Self::Header => write!(f, "its header is not that of this format and version"),
            Self::Hash => write!(f, "its content does not match its hash in the index"),
            Self::Token { token, vocab } => {
                write!(f, "it holds token {token}, the vocabulary ends at {vocab}")
            }
            Self::Index(why) => write!(f, "the index is not readable: {why}"),
        }
    }
}

/// Why data cannot be prepared, opened or sampled.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// No data path was given at all.
    #[error(
        "no data path is given; name a directory, a text, JSONL or Parquet file, or cargo:PATH/Cargo.lock"
    )]
    NoPaths,
    /// A data path does not exist.
    #[error("data path {path}: there is no such file or directory")]
    Missing {
        /// The path as given.
        path: PathBuf,
    },
    /// A data path leads to nothing that can be read as text.
    #[error("data path {path} holds no data: {why}")]
    Empty {
        /// The path as given.
        path: PathBuf,
        /// An empty file, or a directory without files of the wanted extensions.
        why: EmptyReason,
    },
    /// Files were found, but not one document was left.
    #[error("no document is left to train on: {report}; give more or other data paths")]
    NothingLeft {
        /// What was read and dropped.
        report: Report,
    },
    /// A named file is not UTF-8.
    #[error(
        "{path} is not UTF-8 text: byte {offset} begins no valid character; convert the file or leave it out"
    )]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// Offset of the first bad byte.
        offset: u64,
    },
    /// A line of a JSONL file or a row of a Parquet file is no record.
    #[error(
        "{path}, record {row}: {why}; a record is {{\"text\": \"…\"}} or {{\"tokens\": [1, 2, …]}}{}",
        .in_directory.then_some(" (found in a directory: leave the extension out of `extensions` to skip such files)")
            .unwrap_or_default()
    )]
    BadRecord {
        /// The file.
        path: PathBuf,
        /// Line or row, counted from 1.
        row: u64,
        /// What is wrong with it.
        why: String,
        /// Whether the file was found in a directory rather than named.
        in_directory: bool,
    },
    /// A Parquet file cannot be read, or has neither column.
    #[error("{path} cannot be read as Parquet: {why}")]
    BadParquet {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A ready token is outside the vocabulary.
    #[error(
        "{path}, record {row}: token {token} is outside the vocabulary of {vocab}; raise the model's vocabulary or use the tokens of its tokenizer"
    )]
    TokenOutside {
        /// The file.
        path: PathBuf,
        /// Line or row, counted from 1.
        row: u64,
        /// The token.
        token: u64,
        /// Size of the vocabulary.
        vocab: u32,
    },
    /// Text and ready tokens, and no tokenizer that made the tokens.
    #[error(
        "the data holds both text and ready tokens, and a tokenizer trained here cannot match tokens made elsewhere; give the tokenizer.json that made them"
    )]
    Mixed,
    /// The vocabulary cannot hold the tokens that every tokenizer needs.
    #[error(
        "a vocabulary of {vocab} is too small: 3 special tokens, 256 bytes and the space mark need {least}"
    )]
    VocabTooSmall {
        /// As asked for.
        vocab: u32,
        /// The least that works.
        least: u32,
    },
    /// A tokenizer has more tokens than the model.
    #[error(
        "tokenizer {path} has {tokens} tokens and the model's vocabulary is {vocab}; raise the vocabulary to at least {tokens}"
    )]
    TokenizerTooLarge {
        /// The tokenizer's file.
        path: PathBuf,
        /// Its size.
        tokens: u32,
        /// The model's.
        vocab: u32,
    },
    /// A tokenizer cannot be read, trained or used.
    #[error("tokenizer {path}: {why}")]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A Cargo.lock cannot be understood.
    #[error("{path} is no Cargo.lock: {why}")]
    BadLock {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// None of a lock file's crates is unpacked on this machine.
    #[error(
        "none of the {named} registry crates in {lock} is unpacked below {looked_in}; run `cargo fetch` beside that lock file, or give --data another path"
    )]
    NoCrates {
        /// The lock file.
        lock: PathBuf,
        /// Registry crates that it names.
        named: usize,
        /// Where they would be.
        looked_in: PathBuf,
    },
    /// The operating system refused.
    #[error("cannot {action} {path}: {source}{}", advice(.source))]
    Io {
        /// What was tried.
        action: Action,
        /// On which file or folder.
        path: PathBuf,
        /// The refusal.
        source: io::Error,
    },
    /// Prepared data is not what its index says.
    #[error(
        "prepared data {path} is damaged: {damage}; remove its folder, and the next start prepares it again"
    )]
    Damaged {
        /// The damaged file.
        path: PathBuf,
        /// How.
        damage: Damage,
    },
    /// Fewer tokens than one sequence needs.
    #[error(
        "the data has {tokens} tokens and one sequence needs {needed} (its length and the token after it); add data or shorten the sequence"
    )]
    TooFewTokens {
        /// Tokens in the stream.
        tokens: u64,
        /// Least that works.
        needed: u64,
    },
    /// A batch shape with a zero in it.
    #[error(
        "a batch of {lanes} lanes × {micro_batches} micro-batches × {sequences} sequences × {sequence_length} tokens is empty; every factor must be at least 1"
    )]
    EmptyBatch {
        /// Lanes.
        lanes: u32,
        /// Micro-batches per lane.
        micro_batches: u32,
        /// Sequences per micro-batch.
        sequences: u32,
        /// Tokens per sequence.
        sequence_length: u32,
    },
    /// A step, lane or micro-batch that the run does not have.
    #[error(
        "there is no batch at step {step}, lane {lane}, micro-batch {micro_batch}: steps count from 1, this run has {lanes} lanes of {micro_batches} micro-batches"
    )]
    NoSuchBatch {
        /// Step.
        step: u64,
        /// Lane.
        lane: u32,
        /// Micro-batch.
        micro_batch: u32,
        /// Lanes of the run.
        lanes: u32,
        /// Micro-batches per lane of the run.
        micro_batches: u32,
    },
    /// A sample that the run does not have.
    #[error(
        "there is no sample {index} at step {step}: steps count from 1, this run has {samples} samples a step"
    )]
    NoSuchSample {
        /// Step.
        step: u64,
        /// Sample within the step.
        index: u64,
        /// Samples per step of the run.
        samples: u64,
    },
}

/// Why a path that exists gives nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EmptyReason {
    /// A file of zero bytes.
    File,
    /// A directory without a file of these extensions.
    Directory(Vec<String>),
    /// Neither file nor directory: a socket, a device.
    Special,
}

impl fmt::Display for EmptyReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File => write!(f, "the file is empty"),
            Self::Directory(extensions) => {
                write!(f, "no non-empty file below it ends in .{}", extensions.join(", ."))?;
                write!(f, " (hidden files and cache folders are not looked at); set `extensions` for others")
            }
            Self::Special => write!(f, "it is neither a file nor a directory"),
        }
    }
}

impl DataError {
    /// Wraps a refusal of the operating system.
    pub(crate) fn io(action: Action, path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        move |source| Self::Io { action, path: path.to_owned(), source }
    }

    pub(crate) fn damaged(path: &Path, damage: Damage) -> Self {
        Self::Damaged { path: path.to_owned(), damage }
    }
}

/// What to do about a full disk; nothing is said where there is nothing to advise.
fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            "; free some space or choose a cache folder on another disk, nothing half-written was left behind"
        }
        io::ErrorKind::PermissionDenied => "; check the permissions of the file and its folder",
        _ => "",
    }
}
