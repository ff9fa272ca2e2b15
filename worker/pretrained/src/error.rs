//! What can be wrong with a foreign folder, or keep one from being written. Each sentence says
//! what, of which file or tensor, why, and what would do.

use crate::Dtype;
use std::io;
use std::path::{Path, PathBuf};

/// Why a model was not read or not written. Nothing is left behind of what was not written.
#[derive(Debug, thiserror::Error)]
pub enum PretrainedError {
    /// The file system said no.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The folder is none of the known kinds.
    #[error(
        "{} is no folder of a model: it has neither config.json, as Hugging Face's have, nor params.json, as Meta's have",
        .0.display()
    )]
    NotAModel(PathBuf),
    /// A file that is needed is not there.
    #[error("{} is missing: {why}", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// Why it is needed.
        why: String,
    },
    /// A file is damaged, or of a kind that is not read.
    #[error("{} cannot be read: {why}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A model that is computed in another way than this program computes.
    #[error("{}: {key} = {value}: {why}", path.display())]
    Setting {
        /// The file.
        path: PathBuf,
        /// The key in it.
        key: String,
        /// Its value, as JSON.
        value: String,
        /// What would do.
        why: String,
    },
    /// A tensor that the model needs is in no file.
    #[error("{} has no tensor {name}, which its model needs: a file of it may be missing", dir.display())]
    NoTensor {
        /// The folder.
        dir: PathBuf,
        /// The tensor.
        name: String,
    },
    /// Tensors that such a model has not got.
    #[error(
        "{} has {count} tensors that no Llama of its configuration has, such as {name}: it is another model, or its \
         configuration is of another one",
        dir.display()
    )]
    Extra {
        /// The folder.
        dir: PathBuf,
        /// How many.
        count: usize,
        /// One of them.
        name: String,
    },
    /// A tensor of another shape.
    #[error("{name} in {} has the shape {found:?}; by the folder's configuration it must have {expected}", path.display())]
    Shape {
        /// The tensor.
        name: String,
        /// The file.
        path: PathBuf,
        /// Its shape.
        found: Vec<u64>,
        /// What it should be.
        expected: String,
    },
    /// Copies of a tensor that should be one.
    #[error(
        "{name} differs between {} and {}, which must hold the same: one of them is damaged, or they are of two models",
        first.display(), second.display()
    )]
    Copies {
        /// The tensor.
        name: String,
        /// A file that holds it.
        first: PathBuf,
        /// One that holds it otherwise.
        second: PathBuf,
    },
    /// Numbers that cannot be written.
    #[error("{name} has a value that is no finite number in {dtype}: {why}")]
    NotFinite {
        /// The tensor, by the name that it is written under.
        name: String,
        /// The format.
        dtype: Dtype,
        /// Which value, and what would do.
        why: String,
    },
    /// What the other layout has no way to say.
    #[error("{layout} has no way to say {what}: {why}")]
    NoPlace {
        /// The layout.
        layout: &'static str,
        /// What.
        what: String,
        /// What would do.
        why: &'static str,
    },
    /// Two ways to compute the same that do not agree.
    #[error(
        "nothing was written: the logits of {left} and of {right} differ by {difference:.3e} on random prompts, where \
         {tolerance:.1e} is the most that rounding explains. This is a bug in the conversion: please report it with the \
         model's name"
    )]
    Mismatch {
        /// One of them.
        left: &'static str,
        /// The other one.
        right: &'static str,
        /// The largest difference, as a part of the largest logit.
        difference: f64,
        /// The most that is let pass.
        tolerance: f64,
    },
    /// The weights cannot be computed with.
    #[error("the logits of {0} are not finite: its weights are damaged, or are no trained model's")]
    NoLogits(&'static str),
    /// What was written is not what is read back.
    #[error(
        "nothing was kept: {name} was read back otherwise than it was written; test this machine's disk and memory"
    )]
    ReadBack {
        /// The tensor.
        name: String,
    },
    /// There is something already.
    #[error("{} is not empty: name a folder that is not there yet, or an empty one", .0.display())]
    NotEmpty(PathBuf),
    /// Computing logits in another way failed.
    #[error("cannot compute the model's logits to compare them: {0}")]
    Engine(String),
}

impl PretrainedError {
    /// For `map_err` on what the file system answers.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }

    /// For a file that is not what it should be.
    pub(crate) fn file(path: &Path, why: impl Into<String>) -> Self {
        Self::File { path: path.to_owned(), why: why.into() }
    }
}
