//! Doing it: signals to processes, valves in their connections, limits on their files.

use super::proxy::Proxy;
use super::schedule::{Act, Cut, Fault};
use crate::supervisor::{Network, Order, Orders};
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

/// The network between a worker and everybody else.
#[derive(Debug)]
pub struct Wires {
    fabric: Proxy,
    session: Proxy,
    listen: SocketAddr,
}

impl Wires {
    /// Wires for one worker of this coordinator.
    ///
    /// # Errors
    /// Where there are no ports.
    pub async fn start(slot: u32, coordinator: SocketAddr) -> io::Result<Self> {
        // The worker listens where it is told, start after start, so that the proxy knows where.
        // Connections come from 127.0.0.1; on a loopback address of this process and slot, no
        // port is taken by one of them while the worker is dead.
        let process = std::process::id();
        let address = [127, 1 + (process % 250) as u8, (process / 250 % 250) as u8, 1 + (slot % 250) as u8];
        let listen = TcpListener::bind(SocketAddr::from((address, 0))).await?.local_addr()?;
        Ok(Self { fabric: Proxy::start(listen).await?, session: Proxy::start(coordinator).await?, listen })
    }

    /// Where the worker finds the coordinator.
    #[must_use]
    pub fn coordinator(&self) -> SocketAddr {
        self.session.address()
    }

    /// Where the worker listens, and where others find it.
    #[must_use]
    pub fn network(&self) -> Network {
        Network { listen: self.listen, advertise: self.fabric.address() }
    }

    fn cut(&self, cut: Cut) {
        let all = cut == Cut::Everything;
        if all || cut == Cut::Fabric {
            // Who dials sends and the other end only listens, so one direction is all there is.
            self.fabric.set(false, false);
        }
        if cut != Cut::Fabric {
            let (up, down) = (all || cut == Cut::ToCoordinator, all || cut == Cut::FromCoordinator);
            self.session.set(!up, !down);
        }
    }

    fn mend(&self, cut: Cut, breaks: bool) {
        for (proxy, was_cut) in [
            (&self.fabric, matches!(cut, Cut::Fabric | Cut::Everything)),
            (&self.session, cut != Cut::Fabric),
        ] {
            if breaks && was_cut {
                proxy.break_all();
            }
            proxy.set(true, true);
        }
    }
}

/// Everything that a fault needs.
#[derive(Clone, Debug)]
pub struct Hands {
    /// To the processes.
    pub orders: Orders,
    /// Of each worker, from the first slot on.
    pub wires: Arc<Vec<Wires>>,
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
                let Some(wires) = self.wires.get(fault.slot as usize - 1) else { return false };
                wires.cut(cut);
                sleep(self.detect.mul_f64(budgets)).await;
                wires.mend(cut, breaks);
                true
            }
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
