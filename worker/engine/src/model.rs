//! Forward and backward of one micro-batch through a Llama.
//!
//! A [`Model`] holds shapes, tables and working memory, no weights: those come as one flat
//! slice in the layout of [`caravan_types::model`], and gradients are added into another of
//! that layout. Memory is taken at the first micro-batch and used again for all that follow.
//!
//! What is kept for the backward pass is the input of each norm, rotated queries, keys and
//! values, the output of attention, and gate and up. Norms and the product of gate and up
//! are computed again: that costs one pass over data which is read then anyway.

use crate::EngineError;
use crate::layout::{Layer, Layout};
use caravan_kernels::attention::{self, Inputs};
use caravan_kernels::matmul::{self, Into};
use caravan_kernels::rope::{self, Turn};
use caravan_kernels::{Cpu, Real, View, ViewMut, add, cross_entropy, embedding, rmsnorm, swiglu};
use caravan_types::{MicroBatch, ModelShape};

/// Logits that exist at a time, about 32 MiB of f32: large enough that adding a chunk's share
/// to the head's gradient costs little against computing it, small enough for a last-level
/// cache. Gradients of the head are summed chunk by chunk: changing it changes bits.
const LOGITS: usize = 1 << 23;

/// What one layer keeps for its backward pass; a row per token.
#[derive(Debug, Default)]
struct Kept<R> {
    /// Input of the layer, [dim].
    input: Vec<R>,
    /// Rotated queries and keys, and values.
    qkv: Vec<R>,
    /// Output of attention, [dim].
    attention: Vec<R>,
    /// Logarithms of attention's sums, [heads].
    lse: Vec<R>,
    /// The residual stream between attention and feed-forward network, [dim].
    middle: Vec<R>,
    /// Gate and up, [2·hidden].
    gate_up: Vec<R>,
}

/// Working memory that layers share.
#[derive(Debug, Default)]
struct Memory<R> {
    /// Normalised rows, [dim].
    normed: Vec<R>,
    /// The product of gate and up, and its gradient, [hidden].
    product: Vec<R>,
    /// Gradient of gate and up, [2·hidden].
    dgate_up: Vec<R>,
    /// Gradient of queries, keys and values.
    dqkv: Vec<R>,
    /// Gradient of what a norm or attention put out, [dim].
    dnormed: Vec<R>,
    /// Gradient of the residual stream, [dim].
    dstream: Vec<R>,
    /// A chunk of logits, and of their gradient.
    logits: Vec<R>,
    /// The head, packed for logits and for the gradient of their input.
    head: [Vec<R>; 2],
    /// Each token's loss.
    losses: Vec<f64>,
}

/// A Llama without weights.
#[derive(Debug)]
pub struct Model<R> {
    layout: Layout,
    epsilon: R,
    turns: rope::Table<R>,
    /// One a layer, and the residual stream after the last one in `input` of the last.
    kept: Vec<Kept<R>>,
    memory: Memory<R>,
}

impl<R: Real> Model<R> {
    /// A model of that shape.
    ///
    /// # Errors
    /// Where the shape contradicts itself.
    pub fn new(shape: &ModelShape) -> Result<Self, EngineError> {
        let layout = Layout::new(shape)?;
        Ok(Self {
            epsilon: R::from_f64(f64::from(shape.norm_eps)),
            turns: rope::Table::new(layout.context, layout.head, f64::from(shape.rope_theta)),
            kept: (0..=layout.layers.len()).map(|_| Kept::default()).collect(),
            memory: Memory::default(),
            layout,
        })
    }

