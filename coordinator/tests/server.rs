//! A coordinator as its clients meet it: real sockets, a real gRPC client, plain HTTP.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed test panics, in its helpers too"
)]

use caravan_coordinator::store::StoreError;
use caravan_coordinator::{BadSetting, CoordinatorError, Options, Running, Update, serve};
use caravan_types::message::{
    Activity, Committed, Farewell, FromWorker, Hello, PROTOCOL_VERSION, Refusal, Report, ToWorker, Welcome,
};
use caravan_types::progress::{EngineProgress, Stragglers, Wait};
use caravan_types::status::{Event, LoggedEvent, LossReason, Phase, Snapshot, StepMetrics};
use caravan_types::*;
use caravan_wire::{CoordinatorClient, Down, Timeouts, Up, connect, pb};
use serde_json::Value;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Streaming};

const DETECT_MS: u64 = 400;

fn options(dir: &Path) -> Options {
    let spec = RunSpec {
        version: caravan_types::run_spec::RUN_SPEC_VERSION,
        name: "demo".into(),
        model: ModelShape::preset("260k").unwrap(),
        data: DataSpec { digest: Digest::default(), tokens: 1 << 20 },
        batch: BatchShape { lanes: 4, micro_batches: 1, sequences: 2, sequence_length: 128 },
        recipe: Recipe { steps: 100, warmup_steps: 10, ..Recipe::default() },
        init: caravan_types::Initial::Seed,
        seed: 1,
        numerics: NumericsClass { precision: Precision::Fp32, family: "portable".into() },
    };
    Options {
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
        recompute: true,
        redundancy: 2,
        stages: None,
        workers: 1,
        timing: Timing::from_millis(DETECT_MS),
        stragglers: Stragglers::Report,
        checkpoint_every: 50,
        keep_checkpoints: 2,
        checkpoint: None,
        refused: vec![],
        recover: false,
    }
}

async fn running(dir: &Path) -> Running {
    serve(options(dir)).await.unwrap()
}

fn hello(name: &str) -> Hello {
    Hello {
        protocol: PROTOCOL_VERSION,
        build: "test".into(),
        name: name.into(),
        host: "here".into(),
        fabric: "127.0.0.1:1".into(),
        families: vec!["avx512".into(), "portable".into()],
        threads: 1,
        resume: None,
        memory: 0,
        speed: 1.0,
    }
}

async fn client(address: SocketAddr) -> CoordinatorClient<Channel> {
    let each = Duration::from_secs(5);
    let timeouts = Timeouts { connect: each, keep_alive: each, keep_alive_timeout: each };
    connect(&address.to_string(), timeouts).await.unwrap()
}

/// A worker's end of a session.
struct Worker {
    up: mpsc::Sender<pb::FromWorker>,
    down: Streaming<pb::ToWorker>,
    _client: CoordinatorClient<Channel>,
}

impl Worker {
    async fn open(address: SocketAddr, first: Option<pb::FromWorker>) -> Result<Self, tonic::Status> {
        let (up, queued) = mpsc::channel(16);
        if let Some(first) = first {
            up.send(first).await.unwrap();
        }
        let mut client = client(address).await;
        let down = client.session(ReceiverStream::new(queued)).await?.into_inner();
        Ok(Self { up, down, _client: client })
    }

    async fn join(address: SocketAddr, name: &str) -> (Self, Welcome) {
        let mut worker = Self::open(address, Some(hello(name).into())).await.unwrap();
        let welcome = worker.next().await.unwrap().answer().unwrap().unwrap();
        (worker, *welcome)
    }

    async fn next(&mut self) -> Option<Down> {
        let message = self.down.message().await.unwrap()?;
        Some(Down::try_from(message).unwrap())
    }

    async fn say(&self, message: FromWorker) {
        self.up.send(message.into()).await.unwrap();
    }

