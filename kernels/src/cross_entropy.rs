//! Softmax cross-entropy: loss and gradient in one pass over a chunk of logits.
//!
//! The caller hands in logits a chunk of rows at a time and gets their gradient, so that no more
//! than a chunk ever exists.

use crate::{Cpu, Element, Real, reduce};
use rayon::prelude::*;

/// Sets `gradient` (rows of `vocab`) to the gradient of Σ_counted −log p(target) · `scale` with
/// respect to `logits`, and `losses` to each row's share of that sum; 0 in rows that do not
/// count. `logits` are good for nothing after it.
///
/// # Panics
/// Where lengths do not fit or a target is outside the vocabulary.
#[allow(clippy::too_many_arguments, reason = "what goes in and what comes out, each once")]
pub fn forward_backward<E: Element>(
    cpu: &Cpu,
    logits: &mut [E::Sum],
    gradient: &mut [E],
    vocab: usize,
    targets: &[u32],
    counted: &[bool],
    scale: f64,
    losses: &mut [f64],
) {
    let n = targets.len();
    assert!(logits.len() == n * vocab && gradient.len() == n * vocab);
    assert!(counted.len() == n && losses.len() == n);
    let family = cpu.family();
    cpu.install(|| {
        let rows = logits.par_chunks_mut(vocab).zip(gradient.par_chunks_mut(vocab));
        let rows = rows.zip(losses.par_iter_mut());
        rows.zip(targets.par_iter().zip(counted)).for_each(|(((row, out), loss), (target, counted))| {
            if *counted {
                *loss = loss_row(family, row, out, *target as usize, E::Sum::from_f64(scale)) * scale;
            } else {
                out.fill(E::default());
                *loss = 0.0;
            }
        });
    });
}

kernel! {
    /// −log softmax(row)[target]; sets `out` to its gradient times `scale`.
    fn loss_row<E: Element>(row: &mut [E::Sum], out: &mut [E], target: usize, scale: E::Sum) -> f64 {
        let max = reduce::max(row);
        let at_target = (row[target] - max).to_f64();
        let sum = reduce::exp_sum(row, max);
        let factor = scale / sum;
        for (out, p) in out.iter_mut().zip(&*row) {
            *out = E::narrow(*p * factor);
        }
        out[target] = E::narrow(row[target] * factor - scale);
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
            let mut gradient = vec![9.0; 3 * 21];
            forward_backward(&cpu, &mut logits, &mut gradient, 21, &[4, 5, 20], &counted, 0.25, &mut losses);
            assert_eq!(losses[1], 0.0);
            assert!(gradient[21..42].iter().all(|g| *g == 0.0));
            for (row, target) in [(0, 4), (2, 20)] {
                let (x, g) = (&before[row * 21..][..21], &gradient[row * 21..][..21]);
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
        let (mut losses, mut gradient) = ([0.0], [0.0f32; 3]);
        forward_backward(&cpu, &mut logits, &mut gradient, 3, &[1], &[true], 1.0, &mut losses);
        assert_eq!((gradient, losses), ([1.0, -1.0, 0.0], [2e4]));
    }
}
