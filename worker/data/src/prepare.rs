//! From a request to a folder of prepared data, once.
//!
//! ```text
//! CACHE/lock                   held while preparing: two processes do not do the same work
//! CACHE/requests/KEY.json      which data a request led to, and for which state of its files
//! CACHE/DIGEST/                prepared data, by content; complete or not there
//! CACHE/DIGEST.partial/        … while it is being moved; PID.partial while it is written
//! ```
//! A second start lists the files, finds their fingerprint unchanged, and opens the result once
//! its bytes match their hashes.
//! Anything else is prepared again from the start: the steps are too quick to be worth
//! resuming, and a half-prepared folder that is never looked at cannot be mistaken for a whole one.

use crate::dataset::Dataset;
use crate::error::{Action, DataError};
use crate::filter::{Report, documents};
use crate::find::{InputFile, Request, find, fingerprint};
use crate::index::{Index, TOKENIZER, write_durably};
use crate::progress::{Progress, Stage};
use crate::read::Body;
use crate::tokenizer::{LLAMA_BOS, LLAMA_EOS, Tokenizer};
use crate::train::{LEAST_VOCAB, SAMPLE_BYTES, Sample, train};
use crate::write::write;
use caravan_types::{DataSpec, Digest};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// Changes when the same files would give other tokens: remembered results of older versions
/// are then prepared again.
const PREPARATION: &str = "caravan data preparation 1";

const PARTIAL: &str = "partial";

/// What [`prepare`] leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prepared {
    /// The folder to open with [`Dataset::open`].
    pub dir: PathBuf,
    /// For the run spec.
    pub spec: DataSpec,
    /// What was read and left out.
    pub report: Report,
    /// Whether anything had to be done.
    pub origin: Origin,
}

/// Why data is ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// It was prepared now.
    Fresh,
    /// It was there, and its files have not changed.
    Cached,
    /// It was there, but damaged as described, and was prepared again.
    Rebuilt(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fresh => write!(f, "prepared"),
            Self::Cached => write!(f, "unchanged since it was prepared"),
            Self::Rebuilt(why) => write!(f, "prepared again: {why}"),
        }
    }
}

/// Makes `request` ready below `cache`, or finds that it already is.
///
/// # Errors
/// Whatever is wrong with a path, a file, a record, the vocabulary or the disk, by name. After
/// an error or an interruption, nothing below `cache` looks finished that is not.
pub fn prepare(request: &Request, cache: &Path, progress: &dyn Progress) -> Result<Prepared, DataError> {
    if request.vocab_size < LEAST_VOCAB {
        return Err(DataError::VocabTooSmall { vocab: request.vocab_size, least: LEAST_VOCAB });
    }
    progress.update(Stage::Find, 0, 0);
    let files = find(request, None)?;
    progress.update(Stage::Find, files.len() as u64, files.len() as u64);
    let memory = Memory::new(request, &files, cache)?;
    if let Recall::Ready(prepared) = memory.recall(cache)? {
        return Ok(prepared);
    }

    fs::create_dir_all(cache.join("requests")).map_err(DataError::io(Action::Write, cache))?;
    let _lock = lock(cache, progress)?;
    let origin = match memory.recall(cache)? {
        // Another process was at it.
        Recall::Ready(prepared) => return Ok(prepared),
        Recall::Nothing => Origin::Fresh,
        Recall::Damaged(why) => Origin::Rebuilt(why),
    };
    remove_leftovers(cache)?;
    let partial = Partial(cache.join(format!("{}.{PARTIAL}", std::process::id())));
    fs::create_dir(&partial.0).map_err(DataError::io(Action::Write, &partial.0))?;
    let index = build(request, &files, &partial.0, progress)?;
    let dir = publish(&partial, &index, cache)?;
    memory.remember(&index)?;
    Ok(Prepared { dir, spec: index.spec(), report: index.report, origin })
}

