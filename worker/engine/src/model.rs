//! Forward and backward of micro-batches through a stage of a Llama.
//!
//! A stage is a contiguous range of units; the whole model is one, too. A [`Model`] holds
//! shapes, tables and working memory, no weights: those come as one slice for each unit, and
//! gradients are added into others like them. What a micro-batch leaves between its way forward
//! and its way back is a [`Flight`]; a pipeline has several in the air at once. Memory is taken
//! at the first micro-batch and used again for all that follow.
//!
//! What is kept for the backward pass is the input of each norm, rotated queries, keys and
//! values, the output of attention, and gate and up. Norms and the product of gate and up
//! are computed again: that costs one pass over data which is read then anyway.
//!
//! With activation recomputation (Chen et al. 2016, arXiv 1604.06174, with a layer as the segment)
//! only the input of each layer is kept. On the way back a layer goes forward once more, into
//! memory that all layers share: by the same operations on the same values, so to the same bits.
//!
//! Weights, and whatever is a factor of a matrix product, are elements `E`; the residual stream,
//! logits, gradients of weights and all sums are `E::Sum`.

use crate::EngineError;
use crate::layout::Layout;
use caravan_kernels::{Buffer, Cpu, Element, Family, Real, add, embedding, matmul, rmsnorm, rope};
use caravan_types::{MicroBatch, ModelShape};
use std::mem;
use std::ops::Range;

mod head;
mod layer;
mod score;

use head::logit_rows;
pub(crate) use layer::{back, outer, product};
pub use score::Score;

/// Asked before every layer, and before every chunk of the head, with the unit's number: whether
/// to stop there.
pub type Stop<'a> = dyn Fn(u32) -> bool + Sync + 'a;

/// What one layer needs for its backward pass besides its input; a row per token.
#[derive(Debug, Default)]
struct Kept<E: Element> {
    /// Rotated queries and keys, and values.
    qkv: Buffer<E>,
    /// Output of attention, [dim].
    attention: Buffer<E>,
    /// Logarithms of attention's sums, [heads].
    lse: Buffer<E::Sum>,
    /// The residual stream between attention and feed-forward network, [dim].
    middle: Buffer<E::Sum>,
    /// Gate and up, [2·hidden].
    gate_up: Buffer<E>,
}

impl<E: Element> Kept<E> {
    /// Takes memory for `n` tokens.
    fn reserve(&mut self, layout: &Layout, n: usize) {
        self.qkv.fit(n * layout.qkv());
        self.attention.fit(n * layout.dim);
        self.lse.fit(n * layout.heads);
        self.middle.fit(n * layout.dim);
        self.gate_up.fit(n * 2 * layout.hidden);
    }
}

/// Working memory that layers share.
#[derive(Debug, Default)]
struct Memory<E: Element> {
    /// Of the layer at hand, where flights keep nothing of it.
    layer: Kept<E>,
    /// Normalised rows, [dim].
    normed: Buffer<E>,
    /// The product of gate and up, and its gradient, [hidden].
    product: Buffer<E>,
    /// Gradient of gate and up, [2·hidden].
    dgate_up: Buffer<E>,
    /// Gradient of queries, keys and values.
    dqkv: Buffer<E>,
    /// Gradient of what attention put out, [dim].
    dattention: Buffer<E>,
    /// Gradient of what a norm put out, [dim].
    dnormed: Buffer<E::Sum>,
    /// Gradient of the residual stream, [dim], and the same as a factor of products.
    dstream: Buffer<E::Sum>,
    rounded: [Buffer<E>; 2],
    /// Of the gradient of a norm's gain, of some rows each.
    shares: Buffer<E::Sum>,
    /// A layer's matrices, packed.
    packed: Buffer<E>,
    /// A chunk of logits, and their gradient.
    logits: Buffer<E::Sum>,
    dlogits: Buffer<E>,
    /// The head, packed for logits and for the gradient of their input.
    head: [Buffer<E>; 2],
    /// Each token's loss.
    losses: Vec<f64>,
}

