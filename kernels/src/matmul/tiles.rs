//! The innermost loops of matrix products: the `gemm` project's register tiles, by family.
//!
//! Only its micro-kernels are used, not its driver: the driver blocks the summed dimension by
//! the cache sizes that a machine reports and takes other paths for narrow matrices, so that
//! an element's bits would depend on both. A micro-kernel adds products to one running value
//! per element of the result, k ascending, fused where the family fuses; which tile an
//! element falls into does not matter to it.

use crate::Family;
use crate::family::Kind;
use gemm_common::microkernel::MicroKernelFn;

/// The register tiles of one family and type. A tile computes `width` columns (the vector
/// side) of `height` rows of a row-major result.
#[derive(Clone, Copy, Debug)]
pub struct Tiles<R: 'static> {
    /// Elements of a vector.
    pub(crate) lanes: usize,
    /// Columns of the largest tile, a multiple of `lanes`.
    pub(crate) width: usize,
    /// Rows of the largest tile.
    pub(crate) height: usize,
    /// For each number of vectors, for each number of rows: the micro-kernel.
    table: &'static [MicroKernelFn<R>],
}

impl<R> Tiles<R> {
    /// The tile for `cols` columns (at most `width`, rounded up to vectors) and exactly
    /// `rows` rows (at most `height`).
    pub(crate) fn kernel(&self, cols: usize, rows: usize) -> MicroKernelFn<R> {
        self.table[(cols.div_ceil(self.lanes) - 1) * self.height + rows - 1]
    }
}

macro_rules! tiles {
    ($krate:ident, $t:ident, $module:ident, $lanes:expr) => {{
        use $krate::microkernel::$module::$t as k;
        static TABLE: [[MicroKernelFn<$t>; k::NR]; k::MR_DIV_N] = k::UKR;
        Tiles { lanes: $lanes, width: $lanes * k::MR_DIV_N, height: k::NR, table: TABLE.as_flattened() }
    }};
}

impl Tiles<f32> {
    pub(crate) fn f32(family: Family) -> Self {
        match family.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => tiles!(gemm_f32, f32, avx512f, 16),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => tiles!(gemm_f32, f32, fma, 8),
            Kind::Portable => tiles!(gemm_f32, f32, scalar, 1),
        }
    }
}

impl Tiles<f64> {
    pub(crate) fn f64(family: Family) -> Self {
        match family.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => tiles!(gemm_f64, f64, avx512f, 8),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => tiles!(gemm_f64, f64, fma, 4),
            Kind::Portable => tiles!(gemm_f64, f64, scalar, 1),
        }
    }
}
