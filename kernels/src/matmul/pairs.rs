//! Products of bf16 matrices on vectors: two products are added to each f32 at a time.
//!
//! Columns of B lie in pairs of k, [k / 2][columns][2], so that a vector of sums takes a vector of
//! pairs and one pair of A for all of them. Where there is an instruction for that (AVX512-BF16),
//! it is used, with its own rounding; elsewhere each pair is widened, which is exact, and the two
//! products are added one after the other, fused where the family fuses.

// Vector loads and stores go through raw pointers.
#![allow(unsafe_code)]

use super::tiles::{Call, Multiply};
use crate::Bf16;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// A vector of sums.
trait Sums: Copy {
    /// As many pairs.
    type Pairs: Copy;
    /// Sums in a vector.
    const LANES: usize;

    /// Zeros.
    unsafe fn zero() -> Self;
    /// `LANES` pairs from memory.
    unsafe fn load(pairs: *const u32) -> Self::Pairs;
    /// One pair, for all sums.
    unsafe fn splat(pair: u32) -> Self::Pairs;
    /// self + a₀·b₀ + a₁·b₁.
    unsafe fn dot(self, a: Self::Pairs, b: Self::Pairs) -> Self;
    /// Sets the sums in memory, or adds to them.
    unsafe fn put(self, to: *mut f32, add: bool);
}

/// The tile of `M` rows and `N` vectors.
#[inline(always)]
unsafe fn tile<V: Sums, const M: usize, const N: usize>(call: &Call<Bf16>) {
    // SAFETY: `Multiply`'s contract; pairs are two elements, and loads need no alignment.
    unsafe {
        let mut sums = [[V::zero(); N]; M];
        let (mut a, mut b) = (call.a, call.b);
        for _ in 0..call.depth.div_ceil(2) {
            let mut columns = [V::splat(0); N];
            for (n, columns) in columns.iter_mut().enumerate() {
                *columns = V::load(b.cast::<u32>().add(n * V::LANES));
            }
            for (m, sums) in sums.iter_mut().enumerate() {
                let pair = V::splat(a.add(m * call.a_row).cast::<u32>().read_unaligned());
                for (sum, columns) in sums.iter_mut().zip(&columns) {
                    *sum = sum.dot(pair, *columns);
                }
            }
            a = a.wrapping_add(call.a_step);
            b = b.wrapping_add(call.b_step);
        }
        // Loops over sums have bodies so small that they are unrolled: else the sums would lie in
        // memory, also in the loop above.
        if call.cols == N * V::LANES {
            for (m, sums) in sums.iter().enumerate() {
                for (n, sum) in sums.iter().enumerate() {
                    sum.put(call.c.add(m * call.c_stride + n * V::LANES), call.add);
                }
            }
            return;
        }
        let mut whole = [0.0f32; HEIGHT * WIDTH];
        for (m, sums) in sums.iter().enumerate() {
            for (n, sum) in sums.iter().enumerate() {
                sum.put(whole.as_mut_ptr().add(m * WIDTH + n * V::LANES), false);
            }
        }
        for (m, row) in whole.chunks_exact(WIDTH).take(M).enumerate() {
            let to = std::slice::from_raw_parts_mut(call.c.add(m * call.c_stride), call.cols);
            for (to, sum) in to.iter_mut().zip(row) {
                *to = if call.add { *to + *sum } else { *sum };
            }
        }
    }
}

/// The table of a family's tiles, up to `$height` rows and 1 to 4 vectors.
macro_rules! table {
    ($name:ident, $vector:ty, $features:literal) => {
        pub(super) mod $name {
            use super::*;

            #[target_feature(enable = $features)]
            unsafe fn tile<const M: usize, const N: usize>(call: &Call<Bf16>) {
                // SAFETY: the caller's promise.
                unsafe { super::tile::<$vector, M, N>(call) };
            }

            /// Sums in a vector.
            pub(crate) const LANES: usize = <$vector as Sums>::LANES;
            rows!();
        }
    };
    ($name:ident, $vector:ty) => {
        pub(super) mod $name {
            use super::*;

            unsafe fn tile<const M: usize, const N: usize>(call: &Call<Bf16>) {
                // SAFETY: the caller's promise.
                unsafe { super::tile::<$vector, M, N>(call) };
            }

            /// Sums in a vector.
            pub(crate) const LANES: usize = <$vector as Sums>::LANES;
            rows!();
        }
    };
}

