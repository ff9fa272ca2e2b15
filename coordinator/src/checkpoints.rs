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
            if let Err(error) = caravan_checkpoint::prune(&self.root, step, self.keep) {
                tracing::warn!(%error, "an old checkpoint could not be removed");
            }
            Ok(())
        };
        tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| Err(e.to_string()))
    }

    /// The newest intact one of this run that is not after `until`. Reads all of it.
    pub(crate) async fn newest_until(self: Arc<Self>, until: Step) -> Result<Option<Step>, String> {
        let work = move || {
            let mut until = until;
            // Every turn goes back one checkpoint.
            loop {
                let found = caravan_checkpoint::newest_intact_until(&self.root, Some(until));
                let found = found.map_err(|error| error.to_string())?;
                for refused in found.refused {
                    tracing::warn!(name = refused.name, reason = %refused.reason, "a damaged checkpoint was passed over");
                }
                let Some(checkpoint) = found.checkpoint else { return Ok(None) };
                let step = checkpoint.manifest().step;
                if checkpoint.manifest().spec == self.spec {
                    return Ok(Some(step));
                }
                tracing::warn!(step = step.0, "a checkpoint of another run was passed over");
                let Some(before) = step.0.checked_sub(1) else { return Ok(None) };
                until = Step(before);
            }
        };
        tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| Err(e.to_string()))
    }
}
