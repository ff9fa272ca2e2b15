//! Hugging Face's and Meta's folders of a Llama, to the flat model and back.
//!
//! ```text
//! Hugging Face                        Meta
//!   config.json                         params.json
//!   model.safetensors, or               consolidated.00.pth, consolidated.01.pth, …
//!   model-00001-of-00003.safetensors    tokenizer.model
//!   model.safetensors.index.json
//!   tokenizer.json
//! ```
//!
//! A [`Folder`] is opened with every tensor checked to be there, of its shape and wholly within
//! its file, and then read piece by piece: any elements of the flat model ([`Source`]), or rows
//! of its tensors by their own names ([`Named`]). An [`Export`] is a flat model on its way into
//! one of the layouts. [`verify`] computes logits from both by [`logits`], a forward pass that
//! shares nothing with the conversion, and with an engine in between: what was renamed, split or
//! permuted wrongly is not written.
//!
//! Nothing that is read is trusted or run: a `.pth` file's pickle is a program, of which the few
//! words that describe tensors are understood. This crate knows nothing of training, runs or
//! checkpoints.

mod check;
mod config;
mod dtype;
mod error;
mod export;
mod files;
mod folder;
mod layout;
mod params;
mod pickle;
mod pth;
mod reference;
mod safetensors;
mod settings;
mod source;

pub use check::{TOLERANCE, compare, verify};
pub use dtype::Dtype;
pub use error::PretrainedError;
pub use export::{Beside, Export, check_free};
pub use folder::{Folder, kind};
pub use layout::Convention;
pub use reference::{Prompts, logits};
pub use source::{Flat, Named, Source};

#[cfg(test)]
mod tests;