/// By vectors, then by rows.
macro_rules! rows {
    () => {
        pub(crate) static TABLE: [[Multiply<Bf16>; HEIGHT]; VECTORS] = [
            [tile::<1, 1>, tile::<2, 1>, tile::<3, 1>, tile::<4, 1>, tile::<5, 1>, tile::<6, 1>],
            [tile::<1, 2>, tile::<2, 2>, tile::<3, 2>, tile::<4, 2>, tile::<5, 2>, tile::<6, 2>],
            [tile::<1, 3>, tile::<2, 3>, tile::<3, 3>, tile::<4, 3>, tile::<5, 3>, tile::<6, 3>],
            [tile::<1, 4>, tile::<2, 4>, tile::<3, 4>, tile::<4, 4>, tile::<5, 4>, tile::<6, 4>],
        ];
    };
}

/// Rows of the largest tile.
pub(super) const HEIGHT: usize = 6;
/// Columns of the widest tile.
const WIDTH: usize = 64;
/// Vectors of the widest tile: 24 sums, four vectors of columns and one of A fill 29 of 32
/// registers, and hide six times the latency of one sum.
const VECTORS: usize = 4;

#[cfg(target_arch = "x86_64")]
table!(native, Native, "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma");
#[cfg(target_arch = "x86_64")]
table!(avx512, Wide, "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma");
#[cfg(target_arch = "x86_64")]
table!(avx2, Narrow, "avx2,fma");
table!(portable, Plain);

/// 512 bits, with the instruction.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
struct Native(__m512);

#[cfg(target_arch = "x86_64")]
impl Sums for Native {
    type Pairs = __m512i;
    const LANES: usize = 16;

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the table's functions have the features; so for all that follow.
        Self(unsafe { _mm512_setzero_ps() })
    }
    #[inline(always)]
    unsafe fn load(pairs: *const u32) -> __m512i {
        // SAFETY: the caller has as many pairs there.
        unsafe { _mm512_loadu_si512(pairs.cast()) }
    }
    #[inline(always)]
    unsafe fn splat(pair: u32) -> __m512i {
        // SAFETY: as in `zero`.
        unsafe { _mm512_set1_epi32(pair.cast_signed()) }
    }
    #[inline(always)]
    unsafe fn dot(self, a: __m512i, b: __m512i) -> Self {
        // SAFETY: as in `zero`; both types are 512 bits of any value.
        Self(unsafe {
            let [a, b] = [a, b].map(|pairs| std::mem::transmute::<__m512i, __m512bh>(pairs));
            _mm512_dpbf16_ps(self.0, a, b)
        })
    }
    #[inline(always)]
    unsafe fn put(self, to: *mut f32, add: bool) {
        // SAFETY: the caller has as many sums there.
        unsafe {
            let sum = if add { _mm512_add_ps(_mm512_loadu_ps(to), self.0) } else { self.0 };
            _mm512_storeu_ps(to, sum);
        }
    }
}

/// 512 bits, widened.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
struct Wide(__m512);

#[cfg(target_arch = "x86_64")]
impl Sums for Wide {
    type Pairs = [__m512; 2];
    const LANES: usize = 16;

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the table's functions have the features; so for all that follow.
        Self(unsafe { _mm512_setzero_ps() })
    }
    #[inline(always)]
    unsafe fn load(pairs: *const u32) -> [__m512; 2] {
        // SAFETY: the caller has as many pairs there.
        unsafe {
            let pairs = _mm512_loadu_si512(pairs.cast());
            let high = _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32.cast_signed()));
            [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)), _mm512_castsi512_ps(high)]
        }
    }
    #[inline(always)]
    unsafe fn splat(pair: u32) -> [__m512; 2] {
        // SAFETY: as in `zero`.
        unsafe {
            let (low, high) = (f32::from_bits(pair << 16), f32::from_bits(pair & 0xffff_0000));
            [_mm512_set1_ps(low), _mm512_set1_ps(high)]
        }
    }
    #[inline(always)]
    unsafe fn dot(self, a: [__m512; 2], b: [__m512; 2]) -> Self {
        // SAFETY: as in `zero`.
        Self(unsafe { _mm512_fmadd_ps(a[1], b[1], _mm512_fmadd_ps(a[0], b[0], self.0)) })
    }
    #[inline(always)]
    unsafe fn put(self, to: *mut f32, add: bool) {
        // SAFETY: the caller has as many sums there.
        unsafe { Native(self.0).put(to, add) };
    }
}

