//! How far a preparation is: numbers out, no drawing in. The command line draws bars, tests
//! count, nobody else cares.

use std::fmt;

/// The steps of a preparation, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Another process prepares in the same cache folder; its result may be the wanted one.
    Wait,
    /// Looking for files. Counts files.
    Find,
    /// Reading, dropping duplicates and generated files, sampling. Counts bytes.
    Read,
    /// Training the tokenizer. Counts its two halves: counting words, and merging.
    Train,
    /// Tokenising and writing shards. Counts bytes of input.
    Write,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Wait => "waiting for another preparation",
            Self::Find => "finding files",
            Self::Read => "reading and dropping duplicates",
            Self::Train => "training the tokenizer",
            Self::Write => "writing token shards",
        })
    }
}

/// Receives progress. Called from the preparing thread, at least at the start (`done` = 0)
/// and at the end (`done` = `total`) of each stage.
pub trait Progress {
    /// `done` of `total` are done in `stage`; a `total` of 0 is not known yet.
    fn update(&self, stage: Stage, done: u64, total: u64);
}

/// For callers that do not show progress.
impl Progress for () {
    fn update(&self, _stage: Stage, _done: u64, _total: u64) {}
}
