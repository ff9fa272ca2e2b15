//! Speed of the matrix products of a model, alone: what of the machine's peak they reach.
//!
//! usage: products [DIM] [HIDDEN] [VOCAB] [--tokens N] [--threads N] [--family NAME]

#![allow(clippy::print_stdout)]

use caravan_kernels::matmul::{self, Into};
use caravan_kernels::{Bf16, Cpu, Element, Family, View, ViewMut};
use std::error::Error;
use std::time::Instant;

/// Median seconds of some runs, after one that is not counted.
fn median(mut run: impl FnMut()) -> f64 {
    run();
    let mut times: Vec<f64> = (0..9)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed().as_secs_f64()
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Forward, back to the input, and to the weights, of one layer [outputs, inputs].
fn layer<E: Element<Sum = f32>>(cpu: &Cpu, name: &str, tokens: usize, inputs: usize, outputs: usize) {
    let some = |n: usize| -> Vec<E> { (0..n).map(|i| E::narrow((i % 251) as f32 * 0.01 - 1.25)).collect() };
    let (x, w, dy) = (some(tokens * inputs), some(inputs * outputs), some(tokens * outputs));
    let (mut y, mut dx) = (vec![E::default(); tokens * outputs], vec![0.0f32; tokens * inputs]);
    let mut dw = vec![0.0f32; inputs * outputs];
    let w = View::rows_of(&w, inputs);
    let seconds = [
        median(|| {
            matmul::matmul(
                cpu,
                View::rows_of(&x, inputs),
                w.t(),
                ViewMut::rows_of(&mut y, outputs),
                Into::Set,
            );
        }),
        median(|| {
            matmul::matmul(cpu, View::rows_of(&dy, outputs), w, ViewMut::rows_of(&mut dx, inputs), Into::Set);
        }),
        median(|| {
            let (dy, x) = (View::rows_of(&dy, outputs), View::rows_of(&x, inputs));
            matmul::matmul(cpu, dy.t(), x, ViewMut::rows_of(&mut dw, inputs), Into::Add);
        }),
    ];
    let flops = 2.0 * (tokens * inputs * outputs) as f64;
    let [forward, input, weights] = seconds.map(|s| flops / s / 1e9);
    println!("{name:>10} {inputs:>6} x {outputs:<6} {forward:>8.0} {input:>8.0} {weights:>8.0} GFLOP/s");
}

fn all<E: Element<Sum = f32>>(
    threads: usize,
    tokens: usize,
    family: Family,
    sizes: [usize; 3],
) -> Result<(), Box<dyn Error>> {
    let [dim, hidden, vocab] = sizes;
    let cpu = Cpu::new(threads, family)?;
    println!("{family}, {threads} threads, {tokens} tokens: forward, to the input, to the weights");
    layer::<E>(&cpu, "qkv", tokens, dim, 3 * dim);
    layer::<E>(&cpu, "output", tokens, dim, dim);
    layer::<E>(&cpu, "gate, up", tokens, dim, 2 * hidden);
    layer::<E>(&cpu, "down", tokens, hidden, dim);
    layer::<E>(&cpu, "head", tokens.min(256), dim, vocab);
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let option = |name: &str| args.iter().skip_while(|a| *a != name).nth(1);
    let number = |name: &str, default: usize| option(name).map_or(Ok(default), |v| v.parse());
    let size = |i: usize, default: usize| args.get(i).and_then(|a| a.parse().ok()).unwrap_or(default);
    let sizes = [size(0, 288), size(1, 768), size(2, 32000)];
    let (threads, tokens) = (number("--threads", 2)?, number("--tokens", 4096)?);
    let family = match option("--family") {
        Some(name) => Some(Family::named(name).ok_or_else(|| format!("no family {name:?} here"))?),
        None => None,
    };
    println!("fp32");
    all::<f32>(threads, tokens, family.unwrap_or_else(Family::best), sizes)?;
    println!("bf16");
    all::<Bf16>(threads, tokens, family.unwrap_or_else(Family::best_for_bf16), sizes)
}
