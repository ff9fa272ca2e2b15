//! A thousand sessions: how soon all of them know of a death.
//!
//! usage: sessions [SESSIONS [KILLS]]        (1,000 sessions and 10 kills)
//!
//! A real coordinator in this process, on a loopback port; in a second one so many workers' ends
//! of sessions, each with a connection of its own, that do nothing but what the coordinator waits
//! for: they send heartbeats and answer a stop. Besides them a process for each kill, with one
//! session; it is killed with SIGKILL. The clock is that of the second process, and starts before
//! the kill: it is read when the last session has the stop, and when the last one has the plan.

#![allow(clippy::print_stdout, clippy::print_stderr)]

use caravan_coordinator::{Options, serve};
use caravan_types::message::{Activity, FromWorker, Hello, PROTOCOL_VERSION, Report, ToWorker, Welcome};
use caravan_types::progress::{EngineProgress, Stragglers, Wait};
use caravan_types::status::{Event, LoggedEvent, LossReason};
use caravan_types::*;
use caravan_wire::{Down, Timeouts, Up, connect, pb};
use std::error::Error;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};
use tokio::process::{Child, Command};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// What takes longer than this is stuck.
const PATIENCE: Duration = Duration::from_secs(60);

#[tokio::main]
async fn main() -> Outcome<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["victim", address] => victim(address).await,
        ["clients", address, sessions, kills] => clients(address, sessions.parse()?, kills.parse()?).await,
        [] => coordinate(1000, 10).await,
        [sessions] => coordinate(sessions.parse()?, 10).await,
        [sessions, kills] => coordinate(sessions.parse()?, kills.parse()?).await,
        _ => Err("usage: sessions [SESSIONS [KILLS]]".into()),
    }
}

/// This program once more, in another role.
fn role(args: &[&str]) -> Outcome<Child> {
    let mut command = Command::new(std::env::current_exe()?);
    Ok(command.args(args).stdin(Stdio::null()).kill_on_drop(true).spawn()?)
}

// ---- the coordinator's process ----

async fn coordinate(sessions: usize, kills: usize) -> Outcome<()> {
    let dir = tempfile::tempdir()?;
    let options = options(dir.path(), sessions + kills).ok_or("the preset is gone")?;
    let running = serve(options).await?;
    let address = running.address.to_string();
    let mut clients = role(&["clients", &address, &sessions.to_string(), &kills.to_string()])?;
    let status = clients.wait().await?;
    // Whoever was lost by anything but a kill should not have been.
    for LoggedEvent { event, .. } in running.handle.events(0).await {
        if let Event::Lost { worker, reason } = event
            && reason != LossReason::SessionClosed
        {
            eprintln!("{worker} was lost: {reason}");
        }
    }
    running.shutdown().await;
    if status.success() { Ok(()) } else { Err("the sessions' process failed".into()) }
}

fn options(dir: &Path, workers: usize) -> Option<Options> {
    let lanes = workers.next_power_of_two() as u32 / 2;
    let spec = RunSpec {
        version: caravan_types::run_spec::RUN_SPEC_VERSION,
        name: "sessions".into(),
        model: ModelShape::preset("15m")?,
        data: DataSpec { digest: Digest::default(), tokens: 1 << 20 },
        batch: BatchShape { lanes: lanes.max(1), micro_batches: 1, sequences: 1, sequence_length: 128 },
        recipe: Recipe { steps: 1_000_000, warmup_steps: 10, ..Recipe::default() },
        init: caravan_types::Initial::Seed,
        seed: 1,
        numerics: NumericsClass { precision: Precision::Fp32, family: "portable".into() },
    };
    Some(Options {
        spec,
        store: dir.join("store"),
        checkpoints: dir.join("checkpoints"),
        init: None,
        ledger: dir.join("ledger.jsonl"),
        control: dir.join("control.jsonl"),
        metrics: dir.join("metrics.jsonl"),
        data: dir.join("data"),
        tokenizer: None,
        listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        recompute: false,
        redundancy: 2,
        stages: None,
        workers: workers as u32,
        timing: Timing::default(),
        stragglers: Stragglers::Report,
        checkpoint_every: 0,
        keep_checkpoints: 1,
        checkpoint: None,
        refused: vec![],
        recover: false,
    })
}

