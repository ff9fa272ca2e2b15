//! The innermost loops of matrix products, by element and family.
//!
//! Those of f32 and f64 are the `gemm` project's register tiles. Only its micro-kernels are
//! used, not its driver: the driver blocks the summed dimension by the cache sizes that a
//! machine reports and takes other paths for narrow matrices, so that an element's bits would
//! depend on both. Those of bf16 are ours (`pairs`). Either adds products to one running value
//! per element of the result, k ascending; which tile an element falls into does not matter to
//! it.

// Register tiles work on raw pointers.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
use super::amx;
use super::{pack, pairs};
use crate::family::Kind;
use crate::{Bf16, Element, Family};
use gemm_common::microkernel::MicroKernelFn;

/// One tile of a product: `rows` × `cols` sums over `depth` products.
pub struct Call<E: Element> {
    /// At most the tile's height.
    pub(super) rows: usize,
    /// At most the tile's width.
    pub(super) cols: usize,
    /// At most [`Tiles::depth`].
    pub(super) depth: usize,
    /// The left factor: [`Tiles::step`] values of k side by side.
    pub(super) a: *const E,
    /// Elements from one row to the next.
    pub(super) a_row: usize,
    /// Elements from one step of k to the next.
    pub(super) a_step: usize,
    /// The packed right factor: for each group of k, whole vectors of columns.
    pub(super) b: *const E,
    /// Elements from one group to the next.
    pub(super) b_step: usize,
    /// The sums, row-major.
    pub(super) c: *mut E::Sum,
    /// Elements from one row to the next.
    pub(super) c_stride: usize,
    /// Whether to add to what is there.
    pub(super) add: bool,
}

/// Computes a tile.
///
/// # Safety
/// The machine has the family's instructions, all that [`Call`] says is there, and nobody else
/// touches the sums. The last step's values beyond `depth` may be anything that, times what the other
/// factor has there, is zero.
pub(super) type Multiply<E> = unsafe fn(&Call<E>);

