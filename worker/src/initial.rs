//! The weights that a run starts with, where those are not random: a folder in Hugging Face's or
//! Meta's layout, and a list of what its slices hash to.
//!
//! The run spec has one hash, over those of all slices. Whoever starts the run reads the folder
//! once and writes the list into the run's folder; a worker checks the list against the spec,
//! reads from the folder no more than the slices that it is to have, and checks each against the
//! list. So a folder that was changed or exchanged is noticed by whoever needs what differs.

use caravan_checkpoint::{slice_hash, weights_hash};
use caravan_pretrained::{Folder, PretrainedError, Source};
use caravan_types::{Digest, Initial, RunSpec, Slice, SliceId, SliceTable};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

/// Version of the list's format; a reader refuses any other.
const VERSION: u32 = 1;

/// Why a run cannot start with a folder's weights.
#[derive(Debug, thiserror::Error)]
pub enum InitialError {
    /// The file system said no.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The list makes no sense, or is of another version.
    #[error(
        "{} is no list of the weights that a run starts with: {why}. Start the run once more with its run file, and it is \
         made again",
        path.display()
    )]
    List {
        /// The list.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The folder cannot be read.
    #[error(transparent)]
    Folder(#[from] PretrainedError),
    /// The folder holds other weights than the run starts with.
    #[error(
        "{} does not hold the weights that the run starts with ({what}): put those back, or start another run",
        folder.display()
    )]
    OtherWeights {
        /// The folder.
        folder: PathBuf,
        /// What differs.
        what: String,
    },
}

/// What the weights of a folder are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Listing {
    version: u32,
    folder: PathBuf,
    files: Vec<Seen>,
    /// Hash of each slice, in order; see [`slice_hash`].
    slices: Vec<Digest>,
}

/// How a file looked when it was read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Seen {
    path: PathBuf,
    bytes: u64,
    modified_ns: u64,
}

impl Listing {
    /// Reads a folder and lists what is in it.
    ///
    /// # Errors
    /// Where it cannot be read.
    pub fn new(folder: &Folder) -> Result<Self, InitialError> {
        let files = seen(folder)?;
        let mut slices = Vec::new();
        for (_, slice) in SliceTable::new(folder.shape()).iter() {
            slices.push(slice_hash(&read(folder, slice)?));
        }
        let dir = std::path::absolute(folder.dir()).map_err(failed("find", folder.dir()))?;
        Ok(Self { version: VERSION, folder: dir, files, slices })
    }

    /// What a list in a file says of a folder, where it is of that folder and none of its files
    /// has changed since.
    #[must_use]
    pub fn known(path: &Path, folder: &Folder) -> Option<Self> {
        let listing = Self::read(path).ok()?;
        let dir = std::path::absolute(folder.dir()).ok()?;
        (listing.folder == dir && seen(folder).is_ok_and(|files| files == listing.files)).then_some(listing)
    }

    /// The hash of all weights, as a run spec has it.
    #[must_use]
    pub fn digest(&self) -> Digest {
        weights_hash(&self.slices)
    }

    /// Writes the list, whole or not at all.
    ///
    /// # Errors
    /// What the file system said.
    pub fn write(&self, path: &Path) -> Result<(), InitialError> {
        let json = serde_json::to_vec(self).map_err(|e| failed("write", path)(e.into()))?;
        let aside = path.with_extension("new");
        let mut file = File::create(&aside).map_err(failed("create", &aside))?;
        file.write_all(&json).and_then(|()| file.sync_all()).map_err(failed("write", &aside))?;
        fs::rename(&aside, path).map_err(failed("rename", &aside))
    }

    fn read(path: &Path) -> Result<Self, InitialError> {
        let bad = |why: String| InitialError::List { path: path.to_owned(), why };
        let bytes = fs::read(path).map_err(failed("read", path))?;
        let value: serde_json::Value = serde_json::from_slice(&bytes).map_err(|e| bad(e.to_string()))?;
        if value["version"] != VERSION {
            return Err(bad(format!("it has version {}, this program reads {VERSION}", value["version"])));
        }
        serde_json::from_value(value).map_err(|e| bad(e.to_string()))
    }
}

/// The weights that a run starts with, open for reading.
#[derive(Debug)]
pub(crate) struct Start {
    folder: Folder,
    slices: Vec<Digest>,
}

impl Start {
    /// Opens what a run starts with; none where that is its seed.
    pub(crate) fn open(spec: &RunSpec, list: Option<&str>) -> Result<Option<Self>, InitialError> {
        let Initial::Weights { digest } = spec.init else { return Ok(None) };
        let path = PathBuf::from(list.unwrap_or_default());
        let listing = Listing::read(&path)?;
        let other = |what: String| InitialError::OtherWeights { folder: listing.folder.clone(), what };
        if listing.digest() != digest {
            return Err(other(format!("they have the hash {}, not {digest}", listing.digest())));
        }
        let folder = Folder::open(&listing.folder, Some(spec.model.context))?;
        if *folder.shape() != spec.model {
            return Err(other("they are of another model".into()));
        }
        Ok(Some(Self { folder, slices: listing.slices }))
    }

