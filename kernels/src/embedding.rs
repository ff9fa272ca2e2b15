//! The token embedding: a table look-up, and its gradient.

use crate::{Cpu, Family, Real};
use rayon::prelude::*;

/// Rows of the table that a task of the gradient is responsible for. Each task walks all
/// tokens in order, so a row's sum has one order whatever the number of threads.
const TABLE_ROWS: usize = 2048;

/// `out` row i = `table` row `tokens[i]`; rows of `dim`.
///
/// # Panics
/// Where lengths do not fit or a token is outside the table.
pub fn forward<R: Real>(tokens: &[u32], table: &[R], dim: usize, out: &mut [R]) {
    assert_eq!(out.len(), tokens.len() * dim);
    for (out, token) in out.chunks_exact_mut(dim).zip(tokens) {
        out.copy_from_slice(&table[*token as usize * dim..][..dim]);
    }
}

/// `dtable` row `tokens[i]` += `dout` row i, in the order of i.
///
/// # Panics
/// Where lengths do not fit.
pub fn backward<R: Real>(cpu: &Cpu, tokens: &[u32], dout: &[R], dim: usize, dtable: &mut [R]) {
    assert_eq!(dout.len(), tokens.len() * dim);
    let family = cpu.family();
    cpu.install(|| {
        dtable.par_chunks_mut(TABLE_ROWS * dim).enumerate().for_each(|(task, rows)| {
            add_rows(family, tokens, task * TABLE_ROWS, dout, dim, rows);
        });
    });
}

fn add_rows<R: Real>(family: Family, tokens: &[u32], first: usize, dout: &[R], dim: usize, rows: &mut [R]) {
    let held = first..first + rows.len() / dim;
    for (token, dout) in tokens.iter().zip(dout.chunks_exact(dim)) {
        if held.contains(&(*token as usize)) {
            let row = &mut rows[(*token as usize - first) * dim..][..dim];
            crate::add::add_chunk(family, row, dout);
        }
    }
}
