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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Family;

    #[test]
    fn loss_and_gradient_are_those_of_softmax_and_rows_that_do_not_count_are_zero() {
        for family in Family::available() {
            let cpu = Cpu::new(2, family).unwrap();
            let mut logits: Vec<f64> = (0..3 * 21).map(|i| f64::from(i % 13) * 0.5).collect();
            let before = logits.clone();
            let mut losses = [9.0; 3];
            let counted = [true, false, true];
            forward_backward(&cpu, &mut logits, 21, &[4, 5, 20], &counted, 0.25, &mut losses);
            assert_eq!(losses[1], 0.0);
            assert!(logits[21..42].iter().all(|g| *g == 0.0));
            for (row, target) in [(0, 4), (2, 20)] {
                let (x, g) = (&before[row * 21..][..21], &logits[row * 21..][..21]);
                let total: f64 = x.iter().map(|x| x.exp()).sum();
                assert!((losses[row] - 0.25 * (total.ln() - x[target])).abs() < 1e-13);
                for i in 0..21 {
                    let hot = f64::from(u8::from(i == target));
                    assert!((g[i] - 0.25 * (x[i].exp() / total - hot)).abs() < 1e-14);
                }
            }
        }
    }

    #[test]
    fn logits_far_apart_overflow_nothing() {
        let cpu = Cpu::new(1, Family::best()).unwrap();
        let mut logits = [1e4f32, -1e4, 0.0];
        let mut losses = [0.0];
        forward_backward(&cpu, &mut logits, 3, &[1], &[true], 1.0, &mut losses);
        assert_eq!((logits, losses), ([1.0, -1.0, 0.0], [2e4]));
    }
}
