//! Completes checkpoints: manifest, rename, and room for the next one. Reads every part back to
//! check it, so it runs beside the driver and reports back.

use caravan_types::task::SavedPart;
use caravan_types::{Generation, RunSpec, Step};
use std::path::PathBuf;
use std::sync::Arc;

/// Where the checkpoints of a run are, and what goes into them.
#[derive(Debug)]
pub(crate) struct Checkpoints {
    pub root: PathBuf,
    pub spec: RunSpec,
    /// Copied into every checkpoint, so that it is enough to generate text.
    pub tokenizer: Option<PathBuf>,
    /// How many are kept.
    pub keep: usize,
}

impl Checkpoints {
    /// Makes a checkpoint of its parts, and removes those that are too old then. That an old one
    /// cannot be removed is no reason to fail the new one.
    pub(crate) async fn complete(
        self: Arc<Self>,
        generation: Generation,
        step: Step,
        parts: Vec<SavedPart>,
    ) -> Result<(), String> {
        let work = move || {
            let tokenizer = self.tokenizer.as_deref();
            caravan_checkpoint::complete(&self.root, generation, step, &self.spec, &parts, tokenizer)
                .map_err(|e| e.to_string())?;
            if let Err(error) = caravan_checkpoint::prune(&self.root, self.keep) {
                tracing::warn!(%error, "an old checkpoint could not be removed");
            }
            Ok(())
        };
        tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| Err(e.to_string()))
    }
}
