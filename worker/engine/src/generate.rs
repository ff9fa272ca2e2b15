//! Decoding with a key-value cache.
//!
//! Every operation gives a row the bits that it would have among many rows, so the logits of
//! a token decoded alone are those of the full forward pass, to the bit.

use crate::EngineError;
use crate::layout::Layout;
use crate::random::{Purpose, draw, unit};
use caravan_kernels::attention::{self, Inputs};
use caravan_kernels::matmul::{self, Factor, Into};
use caravan_kernels::rope::{self, Turn};
use caravan_kernels::{Cpu, Element, Real, View, ViewMut, embedding, rmsnorm, swiglu};
use caravan_types::ModelShape;

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Logits are divided by it; 0 takes the likeliest token.
    pub temperature: f64,
    /// Only the likeliest tokens that together have this probability are considered.
    pub top_p: f64,
    /// Key of the choices: the same seed chooses the same text.
    pub seed: u64,
}

/// A layer's weights.
#[derive(Debug)]
struct Weights<E> {
    attention_norm: Vec<E>,
    qkv: Factor<E>,
    output: Factor<E>,
    mlp_norm: Vec<E>,
    gate_up: Factor<E>,
    down: Factor<E>,
}

/// A model in the middle of a text. It has the weights packed for its products, since reading
/// them is most of what a token costs.
#[derive(Debug)]
pub struct Generator<'a, E: Element> {
    cpu: &'a Cpu,
    layout: Layout,
    embedding: Vec<E>,
    layers: Vec<Weights<E>>,
    final_norm: Vec<E>,
    head: Factor<E>,
    epsilon: E::Sum,
    turns: rope::Table<E::Sum>,
    /// For each layer: rows of keys, then rows of values, for `context` positions each.
    cache: Vec<[Vec<E>; 2]>,
    position: usize,
    /// The logits after the last token.
    logits: Vec<E::Sum>,
}

impl<'a, E: Element> Generator<'a, E> {
    /// A generator on flat weights, of which it makes its own.
    ///
    /// # Errors
    /// Where the shape contradicts itself or the weights are not of its size.
    pub fn new(cpu: &'a Cpu, shape: &ModelShape, weights: &[E]) -> Result<Self, EngineError> {
        let layout = Layout::new(shape)?;
        if weights.len() != layout.parameters() {
            let (got, needed) = (weights.len(), layout.parameters());
            return Err(EngineError::Shape(format!("{got} weights for a model of {needed}")));
        }
        let units = layout.split(weights);
        let (rows, dim) = (layout.context * layout.kv(), layout.dim);
        // [out, in], for x·Wᵀ.
        let factor = |w: &[E], inputs: usize| Factor::new(cpu, View::rows_of(w, inputs).t());
        let of_layer = |w: &&[E]| {
            let at = layout.layer.clone();
            Weights {
                attention_norm: w[at.attention_norm].to_vec(),
                qkv: factor(&w[at.qkv], dim),
                output: factor(&w[at.output], dim),
                mlp_norm: w[at.mlp_norm].to_vec(),
                gate_up: factor(&w[at.gate_up], dim),
                down: factor(&w[at.down], layout.hidden),
            }
        };
        let last = units[layout.layers + 1];
        Ok(Self {
            cpu,
            embedding: units[0].to_vec(),
            layers: units[1..=layout.layers].iter().map(of_layer).collect(),
            final_norm: last[layout.final_norm.clone()].to_vec(),
            head: factor(&last[layout.head_weight.clone()], dim),
            epsilon: E::Sum::from_f64(f64::from(shape.norm_eps)),
            turns: rope::Table::new(layout.context, &shape.rope_rates()),
            cache: (0..layout.layers).map(|_| [vec![E::default(); rows], vec![E::default(); rows]]).collect(),
            position: 0,
            logits: vec![E::Sum::ZERO; layout.vocab],
            layout,
        })
    }

    /// Tokens read so far.
    #[must_use]
    pub fn position(&self) -> usize {
        self.position
    }

    /// The logits for the token after those read.
    #[must_use]
    pub fn logits(&self) -> &[E::Sum] {
        &self.logits
    }

