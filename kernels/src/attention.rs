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

use crate::matmul::{Into, packed_in, packed_len, product_serial};
use crate::target::Target;
use crate::{Cpu, Family, Real, View, ViewMut, reduce, scratch};
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
pub struct Inputs<'a, R> {
    /// Queries.
    pub q: &'a [R],
    /// Elements from one row of queries to the next.
    pub q_stride: usize,
    /// Keys.
    pub k: &'a [R],
    /// Values.
    pub v: &'a [R],
    /// Elements from one row of keys or values to the next.
    pub kv_stride: usize,
    /// For each query, the first position that it sees.
    pub document_start: &'a [u32],
}

impl<'a, R: Real> Inputs<'a, R> {
    /// Queries, keys and values side by side in rows, as one projection makes them.
    #[must_use]
    pub fn fused(qkv: &'a [R], shape: &Shape, document_start: &'a [u32]) -> Self {
        let (q, kv) = (shape.heads * shape.head, shape.kv_heads * shape.head);
        let width = q + 2 * kv;
        Self { q: qkv, q_stride: width, k: &qkv[q..], v: &qkv[q + kv..], kv_stride: width, document_start }
    }

    /// One head's keys or values of one sequence.
    fn keys(&self, shape: &Shape, rows: &'a [R], sequence: usize, kv_head: usize) -> View<'a, R> {
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
    fn view<'a, R: Real>(&self, shape: &Shape, data: &'a [R], stride: usize) -> View<'a, R> {
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
pub fn forward<R: Real>(cpu: &Cpu, shape: &Shape, inputs: &Inputs<'_, R>, out: &mut [R], lse: &mut [R]) {
    let rows = shape.sequences * shape.queries;
    let width = shape.heads * shape.head;
    check(shape, inputs);
    assert!(out.len() == rows * width && lse.len() == rows * shape.heads);
    let (family, d) = (cpu.family(), shape.head);
    let (out, lse) = (Target::new(out), Target::new(lse));
    cpu.for_each(shape.sequences * shape.kv_heads, |task| {
        let (sequence, kv_head) = (task / shape.kv_heads, task % shape.kv_heads);
        let k = inputs.keys(shape, inputs.k, sequence, kv_head);
        let v = inputs.keys(shape, inputs.v, sequence, kv_head);
        let packed = packed_len::<R>(d, shape.keys, family) + packed_len::<R>(shape.keys, d, family);
        scratch::with(packed + QUERIES * (shape.keys + d), |mut memory| {
            let k = packed_in(family, k.t(), &mut memory);
            let v = packed_in(family, v, &mut memory);
            let (scores, result) = memory.split_at_mut(QUERIES * shape.keys);
            for block in blocks(shape, sequence, kv_head) {
                let (n, keys) = (block.rows.len(), block.keys());
                let scores = &mut scores[..n * keys];
                let q = block.view(shape, inputs.q, inputs.q_stride);
                product_serial(family, q, &k, ViewMut::rows_of(scores, keys), Into::Set);
                for (i, row) in block.rows.clone().enumerate() {
                    let seen = inputs.document_start[row] as usize..block.position + i + 1;
                    let sum = softmax(family, &mut scores[i * keys..][..keys], seen, shape.scale());
                    // SAFETY: this task alone has this row's head.
                    unsafe { *lse.at(row * shape.heads + block.head) = sum };
                }
                let result = &mut result[..n * d];
                let p = View::rows_of(scores, keys);
                product_serial(family, p, &v, ViewMut::rows_of(result, d), Into::Set);
                for (row, result) in block.rows.clone().zip(result.chunks_exact(d)) {
                    // SAFETY: this task alone has this row's head.
                    let out = unsafe { out.part(row * width + block.head * d, d) };
                    out.copy_from_slice(result);
                }
            }
        });
    });
}

/// Sets `dqkv` (rows of queries, keys, values) to the gradient, given `dout`, the inputs of
/// [`Inputs::fused`] over the same rows, and what [`forward`] gave.
///
/// # Panics
/// Where lengths do not fit.
pub fn backward<R: Real>(
    cpu: &Cpu,
    shape: &Shape,
    inputs: &Inputs<'_, R>,
    (out, lse): (&[R], &[R]),
    dout: &[R],
    dqkv: &mut [R],
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
    /// Nobody else touches this head's part of `dqkv`, a matrix of the shape's size.
    unsafe fn backward<R: Real>(
        &self,
        inputs: &Inputs<'_, R>,
        out: &[R],
        lse: &[R],
        dout: &[R],
        dqkv: Target<R>,
    ) {
        let Self { family, shape, .. } = *self;
        let (t, d, width) = (shape.keys, shape.head, shape.heads * shape.head);
        let stride = width + 2 * shape.kv_heads * d;
        let k = inputs.keys(shape, inputs.k, self.sequence, self.kv_head);
        let v = inputs.keys(shape, inputs.v, self.sequence, self.kv_head);
        let wide = packed_len::<R>(d, t, family);
        let packed = 2 * wide + packed_len::<R>(t, d, family) + packed_len::<R>(QUERIES, d, family);
        scratch::with(packed + 2 * t * d + QUERIES * (2 * t + d), |mut memory| {
            let kt = packed_in(family, k.t(), &mut memory);
            let vt = packed_in(family, v.t(), &mut memory);
            let k = packed_in(family, k, &mut memory);
            let dk = scratch::take(&mut memory, t * d);
            let dv = scratch::take(&mut memory, t * d);
            let p = scratch::take(&mut memory, QUERIES * t);
            let ds = scratch::take(&mut memory, QUERIES * t);
            let dq = scratch::take(&mut memory, QUERIES * d);
            dk.fill(R::ZERO);
            dv.fill(R::ZERO);
            for block in blocks(shape, self.sequence, self.kv_head) {
                let (n, keys) = (block.rows.len(), block.keys());
                let (p, ds, dq) = (&mut p[..n * keys], &mut ds[..n * keys], &mut dq[..n * d]);
                let q = block.view(shape, inputs.q, inputs.q_stride);
                let do_ = block.view(shape, dout, width);
                product_serial(family, q, &kt, ViewMut::rows_of(p, keys), Into::Set);
                product_serial(family, do_, &vt, ViewMut::rows_of(ds, keys), Into::Set);
                for (i, row) in block.rows.clone().enumerate() {
                    let seen = inputs.document_start[row] as usize..block.position + i + 1;
                    let at = row * width + block.head * d;
                    let delta = dot(family, &out[at..at + d], &dout[at..at + d]);
                    let (p, ds) = (&mut p[i * keys..][..keys], &mut ds[i * keys..][..keys]);
                    let lse = lse[row * shape.heads + block.head];
                    softmax_gradient(family, p, ds, seen, shape.scale(), lse, delta);
                }
                product_serial(family, View::rows_of(ds, keys), &k, ViewMut::rows_of(dq, d), Into::Set);
                for (row, dq) in block.rows.clone().zip(dq.chunks_exact(d)) {
                    // SAFETY: the caller's promise.
                    unsafe { dqkv.part(row * stride + block.head * d, d) }.copy_from_slice(dq);
                }
                let mut rest = &mut *memory;
                let rows = packed_in(family, do_, &mut rest);
                let sum = ViewMut::rows_of(&mut dv[..keys * d], d);
                product_serial(family, View::rows_of(p, keys).t(), &rows, sum, Into::Add);
                let mut rest = &mut *memory;
                let rows = packed_in(family, q, &mut rest);
                let sum = ViewMut::rows_of(&mut dk[..keys * d], d);
                product_serial(family, View::rows_of(ds, keys).t(), &rows, sum, Into::Add);
            }
            for (i, (dk, dv)) in dk.chunks_exact(d).zip(dv.chunks_exact(d)).enumerate() {
                let at = (self.sequence * t + i) * stride + width + self.kv_head * d;
                // SAFETY: the caller's promise.
                unsafe { dqkv.part(at, d) }.copy_from_slice(dk);
                // SAFETY: the caller's promise.
                unsafe { dqkv.part(at + shape.kv_heads * d, d) }.copy_from_slice(dv);
            }
        });
    }
}

fn check<R>(shape: &Shape, inputs: &Inputs<'_, R>) {
    assert!(shape.queries <= shape.keys && shape.heads.is_multiple_of(shape.kv_heads), "{shape:?}");
    let n = shape.sequences * shape.queries;
    assert_eq!(inputs.document_start.len(), n);
    let own = |row: usize| shape.first() + row % shape.queries;
    let starts = inputs.document_start.iter().enumerate();
    assert!(starts.into_iter().all(|(row, start)| *start as usize <= own(row)), "a document starts later");
}

kernel! {
    fn dot<R>(a: &[R], b: &[R]) -> R {
        reduce::sum2(a, b, |a, b| a * b)
    }
}

kernel! {
    /// Turns the scores of one query into probabilities over the keys `seen`, 0 elsewhere,
    /// and returns the logarithm of the sum of exponentials.
    fn softmax<R>(row: &mut [R], seen: Range<usize>, scale: R) -> R {
        row[..seen.start].fill(R::ZERO);
        row[seen.end..].fill(R::ZERO);
        let row = &mut row[seen];
        for x in row.iter_mut() {
            *x *= scale;
        }
        let max = reduce::max(row);
        let sum = reduce::exp_sum(row, max);
        let inverse = R::ONE / sum;
        for x in row.iter_mut() {
            *x *= inverse;
        }
        max + R::from_f64(libm::log(sum.to_f64()))
    }
}

kernel! {
    /// Turns scores into probabilities `p`, and the gradient of probabilities into that of
    /// unscaled scores: ds = p · (dp − Σ p·dp) · scale, where Σ p·dp = out · dout = `delta`.
    fn softmax_gradient<R>(
        p: &mut [R],
        ds: &mut [R],
        seen: Range<usize>,
        scale: R,
        lse: R,
        delta: R,
    ) {
        for row in [&mut *p, &mut *ds] {
            row[..seen.start].fill(R::ZERO);
            row[seen.end..].fill(R::ZERO);
        }
        for (p, ds) in p[seen.clone()].iter_mut().zip(&mut ds[seen]) {
            *p = (*p * scale - lse).exp();
            *ds = *p * (*ds - delta) * scale;
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
