//! The fabric: what workers of one generation say to each other, over TCP.
//!
//! There is one connection for each ordered pair of members and generation. Whoever opened
//! it sends, the other end only reads; so there is no race about who dials whom, frames of a
//! pair arrive in order, and a sender that closes loses nothing that the kernel has taken.
//! A connection never outlives its generation: fencing is closing.
//!
//! A peer may have the new plan before we have it. Its connection is parked unread until our
//! [`Fabric::connect`] for that generation, and what it sends meanwhile waits in the kernels'
//! socket buffers. A connection of a fenced generation is closed.
//!
//! [`Fabric`] is owned by the driver and never waits in anything but [`Fabric::next`]. The
//! tasks behind it (one listens, two serve each peer) share nothing; they answer through one
//! bounded queue, and a full queue is back-pressure on the peers.

mod codec;
mod fault;
mod link;
mod listen;
mod parking;
mod socket;

pub use fault::Fault;
pub use link::Link;
#[cfg(test)]
pub(crate) use link::test_link;

use caravan_types::peer::PeerMessage;
use caravan_types::{BatchShape, Digest, Generation, Member, SliceTable, Timing, WorkerId};
use listen::Opening;
use parking::Parking;
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

/// Frames that wait for the driver, over all peers. The driver takes one in microseconds; a
/// deeper queue would only hold more payloads (a frame has up to 12 MiB) in memory.
const WAITING: usize = 16;

/// What a fabric is told at its start.
#[derive(Debug)]
pub struct Settings {
    /// Who we are.
    pub worker: WorkerId,
    /// Hash of the run spec: peers of another run are turned away.
    pub run: Digest,
    /// The model's slices, which bound what a frame can carry.
    pub slices: SliceTable,
    /// How a global batch is cut.
    pub batch: BatchShape,
    /// Width of the residual stream, which goes from stage to stage.
    pub dim: u32,
    /// The failure budget, and what follows from it.
    pub timing: Timing,
}

/// What comes out of a fabric.
#[derive(Debug)]
pub enum Event {
    /// A peer of the open generation said something.
    Message {
        /// The generation.
        generation: Generation,
        /// The peer.
        from: WorkerId,
        /// What it said.
        message: PeerMessage,
        /// The payload of [`PeerMessage::Data`]; otherwise empty.
        payload: Vec<f32>,
    },
    /// A connection with a peer of the open generation broke; said once a peer.
    Lost {
        /// The generation.
        generation: Generation,
        /// The peer.
        peer: WorkerId,
    },
}

/// What the tasks tell the fabric.
enum Arrival {
    /// A peer opened a connection and introduced itself.
    Opened(Opening),
    /// A peer said something.
    Message { generation: Generation, from: WorkerId, message: PeerMessage, payload: Vec<f32> },
    /// A connection broke.
    Broken { generation: Generation, peer: WorkerId, fault: Fault },
}

/// One worker's end of the fabric.
pub struct Fabric {
    settings: Arc<Settings>,
    arrivals: mpsc::Receiver<Arrival>,
    /// Kept for new tasks.
    inbox: mpsc::Sender<Arrival>,
    fence: Generation,
    open: Option<Open>,
    parking: Parking,
    /// The listener; ends with the fabric.
    listener: JoinSet<()>,
}

/// The generation that is open.
struct Open {
    generation: Generation,
    peers: BTreeMap<WorkerId, Peer>,
    /// Two a peer; end with the generation.
    tasks: JoinSet<()>,
}

struct Peer {
    link: Link,
    /// Whether its connection to us is there.
    heard: bool,
    lost: bool,
}

impl Fabric {
    /// Starts to listen.
    #[must_use]
    pub fn start(listener: TcpListener, settings: Settings) -> Self {
        let settings = Arc::new(settings);
        let (inbox, arrivals) = mpsc::channel(WAITING);
        let mut tasks = JoinSet::new();
        tasks.spawn(listen::listen(listener, Arc::clone(&settings), inbox.clone()));
        let parking = Parking::new(settings.timing.parked());
        let fence = Generation::default();
        Self { settings, arrivals, inbox, fence, open: None, parking, listener: tasks }
    }

    /// Closes every connection of a generation before this one, and takes none any more.
    pub fn fence(&mut self, generation: Generation) {
        self.fence = self.fence.max(generation);
        self.open.take_if(|open| open.generation < self.fence);
        self.parking.fence(self.fence);
    }

