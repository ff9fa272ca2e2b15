//! The order in which factors lie in memory while they are multiplied.
//!
//! A panel of the right factor is as wide as a register tile. For each group of k (one value, or
//! two side by side where the family multiplies pairs) it has its columns side by side, so that a
//! tile reads memory front to back. The left factor is packed likewise, by rows.

// Tasks write disjoint panels of one matrix.
#![allow(unsafe_code)]

use super::transpose::{self, Transposer};
use super::{TASK_ROWS, Tiles, View};
use crate::target::Target;
use crate::{Buffer, Cpu, Element, Family, scratch};
use std::ops::Range;

/// The right factor of a product, packed for one family.
#[derive(Debug)]
pub struct Packed<'a, E> {
    pub(super) data: &'a [E],
    pub(super) depth: usize,
    pub(super) cols: usize,
}

impl<E> Packed<'_, E> {
    /// Rows, over which is summed.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.depth
    }

    /// Columns.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }
}

/// A right factor that is packed once and kept.
#[derive(Debug)]
pub struct Factor<E> {
    data: Buffer<E>,
    depth: usize,
    cols: usize,
}

impl<E: Element> Factor<E> {
    /// Packs it.
    #[must_use]
    pub fn new(cpu: &Cpu, b: View<'_, E>) -> Self {
        let mut data = Buffer::zeros(packed_len::<E>(b.rows, b.cols, cpu.family()));
        pack(cpu, b, &mut data);
        Self { data, depth: b.rows, cols: b.cols }
    }

    /// Rows, over which is summed.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.depth
    }

    /// As what it is multiplied as.
    #[must_use]
    pub fn packed(&self) -> Packed<'_, E> {
        Packed { data: &self.data, depth: self.depth, cols: self.cols }
    }
}

/// The next multiple of a power of two, which all that is rounded to here is: this is asked for every
/// tile, and a division takes as long as a part of it.
pub(super) fn round_up(n: usize, power: usize) -> usize {
    debug_assert!(power.is_power_of_two());
    (n + power - 1) & !(power - 1)
}

/// Elements that packing a `depth` × `cols` right factor takes: whole steps of whole vectors.
#[must_use]
pub fn packed_len<E: Element>(depth: usize, cols: usize, family: Family) -> usize {
    let tiles = E::tiles(family);
    round_up(depth, tiles.step) * round_up(cols, tiles.lanes)
}

/// One panel of one block: where it starts in a packed matrix and what it covers.
pub(super) struct Panel {
    /// First element in the packed matrix.
    pub(super) start: usize,
    /// Summed indices.
    k: Range<usize>,
    /// Columns.
    cols: Range<usize>,
    /// Columns with those that pad them.
    pub(super) width: usize,
    /// Summed indices side by side.
    group: usize,
    /// Of which there is a multiple.
    step: usize,
}

impl Panel {
    /// Elements.
    pub(super) fn len(&self) -> usize {
        round_up(self.k.len(), self.step) * self.width
    }
}

/// Panel `j` of the block that starts at `k`; [`packed_len`] bounds its end.
pub(super) fn panel<E: Element>(b: &Packed<'_, E>, tiles: &Tiles<E>, k: usize, j: usize) -> Panel {
    panel_of(b.depth, b.cols, tiles, k, j)
}

fn panel_of<E: Element>(depth: usize, cols: usize, tiles: &Tiles<E>, k: usize, j: usize) -> Panel {
    let Tiles { width, group, step, .. } = *tiles;
    let padded = round_up(cols, tiles.lanes);
    let end = (k + tiles.depth).min(depth);
    let (first, last) = (j * width, ((j + 1) * width).min(cols));
    let start = k * padded + round_up(end - k, step) * first;
    Panel { start, k: k..end, cols: first..last, width: width.min(padded - first), group, step }
}

