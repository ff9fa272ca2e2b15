//! The gRPC service: sessions of workers, and the questions of other programs.
//!
//! A session is a stream each way. What comes up is checked at the door and handed to the driver;
//! what goes down is queued by the driver. The stream's end, for whatever reason, is passed on at
//! once, since a closed socket is the fastest sign of a death that there is.

use crate::driver::{OUTBOX, Outbox, Request};
use crate::handle::Handle;
use crate::journal::Update;
use crate::listen::Peer;
use caravan_coordinator_core::Session;
use caravan_types::Timing;
use caravan_types::message::Hello;
use caravan_wire::{Coordinator, Up, pb};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Response, Status, Streaming};

/// Events that may wait for one program that follows them.
const FOLLOWER: usize = 64;

type Outgoing<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The service. It holds no state but the number of the next session.
#[derive(Clone, Debug)]
pub(crate) struct Service {
    handle: Handle,
    timing: Timing,
    next_session: Arc<AtomicU64>,
}

impl Service {
    pub(crate) fn new(handle: Handle, timing: Timing) -> Self {
        Self { handle, timing, next_session: Arc::default() }
    }

    /// Begins a session: waits for the hello, and hands over.
    async fn open(
        &self,
        mut inbound: Streaming<pb::FromWorker>,
        peer: Option<SocketAddr>,
    ) -> Result<Outgoing<pb::ToWorker>, Status> {
        let hello = self.hello(&mut inbound).await?;
        let name = hello.name.clone();
        let session = Session(self.next_session.fetch_add(1, Ordering::Relaxed));
        let (outbox, queued) = mpsc::channel(OUTBOX);
        let weak = outbox.downgrade();
        let requests = self.handle.requests.clone();
        if requests.send(Request::Hello { session, hello, outbox }).await.is_err() {
            return Err(Status::unavailable("the run is over; this coordinator takes no more workers"));
        }
        tokio::spawn(async move {
            if let Err(status) = listen(session, &mut inbound, &requests).await {
                tracing::warn!(session = session.0, peer = ?peer, name, %status, "a session broke");
                // Where there is still somebody to tell.
                if let Some(outbox) = weak.upgrade() {
                    let _full = Outbox::try_send(&outbox, Err(status));
                }
            }
            // A driver that has ended has ended all sessions.
            let _ended = requests.send(Request::Closed { session }).await;
        });
        Ok(Box::pin(ReceiverStream::new(queued)))
    }

    /// The first message, which must be there within the failure budget.
    async fn hello(&self, inbound: &mut Streaming<pb::FromWorker>) -> Result<Hello, Status> {
        let within = self.timing.connect();
        let first = timeout(within, inbound.message()).await.map_err(|_| {
            let ms = within.as_millis();
            Status::deadline_exceeded(format!("no hello within {ms} ms: a session begins with one"))
        })?;
        let first = first?.ok_or_else(|| Status::invalid_argument("a session begins with a hello"))?;
        Ok(Up::try_from(first)?.hello()?)
    }
}

/// Passes on what a worker says, until it stops.
async fn listen(
    session: Session,
    inbound: &mut Streaming<pb::FromWorker>,
    requests: &mpsc::Sender<Request>,
) -> Result<(), Status> {
    loop {
        let message = match inbound.message().await {
            Ok(Some(message)) => Up::try_from(message)?.message()?,
            Ok(None) => return Ok(()),
            // A message that cannot be decoded; anything else is a connection that broke, which
            // is how workers die.
            Err(status) if status.code() == tonic::Code::Internal => return Err(status),
            Err(_) => return Ok(()),
        };
        if requests.send(Request::Message { session, message }).await.is_err() {
            return Ok(());
        }
    }
}

#[tonic::async_trait]
impl Coordinator for Service {
    type SessionStream = Outgoing<pb::ToWorker>;
    type EventsStream = Outgoing<pb::LoggedEvent>;

    async fn session(
        &self,
        request: tonic::Request<Streaming<pb::FromWorker>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let peer = request.extensions().get::<Peer>().map(|peer| peer.0);
        let opened = self.open(request.into_inner(), peer).await;
        let opened = opened.inspect_err(|status| tracing::warn!(peer = ?peer, %status, "refused a session"));
        Ok(Response::new(opened?))
    }

    async fn status(&self, _: tonic::Request<pb::StatusRequest>) -> Result<Response<pb::Snapshot>, Status> {
        Ok(Response::new((*self.handle.snapshot()).clone().into()))
    }

    async fn events(
        &self,
        request: tonic::Request<pb::EventsRequest>,
    ) -> Result<Response<Self::EventsStream>, Status> {
        let (follower, queued) = mpsc::channel(FOLLOWER);
        tokio::spawn(follow(self.handle.clone(), request.into_inner().since, follower));
        Ok(Response::new(Box::pin(ReceiverStream::new(queued))))
    }

    async fn drain(&self, _: tonic::Request<pb::DrainRequest>) -> Result<Response<pb::DrainReply>, Status> {
        let phase: pb::Phase = self.handle.drain().await.into();
        Ok(Response::new(pb::DrainReply { phase: phase.into() }))
    }
}

/// Sends the events from `next` on, and then those that come, until the follower hangs up.
async fn follow(handle: Handle, mut next: u64, follower: mpsc::Sender<Result<pb::LoggedEvent, Status>>) {
    let mut feed = handle.journal.feed();
    loop {
        // At the start, and again after events were missed.
        for event in handle.events(next).await {
            next = event.number + 1;
            if follower.send(Ok(event.into())).await.is_err() {
                return;
            }
        }
        loop {
            let update = tokio::select! {
                update = feed.recv() => update,
                () = follower.closed() => return,
            };
            match update {
                Ok(Update::Event(event)) if event.number >= next => {
                    next = event.number + 1;
                    if follower.send(Ok((*event).clone().into())).await.is_err() {
                        return;
                    }
                }
                Ok(_) => {}
                Err(RecvError::Lagged(_)) => break,
                Err(RecvError::Closed) => return,
            }
        }
    }
}
