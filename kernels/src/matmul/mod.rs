//! Matrix products: C = A·B or C += A·B, C row-major, A and B with any strides.
//!
//! An element of C is the sum of blocks of [`DEPTH`] products; within a block products are
//! added k ascending to a running value that starts at 0, then the block is added to C. That
//! order is all that decides bits. Rows and columns of C are cut for caches and threads in
//! ways that it does not depend on: one row alone comes out as it does among thousands.
//!
//! B is packed first, into panels as wide as a register tile; a packed matrix may be used by
//! many products. A is read where it lies where its rows are contiguous, and packed per task
//! where its columns are.

// Register tiles write through raw pointers, and tasks write disjoint tiles of one matrix.
#![allow(unsafe_code)]

use crate::target::Target;
use crate::{Cpu, Family, Real, scratch};
use std::ops::Range;

/// Length of a block of the summed dimension. A tile's packed columns (64 · 256 · 4 bytes =
/// 64 KiB) share the second-level cache with the rows that they meet. Changing it changes
/// bits.
pub const DEPTH: usize = 256;

/// Rows of C that a task computes: a multiple of every family's tile height (6 and 4), small
/// enough that their part of A (192 · 256 · 4 bytes = 192 KiB) stays in the second-level
/// cache while panels of B pass by.
const TASK_ROWS: usize = 192;

/// Columns of C that a task computes: a multiple of every family's tile width (64, 32, 16, 8
/// and 2), large enough that packing A once for them costs little.
const TASK_COLS: usize = 1024;

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

/// The right factor of a product, packed for one family.
#[derive(Debug)]
pub struct Packed<'a, R> {
    data: &'a [R],
    depth: usize,
    cols: usize,
}

/// Columns of B, rounded up to whole vectors.
fn padded<R: Real>(cols: usize, family: Family) -> usize {
    cols.next_multiple_of(R::tiles(family).lanes)
}

/// Elements that packing a `depth` × `cols` right factor takes.
#[must_use]
pub fn packed_len<R: Real>(depth: usize, cols: usize, family: Family) -> usize {
    depth * padded::<R>(cols, family)
}

/// One panel of one block: where it starts in a packed matrix and what it covers.
struct Panel {
    /// First element in the packed matrix.
    start: usize,
    /// Summed indices.
    k: Range<usize>,
    /// Columns.
    cols: Range<usize>,
    /// Elements from one k to the next.
    width: usize,
}

/// Panel `j` of the block that starts at `k`; [`packed_len`] bounds its end.
fn panel<R: Real>(depth: usize, cols: usize, k: usize, j: usize, family: Family) -> Panel {
    let tile = R::tiles(family).width;
    let padded = padded::<R>(cols, family);
    let end = (k + DEPTH).min(depth);
    let (first, last) = (j * tile, ((j + 1) * tile).min(cols));
    let start = k * padded + (end - k) * first;
    Panel { start, k: k..end, cols: first..last, width: tile.min(padded - first) }
}

/// Packs a right factor on this thread alone.
fn pack_serial<'a, R: Real>(family: Family, b: View<'_, R>, out: &'a mut [R]) -> Packed<'a, R> {
    let tile = R::tiles(family).width;
    let out = &mut out[..packed_len::<R>(b.rows, b.cols, family)];
    for k in (0..b.rows).step_by(DEPTH) {
        for j in 0..b.cols.div_ceil(tile) {
            let p = panel::<R>(b.rows, b.cols, k, j, family);
            let len = p.k.len() * p.width;
            pack_panel(family, b, &p, &mut out[p.start..p.start + len]);
        }
    }
    Packed { data: out, depth: b.rows, cols: b.cols }
}

/// Packs a right factor into `out`, which has [`packed_len`] elements at least.
///
/// # Panics
/// Where `out` is too short.
pub fn pack<'a, R: Real>(cpu: &Cpu, b: View<'_, R>, out: &'a mut [R]) -> Packed<'a, R> {
    let family = cpu.family();
    let tile = R::tiles(family).width;
    let out = &mut out[..packed_len::<R>(b.rows, b.cols, family)];
    let (blocks, panels) = (b.rows.div_ceil(DEPTH), b.cols.div_ceil(tile));
    let target = Target::new(out);
    cpu.for_each(blocks * panels, |task| {
        let p = panel::<R>(b.rows, b.cols, task / panels * DEPTH, task % panels, family);
        let len = p.k.len() * p.width;
        // SAFETY: panels are disjoint and lie within packed_len (see `panel`), and the
        // exclusive borrow of `out` outlives the tasks.
        let out = unsafe { target.part(p.start, len) };
        pack_panel(family, b, &p, out);
    });
    Packed { data: out, depth: b.rows, cols: b.cols }
}