/// The loops themselves.
#[derive(Clone, Copy, Debug)]
enum Table<E: Element> {
    /// For each number of vectors, for each number of rows: of `gemm`.
    Gemm(&'static [MicroKernelFn<E>]),
    /// Likewise, of ours; so many rows.
    Ours(&'static [Multiply<E>], usize),
    /// One for all sizes.
    #[cfg(target_arch = "x86_64")]
    One(Multiply<E>),
}

/// The register tiles of one family and element. A tile computes `width` columns (the vector
/// side) of `height` rows of a row-major result.
#[derive(Clone, Copy, Debug)]
pub struct Tiles<E: Element> {
    /// Sums in a vector.
    pub(super) lanes: usize,
    /// Columns of the largest tile, a multiple of `lanes`.
    pub(super) width: usize,
    /// Rows of the largest tile.
    pub(super) height: usize,
    /// Values of k that lie side by side in the right factor.
    pub(super) group: usize,
    /// Values of k that lie side by side in the left factor, of which as many are summed at a time: a
    /// multiple of `group`.
    pub(super) step: usize,
    /// Length of a block of the summed dimension. Changing it changes bits.
    pub(super) depth: usize,
    table: Table<E>,
}

impl<E: Element> Tiles<E> {
    /// Columns of the largest tile.
    pub(crate) fn width(&self) -> usize {
        self.width
    }

    /// Rows of the largest tile.
    pub(crate) fn height(&self) -> usize {
        self.height
    }

    /// To be called after some tiles: gives back what they hold of the processor.
    pub(super) fn release(&self) {
        #[cfg(target_arch = "x86_64")]
        if matches!(self.table, Table::One(_)) {
            amx::release();
        }
    }

    /// # Safety
    /// As for [`Multiply`].
    pub(super) unsafe fn multiply(&self, call: &Call<E>) {
        let vectors = (call.cols - 1) >> self.lanes.trailing_zeros();
        match self.table {
            // SAFETY: the caller's promise.
            #[cfg(target_arch = "x86_64")]
            Table::One(multiply) => unsafe { multiply(call) },
            Table::Ours(table, rows) => {
                // SAFETY: the caller's promise.
                unsafe { table[vectors * rows + call.rows - 1](call) }
            }
            Table::Gemm(table) => {
                let kernel = table[vectors * self.height + call.rows - 1];
                // SAFETY: the caller's promise. The kernel reads `depth` groups of one of whole
                // vectors of columns, `rows` × `depth` elements of A, and updates `rows` × `cols`
                // sums; sums are of the elements' own type, since only f32 and f64 come here.
                unsafe {
                    kernel(
                        call.cols,
                        call.rows,
                        call.depth,
                        call.c.cast(),
                        call.b,
                        call.a,
                        call.c_stride as isize,
                        1,
                        call.b_step as isize,
                        call.a_step as isize,
                        call.a_row as isize,
                        one::<E>(),
                        one::<E>(),
                        u8::from(call.add),
                        false,
                        false,
                        false,
                        std::ptr::null(),
                    );
                }
            }
        }
    }
}

fn one<E: Element>() -> E {
    use crate::Real;
    E::narrow(E::Sum::ONE)
}

/// Of f32: a tile's packed columns (64 · 256 · 4 bytes = 64 KiB) share the second-level cache
/// with the rows that they meet.
const DEPTH: usize = 256;

/// Of bf16: so long that most sums are one block and go to memory once. What a tile reads (64 ·
/// 4096 · 2 bytes = 512 KiB of columns) comes from the second-level cache at 11 bytes a cycle.
const DEPTH_BF16: usize = 4096;

macro_rules! gemm {
    ($krate:ident, $t:ident, $module:ident, $lanes:expr) => {{
        use $krate::microkernel::$module::$t as k;
        static TABLE: [[MicroKernelFn<$t>; k::NR]; k::MR_DIV_N] = k::UKR;
        Tiles {
            lanes: $lanes,
            width: $lanes * k::MR_DIV_N,
            height: k::NR,
            group: 1,
            step: 1,
            depth: DEPTH,
            table: Table::Gemm(TABLE.as_flattened()),
        }
    }};
}

macro_rules! ours {
    ($module:ident, $vectors:expr, $height:expr) => {
        Tiles {
            lanes: pairs::$module::LANES,
            width: $vectors * pairs::$module::LANES,
            height: $height,
            group: 2,
            step: 2,
            depth: DEPTH_BF16,
            table: Table::Ours(pairs::$module::TABLE.as_flattened(), pairs::HEIGHT),
        }
    };
}

#[cfg(target_arch = "x86_64")]
/// Of AMX: blocks of two by two of its tiles.
macro_rules! amx {
    ($multiply:path) => {
        Tiles {
            lanes: amx::SIDE,
            width: 2 * amx::SIDE,
            height: 2 * amx::SIDE,
            group: 2,
            step: pack::STEP,
            depth: DEPTH_BF16,
            table: Table::One($multiply),
        }
    };
}

impl Tiles<f32> {
    pub(crate) fn f32(family: Family) -> Self {
        match family.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Amx | Kind::AmxOnVectors | Kind::Avx512Bf16 | Kind::Avx512 => {
                gemm!(gemm_f32, f32, avx512f, 16)
            }
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => gemm!(gemm_f32, f32, fma, 8),
            Kind::Portable => gemm!(gemm_f32, f32, scalar, 1),
        }
    }
}

impl Tiles<f64> {
    pub(crate) fn f64(family: Family) -> Self {
        match family.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Amx | Kind::AmxOnVectors | Kind::Avx512Bf16 | Kind::Avx512 => {
                gemm!(gemm_f64, f64, avx512f, 8)
            }
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => gemm!(gemm_f64, f64, fma, 4),
            Kind::Portable => gemm!(gemm_f64, f64, scalar, 1),
        }
    }
}

impl Tiles<Bf16> {
    /// With 16 registers: two vectors of columns and four rows, both widened.
    pub(crate) fn bf16(family: Family) -> Self {
        match family.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Amx => amx!(amx::tiles),
            #[cfg(target_arch = "x86_64")]
            Kind::AmxOnVectors => amx!(amx::vectors),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512Bf16 => ours!(native, 4, 6),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => ours!(avx512, 2, 6),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => ours!(avx2, 2, 4),
            Kind::Portable => ours!(portable, 2, 4),
        }
    }
}
