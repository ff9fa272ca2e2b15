//! Puts a coordinator together and starts it.

use crate::checkpoints::Checkpoints;
use crate::control::Recorder;
use crate::driver::{Driver, Parts};
use crate::handle::{Handle, Updates};
use crate::ledger::Ledger;
use crate::sessions::Service;
use crate::store::{FileStore, Store};
use crate::{BadSetting, CoordinatorError, http, journal, listen};
use caravan_checkpoint::Refused;
use caravan_coordinator_core::{Config, Core, Restored};
use caravan_types::message::Welcome;
use caravan_types::progress::Stragglers;
use caravan_types::status::Event;
use caravan_types::{RunSpec, Step, Timing, WorkerId};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// The paths of the gRPC service: package, service, method.
const GRPC: &str = "/caravan.v1.Coordinator/{*method}";

/// What a coordinator needs to know.
#[derive(Debug)]
pub struct Options {
    /// The run.
    pub spec: RunSpec,
    /// Folder of the store.
    pub store: PathBuf,
    /// Folder of the checkpoints, as every worker can reach it.
    pub checkpoints: PathBuf,
    /// The ledger of what was committed.
    pub ledger: PathBuf,
    /// The recording of what the core is told.
    pub control: PathBuf,
    /// The metrics file.
    pub metrics: PathBuf,
    /// Folder of the prepared data, as every worker can reach it.
    pub data: PathBuf,
    /// The list of the weights that the run starts with, as every worker can reach it; none where
    /// it starts from its seed.
    pub init: Option<PathBuf>,
    /// The tokenizer's file, which goes into every checkpoint.
    pub tokenizer: Option<PathBuf>,
    /// Where to listen. Anyone who can connect can join the run and read its data's text, so a
    /// loopback address is the right default.
    pub listen: SocketAddr,
    /// Whether layers are recomputed on the way back, for less memory.
    pub recompute: bool,
    /// Owners per slice.
    pub redundancy: u32,
    /// Stages of every pipeline; as many as are best where none.
    pub stages: Option<u32>,
    /// Workers that the first plan waits for.
    pub workers: u32,
    /// The failure budget, and what follows from it.
    pub timing: Timing,
    /// What is done about workers that are slower than they said.
    pub stragglers: Stragglers,
    /// Steps between checkpoints; 0 for none but the last.
    pub checkpoint_every: u64,
    /// How many checkpoints are kept.
    pub keep_checkpoints: usize,
    /// The newest intact checkpoint, where the run goes on from.
    pub checkpoint: Option<Step>,
    /// Damaged checkpoints that were passed over, to be told of.
    pub refused: Vec<Refused>,
    /// Whether workers of an earlier start may be alive: they are waited for. Not so where
    /// workers end with whoever started them.
    pub recover: bool,
}

/// A started coordinator. Dropping it stops it at once; [`Self::shutdown`] waits until it has.
#[derive(Debug)]
pub struct Running {
    /// Where it listens: the port is a real one also where 0 was asked for.
    pub address: SocketAddr,
    /// How to talk to it.
    pub handle: Handle,
    /// From the very beginning.
    updates: Updates,
    stop: oneshot::Sender<()>,
    server: JoinHandle<()>,
}

impl Running {
    /// All that happens since the start, for the first one who asks; for others from now on.
    pub fn updates(&mut self) -> Updates {
        std::mem::replace(&mut self.updates, self.handle.subscribe())
    }

    /// Closes the port and all connections. The run should have [ended](Handle::ended) before:
    /// where it has not, it is cut off as by a crash.
    pub async fn shutdown(self) {
        let _stopped_already = self.stop.send(());
        if let Err(error) = self.server.await {
            tracing::warn!(%error, "the server did not end as it should");
        }
    }
}

/// Starts a coordinator.
///
/// # Errors
/// Where a setting cannot work, the port is taken, or the store, the ledger or the metrics file
/// cannot be used. Nothing runs then.
pub async fn serve(options: Options) -> Result<Running, CoordinatorError> {
    check(&options)?;
    let listener = listen::bind(options.listen).await?;
    let (folder, path) = (options.store.clone(), options.ledger.clone());
    let (spec, checkpoint) = (options.spec.clone(), options.checkpoint);
    // The store's lock keeps a second coordinator away from the ledger, too.
    let open = move || -> Result<_, CoordinatorError> {
        let (store, state) = FileStore::open(&folder)?;
        Ok((store, state, Ledger::open(&path, &spec, checkpoint)?))
    };
    let opened = tokio::task::spawn_blocking(open).await;
    let (store, state, (ledger, committed)) = opened.map_err(|_| CoordinatorError::Crashed)??;
    if let Some(lost) = state.checkpoint.filter(|&step| Some(step) > options.checkpoint) {
        tracing::warn!(step = lost.0, "the checkpoint that was completed last is not usable any more");
    }
    let restored = Restored { committed, ..state.restored(options.checkpoint, options.recover) };
    start(options, listener, store, ledger, restored).await
}

