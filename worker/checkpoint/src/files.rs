//! Files that are hashed while they pass, and made durable.
//!
//! A hash taken while writing is of what was meant to be written; one taken by reading the
//! file back would be of what the page cache holds, and would bless a bad write.

use crate::CheckpointError;
use caravan_types::Digest;
use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::path::Path;

/// Bytes a read or a buffered write: large enough that system calls are nothing beside
/// hashing, small enough for a second-level cache.
const CHUNK: usize = 256 * 1024;

/// A new file that hashes and counts what is written to it.
pub(crate) struct HashedFile<'a> {
    path: &'a Path,
    out: BufWriter<File>,
    hasher: blake3::Hasher,
}

impl<'a> HashedFile<'a> {
    pub(crate) fn create(path: &'a Path) -> Result<Self, CheckpointError> {
        let file = File::create(path).map_err(CheckpointError::io("create", path))?;
        Ok(Self { path, out: BufWriter::with_capacity(CHUNK, file), hasher: blake3::Hasher::new() })
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), CheckpointError> {
        self.hasher.update(bytes);
        self.out.write_all(bytes).map_err(CheckpointError::io("write", self.path))
    }

    /// Makes the file durable; gives its size and hash.
    pub(crate) fn finish(mut self) -> Result<(u64, Digest), CheckpointError> {
        self.out.flush().map_err(CheckpointError::io("write", self.path))?;
        self.out.get_ref().sync_all().map_err(CheckpointError::io("sync", self.path))?;
        Ok((self.hasher.count(), Digest(*self.hasher.finalize().as_bytes())))
    }
}

/// Size and hash of a file's content.
pub(crate) fn hash(path: &Path) -> Result<(u64, Digest), CheckpointError> {
    let mut file = File::open(path).map_err(CheckpointError::io("open", path))?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; CHUNK];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok((hasher.count(), Digest(*hasher.finalize().as_bytes()))),
            Ok(n) => _ = hasher.update(&buffer[..n]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(CheckpointError::io("read", path)(e)),
        }
    }
}

/// Makes the entries of a folder durable.
pub(crate) fn sync_folder(path: &Path) -> Result<(), CheckpointError> {
    let folder = File::open(path).map_err(CheckpointError::io("open", path))?;
    folder.sync_all().map_err(CheckpointError::io("sync", path))
}
