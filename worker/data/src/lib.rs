//! From files to batches: find, deduplicate, tokenise, shard, and sample as a pure function of (seed, step, index).
//!
//! Two halves that meet in a folder. [`prepare()`] turns whatever the user names into a token
//! stream on disk, once; [`Sampler`] reads any step's batch out of it, any number of times, in
//! any order, on any worker. Between them stands [`Dataset`], the folder itself, identified by
//! the hash of its content, so that a run depends on what was read and not on where it lay.
//!
//! ```text
//! Request ─ find ─ read ─ filter ─┬─ train ─ tokenizer ─┐
//!         (cargo_lock)            └─────────── write ───┴─ shards, index ─ Dataset ─ Sampler ─ describe
//! ```
//! This crate knows nothing of lanes' owners, plans or the network.

mod cargo_lock;
mod dataset;
mod describe;
mod error;
mod filter;
mod find;
mod index;
mod permutation;
mod pieces;
mod prepare;
mod progress;
mod read;
mod records;
mod sampler;
mod shards;
mod tokenizer;
mod train;
mod write;

pub use dataset::{Dataset, DocumentPlace};
pub use describe::{DocumentView, SequenceView, StepBatch};
pub use error::{Action, Damage, DataError, EmptyReason};
pub use filter::Report;
pub use find::{Request, TEXT_EXTENSIONS};
pub use prepare::{Origin, Prepared, prepare};
pub use progress::{Progress, Stage};
pub use sampler::{Place, Sampler};
pub use tokenizer::{Decoder, LLAMA_BOS, LLAMA_EOS, Tokenizer};
pub use train::LEAST_VOCAB;
