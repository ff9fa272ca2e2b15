//! Hugging Face's files of tensors: which tensors one holds, and writing one.

use crate::files::{Opened, Stored, bytes_of, read_small};
use crate::{Dtype, PretrainedError};
use safetensors::Dtype as Format;
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::Value;
use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

/// Largest header that is read: the format's own limit.
const LARGEST_HEADER: u64 = 100_000_000;

/// A model that lies in one file.
pub(crate) const ONE: &str = "model.safetensors";
/// Which file has which tensor, where a model lies in several.
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// The files of a folder, by its index where it has one.
pub(crate) fn files(dir: &Path) -> Result<Vec<PathBuf>, PretrainedError> {
    let index = dir.join(INDEX);
    if !index.exists() {
        let one = dir.join(ONE);
        if !one.exists() {
            let why = format!(
                "a model's weights are in it, or in files that {INDEX} lists. Weights in pytorch_model.bin are not \
                 read: save them with safetensors"
            );
            return Err(PretrainedError::Missing { path: one, why });
        }
        return Ok(vec![one]);
    }
    let bad = |why: &str| PretrainedError::file(&index, why);
    let value: Value = serde_json::from_slice(&read_small(&index, LARGEST_HEADER)?)
        .map_err(|e| bad(&format!("it is no JSON: {e}")))?;
    let map = value["weight_map"].as_object().ok_or_else(|| bad("it has no weight_map"))?;
    let mut names = BTreeSet::new();
    for (tensor, file) in map {
        let file = file.as_str().filter(|f| !f.is_empty() && !f.contains(['/', '\\']) && *f != "..");
        names.insert(file.ok_or_else(|| bad(&format!("{tensor} is in no file of this folder")))?);
    }
    Ok(names.into_iter().map(|name| dir.join(name)).collect())
}

/// The tensors of a file, by name.
pub(crate) fn tensors(file: &Opened) -> Result<Vec<(String, Stored)>, PretrainedError> {
    let bad = |why: String| PretrainedError::file(&file.path, why);
    if file.len < 8 {
        return Err(bad(format!("it has {} bytes, and a header alone has more", file.len)));
    }
    let mut length = [0; 8];
    file.read_at(0, &mut length)?;
    let length = u64::from_le_bytes(length);
    if length > LARGEST_HEADER.min(file.len - 8) {
        return Err(bad(format!(
            "it claims a header of {length} bytes; it may be cut short, or no safetensors file"
        )));
    }
    let mut header = vec![0; length as usize];
    file.read_at(8, &mut header)?;
    let header: Metadata =
        serde_json::from_slice(&header).map_err(|e| bad(format!("its header makes no sense: {e}")))?;
    let (start, mut found) = (8 + length, Vec::new());
    for (name, info) in header.tensors() {
        let dtype = match info.dtype {
            Format::F32 => Dtype::F32,
            Format::BF16 => Dtype::Bf16,
            Format::F16 => Dtype::F16,
            other => {
                return Err(bad(format!(
                    "{name} is of the type {other:?}; fp32, bf16 and fp16 are read. Quantised weights must be \
                     dequantised before"
                )));
            }
        };
        let shape: Vec<u64> = info.shape.iter().map(|d| *d as u64).collect();
        let (from, to) = (info.data_offsets.0 as u64, info.data_offsets.1 as u64);
        if to < from || bytes_of(&shape, dtype) != Some(to - from) {
            return Err(bad(format!("{name} has {} bytes and the shape {shape:?}", to.wrapping_sub(from))));
        }
        if to > file.len - start {
            return Err(bad(format!("{name} ends beyond the file's end: the file is cut short")));
        }
        found.push((name, Stored { dtype, shape, offset: start + from }));
    }
    Ok(found)
}

/// The header of a file with these tensors, in this order, padded so that they are aligned.
pub(crate) fn header(
    path: &Path,
    tensors: impl IntoIterator<Item = (String, Vec<u64>, Dtype)>,
) -> Result<Vec<u8>, PretrainedError> {
    let (mut at, mut infos) = (0, Vec::new());
    for (name, shape, dtype) in tensors {
        let bytes = bytes_of(&shape, dtype).unwrap_or_default() as usize;
        let shape = shape.iter().map(|d| *d as usize).collect();
        let dtype = match dtype {
            Dtype::F32 => Format::F32,
            Dtype::Bf16 => Format::BF16,
            Dtype::F16 => Format::F16,
        };
        infos.push((name, TensorInfo { dtype, shape, data_offsets: (at, at + bytes) }));
        at += bytes;
    }
    let about = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let bad = |why: String| PretrainedError::file(path, why);
    let metadata = Metadata::new(Some(about), infos).map_err(|e| bad(e.to_string()))?;
    let mut json = serde_json::to_vec(&metadata).map_err(|e| bad(e.to_string()))?;
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.extend(json);
    Ok(header)
}