/// A micro-batch between its way forward and its way back.
#[derive(Debug, Default)]
pub struct Flight<E: Element> {
    batch: MicroBatch,
    /// The residual stream before each layer of the stage and after the last one, [dim].
    streams: Vec<Buffer<E::Sum>>,
    /// One a layer of the stage; none where layers are recomputed.
    kept: Vec<Kept<E>>,
}

impl<E: Element> Flight<E> {
    /// Its tokens, and how many of them count.
    #[must_use]
    pub fn tokens(&self) -> (usize, u64) {
        (self.batch.tokens.len(), self.batch.counted.iter().filter(|c| **c).count() as u64)
    }
}

/// A stage of a Llama, without weights.
#[derive(Debug)]
pub struct Model<E: Element> {
    layout: Layout,
    epsilon: E::Sum,
    turns: rope::Table<E::Sum>,
    /// The stage.
    units: Range<usize>,
    /// Whether layers are recomputed on the way back.
    recompute: bool,
    /// Memory of flights that have landed.
    spare: Vec<Flight<E>>,
    memory: Memory<E>,
}

impl<E: Element> Model<E> {
    /// The whole model of that shape.
    ///
    /// # Errors
    /// Where the shape contradicts itself.
    pub fn new(shape: &ModelShape) -> Result<Self, EngineError> {
        let layout = Layout::new(shape)?;
        Ok(Self {
            epsilon: E::Sum::from_f64(f64::from(shape.norm_eps)),
            turns: rope::Table::new(layout.context, &shape.rope_rates()),
            units: 0..layout.units(),
            recompute: false,
            spare: Vec::new(),
            memory: Memory::default(),
            layout,
        })
    }

    /// Where tensors lie.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// What a pass through it needs besides weights: layout, the norms' epsilon, rotations.
    pub(crate) fn parts(&self) -> (&Layout, E::Sum, &rope::Table<E::Sum>) {
        (&self.layout, self.epsilon, &self.turns)
    }

    /// From now on, computes with these units, which exist, and recomputes layers on the way back or
    /// not, which changes no bits.
    pub fn place(&mut self, units: Range<usize>, recompute: bool) {
        self.spare.clear();
        if (&self.units, self.recompute) != (&units, recompute) {
            self.memory = Memory::default();
        }
        (self.units, self.recompute) = (units, recompute);
    }

    /// The stage's units.
    #[must_use]
    pub fn units(&self) -> Range<usize> {
        self.units.clone()
    }

    /// Whether the stage begins with the embedding.
    #[must_use]
    pub fn is_first(&self) -> bool {
        self.units.start == 0
    }

    /// Whether the stage ends with the head, and so with the loss.
    #[must_use]
    pub fn is_last(&self) -> bool {
        self.units.end == self.layout.units()
    }

    /// The stage's layers, counted from 0 in the model.
    fn layers(&self) -> Range<usize> {
        let end = self.units.end.min(self.layout.layers + 1);
        self.units.start.max(1) - 1..end.max(1) - 1
    }

    /// Adds the gradient of `scale` · Σ_counted −log p(target) to `gradient` and returns that
    /// sum, for a stage that is the whole model. Weights and gradient are flat. `stop` is asked
    /// between layers; once it says so, the answer is none and `gradient` is good for nothing.
    ///
    /// # Errors
    /// Where the micro-batch does not fit the model: the reason.
    pub fn gradient(
        &mut self,
        cpu: &Cpu,
        weights: &[E],
        gradient: &mut [E::Sum],
        batch: &MicroBatch,
        scale: f64,
        stop: &Stop<'_>,
    ) -> Result<Option<f64>, String> {
        let (weights, mut gradient) = (self.layout.split(weights), self.layout.split_mut(gradient));
        let Some(flight) = self.forward(cpu, &weights, batch.clone(), None, stop)? else { return Ok(None) };
        self.backward(cpu, &weights, &mut gradient, flight, None, scale, stop)
    }

