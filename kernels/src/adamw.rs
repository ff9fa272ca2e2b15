//! AdamW (arXiv 1711.05101, algorithm 2), in PyTorch's order of operations, with the rounded copy
//! of the weights where they are not their own master weights.

// Chunks of four vectors are dealt to threads.
#![allow(unsafe_code)]

use crate::add::narrow_chunk;
use crate::checksum::{self, CHUNK};
use crate::target::Target;
use crate::{Cpu, Element, Family, Real};
use std::ops::Range;

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

/// What an update changes; all of one length.
#[derive(Debug)]
pub struct Trained<'a, E: Element> {
    /// The weights that are computed with.
    pub weights: &'a mut [E],
    /// The master weights, which `weights` are rounded from; empty where the weights are the
    /// master weights.
    pub master: &'a mut [E::Sum],
    /// First moments.
    pub m: &'a mut [E::Sum],
    /// Second moments.
    pub v: &'a mut [E::Sum],
}

/// [Checksums](checksum) of weights, and of master weights and both moments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sums {
    /// Of the weights.
    pub weights: u32,
    /// Of master weights, first and second moments, one after the other.
    pub moments: u32,
}

/// Updates weights and moments in place from the gradient: each run of elements, which tile them,
/// with its own numbers. Returns the checksums of what was there before and of what is there
/// now, taken while it passes through the caches.
///
/// # Panics
/// Where lengths differ.
pub fn adamw<E: Element>(
    cpu: &Cpu,
    runs: &[(Range<usize>, Update)],
    gradient: &[E::Sum],
    trained: Trained<'_, E>,
) -> [Sums; 2] {
    let Trained { weights, master, m, v } = trained;
    let n = weights.len();
    assert!(gradient.len() == n && m.len() == n && v.len() == n);
    assert!(if E::IS_SUM { master.is_empty() } else { master.len() == n });
    assert_eq!(runs.iter().map(|(run, _)| run.len()).sum::<usize>(), n);
    let runs: Vec<_> = runs.iter().map(|(run, update)| (run.clone(), update.factors::<E::Sum>())).collect();
    let (family, chunks) = (cpu.family(), n.div_ceil(CHUNK));
    let (weights, master) = (Target::new(weights), Target::new(master));
    let (m, v) = (Target::new(m), Target::new(v));
    let tasks: Vec<usize> = (0..chunks).collect();
    let sums = cpu.map(&tasks, |chunk| {
        let (start, len) = (chunk * CHUNK, CHUNK.min(n - chunk * CHUNK));
        // SAFETY: chunks are disjoint and within the slices, whose lengths were compared and whose
        // exclusive borrows outlive the tasks.
        let mut part = unsafe {
            Trained {
                weights: weights.part(start, len),
                master: if E::IS_SUM { &mut [] } else { master.part(start, len) },
                m: m.part(start, len),
                v: v.part(start, len),
            }
        };
        let before = part.sums();
        for (run, factors) in &runs {
            let run = run.start.max(start)..run.end.min(start + len);
            if !run.is_empty() {
                let gradient = &gradient[run.clone()];
                part.update(family, *factors, gradient, run.start - start..run.end - start);
            }
        }
        [before, part.sums()]
    });
    [0, 1].map(|time| {
        let of = |vector: usize| sums.iter().map(move |sums| sums[time][vector]);
        let moments = of(1).filter(|_| !E::IS_SUM).chain(of(2)).chain(of(3));
        Sums { weights: checksum::fold(of(0)), moments: checksum::fold(moments) }
    })
}

impl<E: Element> Trained<'_, E> {
    /// Of each vector of a chunk.
    fn sums(&self) -> [u32; 4] {
        let Self { weights, master, m, v } = self;
        [checksum::chunk(weights), checksum::chunk(master), checksum::chunk(m), checksum::chunk(v)]
    }

    fn update(&mut self, family: Family, factors: Factors<E::Sum>, gradient: &[E::Sum], run: Range<usize>) {
        let Self { weights, master, m, v } = self;
        let (weights, m, v) = (&mut weights[run.clone()], &mut m[run.clone()], &mut v[run.clone()]);
        if E::IS_SUM {
            return apply(family, factors, gradient, bytemuck::cast_slice_mut(weights), m, v);
        }
        apply(family, factors, gradient, &mut master[run.clone()], m, v);
        narrow_chunk(family, weights, &master[run]);
    }
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