    /// Answers a stop as a worker that has nothing, and takes the plan.
    async fn plan(&mut self) -> Arc<Plan> {
        loop {
            match self.next().await.unwrap().message().unwrap() {
                ToWorker::Stop { generation, .. } => {
                    let report = Report {
                        generation,
                        applied: Step(0),
                        verdict: None,
                        state: SliceSet::default(),
                        weights: SliceSet::default(),
                        prepared: None,
                        sums: Vec::new(),
                    };
                    self.say(FromWorker::Report(report)).await;
                }
                ToWorker::Plan(plan) => return plan,
                other => panic!("{other:?}"),
            }
        }
    }

    async fn commit(&self, generation: Generation, step: u64) {
        let committed = Committed {
            generation,
            step: Step(step),
            loss: 9.0 - step as f64,
            norm: 1.5,
            tokens: 100,
            took_ms: 10,
        };
        self.say(FromWorker::Committed(committed)).await;
    }
}

/// One HTTP/1.1 request on a connection of its own: status, headers, body.
async fn ask(address: SocketAddr, request: &str) -> (u16, String, String) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
    (status, head.to_lowercase(), body.to_owned())
}

async fn get(address: SocketAddr, path: &str) -> (u16, String, String) {
    ask(address, &format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")).await
}

async fn json<T: serde::de::DeserializeOwned>(address: SocketAddr, path: &str) -> T {
    let (status, head, body) = get(address, path).await;
    assert_eq!(status, 200, "{head}");
    assert!(head.contains("content-type: application/json"), "{head}");
    serde_json::from_str(&body).unwrap_or_else(|e| panic!("{path}: {e}: {body}"))
}

/// Waits for an event that satisfies `wanted`, also one that is past.
async fn event(running: &Running, wanted: impl Fn(&Event) -> bool) -> Event {
    let mut updates = running.handle.subscribe();
    if let Some(past) = running.handle.events(0).await.into_iter().find(|e| wanted(&e.event)) {
        return past.event;
    }
    loop {
        match updates.next().await.expect("the coordinator ended") {
            Update::Event(e) if wanted(&e.event) => return e.event.clone(),
            _ => {}
        }
    }
}

async fn committed(running: &Running, step: u64) {
    let mut updates = running.handle.subscribe();
    while running.handle.snapshot().step < Step(step) {
        updates.next().await.expect("the coordinator ended");
    }
}

// ---- sessions ----

#[tokio::test]
async fn who_asks_first_hears_of_everything_since_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let mut running = running(dir.path()).await;
    let (mut worker, _welcome) = Worker::join(running.address, "first").await;
    worker.plan().await;
    event(&running, |e| matches!(e, Event::Planned { .. })).await;
    let past: Vec<Event> = running.handle.events(0).await.into_iter().map(|e| e.event).collect();
    let mut updates = running.updates();
    let mut heard = Vec::new();
    while heard.len() < past.len() {
        if let Update::Event(e) = updates.next().await.expect("the coordinator ended") {
            heard.push(e.event.clone());
        }
    }
    assert_eq!(heard, past);
}