    /// Takes a micro-batch forward through the stage; `weights` has the elements of each of its
    /// units at the unit's number. `input` is the residual stream before the stage's first
    /// layer, [tokens, dim], where that is not the embedding. None where it was stopped.
    ///
    /// # Errors
    /// Where the micro-batch or its input does not fit the model: the reason.
    pub fn forward(
        &mut self,
        cpu: &Cpu,
        weights: &[&[E]],
        batch: MicroBatch,
        input: Option<&[E::Sum]>,
        stop: &Stop<'_>,
    ) -> Result<Option<Flight<E>>, String> {
        check(&self.layout, &batch)?;
        let (n, dim) = (batch.tokens.len(), self.layout.dim);
        self.check_stream(input, n, !self.is_first())?;
        let mut flight = self.spare.pop().unwrap_or_default();
        flight.batch = batch;
        self.reserve(cpu, &mut flight, n);
        Ok(cpu.install(|| {
            let stream = &mut flight.streams[0][..n * dim];
            match input {
                Some(input) => add::copy(cpu, stream, input),
                None => embedding::forward(cpu, &flight.batch.tokens, weights[0], dim, stream),
            }
            for (i, layer) in self.layers().enumerate() {
                if stop(layer as u32 + 1) {
                    return None;
                }
                let Flight { batch, streams, kept } = &mut flight;
                let (before, after) = streams.split_at_mut(i + 1);
                let mut own = mem::take(&mut self.memory.layer);
                let kept = kept.get_mut(i).unwrap_or(&mut own);
                self.forward_layer(cpu, weights[layer + 1], batch, &before[i], kept, Some(&mut after[0]));
                self.memory.layer = own;
            }
            Some(flight)
        }))
    }

