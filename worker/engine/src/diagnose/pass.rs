//! One sequence, forward and back through a stage, every tensor looked at as soon as it is there.
//!
//! The same operations as in [`Model`](crate::Model), in the same order; but where that one shares
//! memory between layers and forgets what it can compute again, here each tensor has memory of its
//! own. One sequence at a time, that is little.

use crate::layout::{Layer, Layout};
use crate::model::{back, outer, product};
use caravan_kernels::attention::{self, Inputs};
use caravan_kernels::matmul::Into;
use caravan_kernels::rope::{self, Turn};
use caravan_kernels::{Cpu, Element, Real, View, add, cross_entropy, embedding, rmsnorm, swiglu};
use caravan_types::MicroBatch;
use caravan_types::non_finite::{LayerPart, Module, Value};
use std::ops::Range;

/// Rows of logits at a time: 64 rows of a large vocabulary are a few tens of megabytes.
const ROWS: usize = 64;

/// Why a pass ends early.
pub(super) enum End {
    /// It was given up.
    Stopped,
    /// What other stages had sent was bad already.
    Came,
    /// Something is not finite.
    Found(Found),
}

/// The first value that is not finite.
pub(super) struct Found {
    pub(super) tensor: Seen,
    /// The row, where rows are positions.
    pub(super) position: Option<usize>,
    /// In the row, or in the whole tensor.
    pub(super) element: usize,
    pub(super) value: Value,
}

/// What was looked at.
#[derive(Clone, Copy)]
pub(super) enum Seen {
    /// What a part of the model puts out.
    Out(Module),
    /// The gradient in that.
    Back(Module),
    /// The gradient of a unit's elements from the second number on.
    Weight(usize, usize),
}

/// A stage and a sequence.
pub(super) struct Pass<'a, E: Element> {
    pub(super) cpu: &'a Cpu,
    pub(super) layout: &'a Layout,
    pub(super) epsilon: E::Sum,
    pub(super) turns: &'a rope::Table<E::Sum>,
    /// Each unit's, at its number.
    pub(super) weights: &'a [&'a [E]],
    pub(super) units: Range<usize>,
    pub(super) batch: MicroBatch,
    /// What the loss is multiplied by.
    pub(super) scale: f64,
    /// Asked before every unit: whether to stop there.
    pub(super) stop: &'a dyn Fn(u32) -> bool,
}

/// What a layer leaves for its way back.
struct Kept<E: Element> {
    input: Vec<E::Sum>,
    attention_norm: Vec<E>,
    qkv: Vec<E>,
    attention: Vec<E>,
    lse: Vec<E::Sum>,
    middle: Vec<E::Sum>,
    mlp_norm: Vec<E>,
    gate_up: Vec<E>,
}

/// The gradient of the residual stream, and the same as a factor of products.
struct Back<E: Element> {
    stream: Vec<E::Sum>,
    rounded: Vec<E>,
}

fn look<T: Element>(tensor: Seen, values: &[T], width: usize) -> Result<(), End> {
    let bad = values.iter().enumerate().find_map(|(i, v)| Some((i, Value::of(v.widen().to_f64())?)));
    let Some((at, value)) = bad else { return Ok(()) };
    let (position, element) = match tensor {
        Seen::Weight(..) => (None, at),
        Seen::Out(_) | Seen::Back(_) => (Some(at / width), at % width),
    };
    Err(End::Found(Found { tensor, position, element, value }))
}

fn is_bad<R: Real>(values: &[R]) -> bool {
    values.iter().any(|v| !v.to_f64().is_finite())
}

