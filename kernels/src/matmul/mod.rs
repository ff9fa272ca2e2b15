//! Matrix products: C = A·B or C += A·B, C row-major, A and B with any strides.
//!
//! An element of C is the sum of blocks of [`depth`] products; within a block products are
//! added k ascending to a running value that starts at 0, then the block is added to C. That
//! order is all that decides bits. Rows and columns of C are cut for caches and threads in
//! ways that it does not depend on: one row alone comes out as it does among thousands.
//!
//! B is packed first (`pack`), into panels as wide as a register tile; a packed matrix may be
//! used by many products. A is read where it lies where its rows are contiguous, and packed per
//! task where its columns are. C has the type in which products are added up, or the factors'
//! own, to which finished sums are rounded.

// Register tiles write through raw pointers, and tasks write disjoint tiles of one matrix.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
mod amx;
mod pack;
mod pairs;
mod tiles;
mod transpose;

#[cfg(target_arch = "x86_64")]
pub(crate) use amx::has as has_amx;
pub use pack::{Factor, Packed, pack, pack_all, packed_len};
pub(crate) use pack::{pack_serial, packed_in};
pub use tiles::Tiles;

use crate::target::{Block, Target};
use crate::{Cpu, Element, Family, scratch};
use std::mem::MaybeUninit;
use std::ops::Range;
use tiles::Call;

/// Length of a block of the summed dimension.
#[must_use]
pub fn depth<E: Element>(family: Family) -> usize {
    E::tiles(family).depth
}

/// Rows of C that a task computes at most: a multiple of every family's tile height (32, 6 and 4),
/// small enough that their part of A (192 · 256 f32 = 192 KiB) stays in the second-level cache while
/// panels of B pass by.
const TASK_ROWS: usize = 192;

/// Columns of C that a task computes: a multiple of every family's tile width (64, 32, 16, 8
/// and 2), large enough that packing A once for them costs little.
const TASK_COLS: usize = 1024;

/// Columns of C that a task computes where there are so few rows that B is only read once: fewer,
/// so that all threads read. A multiple of every tile width, too.
const FEW_ROWS: usize = 16;
const FEW_COLS: usize = 128;

/// A matrix in memory.
#[derive(Clone, Copy, Debug)]
pub struct View<'a, R> {
    data: &'a [R],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a, R> View<'a, R> {
    /// A row-major matrix whose rows start `stride` elements apart.
    ///
    /// # Panics
    /// Where `data` is too short for that.
    #[must_use]
    pub fn new(data: &'a [R], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(covers(data.len(), rows, cols, stride), "{rows}x{cols} by {stride} in {}", data.len());
        Self { data, rows, cols, row_stride: stride, col_stride: 1 }
    }

    /// A row-major matrix without gaps; as many rows as there are.
    ///
    /// # Panics
    /// Where `data` is no whole number of rows.
    #[must_use]
    pub fn rows_of(data: &'a [R], cols: usize) -> Self {
        assert!(data.len().is_multiple_of(cols), "{} is no multiple of {cols}", data.len());
        Self::new(data, data.len() / cols, cols, cols)
    }

    /// Number of rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The transpose.
    #[must_use]
    pub fn t(self) -> Self {
        let Self { data, rows, cols, row_stride, col_stride } = self;
        Self { data, rows: cols, cols: rows, row_stride: col_stride, col_stride: row_stride }
    }
}

/// A row-major matrix to write to.
#[derive(Debug)]
pub struct ViewMut<'a, R> {
    data: &'a mut [R],
    rows: usize,
    cols: usize,
    stride: usize,
}

impl<'a, R> ViewMut<'a, R> {
    /// A matrix whose rows start `stride` elements apart.
    ///
    /// # Panics
    /// Where `data` is too short for that, or rows overlap.
    #[must_use]
    pub fn new(data: &'a mut [R], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(cols <= stride, "rows of {cols} overlap at a stride of {stride}");
        assert!(covers(data.len(), rows, cols, stride), "{rows}x{cols} by {stride} in {}", data.len());
        Self { data, rows, cols, stride }
    }

