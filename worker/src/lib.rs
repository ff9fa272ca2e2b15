//! The worker around its core: coordinator session, fabric, engine thread.
//!
//! The core decides; here is what it decides about. Three parts answer to one loop
//! (`driver`): the session with the coordinator, the fabric between workers, and the engine
//! on its own thread. None of them knows another, and none knows the step protocol:
//!
//! ```text
//!  coordinator ── session ──┐                     ┌── engine thread: tasks, payloads, saves
//!                           ├── driver ── core    │        │
//!       peers ── fabric ────┘     └───────────────┘        │
//!                   └────────────── payloads ◄─────────────┘
//! ```
//!
//! There is one way to recover from anything that is not in the protocol: the process ends
//! with a reason ([`WorkerError`], [`Exit`]), and whoever started it starts it again.

mod driver;
mod engine;
mod error;
mod fabric;
mod initial;
#[cfg(test)]
mod log;
mod machine;
mod peak;
mod session;
mod signals;
#[cfg(test)]
mod stub;
mod trace;

pub use caravan_engine::Flaw;
pub use error::{Exit, WorkerError};
pub use initial::{InitialError, Listing};

use caravan_kernels::Family;
use caravan_types::message::{Farewell, Hello, PROTOCOL_VERSION, Refusal, Welcome};
use caravan_types::{Digest, RunSpec, SliceTable, Timing};
use caravan_worker_core::{Config, Core};
use driver::Driver;
use engine::{Costs, Engine, frames_of_two_steps};
use fabric::{Fabric, Settings};
use session::Session;
use signals::Signals;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use tokio::net::{TcpListener, UdpSocket};
use tokio::sync::mpsc;
use tokio::time::Instant;
use trace::Trace;

/// What a worker is started with.
#[derive(Clone, Debug)]
pub struct Options {
    /// The coordinator, as host:port.
    pub coordinator: String,
    /// Where to listen for other workers; port 0 takes a free one.
    pub listen: SocketAddr,
    /// The host:port under which other workers reach it, where that is not where it listens.
    pub advertise: Option<String>,
    /// Compute threads.
    pub threads: usize,
    /// Memory that the worker may use, in bytes; not known where none.
    pub memory: Option<u64>,
    /// How fast it computes, relative to one ordinary core; as fast as its threads are many
    /// where none.
    pub speed: Option<f64>,
    /// A name for people; host and process id where none is given.
    pub name: Option<String>,
}

/// Works for a coordinator until it says farewell.
///
/// SIGTERM and SIGINT make the worker leave at the next step boundary, a second one at once.
/// The process should end when this returns: the engine's thread may be in the middle of a
/// task that nobody wants any more.
///
/// # Errors
/// Whatever keeps a worker from working; [`Exit`] says what to do about it.
pub async fn run(options: Options) -> Result<Farewell, WorkerError> {
    let (_, flaws) = mpsc::channel(1);
    run_with(options, flaws).await
}

/// The same on a machine where what comes in `flaws` goes wrong.
///
/// # Errors
/// As [`run`].
pub async fn run_with(options: Options, flaws: mpsc::Receiver<Flaw>) -> Result<Farewell, WorkerError> {
    match work(options, flaws).await {
        // Who comes when the run is over is told what its members were told.
        Err(WorkerError::Refused(Refusal::Over(farewell))) => Ok(farewell),
        ended => ended,
    }
}

