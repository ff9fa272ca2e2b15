//! A TCP proxy with a valve in each direction: how a network fails between two processes of one
//! machine.
//!
//! A closed valve holds bytes back; it loses none, as TCP would repeat them. Those that dialled
//! see a connection that is there and carries nothing, as with a peer behind a broken network.

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

/// What a proxy lets through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Valves {
    /// From those that dial to the one that is dialled.
    pub forward: bool,
    /// And back.
    pub back: bool,
    /// Counts up: connections of an earlier era break.
    era: u64,
}

/// The proxy's control; the proxy ends with it.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    valves: watch::Sender<Valves>,
    task: JoinHandle<()>,
}

impl Proxy {
    /// Listens on a loopback address, and dials `to` for whoever dials it.
    ///
    /// # Errors
    /// Where there is no port to listen on.
    pub async fn start(to: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let (valves, watched) = watch::channel(Valves { forward: true, back: true, era: 0 });
        let task = tokio::spawn(serve(listener, to, watched));
        Ok(Self { address, valves, task })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Opens and closes the valves.
    pub fn set(&self, forward: bool, back: bool) {
        self.valves.send_modify(|v| *v = Valves { forward, back, ..*v });
    }

    /// Breaks all connections; new ones are taken.
    pub fn break_all(&self) {
        self.valves.send_modify(|v| v.era += 1);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(listener: TcpListener, to: SocketAddr, valves: watch::Receiver<Valves>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if connections.len() < CONNECTIONS => {
                // A connection that broke before it was taken is the dialler's business.
                if let Ok((stream, _)) = accepted {
                    connections.spawn(connect(stream, to, valves.clone()));
                }
            }
            Some(_ended) = connections.join_next(), if !connections.is_empty() => {}
        }
    }
}

/// Serves one connection until either end, or the era, is over.
async fn connect(near: TcpStream, to: SocketAddr, valves: watch::Receiver<Valves>) {
    let (mut ending, era) = (valves.clone(), valves.borrow().era);
    let carried = async {
        // Refused where nobody listens: then the near end is closed, which says so.
        let far = TcpStream::connect(to).await?;
        near.set_nodelay(true)?;
        far.set_nodelay(true)?;
        let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
        tokio::try_join!(
            carry(near_in, far_out, valves.clone(), |v| v.forward),
            carry(far_in, near_out, valves, |v| v.back),
        )
    };
    tokio::select! {
        // What is wrong with a connection is seen at its ends.
        _broken = carried => {}
        _over = ending.wait_for(|v| v.era > era) => {}
    }
}

/// Carries bytes one way while the valve is open, and then the end of the stream.
async fn carry(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut valves: watch::Receiver<Valves>,
    open: impl Fn(&Valves) -> bool,
) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    loop {
        let n = from.read(&mut chunk).await?;
        // Held back here, an end or a broken connection is, like bytes, not seen beyond.
        if valves.wait_for(&open).await.is_err() {
            return Ok(());
        }
        if n == 0 {
            return to.shutdown().await;
        }
        to.write_all(&chunk[..n]).await?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::time::timeout;

    /// A connection through a proxy: the near end, the far end, the proxy.
    async fn connected() -> (TcpStream, TcpStream, Proxy) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = Proxy::start(listener.local_addr().unwrap()).await.unwrap();
        let near = TcpStream::connect(proxy.address()).await.unwrap();
        let (far, _) = listener.accept().await.unwrap();
        (near, far, proxy)
    }

    async fn get(stream: &mut TcpStream) -> String {
        let mut bytes = [0; 5];
        stream.read_exact(&mut bytes).await.unwrap();
        String::from_utf8(bytes.into()).unwrap()
    }

    #[tokio::test]
    async fn open_it_carries_both_ways_and_the_end_too() {
        let (mut near, mut far, _proxy) = connected().await;
        near.write_all(b"hello").await.unwrap();
        assert_eq!(get(&mut far).await, "hello");
        far.write_all(b"there").await.unwrap();
        assert_eq!(get(&mut near).await, "there");
        drop(near);
        assert_eq!(far.read(&mut [0]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn closed_in_one_direction_it_carries_the_other_and_later_what_was_held_back() {
        let (mut near, mut far, proxy) = connected().await;
        proxy.set(false, true);
        near.write_all(b"hello").await.unwrap();
        far.write_all(b"there").await.unwrap();
        assert_eq!(get(&mut near).await, "there");
        let mut byte = [0];
        assert!(timeout(Duration::from_millis(50), far.peek(&mut byte)).await.is_err(), "held back");
        proxy.set(true, true);
        assert_eq!(get(&mut far).await, "hello");
    }

    #[tokio::test]
    async fn an_end_is_held_back_like_anything_else() {
        let (near, mut far, proxy) = connected().await;
        proxy.set(false, true);
        drop(near);
        assert!(timeout(Duration::from_millis(50), far.read(&mut [0])).await.is_err(), "held back");
        proxy.set(true, true);
        assert_eq!(far.read(&mut [0]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn broken_both_ends_see_it_and_a_new_connection_is_taken() {
        let (mut near, mut far, proxy) = connected().await;
        proxy.break_all();
        assert!(matches!(near.read(&mut [0]).await, Ok(0) | Err(_)));
        assert!(matches!(far.read(&mut [0]).await, Ok(0) | Err(_)));
        assert!(TcpStream::connect(proxy.address()).await.is_ok());
    }
}