#[tokio::test]
async fn a_worker_joins_steps_and_is_seen_in_every_way() {
    let dir = tempfile::tempdir().unwrap();
    let running = running(dir.path()).await;
    let address = running.address;
    let (mut worker, welcome) = Worker::join(address, "first").await;
    assert_eq!(
        (welcome.worker, welcome.timing, welcome.checkpoint_every),
        (WorkerId(1), Timing::from_millis(DETECT_MS), 50)
    );
    assert_eq!(welcome.spec, options(dir.path()).spec);
    let plan = worker.plan().await;
    assert!(plan.recompute);
    worker.commit(plan.generation, 1).await;
    committed(&running, 1).await;
    let (_, _, text) = get(address, "/metrics").await;
    assert!(!text.contains("caravan_mfu_ratio"), "a share of what nobody has measured: {text}");
    let peak = Peak { thread: 1e11, threads: 4, cores: 2, place: "here 0-1".into() };
    worker.say(FromWorker::Peak(peak)).await;
    for step in 2..=3 {
        worker.commit(plan.generation, step).await;
    }
    let heartbeat = FromWorker::Heartbeat {
        applied: Step(3),
        activity: Activity::Computing,
        wait: Wait::Engine,
        engine: EngineProgress::default(),
    };
    worker.say(heartbeat).await;
    committed(&running, 3).await;

    let snapshot: Snapshot = json(address, "/api/snapshot").await;
    assert_eq!((snapshot.phase, snapshot.step, snapshot.steps), (Phase::Running, Step(3), 100));
    assert_eq!(snapshot.workers[0].name, "first");
    let steps: Vec<StepMetrics> = json(address, "/api/steps?since=1").await;
    assert_eq!(steps.iter().map(|m| (m.step.0, m.loss)).collect::<Vec<_>>(), [(2, 7.0), (3, 6.0)]);
    let mfu = welcome.spec.mfu(0.01, 2e11);
    assert_eq!(steps[0].mfu, Some(mfu), "of the two cores that four threads share");
    let first = &json::<Vec<Value>>(address, "/api/steps").await[0];
    assert!(first["loss"].is_f64() && first.get("mfu").is_none(), "{first}");
    let events: Vec<Value> = json(address, "/api/events").await;
    let kinds: Vec<_> = events.iter().map(|e| e["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["joined", "stopping", "planned"]);
    assert_eq!(json::<Vec<Value>>(address, "/api/events?since=2").await.len(), 1);

    let (_, head, text) = get(address, "/metrics").await;
    assert!(head.contains("content-type: application/openmetrics-text"), "{head}");
    assert!(text.contains("caravan_step{run=\"demo\"} 3"), "{text}");
    assert!(text.contains(&format!("caravan_mfu_ratio{{run=\"demo\"}} {mfu}\n")), "{text}");

    let mut grpc = client(address).await;
    let status = grpc.status(pb::StatusRequest {}).await.unwrap().into_inner();
    let status = Snapshot::try_from(status).unwrap();
    assert_eq!((status.step, status.last.unwrap().mfu), (Step(3), Some(mfu)));
    let mut events = grpc.events(pb::EventsRequest { since: 1 }).await.unwrap().into_inner();
    assert_eq!(events.message().await.unwrap().unwrap().number, 1);

    drop(worker);
    let lost = event(&running, |e| matches!(e, Event::Lost { .. })).await;
    assert_eq!(lost, Event::Lost { worker: WorkerId(1), reason: LossReason::SessionClosed });
    loop {
        let event = LoggedEvent::try_from(events.message().await.unwrap().unwrap()).unwrap().event;
        if event == lost {
            break;
        }
    }
}

#[tokio::test]
async fn a_drain_by_grpc_ends_the_run_for_everybody() {
    let dir = tempfile::tempdir().unwrap();
    let running = serve(Options { workers: 2, ..options(dir.path()) }).await.unwrap();
    let (mut worker, _) = Worker::join(running.address, "first").await;
    let reply = client(running.address).await.drain(pb::DrainRequest {}).await.unwrap().into_inner();
    assert_eq!(reply.phase(), pb::Phase::Drained);
    assert_eq!(worker.next().await, Some(Down::Message(ToWorker::Goodbye(Farewell::Drained))));
    assert_eq!(worker.next().await, None);
    drop(worker);
    assert_eq!(running.handle.ended().await.unwrap(), Farewell::Drained);
    assert_eq!(running.handle.drain().await, Phase::Drained, "too late, and harmless");

    let late = Worker::open(running.address, Some(hello("late").into())).await.map(|_| ()).unwrap_err();
    assert_eq!(late.code(), Code::Unavailable);
    assert_eq!(get(running.address, "/healthz").await.0, 503);
    assert_eq!(json::<Snapshot>(running.address, "/api/snapshot").await.phase, Phase::Drained);
    let text = std::fs::read_to_string(dir.path().join("metrics.jsonl")).unwrap();
    assert!(text.contains("\"kind\":\"drained\""), "{text}");
    running.shutdown().await;
}

#[tokio::test]
async fn workers_of_another_protocol_or_class_are_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let running = running(dir.path()).await;
    let old = Hello { protocol: 99, ..hello("old") };
    let mut worker = Worker::open(running.address, Some(old.into())).await.unwrap();
    let refusal = worker.next().await.unwrap().answer().unwrap().unwrap_err();
    assert_eq!(refusal, Refusal::Protocol { ours: PROTOCOL_VERSION, theirs: 99 });
    assert_eq!(worker.next().await, None, "nothing follows a refusal");

    let other = Hello { families: vec!["neon".into()], ..hello("other") };
    let mut worker = Worker::open(running.address, Some(other.into())).await.unwrap();
    let refusal = worker.next().await.unwrap().answer().unwrap().unwrap_err();
    assert!(refusal.to_string().contains("\"portable\""), "{refusal}");
    assert!(running.handle.snapshot().workers.is_empty());
}

#[tokio::test]
async fn a_session_without_a_hello_is_ended_within_the_failure_budget() {
    let dir = tempfile::tempdir().unwrap();
    let running = running(dir.path()).await;
    let silent = Worker::open(running.address, None).await.map(|_| ()).unwrap_err();
    assert_eq!(silent.code(), Code::DeadlineExceeded);
    assert!(silent.message().contains("no hello within 400 ms"), "{silent}");
}

#[tokio::test]
async fn messages_out_of_place_or_malformed_end_the_session_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let running = running(dir.path()).await;
    for first in [pb::FromWorker { message: None }, FromWorker::Leaving.into()] {
        let error = Worker::open(running.address, Some(first)).await.map(|_| ()).unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    }
    let (mut worker, _) = Worker::join(running.address, "twice").await;
    worker.up.send(Up::Hello(hello("again")).into()).await.unwrap();
    let error = loop {
        if let Err(error) = worker.down.message().await {
            break error;
        }
    };
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    event(&running, |e| matches!(e, Event::Lost { reason: LossReason::SessionClosed, .. })).await;
    Worker::join(running.address, "next").await;
}

