//! The network between the processes of a chaos run: a TCP proxy before each listener, with a
//! valve for each way that bytes can take.
//!
//! A closed valve holds bytes back; it loses none, as TCP would repeat them. Those that dialled
//! see a connection that is there and carries nothing, as with a peer behind a broken network.
//! Whoever dials a worker says who it is in its first frame, so that what one worker sends can be
//! held back before all listeners of the others.

use caravan_types::WorkerId;
use caravan_wire::frame::{PREFIX, Prefix};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

/// Bytes that are under way in each direction of a connection.
const CHUNK: usize = 64 << 10;

/// Connections at one time. A worker has one with the coordinator and one with each peer, and
/// those of a generation before may still be closing; more than this wait to be taken.
const CONNECTIONS: usize = 256;

/// A way that bytes take, of one worker (its slot, from 1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// From the other workers.
    FromPeers(u32),
    /// To the other workers.
    ToPeers(u32),
    /// To the coordinator.
    ToCoordinator(u32),
    /// From the coordinator.
    FromCoordinator(u32),
}

/// How the network is.
#[derive(Debug, Default)]
pub struct Network {
    /// Ways that carry nothing.
    cut: BTreeSet<Way>,
    /// Which breaks there were last: connections that are older break.
    broken: BTreeMap<Way, u64>,
    /// How many breaks there were.
    breaks: u64,
    /// Which worker is which slot's.
    slots: BTreeMap<WorkerId, u32>,
}

impl Network {
    /// From now on these carry nothing.
    pub fn cut(&mut self, ways: &[Way]) {
        self.cut.extend(ways);
    }

    /// From now on these carry again.
    pub fn mend(&mut self, ways: &[Way]) {
        ways.iter().for_each(|way| _ = self.cut.remove(way));
    }

    /// Breaks all connections over these; new ones are taken.
    pub fn break_all(&mut self, ways: &[Way]) {
        self.breaks += 1;
        self.broken.extend(ways.iter().map(|way| (*way, self.breaks)));
    }

    /// A worker is the process of this slot.
    pub fn joined(&mut self, worker: WorkerId, slot: u32) {
        self.slots.insert(worker, slot);
    }
}

/// What a proxy stands before, and so which ways its connections take.
#[derive(Clone, Copy, Debug)]
pub enum Before {
    /// The coordinator; one slot's worker dials.
    Coordinator {
        /// That slot.
        from: u32,
    },
    /// The worker of this slot; the others dial.
    Worker(u32),
}

/// One connection through a proxy.
#[derive(Clone, Copy)]
struct Passage {
    before: Before,
    /// Who dialled, where it said so.
    dialler: Option<WorkerId>,
    /// The breaks that there had been when it was made.
    born: u64,
}

impl Passage {
    /// The ways of what goes to the end that was dialled, and of what comes back.
    fn ways(&self, network: &Network) -> ([Option<Way>; 2], [Option<Way>; 2]) {
        match self.before {
            Before::Coordinator { from } => {
                ([Some(Way::ToCoordinator(from)), None], [Some(Way::FromCoordinator(from)), None])
            }
            Before::Worker(to) => {
                let from = self.dialler.and_then(|worker| network.slots.get(&worker).copied());
                (
                    [from.map(Way::ToPeers), Some(Way::FromPeers(to))],
                    [Some(Way::ToPeers(to)), from.map(Way::FromPeers)],
                )
            }
        }
    }

    fn carries(&self, network: &Network, forth: bool) -> bool {
        let (there, back) = self.ways(network);
        let ways = if forth { there } else { back };
        !ways.into_iter().flatten().any(|way| network.cut.contains(&way))
    }

    fn is_broken(&self, network: &Network) -> bool {
        let (there, back) = self.ways(network);
        let mut ways = there.into_iter().chain(back).flatten();
        ways.any(|way| network.broken.get(&way).is_some_and(|broken| *broken > self.born))
    }
}

