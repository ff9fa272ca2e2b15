//! A Llama's forward pass in fp64, written from the formulas, to compare conversions with.
//!
//! It knows nothing of how tensors are moved from one layout to another: it asks for tensors by
//! the names of a convention and turns the pairs that this convention turns. So a tensor that
//! was renamed or permuted wrongly gives other logits. It is as plain as it can be, and reads
//! weights row by row, so that it needs no more memory than some rows.
//!
//! RMSNorm: arXiv 1910.07467, equation 4. SwiGLU: arXiv 2002.05202, equation 6. Rotary
//! embedding: arXiv 2104.09864, equation 34. Grouped queries: arXiv 2305.13245.

use crate::{Convention, Dtype, Named, PretrainedError};
use caravan_types::{ModelShape, RopeScaling};
use rayon::prelude::*;

/// Elements of weights that are read at a time.
const READ: usize = 1 << 20;

/// Random texts: two sequences of tokens.
#[derive(Clone, Debug)]
pub struct Prompts {
    /// Tokens, sequence by sequence.
    pub tokens: Vec<u32>,
    /// Tokens of each sequence.
    pub length: usize,
}

impl Prompts {
    /// Prompts for a model: eight tokens each, where its context has as many. What goes wrong
    /// in a conversion shows at any length above one, and time grows with the number of tokens.
    #[must_use]
    pub fn new(shape: &ModelShape) -> Self {
        let length = 8.min(shape.context as usize);
        // Knuth's multiplier (MMIX); the upper half of its states is random enough to differ.
        let mut state = 0x5eed_u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as u32 % shape.vocab
        };
        Self { tokens: (0..2 * length).map(|_| next()).collect(), length }
    }
}

/// The names of a layer's tensors, and of those around the layers.
struct Names {
    embedding: &'static str,
    layer: &'static str,
    attention_norm: &'static str,
    q: &'static str,
    k: &'static str,
    v: &'static str,
    o: &'static str,
    mlp_norm: &'static str,
    gate: &'static str,
    up: &'static str,
    down: &'static str,
    norm: &'static str,
    head: &'static str,
}

const HUGGING_FACE: Names = Names {
    embedding: "model.embed_tokens",
    layer: "model.layers",
    attention_norm: "input_layernorm",
    q: "self_attn.q_proj",
    k: "self_attn.k_proj",
    v: "self_attn.v_proj",
    o: "self_attn.o_proj",
    mlp_norm: "post_attention_layernorm",
    gate: "mlp.gate_proj",
    up: "mlp.up_proj",
    down: "mlp.down_proj",
    norm: "model.norm",
    head: "lm_head",
};

const META: Names = Names {
    embedding: "tok_embeddings",
    layer: "layers",
    attention_norm: "attention_norm",
    q: "attention.wq",
    k: "attention.wk",
    v: "attention.wv",
    o: "attention.wo",
    mlp_norm: "ffn_norm",
    gate: "feed_forward.w1",
    up: "feed_forward.w3",
    down: "feed_forward.w2",
    norm: "norm",
    head: "output",
};

/// The logits of every position: rows of `vocab`. Weights are rounded to `dtype` before they are
/// used, where one is given.
///
/// # Errors
/// Where a tensor cannot be read.
pub fn logits(
    model: &dyn Named,
    prompts: &Prompts,
    dtype: Option<Dtype>,
) -> Result<Vec<f64>, PretrainedError> {
    let names = match model.convention() {
        Convention::HuggingFace => &HUGGING_FACE,
        Convention::Meta => &META,
    };
    let pass = Pass { model, shape: model.shape().clone(), dtype, tokens: prompts.tokens.len() };
    let (dim, layers) = (pass.shape.dim as usize, pass.shape.layers);
    let mut x = vec![0.0; pass.tokens * dim];
    for (row, token) in x.chunks_exact_mut(dim).zip(&prompts.tokens) {
        row.copy_from_slice(&pass.rows(&format!("{}.weight", names.embedding), *token, 1, dim)?);
    }
    for layer in 0..layers {
        let name = |part: &str| format!("{}.{layer}.{part}.weight", names.layer);
        let normed = pass.norm(&name(names.attention_norm), &x)?;
        let attended = pass.attention(prompts.length, &normed, [names.q, names.k, names.v].map(name))?;
        add(&mut x, &pass.product(&name(names.o), &attended, dim)?);
        let normed = pass.norm(&name(names.mlp_norm), &x)?;
        let hidden = pass.shape.hidden as usize;
        let mut gate = pass.product(&name(names.gate), &normed, hidden)?;
        let up = pass.product(&name(names.up), &normed, hidden)?;
        for (gate, up) in gate.iter_mut().zip(up) {
            *gate = *gate / (1.0 + (-*gate).exp()) * up;
        }
        add(&mut x, &pass.product(&name(names.down), &gate, dim)?);
    }
    let normed = pass.norm(&format!("{}.weight", names.norm), &x)?;
    pass.product(&format!("{}.weight", names.head), &normed, pass.shape.vocab as usize)
}

fn add(x: &mut [f64], y: &[f64]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

struct Pass<'a> {
    model: &'a dyn Named,
    shape: ModelShape,
    dtype: Option<Dtype>,
    /// Of all prompts.
    tokens: usize,
}

