//! The run with the faults: workers that are reached through wires, one fault after another once
//! the caravan is whole again, and notes of what came of each.

use super::inject::{Hands, Wires};
use super::schedule::{Act, Fault};
use super::timeline::{Mark, Timeline};
use super::told::{Commit, Notes, Told};
use crate::Failure;
use crate::commands::train::start;
use crate::job::Job;
use crate::supervisor::{Supervisor, Worker};
use crate::watch::{Seen, Watch};
use caravan_coordinator::{Handle, Update};
use caravan_types::message::Farewell;
use caravan_types::status::{Event, LoggedEvent, Snapshot, StepMetrics};
use caravan_types::{Generation, Step, WorkerId};
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

/// Workers that die before they have lived this long are in a crash loop also here: whoever was
/// got to be shot had taken part, and then it had lived longer.
const GOOD_LIFE: Duration = Duration::from_millis(500);

/// Failure budgets after which a fault that is over, and that nobody has noticed, will not be.
const UNNOTICED: u32 = 2;

/// Events that are told of a run that is stuck.
const LAST_EVENTS: usize = 20;

/// Somebody did not want to wait.
#[derive(Debug, thiserror::Error)]
#[error("interrupted, so there is no verdict; the same command begins anew, in another folder")]
struct Interrupted;

/// What is to be done.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The faults, in order.
    pub faults: Vec<Fault>,
    /// Whether a fault may come before the caravan is whole again.
    pub pile_up: bool,
    /// What a step takes, more or less.
    pub step: Duration,
    /// A run that is not over by then is stuck.
    pub limit: Duration,
    /// Once this step is committed, no disk is full any more: the next checkpoint may be the last
    /// one, and without that a run has not finished.
    pub last_disk: u64,
}

/// How the run ended.
#[derive(Debug)]
pub enum Ended {
    /// By a farewell.
    Farewell(Farewell),
    /// Not well.
    Failed(String),
    /// Not at all.
    Stuck {
        /// How things stand.
        snapshot: Arc<Snapshot>,
        /// What happened last.
        events: Vec<String>,
    },
}

/// All that is known of a run with faults.
#[derive(Debug)]
pub struct Observed {
    /// How it ended.
    pub ended: Ended,
    /// What it took.
    pub wall: Duration,
    /// What happened when.
    pub timeline: Timeline,
    /// The faults that were done.
    pub told: Vec<Told>,
    /// Those for which it was too late.
    pub left: Vec<Fault>,
    /// A fault that is over for so long, and that nobody has noticed, will not be.
    pub grace: Duration,
}

/// Runs a job and does to its workers what is planned.
///
/// # Errors
/// Where it could not be started, or was interrupted.
pub async fn run(job: &mut Job, plan: &Plan) -> Result<Observed, Failure> {
    let mut running = start(job, false).await?;
    let wires = Wires::start(job.settings.cluster.workers, running.address).await?;
    let mut supervisor = Supervisor::start(workers(job, &wires)?);
    let (saved, saves) = watch::channel(0);
    let hands = Hands {
        orders: supervisor.orders(),
        wires: Arc::new(wires),
        detect: job.settings.cluster.timing.detect(),
        saves,
    };
    let mut scene = Scene::new(plan, hands, saved, job.settings.cluster.workers);
    let mut watch = Watch::new(&mut running, job.settings.recipe.steps, Some(&mut supervisor))?;
    let ended = scene.play(&mut watch, &running.handle).await;
    watch.rest().await;
    drop(watch);
    supervisor.ended(job.settings.cluster.timing.farewell()).await;
    running.shutdown().await;
    job.run.set_address(None)?;
    Ok(scene.end(ended?))
}

fn workers(job: &Job, wires: &Wires) -> io::Result<Vec<Worker>> {
    let program = std::env::current_exe()?;
    let worker = |(coordinator, network)| Worker {
        program: program.clone(),
        coordinator,
        network: Some(network),
        threads: job.settings.cluster.threads,
        logs: job.run.logs(),
        good_life: GOOD_LIFE,
    };
    Ok(wires.addresses().map(worker).collect())
}

/// The run as it goes.
struct Scene<'a> {
    plan: &'a Plan,
    hands: Hands,
    saved: watch::Sender<u64>,
    workers: u32,
    started: Instant,
    timeline: Timeline,
    notes: Notes,
    left: VecDeque<Fault>,
    /// Those that came too late.
    late: Vec<Fault>,
    /// When the next fault is due, where its step has come.
    due: Option<Instant>,
    acts: JoinSet<(usize, bool)>,
    /// Which worker is which process; those that are gone are not in it.
    slots: BTreeMap<WorkerId, u32>,
    step: u64,
    generation: Generation,
    /// Whether the plan in force has all workers, and none of them is gone since.
    whole: bool,
}

impl<'a> Scene<'a> {
    fn new(plan: &'a Plan, hands: Hands, saved: watch::Sender<u64>, workers: u32) -> Self {
        let notes = Notes::new(hands.detect * UNNOTICED);
        Self {
            plan,
            hands,
            saved,
            workers,
            started: Instant::now(),
            timeline: Vec::new(),
            notes,
            left: plan.faults.iter().copied().collect(),
            late: Vec::new(),
            due: None,
            acts: JoinSet::new(),
            slots: BTreeMap::new(),
            step: 0,
            generation: Generation::default(),
            whole: false,
        }
    }

