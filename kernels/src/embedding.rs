//! The token embedding: a table look-up, and its gradient.

use crate::{Cpu, Element, Family, Real};
use rayon::prelude::*;

/// Tokens that a task looks up.
const TOKENS: usize = 128;

/// Rows of the table that a task of the gradient is responsible for. Each task walks all
/// tokens in order, so a row's sum has one order whatever the number of threads.
const TABLE_ROWS: usize = 2048;

/// `out` row i = `table` row `tokens[i]`; rows of `dim`.
///
/// # Panics
/// Where lengths do not fit or a token is outside the table.
pub fn forward<E: Element>(cpu: &Cpu, tokens: &[u32], table: &[E], dim: usize, out: &mut [E::Sum]) {
    assert_eq!(out.len(), tokens.len() * dim);
    cpu.install(|| {
        out.par_chunks_mut(TOKENS * dim).zip(tokens.par_chunks(TOKENS)).for_each(|(out, tokens)| {
            for (out, token) in out.chunks_exact_mut(dim).zip(tokens) {
                for (out, x) in out.iter_mut().zip(&table[*token as usize * dim..][..dim]) {
                    *out = x.widen();
                }
            }
        });
    });
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_looked_up_and_their_gradients_add_up() {
        let cpu = Cpu::new(2, Family::best()).unwrap();
        let vocab = TABLE_ROWS + 3;
        let table: Vec<f64> = (0..vocab * 2).map(|i| i as f64).collect();
        let last = vocab as u32 - 1;
        let tokens = [last, 0, 7, last];
        let mut out = vec![0.0; 8];
        forward(&cpu, &tokens, &table, 2, &mut out);
        let l = f64::from(last) * 2.0;
        assert_eq!(out, [l, l + 1.0, 0.0, 1.0, 14.0, 15.0, l, l + 1.0]);
        let mut dtable = vec![1.0; vocab * 2];
        backward(&cpu, &tokens, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], 2, &mut dtable);
        assert_eq!(dtable[..2], [4.0, 5.0]);
        assert_eq!(dtable[14..16], [6.0, 7.0]);
        assert_eq!(dtable[vocab * 2 - 2..], [9.0, 11.0]);
        assert_eq!(dtable.iter().sum::<f64>(), 2.0 * vocab as f64 + 36.0);
    }
}
