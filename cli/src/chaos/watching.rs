//! The run with the faults: workers that are reached through wires, one fault after another once
//! the caravan is whole again, and notes of what came of each.

use super::inject::{Hands, Wires};
use super::schedule::{Act, Fault};
use super::timeline::{Mark, Timeline};
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

/// Events about other workers that are kept of a fault.
const MOST_OTHERS: usize = 8;

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

/// What came of a fault.
#[derive(Clone, Debug)]
pub struct Told {
    /// What was done.
    pub fault: Fault,
    /// When, since the start of the run.
    pub at: Duration,
    /// The newest committed step then.
    pub at_step: u64,
    /// Whether there was a process that it reached; not known while it goes on.
    pub reached: Option<bool>,
    /// When it was over.
    pub over: Option<Duration>,
    /// When an event named the worker, and the event.
    pub noticed: Option<(Duration, String)>,
    /// Other workers that were named first.
    pub others: Vec<String>,
    /// When the next step was committed; that of a newer generation, where somebody was named.
    pub committed: Option<Duration>,
    /// When a step was committed by all workers again.
    pub whole: Option<Duration>,
    /// The generation that it hit.
    generation: Generation,
}

impl Told {
    /// Whether somebody was named.
    fn seen(&self) -> bool {
        self.noticed.is_some() || !self.others.is_empty()
    }
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
    /// Those that the run was over before.
    pub left: Vec<Fault>,
}

/// Runs a job and does to its workers what is planned.
///
/// # Errors
/// Where it could not be started, or was interrupted.
pub async fn run(job: &mut Job, plan: &Plan) -> Result<Observed, Failure> {
    let running = start(job, false).await?;
    let mut wires = Vec::new();
    for slot in 1..=job.settings.cluster.workers {
        wires.push(Wires::start(slot, running.address).await?);
    }
    let mut supervisor = Supervisor::start(workers(job, &wires)?);
    let (saved, saves) = watch::channel(0);
    let hands = Hands {
        orders: supervisor.orders(),
        wires: Arc::new(wires),
        detect: job.settings.cluster.timing.detect(),
        saves,
    };
    let mut scene = Scene::new(plan, hands, saved, job.settings.cluster.workers);
    let mut watch = Watch::new(&running, job.settings.recipe.steps, Some(&mut supervisor))?;
    let ended = scene.play(&mut watch, &running.handle).await;
    watch.rest().await;
    drop(watch);
    supervisor.ended(job.settings.cluster.timing.farewell()).await;
    running.shutdown().await;
    job.run.set_address(None)?;
    Ok(scene.end(ended?))
}

fn workers(job: &Job, wires: &[Wires]) -> io::Result<Vec<Worker>> {
    let program = std::env::current_exe()?;
    let worker = |wires: &Wires| Worker {
        program: program.clone(),
        coordinator: wires.coordinator(),
        network: Some(wires.network()),
        threads: job.settings.cluster.threads,
        logs: job.run.logs(),
        good_life: GOOD_LIFE,
    };
    Ok(wires.iter().map(worker).collect())
}

/// The run as it goes.
struct Scene<'a> {
    plan: &'a Plan,
    hands: Hands,
    saved: watch::Sender<u64>,
    workers: u32,
    started: Instant,
    timeline: Timeline,
    told: Vec<Told>,
    left: VecDeque<Fault>,
    /// When the next fault is due, where its step has come.
    due: Option<Instant>,
    acts: JoinSet<(usize, bool)>,
    /// Which worker process is which.
    slots: BTreeMap<WorkerId, u32>,
    step: u64,
    generation: Generation,
    /// Whether the plan in force has all workers, and none of them is gone since.
    whole: bool,
}

