//! Checkpoints: safetensors parts, a manifest with a hash of every file, written aside and
//! renamed.
//!
//! A checkpoint is one more holder of slices (DESIGN.md §3), so it is cut as training state
//! is: every worker writes the slices that it owns first ([`write_part`]), then one process
//! looks whether every slice is there exactly once, writes the manifest and renames the
//! folder ([`complete`]). Until that rename nothing that reads checkpoints sees the folder, so
//! a crash at any point leaves the checkpoints before it as they were.
//!
//! ```text
//! checkpoints/
//!   step-00000100.g3.partial/     being written by generation 3
//!   step-00000050/                complete
//!     manifest.json               what is in it; sealed with its own hash
//!     part-w1.safetensors         slice-0.weight, slice-0.m, slice-0.v, slice-1.weight, …
//!     part-w2.safetensors
//!     tokenizer.json              so that the folder is enough to generate text
//! ```
//!
//! Reading trusts nothing ([`Checkpoint::open`]): the manifest's seal, its version, the size
//! and hash of every file, and the hash of each slice's weights as it is handed out. The hash
//! of all weights is taken over the hashes of the slices, so it does not depend on which
//! worker wrote which part.

mod checkpoint;
mod complete;
mod error;
mod files;
mod folder;
mod manifest;
mod part;

pub use checkpoint::{Checkpoint, Found, Refused, complete_steps, newest_intact, newest_intact_until};
pub use complete::{complete, prune};
pub use error::CheckpointError;
pub use manifest::{MANIFEST_VERSION, Manifest, SavedFile};
pub use part::{slice_hash, weights_hash, write_part};

#[cfg(target_endian = "big")]
compile_error!("checkpoints hold little-endian fp32, which is written and read here without swapping");