#[tokio::test]
async fn a_restarted_coordinator_gives_no_id_and_no_generation_twice() {
    let dir = tempfile::tempdir().unwrap();
    let first = running(dir.path()).await;
    let (mut worker, welcome) = Worker::join(first.address, "before").await;
    let plan = worker.plan().await;
    first.shutdown().await;
    drop(worker);
    first_is_gone(dir.path()).await;
    let second = running(dir.path()).await;
    let (mut worker, again) = Worker::join(second.address, "after").await;
    assert!(again.worker > welcome.worker);
    assert!(worker.plan().await.generation > plan.generation);
}

/// Waits until the store's lock is free: a driver whose handles are all gone ends on its own.
async fn first_is_gone(dir: &Path) {
    let lock = std::fs::File::open(dir.join("store/store.lock")).unwrap();
    tokio::task::spawn_blocking(move || lock.lock().unwrap()).await.unwrap();
}

// ---- what cannot start ----

#[tokio::test]
async fn a_taken_port_a_taken_run_and_bad_settings_are_clear_errors() {
    let dir = tempfile::tempdir().unwrap();
    let first = running(dir.path()).await;
    let other = tempfile::tempdir().unwrap();
    let taken = serve(Options { listen: first.address, ..options(other.path()) }).await.unwrap_err();
    assert!(matches!(taken, CoordinatorError::PortTaken { address } if address == first.address), "{taken}");
    let twice = serve(options(dir.path())).await.unwrap_err();
    assert!(matches!(twice, CoordinatorError::Store(StoreError::InUse { .. })), "{twice}");
    let (bad, late) =
        (Timing::from_millis(5), Timing::from_millis(1000).with_heartbeat(Some(Duration::from_secs(1))));
    let timing = |timing: Timing| BadSetting::Timing(timing.validate().unwrap_err());
    for (bad, error) in [
        (Options { timing: late, ..options(other.path()) }, timing(late)),
        (Options { timing: bad, ..options(other.path()) }, timing(bad)),
        (Options { redundancy: 0, ..options(other.path()) }, BadSetting::Redundancy),
        (Options { keep_checkpoints: 0, ..options(other.path()) }, BadSetting::Keep),
    ] {
        assert_eq!(serve(bad).await.unwrap_err().to_string(), error.to_string());
    }
    let no_file = serve(Options { metrics: other.path().into(), ..options(other.path()) }).await.unwrap_err();
    assert!(no_file.to_string().contains("cannot open the metrics file"), "{no_file}");
}