/// Reads, trains and writes into `dir`.
fn build(
    request: &Request,
    files: &[InputFile],
    dir: &Path,
    progress: &dyn Progress,
) -> Result<Index, DataError> {
    let json = match &request.tokenizer {
        Some(path) => Some(fs::read(path).map_err(DataError::io(Action::Read, path))?),
        None => learn(request, files, progress)?,
    };
    let path = dir.join(TOKENIZER);
    let named = request.tokenizer.as_deref().unwrap_or(&path);
    let tokenizer = json.as_deref().map(|json| Tokenizer::from_bytes(json, named)).transpose()?;
    let (mut bos, mut eos) = (LLAMA_BOS, LLAMA_EOS);
    if let Some(tokenizer) = &tokenizer {
        (bos, eos) = (tokenizer.bos(), tokenizer.eos());
        let (tokens, vocab) = (tokenizer.vocab_size(), request.vocab_size);
        if tokens > vocab {
            return Err(DataError::TokenizerTooLarge { path: named.to_owned(), tokens, vocab });
        }
    }
    if let Some(json) = &json {
        write_durably(&path, json)?;
    }
    let mut index = write(files, request.vocab_size, tokenizer.as_ref(), (bos, eos), dir, progress)?;
    if index.report.documents == 0 {
        return Err(DataError::NothingLeft { report: index.report });
    }
    index.tokenizer = json.map(|json| Digest(*blake3::hash(&json).as_bytes()));
    index.write(dir)?;
    Ok(index)
}

/// Trains a tokenizer on the text in `files`; none if they hold ready tokens only.
fn learn(
    request: &Request,
    files: &[InputFile],
    progress: &dyn Progress,
) -> Result<Option<Vec<u8>>, DataError> {
    let mut sample = Sample::new(SAMPLE_BYTES);
    let (mut text, mut tokens) = (false, false);
    let report = documents(files, request.vocab_size, (progress, Stage::Read), &mut |document| {
        match document.body {
            Body::Text(content) => {
                text = true;
                sample.add(&content);
            }
            Body::Tokens(_) => tokens = true,
        }
        if text && tokens { Err(DataError::Mixed) } else { Ok(()) }
    })?;
    if report.documents == 0 {
        return Err(DataError::NothingLeft { report });
    }
    let path = Path::new(TOKENIZER);
    text.then(|| train(sample, request.vocab_size, path, progress)).transpose()
}

/// Moves finished data to its place. The rename is the moment from which it exists.
fn publish(partial: &Partial, index: &Index, cache: &Path) -> Result<PathBuf, DataError> {
    let dir = cache.join(index.spec().digest.to_string());
    sync_folder(&partial.0)?;
    if dir.exists() {
        // The same content by another way: kept if whole, replaced if not. The index may differ
        // in the names of sources, so the new one is as good as the old.
        let aside = cache.join(format!("{}.{PARTIAL}", index.spec().digest));
        fs::rename(&dir, &aside).map_err(DataError::io(Action::Write, &dir))?;
        fs::rename(&partial.0, &dir).map_err(DataError::io(Action::Write, &dir))?;
        fs::remove_dir_all(&aside).map_err(DataError::io(Action::Remove, &aside))?;
    } else {
        fs::rename(&partial.0, &dir).map_err(DataError::io(Action::Write, &dir))?;
    }
    sync_folder(cache)?;
    Ok(dir)
}

fn sync_folder(dir: &Path) -> Result<(), DataError> {
    let folder = File::open(dir).map_err(DataError::io(Action::Write, dir))?;
    folder.sync_all().map_err(DataError::io(Action::Write, dir))
}

/// A folder in the making. Goes with everything in it unless it was moved to its place.
struct Partial(PathBuf);

