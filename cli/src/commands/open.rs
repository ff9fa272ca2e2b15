//! A checkpoint as a person names it: its folder, or a run's for the newest intact one.

use crate::say;
use caravan_checkpoint::{Checkpoint, CheckpointError, Refused, newest_intact};
use std::path::{Path, PathBuf};

/// Why there is no checkpoint to use.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("{} is no folder", .0.display())]
    NoFolder(PathBuf),
    #[error("there is no checkpoint in {}; `caravan train` writes one every cluster.checkpoint_every steps", .0.display())]
    NoCheckpoint(PathBuf),
    #[error("no checkpoint in {} is intact{}", dir.display(), list(refused))]
    NoneIntact { dir: PathBuf, refused: Vec<Refused> },
    #[error(
        "the checkpoint {} cannot be used: {reason}. Give the run's folder instead, and its newest intact \
         checkpoint is taken",
        dir.display()
    )]
    Damaged { dir: PathBuf, reason: CheckpointError },
    #[error(transparent)]
    Unlisted(#[from] CheckpointError),
    #[error(
        "the checkpoint {} has no tokenizer, so there is no way from text to tokens: its run was trained on ready \
         tokens",
        .0.display()
    )]
    NoTokenizer(PathBuf),
}

fn list(refused: &[Refused]) -> String {
    refused.iter().map(|r| format!("\n  {}: {}", r.name, r.reason)).collect()
}

/// The checkpoint that a folder is, or the newest intact one of the run that it is.
///
/// # Errors
/// Where there is none that is intact.
pub fn open(dir: &Path) -> Result<Checkpoint, OpenError> {
    if !dir.is_dir() {
        return Err(OpenError::NoFolder(dir.to_owned()));
    }
    if dir.join("manifest.json").exists() {
        return Checkpoint::open(dir).map_err(|reason| OpenError::Damaged { dir: dir.to_owned(), reason });
    }
    let of_run = dir.join("checkpoints");
    let found = newest_intact(if of_run.is_dir() { &of_run } else { dir })?;
    match found.checkpoint {
        Some(checkpoint) => {
            for Refused { name, reason } in &found.refused {
                say(&format!("note: checkpoint {name} is damaged and was passed over: {reason}"));
            }
            Ok(checkpoint)
        }
        None if found.refused.is_empty() => Err(OpenError::NoCheckpoint(dir.to_owned())),
        None => Err(OpenError::NoneIntact { dir: dir.to_owned(), refused: found.refused }),
    }
}

/// The file of a checkpoint's tokenizer.
///
/// # Errors
/// Where it has none.
pub fn tokenizer_of(checkpoint: &Checkpoint) -> Result<PathBuf, OpenError> {
    checkpoint.tokenizer().ok_or_else(|| OpenError::NoTokenizer(checkpoint.dir().to_owned()))
}
