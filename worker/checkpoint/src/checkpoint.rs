//! Reading checkpoints. Everything is verified before anything is used.

use crate::complete::TOKENIZER;
use crate::folder::{self, Kind};
use crate::manifest::Manifest;
use crate::part::PartReader;
use crate::{CheckpointError, files};
use caravan_types::{Digest, SliceId, SliceSet, SliceTable, Step};
use std::path::{Path, PathBuf};

/// A complete checkpoint whose files were found as they were written.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    manifest: Manifest,
    table: SliceTable,
}

/// What a search for a checkpoint found.
#[derive(Debug)]
pub struct Found {
    /// The newest one that is intact.
    pub checkpoint: Option<Checkpoint>,
    /// Newer ones that are not, newest first.
    pub refused: Vec<Refused>,
}

/// A checkpoint that was passed over.
#[derive(Debug)]
pub struct Refused {
    /// The name of its folder.
    pub name: String,
    /// What is wrong with it.
    pub reason: CheckpointError,
}

/// The newest intact checkpoint in a folder, and the damaged ones that were passed over on
/// the way to it. A folder that is not there has none.
///
/// # Errors
/// Where the folder cannot be listed.
pub fn newest_intact(root: &Path) -> Result<Found, CheckpointError> {
    newest_intact_until(root, None)
}

/// As [`newest_intact`], of those up to step `until`: those after it are of steps that the run
/// has given up.
///
/// # Errors
/// As [`newest_intact`].
pub fn newest_intact_until(root: &Path, until: Option<Step>) -> Result<Found, CheckpointError> {
    let mut refused = Vec::new();
    for (step, kind, path) in folder::list(root)? {
        if kind != Kind::Complete || until.is_some_and(|until| step > until) {
            continue;
        }
        match Checkpoint::open(&path) {
            Ok(checkpoint) => return Ok(Found { checkpoint: Some(checkpoint), refused }),
            Err(reason) => refused.push(Refused { name: folder::complete_name(step), reason }),
        }
    }
    Ok(Found { checkpoint: None, refused })
}

/// The steps that have a complete checkpoint in a folder, by its name, newest first; whether it
/// is intact is for [`Checkpoint::of_step`] to say.
///
/// # Errors
/// Where the folder cannot be listed.
pub fn complete_steps(root: &Path) -> Result<Vec<Step>, CheckpointError> {
    let complete = folder::list(root)?.into_iter().filter(|(_, kind, _)| *kind == Kind::Complete);
    Ok(complete.map(|(step, ..)| step).collect())
}

impl Checkpoint {
    /// Opens the complete checkpoint of a step.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn of_step(root: &Path, step: Step) -> Result<Self, CheckpointError> {
        Self::open(&root.join(folder::complete_name(step)))
    }

    /// Opens the checkpoint in a folder and verifies all of it: reads every file once.
    ///
    /// # Errors
    /// With the first thing that is not as it was written.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        let manifest = Manifest::read(dir)?;
        let named = dir.file_name().and_then(|n| n.to_str()).and_then(folder::parse);
        if let Some((step, _)) = named
            && step != manifest.step
        {
            return Err(CheckpointError::Misnamed { folder: step, manifest: manifest.step });
        }
        let table = SliceTable::new(&manifest.spec.model);
        for part in &manifest.parts {
            PartReader::open(dir, part, manifest.step, &table)?;
            verify(dir, &part.file, part.bytes, part.digest)?;
        }
        if let Some(tokenizer) = &manifest.tokenizer {
            if tokenizer.file != TOKENIZER {
                let what = format!("it lists a tokenizer {:?}, not {TOKENIZER}", tokenizer.file);
                return Err(CheckpointError::ManifestDamaged(what));
            }
            verify(dir, &tokenizer.file, tokenizer.bytes, tokenizer.digest)?;
        }
        Ok(Self { dir: dir.to_owned(), manifest, table })
    }

    /// What it is.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Where it is.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Hash of all weights.
    #[must_use]
    pub fn weights_hash(&self) -> Digest {
        self.manifest.weights
    }

    /// The tokenizer's file, where the checkpoint has one.
    #[must_use]
    pub fn tokenizer(&self) -> Option<PathBuf> {
        self.manifest.tokenizer.as_ref().map(|t| self.dir.join(&t.file))
    }

    /// The training state of some slices, ascending: master weights, first and second
    /// moments, one after the other. Reads no more than that.
    ///
    /// # Errors
    /// [`CheckpointError::UnknownSlice`], and where a file changed since it was verified.
    pub fn states(&self, slices: &SliceSet) -> Result<Vec<(SliceId, Vec<f32>)>, CheckpointError> {
        if let Some(slice) = slices.iter().find(|id| self.table.get(*id).is_none()) {
            return Err(CheckpointError::UnknownSlice { slice, slices: self.table.len() });
        }
        let mut states = Vec::with_capacity(slices.len());
        self.each(
            |id| slices.contains(id),
            |part, id, hash| {
                states.push((id, part.state(id, hash)?));
                Ok(())
            },
        )?;
        states.sort_by_key(|(id, _)| *id);
        Ok(states)
    }

    /// The weights of the whole model as one flat vector.
    ///
    /// # Errors
    /// Where a file changed since it was verified.
    pub fn weights(&self) -> Result<Vec<f32>, CheckpointError> {
        let mut weights = vec![0.0; self.manifest.spec.model.parameters() as usize];
        self.each(
            |_| true,
            |part, id, hash| {
                let range = self.table.get(id).map_or(0..0, |s| s.range.start as usize..s.range.end as usize);
                weights[range].copy_from_slice(&part.weights(id, hash)?);
                Ok(())
            },
        )?;
        Ok(weights)
    }

    /// Calls `take` for the wanted slices, part by part; a part with none of them stays shut.
    fn each(
        &self,
        wanted: impl Fn(SliceId) -> bool,
        mut take: impl FnMut(&mut PartReader, SliceId, Digest) -> Result<(), CheckpointError>,
    ) -> Result<(), CheckpointError> {
        for part in &self.manifest.parts {
            let mut slices = part.slices.iter().filter(|(id, _)| wanted(*id)).peekable();
            if slices.peek().is_none() {
                continue;
            }
            let mut reader = PartReader::open(&self.dir, part, self.manifest.step, &self.table)?;
            for (id, hash) in slices {
                take(&mut reader, *id, *hash)?;
            }
        }
        Ok(())
    }
}

fn verify(dir: &Path, file: &str, bytes: u64, digest: Digest) -> Result<(), CheckpointError> {
    let path = dir.join(file);
    let found = files::hash(&path).map_err(|e| match e {
        CheckpointError::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
            CheckpointError::FileMissing { file: file.to_owned() }
        }
        other => other,
    })?;
    if found.0 != bytes {
        return Err(CheckpointError::FileSize { file: file.to_owned(), expected: bytes, found: found.0 });
    }
    if found.1 != digest {
        return Err(CheckpointError::FileDamaged { file: file.to_owned(), expected: digest, found: found.1 });
    }
    Ok(())
}
