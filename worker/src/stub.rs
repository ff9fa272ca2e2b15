//! A coordinator that says what a test tells it to, over a real socket.

use caravan_types::message::{FromWorker, Hello, Welcome};
use caravan_wire::{Coordinator, Down, Up, pb, serve};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};

/// Long enough for a loaded machine to answer.
const LONG: Duration = Duration::from_secs(60);

/// The coordinator; ends when dropped, and its sessions with it.
pub struct Stub {
    pub address: String,
    sessions: mpsc::Receiver<Talk>,
    _server: JoinSet<()>,
}

/// One worker's session, as the coordinator has it.
pub struct Talk {
    up: Streaming<pb::FromWorker>,
    down: mpsc::Sender<Result<pb::ToWorker, Status>>,
}

impl Stub {
    pub async fn start() -> Self {
        Self::at(TcpListener::bind("127.0.0.1:0").await.unwrap())
    }

    pub fn at(listener: TcpListener) -> Self {
        let address = listener.local_addr().unwrap().to_string();
        let (opened, sessions) = mpsc::channel(16);
        let mut server = JoinSet::new();
        let service = serve(Service { opened });
        server.spawn(async move {
            let connections = TcpListenerStream::new(listener);
            Server::builder().add_service(service).serve_with_incoming(connections).await.unwrap();
        });
        Self { address, sessions, _server: server }
    }

    /// The next session that a worker opens.
    pub async fn session(&mut self) -> Talk {
        timeout(LONG, self.sessions.recv()).await.unwrap().unwrap()
    }

    /// Takes the next worker on.
    pub async fn take_on(&mut self, welcome: Welcome) -> (Talk, Hello) {
        let mut talk = self.session().await;
        let hello = talk.hear().await.unwrap().hello().unwrap();
        talk.say(welcome).await;
        (talk, hello)
    }
}

impl Talk {
    pub async fn say(&mut self, message: impl Into<Down>) {
        self.down.send(Ok(message.into().into())).await.unwrap();
    }

    pub async fn fail(&mut self, status: Status) {
        self.down.send(Err(status)).await.unwrap();
    }

    /// What the worker says next; none where it closed the session.
    pub async fn hear(&mut self) -> Option<Up> {
        let said = timeout(LONG, self.up.message()).await.unwrap();
        said.ok().flatten().map(|message| message.try_into().unwrap())
    }

    /// What it says next that is no heartbeat, nor what it could compute at most.
    pub async fn news(&mut self) -> Option<FromWorker> {
        loop {
            match self.hear().await?.message().unwrap() {
                FromWorker::Heartbeat { .. } | FromWorker::Peak(_) => {}
                message => return Some(message),
            }
        }
    }
}

struct Service {
    opened: mpsc::Sender<Talk>,
}

#[tonic::async_trait]
impl Coordinator for Service {
    type SessionStream = ReceiverStream<Result<pb::ToWorker, Status>>;
    type EventsStream = ReceiverStream<Result<pb::LoggedEvent, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<pb::FromWorker>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let (down, queue) = mpsc::channel(64);
        let talk = Talk { up: request.into_inner(), down };
        self.opened.send(talk).await.map_err(|_| Status::unavailable("the test is over"))?;
        Ok(Response::new(ReceiverStream::new(queue)))
    }

    async fn status(&self, _: Request<pb::StatusRequest>) -> Result<Response<pb::Snapshot>, Status> {
        Err(Status::unimplemented("not asked for in these tests"))
    }

    async fn events(&self, _: Request<pb::EventsRequest>) -> Result<Response<Self::EventsStream>, Status> {
        Err(Status::unimplemented("not asked for in these tests"))
    }

    async fn drain(&self, _: Request<pb::DrainRequest>) -> Result<Response<pb::DrainReply>, Status> {
        Err(Status::unimplemented("not asked for in these tests"))
    }
}