/// A proxy; it ends with this.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    task: JoinHandle<()>,
}

impl Proxy {
    /// Listens on a loopback address, and dials `to` for whoever dials it.
    ///
    /// # Errors
    /// Where there is no port to listen on.
    pub async fn start(
        to: SocketAddr,
        before: Before,
        network: watch::Receiver<Network>,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        Ok(Self { address, task: tokio::spawn(serve(listener, to, before, network)) })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(listener: TcpListener, to: SocketAddr, before: Before, network: watch::Receiver<Network>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if connections.len() < CONNECTIONS => {
                // A connection that broke before it was taken is the dialler's business.
                if let Ok((stream, _)) = accepted {
                    let passage = Passage { before, dialler: None, born: network.borrow().breaks };
                    connections.spawn(connect(stream, to, passage, network.clone()));
                }
            }
            Some(_ended) = connections.join_next(), if !connections.is_empty() => {}
        }
    }
}

/// Serves one connection until either end is over, or it is broken.
async fn connect(near: TcpStream, to: SocketAddr, mut passage: Passage, network: watch::Receiver<Network>) {
    let (near_in, near_out) = near.into_split();
    let (mut near_in, mut first) = (near_in, Vec::new());
    if let Before::Worker(_) = passage.before {
        first = introduction(&mut near_in).await;
        let prefix = first.first_chunk::<PREFIX>().and_then(|bytes| Prefix::decode(bytes).ok());
        passage.dialler = prefix.map(|prefix| prefix.sender());
    }
    let mut ending = network.clone();
    let carried = async {
        // Refused where nobody listens: then the near end is closed, which says so.
        let far = TcpStream::connect(to).await?;
        near_out.as_ref().set_nodelay(true)?;
        far.set_nodelay(true)?;
        let (far_in, far_out) = far.into_split();
        tokio::try_join!(
            carry(first, near_in, far_out, network.clone(), |network| passage.carries(network, true)),
            carry(Vec::new(), far_in, near_out, network, |network| passage.carries(network, false)),
        )
    };
    tokio::select! {
        // What is wrong with a connection is seen at its ends.
        _broken = carried => {}
        _over = ending.wait_for(|network| passage.is_broken(network)) => {}
    }
}

/// The first bytes that a dialler sends, as many as it takes to know who it is; fewer where the
/// stream ends before.
async fn introduction(near: &mut OwnedReadHalf) -> Vec<u8> {
    let mut first = Vec::with_capacity(PREFIX);
    // Where it breaks instead, that is seen when it is read on.
    let _broken = near.take(PREFIX as u64).read_to_end(&mut first).await;
    first
}

