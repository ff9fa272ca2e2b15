//! The driver's contract, with a store that the test holds the key of.

use super::*;
use crate::journal;
use crate::journal::tests::spec;
use crate::store::{State, StoreError};
use caravan_coordinator_core::Config;
use caravan_types::message::{Activity, Committed, PROTOCOL_VERSION, Report};
use caravan_types::progress::{EngineProgress, Stragglers, Wait};
use caravan_types::status::LossReason;
use caravan_types::{SliceSet, SliceTable, Timing, Verdict};
use std::io;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{StreamExt, StreamMap};

/// Hands every append to the test and waits for its verdict.
struct GatedStore(mpsc::Sender<Append>);

impl Store for GatedStore {
    async fn append(&mut self, records: &[Record]) -> Result<(), StoreError> {
        let (verdict, wait) = oneshot::channel();
        self.0.send((records.to_vec(), verdict)).await.unwrap();
        wait.await.unwrap()
    }
}

type Append = (Vec<Record>, oneshot::Sender<Result<(), StoreError>>);

/// What a session is told, read as a worker reads it.
struct Inbox(mpsc::Receiver<Result<pb::ToWorker, Status>>);

impl Inbox {
    async fn recv(&mut self) -> Option<Result<Down, Status>> {
        self.0.recv().await.map(read)
    }
}

fn read(message: Result<pb::ToWorker, Status>) -> Result<Down, Status> {
    Ok(Down::try_from(message?).unwrap())
}

struct Bench {
    requests: mpsc::Sender<Request>,
    gate: mpsc::Receiver<Append>,
    journal: JournalHandle,
    outcome: JoinHandle<Result<Farewell, CoordinatorError>>,
    _dir: tempfile::TempDir,
}

/// A driver for `workers` workers with a failure budget of a minute.
fn bench(workers: u32) -> Bench {
    bench_with(workers, |_| {})
}

/// The same, with something done to its ledger first.
fn bench_with(workers: u32, prepare: impl FnOnce(&mut Ledger)) -> Bench {
    let dir = tempfile::tempdir().unwrap();
    let spec = spec();
    let config = Config {
        shape: spec.model.clone(),
        batch: spec.batch,
        steps: spec.recipe.steps,
        numerics: spec.numerics.clone(),
        recompute: false,
        redundancy: 2,
        stages: Some(1),
        workers,
        timing: Timing::from_millis(60_000),
        stragglers: Stragglers::Report,
    };
    let journal = journal::start(&dir.path().join("metrics.jsonl"), &spec, Step(0)).unwrap();
    let (appends, gate) = mpsc::channel(1);
    let welcome = Welcome {
        worker: WorkerId(0),
        spec: spec.clone(),
        redundancy: 2,
        timing: Timing::from_millis(200),
        checkpoint_every: 0,
        data: String::new(),
        checkpoints: String::new(),
        init: None,
        committed: Step(0),
    };
    let (mut ledger, tail) = Ledger::open(&dir.path().join("ledger.jsonl"), &spec, None).unwrap();
    assert_eq!(tail, None);
    prepare(&mut ledger);
    let checkpoints = Checkpoints { root: dir.path().join("checkpoints"), spec, tokenizer: None, keep: 1 };
    let restored = State::default().restored(None, false);
    let control = Recorder::start(&dir.path().join("control.jsonl"), &config, &restored);
    let parts = Parts {
        core: Core::new(config, restored, 0),
        control,
        store: GatedStore(appends),
        ledger,
        journal: journal.clone(),
        checkpoints: Arc::new(checkpoints),
        welcome,
        origin: Instant::now(),
    };
    let (driver, requests) = Driver::new(parts);
    Bench { requests, gate, journal, outcome: tokio::spawn(driver.run()), _dir: dir }
}

fn hello(name: &str) -> Hello {
    Hello {
        protocol: PROTOCOL_VERSION,
        build: "test".into(),
        name: name.into(),
        host: name.into(),
        fabric: "127.0.0.1:1".into(),
        families: vec!["portable".into()],
        threads: 1,
        resume: None,
        memory: 0,
        speed: 1.0,
    }
}

impl Bench {
    async fn join(&self, session: u64, room: usize) -> Inbox {
        let (outbox, inbox) = mpsc::channel(room);
        let session = Session(session);
        let hello = hello(&format!("worker {}", session.0));
        self.requests.send(Request::Hello { session, hello, outbox }).await.unwrap();
        Inbox(inbox)
    }

    async fn say(&self, session: u64, message: FromWorker) {
        self.requests.send(Request::Message { session: Session(session), message }).await.unwrap();
    }

