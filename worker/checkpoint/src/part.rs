//! One worker's part of a checkpoint: a safetensors file with three tensors a slice.

use crate::files::HashedFile;
use crate::{CheckpointError, folder};
use caravan_types::task::SavedPart;
use caravan_types::{Digest, Generation, SliceId, SliceTable, Step, WorkerId};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

/// Version of a part's tensors and their names.
const PART_VERSION: &str = "1";

/// A slice's three tensors, in the order in which they lie in its state: master weights,
/// first moments, second moments.
const TENSORS: [&str; 3] = ["weight", "m", "v"];

/// Largest header that is read. A header has some 100 bytes a tensor and there are three a
/// slice, so this is room for 200,000 slices, 50 times what the largest preset has; a
/// damaged length field must not make anyone reserve the memory that it names.
const LARGEST_HEADER: u64 = 64 << 20;

/// Hash of a slice's master weights: BLAKE3 of the values as little-endian fp32.
#[must_use]
pub fn slice_hash(weights: &[f32]) -> Digest {
    Digest(*blake3::hash(bytemuck::cast_slice(weights)).as_bytes())
}

/// Hash of all weights: BLAKE3 of the slices' hashes in the order of slices.
#[must_use]
pub fn weights_hash<'a>(slices: impl IntoIterator<Item = &'a Digest>) -> Digest {
    let mut hasher = blake3::Hasher::new();
    for digest in slices {
        hasher.update(&digest.0);
    }
    Digest(*hasher.finalize().as_bytes())
}

/// Writes one worker's part of the checkpoint of `step` and makes it durable. `states` has
/// each slice's master weights, first and second moments, one after the other.
///
/// The part counts for nothing until [`complete`](crate::complete) took it up. A file that
/// could not be finished is removed again, so that a full disk has its space back.
///
/// # Errors
/// [`CheckpointError::StateLength`], and [`CheckpointError::Io`] with what the file system
/// said.
pub fn write_part(
    root: &Path,
    generation: Generation,
    step: Step,
    worker: WorkerId,
    states: &[(SliceId, Vec<f32>)],
) -> Result<SavedPart, CheckpointError> {
    let dir = folder::partial(root, generation, step);
    fs::create_dir_all(&dir).map_err(CheckpointError::io("create", &dir))?;
    let file = folder::part_name(worker);
    let path = dir.join(&file);
    let header = header(&file, step, worker, states)?;
    match write(&path, &header, states) {
        Ok((bytes, digest)) => {
            let slices = states.iter().map(|(id, s)| (*id, slice_hash(&s[..s.len() / 3]))).collect();
            Ok(SavedPart { file, bytes, digest, slices })
        }
        Err(error) => {
            // The first error is the one to tell; an unfinished file harms nobody either way.
            fs::remove_file(&path).ok();
            Err(error)
        }
    }
}

fn write(
    path: &Path,
    header: &[u8],
    states: &[(SliceId, Vec<f32>)],
) -> Result<(u64, Digest), CheckpointError> {
    let mut out = HashedFile::create(path)?;
    out.write(&(header.len() as u64).to_le_bytes())?;
    out.write(header)?;
    for (_, state) in states {
        out.write(bytemuck::cast_slice(state))?;
    }
    out.finish()
}

/// The safetensors header for these states, padded to 8 bytes so that tensors are aligned.
fn header(
    file: &str,
    step: Step,
    worker: WorkerId,
    states: &[(SliceId, Vec<f32>)],
) -> Result<Vec<u8>, CheckpointError> {
    let bad = |what: String| CheckpointError::Part { file: file.to_owned(), what };
    let mut tensors = Vec::with_capacity(states.len() * TENSORS.len());
    let mut at = 0;
    for (slice, state) in states {
        if state.len() % TENSORS.len() != 0 {
            return Err(CheckpointError::StateLength { slice: *slice, found: state.len() });
        }
        let elements = state.len() / TENSORS.len();
        for tensor in TENSORS {
            let end = at + elements * size_of::<f32>();
            let info = TensorInfo { dtype: Dtype::F32, shape: vec![elements], data_offsets: (at, end) };
            tensors.push((name(*slice, tensor), info));
            at = end;
        }
    }
    let about = [
        ("format", "pt".to_owned()),
        ("caravan", PART_VERSION.to_owned()),
        ("step", step.to_string()),
        ("worker", worker.to_string()),
    ];
    let about: HashMap<_, _> = about.into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
    let metadata = Metadata::new(Some(about), tensors).map_err(|e| bad(e.to_string()))?;
    let mut bytes = serde_json::to_vec(&metadata).map_err(|e| bad(e.to_string()))?;
    bytes.resize(bytes.len().next_multiple_of(8), b' ');
    Ok(bytes)
}

fn name(slice: SliceId, tensor: &str) -> String {
    format!("slice-{}.{tensor}", slice.0)
}

