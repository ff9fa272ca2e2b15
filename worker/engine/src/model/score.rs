//! Scores of given texts: how likely the model finds each of their tokens.
//!
//! The layers are those of training, and the scores are its losses to the bit. Of activations
//! only one layer's exist, since nothing goes back, and of logits one chunk.
//!
//! Texts of similar length share a micro-batch, each in a row of its own from position 0 on, and
//! shorter ones are filled up. What fills up comes behind the text, where causal attention never
//! looks, and is its first token over and over, each a document of its own: every value of such
//! a row is one that the first row has, too. So a text's scores have the same bits alone and
//! among any others.

use super::{Flight, Model, check, logit_rows, reserve_packed};
use caravan_kernels::{Cpu, Element, View, ViewMut, embedding, log_prob, matmul};
use caravan_types::MicroBatch;
use std::mem;

/// Tokens that go through the layers together, or one text where it is longer: so many that
/// packing the weights for each product is nothing beside the product, which uses each packed
/// element so many times, and few enough that activations stay small (gate and up of the 1.1b
/// shape: 2048 · 2 · 5632 · 4 bytes = 92 MB).
const TOKENS: usize = 2048;

/// What a model makes of a token, given those before it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Score {
    /// Natural logarithm of its probability.
    pub log_prob: f64,
    /// Whether it is the likeliest one; of several alike, the lowest.
    pub greedy: bool,
}

impl<E: Element> Model<E> {
    /// The scores of each text's tokens from the second on, for a stage that is the whole
    /// model. Weights are flat. Each text is one document that begins at position 0.
    ///
    /// # Errors
    /// Where a text is longer than the context and one token after it, or a token is outside the
    /// vocabulary: the reason.
    pub fn score(&mut self, cpu: &Cpu, weights: &[E], texts: &[&[u32]]) -> Result<Vec<Vec<Score>>, String> {
        let weights = self.layout.split(weights);
        let mut scores = vec![Vec::new(); texts.len()];
        for group in groups(texts) {
            let rows: Vec<&[u32]> = group.iter().map(|i| texts[*i]).collect();
            let batch = micro_batch(&rows);
            check(&self.layout, &batch)?;
            let mut found = cpu.install(|| self.score_batch(cpu, &weights, batch)).into_iter();
            for (i, row) in group.iter().zip(rows) {
                scores[*i] = found.by_ref().take(row.len() - 1).collect();
            }
        }
        Ok(scores)
    }

    /// The scores of the targets that count, row by row.
    fn score_batch(&mut self, cpu: &Cpu, weights: &[&[E]], batch: MicroBatch) -> Vec<Score> {
        let mut flight = self.spare.pop().unwrap_or_default();
        flight.batch = batch;
        self.reserve_forward(cpu, &mut flight);
        let (n, dim) = (flight.batch.tokens.len(), self.layout.dim);
        embedding::forward(cpu, &flight.batch.tokens, weights[0], dim, &mut flight.streams[0][..n * dim]);
        let mut kept = mem::take(&mut self.memory.layer);
        for layer in 0..self.layout.layers {
            let Flight { batch, streams, .. } = &mut flight;
            let (this, next) = streams.split_at_mut(1);
            if layer > 0 {
                mem::swap(&mut this[0], &mut next[0]);
            }
            self.forward_layer(cpu, weights[layer + 1], batch, &this[0], &mut kept, Some(&mut next[0]));
        }
        self.memory.layer = kept;
        let scores = self.score_head(cpu, weights[self.layout.layers + 1], &flight);
        self.spare.push(flight);
        scores
    }

    /// Takes memory for a micro-batch that does not come back: one layer, and the residual
    /// stream after it.
    fn reserve_forward(&mut self, cpu: &Cpu, flight: &mut Flight<E>) {
        let (n, layout) = (flight.batch.tokens.len(), &self.layout);
        flight.streams.resize_with(2, Default::default);
        flight.streams.iter_mut().for_each(|stream| stream.fit(n * layout.dim));
        self.memory.layer.reserve(layout, n);
        self.memory.normed.fit(n * layout.dim);
        self.memory.product.fit(n * layout.hidden);
        reserve_packed(&mut self.memory.packed, layout, cpu.family());
    }

    /// Final norm, head and logarithms for the rows that count, a chunk of logits at a time;
    /// `w` is the last unit.
    fn score_head(&mut self, cpu: &Cpu, w: &[E], flight: &Flight<E>) -> Vec<Score> {
        let (dim, vocab) = (self.layout.dim, self.layout.vocab);
        let batch = &flight.batch;
        self.final_norm(cpu, w, flight, batch.tokens.len());
        let m = &mut self.memory;
        let mut targets = Vec::new();
        for row in (0..batch.tokens.len()).filter(|row| batch.counted[*row]) {
            m.normed.copy_within(row * dim..(row + 1) * dim, targets.len() * dim);
            targets.push(batch.targets[row]);
        }
        let (n, chunk) = (targets.len(), logit_rows::<E>(vocab).0);
        m.logits.fit(chunk.min(n) * vocab);
        m.head[0].fit(matmul::packed_len::<E>(dim, vocab, cpu.family()));
        let head = View::rows_of(&w[self.layout.head_weight.clone()], dim);
        let head = matmul::pack(cpu, head.t(), &mut m.head[0]);
        let (mut log_probs, mut greedy) = (vec![0.0; n], vec![false; n]);
        for start in (0..n).step_by(chunk) {
            let rows = start..(start + chunk).min(n);
            let logits = &mut m.logits[..rows.len() * vocab];
            let normed = View::rows_of(&m.normed[rows.start * dim..rows.end * dim], dim);
            matmul::product(cpu, normed, &head, ViewMut::rows_of(logits, vocab), matmul::Into::Set);
            let (log_probs, greedy) = (&mut log_probs[rows.clone()], &mut greedy[rows.clone()]);
            log_prob::forward(cpu, logits, vocab, &targets[rows], log_probs, greedy);
        }
        log_probs.into_iter().zip(greedy).map(|(log_prob, greedy)| Score { log_prob, greedy }).collect()
    }
}

/// The texts that have something to score, by number, the longest first, so that those of
/// similar length meet; cut into micro-batches.
fn groups(texts: &[&[u32]]) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..texts.len()).filter(|i| texts[*i].len() > 1).collect();
    order.sort_by_key(|i| std::cmp::Reverse(texts[*i].len()));
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for i in order {
        match groups.last_mut() {
            Some(group) if (group.len() + 1) * (texts[group[0]].len() - 1) <= TOKENS => group.push(i),
            _ => groups.push(vec![i]),
        }
    }
    groups
}

/// A row for each text, as long as the first, which is the longest: all its tokens but the
/// last predict the next one. Each has two at least.
fn micro_batch(texts: &[&[u32]]) -> MicroBatch {
    let (sequences, length) = (texts.len(), texts[0].len() - 1);
    let mut batch = MicroBatch { sequences, length, ..MicroBatch::default() };
    for text in texts {
        let own = text.len() - 1;
        batch.tokens.extend(&text[..own]);
        batch.tokens.extend((own..length).map(|_| text[0]));
        batch.targets.extend(&text[1..]);
        batch.targets.extend((own..length).map(|_| text[0]));
        batch.counted.extend((0..length).map(|i| i < own));
        batch.document_start.extend((0..length).map(|i| if i < own { 0 } else { i as u32 }));
    }
    batch
}