    /// Where tensors lie.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Adds the gradient of `scale` · Σ_counted −log p(target) to `gradient` and returns that
    /// sum. `stop` is asked between layers; once it says so, the answer is none and
    /// `gradient` is good for nothing.
    ///
    /// # Errors
    /// Where the micro-batch does not fit the model: the reason.
    pub fn gradient(
        &mut self,
        cpu: &Cpu,
        weights: &[R],
        gradient: &mut [R],
        batch: &MicroBatch,
        scale: f64,
        stop: &(dyn Fn() -> bool + Sync),
    ) -> Result<Option<f64>, String> {
        check(&self.layout, batch)?;
        self.reserve(cpu, batch.sequences * batch.length);
        Ok(cpu.install(|| {
            if !self.forward(cpu, weights, batch, stop) {
                return None;
            }
            let loss = self.head(cpu, weights, gradient, batch, scale, stop)?;
            self.backward(cpu, weights, gradient, batch, stop).then_some(loss)
        }))
    }

    /// The logits of every position, for comparisons: rows of `vocab`.
    ///
    /// # Errors
    /// Where the micro-batch does not fit the model: the reason.
    pub fn logits(&mut self, cpu: &Cpu, weights: &[R], batch: &MicroBatch) -> Result<Vec<R>, String> {
        check(&self.layout, batch)?;
        let n = batch.sequences * batch.length;
        self.reserve(cpu, n);
        self.forward(cpu, weights, batch, &|| false);
        let mut logits = vec![R::ZERO; n * self.layout.vocab];
        self.final_norm(cpu, weights, n);
        let head = &weights[self.layout.head_weight.clone()];
        let normed = &self.memory.normed[..n * self.layout.dim];
        product(cpu, normed, self.layout.dim, head, &mut logits, Into::Set);
        Ok(logits)
    }

    /// Takes memory for `n` tokens.
    fn reserve(&mut self, cpu: &Cpu, n: usize) {
        let Layout { dim, heads, hidden, vocab, .. } = self.layout;
        let qkv = self.layout.qkv();
        let last = self.layout.layers.len();
        for (i, kept) in self.kept.iter_mut().enumerate() {
            grow(&mut kept.input, n * dim);
            if i < last {
                grow(&mut kept.qkv, n * qkv);
                grow(&mut kept.attention, n * dim);
                grow(&mut kept.lse, n * heads);
                grow(&mut kept.middle, n * dim);
                grow(&mut kept.gate_up, n * 2 * hidden);
            }
        }
        let m = &mut self.memory;
        grow(&mut m.normed, n * dim);
        grow(&mut m.product, n * hidden);
        grow(&mut m.dgate_up, n * 2 * hidden);
        grow(&mut m.dqkv, n * qkv);
        grow(&mut m.dnormed, n * dim);
        grow(&mut m.dstream, n * dim);
        grow(&mut m.logits, chunk_rows(vocab).min(n) * vocab);
        grow(&mut m.losses, n);
        grow(&mut m.head[0], matmul::packed_len::<R>(dim, vocab, cpu.family()));
        grow(&mut m.head[1], matmul::packed_len::<R>(vocab, dim, cpu.family()));
    }

    fn attention_shape(&self, batch: &MicroBatch) -> attention::Shape {
        let Layout { heads, kv_heads, head, .. } = self.layout;
        let (sequences, length) = (batch.sequences, batch.length);
        attention::Shape { sequences, queries: length, keys: length, heads, kv_heads, head }
    }

    /// Fills `kept`; false where it was stopped.
    fn forward(&mut self, cpu: &Cpu, weights: &[R], batch: &MicroBatch, stop: &dyn Fn() -> bool) -> bool {
        let dim = self.layout.dim;
        let n = batch.tokens.len();
        let table = &weights[self.layout.embedding.clone()];
        embedding::forward(cpu, &batch.tokens, table, dim, &mut self.kept[0].input[..n * dim]);
        for l in 0..self.layout.layers.len() {
            if stop() {
                return false;
            }
            self.forward_layer(cpu, weights, batch, l);
        }
        true
    }