/// 256 bits, widened.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
struct Narrow(__m256);

#[cfg(target_arch = "x86_64")]
impl Sums for Narrow {
    type Pairs = [__m256; 2];
    const LANES: usize = 8;

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the table's functions have the features; so for all that follow.
        Self(unsafe { _mm256_setzero_ps() })
    }
    #[inline(always)]
    unsafe fn load(pairs: *const u32) -> [__m256; 2] {
        // SAFETY: the caller has as many pairs there.
        unsafe {
            let pairs = _mm256_loadu_si256(pairs.cast());
            let high = _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff_0000_u32.cast_signed()));
            [_mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs)), _mm256_castsi256_ps(high)]
        }
    }
    #[inline(always)]
    unsafe fn splat(pair: u32) -> [__m256; 2] {
        // SAFETY: as in `zero`.
        unsafe {
            let (low, high) = (f32::from_bits(pair << 16), f32::from_bits(pair & 0xffff_0000));
            [_mm256_set1_ps(low), _mm256_set1_ps(high)]
        }
    }
    #[inline(always)]
    unsafe fn dot(self, a: [__m256; 2], b: [__m256; 2]) -> Self {
        // SAFETY: as in `zero`.
        Self(unsafe { _mm256_fmadd_ps(a[1], b[1], _mm256_fmadd_ps(a[0], b[0], self.0)) })
    }
    #[inline(always)]
    unsafe fn put(self, to: *mut f32, add: bool) {
        // SAFETY: the caller has as many sums there.
        unsafe {
            let sum = if add { _mm256_add_ps(_mm256_loadu_ps(to), self.0) } else { self.0 };
            _mm256_storeu_ps(to, sum);
        }
    }
}

/// What every machine has.
#[derive(Clone, Copy)]
struct Plain([f32; 4]);

impl Sums for Plain {
    type Pairs = [[f32; 4]; 2];
    const LANES: usize = 4;

    #[inline(always)]
    unsafe fn zero() -> Self {
        Self([0.0; 4])
    }
    #[inline(always)]
    unsafe fn load(pairs: *const u32) -> [[f32; 4]; 2] {
        // SAFETY: the caller has as many pairs there.
        let pairs = unsafe { pairs.cast::<[u32; 4]>().read_unaligned() };
        [pairs.map(|pair| f32::from_bits(pair << 16)), pairs.map(|pair| f32::from_bits(pair & 0xffff_0000))]
    }
    #[inline(always)]
    unsafe fn splat(pair: u32) -> [[f32; 4]; 2] {
        [[f32::from_bits(pair << 16); 4], [f32::from_bits(pair & 0xffff_0000); 4]]
    }
    #[inline(always)]
    unsafe fn dot(self, a: [[f32; 4]; 2], b: [[f32; 4]; 2]) -> Self {
        let mut sum = self.0;
        for (a, b) in a.iter().zip(&b) {
            for (sum, (a, b)) in sum.iter_mut().zip(a.iter().zip(b)) {
                *sum += a * b;
            }
        }
        Self(sum)
    }
    #[inline(always)]
    unsafe fn put(self, to: *mut f32, add: bool) {
        // SAFETY: the caller has as many sums there.
        let to = unsafe { &mut *to.cast::<[f32; 4]>() };
        for (to, sum) in to.iter_mut().zip(self.0) {
            *to = if add { *to + sum } else { sum };
        }
    }
}