impl<'a> Scene<'a> {
    fn new(plan: &'a Plan, hands: Hands, saved: watch::Sender<u64>, workers: u32) -> Self {
        Self {
            plan,
            hands,
            saved,
            workers,
            started: Instant::now(),
            timeline: Vec::new(),
            told: Vec::new(),
            left: plan.faults.iter().copied().collect(),
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
                    let (at, reached) = over?;
                    self.told[at].over = Some(self.started.elapsed());
                    self.told[at].reached = Some(reached);
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
        self.mark(Mark::Fault);
        let at = self.told.len();
        self.told.push(Told {
            fault,
            at: self.started.elapsed(),
            at_step: self.step,
            reached: None,
            over: None,
            noticed: None,
            others: Vec::new(),
            committed: None,
            whole: None,
            generation: self.generation,
        });
        let (hands, step) = (self.hands.clone(), self.step);
        self.acts.spawn(async move { (at, hands.inject(fault, step).await) });
        Some(format!("chaos {}: worker-{}, {}", at + 1, fault.slot, fault.act))
    }

    /// Whether the caravan is as it should be.
    fn ready(&self) -> bool {
        self.plan.pile_up || (self.whole && self.told.iter().all(|told| told.whole.is_some()))
    }

    fn committed(&mut self, step: &StepMetrics) {
        self.mark(Mark::Committed(step.step));
        let now = self.started.elapsed();
        self.step = step.step.0;
        let all = self.whole && step.generation == self.generation && step.workers == self.workers;
        let grace = self.hands.detect * UNNOTICED;
        for told in &mut self.told {
            if !told.seen() || !told.fault.act.kind().regroups() || step.generation > told.generation {
                told.committed.get_or_insert(now);
            }
            let missed = told.reached == Some(false) || !told.fault.act.kind().is_noticed();
            let quiet = |over: Duration| missed || now >= over + grace;
            if all && told.over.is_some_and(|over| told.seen() || quiet(over)) {
                told.whole.get_or_insert(now);
            }
        }
        let reached = self.left.front().filter(|fault| self.step >= fault.step);
        if let Some(fault) = reached.filter(|_| self.due.is_none() && self.ready()) {
            self.due = Some(Instant::now() + self.plan.step.mul_f64(fault.moment));
        }
    }

    fn event(&mut self, event: &LoggedEvent) {
        match &event.event {
            Event::Joined { worker, name } => {
                let slot = name.strip_prefix("worker-").and_then(|n| n.parse().ok());
                self.slots.extend(slot.map(|slot| (*worker, slot)));
            }
            Event::Planned { generation, members, .. } => {
                self.mark(Mark::Planned);
                self.generation = *generation;
                self.whole = members.len() == self.workers as usize;
            }
            Event::Stopping { boundary: false, .. } => self.mark(Mark::Stopped),
            Event::Hung { worker, .. } | Event::Lost { worker, .. } => {
                self.mark(Mark::Noticed);
                self.whole = false;
                self.named(self.slots.get(worker).copied(), &event.text);
            }
            Event::CheckpointWritten { step } => self.tried(*step),
            Event::CheckpointFailed { step, .. } => {
                // It names no worker; the one whose disk is full is meant.
                let disk = self.told.iter().rfind(|t| t.fault.act == Act::Disk && t.over.is_none());
                self.named(disk.map(|told| told.fault.slot), &event.text);
                self.tried(*step);
            }
            _ => {}
        }
    }

    /// A checkpoint was written, or failed.
    fn tried(&self, step: Step) {
        self.saved.send_modify(|newest| *newest = step.0.max(*newest));
    }

    /// An event names a worker: of the faults that nobody has noticed, which one is it?
    fn named(&mut self, slot: Option<u32>, text: &str) {
        let now = self.started.elapsed();
        for told in self.told.iter_mut().filter(|told| told.whole.is_none()) {
            if slot == Some(told.fault.slot) {
                told.noticed.get_or_insert_with(|| (now, text.to_owned()));
            } else if told.noticed.is_none() && told.others.len() < MOST_OTHERS {
                told.others.push(text.to_owned());
            }
            // Steps in between were committed as if there were no fault.
            if told.generation == self.generation && told.fault.act.kind().regroups() {
                told.committed = None;
            }
        }
    }

    fn end(self, ended: Ended) -> Observed {
        let wall = self.started.elapsed();
        Observed { ended, wall, timeline: self.timeline, told: self.told, left: self.left.into() }
    }
}
