//! Watching a run from the process that coordinates it: what happens is shown to people as it
//! comes, and handed on to whoever has to do something about it.

use crate::Failure;
use crate::commands::train::TrainError;
use crate::supervisor::{Notice, Supervisor};
use crate::view::View;
use caravan_coordinator::{Running, Update, Updates};
use caravan_types::message::Farewell;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

/// What was said last may still be on its way when the run has ended; it takes no longer than this.
const LAST_WORDS: Duration = Duration::from_millis(50);

/// What a watcher sees. Whatever it is, people have been shown it.
pub enum Seen {
    /// The coordinator says something.
    Update(Update),
    /// Somebody wants this process to end (SIGINT or SIGTERM).
    Asked,
    /// The run has ended, or all workers were given up.
    Ended(Result<Farewell, Failure>),
}

/// Shows a run, and the workers that were started for it.
pub struct Watch<'a> {
    supervisor: Option<&'a mut Supervisor>,
    signals: mpsc::Receiver<()>,
    updates: Updates,
    view: View,
    ended: Pin<Box<dyn Future<Output = Result<Farewell, Failure>> + Send>>,
    /// Why the last worker was given up.
    given_up: String,
}

impl<'a> Watch<'a> {
    /// Watches a run of so many steps.
    ///
    /// # Errors
    /// Where the system takes no signal handlers.
    pub fn new(
        running: &mut Running,
        steps: u64,
        supervisor: Option<&'a mut Supervisor>,
    ) -> io::Result<Self> {
        let handle = running.handle.clone();
        Ok(Self {
            supervisor,
            signals: stop_signals()?,
            updates: running.updates(),
            view: View::new(steps),
            ended: Box::pin(async move { handle.ended().await.map_err(Into::into) }),
            given_up: String::new(),
        })
    }

    /// The next thing; not to be asked after [`Seen::Ended`]. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Seen {
        loop {
            let notice = async {
                match &mut self.supervisor {
                    Some(supervisor) => supervisor.notice().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                ended = &mut self.ended => return Seen::Ended(ended),
                Some(update) = self.updates.next() => {
                    show(&mut self.view, &update);
                    return Seen::Update(update);
                }
                notice = notice => match notice {
                    Some(Notice::Restarting { slot, ended, pause }) => {
                        self.view.say(&format!("worker-{slot} {ended}; starting it again in {pause:?}"));
                    }
                    Some(Notice::GivenUp { slot, reason }) => {
                        self.view.say(&format!("worker-{slot} is not started again: {reason}"));
                        self.given_up = format!("worker-{slot} {reason}");
                    }
                    None if self.given_up.is_empty() => self.supervisor = None,
                    None => {
                        let given_up = std::mem::take(&mut self.given_up);
                        return Seen::Ended(Err(TrainError::NoWorkers(given_up).into()));
                    }
                },
                Some(()) = self.signals.recv() => return Seen::Asked,
            }
        }
    }

    /// A line of the watcher's own.
    pub fn say(&mut self, line: &str) {
        self.view.say(line);
    }

    /// From now on no worker is started again.
    pub fn stop_restarting(&self) {
        if let Some(supervisor) = &self.supervisor {
            supervisor.stop_restarting();
        }
    }

    /// What is still on its way to the view after the end.
    pub async fn rest(&mut self) {
        while let Ok(Some(update)) = tokio::time::timeout(LAST_WORDS, self.updates.next()).await {
            if let Update::Event(_) = update {
                show(&mut self.view, &update);
            }
        }
    }
}

fn show(view: &mut View, update: &Update) {
    match update {
        Update::Snapshot(snapshot) => view.snapshot(snapshot),
        Update::Step(step) => view.step(step),
        Update::Event(event) => view.event(event),
    }
}

/// One message for each SIGINT and SIGTERM.
fn stop_signals() -> io::Result<mpsc::Receiver<()>> {
    // The first drains and the second stops; a third one changes nothing.
    let (sender, receiver) = mpsc::channel(2);
    for kind in [SignalKind::interrupt(), SignalKind::terminate()] {
        let (mut signal, sender) = (signal(kind)?, sender.clone());
        tokio::spawn(async move { while signal.recv().await.is_some() && sender.send(()).await.is_ok() {} });
    }
    Ok(receiver)
}