// ---- the sessions' process ----

/// A worker's end of a session.
struct Worker {
    up: mpsc::Sender<pb::FromWorker>,
    down: Streaming<pb::ToWorker>,
    welcome: Welcome,
}

impl Worker {
    async fn join(address: &str, name: usize) -> Outcome<Self> {
        let each = Duration::from_secs(60);
        let timeouts = Timeouts { connect: each, keep_alive: each, keep_alive_timeout: each };
        let hello = Hello {
            protocol: PROTOCOL_VERSION,
            build: "bench".into(),
            name: format!("w{name}"),
            host: format!("host-{}", name / 8),
            fabric: format!("10.0.{}.{}:7071", name / 256, name % 256),
            families: vec!["portable".into()],
            threads: 1,
            resume: None,
            memory: 0,
            speed: 1.0,
        };
        let (up, queue) = mpsc::channel(16);
        up.send(Up::Hello(hello).into()).await?;
        let mut client = connect(address, timeouts).await?;
        let mut down = client.session(ReceiverStream::new(queue)).await?.into_inner();
        let first = down.message().await?.ok_or("the coordinator said nothing")?;
        let welcome = Down::try_from(first)?.answer()?.map_err(|refusal| refusal.to_string())?;
        Ok(Self { up, down, welcome: *welcome })
    }

    /// Does what the coordinator waits for until the session ends, and says what came when.
    async fn work(mut self, news: mpsc::Sender<News>) -> Outcome<()> {
        let table = SliceTable::new(&self.welcome.spec.model);
        let mut heartbeat = interval(self.welcome.timing.heartbeat());
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut moved, mut plan) = (0, None);
        loop {
            let message = tokio::select! {
                message = self.down.next() => message,
                _ = heartbeat.tick() => {
                    moved += 1;
                    self.up.send(beat(moved).into()).await?;
                    continue;
                }
            };
            let at = Instant::now();
            let Some(message) = message else { return Ok(()) };
            match message?.message {
                Some(pb::to_worker::Message::Stop(stop)) => {
                    news.send(News { at, what: What::Stop }).await?;
                    let generation = Generation(stop.generation);
                    let report = report(generation, self.welcome.worker, &table, plan.as_ref());
                    self.up.send(FromWorker::Report(report).into()).await?;
                }
                Some(pb::to_worker::Message::Plan(encoded)) => {
                    let bytes = encoded.len();
                    let message = Some(pb::to_worker::Message::Plan(encoded));
                    if let ToWorker::Plan(told) = Down::try_from(pb::ToWorker { message })?.message()? {
                        news.send(News { at, what: What::Plan { bytes, members: told.members.len() } })
                            .await?;
                        plan = Some(told);
                    }
                }
                other => return Err(format!("a session was told {other:?}").into()),
            }
        }
    }
}

/// What a session was told.
struct News {
    at: Instant,
    what: What,
}

enum What {
    Stop,
    /// With its length on the wire.
    Plan {
        bytes: usize,
        members: usize,
    },
}

fn beat(moved: u64) -> FromWorker {
    FromWorker::Heartbeat {
        applied: Step(0),
        activity: Activity::Computing,
        wait: Wait::Engine,
        engine: EngineProgress { moved, ..EngineProgress::default() },
    }
}

/// The report of a worker that has what its last plan gave it.
fn report(
    generation: Generation,
    me: WorkerId,
    table: &SliceTable,
    plan: Option<&std::sync::Arc<Plan>>,
) -> Report {
    let (mut state, mut weights) = (SliceSet::default(), SliceSet::default());
    if let Some(plan) = plan {
        state = plan.owned_by(me);
        let mine = plan.pipelines.iter().flat_map(|p| &p.stages).filter(|stage| stage.worker == me);
        for stage in mine {
            let here = table.iter().filter(|(_, slice)| stage.units.contains(&slice.unit.0));
            weights.extend(here.map(|(id, _)| id));
        }
    }
    Report { generation, applied: Step(0), verdict: None, state, weights, prepared: None, sums: Vec::new() }
}

