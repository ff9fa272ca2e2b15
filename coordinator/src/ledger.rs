//! The ledger: the committed history of a run, one line a step, each chained to the one before.
//!
//! From it alone anybody can tell which steps a run has committed, with which samples, by whom;
//! `caravan audit` proves from it that every sample counted exactly once (invariant D-1). So it
//! is something that the run depends on: a step is in the ledger before people are shown it, and
//! a ledger that cannot be written ends the run.
//!
//! A line is
//!
//! ```text
//! {"hash":"<64 hexadecimal digits>","entry":{"kind":"step","step":7,…}}
//! ```
//!
//! where the hash is BLAKE3 over the 32 bytes of the hash before it (zeros before the first one)
//! and the entry's bytes as they stand there. Lines are only ever added. The history that they
//! tell is read from top to bottom: a `step` is the one after the newest, and so is a `skip`, which
//! has changed no weights; a `back` takes away all steps after the one that the run went back to;
//! a `halt` changes nothing.
//!
//! A step is not worth an fsync, which takes as long as a step of a small model. What outlives a
//! crash of the host is: before the store remembers a generation, a plan or a checkpoint, before
//! a checkpoint gets its manifest, and at the end, the ledger is made durable. Whatever there is
//! after a crash, the ledger knows how it came to be. A crash may leave half a last line; nobody
//! was told of that step, and opening cuts it off. Anything else that does not fit is refused.

mod error;
mod read;
mod write;

pub use error::{Disorder, Flaw, LedgerError};
pub use read::{Line, Reader, after, newest};
pub use write::Ledger;

use caravan_types::{Digest, Generation, NotFinite, RunSpec, Step, WorkerId};
use serde::{Deserialize, Serialize};

/// Version of the ledger's format; a reader refuses any other.
pub const FORMAT: u32 = 2;

/// One line of the ledger.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Entry {
    /// The first one.
    Open {
        /// [`FORMAT`].
        version: u32,
        /// [`spec_digest`] of the run.
        spec: Digest,
        /// The step that the ledger begins after: 0, unless its earlier part was lost.
        base: Step,
        /// Milliseconds since the Unix epoch, by the coordinator's clock.
        unix_ms: u64,
    },
    /// A step was committed.
    Step {
        /// The step.
        step: Step,
        /// The generation that committed it.
        generation: Generation,
        /// Mean loss over the counted tokens, in nats.
        #[serde(with = "caravan_types::exact")]
        loss: f64,
        /// Global gradient norm before clipping.
        #[serde(with = "caravan_types::exact")]
        norm: f64,
        /// Counted tokens of the global batch.
        tokens: u64,
        /// Number of its first sample, counted from 0 over the whole run.
        first: u64,
        /// One past the number of its last sample.
        end: u64,
        /// Members of the plan that committed it, ascending.
        members: Vec<WorkerId>,
        /// As in `open`.
        unix_ms: u64,
    },
    /// A step passed without an update, since its loss or gradient is not finite: its samples are
    /// used up.
    Skip {
        /// As in `step`.
        step: Step,
        /// As in `step`.
        generation: Generation,
        /// As in `step`.
        #[serde(with = "caravan_types::exact")]
        loss: f64,
        /// As in `step`.
        #[serde(with = "caravan_types::exact")]
        norm: f64,
        /// As in `step`.
        tokens: u64,
        /// As in `step`.
        first: u64,
        /// As in `step`.
        end: u64,
        /// As in `step`.
        members: Vec<WorkerId>,
        /// As in `open`.
        unix_ms: u64,
    },
    /// The run ended before a step whose loss or gradient is not finite; that step is not a part
    /// of the history.
    Halt {
        /// The step.
        step: Step,
        /// What is not finite.
        what: NotFinite,
        /// As in `open`.
        unix_ms: u64,
    },
    /// The run goes back to a checkpoint, or to its seed.
    Back {
        /// The newest step of the history until now.
        from: Step,
        /// The newest one from now on.
        to: Step,
        /// As in `open`.
        unix_ms: u64,
    },
}

/// The digest of a run spec that a ledger carries: BLAKE3 over its compact JSON, in which every
/// number has all its bits.
#[must_use]
pub fn spec_digest(spec: &RunSpec) -> Digest {
    // A run spec has only text keys and plain values, so it always becomes JSON.
    let json = serde_json::to_vec(spec).unwrap_or_default();
    Digest(*blake3::hash(&json).as_bytes())
}

/// What stands before the hash, between it and the entry, and behind that.
const HEAD: &str = "{\"hash\":\"";
const MIDDLE: &str = "\",\"entry\":";
const TAIL: &str = "}";

/// The hash of an entry in its place.
fn chained(before: Digest, entry: &[u8]) -> Digest {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&before.0).update(entry);
    Digest(*hasher.finalize().as_bytes())
}

/// The line of an entry behind the line with the hash `before`, with its line break, and its
/// own hash.
#[must_use]
pub fn line(before: Digest, entry: &Entry) -> (Vec<u8>, Digest) {
    // Text keys and plain values again; numbers that are not finite are written as text.
    let json = serde_json::to_vec(entry).unwrap_or_default();
    let hash = chained(before, &json);
    let hex = hash.to_string();
    let parts = [HEAD.as_bytes(), hex.as_bytes(), MIDDLE.as_bytes(), &json, TAIL.as_bytes(), b"\n"];
    (parts.concat(), hash)
}

#[cfg(test)]
mod tests;
