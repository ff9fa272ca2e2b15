//! One layer, forward and back.
//!
//! What goes row by row is done by one task for as many rows as stay in its cache, one operation
//! after the other. Tasks meet for attention and for the gradients of weights, which go across rows.

use super::{Kept, Memory, Model};
use crate::layout::Layout;
use caravan_kernels::attention::{self, Inputs};
use caravan_kernels::matmul::{self, Into, Packed};
use caravan_kernels::rope::{self, Turn};
use caravan_kernels::{Cpu, Element, Family, View, ViewMut, rmsnorm, swiglu};
use caravan_types::MicroBatch;
use rayon::prelude::*;
use std::mem;

impl<E: Element> Model<E> {
    pub(super) fn attention_shape(&self, batch: &MicroBatch) -> attention::Shape {
        let Layout { heads, kv_heads, head, .. } = self.layout;
        let (sequences, length) = (batch.sequences, batch.length);
        attention::Shape { sequences, queries: length, keys: length, heads, kv_heads, head }
    }

    /// One layer, from the residual stream before it to what it needs for its way back and, where
    /// there is a place for it, the stream after it. `w` is its unit.
    pub(super) fn forward_layer(
        &mut self,
        cpu: &Cpu,
        w: &[E],
        batch: &MicroBatch,
        input: &[E::Sum],
        kept: &mut Kept<E>,
        next: Option<&mut [E::Sum]>,
    ) {
        let Layout { dim, hidden, .. } = self.layout;
        let (width, turned) = (self.layout.qkv(), dim + self.layout.kv());
        let (layer, epsilon, turns) = (&self.layout.layer, self.epsilon, &self.turns);
        let (before, between) = (&w[layer.attention_norm.clone()], &w[layer.mlp_norm.clone()]);
        let shape = self.attention_shape(batch);
        let (family, rows) = (cpu.family(), cpu.rows_per_task(batch.tokens.len()));
        let factors = self.layout.factors(w).map(View::t);
        let Memory { normed, product, packed, .. } = &mut self.memory;
        let [w_qkv, w_output, w_gate_up, w_down] = matmul::pack_all(cpu, factors, packed);
        let Kept { qkv, attention, lse, middle, gate_up } = kept;

        let parts = (input.par_chunks(rows * dim), normed.par_chunks_mut(rows * dim));
        cpu.deal((parts, qkv.par_chunks_mut(rows * width)), |task, ((input, normed), qkv)| {
            rmsnorm::forward_rows(family, input, before, epsilon, normed);
            times(family, normed, &w_qkv, qkv, Into::Set);
            let place = [0, task * rows, batch.length];
            rope::rope_rows(family, qkv, (width, turned), place, turns, Turn::Forward);
        });
        let inputs = Inputs::fused(qkv, &shape, &batch.document_start);
        attention::forward(cpu, &shape, &inputs, attention, lse);

        let parts = (input.par_chunks(rows * dim), attention.par_chunks(rows * dim));
        let to = (middle.par_chunks_mut(rows * dim), normed.par_chunks_mut(rows * dim));
        let to = (to, gate_up.par_chunks_mut(rows * 2 * hidden));
        cpu.deal((parts, to), |_, ((input, attention), ((middle, normed), gate_up))| {
            middle.copy_from_slice(input);
            times(family, attention, &w_output, middle, Into::Add);
            rmsnorm::forward_rows(family, middle, between, epsilon, normed);
            times(family, normed, &w_gate_up, gate_up, Into::Set);
        });
        let Some(next) = next else { return };
        let parts = (middle.par_chunks(rows * dim), gate_up.par_chunks(rows * 2 * hidden));
        let to = (product.par_chunks_mut(rows * hidden), next.par_chunks_mut(rows * dim));
        cpu.deal((parts, to), |_, ((middle, gate_up), (product, next))| {
            swiglu::forward_rows(family, gate_up, hidden, product);
            next.copy_from_slice(middle);
            times(family, product, &w_down, next, Into::Add);
        });
    }