kernel! {
    /// Packs one panel: for each k its columns side by side, zeros where there are none.
    fn pack_panel<R>(b: View<'_, R>, p: &Panel, out: &mut [R]) {
        let n = p.cols.len();
        if b.col_stride == 1 {
            for (k, out) in p.k.clone().zip(out.chunks_exact_mut(p.width)) {
                let from = k * b.row_stride + p.cols.start;
                out[..n].copy_from_slice(&b.data[from..from + n]);
                out[n..].fill(R::ZERO);
            }
            return;
        }
        // Columns are contiguous along k: squares of them are turned in the first-level cache.
        const SQUARE: usize = 16;
        for k in p.k.clone().step_by(SQUARE) {
            let depth = SQUARE.min(p.k.end - k);
            let out = &mut out[(k - p.k.start) * p.width..][..depth * p.width];
            for c in (0..p.width).step_by(SQUARE) {
                let mut square = [[R::ZERO; SQUARE]; SQUARE];
                for (i, column) in square.iter_mut().enumerate().take(n.saturating_sub(c)) {
                    let from = (p.cols.start + c + i) * b.col_stride + k * b.row_stride;
                    column[..depth].copy_from_slice(&b.data[from..from + depth]);
                }
                let wide = SQUARE.min(p.width - c);
                for (k, out) in out.chunks_exact_mut(p.width).enumerate() {
                    for (i, out) in out[c..c + wide].iter_mut().enumerate() {
                        *out = square[i][k];
                    }
                }
            }
        }
    }
}

kernel! {
    /// Packs rows of A whose columns are contiguous: groups of `height` rows, for each k the
    /// group's elements side by side; the last group may be lower.
    fn pack_left<R>(a: View<'_, R>, rows: Range<usize>, ks: Range<usize>, height: usize, out: &mut [R]) {
        for (i, k) in ks.clone().enumerate() {
            let column = &a.data[k * a.col_stride + rows.start..k * a.col_stride + rows.end];
            for (group, from) in column.chunks(height).enumerate() {
                let at = group * height * ks.len() + i * from.len();
                // Element by element: too few for a call to a copying routine.
                for (out, from) in out[at..at + from.len()].iter_mut().zip(from) {
                    *out = *from;
                }
            }
        }
    }
}

/// C = A·B or C += A·B with B packed before. The summed dimension is A's width, which may be
/// less than B's depth, and C's width may be less than B's: then the rest of B is not used.
///
/// # Panics
/// Where shapes do not fit.
pub fn product<R: Real>(cpu: &Cpu, a: View<'_, R>, b: &Packed<'_, R>, c: ViewMut<'_, R>, into: Into) {
    check(&a, b, &c);
    let (row_tasks, col_tasks) = (c.rows.div_ceil(TASK_ROWS), c.cols.div_ceil(TASK_COLS));
    let target = Target::new(c.data);
    cpu.for_each(row_tasks * col_tasks, |task| {
        // Neighbours in time share columns, so B's panels come from a shared cache.
        let (row, col) = (task % row_tasks * TASK_ROWS, task / row_tasks * TASK_COLS);
        let rows = row..(row + TASK_ROWS).min(c.rows);
        let cols = col..(col + TASK_COLS).min(c.cols);
        // SAFETY: tasks have disjoint rows × columns within the shape of C, which `check`
        // compared with A and B and ViewMut with its memory; the exclusive borrow of C
        // outlives the tasks.
        unsafe { block(cpu.family(), a, b, target, c.stride, rows, cols, into) };
    });
}

/// As [`product`], on this thread alone: for tasks that are part of a larger operation.
pub(crate) fn product_serial<R: Real>(
    family: Family,
    a: View<'_, R>,
    b: &Packed<'_, R>,
    c: ViewMut<'_, R>,
    into: Into,
) {
    check(&a, b, &c);
    let target = Target::new(c.data);
    // SAFETY: as in `product`, with one task.
    unsafe { block(family, a, b, target, c.stride, 0..c.rows, 0..c.cols, into) };
}

