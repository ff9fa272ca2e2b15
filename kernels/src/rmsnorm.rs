//! RMSNorm (arXiv 1910.07467): y = g · x / √(mean(x²) + ε), row by row.

use crate::{Cpu, Element, Real, reduce, scratch};
use rayon::prelude::*;

/// Rows per task, and rows whose share of the gain's gradient is summed before it is added to
/// the others': changing it changes bits.
pub const ROWS: usize = 32;

/// y = rmsnorm(x) · gain; x and y are rows of `gain.len()`.
///
/// # Panics
/// Where lengths differ.
pub fn forward<E: Element>(cpu: &Cpu, x: &[E::Sum], gain: &[E], epsilon: E::Sum, y: &mut [E]) {
    assert_eq!(x.len(), y.len());
    let (family, rows) = (cpu.family(), ROWS * gain.len());
    cpu.install(|| {
        y.par_chunks_mut(rows)
            .zip(x.par_chunks(rows))
            .for_each(|(y, x)| forward_rows(family, x, gain, epsilon, y));
    });
}

/// Values of a gain's gradient of so many rows before they are added up: a share for each [`ROWS`].
#[must_use]
pub fn shares(rows: usize, dim: usize) -> usize {
    rows.div_ceil(ROWS) * dim
}

/// `dgain` += its shares, one after the other.
pub fn add_shares<R: Real>(shares: &[R], dgain: &mut [R]) {
    for share in shares.chunks_exact(dgain.len()) {
        for (total, part) in dgain.iter_mut().zip(share) {
            *total += *part;
        }
    }
}

/// Adds the gradient through rmsnorm: `dx` += ∂/∂x, `dgain` += ∂/∂gain, given `dy`; and rounds
/// what `dx` is then to `rounded`, for the products that follow.
///
/// With r = 1/√(mean(x²) + ε): dgain = Σ_rows dy·x·r and
/// dx = r·(g·dy) − x·r³/d · Σ(g·dy·x).
///
/// # Panics
/// Where lengths differ.
#[allow(clippy::too_many_arguments, reason = "what goes in and what comes out, each once")]
pub fn backward<E: Element>(
    cpu: &Cpu,
    dy: &[E::Sum],
    x: &[E::Sum],
    gain: &[E],
    epsilon: E::Sum,
    dx: &mut [E::Sum],
    rounded: &mut [E],
    dgain: &mut [E::Sum],
) {
    let d = gain.len();
    assert!(dy.len() == x.len() && dx.len() == x.len() && rounded.len() == x.len() && dgain.len() == d);
    let (family, rows) = (cpu.family(), ROWS * d);
    scratch::with(shares(x.len() / d, d), |shares| {
        cpu.install(|| {
            let x = x.par_chunks(rows).zip(dy.par_chunks(rows));
            let out = dx.par_chunks_mut(rows).zip(rounded.par_chunks_mut(rows));
            let out = out.zip(shares.par_chunks_mut(d));
            out.zip(x).for_each(|((out, share), (x, dy))| {
                backward_rows(family, dy, x, gain, epsilon, out, share);
            });
        });
        add_shares(shares, dgain);
    });
}

#[inline(always)]
fn inverse_rms<R: Real>(x: &[R], epsilon: R) -> R {
    let mean = reduce::sum(x, |x| x * x) / R::from_f64(x.len() as f64);
    R::ONE / (mean + epsilon).sqrt()
}

kernel! {
    /// As [`forward`], on this thread alone.
    ///
    /// # Panics
    /// Where rows are not whole.
    pub fn forward_rows<E: Element>(x: &[E::Sum], gain: &[E], epsilon: E::Sum, y: &mut [E]) {
        for (x, y) in x.chunks_exact(gain.len()).zip(y.chunks_exact_mut(gain.len())) {
            let r = inverse_rms(x, epsilon);
            for ((y, x), g) in y.iter_mut().zip(x).zip(gain) {
                *y = E::narrow(*x * r * g.widen());
            }
        }
    }
}

kernel! {
    /// As [`backward`] for rows from a multiple of [`ROWS`] on, on this thread alone: `out` is dx and
    /// what it is rounded to, and the [`shares`] of the gain's gradient are set.
    ///
    /// # Panics
    /// Where lengths do not fit.
    pub fn backward_rows<E: Element>(
        dy: &[E::Sum],
        x: &[E::Sum],
        gain: &[E],
        epsilon: E::Sum,
        out: (&mut [E::Sum], &mut [E]),
        shares: &mut [E::Sum],
    ) {
        let (d, (dx, rounded)) = (gain.len(), out);
        shares.fill(E::Sum::ZERO);
        scratch::with(d, |scaled: &mut [E::Sum]| {
            let out = dx.chunks_exact_mut(d).zip(rounded.chunks_exact_mut(d));
            let rows = dy.chunks_exact(d).zip(x.chunks_exact(d)).zip(out);
            for (i, ((dy, x), (dx, rounded))) in rows.enumerate() {
                let share = &mut shares[i / ROWS * d..][..d];
                let r = inverse_rms(x, epsilon);
                for (((s, dg), dy), (x, g)) in
                    scaled.iter_mut().zip(share).zip(dy).zip(x.iter().zip(gain))
                {
                    *s = *dy * g.widen();
                    *dg += *dy * *x * r;
                }
                let along = reduce::sum2(scaled, x, |s, x| s * x);
                let c = along * r * r * r / E::Sum::from_f64(d as f64);
                for ((dx, rounded), (s, x)) in dx.iter_mut().zip(rounded).zip(scaled.iter().zip(x)) {
                    *dx += *s * r - *x * c;
                    *rounded = E::narrow(*dx);
                }
            }
        });
    }
}