    /// Lets everything be durable at once.
    fn open_the_gate(&mut self) -> JoinHandle<()> {
        let mut gate = std::mem::replace(&mut self.gate, mpsc::channel(1).1);
        tokio::spawn(async move {
            while let Some((_, verdict)) = gate.recv().await {
                verdict.send(Ok(())).unwrap();
            }
        })
    }

    async fn events(&self) -> Vec<Event> {
        self.journal.flush().await;
        self.journal.events(0).await.into_iter().map(|e| e.event).collect()
    }
}

/// Whether a message may be seen outside when so much is durable.
fn allowed(message: &Down, durable: &State) -> bool {
    match message {
        Down::Welcome(welcome) => welcome.worker.0 < durable.next_worker,
        Down::Message(ToWorker::Stop { generation, .. }) => *generation <= durable.generation,
        Down::Message(ToWorker::Plan(plan)) => durable.plan.as_ref() == Some(plan),
        Down::Message(_) | Down::Refused(_) => true,
    }
}

/// The report of a worker that has everything at a step; at step 0 that is nothing.
fn report_at(generation: Generation, applied: Step) -> FromWorker {
    let table = SliceTable::new(&spec().model);
    let all: SliceSet = table.iter().map(|(id, _)| id).filter(|_| applied > Step(0)).collect();
    let verdict = (applied > Step(0)).then_some(Verdict::Update { norm: 1.0 });
    let (state, weights) = (all.clone(), all);
    FromWorker::Report(Report { generation, applied, verdict, state, weights, prepared: None, sums: vec![] })
}

fn report(generation: Generation) -> FromWorker {
    report_at(generation, Step(0))
}

#[tokio::test]
async fn nothing_is_seen_outside_before_the_records_before_it_are_durable() {
    let mut b = bench(2);
    let mut durable = State::default();
    let mut inboxes = StreamMap::new();
    for session in 0..2 {
        inboxes.insert(session, ReceiverStream::new(b.join(session, OUTBOX).await.0));
    }
    let (mut appends, mut plans) = (0, 0);
    // Two workers join and agree on a plan, a third one joins them, one dies: every kind of
    // record but that of a checkpoint. One thread, and inboxes first: whatever was sent before an
    // append is looked at before that append is let through.
    while plans < 7 {
        let (session, message) = tokio::select! {
            biased;
            Some(message) = inboxes.next() => message,
            Some((records, verdict)) = b.gate.recv() => {
                appends += 1;
                records.into_iter().for_each(|r| durable.add(r));
                verdict.send(Ok(())).unwrap();
                continue;
            }
        };
        let message = read(message).unwrap();
        assert!(allowed(&message, &durable), "{message:?} with {durable:?}");
        match message {
            Down::Message(ToWorker::Stop { generation, .. }) => b.say(session, report(generation)).await,
            Down::Message(ToWorker::Plan(_)) => {
                plans += 1;
                match plans {
                    2 => drop(inboxes.insert(2, ReceiverStream::new(b.join(2, OUTBOX).await.0))),
                    5 => b.requests.send(Request::Closed { session: Session(1) }).await.unwrap(),
                    _ => {}
                }
            }
            _ => {}
        }
    }
    assert_eq!(
        appends, 7,
        "an id; an id and a generation; a plan; the same again for the third; a generation; a plan"
    );
}

#[tokio::test]
async fn a_store_that_fails_ends_the_run_and_nothing_is_said() {
    let mut b = bench(1);
    let mut inbox = b.join(0, OUTBOX).await;
    let (_, verdict) = b.gate.recv().await.unwrap();
    let full = io::Error::from(io::ErrorKind::StorageFull);
    verdict
        .send(Err(StoreError::Io { action: "write to", path: "/run/store.log".into(), source: full }))
        .ok();
    assert!(inbox.recv().await.is_none(), "the session ends without a welcome");
    let error = b.outcome.await.unwrap().unwrap_err().to_string();
    assert!(error.contains("/run/store.log") && error.contains("Free some space"), "{error}");
    assert_eq!(b.journal.snapshot().phase, Phase::Failed);
    let events = b.journal.events(0).await;
    assert!(matches!(&events[0].event, Event::Failed { reason } if *reason == error), "{events:?}");
}