impl Drop for Partial {
    fn drop(&mut self) {
        // Not there any more after a success; after a failure, the error that is on its way
        // says more than a second one, and the next preparation tries again.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// One preparation at a time in a cache folder. The lock goes with the file, and so with the process.
fn lock(cache: &Path, progress: &dyn Progress) -> Result<File, DataError> {
    let path = cache.join("lock");
    let io = || DataError::io(Action::Lock, &path);
    let file = File::create(&path).map_err(io())?;
    match file.try_lock() {
        Ok(()) => {}
        Err(fs::TryLockError::WouldBlock) => {
            progress.update(Stage::Wait, 0, 1);
            file.lock().map_err(io())?;
            progress.update(Stage::Wait, 1, 1);
        }
        Err(fs::TryLockError::Error(e)) => return Err(io()(e)),
    }
    Ok(file)
}

/// Folders of preparations that were killed: whoever holds the lock is alone.
fn remove_leftovers(cache: &Path) -> Result<(), DataError> {
    for entry in fs::read_dir(cache).map_err(DataError::io(Action::Find, cache))? {
        let path = entry.map_err(DataError::io(Action::Find, cache))?.path();
        if path.extension().is_some_and(|e| e == PARTIAL) {
            fs::remove_dir_all(&path).map_err(DataError::io(Action::Remove, &path))?;
        }
    }
    Ok(())
}

/// What a request led to the last time.
struct Memory {
    path: PathBuf,
    /// Of the files as they are now.
    inputs: Digest,
}

#[derive(Serialize, Deserialize)]
struct Remembered {
    inputs: Digest,
    prepared: Digest,
}

enum Recall {
    Ready(Prepared),
    Nothing,
    Damaged(String),
}

impl Memory {
    fn new(request: &Request, files: &[InputFile], cache: &Path) -> Result<Self, DataError> {
        let mut key = blake3::Hasher::new_derive_key(PREPARATION);
        let mut add = |bytes: &[u8]| {
            key.update(&(bytes.len() as u64).to_le_bytes()).update(bytes);
        };
        for path in &request.paths {
            let path = std::path::absolute(path).map_err(DataError::io(Action::Find, path))?;
            add(path.as_os_str().as_encoded_bytes());
        }
        add(&request.vocab_size.to_le_bytes());
        add(format!("{:?}", request.extensions).as_bytes());
        let mut inputs = blake3::Hasher::new();
        inputs.update(&fingerprint(files).0);
        if let Some(path) = &request.tokenizer {
            let json = fs::read(path).map_err(DataError::io(Action::Read, path))?;
            inputs.update(&json);
        }
        let digest = |hasher: blake3::Hasher| Digest(*hasher.finalize().as_bytes());
        let path = cache.join("requests").join(format!("{}.json", digest(key)));
        Ok(Self { path, inputs: digest(inputs) })
    }

    fn recall(&self, cache: &Path) -> Result<Recall, DataError> {
        let bytes = match fs::read(&self.path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Recall::Nothing),
            Err(e) => return Err(DataError::io(Action::Read, &self.path)(e)),
        };
        let remembered: Remembered = match serde_json::from_slice(&bytes) {
            Ok(remembered) => remembered,
            Err(e) => return Ok(Recall::Damaged(format!("{}: {e}", self.path.display()))),
        };
        if remembered.inputs != self.inputs {
            return Ok(Recall::Nothing);
        }
        let dir = cache.join(remembered.prepared.to_string());
        // Every byte is read: a flipped one would train other weights than the run spec says, and
        // hashing costs less than a second a gigabyte.
        match Dataset::open(&dir).and_then(|data| data.verify().map(|()| data)) {
            Ok(data) if data.spec().digest == remembered.prepared => Ok(Recall::Ready(Prepared {
                dir,
                spec: data.spec(),
                report: data.report().clone(),
                origin: Origin::Cached,
            })),
            Ok(_) => Ok(Recall::Damaged(format!("{} holds other data", dir.display()))),
            Err(e @ DataError::Damaged { .. }) => Ok(Recall::Damaged(e.to_string())),
            Err(e) => Err(e),
        }
    }

    fn remember(&self, index: &Index) -> Result<(), DataError> {
        let io = |e: std::io::Error| DataError::io(Action::Write, &self.path)(e);
        let remembered = Remembered { inputs: self.inputs, prepared: index.spec().digest };
        let json = serde_json::to_vec(&remembered).map_err(|e| io(e.into()))?;
        let aside = self.path.with_extension("new");
        write_durably(&aside, &json)?;
        fs::rename(&aside, &self.path).map_err(io)
    }
}
