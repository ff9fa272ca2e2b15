//! Small matrices transposed in registers, where AVX-512 has enough of them.
//!
//! Sixteen vectors of sixteen units of 32 bits: pairs of rows, then pairs of pairs are interleaved,
//! which transposes squares of four, and then whole squares of four change places.

// Vectors are read and written through pointers, between bounds that are asserted.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
use crate::family::Kind;
use crate::{Element, Family};
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// Rows and columns.
pub(super) const SIDE: usize = 16;

/// Proof that a machine has AVX-512.
#[derive(Clone, Copy, Debug)]
pub(super) struct Transposer(());

impl Transposer {
    /// Where the family has what is needed.
    pub(super) fn of(family: Family) -> Option<Self> {
        match family.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Amx | Kind::AmxOnVectors | Kind::Avx512Bf16 | Kind::Avx512 => Some(Self(())),
            _ => None,
        }
    }

    /// Writes the transpose of `SIDE` rows of 64 bytes each, in units of four bytes. Rows start
    /// `stride` elements apart, and columns `to_stride`.
    ///
    /// # Panics
    /// Where a slice is too short.
    #[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))]
    pub(super) fn transpose<E: Element>(self, from: &[E], stride: usize, to: &mut [E], to_stride: usize) {
        let row = 64 / size_of::<E>();
        assert!(from.len() >= (SIDE - 1) * stride + row && to.len() >= (SIDE - 1) * to_stride + row);
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a Transposer exists only where AVX-512 was detected, and all that is read and written
        // lies within the slices.
        unsafe {
            transpose(from.as_ptr(), stride, to.as_mut_ptr(), to_stride);
        }
    }

    /// Writes the transpose of 2 · `SIDE` rows of `SIDE` elements of two bytes each: each column as 64
    /// bytes. Rows start `stride` elements apart, and columns `to_stride`.
    ///
    /// # Panics
    /// Where a slice is too short, or elements have another size.
    #[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))]
    pub(super) fn transpose_halves<E: Element>(
        self,
        from: &[E],
        stride: usize,
        to: &mut [E],
        to_stride: usize,
    ) {
        assert!(size_of::<E>() == 2);
        assert!(from.len() >= (2 * SIDE - 1) * stride + SIDE);
        assert!(to.len() >= (SIDE - 1) * to_stride + 2 * SIDE);
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as in `transpose`.
        unsafe {
            transpose_halves(from.as_ptr(), stride, to.as_mut_ptr(), to_stride);
        }
    }
}

/// # Safety
/// `SIDE` rows of 64 bytes are at `from`, and there is room for as many at `to`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")]
unsafe fn transpose<E>(from: *const E, stride: usize, to: *mut E, to_stride: usize) {
    let mut rows = [_mm512_setzero_si512(); SIDE];
    for (i, row) in rows.iter_mut().enumerate() {
        // SAFETY: the caller's promise; loads and stores need no alignment.
        *row = unsafe { _mm512_loadu_si512(from.add(i * stride).cast()) };
    }
    for (i, column) in transposed(rows).into_iter().enumerate() {
        // SAFETY: as above.
        unsafe { _mm512_storeu_si512(to.add(i * to_stride).cast(), column) };
    }
}

/// # Safety
/// 2 · `SIDE` rows of 32 bytes are at `from`, and there is room for `SIDE` of 64 bytes at `to`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")]
unsafe fn transpose_halves<E>(from: *const E, stride: usize, to: *mut E, to_stride: usize) {
    let mut rows = [_mm512_setzero_si512(); SIDE];
    for (i, row) in rows.iter_mut().enumerate() {
        // SAFETY: the caller's promise; loads and stores need no alignment.
        let [low, high] = [2 * i, 2 * i + 1]
            .map(|i| unsafe { _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.add(i * stride).cast())) });
        *row = _mm512_or_si512(low, _mm512_slli_epi32::<16>(high));
    }
    for (i, column) in transposed(rows).into_iter().enumerate() {
        // SAFETY: as above.
        unsafe { _mm512_storeu_si512(to.add(i * to_stride).cast(), column) };
    }
}

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")]
fn transposed(rows: [__m512i; SIDE]) -> [__m512i; SIDE] {
    let mut pairs = rows;
    for i in (0..SIDE).step_by(2) {
        pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    // The quarter L of fours[4g + j] is column 4L + j of rows 4g to 4g + 3.
    let mut fours = pairs;
    for i in (0..SIDE).step_by(4) {
        fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
        fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
        fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
        fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
    const EVEN: i32 = 0x88;
    const ODD: i32 = 0xdd;
    let mut columns = fours;
    for j in 0..4 {
        let [a, b, c, d] = [fours[j], fours[4 + j], fours[8 + j], fours[12 + j]];
        let (top, bottom) = (_mm512_shuffle_i32x4::<EVEN>(a, b), _mm512_shuffle_i32x4::<EVEN>(c, d));
        columns[j] = _mm512_shuffle_i32x4::<EVEN>(top, bottom);
        columns[8 + j] = _mm512_shuffle_i32x4::<ODD>(top, bottom);
        let (top, bottom) = (_mm512_shuffle_i32x4::<ODD>(a, b), _mm512_shuffle_i32x4::<ODD>(c, d));
        columns[4 + j] = _mm512_shuffle_i32x4::<EVEN>(top, bottom);
        columns[12 + j] = _mm512_shuffle_i32x4::<ODD>(top, bottom);
    }
    columns
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Bf16;

    #[test]
    fn rows_become_columns() {
        for transposer in Family::available().into_iter().filter_map(Transposer::of) {
            let from: Vec<f32> = (0..16 * 20).map(|i| i as f32).collect();
            let mut to = vec![0.0f32; 16 * 17];
            transposer.transpose(&from, 20, &mut to, 17);
            assert!((0..256).all(|i| to[i % 16 * 17 + i / 16] == from[i / 16 * 20 + i % 16]));

            let from: Vec<Bf16> = (0..32 * 18).map(|i| Bf16::narrow(i as f32)).collect();
            let mut to = vec![Bf16::default(); 16 * 32];
            transposer.transpose_halves(&from, 18, &mut to, 32);
            assert!((0..512).all(|i| to[i % 16 * 32 + i / 16] == from[i / 16 * 18 + i % 16]));
        }
    }
}
