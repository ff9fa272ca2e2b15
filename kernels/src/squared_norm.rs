//! Squared norms, block by block.

use crate::{Cpu, Real, reduce};
use rayon::prelude::*;

/// Σ x² of each block of `block` elements, the last of which may be short: in f64, sixteen
/// running sums folded in halves.
#[must_use]
pub fn squared_norms<R: Real>(cpu: &Cpu, x: &[R], block: usize) -> Vec<f64> {
    let family = cpu.family();
    cpu.install(|| x.par_chunks(block).map(|x| squares(family, x)).collect())
}

kernel! {
    fn squares<R>(x: &[R]) -> f64 {
        let mut acc = [0.0f64; reduce::LANES];
        let (blocks, tail) = x.as_chunks::<{ reduce::LANES }>();
        for x in blocks {
            for l in 0..reduce::LANES {
                let x = x[l].to_f64();
                acc[l] += x * x;
            }
        }
        for (acc, x) in acc.iter_mut().zip(tail) {
            *acc += x.to_f64() * x.to_f64();
        }
        reduce::fold(acc, |a, b| a + b)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Family;

    #[test]
    fn it_sums_squares_in_f64_with_the_same_bits_in_every_family() {
        let x: Vec<f32> = (0..1000).map(|i| (i as f32 * 0.37).sin()).collect();
        let exact: f64 = x.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
        let norms = |family| squared_norms(&Cpu::new(2, family).unwrap(), &x, 300);
        let ours = norms(Family::PORTABLE);
        assert_eq!(ours.len(), 4);
        assert!((ours.iter().sum::<f64>() - exact).abs() < 1e-10);
        for family in Family::available() {
            assert_eq!(norms(family), ours);
        }
    }
}
