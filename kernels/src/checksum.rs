//! Checksums of values as they lie in memory, to see whether they change behind our back.

use crate::{Cpu, Element, crc};
use rayon::prelude::*;

/// Elements that a thread takes at a time; part of the checksum's definition.
pub(crate) const CHUNK: usize = 1 << 14;

/// CRC-32C of the CRC-32Cs of each vector's chunks of 16384 elements, little-endian. The same
/// for every number of threads and every instruction family. One bit that is not what it was
/// changes it for certain.
#[must_use]
pub fn checksum<E: Element>(cpu: &Cpu, vectors: &[&[E]]) -> u32 {
    fold(chunks(cpu, vectors))
}

fn chunks<E: Element>(cpu: &Cpu, vectors: &[&[E]]) -> Vec<u32> {
    let chunks: Vec<&[E]> = vectors.iter().flat_map(|x| x.chunks(CHUNK)).collect();
    match chunks.as_slice() {
        [one] => vec![chunk(one)],
        chunks => cpu.install(|| chunks.par_iter().map(|x| chunk(x)).collect()),
    }
}

/// Of one chunk.
pub(crate) fn chunk<E: Element>(values: &[E]) -> u32 {
    crc::crc32c(bytemuck::cast_slice(values))
}

/// Of chunks' checksums.
pub(crate) fn fold(chunks: impl IntoIterator<Item = u32>) -> u32 {
    chunks.into_iter().fold(0, |sum, chunk| crc32c::crc32c_append(sum, &chunk.to_le_bytes()))
}

/// Flips one bit of some values, as a cosmic ray would; which one is a function of `bit`.
pub fn flip<E: Element>(values: &mut [E], bit: u64) {
    let bytes: &mut [u8] = bytemuck::cast_slice_mut(values);
    let count = bytes.len().max(1) as u64;
    if let Some(byte) = bytes.get_mut((bit / 8 % count) as usize) {
        *byte ^= 1 << (bit % 8);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Family;
    use proptest::prelude::*;

    fn sum(threads: usize, vectors: &[&[f32]]) -> u32 {
        checksum(&Cpu::new(threads, Family::PORTABLE).unwrap(), vectors)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn one_bit_anywhere_changes_it_and_the_number_of_threads_does_not(
            n in 1..40_000usize, at in any::<prop::sample::Index>(), bit in 0..32u32,
        ) {
            let mut x: Vec<f32> = (0..n).map(|i| (i as f32 * 0.37).sin()).collect();
            let before = sum(1, &[&x]);
            prop_assert_eq!(sum(2, &[&x]), before);
            let at = at.index(n);
            x[at] = f32::from_bits(x[at].to_bits() ^ 1 << bit);
            prop_assert_ne!(sum(2, &[&x]), before);
        }
    }

    #[test]
    fn minus_zero_is_not_zero_and_order_matters() {
        assert_ne!(sum(1, &[&[0.0]]), sum(1, &[&[-0.0]]));
        assert_ne!(sum(1, &[&[1.0], &[2.0]]), sum(1, &[&[2.0], &[1.0]]));
    }
}