/// Packs a right factor into scratch memory that the caller gives, on this thread alone.
pub(crate) fn packed_in<'a, R: Real>(family: Family, b: View<'_, R>, out: &mut &'a mut [R]) -> Packed<'a, R> {
    let out = scratch::take(out, packed_len::<R>(b.rows, b.cols, family));
    pack_serial(family, b, out)
}

/// Packs B and multiplies: for right factors that are used once.
///
/// # Panics
/// Where shapes do not fit.
pub fn matmul<R: Real>(cpu: &Cpu, a: View<'_, R>, b: View<'_, R>, c: ViewMut<'_, R>, into: Into) {
    scratch::with(packed_len::<R>(b.rows, b.cols, cpu.family()), |memory| {
        let b = pack(cpu, b, memory);
        product(cpu, a, &b, c, into);
    });
}

fn check<R>(a: &View<'_, R>, b: &Packed<'_, R>, c: &ViewMut<'_, R>) {
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

/// Computes the rows × columns of C given, blocks of the summed dimension outermost so that a
/// task's part of A is packed once.
///
/// # Safety
/// `check` holds for the whole matrices, `rows` and `cols` lie within C, `cols` starts at a
/// tile's border, and nobody else touches that part of C.
#[allow(clippy::too_many_arguments)]
unsafe fn block<R: Real>(
    family: Family,
    a: View<'_, R>,
    b: &Packed<'_, R>,
    c: Target<R>,
    stride: usize,
    rows: Range<usize>,
    cols: Range<usize>,
    into: Into,
) {
    let tiles = R::tiles(family);
    if a.cols == 0 && into == Into::Set {
        for row in rows {
            for col in cols.clone() {
                // SAFETY: within the part of C that is ours.
                unsafe { *c.at(row * stride + col) = R::ZERO };
            }
        }
        return;
    }
    let packs = a.col_stride != 1;
    scratch::with(if packs { rows.len() * DEPTH.min(a.cols) } else { 0 }, |left| {
        for k in (0..a.cols).step_by(DEPTH) {
            let depth = DEPTH.min(a.cols - k);
            if packs {
                pack_left(family, a, rows.clone(), k..k + depth, tiles.height, left);
            }
            let add = u8::from(k > 0 || into == Into::Add);
            for j in cols.start / tiles.width..cols.end.div_ceil(tiles.width) {
                let p = panel::<R>(b.depth, b.cols, k, j, family);
                let right = &b.data[p.start..p.start + (p.k.len() - 1) * p.width + p.width];
                let n = cols.end.min(p.cols.end) - p.cols.start;
                for row in rows.clone().step_by(tiles.height) {
                    let m = tiles.height.min(rows.end - row);
                    let (from, k_stride, row_stride) = if packs {
                        (&left[(row - rows.start) * depth..], m, 1)
                    } else {
                        (&a.data[row * a.row_stride + k..], 1, a.row_stride)
                    };
                    let kernel = tiles.kernel(n, m);
                    // SAFETY: the family's instructions exist (Family is proof). The kernel
                    // reads `depth` ≤ p.k.len() columns of ⌈n / lanes⌉ whole vectors at steps
                    // of `width` from `right`, which the panel has (its width is a multiple of
                    // the lanes and at least n); `m` × `depth` elements of A by its strides,
                    // which View checked or `pack_left` wrote; and updates `m` × `n` elements
                    // of C at our rows and columns.
                    unsafe {
                        kernel(
                            n,
                            m,
                            depth,
                            c.at(row * stride + p.cols.start),
                            right.as_ptr(),
                            from.as_ptr(),
                            stride as isize,
                            1,
                            p.width as isize,
                            k_stride as isize,
                            row_stride as isize,
                            R::ONE,
                            R::ONE,
                            add,
                            false,
                            false,
                            false,
                            std::ptr::null(),
                        );
                    }
                }
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn numbers(n: usize, seed: u32) -> Vec<f32> {
        let at = |i: u32| i.wrapping_mul(2_654_435_761).wrapping_add(seed).wrapping_mul(747_796_405) >> 12;
        (0..n as u32).map(|i| at(i) as f32 / (1 << 19) as f32 - 1.0).collect()
    }

    /// The order that the module promises, spelled out.
    fn reference(family: Family, a: &[f32], b: &[f32], (m, n, k): (usize, usize, usize), c: &mut [f32]) {
        let fused = family != Family::PORTABLE;
        for i in 0..m {
            for j in 0..n {
                for block in (0..k).step_by(DEPTH) {
                    let mut sum = 0.0f32;
                    for l in block..(block + DEPTH).min(k) {
                        let (x, y) = (a[i * k + l], b[l * n + j]);
                        sum = if fused { x.mul_add(y, sum) } else { x * y + sum };
                    }
                    c[i * n + j] += sum;
                }
            }
        }
    }

    fn transpose(a: &[f32], rows: usize, cols: usize) -> Vec<f32> {
        (0..rows * cols).map(|i| a[i % rows * cols + i / rows]).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn products_have_the_promised_bits_in_any_layout_on_any_number_of_threads(
            m in 1usize..70, n in 1usize..150, k in 1usize..600, seed: u32, threads in 1usize..4, layout in 0..4,
        ) {
            let (a, b) = (numbers(m * k, seed), numbers(k * n, !seed));
            let start = numbers(m * n, seed ^ 7);
            let (at, bt) = (transpose(&a, m, k), transpose(&b, k, n));
            let left = if layout & 1 == 0 { View::rows_of(&a, k) } else { View::rows_of(&at, m).t() };
            let right = if layout & 2 == 0 { View::rows_of(&b, n) } else { View::rows_of(&bt, k).t() };
            for family in Family::available() {
                let cpu = Cpu::new(threads, family).unwrap();
                let (mut expected, mut c) = (start.clone(), start.clone());
                reference(family, &a, &b, (m, n, k), &mut expected);
                matmul(&cpu, left, right, ViewMut::rows_of(&mut c, n), Into::Add);
                prop_assert_eq!(&c, &expected, "{}", family);
                expected.fill(0.0);
                reference(family, &a, &b, (m, n, k), &mut expected);
                matmul(&cpu, left, right, ViewMut::rows_of(&mut c, n), Into::Set);
                prop_assert_eq!(&c, &expected, "{}", family);
            }
        }
    }

    #[test]
    fn many_tasks_and_part_of_a_packed_factor_give_the_same_bits() {
        // More rows and columns than one task has, and a block of the summed dimension cut short.
        let (m, n, k) = (TASK_ROWS + 7, TASK_COLS + 70, DEPTH + 44);
        let (a, b) = (numbers(m * k, 1), numbers(k * n, 2));
        for family in Family::available() {
            let cpu = Cpu::new(2, family).unwrap();
            let mut memory = vec![0.0; packed_len::<f32>(k, n, family)];
            let packed = pack(&cpu, View::rows_of(&b, n), &mut memory);
            let mut whole = vec![f32::NAN; m * n];
            product(&cpu, View::rows_of(&a, k), &packed, ViewMut::rows_of(&mut whole, n), Into::Set);
            for row in [0, 5, TASK_ROWS, m - 1] {
                let mut alone = vec![f32::NAN; n - 33];
                let a = View::rows_of(&a[row * k..(row + 1) * k], k);
                product(&cpu, a, &packed, ViewMut::rows_of(&mut alone, n - 33), Into::Set);
                assert_eq!(alone, whole[row * n..][..n - 33], "{family}: row {row}");
            }
            let short = DEPTH + 9;
            let zeroed: Vec<f32> =
                a.iter().enumerate().map(|(i, a)| if i % k < short { *a } else { 0.0 }).collect();
            let (mut cut, mut full) = (vec![0.0; m * n], vec![0.0; m * n]);
            let a = View::new(&a, m, short, k);
            product(&cpu, a, &packed, ViewMut::rows_of(&mut cut, n), Into::Set);
            product(&cpu, View::rows_of(&zeroed, k), &packed, ViewMut::rows_of(&mut full, n), Into::Set);
            assert_eq!(cut, full, "{family}");
        }
    }

    #[test]
    fn an_empty_sum_is_zero() {
        let cpu = Cpu::new(1, Family::best()).unwrap();
        let mut c = vec![1.0f32; 6];
        let (a, b) = (View::new(&[], 2, 0, 0), View::new(&[], 0, 3, 3));
        matmul(&cpu, a, b, ViewMut::rows_of(&mut c, 3), Into::Add);
        assert_eq!(c, [1.0; 6]);
        matmul(&cpu, a, b, ViewMut::rows_of(&mut c, 3), Into::Set);
        assert_eq!(c, [0.0; 6]);
    }
}