    /// Until the run is over, or will never be.
    async fn play(&mut self, watch: &mut Watch<'_>, handle: &Handle) -> Result<Ended, Failure> {
        let limit = self.started + self.plan.limit;
        loop {
            let due = self.due;
            tokio::select! {
                seen = watch.next() => match seen {
                    Seen::Update(Update::Event(event)) => self.event(&event),
                    Seen::Update(Update::Step(step)) => self.committed(&step),
                    Seen::Update(Update::Snapshot(_)) => {}
                    Seen::Asked => return Err(Interrupted.into()),
                    Seen::Ended(Ok(farewell)) => return Ok(Ended::Farewell(farewell)),
                    Seen::Ended(Err(error)) => return Ok(Ended::Failed(error.to_string())),
                },
                Some(over) = self.acts.join_next(), if !self.acts.is_empty() => {
                    let (number, reached) = over?;
                    self.notes.ends(number, self.started.elapsed(), reached);
                }
                () = sleep_until(due.unwrap_or(limit)), if due.is_some() => {
                    if let Some(line) = self.next_fault() {
                        watch.say(&line);
                    }
                }
                () = sleep_until(limit) => {
                    let events = handle.events(0).await;
                    let last = events.iter().skip(events.len().saturating_sub(LAST_EVENTS));
                    let events = last.map(|event| event.text.clone()).collect();
                    return Ok(Ended::Stuck { snapshot: handle.snapshot(), events });
                }
            }
        }
    }

    fn mark(&mut self, mark: Mark) {
        self.timeline.push((self.started.elapsed(), mark));
    }

    /// Does the next fault; a line about it.
    fn next_fault(&mut self) -> Option<String> {
        self.due = None;
        // Whoever was lost meanwhile is waited for; the next step asks again.
        if !self.ready() {
            return None;
        }
        let fault = self.left.pop_front()?;
        if fault.act == Act::Disk && self.step >= self.plan.last_disk {
            self.late.push(fault);
            return None;
        }
        self.mark(Mark::Fault);
        let worker = self.slots.iter().find(|(_, slot)| **slot == fault.slot).map(|(worker, _)| *worker);
        let when = (self.started.elapsed(), self.step);
        let number = self.notes.begins(fault, when, worker, self.generation);
        let (hands, step) = (self.hands.clone(), self.step);
        self.acts.spawn(async move { (number, hands.inject(fault, step).await) });
        Some(format!("chaos {}: worker-{}, {}", number + 1, fault.slot, fault.act))
    }

    /// Whether the caravan is as it should be.
    fn ready(&self) -> bool {
        self.plan.pile_up || (self.whole && self.notes.all_whole())
    }

    fn committed(&mut self, step: &StepMetrics) {
        self.mark(Mark::Committed(step.step));
        self.step = step.step.0;
        let all = self.whole && step.generation == self.generation && step.workers == self.workers;
        self.notes.committed(Commit { at: self.started.elapsed(), generation: step.generation, all });
        let reached = self.left.front().filter(|fault| self.step >= fault.step);
        if let Some(fault) = reached.filter(|_| self.due.is_none() && self.ready()) {
            self.due = Some(Instant::now() + self.plan.step.mul_f64(fault.moment));
        }
    }

    fn event(&mut self, event: &LoggedEvent) {
        match &event.event {
            Event::Joined { worker, name } => {
                if let Some(slot) = name.strip_prefix("worker-").and_then(|n| n.parse().ok()) {
                    self.slots.insert(*worker, slot);
                    self.hands.wires.joined(*worker, slot);
                }
            }
            Event::Planned { generation, members, .. } => {
                self.mark(Mark::Planned);
                self.generation = *generation;
                self.whole = members.len() == self.workers as usize;
            }
            Event::Stopping { boundary: false, .. } => self.mark(Mark::Stopped),
            Event::Hung { worker, .. } | Event::Corrupt { worker, .. } => self.named(*worker, &event.text),
            Event::Lost { worker, .. } => {
                self.named(*worker, &event.text);
                self.slots.remove(worker);
            }
            Event::CheckpointWritten { step } => self.tried(*step),
            Event::CheckpointFailed { step, .. } => {
                self.notes.checkpoint_failed(self.started.elapsed(), &event.text);
                self.tried(*step);
            }
            _ => {}
        }
    }

    fn named(&mut self, worker: WorkerId, text: &str) {
        self.mark(Mark::Noticed);
        self.whole = false;
        let slot = self.slots.get(&worker).copied();
        self.notes.named(self.started.elapsed(), self.generation, (worker, slot), text);
    }

    /// A checkpoint was written, or failed.
    fn tried(&self, step: Step) {
        self.saved.send_modify(|newest| *newest = step.0.max(*newest));
    }

    fn end(self, ended: Ended) -> Observed {
        Observed {
            ended,
            wall: self.started.elapsed(),
            timeline: self.timeline,
            told: self.notes.told(),
            left: self.late.into_iter().chain(self.left).collect(),
            grace: self.hands.detect * UNNOTICED,
        }
    }
}
