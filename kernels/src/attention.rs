//! Causal grouped-query attention (arXiv 1706.03762, 2305.13245) within documents.
//!
//! Query head h reads key-value head h / (heads / kv_heads). Position p sees the positions
//! `document_start[p]..=p`. Scores exist for one block of queries of one head at a time; the
//! backward pass computes them again from the saved log-sum-exp (arXiv 2205.14135, whose
//! tiling over keys is not needed while a block of rows fits in the second-level cache).
//! A task is one key-value head of one sequence, so that the sums of its gradients stay
//! within one thread and have one order.

// Heads of different tasks interleave in the rows of one matrix.
#![allow(unsafe_code)]

use crate::add::narrow_chunk;
use crate::matmul::{Into, packed_in, packed_len, product_rows};
use crate::target::Target;
use crate::{Cpu, Element, Family, Real, View, ViewMut, reduce, scratch};
use std::ops::Range;

/// Queries whose scores exist at a time: a multiple of every family's tile height (6 and 4).
/// A larger block computes more scores that the causal mask throws away. Gradients of keys
/// and values are summed block by block: changing it changes bits.
const QUERIES: usize = 48;

/// Sizes of one attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Number of sequences.
    pub sequences: usize,
    /// Queries per sequence, the last of which is at position `keys` − 1.
    pub queries: usize,
    /// Keys and values per sequence, positions from 0.
    pub keys: usize,
    /// Query heads.
    pub heads: usize,
    /// Key-value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head: usize,
}

impl Shape {
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// 1/√head: what scores are multiplied by.
    fn scale<R: Real>(&self) -> R {
        R::from_f64(1.0 / (self.head as f64).sqrt())
    }

    /// Position of the first query.
    fn first(&self) -> usize {
        self.keys - self.queries
    }
}

/// What attention reads: heads side by side in rows, one row a position.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a, E> {
    /// Queries.
    pub q: &'a [E],
    /// Elements from one row of queries to the next.
    pub q_stride: usize,
    /// Keys.
    pub k: &'a [E],
    /// Values.
    pub v: &'a [E],
    /// Elements from one row of keys or values to the next.
    pub kv_stride: usize,
    /// For each query, the first position that it sees.
    pub document_start: &'a [u32],
}

impl<'a, E: Element> Inputs<'a, E> {
    /// Queries, keys and values side by side in rows, as one projection makes them.
    #[must_use]
    pub fn fused(qkv: &'a [E], shape: &Shape, document_start: &'a [u32]) -> Self {
        let (q, kv) = (shape.heads * shape.head, shape.kv_heads * shape.head);
        let width = q + 2 * kv;
        Self { q: qkv, q_stride: width, k: &qkv[q..], v: &qkv[q + kv..], kv_stride: width, document_start }
    }

    /// One head's keys or values of one sequence.
    fn keys(&self, shape: &Shape, rows: &'a [E], sequence: usize, kv_head: usize) -> View<'a, E> {
        let start = sequence * shape.keys * self.kv_stride + kv_head * shape.head;
        View::new(&rows[start..], shape.keys, shape.head, self.kv_stride)
    }
}

/// One block of one query head.
struct Block {
    /// Rows among all queries.
    rows: Range<usize>,
    /// Query head.
    head: usize,
    /// Position of the first row.
    position: usize,
}

impl Block {
    /// Keys that any row of the block sees are below this.
    fn keys(&self) -> usize {
        self.position + self.rows.len()
    }

    /// Rows of this block's head in a matrix of heads side by side.
    fn view<'a, E: Element>(&self, shape: &Shape, data: &'a [E], stride: usize) -> View<'a, E> {
        let start = self.rows.start * stride + self.head * shape.head;
        View::new(&data[start..], self.rows.len(), shape.head, stride)
    }
}

fn blocks(shape: &Shape, sequence: usize, kv_head: usize) -> impl Iterator<Item = Block> {
    let shape = *shape;
    let heads = kv_head * shape.group()..(kv_head + 1) * shape.group();
    heads.flat_map(move |head| {
        (0..shape.queries).step_by(QUERIES).map(move |query| {
            let start = sequence * shape.queries + query;
            let end = sequence * shape.queries + (query + QUERIES).min(shape.queries);
            Block { rows: start..end, head, position: shape.first() + query }
        })
    })
}