impl<E: Element> Pass<'_, E> {
    fn tokens(&self) -> usize {
        self.batch.tokens.len()
    }

    fn rows(&self, width: usize) -> Vec<E> {
        vec![E::default(); self.tokens() * width]
    }

    fn sums(&self, width: usize) -> Vec<E::Sum> {
        vec![E::Sum::ZERO; self.tokens() * width]
    }

    /// The layers of the stage, counted from 0 in the model.
    fn layers(&self) -> Range<usize> {
        let end = self.units.end.min(self.layout.layers + 1);
        self.units.start.max(1) - 1..end.max(1) - 1
    }

    fn begin(&self, unit: usize) -> Result<(), End> {
        if (self.stop)(unit as u32) { Err(End::Stopped) } else { Ok(()) }
    }

    /// The whole way. `input` comes from the stage before, `coming` from the one after.
    pub(super) fn run(&self, input: Option<Vec<E::Sum>>, coming: Option<Vec<E::Sum>>) -> Result<(), End> {
        let dim = self.layout.dim;
        let mut stream = match input {
            Some(input) if is_bad(&input) => return Err(End::Came),
            Some(input) => input,
            None => {
                let mut stream = self.sums(dim);
                embedding::forward(self.cpu, &self.batch.tokens, self.weights[0], dim, &mut stream);
                look(Seen::Out(Module::Embedding), &stream, dim)?;
                stream
            }
        };
        let mut kept = Vec::with_capacity(self.layers().len());
        for layer in self.layers() {
            self.begin(layer + 1)?;
            let (layer, next) = self.forward_layer(layer, stream)?;
            kept.push(layer);
            stream = next;
        }
        let mut dstream = match coming {
            Some(coming) if is_bad(&coming) => return Err(End::Came),
            Some(stream) => {
                let mut rounded = self.rows(dim);
                add::narrow(self.cpu, &mut rounded, &stream);
                Back { stream, rounded }
            }
            None => self.head(&stream)?,
        };
        for (layer, kept) in self.layers().zip(kept).rev() {
            self.begin(layer + 1)?;
            self.backward_mlp(layer, &kept, &mut dstream)?;
            self.backward_attention(layer, &kept, &mut dstream)?;
        }
        if self.units.start == 0 {
            let mut gradient = vec![E::Sum::ZERO; self.weights[0].len()];
            embedding::backward(self.cpu, &self.batch.tokens, &dstream.stream, dim, &mut gradient);
            look(Seen::Weight(0, 0), &gradient, dim)?;
        }
        Ok(())
    }

    fn shape(&self) -> attention::Shape {
        let Layout { heads, kv_heads, head, .. } = *self.layout;
        let length = self.batch.length;
        attention::Shape { sequences: 1, queries: length, keys: length, heads, kv_heads, head }
    }

    fn forward_layer(&self, layer: usize, input: Vec<E::Sum>) -> Result<(Kept<E>, Vec<E::Sum>), End> {
        use LayerPart::*;
        let (cpu, w, dim, hidden) = (self.cpu, self.weights[layer + 1], self.layout.dim, self.layout.hidden);
        let out = |part| Seen::Out(Module::Layer(layer as u32, part));
        let (width, shape) = (self.layout.qkv(), self.shape());
        let Layer { attention_norm: gain, qkv: w_qkv, output, mlp_norm: mlp_gain, gate_up: w_gate_up, down } =
            self.layout.layer.clone();

        let mut attention_norm = self.rows(dim);
        rmsnorm::forward(cpu, &input, &w[gain], self.epsilon, &mut attention_norm);
        look(out(AttentionNorm), &attention_norm, dim)?;
        let mut qkv = self.rows(width);
        product(cpu, &attention_norm, dim, &w[w_qkv], &mut qkv, Into::Set);
        let turned = dim + self.layout.kv();
        rope::rope(cpu, &mut qkv, width, turned, (0, self.batch.length), self.turns, Turn::Forward);
        look(out(Qkv), &qkv, width)?;
        let (mut attention, mut lse) = (self.rows(dim), self.sums(shape.heads));
        let inputs = Inputs::fused(&qkv, &shape, &self.batch.document_start);
        attention::forward(cpu, &shape, &inputs, &mut attention, &mut lse);
        look(out(Attention), &attention, dim)?;
        let mut middle = input.clone();
        product(cpu, &attention, dim, &w[output], &mut middle, Into::Add);
        look(out(Output), &middle, dim)?;

        let mut mlp_norm = self.rows(dim);
        rmsnorm::forward(cpu, &middle, &w[mlp_gain], self.epsilon, &mut mlp_norm);
        look(out(MlpNorm), &mlp_norm, dim)?;
        let mut gate_up = self.rows(2 * hidden);
        product(cpu, &mlp_norm, dim, &w[w_gate_up], &mut gate_up, Into::Set);
        look(out(GateUp), &gate_up, 2 * hidden)?;
        let mut activated = self.rows(hidden);
        swiglu::forward(cpu, &gate_up, hidden, &mut activated);
        look(out(Activated), &activated, hidden)?;
        let mut next = middle.clone();
        product(cpu, &activated, hidden, &w[down], &mut next, Into::Add);
        look(out(Down), &next, dim)?;
        Ok((Kept { input, attention_norm, qkv, attention, lse, middle, mlp_norm, gate_up }, next))
    }

    /// Final norm, head and loss, forward and back; the gradient of the residual stream.
    fn head(&self, stream: &[E::Sum]) -> Result<Back<E>, End> {
        let (cpu, unit, dim, vocab) = (self.cpu, self.layout.layers + 1, self.layout.dim, self.layout.vocab);
        let (w, n) = (self.weights[unit], self.tokens());
        let (gain, head) = (self.layout.final_norm.clone(), self.layout.head_weight.clone());
        self.begin(unit)?;
        let mut normed = self.rows(dim);
        rmsnorm::forward(cpu, stream, &w[gain.clone()], self.epsilon, &mut normed);
        look(Seen::Out(Module::FinalNorm), &normed, dim)?;
        let (mut dnormed, mut dhead) = (self.sums(dim), vec![E::Sum::ZERO; head.len()]);
        for start in (0..n).step_by(ROWS) {
            let rows = start..(start + ROWS).min(n);
            let of_rows = |end: End| match end {
                End::Found(found) => {
                    End::Found(Found { position: found.position.map(|p| p + start), ..found })
                }
                end => end,
            };
            let mut logits = vec![E::Sum::ZERO; rows.len() * vocab];
            let mut dlogits = vec![E::default(); rows.len() * vocab];
            let normed = &normed[rows.start * dim..rows.end * dim];
            product(cpu, normed, dim, &w[head.clone()], &mut logits, Into::Set);
            look(Seen::Out(Module::Logits), &logits, vocab).map_err(of_rows)?;
            let mut losses = vec![0.0; rows.len()];
            let (targets, counted) = (&self.batch.targets[rows.clone()], &self.batch.counted[rows.clone()]);
            cross_entropy::forward_backward(
                cpu,
                &mut logits,
                &mut dlogits,
                vocab,
                targets,
                counted,
                self.scale,
                &mut losses,
            );
            look(Seen::Out(Module::Loss), &losses, 1).map_err(of_rows)?;
            look(Seen::Back(Module::Logits), &dlogits, vocab).map_err(of_rows)?;
            back(cpu, &dlogits, vocab, &w[head.clone()], dim, &mut dnormed[rows.start * dim..rows.end * dim]);
            outer(cpu, View::rows_of(&dlogits, vocab), normed, dim, &mut dhead);
        }
        look(Seen::Back(Module::FinalNorm), &dnormed, dim)?;
        look(Seen::Weight(unit, head.start), &dhead, dim)?;
        let mut dgain = vec![E::Sum::ZERO; gain.len()];
        let mut dstream = Back { stream: self.sums(dim), rounded: self.rows(dim) };
        self.back_norm(&dnormed, stream, &w[gain.clone()], &mut dstream, &mut dgain);
        look(Seen::Weight(unit, gain.start), &dgain, dim)?;
        look(
            Seen::Back(Module::Layer(self.layout.layers as u32 - 1, LayerPart::Down)),
            &dstream.stream,
            dim,
        )?;
        Ok(dstream)
    }

    /// Back through a norm.
    fn back_norm(&self, dy: &[E::Sum], x: &[E::Sum], gain: &[E], dx: &mut Back<E>, dgain: &mut [E::Sum]) {
        let Back { stream, rounded } = dx;
        rmsnorm::backward(self.cpu, dy, x, gain, self.epsilon, stream, rounded, dgain);
    }

    fn backward_mlp(&self, layer: usize, kept: &Kept<E>, dstream: &mut Back<E>) -> Result<(), End> {
        let (cpu, unit, dim, hidden) = (self.cpu, layer + 1, self.layout.dim, self.layout.hidden);
        let Layer { mlp_norm: gain, gate_up, down, .. } = self.layout.layer.clone();
        let w = self.weights[unit];
        let seen = |part| Seen::Back(Module::Layer(layer as u32, part));
        let zeros = |elements: &Range<usize>| vec![E::Sum::ZERO; elements.len()];

        let mut activated = self.rows(hidden);
        back(cpu, &dstream.rounded, dim, &w[down.clone()], hidden, &mut activated);
        look(seen(LayerPart::Activated), &activated, hidden)?;
        let mut dgate_up = self.rows(2 * hidden);
        swiglu::backward(cpu, &mut activated, &kept.gate_up, hidden, &mut dgate_up);
        look(seen(LayerPart::GateUp), &dgate_up, 2 * hidden)?;
        let mut gradient = zeros(&down);
        outer(cpu, View::rows_of(&dstream.rounded, dim), &activated, hidden, &mut gradient);
        look(Seen::Weight(unit, down.start), &gradient, dim)?;
        let mut dnormed = self.sums(dim);
        back(cpu, &dgate_up, 2 * hidden, &w[gate_up.clone()], dim, &mut dnormed);
        look(seen(LayerPart::MlpNorm), &dnormed, dim)?;
        let mut gradient = zeros(&gate_up);
        outer(cpu, View::rows_of(&dgate_up, 2 * hidden), &kept.mlp_norm, dim, &mut gradient);
        look(Seen::Weight(unit, gate_up.start), &gradient, dim)?;
        let mut gradient = zeros(&gain);
        self.back_norm(&dnormed, &kept.middle, &w[gain.clone()], dstream, &mut gradient);
        look(Seen::Weight(unit, gain.start), &gradient, dim)?;
        look(seen(LayerPart::Output), &dstream.stream, dim)
    }

    fn backward_attention(&self, layer: usize, kept: &Kept<E>, dstream: &mut Back<E>) -> Result<(), End> {
        let (cpu, unit, dim, width) = (self.cpu, layer + 1, self.layout.dim, self.layout.qkv());
        let Layer { attention_norm: gain, qkv, output, .. } = self.layout.layer.clone();
        let (w, shape) = (self.weights[unit], self.shape());
        let seen = |part| Seen::Back(Module::Layer(layer as u32, part));
        let zeros = |elements: &Range<usize>| vec![E::Sum::ZERO; elements.len()];

        let mut dattention = self.rows(dim);
        back(cpu, &dstream.rounded, dim, &w[output.clone()], dim, &mut dattention);
        look(seen(LayerPart::Attention), &dattention, dim)?;
        let mut gradient = zeros(&output);
        outer(cpu, View::rows_of(&dstream.rounded, dim), &kept.attention, dim, &mut gradient);
        look(Seen::Weight(unit, output.start), &gradient, dim)?;
        let mut dqkv = self.rows(width);
        let inputs = Inputs::fused(&kept.qkv, &shape, &self.batch.document_start);
        attention::backward(cpu, &shape, &inputs, (&kept.attention, &kept.lse), &dattention, &mut dqkv);
        let turned = dim + self.layout.kv();
        rope::rope(cpu, &mut dqkv, width, turned, (0, self.batch.length), self.turns, Turn::Backward);
        look(seen(LayerPart::Qkv), &dqkv, width)?;
        let mut dnormed = self.sums(dim);
        back(cpu, &dqkv, width, &w[qkv.clone()], dim, &mut dnormed);
        look(seen(LayerPart::AttentionNorm), &dnormed, dim)?;
        let mut gradient = zeros(&qkv);
        outer(cpu, View::rows_of(&dqkv, width), &kept.attention_norm, dim, &mut gradient);
        look(Seen::Weight(unit, qkv.start), &gradient, dim)?;
        let mut gradient = zeros(&gain);
        self.back_norm(&dnormed, &kept.input, &w[gain.clone()], dstream, &mut gradient);
        look(Seen::Weight(unit, gain.start), &gradient, dim)?;
        look(seen(LayerPart::Input), &dstream.stream, dim)
    }
}
