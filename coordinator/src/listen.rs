//! One port for everything: gRPC for workers, HTTP for people and Prometheus.
//!
//! Connections are served as HTTP/1.1 or as HTTP/2 without TLS, by their first bytes. The loop is
//! our own, instead of the web framework's, for what an open port needs: a bound on connections,
//! on the time until the first request, keep-alive for hosts that are cut off, and a line in the
//! log when somebody sends rubbish.

use crate::CoordinatorError;
use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::uri::Authority;
use axum::http::{StatusCode, Version, header};
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};
use caravan_types::Timing;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use socket2::{SockRef, TcpKeepalive};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, oneshot};
use tokio::task::JoinSet;
use tower::ServiceExt;

/// Connections at once: ten thousand workers and a few hundred browsers, fewer where the system
/// does not allow so many open files. Who comes later waits for a place.
const MAX_CONNECTIONS: usize = 10_240;

/// Open files for everything else: the store, the ledger, logs, checkpoints being completed.
const OTHER_FILES: usize = 64;

/// A client that says nothing for so long is no client of ours. Browsers open connections ahead
/// of their use, so this has nothing to do with how soon a dead worker is known.
const FIRST_BYTES: Duration = Duration::from_secs(10);

/// How long to wait when the system cannot accept (no file handles left, say).
const ACCEPT_BACKOFF: Duration = Duration::from_millis(200);

/// The other end of a connection, for log lines.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peer(pub SocketAddr);

/// Takes an address.
pub(crate) async fn bind(address: SocketAddr) -> Result<TcpListener, CoordinatorError> {
    TcpListener::bind(address).await.map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => CoordinatorError::PortTaken { address },
        _ => CoordinatorError::Listen { address, source },
    })
}

/// Serves so many connections at once until it is told to stop; then none is left. A peer that is silent on TCP's
/// level for a few times the failure budget is disconnected.
pub(crate) async fn serve(
    listener: TcpListener,
    app: Router,
    timing: Timing,
    places: usize,
    mut stop: oneshot::Receiver<()>,
) {
    let app = match listener.local_addr() {
        Ok(address) if !address.ip().is_loopback() => app,
        _ => app.layer(from_fn(from_this_machine)),
    };
    let places = Arc::new(Semaphore::new(places));
    let mut connections = JoinSet::new();
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
            _ = &mut stop => return,
        };
        match accepted {
            Ok((stream, peer)) => {
                let app = app.clone();
                connections.spawn(async move {
                    connection(stream, peer, app, timing).await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_BACKOFF).await;
            }
        }
    }
}

/// How many connections there may be at once. The usual bound of 1,024 open files a process is
/// one that a process may raise itself.
pub(crate) fn places() -> usize {
    let bound = getrlimit(Resource::Nofile);
    let wanted = (MAX_CONNECTIONS + OTHER_FILES) as u64;
    // Where there is no bound, it is given as none.
    let (now, most) = (bound.current.unwrap_or(u64::MAX), bound.maximum.unwrap_or(u64::MAX));
    let raised = wanted.min(most);
    let raise = || setrlimit(Resource::Nofile, Rlimit { current: Some(raised), ..bound }).is_ok();
    let allowed = if now < raised && raise() { raised } else { now.min(wanted) };
    (allowed as usize).saturating_sub(OTHER_FILES).max(1)
}

async fn connection(stream: TcpStream, peer: SocketAddr, app: Router, timing: Timing) {
    if let Err(error) = prepare(&stream, timing) {
        tracing::debug!(%peer, %error, "socket options");
    }
    if tokio::time::timeout(FIRST_BYTES, stream.readable()).await.is_err() {
        tracing::debug!(%peer, "closed a connection that said nothing");
        return;
    }
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(FIRST_BYTES);
    builder.http2().timer(TokioTimer::new());
    let service = service_fn(move |mut request: hyper::Request<hyper::body::Incoming>| {
        request.extensions_mut().insert(Peer(peer));
        app.clone().oneshot(request.map(Body::new))
    });
    if let Err(error) = builder.serve_connection(TokioIo::new(stream), service).await {
        match error.downcast_ref::<hyper::Error>() {
            Some(e) if e.is_parse() => {
                tracing::warn!(%peer, error = %e, "somebody sent what is neither HTTP nor gRPC; disconnected");
            }
            // Workers die and browsers are closed; what that means is said elsewhere.
            _ => tracing::debug!(%peer, %error, "a connection ended early"),
        }
    }
}

/// Small messages go out at once; a host that is cut off without a word is noticed.
fn prepare(stream: &TcpStream, timing: Timing) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let every = timing.port_probe();
    let keepalive = TcpKeepalive::new().with_time(every).with_interval(every).with_retries(3);
    SockRef::from(stream).set_tcp_keepalive(&keepalive)
}

/// A page from elsewhere whose name was pointed at 127.0.0.1 (DNS rebinding) would be of our
/// origin to the browser. Its name gives it away: this machine is asked for by address or as
/// `localhost`. No browser speaks HTTP/2 without TLS; workers do, and may use any name.
async fn from_this_machine(request: Request, next: Next) -> Response {
    if request.version() == Version::HTTP_2 {
        return next.run(request).await;
    }
    let named = request.headers().get(header::HOST).and_then(|h| h.to_str().ok()?.parse::<Authority>().ok());
    let host = request.uri().authority().cloned().or(named);
    match host {
        Some(host) if is_this_machine(host.host()) => next.run(request).await,
        Some(host) => {
            let text =
                format!("this coordinator is asked for as localhost or by address, not as {}\n", host.host());
            (StatusCode::MISDIRECTED_REQUEST, text).into_response()
        }
        None => (StatusCode::BAD_REQUEST, "a Host header is missing\n").into_response(),
    }
}

fn is_this_machine(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    host.eq_ignore_ascii_case("localhost") || bare.parse::<IpAddr>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_and_localhost_are_this_machine() {
        for host in ["localhost", "LOCALHOST", "127.0.0.1", "[::1]", "10.0.0.7"] {
            assert!(is_this_machine(host), "{host}");
        }
        for host in ["", "evil.example", "localhost.evil.example", "127.0.0.1.evil.example"] {
            assert!(!is_this_machine(host), "{host}");
        }
    }

    #[tokio::test]
    async fn a_taken_port_and_a_foreign_address_are_clear_errors() {
        let first = bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
        let address = first.local_addr().unwrap();
        let error = bind(address).await.unwrap_err().to_string();
        assert!(error.contains(&address.to_string()) && error.contains("choose another port"), "{error}");
        // TEST-NET-1 (RFC 5737) is no machine's address.
        let error = bind(SocketAddr::from(([192, 0, 2, 1], 0))).await.unwrap_err().to_string();
        assert!(error.contains("must be an address of this machine"), "{error}");
    }
}