/// Sets `out` (rows of heads · head) and, for the backward pass, `lse`: for each row and head
/// the logarithm of the sum of exponentials of its scaled scores.
///
/// # Panics
/// Where lengths do not fit.
pub fn forward<E: Element>(
    cpu: &Cpu,
    shape: &Shape,
    inputs: &Inputs<'_, E>,
    out: &mut [E],
    lse: &mut [E::Sum],
) {
    let rows = shape.sequences * shape.queries;
    let width = shape.heads * shape.head;
    check(shape, inputs);
    assert!(out.len() == rows * width && lse.len() == rows * shape.heads);
    let (out, lse) = (Target::new(out), Target::new(lse));
    cpu.for_each(shape.sequences * shape.kv_heads, |task| {
        let (sequence, kv_head) = (task / shape.kv_heads, task % shape.kv_heads);
        let head = Head { family: cpu.family(), shape, sequence, kv_head };
        // SAFETY: a task has the query heads that read its key-value head, in the rows of its
        // sequence, to itself; the sizes were compared above.
        unsafe { head.forward(inputs, out, lse) };
    });
}

/// Sets `dqkv` (rows of queries, keys, values) to the gradient, given `dout`, the inputs of
/// [`Inputs::fused`] over the same rows, and what [`forward`] gave.
///
/// # Panics
/// Where lengths do not fit.
pub fn backward<E: Element>(
    cpu: &Cpu,
    shape: &Shape,
    inputs: &Inputs<'_, E>,
    (out, lse): (&[E], &[E::Sum]),
    dout: &[E],
    dqkv: &mut [E],
) {
    check(shape, inputs);
    let width = (shape.heads + 2 * shape.kv_heads) * shape.head;
    let rows = shape.sequences * shape.queries;
    assert!(shape.queries == shape.keys && dqkv.len() == rows * width && lse.len() == rows * shape.heads);
    assert!(out.len() == rows * shape.heads * shape.head && dout.len() == out.len());
    let dqkv = Target::new(dqkv);
    cpu.for_each(shape.sequences * shape.kv_heads, |task| {
        let (sequence, kv_head) = (task / shape.kv_heads, task % shape.kv_heads);
        let head = Head { family: cpu.family(), shape, sequence, kv_head };
        // SAFETY: a task has the columns of its key-value head, and of the query heads that
        // read it, in the rows of its sequence to itself; the sizes were compared above.
        unsafe { head.backward(inputs, out, lse, dout, dqkv) };
    });
}

/// One key-value head of one sequence.
struct Head<'a> {
    family: Family,
    shape: &'a Shape,
    sequence: usize,
    kv_head: usize,
}

