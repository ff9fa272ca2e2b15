//! Scores of given texts: what they are, and that nothing but the text decides their bits.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails where it stands")]

mod common;

use caravan_engine::{Model, Score};
use caravan_kernels::{Bf16, Cpu, Element, Family};
use caravan_types::{MicroBatch, ModelShape};
use common::{Numbers, tiny, weights};

/// Texts of every kind of length: nothing to score, shorter and longer than a block of
/// queries, as long as the context, and many enough for several micro-batches.
fn texts(shape: &ModelShape) -> Vec<Vec<u32>> {
    let mut numbers = Numbers(3);
    let lengths = [2, 0, 1, 97, 3, 128, 48, 49, 50, 128, 5].into_iter().chain((0..60).map(|i| 20 + i));
    lengths.map(|n| (0..n).map(|_| numbers.below(u64::from(shape.vocab)) as u32).collect()).collect()
}

fn bits(scores: &[Score]) -> Vec<(u64, bool)> {
    scores.iter().map(|s| (s.log_prob.to_bits(), s.greedy)).collect()
}

/// The text as one row of a micro-batch of training.
fn row(text: &[u32]) -> MicroBatch {
    let length = text.len() - 1;
    MicroBatch {
        sequences: 1,
        length,
        tokens: text[..length].to_vec(),
        targets: text[1..].to_vec(),
        counted: vec![true; length],
        document_start: vec![0; length],
    }
}

#[test]
fn scores_are_logarithms_of_the_softmax_and_greedy_is_its_largest() {
    let shape = tiny();
    let w = weights::<f64>(&shape, 4);
    let cpu = Cpu::new(2, Family::best()).unwrap();
    let mut model = Model::<f64>::new(&shape).unwrap();
    let texts = texts(&shape);
    let texts: Vec<&[u32]> = texts.iter().map(Vec::as_slice).collect();
    let scores = model.score(&cpu, &w, &texts).unwrap();
    let mut greedy = 0;
    for (text, scores) in texts.iter().zip(&scores) {
        assert_eq!(scores.len(), text.len().saturating_sub(1));
        if scores.is_empty() {
            continue;
        }
        let logits = model.logits(&cpu, &w, &row(text)).unwrap();
        for ((row, next), score) in logits.chunks(37).zip(&text[1..]).zip(scores) {
            let total: f64 = row.iter().map(|x| x.exp()).sum();
            let expected = row[*next as usize] - total.ln();
            assert!((score.log_prob - expected).abs() < 1e-12, "{} {expected}", score.log_prob);
            assert_eq!(score.greedy, row.iter().all(|x| *x <= row[*next as usize]));
            greedy += usize::from(score.greedy);
        }
    }
    assert!(greedy > 10, "{greedy} of the tokens are the likeliest: too few to tell anything");
}

/// The same texts together, in another order and alone, on different numbers of threads.
fn compare<E: Element>(shape: &ModelShape, w: &[E]) {
    let texts = texts(shape);
    let texts: Vec<&[u32]> = texts.iter().map(Vec::as_slice).collect();
    for family in Family::available() {
        let cpu = |threads| Cpu::new(threads, family).unwrap();
        let mut model = Model::<E>::new(shape).unwrap();
        let together = model.score(&cpu(2), w, &texts).unwrap();
        let backwards: Vec<&[u32]> = texts.iter().rev().copied().collect();
        let reversed = model.score(&cpu(3), w, &backwards).unwrap();
        for ((text, scores), other) in texts.iter().zip(&together).zip(reversed.iter().rev()) {
            let alone = model.score(&cpu(1), w, &[text]).unwrap();
            assert_eq!(bits(&alone[0]), bits(scores), "{family}, {} tokens", text.len());
            assert_eq!(bits(other), bits(scores), "{family}, {} tokens", text.len());
        }
    }
}

#[test]
fn a_text_has_the_same_bits_alone_among_others_in_any_order_and_on_any_number_of_threads() {
    let shape = tiny();
    let w = weights::<f32>(&shape, 4);
    compare(&shape, &w);
    compare(&shape, &w.iter().map(|w| Bf16::narrow(*w)).collect::<Vec<_>>());
}

#[test]
fn the_sum_of_a_text_is_the_loss_that_training_has_for_it() {
    let shape = tiny();
    let w = weights::<f32>(&shape, 4);
    let text = &texts(&shape)[3];
    for family in Family::available() {
        let cpu = Cpu::new(2, family).unwrap();
        let mut model = Model::<f32>::new(&shape).unwrap();
        let mut scrap = vec![0.0; w.len()];
        let loss = model.gradient(&cpu, &w, &mut scrap, &row(text), 1.0, &|_| false).unwrap().unwrap();
        // The model has computed something else in between, with more layers in memory.
        let scores = model.score(&cpu, &w, &[text]).unwrap();
        let sum: f64 = scores[0].iter().map(|s| s.log_prob).sum();
        assert_eq!((-sum).to_bits(), loss.to_bits(), "{family}");
        let again = model.gradient(&cpu, &w, &mut scrap, &row(text), 1.0, &|_| false).unwrap().unwrap();
        assert_eq!(again.to_bits(), loss.to_bits(), "{family}");
    }
}

#[test]
fn what_the_model_cannot_read_is_refused() {
    let shape = tiny();
    let w = weights::<f32>(&shape, 4);
    let cpu = Cpu::new(1, Family::best()).unwrap();
    let mut model = Model::<f32>::new(&shape).unwrap();
    let mut refused = |text: &[u32]| model.score(&cpu, &w, &[&[1, 2], text]).unwrap_err();
    assert!(refused(&[1, 37]).contains("token 37 is outside the vocabulary of 37"));
    assert!(refused(&[37, 1]).contains("token 37 is outside the vocabulary of 37"));
    assert!(refused(&[1; 130]).contains("129 tokens are longer than the context of 128"));
}
