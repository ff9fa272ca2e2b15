//! Files of equal-sized records behind a short header: token shards and the document table.
//!
//! ```text
//! offset  size  field
//!      0     8  magic: "CARAVTOK" tokens, "CARAVDOC" documents
//!      8     4  version, 1
//!     12     4  bytes per record: 2 or 4 for tokens, 24 for documents
//!     16     8  number of records
//!     24     …  records
//! ```
//! All integers are little endian. Reading is positioned (`pread`): a memory map would be as
//! fast and would turn a disk error into a signal that ends the process.

use crate::error::{Action, Damage, DataError};
use caravan_types::Digest;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const VERSION: u32 = 1;
const HEADER_BYTES: u64 = 24;

/// What a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Format {
    pub magic: [u8; 8],
    /// Bytes per record.
    pub width: u32,
}

impl Format {
    fn header(self, count: u64) -> [u8; HEADER_BYTES as usize] {
        let mut header = [0; HEADER_BYTES as usize];
        header[..8].copy_from_slice(&self.magic);
        header[8..12].copy_from_slice(&VERSION.to_le_bytes());
        header[12..16].copy_from_slice(&self.width.to_le_bytes());
        header[16..].copy_from_slice(&count.to_le_bytes());
        header
    }

    fn file_bytes(self, count: u64) -> u64 {
        HEADER_BYTES.saturating_add(count.saturating_mul(u64::from(self.width)))
    }
}

/// A finished file, as the index lists it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Entry {
    /// File name.
    pub name: String,
    /// Records in it.
    pub records: u64,
    /// Hash of the whole file.
    pub blake3: Digest,
}

/// Writes one file.
pub(crate) struct Writer {
    path: PathBuf,
    format: Format,
    out: BufWriter<File>,
    count: u64,
}

impl Writer {
    pub(crate) fn create(path: &Path, format: Format) -> Result<Self, DataError> {
        let file = File::options().read(true).write(true).create(true).truncate(true).open(path);
        let mut out = BufWriter::with_capacity(1 << 18, file.map_err(DataError::io(Action::Write, path))?);
        // The count is not known yet; `finish` writes the header again.
        out.write_all(&format.header(0)).map_err(DataError::io(Action::Write, path))?;
        Ok(Self { path: path.to_owned(), format, out, count: 0 })
    }

    /// Records so far.
    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    /// Appends whole records.
    pub(crate) fn append(&mut self, records: &[u8]) -> Result<(), DataError> {
        self.count += records.len() as u64 / u64::from(self.format.width);
        self.out.write_all(records).map_err(DataError::io(Action::Write, &self.path))
    }

    /// Completes the header and makes the file durable. The hash is that of what can be read
    /// back, not of what was meant to be written.
    pub(crate) fn finish(self) -> Result<Entry, DataError> {
        let Self { path, format, out, count } = self;
        let io = || DataError::io(Action::Write, &path);
        let file = out.into_inner().map_err(|e| io()(e.into_error()))?;
        file.write_all_at(&format.header(count), 0).map_err(io())?;
        file.sync_all().map_err(io())?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Entry { name, records: count, blake3: hash_file(&path)? })
    }
}

/// Reads one file, from any position.
#[derive(Debug)]
pub(crate) struct Reader {
    path: PathBuf,
    file: File,
    format: Format,
    entry: Entry,
}

impl Reader {
    /// Opens the file of `entry` in `dir` and checks its length and header.
    pub(crate) fn open(dir: &Path, entry: &Entry, format: Format) -> Result<Self, DataError> {
        let path = dir.join(&entry.name);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(DataError::damaged(&path, Damage::Gone));
            }
            Err(e) => return Err(DataError::io(Action::Read, &path)(e)),
        };
        let io = || DataError::io(Action::Read, &path);
        let (expected, found) = (format.file_bytes(entry.records), file.metadata().map_err(io())?.len());
        if expected != found {
            return Err(DataError::damaged(&path, Damage::Length { expected, found }));
        }
        let mut header = [0; HEADER_BYTES as usize];
        file.read_exact_at(&mut header, 0).map_err(io())?;
        if header != format.header(entry.records) {
            return Err(DataError::damaged(&path, Damage::Header));
        }
        Ok(Self { path, file, format, entry: entry.clone() })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Records in the file.
    pub(crate) fn count(&self) -> u64 {
        self.entry.records
    }

    /// Fills `out` with the records from `first` on.
    pub(crate) fn read(&self, first: u64, out: &mut [u8]) -> Result<(), DataError> {
        self.file
            .read_exact_at(out, self.format.file_bytes(first))
            .map_err(DataError::io(Action::Read, &self.path))
    }

    /// Compares the whole file with the hash in the index.
    pub(crate) fn verify(&self) -> Result<(), DataError> {
        verify(&self.path, self.entry.blake3)
    }
}

/// Compares a file with its hash.
pub(crate) fn verify(path: &Path, blake3: Digest) -> Result<(), DataError> {
    if hash_file(path)? == blake3 { Ok(()) } else { Err(DataError::damaged(path, Damage::Hash)) }
}

fn hash_file(path: &Path) -> Result<Digest, DataError> {
    let io = || DataError::io(Action::Read, path);
    let mut file = File::open(path).map_err(io())?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 1 << 18];
    loop {
        match file.read(&mut buffer).map_err(io())? {
            0 => return Ok(Digest(*hasher.finalize().as_bytes())),
            n => hasher.update(&buffer[..n]),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORMAT: Format = Format { magic: *b"CARAVTOK", width: 2 };

    #[test]
    fn records_come_back_from_any_position() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = Writer::create(&dir.path().join("x"), FORMAT).unwrap();
        writer.append(&[1, 0, 2, 0]).unwrap();
        writer.append(&[3, 0]).unwrap();
        assert_eq!(writer.count(), 3);
        let entry = writer.finish().unwrap();
        let reader = Reader::open(dir.path(), &entry, FORMAT).unwrap();
        let mut out = [0; 4];
        reader.read(1, &mut out).unwrap();
        assert_eq!(out, [2, 0, 3, 0]);
        reader.verify().unwrap();
    }

    #[test]
    fn a_full_device_is_an_error_that_says_what_to_do() {
        let mut writer = Writer::create(Path::new("/dev/full"), FORMAT).unwrap();
        let text = match writer.append(&vec![0; 1 << 20]) {
            Err(e) => e.to_string(),
            Ok(()) => writer.finish().unwrap_err().to_string(),
        };
        assert!(text.contains("/dev/full") && text.contains("free some space"), "{text}");
    }
}