/// Packs a right factor on this thread alone.
pub(crate) fn pack_serial<'a, E: Element>(family: Family, b: View<'_, E>, out: &'a mut [E]) -> Packed<'a, E> {
    let tiles = E::tiles(family);
    let out = &mut out[..packed_len::<E>(b.rows, b.cols, family)];
    for k in (0..b.rows).step_by(tiles.depth) {
        for j in 0..b.cols.div_ceil(tiles.width) {
            let p = panel_of(b.rows, b.cols, &tiles, k, j);
            pack_panel(family, Transposer::of(family), b, &p, &mut out[p.start..p.start + p.len()]);
        }
    }
    Packed { data: out, depth: b.rows, cols: b.cols }
}

/// Packs a right factor into scratch memory that the caller gives, on this thread alone.
pub(crate) fn packed_in<'a, E: Element>(
    family: Family,
    b: View<'_, E>,
    out: &mut &'a mut [E],
) -> Packed<'a, E> {
    let out = scratch::take(out, packed_len::<E>(b.rows, b.cols, family));
    pack_serial(family, b, out)
}

/// Packs a right factor into `out`, which has [`packed_len`] elements at least.
///
/// # Panics
/// Where `out` is too short.
pub fn pack<'a, E: Element>(cpu: &Cpu, b: View<'_, E>, out: &'a mut [E]) -> Packed<'a, E> {
    let [packed] = pack_all(cpu, [b], out);
    packed
}

/// Packs right factors one behind the other into `out`, which has the sum of their [`packed_len`] at
/// least.
///
/// # Panics
/// Where `out` is too short.
pub fn pack_all<'a, E: Element, const N: usize>(
    cpu: &Cpu,
    factors: [View<'_, E>; N],
    mut out: &'a mut [E],
) -> [Packed<'a, E>; N] {
    let family = cpu.family();
    let tiles = E::tiles(family);
    let panels = |b: &View<'_, E>| b.rows.div_ceil(tiles.depth) * b.cols.div_ceil(tiles.width);
    let parts = factors.map(|b| {
        let part = scratch::take(&mut out, packed_len::<E>(b.rows, b.cols, family));
        (b, Target::new(part), part.len())
    });
    cpu.for_each(parts.iter().map(|(b, ..)| panels(b)).sum(), |mut task| {
        for (b, target, _) in &parts {
            if task >= panels(b) {
                task -= panels(b);
                continue;
            }
            let across = b.cols.div_ceil(tiles.width);
            let p = panel_of(b.rows, b.cols, &tiles, task / across * tiles.depth, task % across);
            // SAFETY: panels are disjoint and lie within packed_len (see `panel_of`), and the
            // exclusive borrow of `out` outlives the tasks.
            let out = unsafe { target.part(p.start, p.len()) };
            return pack_panel(family, Transposer::of(family), *b, &p, out);
        }
    });
    parts.map(|(b, target, len)| {
        // SAFETY: the part of `out` that this was made from, which the tasks are done with.
        let data = unsafe { target.part(0, len) };
        Packed { data, depth: b.rows, cols: b.cols }
    })
}

kernel! {
    /// Packs one panel; zeros where there is nothing.
    fn pack_panel<E: Element>(transposer: Option<Transposer>, b: View<'_, E>, p: &Panel, out: &mut [E]) {
        let (out, padding) = out.split_at_mut(round_up(p.k.len(), p.group) * p.width);
        padding.fill(E::default());
        match (p.group, b.col_stride == 1) {
            (1, true) => pack_rows::<E, 1>(b, p, out),
            (1, false) => pack_columns::<E, 1>(transposer, b, p, out),
            (_, true) => pack_rows::<E, 2>(b, p, out),
            (_, false) => pack_columns::<E, 2>(transposer, b, p, out),
        }
    }
}

