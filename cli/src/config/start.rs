//! `init`: a folder whose weights a run starts with, and what follows from it.
//!
//! The folder says what the model is, so the run file need not; where it does, it must say the
//! same. The folder's tokenizer is the one whose tokens its weights know.

use super::problem::Fault;
use super::reader::Reader;
use super::settings::Note;
use caravan_data::Tokenizer;
use caravan_pretrained::{Folder, Source};
use caravan_types::{ModelShape, RopeScaling};
use std::path::{Path, PathBuf};

/// What a run file says of its model.
pub(super) struct Given {
    pub dim: Option<u32>,
    pub layers: Option<u32>,
    pub heads: Option<u32>,
    pub kv_heads: Option<u32>,
    pub hidden: Option<u32>,
    pub vocab: Option<u32>,
    pub context: Option<u32>,
    pub norm_eps: Option<f32>,
    pub rope_theta: Option<f32>,
    pub rope_scaling: Option<RopeScaling>,
}

/// What else a folder brings.
pub(super) struct Start {
    /// Its tokenizer, where it has one that is understood.
    pub tokenizer: Option<PathBuf>,
    pub notes: Vec<Note>,
}

/// The model of a folder. None, with the problems noted, where it cannot be used or the run file
/// says otherwise.
pub(super) fn of_folder(
    r: &mut Reader,
    dir: &Path,
    given: &Given,
    preset: Option<&ModelShape>,
) -> Option<(ModelShape, Start)> {
    let folder = match Folder::open(dir, given.context) {
        Ok(folder) => folder,
        Err(error) => {
            r.fault("init", Fault::Folder(error.to_string()));
            return None;
        }
    };
    let shape = folder.shape().clone();
    let mut same = true;
    for (key, ours, theirs) in [
        ("model.dim", given.dim, shape.dim),
        ("model.layers", given.layers, shape.layers),
        ("model.heads", given.heads, shape.heads),
        ("model.kv_heads", given.kv_heads, shape.kv_heads),
        ("model.hidden", given.hidden, shape.hidden),
        ("model.vocab", given.vocab, shape.vocab),
        ("model.context", given.context, shape.context),
    ] {
        same &= agree(r, key, ours, theirs, theirs.to_string());
    }
    same &= agree(r, "model.norm_eps", given.norm_eps, shape.norm_eps, shape.norm_eps.to_string());
    same &= agree(r, "model.rope_theta", given.rope_theta, shape.rope_theta, shape.rope_theta.to_string());
    let theirs = shape.rope_scaling.map_or("none".to_owned(), |scaling| scaling.to_string());
    let ours = given.rope_scaling.map(Some);
    same &= agree(r, "model.rope_scaling.type", ours, shape.rope_scaling, theirs);
    if preset.is_some_and(|preset| *preset != shape) {
        let parameters = shape.parameters();
        let theirs = format!("another shape, of {parameters} parameters,");
        r.fault("model.preset", Fault::NotAsInit { theirs });
        same = false;
    }
    let mut start = Start { tokenizer: None, notes: Vec::new() };
    if folder.tied() {
        start.notes.push(Note::Tied(dir.to_owned()));
    }
    let tokenizer = dir.join("tokenizer.json");
    let usable = match tokenizer.exists() {
        true => Tokenizer::load(&tokenizer).map(|_| ()).map_err(|error| error.to_string()),
        false => Err("there is no tokenizer.json".into()),
    };
    match usable {
        Ok(()) => start.tokenizer = Some(tokenizer),
        Err(why) => start.notes.push(Note::NoTokenizer { folder: dir.to_owned(), why }),
    }
    same.then_some((shape, start))
}

/// Whether what is given is what the folder has; notes the problem where not.
fn agree<T: PartialEq>(r: &mut Reader, key: &str, ours: Option<T>, theirs: T, told: String) -> bool {
    let same = ours.is_none_or(|ours| ours == theirs);
    if !same {
        r.fault(key, Fault::NotAsInit { theirs: told });
    }
    same
}