    /// Reads tokens: a prompt, or the token chosen last.
    ///
    /// # Errors
    /// Where there are none, one is outside the vocabulary, or the context is full.
    pub fn read(&mut self, tokens: &[u32]) -> Result<(), EngineError> {
        let Layout { dim, vocab, context, .. } = self.layout;
        if tokens.is_empty() {
            return Err(EngineError::Prompt("there is no token to start from".into()));
        }
        if let Some(token) = tokens.iter().find(|t| **t as usize >= vocab) {
            return Err(EngineError::Prompt(format!("token {token} is outside the vocabulary of {vocab}")));
        }
        if self.position + tokens.len() > context {
            return Err(EngineError::Prompt(format!("the model's context of {context} tokens is full")));
        }
        let n = tokens.len();
        let mut stream = vec![E::Sum::ZERO; n * dim];
        embedding::forward(self.cpu, tokens, &self.embedding, dim, &mut stream);
        for l in 0..self.layout.layers {
            self.layer(l, n, &mut stream);
        }
        self.position += n;
        let mut last = vec![E::default(); dim];
        rmsnorm::forward(self.cpu, &stream[(n - 1) * dim..], &self.final_norm, self.epsilon, &mut last);
        product(self.cpu, &last, &self.head, &mut self.logits, Into::Set);
        Ok(())
    }

    fn layer(&mut self, l: usize, n: usize, stream: &mut [E::Sum]) {
        let Layout { dim, hidden, heads, kv_heads, head, .. } = self.layout;
        let (kv, width, cpu, w) = (self.layout.kv(), self.layout.qkv(), self.cpu, &self.layers[l]);
        let mut normed = vec![E::default(); n * dim];
        let mut qkv = vec![E::default(); n * width];
        rmsnorm::forward(cpu, stream, &w.attention_norm, self.epsilon, &mut normed);
        product(cpu, &normed, &w.qkv, &mut qkv, Into::Set);
        let end = self.position + n;
        rope::rope(cpu, &mut qkv, width, dim + kv, (self.position, n), &self.turns, Turn::Forward);
        let [keys, values] = &mut self.cache[l];
        let rows = keys[self.position * kv..].chunks_exact_mut(kv);
        let rows = rows.zip(values[self.position * kv..].chunks_exact_mut(kv));
        for (row, (key, value)) in qkv.chunks_exact(width).zip(rows) {
            key.copy_from_slice(&row[dim..dim + kv]);
            value.copy_from_slice(&row[dim + kv..]);
        }
        let starts = vec![0; n];
        let inputs =
            Inputs { q: &qkv, q_stride: width, k: keys, v: values, kv_stride: kv, document_start: &starts };
        let shape = attention::Shape { sequences: 1, queries: n, keys: end, heads, kv_heads, head };
        let mut lse = vec![E::Sum::ZERO; n * heads];
        attention::forward(cpu, &shape, &inputs, &mut normed, &mut lse);
        product(cpu, &normed, &w.output, stream, Into::Add);

        let mut gate_up = vec![E::default(); n * 2 * hidden];
        let mut activated = vec![E::default(); n * hidden];
        rmsnorm::forward(cpu, stream, &w.mlp_norm, self.epsilon, &mut normed);
        product(cpu, &normed, &w.gate_up, &mut gate_up, Into::Set);
        swiglu::forward(cpu, &gate_up, hidden, &mut activated);
        product(cpu, &activated, &w.down, stream, Into::Add);
    }

    /// Chooses the next token; a pure function of the logits, the position and the seed.
    #[must_use]
    pub fn choose(&self, sampling: &Sampling) -> u32 {
        if sampling.temperature <= 0.0 {
            // The first of the largest.
            let larger =
                |best: usize, (i, x): (usize, &E::Sum)| if *x > self.logits[best] { i } else { best };
            return self.logits.iter().enumerate().fold(0, larger) as u32;
        }
        let likeliest = self.logits.iter().copied().map(Real::to_f64).enumerate();
        let mut order: Vec<(usize, f64)> = likeliest.collect();
        // Descending, ties by token, so that the order is one.
        order.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let max = order[0].1;
        let weight = |logit: f64| libm::exp((logit - max) / sampling.temperature);
        let total: f64 = order.iter().map(|(_, logit)| weight(*logit)).sum();
        let mut nucleus = Vec::new();
        let mut mass = 0.0;
        for (token, logit) in order {
            mass += weight(logit) / total;
            nucleus.push((token, mass));
            if mass >= sampling.top_p {
                break;
            }
        }
        let at = mass * unit(draw(sampling.seed, Purpose::Sample, self.position as u64)[0]);
        let chosen = nucleus.iter().find(|(_, mass)| *mass > at).or(nucleus.last());
        chosen.map_or(0, |(token, _)| *token as u32)
    }
}

/// y = x·Wᵀ or y += x·Wᵀ.
fn product<E, O>(cpu: &Cpu, x: &[E], w: &Factor<E>, y: &mut [O], into: Into)
where
    E: Element,
    O: Element<Sum = E::Sum>,
{
    let (rows, w) = (View::rows_of(x, w.depth()), w.packed());
    let cols = y.len() / rows.rows();
    matmul::product(cpu, rows, &w, ViewMut::rows_of(y, cols), into);
}