    /// One layer back: from the gradient of the residual stream after it, which is in `dstream` and,
    /// as a factor of products, in the first of `rounded`, to that of the stream before it, which is
    /// `input`. `w` is its unit, `g` the gradient of that.
    pub(super) fn backward_layer(
        &mut self,
        cpu: &Cpu,
        w: &[E],
        g: &mut [E::Sum],
        input: &[E::Sum],
        kept: &Kept<E>,
        batch: &MicroBatch,
    ) {
        let Layout { dim, hidden, .. } = self.layout;
        let width = self.layout.qkv();
        let mut packed = mem::take(&mut self.memory.packed);
        let [qkv, output, gate_up, down] = matmul::pack_all(cpu, self.layout.factors(w), &mut packed);
        self.back_to_attention(cpu, w, g, kept, [&output, &gate_up, &down]);
        let layer = &self.layout.layer;
        let m = &mut self.memory;
        let [after, middle] = m.rounded.each_ref().map(|r| View::rows_of(r, dim));
        outer(cpu, after, &m.product, hidden, &mut g[layer.down.clone()]);
        outer(cpu, View::rows_of(&m.dgate_up, 2 * hidden), &m.normed, dim, &mut g[layer.gate_up.clone()]);
        outer(cpu, middle, &kept.attention, dim, &mut g[layer.output.clone()]);
        let shape = self.attention_shape(batch);
        let inputs = Inputs::fused(&kept.qkv, &shape, &batch.document_start);
        let m = &mut self.memory;
        let out = (&kept.attention[..], &kept.lse[..]);
        attention::backward(cpu, &shape, &inputs, out, &m.dattention, &mut m.dqkv);
        self.back_to_input(cpu, w, g, input, batch.length, &qkv);
        let m = &mut self.memory;
        outer(cpu, View::rows_of(&m.dqkv, width), &m.normed, dim, &mut g[self.layout.layer.qkv.clone()]);
        self.memory.packed = packed;
    }

