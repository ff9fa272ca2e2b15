//! Rotary position embedding (arXiv 2104.09864), Hugging Face's layout: element i of a head
//! is turned together with element i + half, not with its neighbour.

use crate::{Cpu, Element, Family, Real};
use rayon::prelude::*;

/// Rows per task.
const ROWS: usize = 64;

/// Cosines and sines of position · rate, for half a head of rates.
#[derive(Debug)]
pub struct Table<R> {
    half: usize,
    /// For each position, half a head of cosines, then as many sines.
    turns: Vec<R>,
}

impl<R: Real> Table<R> {
    /// Tables for positions `0..positions` and frequencies in radians a position, computed in
    /// f64 and rounded once.
    #[must_use]
    pub fn new(positions: usize, rates: &[f64]) -> Self {
        let half = rates.len();
        let mut turns = Vec::with_capacity(positions * half * 2);
        for position in 0..positions {
            let angle = |rate: &f64| position as f64 * rate;
            turns.extend(rates.iter().map(|rate| R::from_f64(libm::cos(angle(rate)))));
            turns.extend(rates.iter().map(|rate| R::from_f64(libm::sin(angle(rate)))));
        }
        Self { half, turns }
    }

    /// Number of positions.
    #[must_use]
    pub fn positions(&self) -> usize {
        self.turns.len() / (2 * self.half)
    }
}

/// Which way to turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// The forward pass.
    Forward,
    /// The backward pass: a rotation's transpose is its inverse.
    Backward,
}

/// Turns the first `turned` elements (whole heads: queries, then keys) of every row of
/// `width` in place. Row i is at position `first + i % length`.
///
/// # Panics
/// Where the table is too short or sizes do not fit.
pub fn rope<E: Element>(
    cpu: &Cpu,
    rows: &mut [E],
    width: usize,
    turned: usize,
    (first, length): (usize, usize),
    table: &Table<E::Sum>,
    turn: Turn,
) {
    assert!(turned <= width && turned.is_multiple_of(2 * table.half) && rows.len().is_multiple_of(width));
    assert!(first + length.min(rows.len() / width) <= table.positions());
    let family = cpu.family();
    cpu.install(|| {
        rows.par_chunks_mut(ROWS * width).enumerate().for_each(|(chunk, rows)| {
            rope_rows(family, rows, (width, turned), [first, chunk * ROWS, length], table, turn);
        });
    });
}

/// As [`rope`], on this thread alone, for the rows from row `row` on.
///
/// # Panics
/// Where the table is too short or sizes do not fit.
pub fn rope_rows<E: Element>(
    family: Family,
    rows: &mut [E],
    (width, turned): (usize, usize),
    [first, row, length]: [usize; 3],
    table: &Table<E::Sum>,
    turn: Turn,
) {
    assert!(turned <= width && turned.is_multiple_of(2 * table.half) && rows.len().is_multiple_of(width));
    for (i, values) in rows.chunks_exact_mut(width).enumerate() {
        let position = first + (row + i) % length;
        let turns = &table.turns[position * 2 * table.half..][..2 * table.half];
        turn_row(family, &mut values[..turned], turns, turn == Turn::Backward);
    }
}

kernel! {
    fn turn_row<E: Element>(row: &mut [E], turns: &[E::Sum], backward: bool) {
        let (cos, sin) = turns.split_at(turns.len() / 2);
        let sign = if backward { -E::Sum::ONE } else { E::Sum::ONE };
        for head in row.chunks_exact_mut(turns.len()) {
            let (a, b) = head.split_at_mut(turns.len() / 2);
            for ((a, b), (cos, sin)) in a.iter_mut().zip(b).zip(cos.iter().zip(sin)) {
                let sin = sign * *sin;
                let (x, y) = (a.widen(), b.widen());
                (*a, *b) = (E::narrow(x * *cos - y * sin), E::narrow(y * *cos + x * sin));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Family;

    #[test]
    fn halves_turn_by_position_times_rate_and_turn_back() {
        let cpu = Cpu::new(2, Family::best()).unwrap();
        let table = Table::<f64>::new(8, &[1.0, 0.1]);
        // Two sequences of three positions from 5 on; one head turned, two elements beside it.
        let row = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let before = row.repeat(6);
        let mut rows = before.clone();
        rope(&cpu, &mut rows, 6, 4, (5, 3), &table, Turn::Forward);
        for (i, row) in rows.chunks(6).enumerate() {
            let position = (5 + i % 3) as f64;
            let ((s0, c0), (s1, c1)) = (position.sin_cos(), (position * 0.1).sin_cos());
            let expected = [c0 - 3.0 * s0, 2.0 * c1 - 4.0 * s1, 3.0 * c0 + s0, 4.0 * c1 + 2.0 * s1, 5.0, 6.0];
            assert!(row.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-14), "{row:?} {expected:?}");
        }
        rope(&cpu, &mut rows, 6, 4, (5, 3), &table, Turn::Backward);
        assert!(rows.iter().zip(&before).all(|(a, b)| (a - b).abs() < 1e-14));
    }
}