#[tokio::test]
async fn a_ledger_that_cannot_be_written_ends_the_run_and_nobody_is_shown_the_step() {
    let mut b = bench_with(1, Ledger::fill_disk);
    let _open = b.open_the_gate();
    let mut inbox = b.join(0, OUTBOX).await;
    while let Some(message) = inbox.recv().await {
        match message.unwrap() {
            Down::Message(ToWorker::Stop { generation, .. }) => b.say(0, report(generation)).await,
            Down::Message(ToWorker::Plan(plan)) => {
                let (generation, step) = (plan.generation, Step(1));
                let committed =
                    Committed { generation, step, loss: 5.0, norm: 1.0, tokens: 100, took_ms: 10 };
                b.say(0, FromWorker::Committed(committed)).await;
            }
            _ => {}
        }
    }
    b.requests.send(Request::Closed { session: Session(0) }).await.unwrap();
    let error = b.outcome.await.unwrap().unwrap_err().to_string();
    assert!(error.contains("ledger.jsonl") && error.contains("Free some space"), "{error}");
    let snapshot = b.journal.snapshot();
    assert_eq!((snapshot.phase, snapshot.step), (Phase::Failed, Step(0)));
    assert!(b.journal.steps(Step(0)).await.is_empty());
}

#[tokio::test]
async fn a_worker_that_does_not_read_is_cut_and_the_others_go_on() {
    let mut b = bench(2);
    let _open = b.open_the_gate();
    let mut reads = b.join(0, OUTBOX).await;
    let deaf = b.join(1, 1).await; // room for its welcome only
    loop {
        match reads.recv().await.unwrap().unwrap() {
            Down::Message(ToWorker::Stop { generation, .. }) => b.say(0, report(generation)).await,
            Down::Message(ToWorker::Plan(plan)) => {
                assert_eq!(plan.members.len(), 1);
                break;
            }
            _ => {}
        }
    }
    let lost = Event::Lost { worker: WorkerId(2), reason: LossReason::SessionClosed };
    assert!(b.events().await.contains(&lost));
    assert!(deaf.0.is_closed() || deaf.0.len() == 1);
}

#[tokio::test]
async fn messages_from_sessions_that_were_not_taken_on_are_nobodys() {
    let mut b = bench(1);
    let _open = b.open_the_gate();
    b.say(77, report(Generation(1))).await;
    b.requests.send(Request::Closed { session: Session(77) }).await.unwrap();
    let mut inbox = b.join(0, OUTBOX).await;
    assert!(matches!(inbox.recv().await, Some(Ok(Down::Welcome(_)))));
}

#[tokio::test]
async fn a_drain_without_workers_ends_at_once_and_late_comers_are_refused() {
    let mut b = bench(1);
    let _open = b.open_the_gate();
    let (reply, phase) = oneshot::channel();
    b.requests.send(Request::Drain { reply }).await.unwrap();
    assert_eq!(phase.await, Ok(Phase::Drained));
    assert_eq!(b.outcome.await.unwrap().unwrap(), Farewell::Drained);
    assert_eq!(b.journal.snapshot().phase, Phase::Drained);
}

#[tokio::test]
async fn the_end_is_told_to_everybody_before_it_is_the_end() {
    let mut b = bench(1);
    let _open = b.open_the_gate();
    let mut inbox = b.join(0, OUTBOX).await;
    let (reply, phase) = oneshot::channel();
    let mut phase = Some((reply, phase));
    let (mut goodbye, mut applied) = (None, Step(0));
    while let Some(message) = inbox.recv().await {
        match message.unwrap() {
            Down::Message(ToWorker::Stop { generation, .. }) => {
                b.say(0, report_at(generation, applied)).await;
            }
            Down::Message(ToWorker::Plan(plan)) => {
                let heartbeat = FromWorker::Heartbeat {
                    applied: Step(0),
                    activity: Activity::Computing,
                    wait: Wait::Engine,
                    engine: EngineProgress::default(),
                };
                b.say(0, heartbeat).await;
                applied = Step(1);
                let (generation, step) = (plan.generation, applied);
                let committed =
                    Committed { generation, step, loss: 5.0, norm: 1.0, tokens: 100, took_ms: 10 };
                b.say(0, FromWorker::Committed(committed)).await;
                let (reply, answer) = phase.take().unwrap();
                b.requests.send(Request::Drain { reply }).await.unwrap();
                assert_eq!(answer.await, Ok(Phase::Regrouping));
            }
            Down::Message(ToWorker::Save { generation, step, .. }) => {
                let part = Err("disk full".to_owned());
                b.say(0, FromWorker::Saved { generation, step, part }).await;
            }
            Down::Message(ToWorker::Goodbye(farewell)) => goodbye = Some(farewell),
            _ => {}
        }
    }
    assert_eq!(goodbye, Some(Farewell::Failed), "the last checkpoint could not be written");
    assert!(!b.outcome.is_finished(), "the session is still open");
    b.requests.send(Request::Closed { session: Session(0) }).await.unwrap();
    assert_eq!(b.outcome.await.unwrap().unwrap(), Farewell::Failed);
    assert_eq!(b.journal.steps(Step(0)).await.len(), 1);
}
