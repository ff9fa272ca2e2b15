//! Model and optimiser on one device.
//!
//! The engine executes [`Task`](caravan_types::task::Task)s in the order given: compute the
//! gradients of lanes, add partial sums up the lane tree, apply an optimiser step, take
//! slices into use, hand them out. It knows lanes, tree nodes and slices; it knows **no
//! ranks, peers or plans**, opens no sockets and reads no files: data and checkpoints come
//! through the two traits [`Batches`] and [`Checkpoints`].
//!
//! Its parts, from the inside out: [`layout`] (where tensors lie in the flat model), [`init`]
//! (weights from the seed), [`model`] (forward and backward of one micro-batch, and the scores of
//! given texts), `gradients` and `state` (what an executor holds), [`Executor`],
//! `diagnose` (where a step went bad), and [`generate`] (decoding).

mod diagnose;
mod error;
mod executor;
mod flaw;
pub mod generate;
mod gradients;
pub mod init;
pub mod layout;
pub mod model;
mod numerics;
mod random;
mod state;
mod watch;

pub use error::EngineError;
pub use executor::{Batches, Checkpoints, Executor};
pub use flaw::Flaw;
pub use generate::{Generator, Sampling};
pub use model::{Model, Score};
pub use numerics::{fastest, peak};
pub use watch::Watch;
