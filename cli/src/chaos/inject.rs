//! Doing it: signals to processes, valves in their connections, limits on their files.

use super::proxy::{Before, Network, Proxy, Way};
use super::schedule::{Act, Fault};
use crate::supervisor::{self, Order, Orders};
use caravan_types::WorkerId;
use rustix::process::Signal;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::sleep;

/// No file grows past this where the disk is full: more than a worker logs in a short run, less
/// than a part of any checkpoint.
const FULL: u64 = 32 << 10;

/// The network between the workers and the coordinator, and between workers.
#[derive(Debug)]
pub struct Wires {
    network: watch::Sender<Network>,
    workers: Vec<Wire>,
}

/// One worker's part of it.
#[derive(Debug)]
struct Wire {
    fabric: Proxy,
    session: Proxy,
    listen: SocketAddr,
}

impl Wires {
    /// Wires for so many workers of this coordinator.
    ///
    /// # Errors
    /// Where there are no ports.
    pub async fn start(workers: u32, coordinator: SocketAddr) -> io::Result<Self> {
        let (network, watched) = watch::channel(Network::default());
        let mut wires = Self { network, workers: Vec::new() };
        for slot in 1..=workers {
            // The worker listens where it is told, start after start, so that the proxy knows
            // where. Connections come from 127.0.0.1; on a loopback address of this process and
            // slot, no port is taken by one of them while the worker is dead.
            let process = std::process::id();
            let address =
                [127, 1 + (process % 250) as u8, (process / 250 % 250) as u8, 1 + (slot % 250) as u8];
            let listen = TcpListener::bind(SocketAddr::from((address, 0))).await?.local_addr()?;
            let fabric = Proxy::start(listen, Before::Worker(slot), watched.clone()).await?;
            let session =
                Proxy::start(coordinator, Before::Coordinator { from: slot }, watched.clone()).await?;
            wires.workers.push(Wire { fabric, session, listen });
        }
        Ok(wires)
    }

    /// For each worker: where it finds the coordinator, where it listens, and where others find
    /// it.
    pub fn addresses(&self) -> impl Iterator<Item = (SocketAddr, supervisor::Network)> {
        self.workers.iter().map(|Wire { fabric, session, listen }| {
            let network = supervisor::Network { listen: *listen, advertise: fabric.address() };
            (session.address(), network)
        })
    }

    /// A worker is the process of this slot.
    pub fn joined(&self, worker: WorkerId, slot: u32) {
        self.network.send_modify(|network| network.joined(worker, slot));
    }

    fn cut(&self, ways: &[Way]) {
        self.network.send_modify(|network| network.cut(ways));
    }

    fn mend(&self, ways: &[Way], breaks: bool) {
        self.network.send_modify(|network| {
            if breaks {
                network.break_all(ways);
            }
            network.mend(ways);
        });
    }
}

/// Everything that a fault needs.
#[derive(Clone, Debug)]
pub struct Hands {
    /// To the processes.
    pub orders: Orders,
    /// Between the processes.
    pub wires: Arc<Wires>,
    /// The failure budget.
    pub detect: Duration,
    /// The step of the newest checkpoint that was tried: written, or failed.
    pub saves: watch::Receiver<u64>,
}

impl Hands {
    /// Does it after `step`, and waits until it is over. Says whether there was a worker that it
    /// reached.
    pub async fn inject(mut self, fault: Fault, step: u64) -> bool {
        let signal = async |signal| self.orders.give(fault.slot, Order::Signal(signal)).await;
        match fault.act {
            Act::Kill => signal(Signal::KILL).await,
            Act::Stop { budgets } => {
                let reached = signal(Signal::STOP).await;
                sleep(self.detect.mul_f64(budgets)).await;
                // Where it has been ended meanwhile, there is nothing to continue.
                signal(Signal::CONT).await;
                reached
            }
            Act::Slow { budgets, pauses } => {
                let pause = self.detect.mul_f64(budgets);
                let mut reached = false;
                for _ in 0..pauses {
                    reached |= signal(Signal::STOP).await;
                    sleep(pause).await;
                    signal(Signal::CONT).await;
                    sleep(pause).await;
                }
                reached
            }
            Act::Partition { cut, budgets, breaks } => {
                let ways = cut.ways(fault.slot);
                self.wires.cut(&ways);
                sleep(self.detect.mul_f64(budgets)).await;
                self.wires.mend(&ways, breaks);
                true
            }
            Act::Corrupt { place, bit } => self.orders.give(fault.slot, Order::Fail(place.flaw(bit))).await,
            Act::Disk => {
                let reached = self.orders.give(fault.slot, Order::FileSize(Some(FULL))).await;
                if reached {
                    // One of this step may be written already. The run does not end before this.
                    self.saves.wait_for(|tried| *tried > step).await.ok();
                    self.orders.give(fault.slot, Order::FileSize(None)).await;
                }
                reached
            }
        }
    }
}