impl Head<'_> {
    /// # Safety
    /// Nobody else touches this head's part of `out` and `lse`, matrices of the shape's size.
    unsafe fn forward<E: Element>(&self, inputs: &Inputs<'_, E>, out: Target<E>, lse: Target<E::Sum>) {
        let Self { family, shape, .. } = *self;
        let (t, d, width) = (shape.keys, shape.head, shape.heads * shape.head);
        let k = inputs.keys(shape, inputs.k, self.sequence, self.kv_head);
        let v = inputs.keys(shape, inputs.v, self.sequence, self.kv_head);
        let packed = packed_len::<E>(d, t, family) + packed_len::<E>(t, d, family);
        scratch::with2(
            QUERIES * t,
            packed + QUERIES * (t + d),
            |scores: &mut [E::Sum], mut memory: &mut [E]| {
                let k = packed_in(family, k.t(), &mut memory);
                let v = packed_in(family, v, &mut memory);
                let (p, result) = memory.split_at_mut(QUERIES * t);
                for block in blocks(shape, self.sequence, self.kv_head) {
                    let (n, keys) = (block.rows.len(), block.keys());
                    let (scores, p, result) =
                        (&mut scores[..n * keys], &mut p[..n * keys], &mut result[..n * d]);
                    let q = block.view(shape, inputs.q, inputs.q_stride);
                    product_rows(family, q, &k, ViewMut::rows_of(scores, keys), Into::Set);
                    for (i, row) in block.rows.clone().enumerate() {
                        let seen = inputs.document_start[row] as usize..block.position + i + 1;
                        let (scores, p) = (&mut scores[i * keys..][..keys], &mut p[i * keys..][..keys]);
                        let sum = softmax(family, scores, p, seen, shape.scale());
                        // SAFETY: the caller's promise.
                        unsafe { *lse.at(row * shape.heads + block.head) = sum };
                    }
                    product_rows(family, View::rows_of(p, keys), &v, ViewMut::rows_of(result, d), Into::Set);
                    for (row, result) in block.rows.clone().zip(result.chunks_exact(d)) {
                        // SAFETY: the caller's promise.
                        unsafe { out.part(row * width + block.head * d, d) }.copy_from_slice(result);
                    }
                }
            },
        );
    }

    /// # Safety
    /// Nobody else touches this head's part of `dqkv`, a matrix of the shape's size.
    unsafe fn backward<E: Element>(
        &self,
        inputs: &Inputs<'_, E>,
        out: &[E],
        lse: &[E::Sum],
        dout: &[E],
        dqkv: Target<E>,
    ) {
        let Self { family, shape, .. } = *self;
        let (t, d, width) = (shape.keys, shape.head, shape.heads * shape.head);
        let stride = width + 2 * shape.kv_heads * d;
        let k = inputs.keys(shape, inputs.k, self.sequence, self.kv_head);
        let v = inputs.keys(shape, inputs.v, self.sequence, self.kv_head);
        let packed = 2 * packed_len::<E>(d, t, family)
            + packed_len::<E>(t, d, family)
            + packed_len::<E>(QUERIES, d, family);
        let sums = 2 * t * d + 2 * QUERIES * t;
        scratch::with2(
            sums,
            packed + QUERIES * (2 * t + d),
            |mut sums: &mut [E::Sum], mut memory: &mut [E]| {
                let kt = packed_in(family, k.t(), &mut memory);
                let vt = packed_in(family, v.t(), &mut memory);
                let k = packed_in(family, k, &mut memory);
                let [p, ds] = [QUERIES * t; 2].map(|len| scratch::take(&mut memory, len));
                let dq = scratch::take(&mut memory, QUERIES * d);
                let [dk, dv] = [t * d; 2].map(|len| scratch::take(&mut sums, len));
                let [scores, dscores] = [QUERIES * t; 2].map(|len| scratch::take(&mut sums, len));
                dk.fill(E::Sum::ZERO);
                dv.fill(E::Sum::ZERO);
                for block in blocks(shape, self.sequence, self.kv_head) {
                    let (n, keys) = (block.rows.len(), block.keys());
                    let (p, ds, dq) = (&mut p[..n * keys], &mut ds[..n * keys], &mut dq[..n * d]);
                    let (scores, dscores) = (&mut scores[..n * keys], &mut dscores[..n * keys]);
                    let q = block.view(shape, inputs.q, inputs.q_stride);
                    let do_ = block.view(shape, dout, width);
                    product_rows(family, q, &kt, ViewMut::rows_of(scores, keys), Into::Set);
                    product_rows(family, do_, &vt, ViewMut::rows_of(dscores, keys), Into::Set);
                    for (i, row) in block.rows.clone().enumerate() {
                        let seen = inputs.document_start[row] as usize..block.position + i + 1;
                        let at = row * width + block.head * d;
                        let delta = dot(family, &out[at..at + d], &dout[at..at + d]);
                        let line = i * keys..(i + 1) * keys;
                        let scores = (&scores[line.clone()], &dscores[line.clone()]);
                        let to = (&mut p[line.clone()], &mut ds[line]);
                        let lse = lse[row * shape.heads + block.head];
                        softmax_gradient(family, scores, to, seen, shape.scale(), lse, delta);
                    }
                    product_rows(family, View::rows_of(ds, keys), &k, ViewMut::rows_of(dq, d), Into::Set);
                    for (row, dq) in block.rows.clone().zip(dq.chunks_exact(d)) {
                        // SAFETY: the caller's promise.
                        unsafe { dqkv.part(row * stride + block.head * d, d) }.copy_from_slice(dq);
                    }
                    let mut rest = &mut *memory;
                    let rows = packed_in(family, do_, &mut rest);
                    let sum = ViewMut::rows_of(&mut dv[..keys * d], d);
                    product_rows(family, View::rows_of(p, keys).t(), &rows, sum, Into::Add);
                    let mut rest = &mut *memory;
                    let rows = packed_in(family, q, &mut rest);
                    let sum = ViewMut::rows_of(&mut dk[..keys * d], d);
                    product_rows(family, View::rows_of(ds, keys).t(), &rows, sum, Into::Add);
                }
                for (i, (dk, dv)) in dk.chunks_exact(d).zip(dv.chunks_exact(d)).enumerate() {
                    let at = (self.sequence * t + i) * stride + width + self.kv_head * d;
                    // SAFETY: the caller's promise.
                    narrow_chunk(family, unsafe { dqkv.part(at, d) }, dk);
                    // SAFETY: the caller's promise.
                    narrow_chunk(family, unsafe { dqkv.part(at + shape.kv_heads * d, d) }, dv);
                }
            },
        );
    }
}

fn check<E>(shape: &Shape, inputs: &Inputs<'_, E>) {
    assert!(shape.queries <= shape.keys && shape.heads.is_multiple_of(shape.kv_heads), "{shape:?}");
    let n = shape.sequences * shape.queries;
    assert_eq!(inputs.document_start.len(), n);
    let own = |row: usize| shape.first() + row % shape.queries;
    let starts = inputs.document_start.iter().enumerate();
    assert!(starts.into_iter().all(|(row, start)| *start as usize <= own(row)), "a document starts later");
}

kernel! {
    fn dot<E: Element>(a: &[E], b: &[E]) -> E::Sum {
        reduce::sum2(a, b, |a, b| a.widen() * b.widen())
    }
}

