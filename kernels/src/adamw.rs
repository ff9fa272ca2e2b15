//! AdamW (arXiv 1711.05101, algorithm 2), in PyTorch's order of operations, with the rounded copy
//! of the weights where they are not their own master weights.

use crate::add::narrow_chunk;
use crate::{Cpu, Element, Real};
use rayon::prelude::*;

/// Elements that a thread takes at a time.
const CHUNK: usize = 1 << 14;

/// One update's numbers, in f64; each is rounded once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Update {
    /// The number of this update, 1 for the first.
    pub step: u64,
    /// Learning rate of this update.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay; 0 for parameters that are not decayed.
    pub weight_decay: f64,
    /// What gradients are multiplied by first (clipping).
    pub scale: f64,
}

/// The factors that the loop needs.
#[derive(Clone, Copy)]
struct Factors<R> {
    scale: R,
    keep: R,
    beta1: R,
    beta2: R,
    rest1: R,
    rest2: R,
    step_size: R,
    root: R,
    epsilon: R,
}

impl Update {
    fn factors<R: Real>(&self) -> Factors<R> {
        // libm's power and not the platform's: the same bits with every C library.
        let correction = |beta: f64| 1.0 - libm::pow(beta, self.step as f64);
        Factors {
            scale: R::from_f64(self.scale),
            keep: R::from_f64(1.0 - self.learning_rate * self.weight_decay),
            beta1: R::from_f64(self.beta1),
            beta2: R::from_f64(self.beta2),
            rest1: R::from_f64(1.0 - self.beta1),
            rest2: R::from_f64(1.0 - self.beta2),
            step_size: R::from_f64(self.learning_rate / correction(self.beta1)),
            root: R::from_f64(correction(self.beta2).sqrt()),
            epsilon: R::from_f64(self.epsilon),
        }
    }
}

/// Updates weights and moments in place from the gradient. `master` are the master weights, to
/// whose new values `weights` are rounded; empty where the weights are the master weights.
///
/// # Panics
/// Where lengths differ.
pub fn adamw<E: Element>(
    cpu: &Cpu,
    update: &Update,
    gradient: &[E::Sum],
    weights: &mut [E],
    master: &mut [E::Sum],
    m: &mut [E::Sum],
    v: &mut [E::Sum],
) {
    let n = weights.len();
    assert!(gradient.len() == n && m.len() == n && v.len() == n);
    assert!(if E::IS_SUM { master.is_empty() } else { master.len() == n });
    let (family, factors) = (cpu.family(), update.factors::<E::Sum>());
    cpu.install(|| {
        let moments = m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK));
        let chunks = weights.par_chunks_mut(CHUNK).zip(gradient.par_chunks(CHUNK)).zip(moments);
        if E::IS_SUM {
            chunks.for_each(|((w, g), (m, v))| apply(family, factors, g, bytemuck::cast_slice_mut(w), m, v));
        } else {
            let chunks = chunks.zip(master.par_chunks_mut(CHUNK));
            chunks.for_each(|(((w, g), (m, v)), master)| {
                apply(family, factors, g, master, m, v);
                narrow_chunk(family, w, master);
            });
        }
    });
}

kernel! {
    fn apply<R>(f: Factors<R>, gradient: &[R], weights: &mut [R], m: &mut [R], v: &mut [R]) {
        for ((w, g), (m, v)) in weights.iter_mut().zip(gradient).zip(m.iter_mut().zip(v)) {
            let g = *g * f.scale;
            *m = f.beta1 * *m + f.rest1 * g;
            *v = f.beta2 * *v + f.rest2 * (g * g);
            let denominator = (*v).sqrt() / f.root + f.epsilon;
            *w = *w * f.keep - f.step_size * (*m / denominator);
        }
    }
}
