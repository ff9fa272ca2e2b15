//! Starts the local worker processes of `train`, and starts them again when they die.
//!
//! There is one way to recover from anything, and it is always in use: a worker that fails ends
//! with its reason as its last words, and a new one takes its place. What cannot be helped by
//! starting again (a refusal, a wrong setting) is not tried again; a crash loop is named and
//! stopped.

use caravan_worker::{Exit, Flaw};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, prlimit};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};
use tokio::io::AsyncWriteExt as _;
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

/// The first pause before a worker is started again; it doubles with each death in a row. Short,
/// because a worker that was killed is best replaced at once.
const FIRST_PAUSE: Duration = Duration::from_millis(250);

/// [`Worker::good_life`] of workers that nobody is out to kill.
pub const GOOD_LIFE: Duration = Duration::from_secs(30);

/// So many short lives in a row are a crash loop. With the pauses doubling, that is about eight
/// seconds of trying.
const MOST_DEATHS: u32 = 6;

/// Messages that may wait for the one who shows them: each slot says one thing at a time.
const MAILBOX: usize = 64;

/// Orders that may wait for a worker's process: whoever gives one waits for the answer.
const ORDERS: usize = 4;

/// What a worker process is started with.
#[derive(Clone, Debug)]
pub struct Worker {
    /// The program, which is this one.
    pub program: PathBuf,
    /// The coordinator.
    pub coordinator: SocketAddr,
    /// Where it listens for other workers, where that is not its own choice.
    pub network: Option<Network>,
    /// Compute threads.
    pub threads: u32,
    /// Folder of the log files.
    pub logs: PathBuf,
    /// A worker that lived this long did its work: its death is not a part of a crash loop.
    pub good_life: Duration,
}

/// How the other workers reach one.
#[derive(Clone, Copy, Debug)]
pub struct Network {
    /// Where it listens.
    pub listen: SocketAddr,
    /// Where it says that it does.
    pub advertise: SocketAddr,
}

/// What can be done to a worker's process.
#[derive(Clone, Copy, Debug)]
pub enum Order {
    /// Send it a signal.
    Signal(Signal),
    /// Let no file that it writes grow past this; without a limit where none.
    FileSize(Option<u64>),
    /// Have something go wrong in it.
    Fail(Flaw),
}

/// An order, and where to say whether there was a process that it reached.
type Ordered = (Order, oneshot::Sender<bool>);

/// Gives orders to worker processes. They go through the task that waits for the process, so
/// that none can reach another process that has got its number.
#[derive(Clone, Debug)]
pub struct Orders(Vec<mpsc::Sender<Ordered>>);

impl Orders {
    /// Gives an order to the process of a slot, from 1; whether there was one that it reached.
    pub async fn give(&self, slot: u32, order: Order) -> bool {
        let Some(sender) = (slot as usize).checked_sub(1).and_then(|at| self.0.get(at)) else { return false };
        let (reply, answer) = oneshot::channel();
        sender.send((order, reply)).await.is_ok() && answer.await.unwrap_or(false)
    }
}

/// What happened to a worker process.
#[derive(Debug)]
pub enum Notice {
    /// It ended and is started again.
    Restarting {
        /// Which one, from 1.
        slot: u32,
        /// How it ended.
        ended: String,
        /// The pause before it starts again.
        pause: Duration,
    },
    /// It ended and is not started again.
    GivenUp {
        /// Which one, from 1.
        slot: u32,
        /// Why, with its last words.
        reason: String,
    },
}

/// All local workers.
pub struct Supervisor {
    notices: mpsc::Receiver<Notice>,
    stop: watch::Sender<bool>,
    orders: Orders,
    slots: Vec<JoinHandle<()>>,
}

impl Supervisor {
    /// Starts these workers.
    #[must_use]
    pub fn start(workers: Vec<Worker>) -> Self {
        let (sender, notices) = mpsc::channel(MAILBOX);
        let (stop, stopped) = watch::channel(false);
        let (mut orders, mut slots) = (Vec::new(), Vec::new());
        for (slot, worker) in (1..).zip(workers) {
            let (order, ordered) = mpsc::channel(ORDERS);
            let slot = Slot { worker, slot, orders: ordered, notices: sender.clone(), stop: stopped.clone() };
            orders.push(order);
            slots.push(tokio::spawn(slot.keep()));
        }
        Self { notices, stop, orders: Orders(orders), slots }
    }

    /// How to do something to the workers' processes.
    #[must_use]
    pub fn orders(&self) -> Orders {
        self.orders.clone()
    }

    /// The next thing that happened; none once no worker is left.
    pub async fn notice(&mut self) -> Option<Notice> {
        self.notices.recv().await
    }

    /// From now on no worker is started again.
    pub fn stop_restarting(&self) {
        self.stop.send_replace(true);
    }

    /// Waits until all have ended by themselves; those that have not after `patience` are killed.
    pub async fn ended(self, patience: Duration) {
        self.stop_restarting();
        let deadline = tokio::time::Instant::now() + patience;
        for mut slot in self.slots {
            if tokio::time::timeout_at(deadline, &mut slot).await.is_err() {
                // Dropping a slot's child kills it.
                slot.abort();
                slot.await.ok();
            }
        }
    }
}

