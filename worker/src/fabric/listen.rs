//! The receiving end: the listener, the introduction, and the task that reads a connection.

use super::fault::Fault;
use super::{Arrival, Settings, codec, socket};
use caravan_types::{Generation, WorkerId};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::BufReader;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// Connections that may be introducing themselves at once: the peers of a large caravan that
/// all get a plan in the same moment.
const INTRODUCING: usize = 1024;

/// Pause after a failed accept. The usual reason is too many open files, which only time and
/// the end of other connections mend.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Headers and small frames are read together; payloads go past the buffer.
const BUFFER: usize = 64 << 10;

/// A connection whose opener has introduced itself.
pub(super) struct Opening {
    pub generation: Generation,
    pub from: WorkerId,
    address: SocketAddr,
    stream: BufReader<TcpStream>,
}

impl Opening {
    /// Closes a connection that is not listened to.
    pub fn close(&self, fault: &Fault) {
        turned_away(self.address, fault);
    }
}

fn turned_away(address: SocketAddr, fault: &Fault) {
    tracing::warn!(peer = %address, reason = %fault, "turned a fabric connection away");
}

/// Accepts connections until the task is cancelled.
pub(super) async fn listen(listener: TcpListener, settings: Arc<Settings>, inbox: mpsc::Sender<Arrival>) {
    let mut introducing = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((_, address)) if introducing.len() == INTRODUCING => turned_away(address, &Fault::NoRoom),
                Ok((stream, address)) => {
                    introducing.spawn(introduce(stream, address, Arc::clone(&settings), inbox.clone()));
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept fabric connections; trying again");
                    sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(ended) = introducing.join_next() => super::carry_panic(ended),
        }
    }
}

async fn introduce(
    stream: TcpStream,
    address: SocketAddr,
    settings: Arc<Settings>,
    inbox: mpsc::Sender<Arrival>,
) {
    let introduction = timeout(settings.timing.introduce(), introduced(stream, address, &settings)).await;
    match introduction.unwrap_or(Err(Fault::Mute(settings.timing.introduce()))) {
        // Where the fabric is gone, so is the listener in a moment.
        Ok(opening) => inbox.send(Arrival::Opened(opening)).await.unwrap_or_default(),
        Err(fault) => turned_away(address, &fault),
    }
}

async fn introduced(stream: TcpStream, address: SocketAddr, settings: &Settings) -> Result<Opening, Fault> {
    socket::tune(&stream, settings.timing)?;
    let mut stream = BufReader::with_capacity(BUFFER, stream);
    let (generation, from) = codec::read_hello(&mut stream, settings).await?;
    Ok(Opening { generation, from, address, stream })
}

/// Reads a connection until it ends, and says why it did.
pub(super) async fn read(settings: &Settings, opening: Opening, inbox: &mpsc::Sender<Arrival>) -> Fault {
    let Opening { generation, from, mut stream, .. } = opening;
    loop {
        match codec::read_frame(&mut stream, settings, generation, from).await {
            Ok((message, payload)) => {
                if inbox.send(Arrival::Message { generation, from, message, payload }).await.is_err() {
                    return Fault::Closed;
                }
            }
            Err(fault) => return fault,
        }
    }
}