/// Carries bytes one way while that is open, `first` first, and then the end of the stream.
async fn carry(
    first: Vec<u8>,
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut network: watch::Receiver<Network>,
    open: impl Fn(&Network) -> bool,
) -> io::Result<()> {
    let mut chunk = first;
    let mut n = chunk.len();
    chunk.resize(CHUNK, 0);
    loop {
        if n == 0 {
            n = from.read(&mut chunk).await?;
        }
        // Held back here, an end or a broken connection is, like bytes, not seen beyond.
        if network.wait_for(&open).await.is_err() {
            return Ok(());
        }
        if n == 0 {
            return to.shutdown().await;
        }
        to.write_all(&chunk[..n]).await?;
        n = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use caravan_types::{Digest, Generation};
    use caravan_wire::frame::{Hello, encode_hello};
    use std::time::Duration;
    use tokio::time::timeout;

    const SLOT: u32 = 1;
    const SESSION: Before = Before::Coordinator { from: SLOT };
    const UP: &[Way] = &[Way::ToCoordinator(SLOT)];

    /// A connection through a proxy: the near end, the far end, the proxy, its network.
    struct Connected {
        near: TcpStream,
        far: TcpStream,
        proxy: Proxy,
        network: watch::Sender<Network>,
    }

    async fn connected(before: Before, first: &[u8]) -> Connected {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (network, watched) = watch::channel(Network::default());
        let proxy = Proxy::start(listener.local_addr().unwrap(), before, watched).await.unwrap();
        let mut near = TcpStream::connect(proxy.address()).await.unwrap();
        near.write_all(first).await.unwrap();
        let (far, _) = listener.accept().await.unwrap();
        Connected { near, far, proxy, network }
    }

    async fn get(stream: &mut TcpStream) -> String {
        let mut bytes = [0; 5];
        stream.read_exact(&mut bytes).await.unwrap();
        String::from_utf8(bytes.into()).unwrap()
    }

    async fn is_silent(stream: &mut TcpStream) -> bool {
        timeout(Duration::from_millis(50), stream.peek(&mut [0])).await.is_err()
    }

    #[tokio::test]
    async fn open_it_carries_both_ways_and_the_end_too() {
        let Connected { mut near, mut far, proxy: _proxy, network: _network } = connected(SESSION, b"").await;
        near.write_all(b"hello").await.unwrap();
        assert_eq!(get(&mut far).await, "hello");
        far.write_all(b"there").await.unwrap();
        assert_eq!(get(&mut near).await, "there");
        drop(near);
        assert_eq!(far.read(&mut [0]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn cut_in_one_direction_it_carries_the_other_and_later_what_was_held_back() {
        let Connected { mut near, mut far, network, proxy: _proxy } = connected(SESSION, b"").await;
        network.send_modify(|n| n.cut(UP));
        near.write_all(b"hello").await.unwrap();
        far.write_all(b"there").await.unwrap();
        assert_eq!(get(&mut near).await, "there");
        assert!(is_silent(&mut far).await, "held back");
        network.send_modify(|n| n.mend(UP));
        assert_eq!(get(&mut far).await, "hello");
    }

    #[tokio::test]
    async fn an_end_is_held_back_like_anything_else() {
        let Connected { near, mut far, network, proxy: _proxy } = connected(SESSION, b"").await;
        network.send_modify(|n| n.cut(UP));
        drop(near);
        assert!(is_silent(&mut far).await, "held back");
        network.send_modify(|n| n.mend(UP));
        assert_eq!(far.read(&mut [0]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn what_a_worker_sends_is_told_from_what_others_do_by_its_first_frame() {
        let hello = |worker| Hello {
            run: Digest::default(),
            generation: Generation(1),
            from: WorkerId(worker),
            to: WorkerId(9),
        };
        for (sender, silent) in [(7, true), (8, false)] {
            let first = encode_hello(&hello(sender));
            let Connected { mut near, mut far, network, proxy: _proxy } =
                connected(Before::Worker(2), &first).await;
            let mut taken = vec![0; first.len()];
            far.read_exact(&mut taken).await.unwrap();
            assert_eq!(taken, first, "as it was sent");
            network.send_modify(|n| {
                n.joined(WorkerId(7), SLOT);
                n.joined(WorkerId(8), 3);
                n.cut(&[Way::ToPeers(SLOT)]);
            });
            near.write_all(b"hello").await.unwrap();
            assert_eq!(is_silent(&mut far).await, silent, "w{sender}");
            network.send_modify(|n| n.mend(&[Way::ToPeers(SLOT)]));
            assert_eq!(get(&mut far).await, "hello");
        }
    }

    #[tokio::test]
    async fn broken_both_ends_see_it_and_a_new_connection_is_taken() {
        let Connected { mut near, mut far, proxy, network } = connected(SESSION, b"").await;
        network.send_modify(|n| n.break_all(UP));
        assert!(matches!(near.read(&mut [0]).await, Ok(0) | Err(_)));
        assert!(matches!(far.read(&mut [0]).await, Ok(0) | Err(_)));
        assert!(TcpStream::connect(proxy.address()).await.is_ok());
    }
}
