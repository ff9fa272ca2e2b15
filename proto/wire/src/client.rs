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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Malformed, pb};
    use caravan_types::status::{Snapshot, WorkerStatus};
    use std::net::SocketAddr;
    use tokio::net::TcpListener;
    use tokio_stream::wrappers::TcpListenerStream;
    use tonic::{Request, Response, Status, Streaming};

    const TIMEOUTS: Timeouts = Timeouts {
        connect: Duration::from_secs(5),
        keep_alive: Duration::from_secs(5),
        keep_alive_timeout: Duration::from_secs(5),
    };

    /// Answers `Status` with so many workers, and refuses the rest.
    struct Crowd(usize);

    #[tonic::async_trait]
    impl Coordinator for Crowd {
        type SessionStream = tokio_stream::Empty<Result<pb::ToWorker, Status>>;
        type EventsStream = tokio_stream::Empty<Result<pb::LoggedEvent, Status>>;

        async fn session(
            &self,
            _: Request<Streaming<pb::FromWorker>>,
        ) -> Result<Response<Self::SessionStream>, Status> {
            Err(Malformed { field: "FromWorker.message", why: crate::Why::OutOfPlace }.into())
        }

        async fn status(&self, _: Request<pb::StatusRequest>) -> Result<Response<pb::Snapshot>, Status> {
            Ok(Response::new(crowd(self.0).into()))
        }

        async fn events(
            &self,
            _: Request<pb::EventsRequest>,
        ) -> Result<Response<Self::EventsStream>, Status> {
            Ok(Response::new(tokio_stream::empty()))
        }

        async fn drain(&self, _: Request<pb::DrainRequest>) -> Result<Response<pb::DrainReply>, Status> {
            Err(Status::unimplemented("nothing to drain"))
        }
    }

    fn crowd(workers: usize) -> Snapshot {
        let worker = WorkerStatus {
            worker: caravan_types::WorkerId(1),
            name: "w".repeat(1000),
            member: true,
            lanes: (0, 1),
            owned_slices: 1,
            activity: caravan_types::message::Activity::Computing,
            applied: caravan_types::Step(1),
            silent_ms: 0,
        };
        Snapshot { workers: vec![worker; workers], ..Snapshot::default() }
    }

    async fn start(crowd: Crowd) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tonic::transport::Server::builder().add_service(serve(crowd));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        address
    }

    /// tonic's default of 4 MiB is less than a plan of a large model.
    #[tokio::test]
    async fn a_message_beyond_the_usual_four_mebibytes_arrives() {
        let address = start(Crowd(5000)).await.to_string();
        let mut client = connect(&address, TIMEOUTS).await.unwrap();
        let snapshot = client.status(pb::StatusRequest {}).await.unwrap().into_inner();
        assert_eq!(Snapshot::try_from(snapshot), Ok(crowd(5000)));
    }

    #[tokio::test]
    async fn a_malformed_message_is_answered_with_what_is_wrong() {
        let address = start(Crowd(0)).await.to_string();
        let mut client = connect(&address, TIMEOUTS).await.unwrap();
        let status = client.session(tokio_stream::empty()).await.unwrap_err();
        assert_eq!(status.code(), tonic::Code::InvalidArgument);
        assert!(status.message().contains("FromWorker.message"), "{status}");
    }

    #[tokio::test]
    async fn an_address_that_is_none_is_told_from_one_where_nobody_answers() {
        for bad in ["", "coordinator", ":7070", "http://127.0.0.1:7070", "127.0.0.1:port", "a b:1"] {
            let error = connect(bad, TIMEOUTS).await.unwrap_err();
            assert!(matches!(error, CannotConnect::Address { .. }), "{bad:?} gave {error}");
        }
        let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let error = connect(&free.to_string(), TIMEOUTS).await.unwrap_err();
        assert!(error.to_string().contains("refused"), "{error}");
    }
}