fn check(options: &Options) -> Result<(), BadSetting> {
    options.timing.validate().map_err(BadSetting::Timing)?;
    if options.redundancy == 0 {
        return Err(BadSetting::Redundancy);
    }
    if options.keep_checkpoints == 0 {
        return Err(BadSetting::Keep);
    }
    Ok(())
}

/// Starts journal, driver and server on a store and a ledger that are open.
pub(crate) async fn start<S: Store>(
    options: Options,
    listener: TcpListener,
    store: S,
    ledger: Ledger,
    restored: Restored,
) -> Result<Running, CoordinatorError> {
    let address = listener.local_addr();
    let address = address.map_err(|source| CoordinatorError::Listen { address: options.listen, source })?;
    let welcome = welcome(&options)?;
    let timing = options.timing;
    // Where members may be alive, what was committed since the checkpoint is no history yet.
    let alive = restored.committed.as_ref().filter(|_| restored.plan.is_some()).map(|c| c.step);
    let base = alive.max(options.checkpoint).unwrap_or(Step(0));
    let journal = journal::start(&options.metrics, &options.spec, base)
        .map_err(|source| CoordinatorError::Metrics { path: options.metrics.clone(), source })?;
    let updates = Updates(journal.feed());
    for Refused { name, reason } in &options.refused {
        tracing::warn!(name, %reason, "a damaged checkpoint was passed over");
        let event = Event::CheckpointRefused { name: name.clone(), reason: reason.to_string() };
        journal.happened(event, base).await;
    }
    let config = config(&options);
    let control = Recorder::start(&options.control, &config, &restored);
    let parts = Parts {
        core: Core::new(config, restored, 0),
        control,
        store,
        ledger,
        journal: journal.clone(),
        welcome,
        checkpoints: Arc::new(Checkpoints {
            root: options.checkpoints,
            spec: options.spec,
            tokenizer: options.tokenizer,
            keep: options.keep_checkpoints,
        }),
        origin: Instant::now(),
    };
    let (driver, requests) = Driver::new(parts);
    let (end, outcome) = watch::channel(None);
    tokio::spawn(async move {
        let outcome = driver.run().await.map_err(Arc::new);
        if let Err(error) = &outcome {
            tracing::error!(%error, "the coordinator stopped");
        }
        end.send_replace(Some(outcome));
    });
    let handle = Handle { requests, journal, outcome };
    let service = caravan_wire::serve(Service::new(handle.clone(), timing));
    let app = http::routes(handle.clone()).route_service(GRPC, service);
    let (stop, stopped) = oneshot::channel();
    let server = tokio::spawn(listen::serve(listener, app, timing, listen::places(), stopped));
    tracing::info!(%address, run = handle.snapshot().run, "listening for workers and browsers");
    Ok(Running { address, handle, updates, stop, server })
}

fn config(options: &Options) -> Config {
    let spec = &options.spec;
    Config {
        shape: spec.model.clone(),
        batch: spec.batch,
        steps: spec.recipe.steps,
        numerics: spec.numerics.clone(),
        recompute: options.recompute,
        redundancy: options.redundancy,
        stages: options.stages,
        workers: options.workers,
        timing: options.timing,
        stragglers: options.stragglers,
    }
}

/// What workers are told, but for their ids. They may run in another folder than this process.
fn welcome(options: &Options) -> Result<Welcome, BadSetting> {
    let text = |folder: &PathBuf| {
        let absolute = std::path::absolute(folder).unwrap_or_else(|_| folder.clone());
        absolute.into_os_string().into_string().map_err(|name| BadSetting::Folder(name.into()))
    };
    Ok(Welcome {
        worker: WorkerId(0),
        committed: Step(0),
        spec: options.spec.clone(),
        redundancy: options.redundancy,
        timing: options.timing,
        checkpoint_every: options.checkpoint_every,
        data: text(&options.data)?,
        checkpoints: text(&options.checkpoints)?,
        init: options.init.as_ref().map(text).transpose()?,
    })
}