    /// The residual stream after the stage, [tokens, dim].
    #[must_use]
    pub fn output<'a>(&self, flight: &'a Flight<E>) -> &'a [E::Sum] {
        let n = flight.batch.tokens.len() * self.layout.dim;
        flight.streams.last().map_or(&[], |last| &last[..n])
    }

    /// Takes a micro-batch back through the stage and adds to `gradient`, which is laid out as
    /// the weights are. `coming` is the gradient of [`Model::output`], where another stage
    /// follows; the last stage starts from the loss and returns it, others return 0. None where
    /// it was stopped. After it, [`Model::input_gradient`] is that of the stage's input.
    ///
    /// # Errors
    /// Where `coming` does not fit the micro-batch: the reason.
    #[allow(clippy::too_many_arguments, reason = "a pass needs all of these, and each once")]
    pub fn backward(
        &mut self,
        cpu: &Cpu,
        weights: &[&[E]],
        gradient: &mut [&mut [E::Sum]],
        mut flight: Flight<E>,
        coming: Option<&[E::Sum]>,
        scale: f64,
        stop: &Stop<'_>,
    ) -> Result<Option<f64>, String> {
        let n = flight.batch.tokens.len();
        self.check_stream(coming, n, !self.is_last())?;
        // Another micro-batch may have gone forward since.
        self.reserve(cpu, &mut flight, n);
        let loss = cpu.install(|| {
            let loss = match coming {
                Some(coming) => {
                    add::copy(cpu, &mut self.memory.dstream, coming);
                    add::narrow(cpu, &mut self.memory.rounded[0], coming);
                    0.0
                }
                None => {
                    let last = self.layout.layers + 1;
                    self.head(cpu, weights[last], gradient[last], &flight, scale, stop)?
                }
            };
            self.back_through(cpu, weights, gradient, &flight, stop).then_some(loss)
        });
        self.spare.push(flight);
        Ok(loss)
    }

    /// The gradient of the residual stream before the stage, of the micro-batch of `tokens`
    /// tokens that went back last: [tokens, dim].
    #[must_use]
    pub fn input_gradient(&self, tokens: usize) -> &[E::Sum] {
        &self.memory.dstream[..tokens * self.layout.dim]
    }

    /// The residual stream before the stage of the micro-batch that went back last.
    pub(crate) fn landed_input(&self, tokens: usize) -> &[E::Sum] {
        let input = self.spare.last().and_then(|flight| flight.streams.first());
        input.map_or(&[], |input| &input[..tokens * self.layout.dim])
    }

    /// Whether what another stage sent is there where it must be, and of the right size.
    fn check_stream(&self, stream: Option<&[E::Sum]>, tokens: usize, needed: bool) -> Result<(), String> {
        let expected = needed.then_some(tokens * self.layout.dim);
        let found = stream.map(<[E::Sum]>::len);
        if found == expected {
            return Ok(());
        }
        Err(format!("the residual stream from another stage has {found:?} values instead of {expected:?}"))
    }

    /// Takes memory for `n` tokens.
    fn reserve(&mut self, cpu: &Cpu, flight: &mut Flight<E>, n: usize) {
        let Layout { dim, hidden, vocab, .. } = self.layout;
        let qkv = self.layout.qkv();
        let layers = self.layers().len();
        flight.streams.resize_with(layers + 1, Buffer::default);
        flight.streams.iter_mut().for_each(|stream| stream.fit(n * dim));
        flight.kept.resize_with(if self.recompute { 0 } else { layers }, Kept::default);
        flight.kept.iter_mut().for_each(|kept| kept.reserve(&self.layout, n));
        let m = &mut self.memory;
        if self.recompute {
            m.layer.reserve(&self.layout, n);
        }
        m.normed.fit(n * dim);
        m.product.fit(n * hidden);
        m.dgate_up.fit(n * 2 * hidden);
        m.dqkv.fit(n * qkv);
        m.dattention.fit(n * dim);
        m.dnormed.fit(n * dim);
        m.dstream.fit(n * dim);
        m.rounded.iter_mut().for_each(|rounded| rounded.fit(n * dim));
        m.shares.fit(rmsnorm::shares(n, dim));
        reserve_packed(&mut m.packed, &self.layout, cpu.family());
        if self.units.end == self.layout.units() {
            let (rows, share) = logit_rows::<E>(vocab);
            m.logits.fit(rows.min(n) * vocab);
            m.dlogits.fit(share.min(n) * vocab);
            m.losses.resize(n, 0.0);
            m.head[0].fit(matmul::packed_len::<E>(dim, vocab, cpu.family()));
            m.head[1].fit(matmul::packed_len::<E>(vocab, dim, cpu.family()));
        }
    }

    /// The layers from last to first, then the embedding; false where it was stopped.
    fn back_through(
        &mut self,
        cpu: &Cpu,
        weights: &[&[E]],
        gradient: &mut [&mut [E::Sum]],
        flight: &Flight<E>,
        stop: &Stop<'_>,
    ) -> bool {
        for (i, layer) in self.layers().enumerate().rev() {
            if stop(layer as u32 + 1) {
                return false;
            }
            let (w, g) = (weights[layer + 1], &mut *gradient[layer + 1]);
            let input = &flight.streams[i];
            let mut own = mem::take(&mut self.memory.layer);
            let kept = match flight.kept.get(i) {
                Some(kept) => kept,
                None => {
                    self.forward_layer(cpu, w, &flight.batch, input, &mut own, None);
                    &own
                }
            };
            self.backward_layer(cpu, w, g, input, kept, &flight.batch);
            self.memory.layer = own;
        }
        if self.is_first() {
            let dim = self.layout.dim;
            let dstream = &self.memory.dstream[..flight.batch.tokens.len() * dim];
            embedding::backward(cpu, &flight.batch.tokens, dstream, dim, gradient[0]);
        }
        true
    }
}

/// Takes memory for a layer's matrices as they are packed forward and back.
fn reserve_packed<E: Element>(packed: &mut Buffer<E>, layout: &Layout, family: Family) {
    let Layout { dim, hidden, .. } = *layout;
    let matrices = [[layout.qkv(), dim], [dim, dim], [2 * hidden, dim], [dim, hidden]];
    let len = |[depth, cols]: [usize; 2]| matmul::packed_len::<E>(depth, cols, family);
    let back: usize = matrices.into_iter().map(len).sum();
    let forward: usize = matrices.into_iter().map(|[out, inputs]| len([inputs, out])).sum();
    packed.fit(back.max(forward));
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
