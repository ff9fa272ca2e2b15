//! The manifest: what a checkpoint is, and the hash of every file in it.
//!
//! The file starts with a seal, the hash of everything behind it, so that a flipped bit in
//! the manifest itself is found as well; and it is plain JSON all the same:
//!
//! ```text
//! {"seal":"<64 hexadecimal digits>",
//! "manifest":{"version":2,"step":100,…}}
//! ```

use crate::files::HashedFile;
use crate::part::weights_hash;
use crate::{CheckpointError, folder};
use caravan_types::task::SavedPart;
use caravan_types::{Digest, Generation, RunSpec, SliceId, SliceTable, Step};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// Version of the manifest's format; a reader refuses any other.
pub const MANIFEST_VERSION: u32 = 2;

pub(crate) const MANIFEST: &str = "manifest.json";

const HEAD: &str = "{\"seal\":\"";
const DIGITS: usize = 64;

/// What a checkpoint is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`MANIFEST_VERSION`].
    pub version: u32,
    /// The step that the state is at.
    pub step: Step,
    /// The generation that wrote it.
    pub generation: Generation,
    /// Position in the data: samples consumed by then.
    pub samples: u64,
    /// The run.
    pub spec: RunSpec,
    /// Hash of all weights; see [`weights_hash`].
    pub weights: Digest,
    /// The parts; together they hold every slice once.
    pub parts: Vec<SavedPart>,
    /// The tokenizer, where one was given.
    pub tokenizer: Option<SavedFile>,
}

/// A file in a checkpoint beside its parts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedFile {
    /// File name within the checkpoint.
    pub file: String,
    /// Its size.
    pub bytes: u64,
    /// Hash of its content.
    pub digest: Digest,
}

impl Manifest {
    /// A manifest over these parts.
    ///
    /// # Errors
    /// Where a slice is missing, there twice, or not in the model.
    pub(crate) fn new(
        generation: Generation,
        step: Step,
        spec: &RunSpec,
        parts: &[SavedPart],
    ) -> Result<Self, CheckpointError> {
        let table = SliceTable::new(&spec.model);
        let mut manifest = Self {
            version: MANIFEST_VERSION,
            step,
            generation,
            samples: step.0.saturating_mul(spec.batch.sequences_per_step()),
            spec: spec.clone(),
            weights: Digest::default(),
            parts: parts.to_vec(),
            tokenizer: None,
        };
        manifest.parts.sort_by(|a, b| a.file.cmp(&b.file));
        manifest.weights = manifest.hash_of_weights(&table)?;
        Ok(manifest)
    }

    /// The hash of all weights, from the parts' lists; an error where these do not have
    /// every slice exactly once.
    fn hash_of_weights(&self, table: &SliceTable) -> Result<Digest, CheckpointError> {
        let mut found: BTreeMap<SliceId, (&Digest, &str)> = BTreeMap::new();
        for part in &self.parts {
            folder::check_part_name(&part.file)?;
            for (slice, digest) in &part.slices {
                if table.get(*slice).is_none() {
                    return Err(CheckpointError::UnknownSlice { slice: *slice, slices: table.len() });
                }
                if let Some((_, first)) = found.insert(*slice, (digest, &part.file)) {
                    let (first, second) = (first.to_owned(), part.file.clone());
                    return Err(CheckpointError::SliceTwice { slice: *slice, first, second });
                }
            }
        }
        let mut missing = table.iter().map(|(id, _)| id).filter(|id| !found.contains_key(id));
        if let Some(first) = missing.next() {
            let all = table.len();
            return Err(CheckpointError::SliceMissing { missing: all - found.len(), all, first });
        }
        Ok(weights_hash(found.values().map(|(digest, _)| *digest)))
    }

    /// Writes the manifest into a folder and makes it durable.
    pub(crate) fn write(&self, dir: &Path) -> Result<(), CheckpointError> {
        let json = serde_json::to_string(self);
        let json = json.map_err(|e| CheckpointError::ManifestDamaged(e.to_string()))?;
        let sealed = format!("\",\n\"manifest\":{json}}}\n");
        let seal = Digest(*blake3::hash(sealed.as_bytes()).as_bytes());
        let path = dir.join(MANIFEST);
        let mut file = HashedFile::create(&path)?;
        file.write(format!("{HEAD}{seal}{sealed}").as_bytes())?;
        file.finish()?;
        Ok(())
    }

    /// Reads the manifest of a folder: seal, version and slices checked, files not.
    pub(crate) fn read(dir: &Path) -> Result<Self, CheckpointError> {
        #[derive(Deserialize)]
        struct AnyVersion {
            manifest: VersionOnly,
        }
        #[derive(Deserialize)]
        struct VersionOnly {
            version: u64,
        }
        #[derive(Deserialize)]
        struct File {
            manifest: Manifest,
        }
        let path = dir.join(MANIFEST);
        let bytes = fs::read(&path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => CheckpointError::FileMissing { file: MANIFEST.to_owned() },
            _ => CheckpointError::io("read", &path)(e),
        })?;
        let damaged = |what: &dyn std::fmt::Display| CheckpointError::ManifestDamaged(what.to_string());
        check_seal(&bytes)?;
        let any: AnyVersion = serde_json::from_slice(&bytes).map_err(|e| damaged(&e))?;
        if any.manifest.version != u64::from(MANIFEST_VERSION) {
            return Err(CheckpointError::Version { found: any.manifest.version, known: MANIFEST_VERSION });
        }
        let File { manifest } = serde_json::from_slice(&bytes).map_err(|e| damaged(&e))?;
        let weights = manifest.hash_of_weights(&SliceTable::new(&manifest.spec.model))?;
        if weights != manifest.weights {
            return Err(damaged(&format_args!(
                "it says that the weights have the hash {}, its slices have {weights}",
                manifest.weights
            )));
        }
        Ok(manifest)
    }
}

fn check_seal(bytes: &[u8]) -> Result<(), CheckpointError> {
    let damaged = |what: String| CheckpointError::ManifestDamaged(what);
    let behind = bytes.strip_prefix(HEAD.as_bytes()).and_then(|b| b.split_at_checked(DIGITS));
    let (seal, sealed) = behind.ok_or_else(|| damaged("it does not start with a seal".into()))?;
    let found = Digest(*blake3::hash(sealed).as_bytes());
    if seal != found.to_string().as_bytes() {
        let seal = String::from_utf8_lossy(seal);
        return Err(damaged(format!("its seal is {seal}, its content has the hash {found}")));
    }
    Ok(())
}
