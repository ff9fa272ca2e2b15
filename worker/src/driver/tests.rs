//! Whole workers: real engines, data, sockets and checkpoints, and a coordinator that says
//! what the test wants.

use crate::error::{Exit, WorkerError};
use crate::stub::{Stub, Talk};
use crate::{Options, run};
use caravan_data::{Request, prepare};
use caravan_types::message::{Committed, Farewell, FromWorker, Report, ToWorker, Welcome};
use caravan_types::{
    BatchShape, Digest, Generation, Member, ModelShape, NumericsClass, Part, Pipeline, Plan, Precision,
    Recipe, RunSpec, SliceSet, SliceTable, Source, Stage, Step, Timing, Transfer, WorkerId,
};
use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use tempfile::TempDir;
use tokio::task::JoinHandle;

const LANES: u32 = 4;

/// A run of three steps on a few made-up tokens, in a folder of its own.
struct Run {
    dir: TempDir,
    data: PathBuf,
    spec: RunSpec,
    detect_ms: u64,
}

impl Run {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let line = |i: u32| {
            format!("{{\"tokens\": {:?}}}\n", (0..100).map(|j| 3 + (i * j) % 50).collect::<Vec<_>>())
        };
        let path = dir.path().join("data.jsonl");
        fs::write(&path, (1..40).map(line).collect::<String>()).unwrap();
        let request = Request { paths: vec![path], extensions: None, vocab_size: 512, tokenizer: None };
        let prepared = prepare(&request, &dir.path().join("cache"), &()).unwrap();
        let shape = ModelShape::preset("260k").unwrap();
        let spec = RunSpec {
            version: caravan_types::run_spec::RUN_SPEC_VERSION,
            name: "three-steps".into(),
            model: ModelShape { dim: 32, layers: 2, heads: 4, kv_heads: 2, hidden: 64, context: 16, ..shape },
            data: prepared.spec,
            batch: BatchShape { lanes: LANES, micro_batches: 1, sequences: 2, sequence_length: 16 },
            recipe: Recipe { steps: 3, warmup_steps: 1, ..Recipe::default() },
            init: caravan_types::Initial::Seed,
            seed: 7,
            numerics: NumericsClass { precision: Precision::Fp32, family: "portable".into() },
        };
        let data = prepared.dir;
        // Long enough for a loaded machine, where nothing waits for it to pass.
        Self { dir, data, spec, detect_ms: 20_000 }
    }

    fn welcome(&self, worker: u64) -> Welcome {
        Welcome {
            worker: WorkerId(worker),
            spec: self.spec.clone(),
            redundancy: 2,
            timing: Timing::from_millis(self.detect_ms),
            checkpoint_every: 0,
            data: self.data.to_str().unwrap().into(),
            checkpoints: self.dir.path().join("checkpoints").to_str().unwrap().into(),
            init: None,
            committed: Step(0),
        }
    }

    /// The first plan: these members divide the lanes, all own everything, all starts from
    /// the seed.
    fn plan(&self, members: &[Member]) -> Plan {
        let slices = SliceTable::new(&self.spec.model).len();
        let share = LANES / members.len() as u32;
        let pipeline = |(i, member): (u32, &Member)| {
            let stage = Stage { worker: member.worker, units: 0..self.spec.model.units() };
            Pipeline { stages: vec![stage], lanes: i * share..(i + 1) * share }
        };
        let transfer = |member: &Member| Transfer {
            to: member.worker,
            from: Source::Init,
            part: Part::State,
            slices: SliceSet::all(slices),
        };
        Plan {
            generation: Generation(1),
            base: Step(0),
            verdict: None,
            recompute: false,
            members: members.to_vec(),
            pipelines: (0..).zip(members).map(pipeline).collect(),
            owners: vec![members.iter().map(|m| m.worker).collect(); slices],
            transfers: members.iter().map(transfer).collect(),
            idle: Vec::new(),
            disputes: Vec::new(),
        }
    }
}

type Worker = JoinHandle<Result<Farewell, WorkerError>>;

fn options(coordinator: String, listen: SocketAddr) -> Options {
    let (threads, memory, speed, name, advertise) = (1, None, None, None, None);
    Options { coordinator, listen, threads, memory, speed, name, advertise }
}

