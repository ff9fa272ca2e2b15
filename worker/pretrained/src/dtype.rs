//! The number formats that weights are published in.

use half::{bf16, f16};
use std::fmt;

/// How a tensor's elements are stored. All of them fit into fp32 without loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// 32-bit floating point.
    F32,
    /// The upper half of that.
    Bf16,
    /// 16-bit floating point as IEEE 754 has it.
    F16,
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "fp32",
            Self::Bf16 => "bf16",
            Self::F16 => "fp16",
        })
    }
}

impl Dtype {
    /// The one of this name: fp32, bf16 or fp16.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        [Self::F32, Self::Bf16, Self::F16].into_iter().find(|dtype| dtype.to_string() == name)
    }

    /// Bytes of an element.
    #[must_use]
    pub fn size(self) -> u64 {
        if self == Self::F32 { 4 } else { 2 }
    }

    /// PyTorch's name, as `config.json` has it.
    pub(crate) fn torch(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
        }
    }

    /// PyTorch's name of a storage of such elements.
    pub(crate) fn storage(self) -> &'static str {
        match self {
            Self::F32 => "FloatStorage",
            Self::Bf16 => "BFloat16Storage",
            Self::F16 => "HalfStorage",
        }
    }

    pub(crate) fn of_storage(name: &str) -> Option<Self> {
        [Self::F32, Self::Bf16, Self::F16].into_iter().find(|dtype| dtype.storage() == name)
    }

    /// Reads little-endian elements; `bytes` has as many as `out` has places.
    pub(crate) fn decode(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            Self::F32 => {
                for (out, b) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *out = f32::from_le_bytes(*b);
                }
            }
            Self::Bf16 => {
                for (out, b) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *out = bf16::from_le_bytes(*b).to_f32();
                }
            }
            Self::F16 => {
                for (out, b) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *out = f16::from_le_bytes(*b).to_f32();
                }
            }
        }
    }

    /// Appends elements, little-endian, rounded to the nearest with ties to even.
    pub(crate) fn encode(self, values: &[f32], out: &mut Vec<u8>) {
        match self {
            Self::F32 => out.extend(values.iter().flat_map(|v| v.to_le_bytes())),
            Self::Bf16 => out.extend(values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes())),
            Self::F16 => out.extend(values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes())),
        }
    }

    /// What comes back of values that are written so.
    pub fn round(self, values: &mut [f32]) {
        match self {
            Self::F32 => {}
            Self::Bf16 => values.iter_mut().for_each(|v| *v = bf16::from_f32(*v).to_f32()),
            Self::F16 => values.iter_mut().for_each(|v| *v = f16::from_f32(*v).to_f32()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_finite_number_of_16_bits_comes_back_with_its_bits() {
        for dtype in [Dtype::Bf16, Dtype::F16] {
            for bits in 0..=u16::MAX {
                let mut value = [0.0];
                dtype.decode(&bits.to_le_bytes(), &mut value);
                if value[0].is_finite() {
                    let mut bytes = Vec::new();
                    dtype.encode(&value, &mut bytes);
                    assert_eq!(bytes, bits.to_le_bytes());
                }
            }
        }
    }

    #[test]
    fn rounding_is_what_encoding_and_decoding_do() {
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
            assert_eq!(Dtype::named(&dtype.to_string()), Some(dtype));
            let mut values = [0.1f32, -1.0 / 3.0, 65504.0, 1e-8, 0.0];
            let (mut bytes, mut back) = (Vec::new(), [0.0; 5]);
            dtype.encode(&values, &mut bytes);
            dtype.decode(&bytes, &mut back);
            dtype.round(&mut values);
            assert_eq!(values, back);
        }
    }
}