    /// Opens a generation: dials its members (us excluded), and listens to those of them
    /// that have dialled us already. A fenced generation stays closed.
    pub fn connect(&mut self, generation: Generation, members: Vec<Member>) {
        self.fence(generation);
        if generation < self.fence {
            return;
        }
        let mut open = Open { generation, peers: BTreeMap::new(), tasks: JoinSet::new() };
        for member in members {
            let (link, queue) = link::link(&self.settings, generation);
            let (id, settings) = (member.worker, Arc::clone(&self.settings));
            let inbox = self.inbox.clone();
            open.tasks.spawn(async move {
                if let Some(fault) = link::serve(&settings, generation, &member, queue).await {
                    report(&inbox, generation, id, fault).await;
                }
            });
            open.peers.insert(id, Peer { link, heard: false, lost: false });
        }
        self.open = Some(open);
        for opening in self.parking.leave(generation) {
            self.admit(opening);
        }
    }

    /// Where to send what is for a peer; none where its connection broke.
    #[must_use]
    pub fn link(&self, to: WorkerId) -> Option<&Link> {
        let peer = self.open.as_ref()?.peers.get(&to)?;
        (!peer.lost).then_some(&peer.link)
    }

    /// Waits for the next event. Dropping the future loses nothing.
    ///
    /// # Panics
    /// Where one of the fabric's tasks did: an actor that fails ends its process.
    pub async fn next(&mut self) -> Event {
        loop {
            let arrival = tokio::select! {
                Some(arrival) = self.arrivals.recv() => arrival,
                Some(ended) = self.listener.join_next() => { carry_panic(ended); continue }
                Some(ended) = ended_task(&mut self.open) => { carry_panic(ended); continue }
                () = self.parking.expire() => continue,
            };
            let event = match arrival {
                Arrival::Opened(opening) => {
                    self.place(opening);
                    None
                }
                Arrival::Message { generation, from, message, payload } => {
                    self.is_open(generation).then_some(Event::Message { generation, from, message, payload })
                }
                Arrival::Broken { generation, peer, fault } => self.lose(generation, peer, &fault),
            };
            if let Some(event) = event {
                return event;
            }
        }
    }

    fn is_open(&self, generation: Generation) -> bool {
        self.open.as_ref().is_some_and(|open| open.generation == generation)
    }

    /// Listens to a connection now, later or never.
    fn place(&mut self, opening: Opening) {
        let generation = opening.generation;
        if generation < self.fence {
            opening.close(&Fault::Fenced { generation, fence: self.fence });
        } else if self.is_open(generation) {
            self.admit(opening);
        } else {
            self.parking.park(opening);
        }
    }

    /// Listens to a connection of the open generation, where its sender is a peer.
    fn admit(&mut self, opening: Opening) {
        let Some(open) = &mut self.open else { return };
        let (generation, from) = (opening.generation, opening.from);
        match open.peers.get_mut(&from) {
            None => opening.close(&Fault::Stranger { from, generation }),
            Some(peer) if peer.heard => opening.close(&Fault::Twice { from, generation }),
            Some(peer) => {
                peer.heard = true;
                let (settings, inbox) = (Arc::clone(&self.settings), self.inbox.clone());
                open.tasks.spawn(async move {
                    let fault = listen::read(&settings, opening, &inbox).await;
                    report(&inbox, generation, from, fault).await;
                });
            }
        }
    }

    /// A peer is lost once, however many of its connections break.
    fn lose(&mut self, generation: Generation, peer: WorkerId, fault: &Fault) -> Option<Event> {
        let open = self.open.as_mut().filter(|open| open.generation == generation)?;
        let known = open.peers.get_mut(&peer).filter(|known| !known.lost)?;
        known.lost = true;
        tracing::info!(%peer, %generation, reason = %fault, "lost a peer's connection");
        Some(Event::Lost { generation, peer })
    }
}

/// Tells the fabric of a fault. Where the fabric is gone there is nobody to tell.
async fn report(inbox: &mpsc::Sender<Arrival>, generation: Generation, peer: WorkerId, fault: Fault) {
    inbox.send(Arrival::Broken { generation, peer, fault }).await.ok();
}

/// The next task of the open generation that ends; never, where there is none.
async fn ended_task(open: &mut Option<Open>) -> Option<Result<(), tokio::task::JoinError>> {
    match open {
        Some(open) => open.tasks.join_next().await,
        None => None,
    }
}

/// Carries a task's panic on into its owner.
fn carry_panic(ended: Result<(), tokio::task::JoinError>) {
    // A task that was cancelled was so by dropping the set that it was in.
    if let Some(panic) = ended.err().and_then(|error| error.try_into_panic().ok()) {
        std::panic::resume_unwind(panic);
    }
}

#[cfg(test)]
mod tests;