    fn forward_layer(&mut self, cpu: &Cpu, weights: &[R], batch: &MicroBatch, l: usize) {
        let Layout { dim, hidden, .. } = self.layout;
        let (n, width) = (batch.tokens.len(), self.layout.qkv());
        let shape = self.attention_shape(batch);
        let Layer { attention_norm, qkv: w_qkv, output, mlp_norm, gate_up: w_gate_up, down } =
            self.layout.layers[l].clone();
        let (kept, rest) = self.kept.split_at_mut(l + 1);
        let Kept { input, qkv, attention, lse, middle, gate_up } = &mut kept[l];
        let (input, qkv) = (&input[..n * dim], &mut qkv[..n * width]);
        let (attention, lse) = (&mut attention[..n * dim], &mut lse[..n * shape.heads]);
        let (middle, gate_up) = (&mut middle[..n * dim], &mut gate_up[..n * 2 * hidden]);
        let normed = &mut self.memory.normed[..n * dim];
        let activated = &mut self.memory.product[..n * hidden];
        let next = &mut rest[0].input[..n * dim];

        rmsnorm::forward(cpu, input, &weights[attention_norm], self.epsilon, normed);
        product(cpu, normed, dim, &weights[w_qkv], qkv, Into::Set);
        let turned = dim + self.layout.kv();
        rope::rope(cpu, qkv, width, turned, (0, batch.length), &self.turns, Turn::Forward);
        let inputs = Inputs::fused(qkv, &shape, &batch.document_start);
        attention::forward(cpu, &shape, &inputs, attention, lse);
        add::copy(cpu, middle, input);
        product(cpu, attention, dim, &weights[output], middle, Into::Add);

        rmsnorm::forward(cpu, middle, &weights[mlp_norm], self.epsilon, normed);
        product(cpu, normed, dim, &weights[w_gate_up], gate_up, Into::Set);
        swiglu::forward(cpu, gate_up, hidden, activated);
        add::copy(cpu, next, middle);
        product(cpu, activated, hidden, &weights[down], next, Into::Add);
    }

    /// Normalises the residual stream after the last layer into `normed`.
    fn final_norm(&mut self, cpu: &Cpu, weights: &[R], n: usize) {
        let dim = self.layout.dim;
        let stream = &self.kept[self.layout.layers.len()].input[..n * dim];
        let gain = &weights[self.layout.final_norm.clone()];
        rmsnorm::forward(cpu, stream, gain, self.epsilon, &mut self.memory.normed[..n * dim]);
    }

    /// Final norm, head and loss, forward and backward, a chunk of logits at a time. Leaves
    /// the gradient of the residual stream in `dstream`.
    fn head(
        &mut self,
        cpu: &Cpu,
        weights: &[R],
        gradient: &mut [R],
        batch: &MicroBatch,
        scale: f64,
        stop: &dyn Fn() -> bool,
    ) -> Option<f64> {
        let Layout { dim, vocab, .. } = self.layout;
        let n = batch.tokens.len();
        self.final_norm(cpu, weights, n);
        let m = &mut self.memory;
        let head = View::rows_of(&weights[self.layout.head_weight.clone()], dim);
        let [forward, backward] = &mut m.head;
        let forward = matmul::pack(cpu, head.t(), forward);
        let backward = matmul::pack(cpu, head, backward);
        let chunk = chunk_rows(vocab);
        for start in (0..n).step_by(chunk) {
            if stop() {
                return None;
            }
            let rows = start..(start + chunk).min(n);
            let logits = &mut m.logits[..rows.len() * vocab];
            let normed = &m.normed[rows.start * dim..rows.end * dim];
            let dnormed = &mut m.dnormed[rows.start * dim..rows.end * dim];
            let into = ViewMut::rows_of(logits, vocab);
            matmul::product(cpu, View::rows_of(normed, dim), &forward, into, Into::Set);
            let (targets, counted) = (&batch.targets[rows.clone()], &batch.counted[rows.clone()]);
            let losses = &mut m.losses[rows];
            cross_entropy::forward_backward(cpu, logits, vocab, targets, counted, scale, losses);
            let dlogits = View::rows_of(logits, vocab);
            matmul::product(cpu, dlogits, &backward, ViewMut::rows_of(dnormed, dim), Into::Set);
            outer(cpu, logits, vocab, normed, dim, &mut gradient[self.layout.head_weight.clone()]);
        }
        let stream = &self.kept[self.layout.layers.len()].input[..n * dim];
        let gain = self.layout.final_norm.clone();
        let (dnormed, dstream) = (&m.dnormed[..n * dim], &mut m.dstream[..n * dim]);
        add::zero(cpu, dstream);
        let dgain = &mut gradient[gain.clone()];
        rmsnorm::backward(cpu, dnormed, stream, &weights[gain], self.epsilon, dstream, dgain);
        Some(m.losses[..n].iter().sum())
    }

