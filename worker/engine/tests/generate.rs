//! Decoding one token at a time.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails where it stands")]

mod common;

use caravan_engine::{EngineError, Generator, Model, Sampling};
use caravan_kernels::{Bf16, Cpu, Element, Family};
use caravan_types::{MicroBatch, ModelShape};
use common::{batch, tiny, weights};

/// One document of `n` tokens.
fn text(shape: &ModelShape, n: usize) -> MicroBatch {
    let mut text = batch(shape, 1, n, 21);
    text.document_start.fill(0);
    text
}

#[test]
fn incremental_logits_are_those_of_the_full_forward_pass_to_the_bit() {
    incremental::<f32>();
    incremental::<Bf16>();
}

fn incremental<E: Element<Sum = f32>>() {
    let shape = ModelShape { vocab: 97, ..tiny() };
    let w: Vec<E> = weights::<f32>(&shape, 9).into_iter().map(E::narrow).collect();
    let text = text(&shape, 110);
    for family in Family::available() {
        let cpu = Cpu::new(2, family).unwrap();
        let full = Model::new(&shape).unwrap().logits(&cpu, &w, &text).unwrap();
        // One token at a time, and a prompt first.
        for prompt in [1, 2, 49, 110] {
            let mut generator = Generator::new(&cpu, &shape, &w).unwrap();
            generator.read(&text.tokens[..prompt]).unwrap();
            for position in prompt..=text.tokens.len() {
                let row = &full[(position - 1) * 97..position * 97];
                let same = row.iter().zip(generator.logits()).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same, "{family}: prompt {prompt}, position {position}");
                assert_eq!(generator.position(), position);
                if position < text.tokens.len() {
                    generator.read(&text.tokens[position..=position]).unwrap();
                }
            }
        }
    }
}

#[test]
fn choices_follow_temperature_nucleus_and_seed() {
    let shape = tiny();
    let cpu = Cpu::new(1, Family::best()).unwrap();
    let w = weights::<f32>(&shape, 10);
    let mut generator = Generator::new(&cpu, &shape, &w).unwrap();
    generator.read(&[3, 1, 4]).unwrap();
    let logits = generator.logits();
    let best = (0..37u32).max_by(|a, b| logits[*a as usize].total_cmp(&logits[*b as usize])).unwrap();
    let choose = |temperature, top_p, seed| generator.choose(&Sampling { temperature, top_p, seed });
    assert_eq!(choose(0.0, 1.0, 1), best);
    assert_eq!(choose(1e-6, 1.0, 1), best);
    assert_eq!(choose(5.0, 1e-9, 1), best);
    let many: Vec<u32> = (0..2000).map(|seed| choose(1.0, 1.0, seed)).collect();
    assert_eq!(many, (0..2000).map(|seed| choose(1.0, 1.0, seed)).collect::<Vec<_>>());
    // Frequencies within five standard deviations of the softmax.
    let total: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
    for token in 0..37u32 {
        let p = f64::from(logits[token as usize]).exp() / total;
        let seen = many.iter().filter(|t| **t == token).count() as f64;
        let deviation = (2000.0 * p * (1.0 - p)).sqrt();
        assert!(
            (seen - 2000.0 * p).abs() <= 5.0 * deviation + 1.0,
            "token {token}: {seen} of {}",
            2000.0 * p
        );
    }
    // A nucleus holds the likeliest tokens up to its mass, and no others.
    let mut order: Vec<u32> = (0..37).collect();
    order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]));
    let mut mass = 0.0;
    let nucleus: Vec<u32> = order
        .into_iter()
        .take_while(|t| {
            let before = mass;
            mass += f64::from(logits[*t as usize]).exp() / total;
            before < 0.5
        })
        .collect();
    assert!((0..2000).all(|seed| nucleus.contains(&choose(1.0, 0.5, seed))));
}

#[test]
fn a_text_that_cannot_go_on_is_refused() {
    let shape = ModelShape { context: 4, ..tiny() };
    let cpu = Cpu::new(1, Family::best()).unwrap();
    let w = weights::<f32>(&shape, 1);
    let mut generator = Generator::new(&cpu, &shape, &w).unwrap();
    let refused = |result: Result<(), EngineError>| result.unwrap_err().to_string();
    assert!(refused(generator.read(&[])).contains("no token to start from"));
    assert!(refused(generator.read(&[37])).contains("token 37 is outside the vocabulary of 37"));
    generator.read(&[1, 2, 3, 4]).unwrap();
    assert!(refused(generator.read(&[5])).contains("context of 4 tokens is full"));
    assert!(Generator::new(&cpu, &shape, &w[1..]).is_err());
}