/// Of a factor whose rows are contiguous.
#[inline(always)]
fn pack_rows<E: Element, const GROUP: usize>(b: View<'_, E>, p: &Panel, out: &mut [E]) {
    let n = p.cols.len();
    let (groups, _) = out.as_chunks_mut::<GROUP>();
    for (k, out) in p.k.clone().step_by(GROUP).zip(groups.chunks_exact_mut(p.width)) {
        let row = |k: usize| &b.data[k * b.row_stride + p.cols.start..][..n];
        let (first, last) = (row(k), row((k + GROUP - 1).min(p.k.end - 1)));
        let whole = k + GROUP <= p.k.end;
        for (out, (first, last)) in out.iter_mut().zip(first.iter().zip(last)) {
            out[GROUP - 1] = if whole { *last } else { E::default() };
            out[0] = *first;
        }
        out[n..].fill([E::default(); GROUP]);
    }
}

/// Of a factor whose columns are contiguous: squares of them are transposed in registers, or in the
/// first-level cache.
#[inline(always)]
fn pack_columns<E: Element, const GROUP: usize>(
    transposer: Option<Transposer>,
    b: View<'_, E>,
    p: &Panel,
    out: &mut [E],
) {
    const SQUARE: usize = transpose::SIDE;
    let transposer = transposer.filter(|_| size_of::<[E; GROUP]>() == 4);
    let n = p.cols.len();
    let (out, _) = out.as_chunks_mut::<GROUP>();
    for k in p.k.clone().step_by(SQUARE * GROUP) {
        let depth = (SQUARE * GROUP).min(p.k.end - k);
        let groups = depth.div_ceil(GROUP);
        let out = &mut out[(k - p.k.start) / GROUP * p.width..][..groups * p.width];
        for c in (0..p.width).step_by(SQUARE) {
            if let Some(transposer) = transposer.filter(|_| depth == SQUARE * GROUP && c + SQUARE <= n) {
                let from = &b.data[(p.cols.start + c) * b.col_stride + k * b.row_stride..];
                transposer.transpose(from, b.col_stride, out[c..].as_flattened_mut(), p.width * GROUP);
                continue;
            }
            let mut square = [[[E::default(); GROUP]; SQUARE]; SQUARE];
            for (i, column) in square.iter_mut().enumerate().take(n.saturating_sub(c)) {
                let from = (p.cols.start + c + i) * b.col_stride + k * b.row_stride;
                column.as_flattened_mut()[..depth].copy_from_slice(&b.data[from..from + depth]);
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

/// Rows of a packed left factor that lie side by side: those of a tile, or, where values are paired,
/// all of a task's, since memory is read fastest in long pieces.
fn left_rows<E: Element>(tiles: &Tiles<E>) -> usize {
    if tiles.step == 2 { TASK_ROWS } else { tiles.height }
}

/// Values of k in a row of an AMX tile.
pub(super) const STEP: usize = 32;

/// Packs rows of A: for each [`left_rows`] of them, for each step of k, the rows' steps side by
/// side.
pub(super) fn pack_left<E: Element>(
    family: Family,
    a: View<'_, E>,
    rows: Range<usize>,
    ks: Range<usize>,
    out: &mut [E],
) {
    let tiles = E::tiles(family);
    let len = round_up(ks.len(), tiles.step);
    // In a column-major factor each value of k is another row of memory: a step's are read for all
    // rows before the next step's.
    let deep = if tiles.step == STEP { STEP } else { ks.len().max(1) };
    for k in ks.clone().step_by(deep) {
        let part_ks = k..(k + deep).min(ks.end);
        for row in rows.clone().step_by(left_rows(&tiles)) {
            let part = row..(row + left_rows(&tiles)).min(rows.end);
            let start = (row - rows.start) * len + (k - ks.start) * part.len();
            let out = &mut out[start..][..part.len() * round_up(part_ks.len(), tiles.step)];
            pack_left_part(family, Transposer::of(family), a, part, part_ks.clone(), tiles.step, out);
        }
    }
}

kernel! {
    fn pack_left_part<E: Element>(transposer: Option<Transposer>, a: View<'_, E>, rows: Range<usize>, ks: Range<usize>, step: usize, out: &mut [E]) {
        match (step, rows.len()) {
            (1, 6) => pack_some::<E, 6>(a, rows, ks, out),
            (1, 4) => pack_some::<E, 4>(a, rows, ks, out),
            (1, _) => pack_few::<E, 1>(a, rows, ks, out),
            (2, width) if a.row_stride == 1 => {
                let p = Panel { start: 0, k: ks, cols: rows, width, group: 2, step };
                pack_rows::<E, 2>(a.t(), &p, out);
            }
            (2, _) => pack_few::<E, 2>(a, rows, ks, out),
            _ => pack_tiles(transposer, a, rows, ks, out),
        }
    }
}

/// Exactly so many rows.
#[inline(always)]
fn pack_some<E: Element, const ROWS: usize>(
    a: View<'_, E>,
    rows: Range<usize>,
    ks: Range<usize>,
    out: &mut [E],
) {
    if a.row_stride != 1 {
        return pack_few::<E, 1>(a, rows, ks, out);
    }
    for (k, out) in ks.zip(out.as_chunks_mut::<ROWS>().0) {
        out.copy_from_slice(&a.data[k * a.col_stride + rows.start..][..ROWS]);
    }
}

/// Any number of rows.
#[inline(always)]
fn pack_few<E: Element, const GROUP: usize>(
    a: View<'_, E>,
    rows: Range<usize>,
    ks: Range<usize>,
    out: &mut [E],
) {
    let (out, _) = out.as_chunks_mut::<GROUP>();
    for (k, out) in ks.clone().step_by(GROUP).zip(out.chunks_exact_mut(rows.len())) {
        for (row, out) in rows.clone().zip(out) {
            for (k, out) in (k..).zip(out) {
                *out = if k < ks.end { a.data[row * a.row_stride + k * a.col_stride] } else { E::default() };
            }
        }
    }
}

/// In rows of whole steps of AMX.
#[inline(always)]
fn pack_tiles<E: Element>(
    transposer: Option<Transposer>,
    a: View<'_, E>,
    rows: Range<usize>,
    ks: Range<usize>,
    out: &mut [E],
) {
    match transposer {
        Some(transposer)
            if a.row_stride == 1 && ks.len() == STEP && rows.len().is_multiple_of(transpose::SIDE) =>
        {
            for (row, out) in rows.step_by(transpose::SIDE).zip(out.chunks_exact_mut(transpose::SIDE * STEP))
            {
                transposer.transpose_halves(
                    &a.data[ks.start * a.col_stride + row..],
                    a.col_stride,
                    out,
                    STEP,
                );
            }
            return;
        }
        _ if a.row_stride == 1 => return pack_few::<E, STEP>(a, rows, ks, out),
        _ => {}
    }
    let (out, _) = out.as_chunks_mut::<STEP>();
    for (k, out) in ks.clone().step_by(STEP).zip(out.chunks_exact_mut(rows.len())) {
        let depth = STEP.min(ks.end - k);
        for (row, out) in rows.clone().zip(out) {
            out[..depth].copy_from_slice(&a.data[row * a.row_stride + k..][..depth]);
            out[depth..].fill(E::default());
        }
    }
}

/// Where a packed left factor of `rows` rows and `depth` values of k has the steps from `k` on of
/// the rows from `row` on, a tile's border: with the distances from row to row and from step to
/// step.
pub(super) fn left_at<'a, E: Element>(
    tiles: &Tiles<E>,
    left: &'a [E],
    (row, rows): (usize, usize),
    k: usize,
    depth: usize,
) -> (&'a [E], usize, usize) {
    let first = if left_rows(tiles) == tiles.height { row } else { 0 };
    let part = left_rows(tiles).min(rows - first);
    let start = first * round_up(depth, tiles.step) + k * part + (row - first) * tiles.step;
    (&left[start..], tiles.step, part * tiles.step)
}
