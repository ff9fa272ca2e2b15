//! From parts to a checkpoint, and from many checkpoints to the newest few.

use crate::files::{self, HashedFile};
use crate::folder::{self, Kind};
use crate::manifest::{MANIFEST, Manifest, SavedFile};
use crate::part::PartReader;
use crate::{Checkpoint, CheckpointError};
use caravan_types::task::SavedPart;
use caravan_types::{Generation, RunSpec, SliceTable, Step};
use std::fs;
use std::path::Path;

pub(crate) const TOKENIZER: &str = "tokenizer.json";

/// Makes a checkpoint of the parts that a generation wrote for a step: looks whether every
/// slice is there once, adds the manifest and the tokenizer, makes all of it durable, and
/// renames the folder to its final name, which is what makes it a checkpoint.
///
/// Asked again for a step that is complete and intact already, it only gives that one's
/// manifest. A damaged one of the same step is moved out of the way.
///
/// # Errors
/// With what is wrong with a part, what the file system said, or
/// [`CheckpointError::OtherRun`]. The checkpoints that were there before stay as they were.
pub fn complete(
    root: &Path,
    generation: Generation,
    step: Step,
    spec: &RunSpec,
    parts: &[SavedPart],
    tokenizer: Option<&Path>,
) -> Result<Manifest, CheckpointError> {
    let target = root.join(folder::complete_name(step));
    let in_the_way = match Checkpoint::open(&target) {
        Ok(existing) if existing.manifest().spec == *spec => return Ok(existing.manifest().clone()),
        Ok(_) => return Err(CheckpointError::OtherRun(target)),
        Err(_) => exists(&target)?,
    };
    let dir = folder::partial(root, generation, step);
    let mut manifest = Manifest::new(generation, step, spec, parts)?;
    let table = SliceTable::new(&spec.model);
    for part in &manifest.parts {
        PartReader::open(&dir, part, step, &table)?;
    }
    remove_unlisted(&dir, &manifest)?;
    manifest.tokenizer = tokenizer.map(|from| copy_tokenizer(from, &dir)).transpose()?;
    manifest.write(&dir)?;
    files::sync_folder(&dir)?;
    if in_the_way {
        let aside = folder::damaged(root, step);
        if exists(&aside)? {
            fs::remove_dir_all(&aside).map_err(CheckpointError::io("remove", &aside))?;
        }
        fs::rename(&target, &aside).map_err(CheckpointError::io("rename", &target))?;
    }
    fs::rename(&dir, &target).map_err(CheckpointError::io("rename", &dir))?;
    files::sync_folder(root)?;
    Ok(manifest)
}

/// Removes what is not needed any more once the checkpoint of `written` is: all older ones but the
/// newest (`keep` with this one, which is always kept), what was set aside as damaged before those,
/// and folders that were begun for a step no newer. What is newer than `written` stays: where the
/// run went back behind a damaged checkpoint, that one says nothing about what is being written.
///
/// # Errors
/// The first [`CheckpointError::Io`]; the rest is removed all the same.
pub fn prune(root: &Path, written: Step, keep: usize) -> Result<(), CheckpointError> {
    let all = folder::list(root)?;
    let complete = all.iter().filter(|(step, kind, _)| *kind == Kind::Complete && *step <= written);
    let Some(oldest_kept) = complete.map(|(step, ..)| *step).take(keep.max(1)).last() else { return Ok(()) };
    let mut result = Ok(());
    for (step, kind, path) in &all {
        let needed = match kind {
            Kind::Complete | Kind::Damaged => *step >= oldest_kept,
            Kind::Partial => *step > written,
        };
        if !needed {
            let removed = fs::remove_dir_all(path).map_err(CheckpointError::io("remove", path));
            result = result.and(removed);
        }
    }
    result
}

/// Parts of workers that died before they could report them do not go into the checkpoint.
fn remove_unlisted(dir: &Path, manifest: &Manifest) -> Result<(), CheckpointError> {
    for entry in fs::read_dir(dir).map_err(CheckpointError::io("list", dir))? {
        let entry = entry.map_err(CheckpointError::io("list", dir))?;
        let name = entry.file_name();
        let listed = manifest.parts.iter().any(|p| name == *p.file);
        if !listed && name != MANIFEST && name != TOKENIZER {
            let path = entry.path();
            fs::remove_file(&path).map_err(CheckpointError::io("remove", &path))?;
        }
    }
    Ok(())
}

fn copy_tokenizer(from: &Path, dir: &Path) -> Result<SavedFile, CheckpointError> {
    let content = fs::read(from).map_err(CheckpointError::io("read the tokenizer", from))?;
    let path = dir.join(TOKENIZER);
    let mut file = HashedFile::create(&path)?;
    file.write(&content)?;
    let (bytes, digest) = file.finish()?;
    Ok(SavedFile { file: TOKENIZER.to_owned(), bytes, digest })
}

fn exists(path: &Path) -> Result<bool, CheckpointError> {
    path.try_exists().map_err(CheckpointError::io("read", path))
}
