//! Every gradient against finite differences, and bits that depend on no number of threads.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails where it stands")]

mod common;

use caravan_engine::Model;
use caravan_kernels::{Cpu, Family, Real};
use caravan_types::{MicroBatch, ModelShape};
use common::{Numbers, batch, tiny, weights};

fn gradient<R: Real>(cpu: &Cpu, shape: &ModelShape, w: &[R], batch: &MicroBatch) -> (f64, Vec<R>) {
    let counted = batch.counted.iter().filter(|c| **c).count();
    let mut out = vec![R::ZERO; w.len()];
    let mut model = Model::new(shape).unwrap();
    let loss = model.gradient(cpu, w, &mut out, batch, 1.0 / counted as f64, &|_| false);
    (loss.unwrap().unwrap(), out)
}

/// Compares some elements of every tensor with central differences in f64. A difference over
/// ±h has an error of about h² · third derivative + 1e-16 · loss / h: 1e-9 here.
fn compare(cpu: &Cpu, shape: &ModelShape, batch: &MicroBatch, each: u64) {
    let mut w = weights::<f64>(shape, 3);
    let (_, exact) = gradient(cpu, shape, &w, batch);
    let mut model = Model::new(shape).unwrap();
    let mut scrap = vec![0.0; w.len()];
    let counted = batch.counted.iter().filter(|c| **c).count();
    let mut loss = |w: &[f64]| {
        model.gradient(cpu, w, &mut scrap, batch, 1.0 / counted as f64, &|_| false).unwrap().unwrap()
    };
    let mut numbers = Numbers(5);
    for p in shape.all_parameters() {
        let mut largest = 0.0f64;
        for _ in 0..each.min(p.len()) {
            let i = (p.offset + numbers.below(p.len())) as usize;
            let (before, h) = (w[i], 1e-5);
            w[i] = before + h;
            let above = loss(&w);
            w[i] = before - h;
            let below = loss(&w);
            w[i] = before;
            let difference = (above - below) / (2.0 * h);
            largest = largest.max(exact[i].abs());
            let error = (difference - exact[i]).abs();
            assert!(error < 1e-7 * (1.0 + exact[i].abs()), "{} [{i}]: {difference} {}", p.name, exact[i]);
        }
        assert!(largest > 1e-5, "{}: the gradients compared are all next to nothing", p.name);
    }
}

#[test]
fn every_gradient_is_that_of_finite_differences() {
    let shape = tiny();
    for family in Family::available() {
        let cpu = Cpu::new(1, family).unwrap();
        compare(&cpu, &shape, &batch(&shape, 3, 13, 1), 25);
    }
}

#[test]
fn gradients_are_right_across_the_borders_of_blocks() {
    // 300 tokens: more than a block of a summed dimension; 100 a sequence: several blocks of
    // queries.
    let shape = tiny();
    let cpu = Cpu::new(2, Family::best()).unwrap();
    compare(&cpu, &shape, &batch(&shape, 3, 100, 2), 4);
}

#[test]
fn f32_agrees_with_f64() {
    let shape = tiny();
    let b = batch(&shape, 3, 100, 3);
    let (wide_loss, wide) =
        gradient(&Cpu::new(1, Family::PORTABLE).unwrap(), &shape, &weights::<f64>(&shape, 3), &b);
    for family in Family::available() {
        let cpu = Cpu::new(1, family).unwrap();
        let (loss, narrow) = gradient(&cpu, &shape, &weights::<f32>(&shape, 3), &b);
        assert!((loss - wide_loss).abs() < 1e-6 * wide_loss, "{family}: {loss} {wide_loss}");
        let norm = wide.iter().map(|g| g * g).sum::<f64>().sqrt();
        let error = wide.iter().zip(&narrow).map(|(w, n)| (w - f64::from(*n)).powi(2)).sum::<f64>().sqrt();
        assert!(error < 1e-5 * norm, "{family}: {error} of {norm}");
    }
}

#[test]
fn the_number_of_threads_does_not_change_bits() {
    let shape = ModelShape { vocab: 300, dim: 96, hidden: 200, ..tiny() };
    let b = batch(&shape, 4, 120, 4);
    let w = weights::<f32>(&shape, 4);
    for family in Family::available() {
        let run = |threads| gradient(&Cpu::new(threads, family).unwrap(), &shape, &w, &b);
        let (loss, one) = run(1);
        for threads in [2, 3, 5] {
            let (other_loss, other) = run(threads);
            assert_eq!(loss.to_bits(), other_loss.to_bits(), "{family}, {threads} threads");
            assert!(one.iter().zip(&other).all(|(a, b)| a.to_bits() == b.to_bits()), "{family}, {threads}");
        }
    }
}

#[test]
fn memory_used_before_does_not_change_bits() {
    let shape = tiny();
    let cpu = Cpu::new(2, Family::best()).unwrap();
    let w = weights::<f32>(&shape, 5);
    let (large, small) = (batch(&shape, 4, 60, 6), batch(&shape, 2, 30, 7));
    let fresh = gradient(&cpu, &shape, &w, &small);
    let mut model = Model::new(&shape).unwrap();
    let scale = 1.0 / small.counted.iter().filter(|c| **c).count() as f64;
    let mut out = vec![0.0; w.len()];
    model.gradient(&cpu, &w, &mut out, &large, scale, &|_| false).unwrap();
    out.fill(0.0);
    let loss = model.gradient(&cpu, &w, &mut out, &small, scale, &|_| false).unwrap().unwrap();
    assert_eq!((loss, out), fresh);
}

#[test]
fn what_lies_outside_a_document_changes_nothing_in_it() {
    let shape = tiny();
    let cpu = Cpu::new(1, Family::best()).unwrap();
    let w = weights::<f32>(&shape, 6);
    let mut one = batch(&shape, 1, 20, 8);
    one.document_start = (0..20).map(|p| if p < 8 { 0 } else { 8 }).collect();
    let mut other = one.clone();
    other.tokens[..8].fill(1);
    let mut model = Model::new(&shape).unwrap();
    let vocab = shape.vocab as usize;
    let a = model.logits(&cpu, &w, &one).unwrap();
    let b = model.logits(&cpu, &w, &other).unwrap();
    assert_ne!(a[..8 * vocab], b[..8 * vocab]);
    assert_eq!(a[8 * vocab..], b[8 * vocab..]);
}

#[test]
fn damaged_batches_are_refused_with_the_reason() {
    let shape = tiny();
    let cpu = Cpu::new(1, Family::best()).unwrap();
    let w = weights::<f32>(&shape, 7);
    let good = batch(&shape, 2, 10, 9);
    let reason = |change: fn(&mut MicroBatch)| {
        let mut bad = good.clone();
        change(&mut bad);
        Model::new(&shape).unwrap().logits(&cpu, &w, &bad).unwrap_err()
    };
    assert!(reason(|b| b.tokens[3] = 37).contains("token 37 is outside the vocabulary of 37"));
    assert!(reason(|b| b.targets[3] = u32::MAX).contains("outside the vocabulary"));
    assert!(reason(|b| b.document_start[3] = 4).contains("position 3 lies before"));
    assert!(reason(|b| b.counted.truncate(3)).contains("2 x 10 tokens"));
    assert!(reason(|b| *b = MicroBatch::default()).contains("0 x 0"));
    assert!(reason(|b| b.length = 20).contains("2 x 20 tokens"));
}