/// One worker that is kept alive.
struct Slot {
    worker: Worker,
    /// From 1.
    slot: u32,
    orders: mpsc::Receiver<Ordered>,
    notices: mpsc::Sender<Notice>,
    stop: watch::Receiver<bool>,
}

impl Slot {
    async fn keep(mut self) {
        let slot = self.slot;
        let log = self.worker.logs.join(format!("worker-{slot}.log"));
        let mut deaths = 0;
        while !*self.stop.borrow() {
            let born = Instant::now();
            let outcome = match spawn(&self.worker, slot, &log) {
                Ok(child) => outcome(self.wait(child).await),
                Err(e) => Some((format!("could not be started: {e}"), true)),
            };
            let Some((ended, again)) = outcome else { return };
            if *self.stop.borrow() {
                return;
            }
            deaths = if born.elapsed() >= self.worker.good_life { 1 } else { deaths + 1 };
            let looping = deaths >= MOST_DEATHS;
            if !again || looping {
                let times = if looping { format!(", {deaths} times in a row") } else { String::new() };
                let words = last_words(&log);
                let reason = format!("{ended}{times}; its last words, from {}:\n{words}", log.display());
                self.notices.send(Notice::GivenUp { slot, reason }).await.ok();
                return;
            }
            let pause = FIRST_PAUSE * 2u32.pow(deaths - 1);
            self.notices.send(Notice::Restarting { slot, ended, pause }).await.ok();
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                _ = self.stop.changed() => {}
            }
            // What was ordered meanwhile was not meant for the next process.
            while self.orders.try_recv().is_ok() {}
        }
    }

    /// Waits for the end of a process, and does to it what is ordered.
    async fn wait(&mut self, mut child: Child) -> io::Result<ExitStatus> {
        // Waiting would close it, and so end the worker.
        let mut tether = child.stdin.take();
        loop {
            tokio::select! {
                status = child.wait() => return status,
                Some((order, reply)) = self.orders.recv() => {
                    let done = obey(&child, tether.as_mut(), order).await;
                    if let Err(error) = &done {
                        tracing::warn!(slot = self.slot, ?order, %error, "cannot obey");
                    }
                    // Whoever gave the order may have gone.
                    reply.send(done.is_ok()).ok();
                }
            }
        }
    }
}

/// Does something to a process that has not been waited for, and so keeps its number.
async fn obey(child: &Child, tether: Option<&mut ChildStdin>, order: Order) -> io::Result<()> {
    let pid = child.id().and_then(|id| Pid::from_raw(id as i32)).ok_or(io::ErrorKind::NotFound)?;
    match order {
        Order::Signal(signal) => kill_process(pid, signal)?,
        Order::FileSize(bytes) => {
            // The process has this one's hard limit, which only goes down.
            let maximum = getrlimit(Resource::Fsize).maximum;
            prlimit(Some(pid), Resource::Fsize, Rlimit { current: bytes.or(maximum), maximum })?;
        }
        Order::Fail(flaw) => {
            let tether = tether.ok_or(io::ErrorKind::NotFound)?;
            tether.write_all(format!("{flaw}\n").as_bytes()).await?;
        }
    }
    Ok(())
}

fn spawn(worker: &Worker, slot: u32, log: &Path) -> io::Result<Child> {
    let log = std::fs::OpenOptions::new().create(true).append(true).open(log)?;
    let mut command = Command::new(&worker.program);
    command.arg("worker");
    if let Some(Network { listen, advertise }) = worker.network {
        command.args(["--listen", &listen.to_string(), "--advertise", &advertise.to_string()]);
    }
    command
        .args(["--join", &worker.coordinator.to_string()])
        .args(["--threads", &worker.threads.to_string()])
        .args(["--name", &format!("worker-{slot}")])
        // Its other end closes with this process, however that ends.
        .arg("--tether")
        .stdin(Stdio::piped())
        .stdout(log.try_clone()?)
        .stderr(log)
        // Ctrl-C on the terminal is for `train`, which drains; the workers are not to leave.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
}

/// How a process ended, and whether it helps to start it again; nothing where it did what it
/// was told: also where the run cannot go on, as the coordinator says why.
fn outcome(status: io::Result<ExitStatus>) -> Option<(String, bool)> {
    let told = [Exit::Good, Exit::RunFailed, Exit::NonFinite].map(|e| e as i32);
    match status {
        Err(e) => Some((format!("could not be waited for: {e}"), false)),
        Ok(status) if status.code().is_some_and(|c| told.contains(&c)) => None,
        Ok(status) => {
            let hopeless = [Exit::Usage, Exit::Refused].map(|e| e as i32);
            let again = !status.code().is_some_and(|c| hopeless.contains(&c));
            Some((format!("ended ({status})"), again))
        }
    }
}

/// The last lines of a log file.
fn last_words(log: &Path) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text[text.len().saturating_sub(2000)..]).into_owned();
    let lines: Vec<&str> = text.lines().filter(|l| !l.trim().is_empty()).collect();
    let last = &lines[lines.len().saturating_sub(4)..];
    if last.is_empty() { "  (none)".into() } else { last.iter().map(|l| format!("  {l}\n")).collect() }
}
