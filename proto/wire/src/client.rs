//! Both ends of a gRPC connection, with the settings that the two must agree on.

use crate::limits::MAX_MESSAGE;
use crate::{Coordinator, CoordinatorClient, CoordinatorServer};
use std::error::Error;
use std::time::Duration;
use tonic::transport::{Channel, Endpoint};

/// How long a client waits for what. All of them are derived from the failure budget by
/// whoever reads the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// For the connection to stand.
    pub connect: Duration,
    /// An idle connection is asked for a sign of life this often.
    pub keep_alive: Duration,
    /// A connection without that sign is closed after this.
    pub keep_alive_timeout: Duration,
}

/// There is no connection to the coordinator.
#[derive(Debug, thiserror::Error)]
pub enum CannotConnect {
    /// The address is none.
    #[error("{address:?} is no address of a coordinator: write HOST:PORT, such as 127.0.0.1:7070")]
    Address {
        /// What was given.
        address: String,
    },
    /// Nobody answers there.
    #[error(
        "no coordinator answers at {address} ({reason}): check that it runs and that the address is the one it printed"
    )]
    Nobody {
        /// Where.
        address: String,
        /// The innermost cause, as the system words it.
        reason: String,
    },
}

/// Connects to the coordinator at `HOST:PORT`.
///
/// # Errors
/// The address is none, or nobody answers within `timeouts.connect`.
pub async fn connect(address: &str, timeouts: Timeouts) -> Result<CoordinatorClient<Channel>, CannotConnect> {
    let bad = || CannotConnect::Address { address: address.to_owned() };
    let (host, port) = address.rsplit_once(':').ok_or_else(bad)?;
    if host.is_empty() || host.contains('/') || port.parse::<u16>().is_err() {
        return Err(bad());
    }
    let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(|_| bad())?;
    let endpoint = endpoint
        .connect_timeout(timeouts.connect)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(timeouts.keep_alive)
        .keep_alive_timeout(timeouts.keep_alive_timeout)
        .keep_alive_while_idle(true);
    match endpoint.connect().await {
        Ok(channel) => Ok(CoordinatorClient::new(channel)
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE)),
        Err(error) => Err(CannotConnect::Nobody { address: address.to_owned(), reason: innermost(&error) }),
    }
}

/// The gRPC service around an implementation, with the size limits of the protocol.
pub fn serve<T: Coordinator>(coordinator: T) -> CoordinatorServer<T> {
    CoordinatorServer::new(coordinator)
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE)
}

/// tonic's own text is "transport error"; what a person can act on is at the end of the chain.
fn innermost(error: &dyn Error) -> String {
    let mut at = error;
    while let Some(source) = at.source() {
        at = source;
    }
    at.to_string()
}
