//! Writes parts of checkpoints on a thread of its own.

use super::{Fault, Report, guarded};
use caravan_types::task::{Done, SavedPart};
use caravan_types::{Generation, SliceId, Step};
use std::io;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use tokio::sync::mpsc;

/// The training state of some slices, each as master weights, first and second moments.
pub type States = Vec<(SliceId, Vec<f32>)>;

/// Writes a part of the checkpoint of a step.
pub type Save = Box<dyn FnMut(Generation, Step, States) -> Result<SavedPart, Fault> + Send>;

/// One part may wait while another is written. Each is a copy of the whole owned state, so
/// more of them would cost memory and gain nothing.
const WAITING: usize = 1;

/// Where a machine puts the copy of a state that is to be written.
pub struct Saver {
    parts: SyncSender<(Generation, Step, States)>,
}

impl Saver {
    pub(super) fn start(save: Save, reports: mpsc::Sender<Report>) -> io::Result<Self> {
        let (parts, queue) = sync_channel(WAITING);
        guarded("saver", reports.clone(), move || write_all(save, &queue, &reports))?;
        Ok(Self { parts })
    }

    /// Has a part written. The answer comes from the writing thread; at once only where that is
    /// gone. Waits while two parts are pending: a disk that is slower than the steps slows the
    /// steps, and no checkpoint is left out, least of all the last one.
    pub fn save(&self, generation: Generation, step: Step, states: States) -> Option<Done> {
        let reason = match self.parts.send((generation, step, states)) {
            Ok(()) => return None,
            Err(_) => "the thread that writes checkpoints has ended; its last words are in this worker's log",
        };
        Some(Done::Saved { generation, step, part: Err(reason.into()) })
    }
}

fn write_all(mut save: Save, queue: &Receiver<(Generation, Step, States)>, reports: &mpsc::Sender<Report>) {
    while let Ok((generation, step, states)) = queue.recv() {
        let slices = states.len();
        let _entered =
            tracing::info_span!("write", generation = generation.0, step = step.0, slices).entered();
        let part = save(generation, step, states).map_err(|fault| fault.to_string());
        if reports.blocking_send(Report::Done(Done::Saved { generation, step, part })).is_err() {
            return;
        }
    }
}