    /// The layers from last to first, then the embedding; false where it was stopped.
    fn backward(
        &mut self,
        cpu: &Cpu,
        weights: &[R],
        gradient: &mut [R],
        batch: &MicroBatch,
        stop: &dyn Fn() -> bool,
    ) -> bool {
        for l in (0..self.layout.layers.len()).rev() {
            if stop() {
                return false;
            }
            self.backward_mlp(cpu, weights, gradient, batch.tokens.len(), l);
            self.backward_attention(cpu, weights, gradient, batch, l);
        }
        let dim = self.layout.dim;
        let dstream = &self.memory.dstream[..batch.tokens.len() * dim];
        let table = &mut gradient[self.layout.embedding.clone()];
        embedding::backward(cpu, &batch.tokens, dstream, dim, table);
        true
    }

    fn backward_mlp(&mut self, cpu: &Cpu, weights: &[R], gradient: &mut [R], n: usize, l: usize) {
        let Layout { dim, hidden, .. } = self.layout;
        let layer = &self.layout.layers[l];
        let m = &mut self.memory;
        let (normed, dnormed) = (&mut m.normed[..n * dim], &mut m.dnormed[..n * dim]);
        let (activated, dgate_up) = (&mut m.product[..n * hidden], &mut m.dgate_up[..n * 2 * hidden]);
        let dstream = &mut m.dstream[..n * dim];
        let middle = &self.kept[l].middle[..n * dim];
        let gate_up = &self.kept[l].gate_up[..n * 2 * hidden];
        let gain = layer.mlp_norm.clone();

        back(cpu, dstream, dim, &weights[layer.down.clone()], hidden, activated);
        swiglu::backward(cpu, activated, gate_up, hidden, dgate_up);
        outer(cpu, dstream, dim, activated, hidden, &mut gradient[layer.down.clone()]);
        back(cpu, dgate_up, 2 * hidden, &weights[layer.gate_up.clone()], dim, dnormed);
        rmsnorm::forward(cpu, middle, &weights[gain.clone()], self.epsilon, normed);
        outer(cpu, dgate_up, 2 * hidden, normed, dim, &mut gradient[layer.gate_up.clone()]);
        let dgain = &mut gradient[gain.clone()];
        rmsnorm::backward(cpu, dnormed, middle, &weights[gain], self.epsilon, dstream, dgain);
    }