fn start(stub: &Stub) -> Worker {
    let (coordinator, listen) = (stub.address.clone(), "127.0.0.1:0".parse().unwrap());
    tokio::spawn(run(options(coordinator, listen)))
}

/// Takes on as many workers, and has them stop for the first generation.
async fn gather(run: &Run, stub: &mut Stub, count: u64) -> (Vec<Worker>, Vec<Talk>, Vec<Member>) {
    let (mut workers, mut talks, mut members) = (Vec::new(), Vec::new(), Vec::new());
    for worker in 1..=count {
        workers.push(start(stub));
        let (mut talk, hello) = stub.take_on(run.welcome(worker)).await;
        talk.say(ToWorker::Stop { generation: Generation(1), boundary: false }).await;
        assert!(matches!(talk.news().await, Some(FromWorker::Report(Report { applied: Step(0), .. }))));
        members.push(Member { worker: WorkerId(worker), fabric: hello.fabric });
        talks.push(talk);
    }
    (workers, talks, members)
}

/// The next commit that a worker tells of.
async fn commit(talk: &mut Talk) -> (u64, u64, u64) {
    match talk.news().await {
        Some(FromWorker::Committed(Committed { step, loss, norm, .. })) => {
            (step.0, loss.to_bits(), norm.to_bits())
        }
        other => panic!("{other:?}"),
    }
}

