//! The sending end of a connection: a bounded queue, and the task that empties it.

use super::fault::Fault;
use super::{Settings, codec, socket};
use crate::engine::frames_of_two_steps;
use caravan_types::peer::PeerMessage;
use caravan_types::{Generation, Member, Timing};
use caravan_wire::frame::FrameHeader;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep, timeout_at};

/// First pause between two attempts to reach a peer; doubled each time, up to `Timing::redial`.
const FIRST_PAUSE: Duration = Duration::from_millis(10);

/// Votes that wait in a link, besides data: one a step, and stepping cannot run two ahead.
const VOTES: usize = 4;

/// A message with its payload; empty but for [`PeerMessage::Data`].
type Outgoing = (PeerMessage, Vec<f32>);

/// Where to put what is for one peer. Never waits.
#[derive(Clone, Debug)]
pub struct Link {
    generation: Generation,
    queue: mpsc::Sender<Outgoing>,
    overrun: Arc<Notify>,
}

/// The other end of a [`Link`].
pub(super) struct Queue {
    frames: mpsc::Receiver<Outgoing>,
    overrun: Arc<Notify>,
}

/// A link with room for what one peer can have to say in two steps.
pub(super) fn link(settings: &Settings, generation: Generation) -> (Link, Queue) {
    let (queue, frames) = mpsc::channel(frames_of_two_steps(&settings.slices, &settings.batch) + VOTES);
    let overrun = Arc::new(Notify::new());
    (Link { generation, queue, overrun: Arc::clone(&overrun) }, Queue { frames, overrun })
}

impl Link {
    /// The generation that it belongs to.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// Puts a message into the queue. What is put into a closed link is dropped: its peer is
    /// lost or its generation fenced, and the driver knows. A full one is closed.
    pub fn send(&self, message: PeerMessage, payload: Vec<f32>) {
        if let Err(mpsc::error::TrySendError::Full(_)) = self.queue.try_send((message, payload)) {
            self.overrun.notify_one();
        }
    }
}

/// Dials a peer and sends it what is put into the link. Returns why it ended, or nothing
/// where the link was given up.
pub(super) async fn serve(
    settings: &Settings,
    generation: Generation,
    peer: &Member,
    queue: Queue,
) -> Option<Fault> {
    let Queue { frames, overrun } = queue;
    let served = async {
        let stream = dial(&peer.fabric, settings.timing).await?;
        socket::tune(&stream, settings.timing)?;
        let (reading, mut writing) = stream.into_split();
        codec::write_hello(&mut writing, settings, generation, peer.worker).await?;
        tokio::select! {
            fault = watch(reading) => Err(fault),
            sent = pump(settings, generation, frames, writing) => sent,
        }
    };
    tokio::select! {
        served = served => served.err(),
        () = overrun.notified() => Some(Fault::Overrun(frames_of_two_steps(&settings.slices, &settings.batch))),
    }
}

/// Connects, again and again for a while: the peer may be starting still.
async fn dial(address: &str, timing: Timing) -> Result<TcpStream, Fault> {
    let within = timing.dial();
    let deadline = Instant::now() + within;
    let mut pause = FIRST_PAUSE;
    let mut error = "no answer".to_owned();
    loop {
        match timeout_at(deadline, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(failed)) => error = failed.to_string(),
            Err(_) => {}
        }
        if Instant::now() + pause >= deadline {
            return Err(Fault::Unreachable { address: address.to_owned(), within, error });
        }
        sleep(pause).await;
        pause = (pause * 2).min(timing.redial());
    }
}

async fn pump(
    settings: &Settings,
    generation: Generation,
    mut frames: mpsc::Receiver<Outgoing>,
    mut writing: OwnedWriteHalf,
) -> Result<(), Fault> {
    while let Some((message, payload)) = frames.recv().await {
        let header = FrameHeader { generation, from: settings.worker, message };
        codec::write_frame(&mut writing, &header, &payload).await?;
    }
    Ok(())
}

/// Waits for the end of a connection over which nothing comes.
async fn watch(mut reading: OwnedReadHalf) -> Fault {
    match reading.read(&mut [0]).await {
        Ok(0) => Fault::Closed,
        Ok(_) => Fault::OutOfTurn,
        Err(error) => Fault::Io(error),
    }
}

/// A link that ends in a queue, for tests of what sends.
#[cfg(test)]
pub fn test_link(generation: Generation, capacity: usize) -> (Link, mpsc::Receiver<Outgoing>) {
    let (queue, frames) = mpsc::channel(capacity);
    (Link { generation, queue, overrun: Arc::new(Notify::new()) }, frames)
}
