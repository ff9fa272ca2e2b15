//! What can be wrong with a checkpoint, one variant a cause: the reason that a damaged
//! checkpoint was passed over is shown to people as it stands here.

use caravan_types::{Digest, SliceId, Step};
use std::io;
use std::path::{Path, PathBuf};

/// Why a checkpoint could not be written or is not used.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The file system said no.
    #[error("cannot {action} {}: {source}{}", path.display(), advice(source))]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The seal does not match the manifest's content.
    #[error("manifest.json is damaged: {0}")]
    ManifestDamaged(String),
    /// Written by another version of the program.
    #[error(
        "manifest.json has format version {found}, this program reads version {known}: use the version of \
         caravan that wrote it"
    )]
    Version {
        /// Its version.
        found: u64,
        /// Ours.
        known: u32,
    },
    /// The folder's name and its manifest name different steps.
    #[error("the folder is named after step {folder}, its manifest is of step {manifest}")]
    Misnamed {
        /// By the folder's name.
        folder: Step,
        /// By the manifest.
        manifest: Step,
    },
    /// A file that the manifest lists is not there.
    #[error("{file} is missing")]
    FileMissing {
        /// Its name.
        file: String,
    },
    /// A file has another size than the manifest says.
    #[error("{file} has {found} bytes where {expected} were written")]
    FileSize {
        /// Its name.
        file: String,
        /// As written.
        expected: u64,
        /// As found.
        found: u64,
    },
    /// A file has other content than the manifest says.
    #[error("{file} is damaged: its content has the hash {found} where {expected} was written")]
    FileDamaged {
        /// Its name.
        file: String,
        /// As written.
        expected: Digest,
        /// As found.
        found: Digest,
    },
    /// A part's name is not of the form that [`write_part`](crate::write_part) gives.
    #[error("{file:?} is no name of a part (part-w….safetensors)")]
    FileName {
        /// The name.
        file: String,
    },
    /// A part is no safetensors file of the kind that is written here.
    #[error("{file} is not what a checkpoint's part should be: {what}")]
    Part {
        /// Its name.
        file: String,
        /// What is wrong with it.
        what: String,
    },
    /// A part belongs to another step.
    #[error("{file} holds the state of step {found}, the checkpoint is of step {expected}")]
    WrongStep {
        /// Its name.
        file: String,
        /// The checkpoint's step.
        expected: Step,
        /// The part's step.
        found: Step,
    },
    /// A slice is in no part.
    #[error("{missing} of {all} slices are in no part, the first of them {first}")]
    SliceMissing {
        /// How many are missing.
        missing: usize,
        /// How many the model has.
        all: usize,
        /// The first missing one.
        first: SliceId,
    },
    /// A slice is in two parts.
    #[error("slice {slice} is in {first} and in {second}")]
    SliceTwice {
        /// The slice.
        slice: SliceId,
        /// One of the parts.
        first: String,
        /// The other one.
        second: String,
    },
    /// A slice that the model does not have.
    #[error("slice {slice} is not in the model, which has slices s0 to s{}", slices.saturating_sub(1))]
    UnknownSlice {
        /// The slice.
        slice: SliceId,
        /// How many the model has.
        slices: usize,
    },
    /// A slice's state is not three vectors of one length.
    #[error("the state of slice {slice} has {found} values, which is not three vectors of one length")]
    StateLength {
        /// The slice.
        slice: SliceId,
        /// Its values.
        found: usize,
    },
    /// A slice's weights are not those that the manifest lists.
    #[error("the weights of slice {slice} have the hash {found}, the manifest says {expected}")]
    SliceDamaged {
        /// The slice.
        slice: SliceId,
        /// By the manifest.
        expected: Digest,
        /// As read.
        found: Digest,
    },
    /// A complete checkpoint of this step is there already, of something else.
    #[error(
        "{} is there already and holds another run's checkpoint: give this run a folder of its own (--run DIR)",
        .0.display()
    )]
    OtherRun(PathBuf),
}

impl CheckpointError {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }
}

/// What to do about the errors that have a remedy worth a sentence.
fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            "; free some space, or keep fewer checkpoints (cluster.keep)"
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            "; choose a folder that can be written to (--run DIR)"
        }
        _ => "",
    }
}