/// A part that is open for reading, with its header checked.
pub(crate) struct PartReader {
    name: String,
    file: File,
    header: Metadata,
    /// Where the tensors start in the file.
    start: u64,
}

impl PartReader {
    /// Opens a part and checks that its header names this step and, with the right lengths,
    /// the slices that `part` lists.
    pub(crate) fn open(
        dir: &Path,
        part: &SavedPart,
        step: Step,
        table: &SliceTable,
    ) -> Result<Self, CheckpointError> {
        folder::check_part_name(&part.file)?;
        let path = dir.join(&part.file);
        let mut file = File::open(&path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => CheckpointError::FileMissing { file: part.file.clone() },
            _ => CheckpointError::io("open", &path)(e),
        })?;
        let bytes = file.metadata().map_err(CheckpointError::io("read", &path))?.len();
        if bytes != part.bytes {
            return Err(CheckpointError::FileSize {
                file: part.file.clone(),
                expected: part.bytes,
                found: bytes,
            });
        }
        let bad = |what: String| CheckpointError::Part { file: part.file.clone(), what };
        let mut length = [0; 8];
        file.read_exact(&mut length).map_err(CheckpointError::io("read", &path))?;
        let length = u64::from_le_bytes(length);
        if length > LARGEST_HEADER.min(bytes - 8) {
            return Err(bad(format!("it claims a header of {length} bytes")));
        }
        let mut header = vec![0; length as usize];
        file.read_exact(&mut header).map_err(CheckpointError::io("read", &path))?;
        let header: Metadata = serde_json::from_slice(&header).map_err(|e| bad(e.to_string()))?;
        let reader = Self { name: part.file.clone(), file, header, start: 8 + length };
        reader.check(part, step, table)?;
        Ok(reader)
    }

    fn check(&self, part: &SavedPart, step: Step, table: &SliceTable) -> Result<(), CheckpointError> {
        let bad = |what: String| CheckpointError::Part { file: self.name.clone(), what };
        let about = self.header.metadata().as_ref();
        let entry = |key: &str| about.and_then(|m| m.get(key)).map_or("", String::as_str);
        if entry("caravan") != PART_VERSION {
            return Err(bad(format!("its version is {:?}, not {PART_VERSION:?}", entry("caravan"))));
        }
        let found = entry("step").parse().map(Step);
        let found = found.map_err(|_| bad(format!("its step is {:?}", entry("step"))))?;
        if found != step {
            return Err(CheckpointError::WrongStep { file: self.name.clone(), expected: step, found });
        }
        for (slice, _) in &part.slices {
            let unknown = || CheckpointError::UnknownSlice { slice: *slice, slices: table.len() };
            let expected = table.get(*slice).ok_or_else(unknown)?.len();
            for tensor in TENSORS.map(|t| name(*slice, t)) {
                let info = self.header.info(&tensor).ok_or_else(|| bad(format!("{tensor} is not in it")))?;
                if info.dtype != Dtype::F32 || info.shape != [expected] {
                    let what = format!(
                        "{tensor} is {:?} {:?} where the model needs F32 [{expected}]",
                        info.dtype, info.shape
                    );
                    return Err(bad(what));
                }
            }
        }
        Ok(())
    }

    /// A slice's master weights, checked against their hash.
    pub(crate) fn weights(&mut self, slice: SliceId, expected: Digest) -> Result<Vec<f32>, CheckpointError> {
        let mut out = Vec::new();
        self.read(slice, TENSORS[0], &mut out)?;
        match slice_hash(&out) {
            found if found == expected => Ok(out),
            found => Err(CheckpointError::SliceDamaged { slice, expected, found }),
        }
    }

    /// A slice's master weights, first and second moments, one after the other.
    pub(crate) fn state(&mut self, slice: SliceId, expected: Digest) -> Result<Vec<f32>, CheckpointError> {
        let mut out = self.weights(slice, expected)?;
        for tensor in &TENSORS[1..] {
            self.read(slice, tensor, &mut out)?;
        }
        Ok(out)
    }

    /// Appends one tensor to `out`.
    fn read(&mut self, slice: SliceId, tensor: &str, out: &mut Vec<f32>) -> Result<(), CheckpointError> {
        let tensor = name(slice, tensor);
        let missing =
            || CheckpointError::Part { file: self.name.clone(), what: format!("{tensor} is not in it") };
        let (from, to) = self.header.info(&tensor).ok_or_else(missing)?.data_offsets;
        let old = out.len();
        out.resize(old + (to - from) / size_of::<f32>(), 0.0);
        let io = |e| CheckpointError::io("read", Path::new(&self.name))(e);
        self.file.seek(SeekFrom::Start(self.start + from as u64)).map_err(io)?;
        self.file.read_exact(bytemuck::cast_slice_mut(&mut out[old..])).map_err(io)
    }
}
