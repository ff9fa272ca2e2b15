//! A folder's JSON of settings, read key by key.
//!
//! What is not asked for is not refused as such: Hugging Face's configurations are full of keys
//! that change no logit. Keys that do are asked for by [`crate::config`] and [`crate::params`].

use crate::PretrainedError;
use crate::files::read_small;
use caravan_types::ModelShape;
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// Largest configuration that is read: a thousand times what one has.
const LARGEST: u64 = 4 << 20;

/// Limits far above any Llama, so that products of sizes fit into 64 bits.
const MOST: [(&str, u32); 7] = [
    ("dim", 1 << 17),
    ("layers", 1 << 10),
    ("heads", 1 << 12),
    ("kv_heads", 1 << 12),
    ("hidden", 1 << 20),
    ("vocab", 1 << 20),
    ("context", 1 << 24),
];

/// The settings of a file.
pub(crate) struct Settings {
    pub(crate) path: PathBuf,
    pub(crate) map: Map<String, Value>,
}

impl Settings {
    pub(crate) fn read(path: PathBuf) -> Result<Self, PretrainedError> {
        let bytes = read_small(&path, LARGEST)?;
        match serde_json::from_slice(&bytes) {
            Ok(Value::Object(map)) => Ok(Self { path, map }),
            Ok(_) => Err(PretrainedError::file(&path, "it is JSON, but no object with settings")),
            Err(error) => Err(PretrainedError::file(&path, format!("it is no JSON: {error}"))),
        }
    }

    /// A key's value; none where it is not there, or null.
    pub(crate) fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// An error about a key.
    pub(crate) fn refuse(&self, key: &str, why: impl Into<String>) -> PretrainedError {
        let value = self.map.get(key).map_or("nothing".to_owned(), Value::to_string);
        refuse(&self.path, key, value, why)
    }

    /// A whole number of 32 bits, at least 1.
    pub(crate) fn size(&self, key: &str) -> Result<Option<u32>, PretrainedError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let size = value.as_u64().and_then(|v| u32::try_from(v).ok()).filter(|v| *v > 0);
        size.map(Some).ok_or_else(|| self.refuse(key, "it must be a whole number from 1"))
    }

    /// The same, which must be there.
    pub(crate) fn needed(&self, key: &str) -> Result<u32, PretrainedError> {
        self.size(key)?.ok_or_else(|| self.refuse(key, "it must be there"))
    }

    /// A number that fp32 holds, or that is meant to be rounded to it.
    pub(crate) fn number(&self, key: &str) -> Result<Option<f32>, PretrainedError> {
        self.get(key).map(|value| number(&self.path, key, value)).transpose()
    }

    /// What must not be set, or be one of these.
    pub(crate) fn only(&self, key: &str, allowed: &[Value], why: &str) -> Result<(), PretrainedError> {
        match self.get(key) {
            Some(value) if !allowed.contains(value) => Err(self.refuse(key, why)),
            _ => Ok(()),
        }
    }

    /// Whether the sizes of a shape can be those of a model.
    pub(crate) fn check(&self, shape: &ModelShape) -> Result<(), PretrainedError> {
        let ModelShape { dim, layers, heads, kv_heads, hidden, vocab, context, .. } = *shape;
        let bad = |key: &str, value: u32, why: String| Err(refuse(&self.path, key, value.to_string(), why));
        for ((key, most), value) in
            MOST.into_iter().zip([dim, layers, heads, kv_heads, hidden, vocab, context])
        {
            if value > most {
                return bad(key, value, format!("it must be at most {most}"));
            }
        }
        if !dim.is_multiple_of(2 * heads) {
            return bad("heads", heads, format!("the width {dim} must be an even multiple of it"));
        }
        if !heads.is_multiple_of(kv_heads) {
            return bad(
                "kv_heads",
                kv_heads,
                format!("the number of heads, {heads}, must be a multiple of it"),
            );
        }
        Ok(())
    }
}

/// A setting as a number of fp32.
pub(crate) fn number(path: &Path, key: &str, value: &Value) -> Result<f32, PretrainedError> {
    let number = value.as_f64().map(|v| v as f32).filter(|v| v.is_finite() && *v > 0.0);
    number.ok_or_else(|| refuse(path, key, value.to_string(), "it must be a number above 0"))
}

pub(crate) fn refuse(path: &Path, key: &str, value: String, why: impl Into<String>) -> PretrainedError {
    PretrainedError::Setting { path: path.to_owned(), key: key.to_owned(), value, why: why.into() }
}

/// An fp32 number as the shortest fp64 that becomes it again, and not 0.000009999999747.
pub(crate) fn short(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}
