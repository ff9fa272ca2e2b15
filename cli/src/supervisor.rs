//! Starts the local worker processes of `train`, and starts them again when they die.
//!
//! There is one way to recover from anything, and it is always in use: a worker that fails ends
//! with its reason as its last words, and a new one takes its place. What cannot be helped by
//! starting again (a refusal, a wrong setting) is not tried again; a crash loop is named and
//! stopped.

use caravan_worker::Exit;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

/// The first pause before a worker is started again; it doubles with each death in a row. Short,
/// because a worker that was killed is best replaced at once.
const FIRST_PAUSE: Duration = Duration::from_millis(250);

/// A worker that lived this long did its work: its death is not a part of a crash loop.
const GOOD_LIFE: Duration = Duration::from_secs(30);

/// So many short lives in a row are a crash loop. With the pauses doubling, that is about eight
/// seconds of trying.
const MOST_DEATHS: u32 = 6;

/// Messages that may wait for the one who shows them: each slot says one thing at a time.
const MAILBOX: usize = 64;

/// What each worker process is started with.
#[derive(Clone, Debug)]
pub struct Worker {
    /// The program, which is this one.
    pub program: PathBuf,
    /// The coordinator.
    pub coordinator: SocketAddr,
    /// Compute threads.
    pub threads: u32,
    /// Folder of the log files.
    pub logs: PathBuf,
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
    slots: Vec<JoinHandle<()>>,
}

impl Supervisor {
    /// Starts so many workers.
    #[must_use]
    pub fn start(worker: &Worker, count: u32) -> Self {
        let (sender, notices) = mpsc::channel(MAILBOX);
        let (stop, stopped) = watch::channel(false);
        let slot = |slot| tokio::spawn(keep(worker.clone(), slot, sender.clone(), stopped.clone()));
        Self { notices, stop, slots: (1..=count).map(slot).collect() }
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

/// Keeps one worker alive.
async fn keep(worker: Worker, slot: u32, notices: mpsc::Sender<Notice>, mut stop: watch::Receiver<bool>) {
    let mut deaths = 0;
    while !*stop.borrow() {
        let log = worker.logs.join(format!("worker-{slot}.log"));
        let born = Instant::now();
        let outcome = match spawn(&worker, slot, &log) {
            Ok(mut child) => {
                // Waiting would close it, and so end the worker.
                let _tether = child.stdin.take();
                outcome(child.wait().await)
            }
            Err(e) => Some((format!("could not be started: {e}"), true)),
        };
        let Some((ended, again)) = outcome else { return };
        if *stop.borrow() {
            return;
        }
        deaths = if born.elapsed() >= GOOD_LIFE { 1 } else { deaths + 1 };
        let looping = deaths >= MOST_DEATHS;
        if !again || looping {
            let times = if looping { format!(", {deaths} times in a row") } else { String::new() };
            let words = last_words(&log);
            let reason = format!("{ended}{times}; its last words, from {}:\n{words}", log.display());
            notices.send(Notice::GivenUp { slot, reason }).await.ok();
            return;
        }
        let pause = FIRST_PAUSE * 2u32.pow(deaths - 1);
        notices.send(Notice::Restarting { slot, ended, pause }).await.ok();
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            _ = stop.changed() => {}
        }
    }
}

fn spawn(worker: &Worker, slot: u32, log: &Path) -> io::Result<Child> {
    let log = std::fs::OpenOptions::new().create(true).append(true).open(log)?;
    Command::new(&worker.program)
        .arg("worker")
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
/// was told.
fn outcome(status: io::Result<ExitStatus>) -> Option<(String, bool)> {
    match status {
        Err(e) => Some((format!("could not be waited for: {e}"), false)),
        Ok(status) if status.code() == Some(Exit::Good as i32) => None,
        Ok(status) => {
            let hopeless = [Exit::Usage, Exit::Refused, Exit::RunFailed].map(|e| e as i32);
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
