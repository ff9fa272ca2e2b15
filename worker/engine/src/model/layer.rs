//! One layer, forward and back.

use super::{Flight, Kept, Model};
use crate::layout::{Layer, Layout};
use caravan_kernels::attention::{self, Inputs};
use caravan_kernels::matmul::{self, Into};
use caravan_kernels::rope::{self, Turn};
use caravan_kernels::{Cpu, Element, View, ViewMut, add, rmsnorm, swiglu};
use caravan_types::MicroBatch;

impl<E: Element> Model<E> {
    pub(super) fn attention_shape(&self, batch: &MicroBatch) -> attention::Shape {
        let Layout { heads, kv_heads, head, .. } = self.layout;
        let (sequences, length) = (batch.sequences, batch.length);
        attention::Shape { sequences, queries: length, keys: length, heads, kv_heads, head }
    }

    /// One layer; `w` is its unit, `i` counts the stage's layers.
    pub(super) fn forward_layer(&mut self, cpu: &Cpu, w: &[E], flight: &mut Flight<E>, i: usize) {
        let Layout { dim, hidden, .. } = self.layout;
        let batch = &flight.batch;
        let (n, width) = (batch.tokens.len(), self.layout.qkv());
        let shape = self.attention_shape(batch);
        let Layer { attention_norm, qkv: w_qkv, output, mlp_norm, gate_up: w_gate_up, down } =
            self.layout.layer.clone();
        let (kept, rest) = flight.kept.split_at_mut(i + 1);
        let Kept { input, qkv, attention, lse, middle, gate_up } = &mut kept[i];
        let (input, qkv) = (&input[..n * dim], &mut qkv[..n * width]);
        let (attention, lse) = (&mut attention[..n * dim], &mut lse[..n * shape.heads]);
        let (middle, gate_up) = (&mut middle[..n * dim], &mut gate_up[..n * 2 * hidden]);
        let normed = &mut self.memory.normed[..n * dim];
        let activated = &mut self.memory.product[..n * hidden];
        let next = &mut rest[0].input[..n * dim];

        rmsnorm::forward(cpu, input, &w[attention_norm], self.epsilon, normed);
        product(cpu, normed, dim, &w[w_qkv], qkv, Into::Set);
        let turned = dim + self.layout.kv();
        rope::rope(cpu, qkv, width, turned, (0, batch.length), &self.turns, Turn::Forward);
        let inputs = Inputs::fused(qkv, &shape, &batch.document_start);
        attention::forward(cpu, &shape, &inputs, attention, lse);
        add::copy(cpu, middle, input);
        product(cpu, attention, dim, &w[output], middle, Into::Add);

        rmsnorm::forward(cpu, middle, &w[mlp_norm], self.epsilon, normed);
        product(cpu, normed, dim, &w[w_gate_up], gate_up, Into::Set);
        swiglu::forward(cpu, gate_up, hidden, activated);
        add::copy(cpu, next, middle);
        product(cpu, activated, hidden, &w[down], next, Into::Add);
    }

    pub(super) fn backward_mlp(&mut self, cpu: &Cpu, w: &[E], g: &mut [E::Sum], kept: &Kept<E>, n: usize) {
        let Layout { dim, hidden, .. } = self.layout;
        let layer = &self.layout.layer;
        let m = &mut self.memory;
        let (normed, dnormed) = (&mut m.normed[..n * dim], &mut m.dnormed[..n * dim]);
        let (activated, dgate_up) = (&mut m.product[..n * hidden], &mut m.dgate_up[..n * 2 * hidden]);
        let (dstream, rounded) = (&mut m.dstream[..n * dim], &mut m.rounded[..n * dim]);
        let middle = &kept.middle[..n * dim];
        let gate_up = &kept.gate_up[..n * 2 * hidden];
        let gain = layer.mlp_norm.clone();

        back(cpu, rounded, dim, &w[layer.down.clone()], hidden, activated);
        swiglu::backward(cpu, activated, gate_up, hidden, dgate_up);
        outer(cpu, View::rows_of(rounded, dim), activated, hidden, &mut g[layer.down.clone()]);
        back(cpu, dgate_up, 2 * hidden, &w[layer.gate_up.clone()], dim, dnormed);
        rmsnorm::forward(cpu, middle, &w[gain.clone()], self.epsilon, normed);
        outer(cpu, View::rows_of(dgate_up, 2 * hidden), normed, dim, &mut g[layer.gate_up.clone()]);
        let dgain = &mut g[gain.clone()];
        rmsnorm::backward(cpu, dnormed, middle, &w[gain], self.epsilon, dstream, rounded, dgain);
    }

    pub(super) fn backward_attention(
        &mut self,
        cpu: &Cpu,
        w: &[E],
        g: &mut [E::Sum],
        kept: &Kept<E>,
        batch: &MicroBatch,
    ) {
        let dim = self.layout.dim;
        let (n, width) = (batch.tokens.len(), self.layout.qkv());
        let shape = self.attention_shape(batch);
        let layer = &self.layout.layer;
        let m = &mut self.memory;
        let (normed, dnormed) = (&mut m.normed[..n * dim], &mut m.dnormed[..n * dim]);
        let (dqkv, dattention) = (&mut m.dqkv[..n * width], &mut m.dattention[..n * dim]);
        let (dstream, rounded) = (&mut m.dstream[..n * dim], &mut m.rounded[..n * dim]);
        let (input, qkv) = (&kept.input[..n * dim], &kept.qkv[..n * width]);
        let (out, lse) = (&kept.attention[..n * dim], &kept.lse[..n * shape.heads]);
        let gain = layer.attention_norm.clone();

        back(cpu, rounded, dim, &w[layer.output.clone()], dim, dattention);
        outer(cpu, View::rows_of(rounded, dim), out, dim, &mut g[layer.output.clone()]);
        let inputs = Inputs::fused(qkv, &shape, &batch.document_start);
        attention::backward(cpu, &shape, &inputs, (out, lse), dattention, dqkv);
        let turned = dim + self.layout.kv();
        rope::rope(cpu, dqkv, width, turned, (0, batch.length), &self.turns, Turn::Backward);
        back(cpu, dqkv, width, &w[layer.qkv.clone()], dim, dnormed);
        rmsnorm::forward(cpu, input, &w[gain.clone()], self.epsilon, normed);
        outer(cpu, View::rows_of(dqkv, width), normed, dim, &mut g[layer.qkv.clone()]);
        let dgain = &mut g[gain.clone()];
        rmsnorm::backward(cpu, dnormed, input, &w[gain], self.epsilon, dstream, rounded, dgain);
    }
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