async fn work(options: Options, flaws: mpsc::Receiver<Flaw>) -> Result<Farewell, WorkerError> {
    let mut signals = Signals::listen().map_err(WorkerError::Start)?;
    let unheard = |source| WorkerError::Listen { address: options.listen, source };
    let listener = TcpListener::bind(options.listen).await.map_err(unheard)?;
    let fabric = match &options.advertise {
        Some(address) => address.clone(),
        None => advertised(&listener, &options.coordinator).await.map_err(unheard)?.to_string(),
    };
    let hello = hello(&options, fabric.clone());
    let (mut session, welcome) = tokio::select! {
        joined = Session::join(&options.coordinator, &hello, Timing::default()) => joined?,
        () = signals.next() => return Ok(Farewell::Left),
    };
    let spec = &welcome.spec;
    tracing::info!(worker = %welcome.worker, run = spec.name, fabric = %fabric, "taken on");
    if let Some(peak) = peak::measure(spec.numerics.clone(), options.threads, &hello.host).await {
        session.measured(peak);
    }
    let slices = SliceTable::new(&spec.model);
    let (engine, reports) = {
        let frames = frames_of_two_steps(&slices, &spec.batch);
        let (watch, threads) = (Arc::default(), options.threads);
        let build = machine::builder(&welcome, threads, Arc::clone(&watch));
        let costs = Costs { model: spec.model.clone(), batch: spec.batch };
        Engine::start(build, machine::writer(&welcome), watch, costs, frames).map_err(WorkerError::Start)?
    };
    let fabric = Fabric::start(listener, settings(&welcome, slices));
    let driver = Driver {
        core: Core::new(config(&welcome), 0),
        trace: Trace::new(&spec.name, welcome.worker),
        session,
        fabric,
        engine,
        reports,
        signals,
        flaws,
        spec: welcome.spec,
        started: Instant::now(),
    };
    driver.run().await
}

fn hello(options: &Options, fabric: String) -> Hello {
    let host = host();
    Hello {
        protocol: PROTOCOL_VERSION,
        build: env!("CARGO_PKG_VERSION").into(),
        name: options.name.clone().unwrap_or_else(|| format!("{host}:{}", std::process::id())),
        host,
        fabric,
        families: Family::available().into_iter().map(|f| f.name().to_owned()).collect(),
        threads: options.threads as u32,
        resume: None,
        memory: options.memory.unwrap_or(0),
        speed: options.speed.unwrap_or(options.threads as f64),
    }
}

fn config(welcome: &Welcome) -> Config {
    Config {
        worker: welcome.worker,
        shape: welcome.spec.model.clone(),
        batch: welcome.spec.batch,
        steps: welcome.spec.recipe.steps,
        checkpoint_every: welcome.checkpoint_every,
        non_finite: welcome.spec.recipe.non_finite,
        timing: welcome.timing,
    }
}

fn settings(welcome: &Welcome, slices: SliceTable) -> Settings {
    Settings {
        worker: welcome.worker,
        run: digest(&welcome.spec),
        slices,
        batch: welcome.spec.batch,
        dim: welcome.spec.model.dim,
        timing: welcome.timing,
    }
}

/// Hash of a run spec: all workers of a run were given the same one.
#[expect(clippy::expect_used, reason = "only maps and hand-written serialisers fail; a spec has neither")]
fn digest(spec: &RunSpec) -> Digest {
    let json = serde_json::to_vec(spec).expect("a run spec is plain data");
    Digest(*blake3::hash(&json).as_bytes())
}

/// The name of this machine. Linux's own file, as there is no name in the standard library.
fn host() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").or_else(|_| std::env::var("HOSTNAME"));
    name.map(|name| name.trim().to_owned()).unwrap_or_else(|_| "localhost".into())
}

/// The address under which other workers reach the listener. One that listens everywhere is
/// reached where this machine's way to the coordinator begins.
async fn advertised(listener: &TcpListener, coordinator: &str) -> std::io::Result<SocketAddr> {
    let mut address = listener.local_addr()?;
    if address.ip().is_unspecified() {
        // Connecting a datagram socket sends nothing; it looks up the route.
        let probe = UdpSocket::bind(SocketAddr::new(address.ip(), 0)).await?;
        let from = match probe.connect(coordinator).await {
            Ok(()) => probe.local_addr()?.ip(),
            // An address that cannot be looked up is the session's to complain about.
            Err(_) => IpAddr::from([127, 0, 0, 1]),
        };
        address.set_ip(from);
    }
    Ok(address)
}
