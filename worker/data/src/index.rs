//! `index.json`: what a folder of prepared data holds.
//!
//! The index lists every other file with its hash and is sealed by a hash of its own, so
//! damage anywhere has a name. The digest of the data covers the tokens and the tokenizer only:
//! it must not change when a file is renamed, or it would be a digest of something else.

use crate::error::{Action, Damage, DataError};
use crate::filter::Report;
use crate::records::Entry;
use caravan_types::{DataSpec, Digest};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

pub(crate) const INDEX: &str = "index.json";
pub(crate) const TOKENIZER: &str = "tokenizer.json";
pub(crate) const DOCUMENTS: &str = "documents.bin";

/// Version of the folder's format.
const VERSION: u32 = 1;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Index {
    pub version: u32,
    /// Every token is below this.
    pub vocab: u32,
    /// Begins every document.
    pub bos: u32,
    /// Ends every document.
    pub eos: u32,
    /// In the order of the stream.
    pub shards: Vec<Entry>,
    pub documents: Entry,
    /// Hash of `tokenizer.json`; none for ready tokens without a tokenizer.
    pub tokenizer: Option<Digest>,
    /// Names of the files that documents came from.
    pub sources: Vec<String>,
    /// What was left out.
    pub report: Report,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sealed {
    /// Of the compact JSON of `index`.
    blake3: Digest,
    index: Index,
}

impl Index {
    pub(crate) fn new(documents: Entry) -> Self {
        Self {
            version: VERSION,
            vocab: 0,
            bos: 0,
            eos: 0,
            shards: Vec::new(),
            documents,
            tokenizer: None,
            sources: Vec::new(),
            report: Report::default(),
        }
    }

    /// The prepared data by content: tokenizer, document borders and shards.
    pub(crate) fn spec(&self) -> DataSpec {
        let mut hasher = blake3::Hasher::new_derive_key("caravan data 1: prepared tokens");
        hasher.update(&self.bos.to_le_bytes()).update(&self.eos.to_le_bytes());
        hasher.update(&self.tokenizer.unwrap_or_default().0);
        for shard in &self.shards {
            hasher.update(&shard.blake3.0);
        }
        DataSpec {
            digest: Digest(*hasher.finalize().as_bytes()),
            tokens: self.shards.iter().map(|s| s.records).sum(),
        }
    }

    pub(crate) fn write(&self, dir: &Path) -> Result<(), DataError> {
        let path = dir.join(INDEX);
        let blake3 = self.seal().map_err(|e| DataError::io(Action::Write, &path)(e.into()))?;
        let sealed = Sealed { blake3, index: self.clone() };
        let json =
            serde_json::to_vec_pretty(&sealed).map_err(|e| DataError::io(Action::Write, &path)(e.into()))?;
        write_durably(&path, &json)
    }

    pub(crate) fn read(dir: &Path) -> Result<Self, DataError> {
        let path = dir.join(INDEX);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(DataError::damaged(&path, Damage::Gone));
            }
            Err(e) => return Err(DataError::io(Action::Read, &path)(e)),
        };
        let unreadable = |why: String| DataError::damaged(&path, Damage::Index(why));
        let sealed: Sealed = serde_json::from_slice(&bytes).map_err(|e| unreadable(e.to_string()))?;
        if sealed.index.version != VERSION {
            let why = format!("version {}, this program reads {VERSION}", sealed.index.version);
            return Err(unreadable(why));
        }
        if sealed.index.seal().map_err(|e| unreadable(e.to_string()))? != sealed.blake3 {
            return Err(DataError::damaged(&path, Damage::Hash));
        }
        Ok(sealed.index)
    }

    fn seal(&self) -> serde_json::Result<Digest> {
        Ok(Digest(*blake3::hash(&serde_json::to_vec(self)?).as_bytes()))
    }
}

/// Writes a small file and waits until it is on disk.
pub(crate) fn write_durably(path: &Path, bytes: &[u8]) -> Result<(), DataError> {
    let io = || DataError::io(Action::Write, path);
    let mut file = File::create(path).map_err(io())?;
    file.write_all(bytes).map_err(io())?;
    file.sync_all().map_err(io())
}