kernel! {
    /// Sets `p` to the probabilities of one query's `scores` over the keys `seen`, 0 elsewhere,
    /// and returns the logarithm of the sum of exponentials. The scores are used up.
    fn softmax<E: Element>(scores: &mut [E::Sum], p: &mut [E], seen: Range<usize>, scale: E::Sum) -> E::Sum {
        p[..seen.start].fill(E::default());
        p[seen.end..].fill(E::default());
        let (scores, p) = (&mut scores[seen.clone()], &mut p[seen]);
        for x in scores.iter_mut() {
            *x *= scale;
        }
        let max = reduce::max(scores);
        let sum = reduce::exp_sum(scores, max);
        let inverse = E::Sum::ONE / sum;
        for (p, x) in p.iter_mut().zip(scores) {
            *p = E::narrow(*x * inverse);
        }
        max + E::Sum::from_f64(libm::log(sum.to_f64()))
    }
}

kernel! {
    /// Turns scores into probabilities `p`, and the gradient of probabilities into that of
    /// unscaled scores: ds = p · (dp − Σ p·dp) · scale, where Σ p·dp = out · dout = `delta`.
    fn softmax_gradient<E: Element>(
        from: (&[E::Sum], &[E::Sum]),
        to: (&mut [E], &mut [E]),
        seen: Range<usize>,
        scale: E::Sum,
        lse: E::Sum,
        delta: E::Sum,
    ) {
        let ((scores, dp), (p, ds)) = (from, to);
        for row in [&mut *p, &mut *ds] {
            row[..seen.start].fill(E::default());
            row[seen.end..].fill(E::default());
        }
        let from = scores[seen.clone()].iter().zip(&dp[seen.clone()]);
        for ((p, ds), (score, dp)) in p[seen.clone()].iter_mut().zip(&mut ds[seen]).zip(from) {
            let exact = (*score * scale - lse).exp();
            *p = E::narrow(exact);
            *ds = E::narrow(exact * (*dp - delta) * scale);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize) -> Vec<f64> {
        (0..n).map(|i| libm::sin(i as f64 * 0.7) * 2.0).collect()
    }

    /// softmax(q·kᵀ/√d)·v, written out.
    fn naive(shape: &Shape, qkv: &[f64], document_start: &[u32]) -> Vec<f64> {
        let (d, width) = (shape.head, (shape.heads + 2 * shape.kv_heads) * shape.head);
        let mut out = Vec::new();
        for (row, start) in document_start.iter().enumerate() {
            let (sequence, position) = (row / shape.keys, row % shape.keys);
            for head in 0..shape.heads {
                let kv = head / shape.group();
                let part = |row: usize, start: usize| &qkv[row * width + start..][..d];
                let at = |key: usize| sequence * shape.keys + key;
                let q = part(row, head * d);
                let weight = |key: usize| {
                    let k = part(at(key), (shape.heads + kv) * d);
                    let score: f64 = q.iter().zip(k).map(|(q, k)| q * k).sum();
                    libm::exp(score / (d as f64).sqrt())
                };
                let seen = *start as usize..=position;
                let total: f64 = seen.clone().map(weight).sum();
                out.extend((0..d).map(|i| {
                    let value = |key| part(at(key), (shape.heads + shape.kv_heads + kv) * d)[i];
                    seen.clone().map(|key| weight(key) / total * value(key)).sum::<f64>()
                }));
            }
        }
        out
    }

    #[test]
    fn it_is_softmax_attention_within_documents() {
        let shape = Shape { sequences: 2, queries: 110, keys: 110, heads: 4, kv_heads: 2, head: 6 };
        let qkv = numbers(220 * 8 * 6);
        let document_start: Vec<u32> = (0..220u32).map(|i| i % 110 / 37 * 37).collect();
        let expected = naive(&shape, &qkv, &document_start);
        for family in Family::available() {
            let cpu = Cpu::new(2, family).unwrap();
            let (mut out, mut lse) = (vec![0.0; 220 * 24], vec![0.0; 220 * 4]);
            forward(&cpu, &shape, &Inputs::fused(&qkv, &shape, &document_start), &mut out, &mut lse);
            let error = out.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            assert!(error < 1e-12, "{family}: {error}");
        }
    }

    #[test]
    #[should_panic(expected = "a document starts later")]
    fn a_document_cannot_start_after_its_position() {
        let shape = Shape { sequences: 1, queries: 2, keys: 2, heads: 1, kv_heads: 1, head: 2 };
        let cpu = Cpu::new(1, Family::best()).unwrap();
        let qkv = numbers(12);
        let inputs = Inputs::fused(&qkv, &shape, &[1, 0]);
        forward(&cpu, &shape, &inputs, &mut [0.0; 4], &mut [0.0; 2]);
    }
}
