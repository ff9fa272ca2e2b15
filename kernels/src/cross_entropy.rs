//! Softmax cross-entropy: loss and gradient in one pass over a chunk of logits.
//!
//! The caller hands in logits a chunk of rows at a time and gets their gradient back in
//! place, so that no more than a chunk ever exists.

use crate::{Cpu, Real, reduce};
use rayon::prelude::*;

/// Turns `logits` (rows of `vocab`) into the gradient of Σ_counted −log p(target) · `scale`,
/// and sets `losses` to each row's share of that sum; 0 in rows that do not count.
///
/// # Panics
/// Where lengths do not fit or a target is outside the vocabulary.
pub fn forward_backward<R: Real>(
    cpu: &Cpu,
    logits: &mut [R],
    vocab: usize,
    targets: &[u32],
    counted: &[bool],
    scale: f64,
    losses: &mut [f64],
) {
    let n = targets.len();
    assert!(logits.len() == n * vocab && counted.len() == n && losses.len() == n);
    let family = cpu.family();
    cpu.install(|| {
        let rows = logits.par_chunks_mut(vocab).zip(losses.par_iter_mut());
        rows.zip(targets.par_iter().zip(counted)).for_each(|((row, loss), (target, counted))| {
            if *counted {
                *loss = loss_row(family, row, *target as usize, R::from_f64(scale)) * scale;
            } else {
                row.fill(R::ZERO);
                *loss = 0.0;
            }
        });
    });
}

kernel! {
    /// −log softmax(row)[target]; leaves its gradient times `scale` in the row.
    fn loss_row<R>(row: &mut [R], target: usize, scale: R) -> f64 {
        let max = reduce::max(row);
        let at_target = (row[target] - max).to_f64();
        let sum = reduce::exp_sum(row, max);
        let factor = scale / sum;
        for p in row.iter_mut() {
            *p *= factor;
        }
        row[target] = row[target] - scale;
        libm::log(sum.to_f64()) - at_target
    }
}
