//! Documents that share a sequence do not share anything else.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails where it stands")]

mod common;

use caravan_engine::Model;
use caravan_kernels::{Bf16, Cpu, Element, Family, Real};
use caravan_types::{MicroBatch, ModelShape};
use common::{batch, tiny, weights};

/// Two documents in each of two sequences of `length`; the second begins at `border`.
fn two_documents(shape: &ModelShape, length: usize, border: usize) -> MicroBatch {
    let mut two = batch(shape, 2, length, 33);
    for (i, start) in two.document_start.iter_mut().enumerate() {
        *start = if i % length < border { 0 } else { border as u32 };
    }
    two
}

/// Logits before and after the first documents' tokens are changed: in the first document every
/// row has changed, in the second not one bit.
fn compare<E: Element>(shape: &ModelShape, w: &[E]) {
    let vocab = shape.vocab as usize;
    for family in Family::available() {
        let cpu = Cpu::new(2, family).unwrap();
        let mut model = Model::<E>::new(shape).unwrap();
        // Borders within, at and beside those of blocks of queries (48) and of vectors (16).
        for (length, border) in [(128, 1), (128, 16), (127, 47), (128, 48), (65, 49), (128, 101), (33, 32)] {
            let two = two_documents(shape, length, border);
            let before = model.logits(&cpu, w, &two).unwrap();
            let mut other = two.clone();
            for (i, token) in other.tokens.iter_mut().enumerate().filter(|(i, _)| i % length < border) {
                *token = (*token + 1 + i as u32 % 7) % shape.vocab;
            }
            let after = model.logits(&cpu, w, &other).unwrap();
            let rows = before.chunks(vocab).zip(after.chunks(vocab)).enumerate();
            for (i, (before, after)) in rows {
                // f64 holds what it is made of exactly, the sign of a zero included.
                let same =
                    before.iter().zip(after).all(|(a, b)| a.to_f64().to_bits() == b.to_f64().to_bits());
                let second = i % length >= border;
                assert_eq!(
                    same,
                    second,
                    "{family}: {length} tokens, border {border}, position {}",
                    i % length
                );
            }
        }
    }
}

#[test]
fn another_first_document_does_not_change_one_bit_of_the_second_ones_logits() {
    let shape = tiny();
    let w = weights::<f32>(&shape, 5);
    compare(&shape, &w);
    compare(&shape, &w.iter().map(|w| Bf16::narrow(*w)).collect::<Vec<_>>());
}