/// One session that is killed with its process.
async fn victim(address: &str) -> Outcome<()> {
    let worker = Worker::join(address, std::process::id() as usize % 65_536).await?;
    let (news, mut heard) = mpsc::channel(16);
    tokio::spawn(async move { while heard.recv().await.is_some() {} });
    worker.work(news).await
}

async fn clients(address: &str, sessions: usize, kills: usize) -> Outcome<()> {
    // Nobody listens while sessions are opened one after the other, which makes many generations
    // where that is slow; one whose news found no room would send no heartbeats.
    let (news, mut heard) = mpsc::channel(1 << 20);
    let begun = Instant::now();
    for name in 0..sessions {
        let worker = Worker::join(address, name).await?;
        let news = news.clone();
        tokio::spawn(async move {
            if let Err(error) = worker.work(news).await {
                eprintln!("a session failed: {error}");
            }
        });
    }
    println!("{sessions} sessions are open after {:.2} s", begun.elapsed().as_secs_f64());
    let mut victims = (0..kills).map(|_| role(&["victim", address])).collect::<Outcome<Vec<_>>>()?;
    let begun = Instant::now();
    let first = plan(&mut heard, sessions, sessions + victims.len(), begun).await?;
    println!("the first plan, of {} bytes, is everywhere; {} kills follow\n", first.bytes, victims.len());
    let (mut stops, mut plans) = (Vec::new(), Vec::new());
    while let Some(mut victim) = victims.pop() {
        // So that heartbeats and what the last plan led to are back to their usual rate.
        tokio::time::sleep(Duration::from_millis(1500)).await;
        let killed = Instant::now();
        victim.start_kill()?;
        let told = plan(&mut heard, sessions, sessions + victims.len(), killed).await?;
        println!(
            "kill {:>2}: all have the stop after {:>5.0} ms, the plan after {:>5.0} ms",
            stops.len() + 1,
            told.stop_ms,
            told.plan_ms
        );
        stops.push(told.stop_ms);
        plans.push(told.plan_ms);
        victim.wait().await?;
    }
    println!("\nfrom the kill of one to the last of {sessions} sessions, in ms:");
    show("the stop", stops);
    show("the plan", plans);
    Ok(())
}

/// When all sessions knew of a new generation.
struct Told {
    stop_ms: f64,
    plan_ms: f64,
    bytes: usize,
}

/// Waits until all sessions have a plan of so many members.
async fn plan(
    heard: &mut mpsc::Receiver<News>,
    sessions: usize,
    members: usize,
    since: Instant,
) -> Outcome<Told> {
    let mut told = Told { stop_ms: 0.0, plan_ms: 0.0, bytes: 0 };
    let mut plans = 0;
    while plans < sessions {
        let next = timeout(PATIENCE, heard.recv()).await;
        let next =
            next.map_err(|_| format!("stuck: {plans} of {sessions} have a plan of {members} members"))?;
        let News { at, what } = next.ok_or("all sessions ended")?;
        let ms = at.saturating_duration_since(since).as_secs_f64() * 1e3;
        match what {
            What::Stop => told.stop_ms = told.stop_ms.max(ms),
            What::Plan { bytes, members: there } if there == members => {
                plans += 1;
                (told.plan_ms, told.bytes) = (told.plan_ms.max(ms), bytes);
            }
            // Who joins after the first plan was due makes another one.
            What::Plan { .. } => {}
        }
    }
    Ok(told)
}

fn show(name: &str, mut values: Vec<f64>) {
    values.sort_by(f64::total_cmp);
    let (Some(least), Some(most)) = (values.first(), values.last()) else { return };
    let median = values[values.len() / 2];
    println!("{name}: min {least:.0}  median {median:.0}  max {most:.0}");
}