/// Three steps on so many workers: what each one committed, and the hash of each slice.
async fn three_steps(workers: u64) -> (Vec<(u64, u64, u64)>, Vec<Digest>) {
    let (run, mut stub) = (Run::new(), Stub::start().await);
    let (workers, mut talks, members) = gather(&run, &mut stub, workers).await;
    for talk in &mut talks {
        talk.say(ToWorker::Plan(Arc::new(run.plan(&members)))).await;
    }
    let mut commits = Vec::new();
    for step in 1..=3 {
        let mut seen = Vec::new();
        for talk in &mut talks {
            seen.push(commit(talk).await);
        }
        assert!(seen.iter().all(|c| *c == seen[0]) && seen[0].0 == step, "{seen:?}");
        commits.push(seen[0]);
    }
    // The first owner of everything writes the last checkpoint.
    let mut part = None;
    let mut vouched = Vec::new();
    for (i, talk) in talks.iter_mut().enumerate() {
        while vouched.len() == i || i == 0 && part.is_none() {
            match talk.news().await {
                Some(FromWorker::Saved { step: Step(3), part: Ok(saved), .. }) if i == 0 => {
                    part = Some(saved)
                }
                Some(FromWorker::Vouched { step: Step(3), sums, .. }) => vouched.push(sums),
                other => panic!("{other:?}"),
            }
        }
    }
    assert!(vouched.iter().all(|sums| !sums.is_empty() && *sums == vouched[0]), "{vouched:?}");
    for talk in &mut talks {
        talk.say(ToWorker::Goodbye(Farewell::Finished)).await;
    }
    for worker in workers {
        let ended = worker.await.unwrap();
        assert_eq!(Exit::from(&ended), Exit::Good, "{ended:?}");
    }
    (commits, part.unwrap().slices.into_iter().map(|(_, digest)| digest).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn one_two_and_four_workers_commit_the_same_bits() {
    let alone = three_steps(1).await;
    assert!(f64::from_bits(alone.0[0].1) > f64::from_bits(alone.0[2].1), "the loss falls");
    assert_eq!(alone, three_steps(2).await);
    assert_eq!(alone, three_steps(4).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_whose_peer_dies_tells_of_it() {
    let (run, mut stub) = (Run { detect_ms: 500, ..Run::new() }, Stub::start().await);
    let (mut workers, mut talks, members) = gather(&run, &mut stub, 2).await;
    // The second one never gets the plan, so nobody can commit.
    talks[0].say(ToWorker::Plan(Arc::new(run.plan(&members)))).await;
    workers.pop().unwrap().abort();
    let lost = FromWorker::PeerLost { generation: Generation(1), peer: WorkerId(2) };
    assert_eq!(talks[0].news().await, Some(lost));
    talks[0].say(ToWorker::Goodbye(Farewell::Failed)).await;
    assert_eq!(Exit::from(&workers.pop().unwrap().await.unwrap()), Exit::RunFailed);
}

#[tokio::test(flavor = "multi_thread")]
async fn other_data_than_the_run_s_is_refused_by_name() {
    let (mut run, mut stub) = (Run::new(), Stub::start().await);
    run.spec.data.digest = Digest([9; 32]);
    let worker = start(&stub);
    let (_talk, _) = stub.take_on(run.welcome(1)).await;
    let ended = worker.await.unwrap();
    let error = ended.as_ref().unwrap_err().to_string();
    assert!(error.contains("is not what the run is trained on") && error.contains("0909"), "{error}");
    assert_eq!(Exit::from(&ended), Exit::Engine);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_goes_on_without_its_coordinator_and_tells_the_next_one_what_it_missed() {
    let (run, mut stub) = (Run::new(), Stub::start().await);
    let (mut workers, mut talks, members) = gather(&run, &mut stub, 1).await;
    talks[0].say(ToWorker::Plan(Arc::new(run.plan(&members)))).await;
    // Nobody listens to what it says from here on.
    let first = talks[0].news().await;
    assert!(matches!(first, Some(FromWorker::Committed(Committed { step: Step(1), .. }))), "{first:?}");
    talks.clear();
    let known = Welcome { committed: Step(1), ..run.welcome(1) };
    let (mut talk, hello) = stub.take_on(known).await;
    assert_eq!(hello.resume, Some(WorkerId(1)));
    let mut steps = Vec::new();
    loop {
        match talk.news().await {
            Some(FromWorker::Committed(Committed { step, .. })) => steps.push(step.0),
            Some(FromWorker::Vouched { step: Step(3), .. }) => {}
            Some(FromWorker::Saved { step: Step(3), part: Ok(_), .. }) => break,
            other => panic!("{other:?}"),
        }
    }
    // Those that it tells again, and those that it tells for the first time, in order.
    assert_eq!(steps, [2, 3]);
    talk.say(ToWorker::Goodbye(Farewell::Finished)).await;
    assert_eq!(Exit::from(&workers.pop().unwrap().await.unwrap()), Exit::Good);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_run_s_coordinator_gets_no_worker_of_this_run() {
    let (run, mut stub) = (Run::new(), Stub::start().await);
    let worker = start(&stub);
    drop(stub.take_on(run.welcome(1)).await);
    let mut other = run.welcome(1);
    other.spec.seed += 1;
    let (_talk, _) = stub.take_on(other).await;
    let ended = worker.await.unwrap();
    assert!(matches!(ended, Err(WorkerError::OtherRun)), "{ended:?}");
}

/// The address that a child process of the test below works for.
const COORDINATOR: &str = "CARAVAN_TEST_COORDINATOR";

/// Signals are for a whole process, so the worker has one of its own: this test again, told by
/// the environment to be the worker.
#[tokio::test(flavor = "multi_thread")]
async fn the_first_signal_asks_to_leave_and_the_second_one_ends_at_once() {
    if let Ok(coordinator) = std::env::var(COORDINATOR) {
        let listen = "127.0.0.1:0".parse().unwrap();
        let ended = run(options(coordinator, listen)).await;
        std::process::exit(Exit::from(&ended) as i32);
    }
    let (run, mut stub) = (Run::new(), Stub::start().await);
    let mut worker = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "driver::tests::the_first_signal_asks_to_leave_and_the_second_one_ends_at_once"])
        .env(COORDINATOR, &stub.address)
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let (mut talk, _) = stub.take_on(run.welcome(1)).await;
    // Once it answers it knows that it was taken on; before that, one signal is enough.
    talk.say(ToWorker::Stop { generation: Generation(1), boundary: false }).await;
    assert!(matches!(talk.news().await, Some(FromWorker::Report(_))));
    let signal = || {
        let kill = format!("kill -TERM {}", worker.id());
        assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
    };
    signal();
    assert_eq!(talk.news().await, Some(FromWorker::Leaving));
    signal();
    assert_eq!(talk.news().await, None, "the session ends with the process");
    assert_eq!(worker.wait().unwrap().code(), Some(Exit::Interrupted as i32));
}

#[tokio::test]
async fn a_taken_fabric_port_is_named() {
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let listen = taken.local_addr().unwrap();
    let ended = run(options("127.0.0.1:1".into(), listen)).await;
    let error = ended.as_ref().unwrap_err().to_string();
    assert!(error.contains(&listen.to_string()) && error.contains("in use"), "{error}");
    assert_eq!(Exit::from(&ended), Exit::Usage);
}
