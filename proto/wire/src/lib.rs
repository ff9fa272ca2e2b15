//! Caravan on the wire: the .proto files, the gRPC stubs, and checked conversions to and from
//! the types.
//!
//! Nothing behind this crate meets a malformed message: what comes from outside is a [`pb`]
//! value until `TryFrom` has held it to its [`limits`] and made it a value of caravan-types.
//! The way out is `From`, which cannot fail. The checks are those that need no knowledge of
//! the run (a number in range, a set that is one, a known variant); whether a message makes
//! sense now is for the two cores to say.
//!
//! Two protocols live here, because both carry the same `PROTOCOL_VERSION`:
//! - gRPC between worker and coordinator: [`Up`], [`Down`], [`connect`], [`serve`];
//! - the frames of the fabric between workers, as pure bytes: [`frame`].

mod client;
mod convert;
pub mod error;
pub mod frame;
pub mod limits;
mod session;
#[cfg(test)]
mod strategies;

pub use client::{CannotConnect, Timeouts, connect, serve};
pub use error::{Malformed, Why};
pub use limits::MAX_MESSAGE;
pub use pb::coordinator_client::CoordinatorClient;
pub use pb::coordinator_server::{Coordinator, CoordinatorServer};
pub use session::{Down, Up};

/// The messages of `proto/caravan/v1`, as prost makes them. They are documented there.
#[allow(missing_docs, clippy::all, clippy::too_many_lines)]
pub mod pb {
    tonic::include_proto!("caravan.v1");
}