    /// A matrix without gaps; as many rows as there are.
    ///
    /// # Panics
    /// Where `data` is no whole number of rows.
    #[must_use]
    pub fn rows_of(data: &'a mut [R], cols: usize) -> Self {
        assert!(data.len().is_multiple_of(cols), "{} is no multiple of {cols}", data.len());
        let rows = data.len() / cols;
        Self::new(data, rows, cols, cols)
    }
}

fn covers(len: usize, rows: usize, cols: usize, stride: usize) -> bool {
    rows == 0 || cols == 0 || (rows - 1) * stride + cols <= len
}

/// What to do with the product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Into {
    /// C = A·B.
    Set,
    /// C += A·B.
    Add,
}

/// C = A·B or C += A·B with B packed before. The summed dimension is A's width, which may be
/// less than B's depth, and C's width may be less than B's: then the rest of B is not used.
///
/// # Panics
/// Where shapes do not fit.
pub fn product<E, O>(cpu: &Cpu, a: View<'_, E>, b: &Packed<'_, E>, c: ViewMut<'_, O>, into: Into)
where
    E: Element,
    O: Element<Sum = E::Sum>,
{
    check(&a, b, &c);
    let task_cols = if c.rows <= FEW_ROWS { FEW_COLS } else { TASK_COLS };
    let col_tasks = c.cols.div_ceil(task_cols);
    let task_rows = task_rows(c.rows, E::tiles(cpu.family()).height, col_tasks, cpu.threads());
    let row_tasks = c.rows.div_ceil(task_rows);
    let target = Target::new(c.data);
    cpu.for_each(row_tasks * col_tasks, |task| {
        // Neighbours in time share columns, so B's panels come from a shared cache.
        let (row, col) = (task % row_tasks * task_rows, task / row_tasks * task_cols);
        let rows = row..(row + task_rows).min(c.rows);
        let cols = col..(col + task_cols).min(c.cols);
        let part = Part { family: cpu.family(), a, b, c: target, stride: c.stride, rows, cols, into };
        // SAFETY: tasks have disjoint rows × columns within the shape of C, which `check`
        // compared with A and B and ViewMut with its memory; the exclusive borrow of C
        // outlives the tasks.
        unsafe { part.compute() };
    });
}

/// Rows that a task computes: of the multiples in the larger half up to [`TASK_ROWS`] the one with
/// which threads that take one task after the other are done first.
pub(crate) fn task_rows(rows: usize, multiple: usize, col_tasks: usize, threads: usize) -> usize {
    let shared = if rows > FEW_ROWS { rows.div_ceil(threads) } else { rows };
    let least = shared.min(TASK_ROWS / 2).next_multiple_of(multiple).max(multiple);
    let done = |size: usize| {
        let (whole, rest) = (rows / size * col_tasks, rows % size);
        let last = if whole.is_multiple_of(threads) { rest * col_tasks.div_ceil(threads) } else { size };
        whole / threads * size + last
    };
    (least..TASK_ROWS + 1).step_by(multiple).rev().min_by_key(|size| done(*size)).unwrap_or(TASK_ROWS)
}

/// As [`product`], on this thread alone: for tasks that are made of several operations.
///
/// # Panics
/// Where shapes do not fit.
pub fn product_rows<E, O>(family: Family, a: View<'_, E>, b: &Packed<'_, E>, c: ViewMut<'_, O>, into: Into)
where
    E: Element,
    O: Element<Sum = E::Sum>,
{
    check(&a, b, &c);
    let (rows, cols, stride) = (0..c.rows, 0..c.cols, c.stride);
    let part = Part { family, a, b, c: Target::new(c.data), stride, rows, cols, into };
    // SAFETY: as in `product`, with one task.
    unsafe { part.compute() };
}

/// Packs B and multiplies: for right factors that are used once.
///
/// # Panics
/// Where shapes do not fit.
pub fn matmul<E, O>(cpu: &Cpu, a: View<'_, E>, b: View<'_, E>, c: ViewMut<'_, O>, into: Into)
where
    E: Element,
    O: Element<Sum = E::Sum>,
{
    scratch::with(packed_len::<E>(b.rows, b.cols, cpu.family()), |memory| {
        let b = pack(cpu, b, memory);
        product(cpu, a, &b, c, into);
    });
}

fn check<E, O>(a: &View<'_, E>, b: &Packed<'_, E>, c: &ViewMut<'_, O>) {
    assert!(
        a.rows == c.rows && a.cols <= b.depth && c.cols <= b.cols,
        "{}x{} times {}x{} into {}x{}",
        a.rows,
        a.cols,
        b.depth,
        b.cols,
        c.rows,
        c.cols
    );
    assert!(a.row_stride == 1 || a.col_stride == 1, "one stride of the left factor must be 1");
}

/// The part of a product that one task computes.
struct Part<'a, E, O> {
    family: Family,
    a: View<'a, E>,
    b: &'a Packed<'a, E>,
    c: Target<O>,
    stride: usize,
    rows: Range<usize>,
    /// Starts at a tile's border.
    cols: Range<usize>,
    into: Into,
}

impl<E: Element, O: Element<Sum = E::Sum>> Part<'_, E, O> {
    /// # Safety
    /// `check` holds for the whole matrices, `rows` and `cols` lie within C, `cols` starts at a
    /// tile's border, and nobody else touches that part of C.
    unsafe fn compute(&self) {
        let (Self { a, rows, .. }, tiles) = (self, E::tiles(self.family));
        if a.cols == 0 {
            // SAFETY: the caller's promise.
            return unsafe { self.nothing() };
        }
        // Where a row's last step is cut short, what follows it is not zero.
        let packs = a.col_stride != 1 || !a.cols.is_multiple_of(tiles.step);
        let depth = if O::IS_SUM { tiles.depth.min(a.cols) } else { a.cols };
        let len = if packs { rows.len() * depth.next_multiple_of(tiles.step) } else { 0 };
        scratch::with(len, |left| {
            for k in (0..a.cols).step_by(depth) {
                let ks = k..(k + depth).min(a.cols);
                if packs {
                    pack::pack_left(self.family, *a, rows.clone(), ks.clone(), left);
                }
                let left = packs.then_some(&*left);
                for j in self.cols.start / tiles.width..self.cols.end.div_ceil(tiles.width) {
                    for row in rows.clone().step_by(tiles.height) {
                        // SAFETY: the caller's promise.
                        unsafe { self.tile(&tiles, left, row, j, ks.clone()) };
                    }
                }
            }
        });
        tiles.release();
    }

    /// The sum of nothing.
    ///
    /// # Safety
    /// As for `compute`.
    unsafe fn nothing(&self) {
        if self.into == Into::Add {
            return;
        }
        for row in self.rows.clone() {
            for col in self.cols.clone() {
                // SAFETY: within the part of C that is ours.
                unsafe { *self.c.at(row * self.stride + col) = O::default() };
            }
        }
    }

    /// The tile from `row` on in panel `j`, summed over `ks`, a whole block or the whole sum.
    /// `left` is the packed left factor of those.
    ///
    /// # Safety
    /// As for `compute`.
    unsafe fn tile(&self, tiles: &Tiles<E>, left: Option<&[E]>, row: usize, j: usize, ks: Range<usize>) {
        let rows = tiles.height.min(self.rows.end - row);
        let cols = tiles.width.min(self.cols.end - j * tiles.width);
        let at = self.c.at(row * self.stride + j * tiles.width);
        if O::IS_SUM {
            let add = ks.start > 0 || self.into == Into::Add;
            // SAFETY: the caller's promise; C's elements are sums.
            return unsafe {
                self.blocks(tiles, left, (row, rows), (j, cols), ks, at.cast(), self.stride, add)
            };
        }
        let mut sums = Sums::<E::Sum>::new();
        let sums = sums.start();
        // SAFETY: the caller's promise; `sums` has room for the largest tile.
        unsafe { self.blocks(tiles, left, (row, rows), (j, cols), ks, sums, cols, false) };
        // SAFETY: so many sums were set just now.
        let sums = unsafe { std::slice::from_raw_parts(sums, rows * cols) };
        // SAFETY: within the part of C that is ours.
        let to = unsafe { self.c.block(row * self.stride + j * tiles.width, (rows, cols), self.stride) };
        finish(self.family, sums, to, self.into == Into::Add);
    }

    /// Adds up a tile over the blocks of `ks`.
    ///
    /// # Safety
    /// As for `compute`, for the sums at `c`.
    #[allow(clippy::too_many_arguments, reason = "a tile is what lies where three matrices meet")]
    unsafe fn blocks(
        &self,
        tiles: &Tiles<E>,
        left: Option<&[E]>,
        (row, rows): (usize, usize),
        (j, cols): (usize, usize),
        ks: Range<usize>,
        c: *mut E::Sum,
        c_stride: usize,
        mut add: bool,
    ) {
        for k in ks.clone().step_by(tiles.depth) {
            let depth = tiles.depth.min(ks.end - k);
            let p = pack::panel(self.b, tiles, k, j);
            let (a, a_row, a_step) = match left {
                Some(left) => pack::left_at(
                    tiles,
                    left,
                    (row - self.rows.start, self.rows.len()),
                    k - ks.start,
                    ks.len(),
                ),
                None => (&self.a.data[row * self.a.row_stride + k..], self.a.row_stride, tiles.step),
            };
            let b = &self.b.data[p.start..p.start + p.len()];
            let (a, b, b_step) = (a.as_ptr(), b.as_ptr(), p.width * tiles.group);
            let call = Call { rows, cols, depth, a, a_row, a_step, b, b_step, c, c_stride, add };
            // SAFETY: the family's instructions exist (Family is proof). Of B the tile reads whole
            // vectors of columns, of which the panel's width is a multiple, in `depth` ≤ p.k.len()
            // rows; of A `rows` × `depth` elements by its strides, which View checked or
            // `pack_left` wrote; and it updates `rows` × `cols` sums, which are ours.
            unsafe { tiles.multiply(&call) };
            add = true;
        }
    }
}

/// Elements of the largest tile: 32 · 32 in AMX.
const TILE: usize = 1024;

/// Room for a tile's sums, which start where a cache line does.
#[repr(align(64))]
struct Sums<R>(MaybeUninit<[R; TILE]>);

impl<R> Sums<R> {
    fn new() -> Self {
        Self(MaybeUninit::uninit())
    }

    /// The first one.
    fn start(&mut self) -> *mut R {
        self.0.as_mut_ptr().cast()
    }
}

kernel! {
    /// Rounds finished sums.
    fn finish<O: Element>(sums: &[O::Sum], to: Block<O>, add: bool) {
        for (i, to) in to.rows().enumerate() {
            let sums = &sums[i * to.len()..][..to.len()];
            if add {
                for (to, sum) in to.iter_mut().zip(sums) {
                    *to = O::narrow(to.widen() + *sum);
                }
            } else {
                for (to, sum) in to.iter_mut().zip(sums) {
                    *to = O::narrow(*sum);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Bf16;
    use proptest::prelude::*;

    /// From -1 to 1; products of the smaller ones lie below the normal numbers.
    fn numbers<E: Element<Sum = f32>>(n: usize, seed: u32) -> Vec<E> {
        let at = |i: u32| i.wrapping_mul(2_654_435_761).wrapping_add(seed).wrapping_mul(747_796_405) >> 12;
        let scale = |at: u32| if at.is_multiple_of(16) { 2.0f32.powi(-65) } else { 1.0 };
        let number = |at: u32| scale(at) * (at as f32 / (1 << 19) as f32 - 1.0);
        (0..n as u32).map(|i| E::narrow(number(at(i)))).collect()
    }

    type Sizes = (usize, usize, usize);

    /// The order that the module promises, spelled out.
    fn reference<E: Element<Sum = f32>>(family: Family, a: &[E], b: &[E], (m, n, k): Sizes, c: &mut [f32]) {
        let add = match family.name() {
            "amx-bf16" if !E::IS_SUM => add_as_amx,
            "portable" => add_unfused,
            _ => add_fused,
        };
        for i in 0..m {
            for j in 0..n {
                for block in (0..k).step_by(depth::<E>(family)) {
                    let ks = block..(block + depth::<E>(family)).min(k);
                    let pairs: Vec<_> = ks.map(|l| (a[i * k + l].widen(), b[l * n + j].widen())).collect();
                    c[i * n + j] += add(&pairs);
                }
            }
        }
    }

    fn add_fused(pairs: &[(f32, f32)]) -> f32 {
        pairs.iter().fold(0.0, |sum, (x, y)| x.mul_add(*y, sum))
    }

    fn add_unfused(pairs: &[(f32, f32)]) -> f32 {
        pairs.iter().fold(0.0, |sum, (x, y)| x * y + sum)
    }

    /// The manual's description of TDPBF16PS.
    fn add_as_amx(pairs: &[(f32, f32)]) -> f32 {
        let flushed = |x: f32| if x.is_subnormal() { 0.0 } else { x };
        let half = |pairs: &[(f32, f32)], odd: usize| {
            let pairs = pairs.iter().skip(odd).step_by(2);
            pairs.fold(0.0, |sum, (x, y)| flushed(flushed(*x).mul_add(flushed(*y), sum)))
        };
        let tile = |pairs: &[(f32, f32)]| flushed(half(pairs, 0) + half(pairs, 1));
        pairs.chunks(32).fold(0.0, |sum, pairs| flushed(sum + tile(pairs)))
    }

    fn transpose<E: Element>(a: &[E], rows: usize, cols: usize) -> Vec<E> {
        (0..rows * cols).map(|i| a[i % rows * cols + i / rows]).collect()
    }

    /// Whether sums are what the instruction for pairs makes of them, which rounds in its own way.
    fn is_native(family: Family) -> bool {
        family.name() == "avx512-bf16"
    }

    fn any_layout<E: Element<Sum = f32>>(
        (m, n, k): Sizes,
        seed: u32,
        threads: usize,
        layout: usize,
    ) -> Result<(), TestCaseError> {
        let (a, b) = (numbers::<E>(m * k, seed), numbers::<E>(k * n, !seed));
        let start = numbers::<f32>(m * n, seed ^ 7);
        let (at, bt) = (transpose(&a, m, k), transpose(&b, k, n));
        let left = if layout & 1 == 0 { View::rows_of(&a, k) } else { View::rows_of(&at, m).t() };
        let right = if layout & 2 == 0 { View::rows_of(&b, n) } else { View::rows_of(&bt, k).t() };
        for family in Family::available() {
            let cpu = Cpu::new(threads, family).unwrap();
            for into in [Into::Add, Into::Set] {
                let mut c = start.clone();
                matmul(&cpu, left, right, ViewMut::rows_of(&mut c, n), into);
                let mut expected = if into == Into::Add { start.clone() } else { vec![0.0; m * n] };
                reference(family, &a, &b, (m, n, k), &mut expected);
                if !E::IS_SUM && is_native(family) {
                    let worst = c.iter().zip(&expected).map(|(c, e)| (c - e).abs()).fold(0.0, f32::max);
                    prop_assert!(worst <= 1e-5 * (k as f32).sqrt(), "{} {}", family, worst);
                } else {
                    prop_assert_eq!(&c, &expected, "{}", family);
                }
                // Rounded sums are the sums, rounded.
                let mut rounded: Vec<E> = start.iter().map(|x| E::narrow(*x)).collect();
                let before = rounded.clone();
                let mut sums = vec![0.0; m * n];
                matmul(&cpu, left, right, ViewMut::rows_of(&mut rounded, n), into);
                matmul(&cpu, left, right, ViewMut::rows_of(&mut sums, n), Into::Set);
                if !E::IS_SUM && k <= depth::<E>(family) {
                    let before = |i: usize| if into == Into::Add { before[i].widen() } else { 0.0 };
                    let round = |(i, sum): (usize, &f32)| E::narrow(before(i) + *sum);
                    let expected: Vec<E> = sums.iter().enumerate().map(round).collect();
                    prop_assert_eq!(&rounded, &expected, "{}", family);
                }
            }
        }
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn products_have_the_promised_bits_in_any_layout_on_any_number_of_threads(
            m in 1usize..70, n in 1usize..150, k in 1usize..600, seed: u32, threads in 1usize..4, layout in 0usize..4,
        ) {
            any_layout::<f32>((m, n, k), seed, threads, layout)?;
            any_layout::<Bf16>((m, n, k), seed, threads, layout)?;
        }
    }

    fn many_tasks<E: Element<Sum = f32>>(depth_cut: usize) {
        // More rows and columns than one task has, and a block of the summed dimension cut short.
        for family in Family::available() {
            let (m, n, k) = (TASK_ROWS + 7, TASK_COLS + 70, depth::<E>(family) + 44);
            let (a, b) = (numbers::<E>(m * k, 1), numbers::<E>(k * n, 2));
            let cpu = Cpu::new(2, family).unwrap();
            let mut memory = vec![E::default(); packed_len::<E>(k, n, family)];
            let packed = pack(&cpu, View::rows_of(&b, n), &mut memory);
            let mut whole = vec![f32::NAN; m * n];
            let mut rounded = vec![E::default(); m * n];
            product(&cpu, View::rows_of(&a, k), &packed, ViewMut::rows_of(&mut whole, n), Into::Set);
            product(&cpu, View::rows_of(&a, k), &packed, ViewMut::rows_of(&mut rounded, n), Into::Set);
            assert!(whole.iter().zip(&rounded).all(|(w, r)| E::narrow(*w) == *r), "{family}");
            for row in [0, 5, TASK_ROWS, m - 1] {
                let mut alone = vec![f32::NAN; n - 33];
                let a = View::rows_of(&a[row * k..(row + 1) * k], k);
                product(&cpu, a, &packed, ViewMut::rows_of(&mut alone, n - 33), Into::Set);
                assert_eq!(alone, whole[row * n..][..n - 33], "{family}: row {row}");
            }
            let short = k - depth_cut;
            let zero = |(i, a): (usize, &E)| if i % k < short { *a } else { E::default() };
            let zeroed: Vec<E> = a.iter().enumerate().map(zero).collect();
            let (mut cut, mut full) = (vec![0.0f32; m * n], vec![0.0f32; m * n]);
            let a = View::new(&a, m, short, k);
            product(&cpu, a, &packed, ViewMut::rows_of(&mut cut, n), Into::Set);
            product(&cpu, View::rows_of(&zeroed, k), &packed, ViewMut::rows_of(&mut full, n), Into::Set);
            assert_eq!(cut, full, "{family}");
        }
    }

    #[test]
    fn many_tasks_and_part_of_a_packed_factor_give_the_same_bits() {
        many_tasks::<f32>(35);
        many_tasks::<Bf16>(35);
    }

    #[test]
    fn tasks_are_as_large_as_leaves_no_thread_waiting() {
        // 22 tasks of 186 rows and one of 4; two of 144; six of 144; where there is one, the largest.
        let of = |rows, threads| task_rows(rows, 6, 1, threads);
        assert_eq!([of(4096, 2), of(288, 2), of(864, 2), of(4096, 1)], [186, 144, 144, 192]);
        assert_eq!(
            [task_rows(4096, 32, 1, 2), task_rows(1, 32, 1, 2), task_rows(100, 32, 1, 2)],
            [128, 192, 64]
        );
        assert!((1..2000).all(|rows| (1..9).all(|threads| (6..=TASK_ROWS).contains(&of(rows, threads)))));
    }

    #[test]
    fn an_empty_sum_is_zero() {
        let cpu = Cpu::new(1, Family::best()).unwrap();
        let mut c = vec![1.0f32; 6];
        let (a, b) = (View::<f32>::new(&[], 2, 0, 0), View::new(&[], 0, 3, 3));
        matmul(&cpu, a, b, ViewMut::rows_of(&mut c, 3), Into::Add);
        assert_eq!(c, [1.0; 6]);
        matmul(&cpu, a, b, ViewMut::rows_of(&mut c, 3), Into::Set);
        assert_eq!(c, [0.0; 6]);
    }
}