    /// Through the feed-forward network and the output projection of attention, up to gradients of
    /// weights that are matrices.
    fn back_to_attention(
        &mut self,
        cpu: &Cpu,
        w: &[E],
        g: &mut [E::Sum],
        kept: &Kept<E>,
        [output, gate_up, down]: [&Packed<'_, E>; 3],
    ) {
        let Layout { dim, hidden, ref layer, .. } = self.layout;
        let (gain, epsilon) = (&w[layer.mlp_norm.clone()], self.epsilon);
        let m = &mut self.memory;
        let (family, rows) = (cpu.family(), cpu.rows_per_task(kept.middle.len() / dim));
        let [after, middle] = &mut m.rounded;
        let parts = (after.par_chunks(rows * dim), m.product.par_chunks_mut(rows * hidden));
        let wide = rows * 2 * hidden;
        let wide = (kept.gate_up.par_chunks(wide), m.dgate_up.par_chunks_mut(wide));
        let norm = (kept.middle.par_chunks(rows * dim), m.normed.par_chunks_mut(rows * dim));
        let norm = (norm, m.dnormed.par_chunks_mut(rows * dim));
        let to = (m.dstream.par_chunks_mut(rows * dim), middle.par_chunks_mut(rows * dim));
        let shares = m.shares.par_chunks_mut(rmsnorm::shares(rows, dim));
        let to = (to, shares, m.dattention.par_chunks_mut(rows * dim));
        cpu.deal(((parts, wide), (norm, to)), |_, ((parts, wide), (norm, to))| {
            let ((after, product), (both, dboth)) = (parts, wide);
            let ((x, normed), dnormed) = norm;
            let ((dstream, rounded), shares, dattention) = to;
            times(family, after, down, product, Into::Set);
            swiglu::backward_rows(family, product, both, hidden, dboth);
            times(family, dboth, gate_up, dnormed, Into::Set);
            rmsnorm::forward_rows(family, x, gain, epsilon, normed);
            rmsnorm::backward_rows(family, dnormed, x, gain, epsilon, (dstream, &mut *rounded), shares);
            times(family, rounded, output, dattention, Into::Set);
        });
        rmsnorm::add_shares(&m.shares, &mut g[layer.mlp_norm.clone()]);
    }

    /// From queries, keys and values through their projection and the norm before it, up to the
    /// gradient of the projection.
    fn back_to_input(
        &mut self,
        cpu: &Cpu,
        w: &[E],
        g: &mut [E::Sum],
        input: &[E::Sum],
        length: usize,
        qkv: &Packed<'_, E>,
    ) {
        let Layout { dim, ref layer, .. } = self.layout;
        let (width, turned) = (self.layout.qkv(), dim + self.layout.kv());
        let (gain, epsilon, turns) = (&w[layer.attention_norm.clone()], self.epsilon, &self.turns);
        let m = &mut self.memory;
        let (family, rows) = (cpu.family(), cpu.rows_per_task(input.len() / dim));
        let parts = (m.dqkv.par_chunks_mut(rows * width), m.dnormed.par_chunks_mut(rows * dim));
        let norm = (input.par_chunks(rows * dim), m.normed.par_chunks_mut(rows * dim));
        let to = (m.dstream.par_chunks_mut(rows * dim), m.rounded[0].par_chunks_mut(rows * dim));
        let to = (to, m.shares.par_chunks_mut(rmsnorm::shares(rows, dim)));
        cpu.deal((parts, (norm, to)), |task, ((dqkv, dnormed), ((x, normed), (out, shares)))| {
            let place = [0, task * rows, length];
            rope::rope_rows(family, dqkv, (width, turned), place, turns, Turn::Backward);
            times(family, dqkv, qkv, dnormed, Into::Set);
            rmsnorm::forward_rows(family, x, gain, epsilon, normed);
            rmsnorm::backward_rows(family, dnormed, x, gain, epsilon, out, shares);
        });
        rmsnorm::add_shares(&m.shares, &mut g[layer.attention_norm.clone()]);
    }
}

/// y = x·W or y += x·W, on this thread alone: rows without gaps.
fn times<E, O>(family: Family, x: &[E], w: &Packed<'_, E>, y: &mut [O], into: Into)
where
    E: Element,
    O: Element<Sum = E::Sum>,
{
    let (x, y) = (View::rows_of(x, w.depth()), ViewMut::rows_of(y, w.cols()));
    matmul::product_rows(family, x, w, y, into);
}

/// y = x·Wᵀ or y += x·Wᵀ, with W as [out, in].
pub(crate) fn product<E, O>(cpu: &Cpu, x: &[E], inputs: usize, w: &[E], y: &mut [O], into: Into)
where
    E: Element,
    O: Element<Sum = E::Sum>,
{
    let w = View::rows_of(w, inputs);
    let y = ViewMut::rows_of(y, w.rows());
    matmul::matmul(cpu, View::rows_of(x, inputs), w.t(), y, into);
}

/// dx = dy·W.
pub(crate) fn back<E, O>(cpu: &Cpu, dy: &[E], outputs: usize, w: &[E], inputs: usize, dx: &mut [O])
where
    E: Element,
    O: Element<Sum = E::Sum>,
{
    let w = View::rows_of(w, inputs);
    matmul::matmul(cpu, View::rows_of(dy, outputs), w, ViewMut::rows_of(dx, inputs), Into::Set);
}

/// dW += dyᵀ·x.
pub(crate) fn outer<E: Element>(cpu: &Cpu, dy: View<'_, E>, x: &[E], inputs: usize, dw: &mut [E::Sum]) {
    matmul::matmul(cpu, dy.t(), View::rows_of(x, inputs), ViewMut::rows_of(dw, inputs), Into::Add);
}
