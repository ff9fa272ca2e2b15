//! RMSNorm (arXiv 1910.07467): y = g · x / √(mean(x²) + ε), row by row.

use crate::{Cpu, Real, reduce, scratch};
use rayon::prelude::*;

/// Rows per task, and rows whose share of the gain's gradient is summed before it is added to
/// the others': changing it changes bits.
const ROWS: usize = 32;

/// y = rmsnorm(x) · gain; x and y are rows of `gain.len()` elements.
///
/// # Panics
/// Where lengths differ.
pub fn forward<R: Real>(cpu: &Cpu, x: &[R], gain: &[R], epsilon: R, y: &mut [R]) {
    assert_eq!(x.len(), y.len());
    let (family, rows) = (cpu.family(), ROWS * gain.len());
    cpu.install(|| {
        y.par_chunks_mut(rows)
            .zip(x.par_chunks(rows))
            .for_each(|(y, x)| forward_rows(family, x, gain, epsilon, y));
    });
}

/// Adds the gradient through rmsnorm: `dx` += ∂/∂x, `dgain` += ∂/∂gain, given `dy`.
///
/// With r = 1/√(mean(x²) + ε): dgain = Σ_rows dy·x·r and
/// dx = r·(g·dy) − x·r³/d · Σ(g·dy·x).
///
/// # Panics
/// Where lengths differ.
pub fn backward<R: Real>(
    cpu: &Cpu,
    dy: &[R],
    x: &[R],
    gain: &[R],
    epsilon: R,
    dx: &mut [R],
    dgain: &mut [R],
) {
    let d = gain.len();
    assert!(dy.len() == x.len() && dx.len() == x.len() && dgain.len() == d);
    let (family, rows) = (cpu.family(), ROWS * d);
    scratch::with(x.len().div_ceil(rows) * d, |partial| {
        cpu.install(|| {
            let x = x.par_chunks(rows).zip(dy.par_chunks(rows));
            let out = dx.par_chunks_mut(rows).zip(partial.par_chunks_mut(d));
            out.zip(x).for_each(|((dx, dgain), (x, dy))| {
                backward_rows(family, dy, x, gain, epsilon, dx, dgain);
            });
        });
        for partial in partial.chunks_exact(d) {
            for (total, part) in dgain.iter_mut().zip(partial) {
                *total += *part;
            }
        }
    });
}

#[inline(always)]
fn inverse_rms<R: Real>(x: &[R], epsilon: R) -> R {
    let mean = reduce::sum(x, |x| x * x) / R::from_f64(x.len() as f64);
    R::ONE / (mean + epsilon).sqrt()
}

kernel! {
    fn forward_rows<R>(x: &[R], gain: &[R], epsilon: R, y: &mut [R]) {
        for (x, y) in x.chunks_exact(gain.len()).zip(y.chunks_exact_mut(gain.len())) {
            let r = inverse_rms(x, epsilon);
            for ((y, x), g) in y.iter_mut().zip(x).zip(gain) {
                *y = *x * r * *g;
            }
        }
    }
}

kernel! {
    fn backward_rows<R>(dy: &[R], x: &[R], gain: &[R], epsilon: R, dx: &mut [R], dgain: &mut [R]) {
        let d = gain.len();
        dgain.fill(R::ZERO);
        scratch::with(d, |scaled| {
            for ((dy, x), dx) in dy.chunks_exact(d).zip(x.chunks_exact(d)).zip(dx.chunks_exact_mut(d)) {
                let r = inverse_rms(x, epsilon);
                for (((s, dg), dy), (x, g)) in
                    scaled.iter_mut().zip(&mut *dgain).zip(dy).zip(x.iter().zip(gain))
                {
                    *s = *dy * *g;
                    *dg += *dy * *x * r;
                }
                let along = reduce::sum2(scaled, x, |s, x| s * x);
                let c = along * r * r * r / R::from_f64(d as f64);
                for ((dx, s), x) in dx.iter_mut().zip(&*scaled).zip(x) {
                    *dx += *s * r - *x * c;
                }
            }
        });
    }
}
