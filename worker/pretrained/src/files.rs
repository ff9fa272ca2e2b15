//! Files that are read here and there.
//!
//! Reading at a position takes what mapping the file into memory would give (no more than what
//! is asked for is read, and the page cache keeps it), and needs no `unsafe`: a file that another
//! process cuts short is an error here, not the end of this process.

use crate::{Dtype, PretrainedError};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// A file that is open, and of which the length was seen.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) path: PathBuf,
    pub(crate) file: File,
    pub(crate) len: u64,
}

impl Opened {
    pub(crate) fn open(path: &Path) -> Result<Self, PretrainedError> {
        let file = File::open(path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => PretrainedError::Missing {
                path: path.to_owned(),
                why: "a part of the model's weights is in it".into(),
            },
            _ => PretrainedError::io("open", path)(e),
        })?;
        let about = file.metadata().map_err(PretrainedError::io("read", path))?;
        if !about.is_file() {
            return Err(PretrainedError::file(path, "it is no file"));
        }
        Ok(Self { path: path.to_owned(), file, len: about.len() })
    }

    pub(crate) fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<(), PretrainedError> {
        self.file.read_exact_at(out, offset).map_err(PretrainedError::io("read", &self.path))
    }
}

/// A tensor as it lies in a file: row-major, little-endian, without gaps.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Stored {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<u64>,
    /// Bytes from the start of the file.
    pub(crate) offset: u64,
}

/// Bytes of a tensor of this shape; none where that is more than 2⁶³.
pub(crate) fn bytes_of(shape: &[u64], dtype: Dtype) -> Option<u64> {
    let elements = shape.iter().try_fold(1u64, |n, d| n.checked_mul(*d))?;
    elements.checked_mul(dtype.size()).filter(|bytes| *bytes < 1 << 63)
}

/// The content of a small file.
pub(crate) fn read_small(path: &Path, most: u64) -> Result<Vec<u8>, PretrainedError> {
    let opened = Opened::open(path)?;
    if opened.len > most {
        return Err(PretrainedError::file(
            path,
            format!("it has {} bytes, at most {most} are read", opened.len),
        ));
    }
    let mut content = vec![0; opened.len as usize];
    opened.read_at(0, &mut content)?;
    Ok(content)
}
