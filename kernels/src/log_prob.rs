//! Logarithms of probabilities of given tokens, from a chunk of logits; no gradient.
//!
//! The caller hands in logits a chunk of rows at a time, so that no more than a chunk ever
//! exists. The sums are those of [`crate::cross_entropy`] in the same order: a token's logarithm
//! is, to the bit, the negative of the loss that training would have had for it.

use crate::{Cpu, Real, reduce};
use rayon::prelude::*;

/// For each row x of `logits` (rows of `vocab`) and its target t: `log_probs` is
/// `log softmax(x)[t]` = (x_t − max x) − log Σ_i exp(x_i − max x), and `greedy` is whether t is the
/// token that decoding without chance takes: the likeliest one, of several alike the lowest.
/// Leaves nothing of use in `logits`.
///
/// # Panics
/// Where lengths do not fit or a target is outside the vocabulary.
pub fn forward<R: Real>(
    cpu: &Cpu,
    logits: &mut [R],
    vocab: usize,
    targets: &[u32],
    log_probs: &mut [f64],
    greedy: &mut [bool],
) {
    let n = targets.len();
    assert!(logits.len() == n * vocab && log_probs.len() == n && greedy.len() == n);
    let family = cpu.family();
    cpu.install(|| {
        let out = log_probs.par_iter_mut().zip(greedy.par_iter_mut());
        logits.par_chunks_mut(vocab).zip(targets).zip(out).for_each(|((row, target), (log_prob, greedy))| {
            (*log_prob, *greedy) = row_of(family, row, *target as usize);
        });
    });
}

kernel! {
    fn row_of<R>(row: &mut [R], target: usize) -> (f64, bool) {
        let max = reduce::max(row);
        let greedy = row[target] == max && row[..target].iter().all(|x| *x < max);
        let at_target = (row[target] - max).to_f64();
        let sum = reduce::exp_sum(row, max);
        (at_target - libm::log(sum.to_f64()), greedy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Family, cross_entropy};

    fn of<R: Real>(cpu: &Cpu, logits: &[R], vocab: usize, targets: &[u32]) -> (Vec<f64>, Vec<bool>) {
        let (mut log_probs, mut greedy) = (vec![9.0; targets.len()], vec![true; targets.len()]);
        forward(cpu, &mut logits.to_vec(), vocab, targets, &mut log_probs, &mut greedy);
        (log_probs, greedy)
    }

    #[test]
    fn they_are_those_of_softmax_and_the_losses_of_training_to_the_bit() {
        let logits: Vec<f32> = (0..40 * 37).map(|i| ((i * 7919) % 1000) as f32 * 0.01 - 5.0).collect();
        let targets: Vec<u32> = (0..40).map(|i| i * 11 % 37).collect();
        for family in Family::available() {
            let cpu = Cpu::new(2, family).unwrap();
            let (log_probs, _) = of(&cpu, &logits, 37, &targets);
            let (mut losses, mut gradient, mut scratch) = ([0.0; 40], [0.0f32; 40 * 37], logits.clone());
            let counted = [true; 40];
            let gradient = &mut gradient;
            cross_entropy::forward_backward(
                &cpu,
                &mut scratch,
                gradient,
                37,
                &targets,
                &counted,
                1.0,
                &mut losses,
            );
            for (i, row) in logits.chunks(37).enumerate() {
                let total: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
                let expected = f64::from(row[targets[i] as usize]) - total.ln();
                assert!((log_probs[i] - expected).abs() < 1e-6, "{family}: {} {expected}", log_probs[i]);
                assert_eq!((-log_probs[i]).to_bits(), losses[i].to_bits(), "{family}");
            }
        }
    }

    #[test]
    fn greedy_is_the_likeliest_token_and_the_lowest_of_several() {
        let cpu = Cpu::new(1, Family::best()).unwrap();
        let logits = [1.0, 3.0, 3.0, 0.0].repeat(4);
        let (log_probs, greedy) = of(&cpu, &logits, 4, &[0, 1, 2, 3]);
        assert_eq!(greedy, [false, true, false, false]);
        assert_eq!(log_probs[1], log_probs[2]);
    }

    #[test]
    fn logits_far_apart_overflow_nothing_and_no_number_stays_none() {
        let cpu = Cpu::new(1, Family::best()).unwrap();
        assert_eq!(of(&cpu, &[1e4f32, -1e4, 0.0], 3, &[1]), (vec![-2e4], vec![false]));
        let (log_probs, greedy) = of(&cpu, &[f32::NAN, 1.0], 2, &[1]);
        assert!(log_probs[0].is_nan() && !greedy[0]);
    }
}