    fn backward_attention(
        &mut self,
        cpu: &Cpu,
        weights: &[R],
        gradient: &mut [R],
        batch: &MicroBatch,
        l: usize,
    ) {
        let dim = self.layout.dim;
        let (n, width) = (batch.tokens.len(), self.layout.qkv());
        let shape = self.attention_shape(batch);
        let layer = &self.layout.layers[l];
        let m = &mut self.memory;
        let (normed, dnormed) = (&mut m.normed[..n * dim], &mut m.dnormed[..n * dim]);
        let (dqkv, dstream) = (&mut m.dqkv[..n * width], &mut m.dstream[..n * dim]);
        let kept = &self.kept[l];
        let (input, qkv) = (&kept.input[..n * dim], &kept.qkv[..n * width]);
        let (out, lse) = (&kept.attention[..n * dim], &kept.lse[..n * shape.heads]);
        let gain = layer.attention_norm.clone();

        back(cpu, dstream, dim, &weights[layer.output.clone()], dim, dnormed);
        outer(cpu, dstream, dim, out, dim, &mut gradient[layer.output.clone()]);
        let inputs = Inputs::fused(qkv, &shape, &batch.document_start);
        attention::backward(cpu, &shape, &inputs, (out, lse), dnormed, dqkv);
        let turned = dim + self.layout.kv();
        rope::rope(cpu, dqkv, width, turned, (0, batch.length), &self.turns, Turn::Backward);
        back(cpu, dqkv, width, &weights[layer.qkv.clone()], dim, dnormed);
        rmsnorm::forward(cpu, input, &weights[gain.clone()], self.epsilon, normed);
        outer(cpu, dqkv, width, normed, dim, &mut gradient[layer.qkv.clone()]);
        let dgain = &mut gradient[gain.clone()];
        rmsnorm::backward(cpu, dnormed, input, &weights[gain], self.epsilon, dstream, dgain);
    }
}

/// y = x·Wᵀ or y += x·Wᵀ, with W as [out, in].
pub(crate) fn product<R: Real>(cpu: &Cpu, x: &[R], inputs: usize, w: &[R], y: &mut [R], into: Into) {
    let w = View::rows_of(w, inputs);
    let y = ViewMut::rows_of(y, w.rows());
    matmul::matmul(cpu, View::rows_of(x, inputs), w.t(), y, into);
}

/// dx = dy·W.
fn back<R: Real>(cpu: &Cpu, dy: &[R], outputs: usize, w: &[R], inputs: usize, dx: &mut [R]) {
    let w = View::rows_of(w, inputs);
    matmul::matmul(cpu, View::rows_of(dy, outputs), w, ViewMut::rows_of(dx, inputs), Into::Set);
}

/// dW += dyᵀ·x.
fn outer<R: Real>(cpu: &Cpu, dy: &[R], outputs: usize, x: &[R], inputs: usize, dw: &mut [R]) {
    let (dy, x) = (View::rows_of(dy, outputs), View::rows_of(x, inputs));
    matmul::matmul(cpu, dy.t(), x, ViewMut::rows_of(dw, inputs), Into::Add);
}

/// Rows of logits in a chunk: whole blocks of the sums over rows that make the head's
/// gradient, so that no pass over it is for a few rows only.
fn chunk_rows(vocab: usize) -> usize {
    (LOGITS / vocab / matmul::DEPTH).max(1) * matmul::DEPTH
}

fn grow<T: Clone + Default>(buffer: &mut Vec<T>, len: usize) {
    if buffer.len() < len {
        buffer.resize(len, T::default());
    }
}

/// Whether a micro-batch can be computed: what comes from data is checked here, once, so that
/// nothing below meets an index that does not exist.
fn check(layout: &Layout, batch: &MicroBatch) -> Result<(), String> {
    let n = batch.sequences * batch.length;
    let lengths = [batch.tokens.len(), batch.targets.len(), batch.counted.len(), batch.document_start.len()];
    if n == 0 || lengths != [n; 4] {
        return Err(format!("{} x {} tokens, but lists of {lengths:?}", batch.sequences, batch.length));
    }
    if batch.length > layout.context {
        return Err(format!("{} tokens are longer than the context of {}", batch.length, layout.context));
    }
    let end = layout.vocab as u32;
    if let Some(token) = batch.tokens.iter().chain(&batch.targets).find(|t| **t >= end) {
        return Err(format!("token {token} is outside the vocabulary of {end}"));
    }
    let starts = batch.document_start.iter().enumerate();
    match starts.into_iter().find(|(i, start)| **start as usize > i % batch.length) {
        Some((i, start)) => {
            Err(format!("position {} lies before its document's start {start}", i % batch.length))
        }
        None => Ok(()),
    }
}
