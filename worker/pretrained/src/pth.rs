//! PyTorch's files of tensors, as Meta publishes its weights: a ZIP archive with a pickle that
//! describes tensors and, uncompressed, one entry a storage.

use crate::files::{Opened, Stored, bytes_of};
use crate::{Dtype, PretrainedError, pickle};
use rawzip::extra_fields::ExtraFieldId;
use rawzip::{CompressionMethod, Header, RECOMMENDED_BUFFER_SIZE, ZipArchive, ZipArchiveWriter};
use std::collections::HashMap;
use std::io::Write;
use std::path::Path;

/// Largest pickle that is read. A tensor's description has some 200 bytes, and the largest Llama
/// some thousand tensors.
const LARGEST_PICKLE: u64 = 16 << 20;

/// Entries of an archive that are looked at: 64 times what the largest Llama has.
const MOST_ENTRIES: u64 = 1 << 16;

/// Where PyTorch starts each storage, so that a mapped file can be used as it lies.
const ALIGNMENT: u64 = 64;

/// PyTorch's own id for padding.
const PADDING: ExtraFieldId = ExtraFieldId::new(u16::from_le_bytes(*b"FB"));

/// Where entries of an archive lie: offset and bytes, by name without the archive's own.
type Entries = HashMap<String, (u64, u64)>;

/// The tensors of a file, by name.
pub(crate) fn tensors(file: &Opened) -> Result<Vec<(String, Stored)>, PretrainedError> {
    let bad = |why: String| PretrainedError::file(&file.path, why);
    let mut start = [0; 4];
    if file.len < 4 {
        return Err(bad(format!("it has {} bytes: it is cut short", file.len)));
    }
    file.read_at(0, &mut start)?;
    if start != *b"PK\x03\x04" {
        return Err(bad(
            "it is no ZIP archive, as PyTorch writes files of tensors since its version 1.6; one of an older version \
             can be loaded there and saved again"
                .into(),
        ));
    }
    let entries = entries(file)?;
    if let Some((at, 3)) = entries.get("byteorder").copied() {
        let mut order = [0; 3];
        file.read_at(at, &mut order)?;
        if order == *b"big" {
            return Err(bad("its numbers are big-endian, and little-endian ones are read".into()));
        }
    }
    let (at, bytes) = entries.get("data.pkl").copied().ok_or_else(|| bad("it has no data.pkl".into()))?;
    if bytes > LARGEST_PICKLE {
        return Err(bad(format!("its data.pkl has {bytes} bytes, and at most {LARGEST_PICKLE} are read")));
    }
    let mut content = vec![0; bytes as usize];
    file.read_at(at, &mut content)?;
    let described =
        pickle::read(&content).map_err(|why| bad(format!("its data.pkl is not understood: {why}")))?;
    let place = |(name, tensor): (String, pickle::Described)| {
        let missing = || bad(format!("{name}: its storage {} is not in the archive", tensor.storage));
        let (at, bytes) = *entries.get(&format!("data/{}", tensor.storage)).ok_or_else(missing)?;
        let (dtype, shape) = (tensor.dtype, tensor.shape);
        let first = tensor.first.checked_mul(dtype.size());
        let end = first.zip(bytes_of(&shape, dtype)).and_then(|(first, bytes)| first.checked_add(bytes));
        let stored = tensor.elements.checked_mul(dtype.size());
        match (first, end) {
            (Some(first), Some(end)) if end <= bytes && stored == Some(bytes) => {
                Ok((name, Stored { dtype, shape, offset: at + first }))
            }
            _ => Err(bad(format!(
                "{name} of the shape {shape:?} does not fit into its storage of {bytes} bytes"
            ))),
        }
    };
    described.into_iter().map(place).collect()
}

fn entries(file: &Opened) -> Result<Entries, PretrainedError> {
    let bad = |why: String| PretrainedError::file(&file.path, why);
    let zip = |error: rawzip::Error| bad(format!("its archive is damaged or cut short: {error}"));
    let handle = file.file.try_clone().map_err(PretrainedError::io("open", &file.path))?;
    let mut buffer = vec![0; RECOMMENDED_BUFFER_SIZE];
    let archive = ZipArchive::from_file(handle, &mut buffer).map_err(zip)?;
    let mut records = archive.entries(&mut buffer);
    let mut found = Vec::new();
    while let Some(record) = records.next_entry().map_err(zip)? {
        let name = String::from_utf8_lossy(record.file_path().as_ref()).into_owned();
        if record.compression_method() != CompressionMethod::STORE {
            return Err(bad(format!("its entry {name} is compressed, which PyTorch does not do")));
        }
        if found.len() as u64 >= MOST_ENTRIES {
            return Err(bad(format!("its archive has more than {MOST_ENTRIES} entries")));
        }
        found.push((name, record.wayfinder()));
    }
    let mut entries = Entries::new();
    for (name, record) in found {
        let (start, end) = archive.get_entry(record).map_err(zip)?.compressed_data_range();
        if end < start || end > file.len {
            return Err(bad(format!("its entry {name} ends beyond the file's end: the file is cut short")));
        }
        // All lie in one folder, which has the file's former name.
        let name = name.split_once('/').map_or(name.as_str(), |(_, rest)| rest).to_owned();
        if entries.insert(name.clone(), (start, end - start)).is_some() {
            return Err(bad(format!("its archive has two entries {name}")));
        }
    }
    Ok(entries)
}

/// Writes an archive with these tensors; `content` writes the bytes of the tensor of a number.
pub(crate) fn write(
    path: &Path,
    out: impl Write,
    tensors: &[(String, Vec<u64>, Dtype)],
    mut content: impl FnMut(usize, &mut dyn Write) -> Result<(), PretrainedError>,
) -> Result<(), PretrainedError> {
    let zip = |error: rawzip::Error| PretrainedError::Io {
        action: "write",
        path: path.to_owned(),
        source: std::io::Error::other(error),
    };
    let mut archive = ZipArchiveWriter::new(out);
    let described = tensors.iter().map(|(name, shape, dtype)| (name.as_str(), shape.as_slice(), *dtype));
    let pickle = pickle::write(described);
    let mut add = |name: &str, content: &mut dyn FnMut(&mut dyn Write) -> Result<(), PretrainedError>| {
        let name = format!("consolidated.00/{name}");
        // A local header has 30 bytes before its name, and a field of padding four before its own.
        let before = archive.stream_offset() + 30 + name.len() as u64 + 4;
        let padding = vec![b'Z'; (before.next_multiple_of(ALIGNMENT) - before) as usize];
        let builder = archive.new_file(&name).extra_field(PADDING, &padding, Header::LOCAL).map_err(zip)?;
        let (mut entry, config) = builder.start().map_err(zip)?;
        let mut writer = config.wrap(&mut entry);
        content(&mut writer)?;
        let (_, descriptor) = writer.finish().map_err(zip)?;
        entry.finish(descriptor).map_err(zip).map(|_| ())
    };
    let io = |e| PretrainedError::io("write", path)(e);
    add("data.pkl", &mut |out| out.write_all(&pickle).map_err(io))?;
    add("byteorder", &mut |out| out.write_all(b"little").map_err(io))?;
    for i in 0..tensors.len() {
        add(&format!("data/{i}"), &mut |out| content(i, out))?;
    }
    add("version", &mut |out| out.write_all(b"3\n").map_err(io))?;
    archive.finish().map_err(zip)?;
    Ok(())
}