    /// The weights of a slice.
    pub(crate) fn slice(&self, id: SliceId, slice: &Slice) -> Result<Vec<f32>, InitialError> {
        let values = read(&self.folder, slice)?;
        let (found, expected) = (slice_hash(&values), self.slices.get(id.0 as usize).copied());
        if expected != Some(found) {
            let folder = self.folder.dir().to_owned();
            let expected = expected.unwrap_or_default();
            let what = format!("slice {id} has the hash {found}, not {expected}");
            return Err(InitialError::OtherWeights { folder, what });
        }
        Ok(values)
    }
}

fn read(folder: &Folder, slice: &Slice) -> Result<Vec<f32>, InitialError> {
    let mut values = vec![0.0; slice.len()];
    folder.read(slice.range.start, &mut values)?;
    Ok(values)
}

fn seen(folder: &Folder) -> Result<Vec<Seen>, InitialError> {
    let look = |path: &Path| {
        let about = fs::metadata(path).map_err(failed("read", path))?;
        let modified = about.modified().ok().and_then(|at| at.duration_since(UNIX_EPOCH).ok());
        let modified_ns = modified.map_or(0, |at| at.as_nanos() as u64);
        Ok(Seen { path: path.to_owned(), bytes: about.len(), modified_ns })
    };
    folder.files().map(look).collect()
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> InitialError {
    let path = path.to_owned();
    move |source| InitialError::Io { action, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use caravan_pretrained::{Beside, Convention, Export, Flat};
    use caravan_types::{
        BatchShape, DataSpec, ModelShape, NumericsClass, Precision, Recipe, run_spec::RUN_SPEC_VERSION,
    };

    fn shape() -> ModelShape {
        let small = ModelShape::preset("260k").unwrap();
        ModelShape { dim: 64, layers: 1, heads: 4, kv_heads: 2, hidden: 64, vocab: 600, ..small }
    }

    fn write(dir: &Path) -> Folder {
        let values = (0..shape().parameters()).map(|i| (i % 1000) as f32 / 1000.0).collect();
        let flat = Flat::new(shape(), values).unwrap();
        let export = Export::new(&flat, Convention::HuggingFace, None).unwrap();
        let beside = Beside { tokens: serde_json::Map::new(), files: Vec::new(), shard_bytes: 1 << 20 };
        export.write(dir, &beside).unwrap();
        Folder::open(dir, None).unwrap()
    }

    fn spec(digest: Digest) -> RunSpec {
        RunSpec {
            version: RUN_SPEC_VERSION,
            name: "test".into(),
            model: shape(),
            init: Initial::Weights { digest },
            data: DataSpec { digest: Digest::default(), tokens: 0 },
            batch: BatchShape { lanes: 1, micro_batches: 1, sequences: 1, sequence_length: 1 },
            recipe: Recipe::default(),
            seed: 0,
            numerics: NumericsClass { precision: Precision::Fp32, family: "portable".into() },
        }
    }

    #[test]
    fn each_slice_is_checked_by_whoever_reads_it() {
        let dir = tempfile::TempDir::new().unwrap();
        let (folder, list) = (dir.path().join("model"), dir.path().join("init.json"));
        let opened = write(&folder);
        let listing = Listing::new(&opened).unwrap();
        listing.write(&list).unwrap();
        assert_eq!(Listing::known(&list, &opened).as_ref(), Some(&listing));
        let spec = spec(listing.digest());
        let open = |spec: &RunSpec| Start::open(spec, list.to_str());
        assert!(open(&RunSpec { init: Initial::Seed, ..spec.clone() }).unwrap().is_none());
        let start = open(&spec).unwrap().unwrap();
        let table = SliceTable::new(&shape());
        let slices: Vec<_> = table.iter().collect();
        let whole: Vec<f32> = slices.iter().flat_map(|(id, s)| start.slice(*id, s).unwrap()).collect();
        assert!(whole.iter().enumerate().all(|(i, v)| *v == (i % 1000) as f32 / 1000.0));

        // The embedding's last value: other slices are as they were.
        let path = folder.join("model.safetensors");
        let mut bytes = fs::read(&path).unwrap();
        let header = u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize + 8;
        bytes[header + 600 * 64 * 4 - 2] ^= 1;
        fs::write(&path, bytes).unwrap();
        let changed = open(&spec).unwrap().unwrap();
        let bad: Vec<_> = slices.iter().filter_map(|(id, s)| changed.slice(*id, s).err()).collect();
        assert_eq!(bad.len(), 1);
        assert!(
            bad[0].to_string().contains("does not hold the weights that the run starts with (slice "),
            "{}",
            bad[0]
        );
        let changed = Folder::open(&folder, None).unwrap();
        assert_eq!(Listing::known(&list, &changed), None, "its file is another one now");

        let error = open(&RunSpec { init: Initial::Weights { digest: Digest([1; 32]) }, ..spec.clone() });
        assert!(error.unwrap_err().to_string().contains("they have the hash"));
        let model = ModelShape { rope_theta: 5e5, ..shape() };
        assert!(
            open(&RunSpec { model, ..spec.clone() }).unwrap_err().to_string().contains("of another model")
        );
        fs::write(&list, "{\"version\":9}").unwrap();
        assert!(open(&spec).unwrap_err().to_string().contains("version 9, this program reads 1"));
    }
}