impl Pass<'_> {
    /// Rows of a tensor of `cols` columns.
    fn rows(&self, name: &str, first: u32, n: usize, cols: usize) -> Result<Vec<f64>, PretrainedError> {
        let mut values = vec![0.0; n * cols];
        self.model.rows(name, u64::from(first)..u64::from(first) + n as u64, &mut values)?;
        if let Some(dtype) = self.dtype {
            dtype.round(&mut values);
        }
        Ok(values.into_iter().map(f64::from).collect())
    }

    /// x / √(mean(x²) + ε) · gain, of each token.
    fn norm(&self, name: &str, x: &[f64]) -> Result<Vec<f64>, PretrainedError> {
        let dim = self.shape.dim as usize;
        let gain = self.rows(name, 0, 1, dim)?;
        let mut out = Vec::with_capacity(x.len());
        for row in x.chunks_exact(dim) {
            let square = row.iter().map(|x| x * x).sum::<f64>() / dim as f64;
            let scale = 1.0 / (square + f64::from(self.shape.norm_eps)).sqrt();
            out.extend(row.iter().zip(&gain).map(|(x, gain)| x * scale * gain));
        }
        Ok(out)
    }

    /// x · Wᵀ for W of `outputs` rows: a row of `outputs` for each token.
    fn product(&self, name: &str, x: &[f64], outputs: usize) -> Result<Vec<f64>, PretrainedError> {
        let (n, inputs) = (self.tokens, x.len() / self.tokens);
        // Token after token within an input, so that a weight is used for all of them at once.
        let mut turned = vec![0.0; x.len()];
        for (t, row) in x.chunks_exact(inputs).enumerate() {
            row.iter().enumerate().for_each(|(i, x)| turned[i * n + t] = *x);
        }
        let mut out = vec![0.0; n * outputs];
        let at_a_time = (READ / inputs).max(1);
        for first in (0..outputs).step_by(at_a_time) {
            let rows = at_a_time.min(outputs - first);
            let weights = self.rows(name, first as u32, rows, inputs)?;
            let sums: Vec<Vec<f64>> =
                weights.par_chunks_exact(inputs).map(|row| sums(row, &turned, n)).collect();
            for (output, sums) in sums.into_iter().enumerate() {
                sums.into_iter().enumerate().for_each(|(t, sum)| out[t * outputs + first + output] = sum);
            }
        }
        Ok(out)
    }

    /// Causal attention of each prompt, by the tensors of queries, keys and values.
    fn attention(&self, length: usize, x: &[f64], names: [String; 3]) -> Result<Vec<f64>, PretrainedError> {
        let [head, heads, kv_heads] =
            [self.shape.head_dim(), self.shape.heads, self.shape.kv_heads].map(|n| n as usize);
        let [q_name, k_name, v_name] = &names;
        let mut q = self.product(q_name, x, heads * head)?;
        let mut k = self.product(k_name, x, kv_heads * head)?;
        let v = self.product(v_name, x, kv_heads * head)?;
        for (rows, width) in [(&mut q, heads * head), (&mut k, kv_heads * head)] {
            for (t, row) in rows.chunks_exact_mut(width).enumerate() {
                row.chunks_exact_mut(head).for_each(|row| self.turn(row, t % length));
            }
        }
        let mut out = vec![0.0; q.len()];
        for t in 0..self.tokens {
            let first = t - t % length;
            for h in 0..heads {
                let shared = h / (heads / kv_heads) * head;
                let query = &q[(t * heads + h) * head..][..head];
                let of = |rows: &[f64], s: usize| rows[s * kv_heads * head + shared..][..head].to_vec();
                let scores: Vec<f64> =
                    (first..=t).map(|s| dot(query, &of(&k, s)) / (head as f64).sqrt()).collect();
                let most = scores.iter().copied().fold(f64::MIN, f64::max);
                let weights: Vec<f64> = scores.iter().map(|score| (score - most).exp()).collect();
                let sum: f64 = weights.iter().sum();
                let out = &mut out[(t * heads + h) * head..][..head];
                for (s, weight) in (first..=t).zip(weights) {
                    out.iter_mut().zip(of(&v, s)).for_each(|(out, v)| *out += weight / sum * v);
                }
            }
        }
        Ok(out)
    }

    /// Turns the pairs of a head by position · frequency.
    fn turn(&self, head: &mut [f64], position: usize) {
        let half = head.len() / 2;
        for i in 0..half {
            let (a, b) = match self.model.convention() {
                Convention::HuggingFace => (i, i + half),
                Convention::Meta => (2 * i, 2 * i + 1),
            };
            let (sin, cos) = (position as f64 * self.rate(i)).sin_cos();
            (head[a], head[b]) = (head[a] * cos - head[b] * sin, head[a] * sin + head[b] * cos);
        }
    }

    /// θ^(−2i / head size), scaled as the model says.
    fn rate(&self, i: usize) -> f64 {
        let rate = f64::from(self.shape.rope_theta).powf(-2.0 * i as f64 / f64::from(self.shape.head_dim()));
        match self.shape.rope_scaling {
            None => rate,
            Some(RopeScaling::Linear { factor }) => rate / f64::from(factor),
            Some(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context }) => {
                let [factor, low, high] = [factor, low_freq_factor, high_freq_factor].map(f64::from);
                let (context, wave) = (f64::from(original_context), std::f64::consts::TAU / rate);
                if wave < context / high {
                    rate
                } else if wave > context / low {
                    rate / factor
                } else {
                    let smooth = (context / wave - low) / (high - low);
                    (1.0 - smooth) * rate / factor + smooth * rate
                }
            }
        }
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The products of a row of weights with all `n` tokens.
fn sums(row: &[f64], turned: &[f64], n: usize) -> Vec<f64> {
    let mut sums = vec![0.0; n];
    for (weight, x) in row.iter().zip(turned.chunks_exact(n)) {
        sums.iter_mut().zip(x).for_each(|(sum, x)| *sum += weight * x);
    }
    sums
}
