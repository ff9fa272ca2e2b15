//! Final norm and head: logits, loss, and their gradient.

use super::layer::{outer, product};
use super::{Flight, Model, Stop};
use crate::layout::Layout;
use caravan_kernels::matmul::{self, Into};
use caravan_kernels::{Cpu, Element, Real, View, ViewMut, add, cross_entropy, rmsnorm};
use caravan_types::{MicroBatch, cost};

impl<E: Element> Model<E> {
    /// The logits of every position, for comparisons: rows of `vocab`. Weights are flat.
    ///
    /// # Errors
    /// Where the micro-batch does not fit the model: the reason.
    pub fn logits(&mut self, cpu: &Cpu, weights: &[E], batch: &MicroBatch) -> Result<Vec<E::Sum>, String> {
        let weights = self.layout.split(weights);
        let flight = self.forward(cpu, &weights, batch.clone(), None, &|_| false)?.unwrap_or_default();
        let n = batch.tokens.len();
        let mut logits = vec![E::Sum::ZERO; n * self.layout.vocab];
        let last = weights[self.layout.layers + 1];
        self.final_norm(cpu, last, &flight, n);
        let head = &last[self.layout.head_weight.clone()];
        let normed = &self.memory.normed[..n * self.layout.dim];
        product(cpu, normed, self.layout.dim, head, &mut logits, Into::Set);
        self.spare.push(flight);
        Ok(logits)
    }

    /// Normalises the residual stream after the last layer into `normed`; `w` is the last unit.
    pub(super) fn final_norm(&mut self, cpu: &Cpu, w: &[E], flight: &Flight<E>, n: usize) {
        let gain = &w[self.layout.final_norm.clone()];
        let normed = &mut self.memory.normed[..n * self.layout.dim];
        let stream = flight.streams.last().map_or(&[][..], |last| &last[..normed.len()]);
        rmsnorm::forward(cpu, stream, gain, self.epsilon, normed);
    }

    /// Final norm, head and loss, forward and backward, a chunk of logits at a time. Leaves
    /// the gradient of the residual stream in `dstream`. `w` is the last unit, `g` its gradient.
    pub(super) fn head(
        &mut self,
        cpu: &Cpu,
        w: &[E],
        g: &mut [E::Sum],
        flight: &Flight<E>,
        scale: f64,
        stop: &Stop<'_>,
    ) -> Option<f64> {
        let Layout { dim, vocab, .. } = self.layout;
        let batch = &flight.batch;
        let n = batch.tokens.len();
        self.final_norm(cpu, w, flight, n);
        let m = &mut self.memory;
        let head = View::rows_of(&w[self.layout.head_weight.clone()], dim);
        let [forward, backward] = &mut m.head;
        let forward = matmul::pack(cpu, head.t(), forward);
        let backward = matmul::pack(cpu, head, backward);
        let (chunk, share) = logit_rows::<E>(vocab);
        for start in (0..n).step_by(share) {
            let share = start..(start + share).min(n);
            let dlogits = &mut m.dlogits[..share.len() * vocab];
            for row in share.clone().step_by(chunk) {
                if stop(self.layout.layers as u32 + 1) {
                    return None;
                }
                let rows = row..(row + chunk).min(share.end);
                let logits = &mut m.logits[..rows.len() * vocab];
                let normed = View::rows_of(&m.normed[rows.start * dim..rows.end * dim], dim);
                matmul::product(cpu, normed, &forward, ViewMut::rows_of(logits, vocab), Into::Set);
                let dlogits = &mut dlogits[(row - start) * vocab..][..rows.len() * vocab];
                let (targets, counted) = (&batch.targets[rows.clone()], &batch.counted[rows.clone()]);
                let losses = &mut m.losses[rows];
                cross_entropy::forward_backward(cpu, logits, dlogits, vocab, targets, counted, scale, losses);
            }
            let dlogits = View::rows_of(dlogits, vocab);
            let share = share.start * dim..share.end * dim;
            let dnormed = ViewMut::rows_of(&mut m.dnormed[share.clone()], dim);
            matmul::product(cpu, dlogits, &backward, dnormed, Into::Set);
            outer(cpu, dlogits, &m.normed[share], dim, &mut g[self.layout.head_weight.clone()]);
        }
        let gain = self.layout.final_norm.clone();
        let (dnormed, dstream) = (&m.dnormed[..n * dim], &mut m.dstream[..n * dim]);
        let rounded = &mut m.rounded[0][..n * dim];
        let stream = flight.streams.last().map_or(&[][..], |last| &last[..n * dim]);
        add::zero(cpu, dstream);
        let dgain = &mut g[gain.clone()];
        rmsnorm::backward(cpu, dnormed, stream, &w[gain], self.epsilon, dstream, rounded, dgain);
        Some(m.losses[..n].iter().sum())
    }
}

/// Rows of logits, and of their gradients, that exist at a time.
pub(super) fn logit_rows<E>(vocab: usize) -> (usize, usize) {
    let rows = |logits| cost::logit_rows(logits, vocab as u64) as usize;
    (rows(cost::LOGITS), rows(cost::LOGIT_GRADIENTS / size_of::<E>() as u64))
}