// ---- the port ----

#[tokio::test]
async fn rubbish_on_the_port_harms_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let running = running(dir.path()).await;
    let (mut worker, _) = Worker::join(running.address, "first").await;
    worker.plan().await;
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let noise: Vec<u8> = (0..4096u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    for rubbish in [&noise[..], &[0; 64], b"\x16\x03\x01\x02\x00\x01\x00", &[&preface[..], &noise].concat()] {
        let mut stream = TcpStream::connect(running.address).await.unwrap();
        stream.write_all(rubbish).await.unwrap();
        stream.shutdown().await.unwrap();
        // It is hung up on, with or without an answer.
        let mut answer = Vec::new();
        let _reset = stream.read_to_end(&mut answer).await;
    }
    // The right path and content type, with a body that is no message.
    let path = "/caravan.v1.Coordinator/Session";
    let body = "\0\0\0\0\x05rubbish that is not protobuf";
    let (status, head, _) = ask(
        running.address,
        &format!(
            "POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/grpc\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        ),
    )
    .await;
    assert_eq!(status, 200, "{head}");
    assert!(head.contains("grpc-status: ") && !head.contains("grpc-status: 0"), "{head}");
    assert_eq!(running.handle.snapshot().workers.len(), 1);
    assert_eq!(get(running.address, "/healthz").await.0, 200);
}

#[tokio::test]
async fn the_page_and_its_files_are_served_with_their_headers() {
    let dir = tempfile::tempdir().unwrap();
    let running = running(dir.path()).await;
    for asset in caravan_coordinator::page::ASSETS {
        let (status, head, body) = get(running.address, asset.path).await;
        assert_eq!((status, body.as_bytes()), (200, asset.body), "{}", asset.path);
        assert!(head.contains(&format!("content-type: {}", asset.content_type)), "{head}");
        assert!(head.contains("content-security-policy: default-src 'none'"), "{head}");
        assert!(!head.contains("access-control-allow-origin"), "{head}");
    }
    assert_eq!(get(running.address, "/nothing").await.0, 404);
    assert_eq!(get(running.address, "/api/steps?since=soon").await.0, 400);
    assert_eq!(
        ask(
            running.address,
            "POST /api/snapshot HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
        )
        .await
        .0,
        405
    );
}

#[tokio::test]
async fn a_foreign_name_for_this_machine_is_not_answered() {
    let dir = tempfile::tempdir().unwrap();
    let running = running(dir.path()).await;
    let request = "GET /api/snapshot HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n";
    let (status, _, body) = ask(running.address, request).await;
    assert_eq!(status, 421);
    assert!(!body.contains("demo"), "{body}");
    assert_eq!(ask(running.address, "GET / HTTP/1.1\r\nConnection: close\r\n\r\n").await.0, 400);
}

#[tokio::test]
async fn the_live_feed_begins_with_a_snapshot_and_goes_on_as_it_happens() {
    let dir = tempfile::tempdir().unwrap();
    let running = running(dir.path()).await;
    let mut stream = TcpStream::connect(running.address).await.unwrap();
    stream.write_all(b"GET /api/live HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
    let mut text = String::new();
    read_until(&mut stream, &mut text, "event: snapshot\ndata: {\"run\":\"demo\"").await;
    assert!(text.to_lowercase().contains("content-type: text/event-stream"), "{text}");
    let (mut worker, _) = Worker::join(running.address, "first").await;
    read_until(&mut stream, &mut text, "event: event\ndata: {\"number\":0,").await;
    let plan = worker.plan().await;
    worker.commit(plan.generation, 1).await;
    read_until(&mut stream, &mut text, "event: step\ndata: {\"step\":1,").await;
}

async fn read_until(stream: &mut TcpStream, text: &mut String, wanted: &str) {
    let mut part = [0; 4096];
    while !text.contains(wanted) {
        let n = stream.read(&mut part).await.unwrap();
        assert!(n > 0, "the feed ended without {wanted:?}:\n{text}");
        text.push_str(&String::from_utf8_lossy(&part[..n]));
    }
}
