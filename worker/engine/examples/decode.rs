//! Tokens a second of generation, against what the memory allows: every token reads all weights
//! but the embedding's once.
//!
//! usage: decode [PRESET] [--precision fp32|mixed] [--threads N] [--tokens N] [--family NAME]

#![allow(clippy::print_stdout)]

use caravan_engine::{Generator, Sampling, fastest};
use caravan_kernels::{Bf16, Cpu, Element, Family};
use caravan_types::{ModelShape, Precision};
use std::error::Error;
use std::hint::black_box;
use std::time::Instant;

fn option(name: &str) -> Option<String> {
    std::env::args().skip_while(|a| a != name).nth(1)
}

/// Bytes a second that all threads together read from memory, the best of some passes over a
/// quarter of a gibibyte.
fn bandwidth(cpu: &Cpu) -> f64 {
    const BYTES: usize = 1 << 28;
    let data: Vec<u64> = (0..BYTES as u64 / 8).collect();
    let parts: Vec<&[u64]> = data.chunks(1 << 15).collect();
    let pass = || {
        let start = Instant::now();
        black_box(cpu.map(&parts, |part| part.iter().fold(0u64, |sum, x| sum.wrapping_add(*x))));
        BYTES as f64 / start.elapsed().as_secs_f64()
    };
    (0..9).map(|_| pass()).fold(0.0, f64::max)
}

fn run<E: Element<Sum = f32>>(cpu: &Cpu, shape: &ModelShape, tokens: usize) -> Result<f64, Box<dyn Error>> {
    let weight =
        |i: u64| E::narrow(((i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40) as f32 / 8_388_608.0 - 1.0) * 0.04);
    let weights: Vec<E> = (0..shape.parameters()).map(weight).collect();
    let mut generator = Generator::new(cpu, shape, &weights)?;
    drop(weights);
    let greedy = Sampling { temperature: 0.0, top_p: 1.0, seed: 0 };
    let mut next = vec![1];
    let mut times = Vec::new();
    for _ in 0..tokens {
        let start = Instant::now();
        cpu.install(|| generator.read(&next))?;
        next = vec![generator.choose(&greedy)];
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

fn main() -> Result<(), Box<dyn Error>> {
    let preset = std::env::args().nth(1).filter(|a| !a.starts_with("--")).unwrap_or_else(|| "110m".into());
    let shape = ModelShape::preset(&preset).ok_or_else(|| format!("no preset {preset:?}"))?;
    let number = |name: &str, default: usize| option(name).map_or(Ok(default), |v| v.parse());
    let precision = match option("--precision").as_deref() {
        Some("fp32") => Precision::Fp32,
        None | Some("mixed") => Precision::Mixed,
        Some(other) => return Err(format!("no precision {other:?}").into()),
    };
    let family = match option("--family") {
        Some(name) => Family::named(&name).ok_or_else(|| format!("no family {name:?} here"))?,
        None => fastest(precision),
    };
    let cpu = Cpu::new(number("--threads", 2)?, family)?;
    let tokens = number("--tokens", 200)?.min(shape.context as usize);
    let before = bandwidth(&cpu);
    let seconds = match precision {
        Precision::Fp32 => run::<f32>(&cpu, &shape, tokens)?,
        Precision::Mixed => run::<Bf16>(&cpu, &shape, tokens)?,
    };
    let bandwidth = before.max(bandwidth(&cpu));
    let read = (shape.parameters() - u64::from(shape.vocab) * u64::from(shape.dim)) * precision.bytes();
    println!(
        "{preset} {precision}/{family} threads={}: {:.2} ms a token, tok/s={:.0}; {:.0} MB of weights at {:.1} GB/s, \
         memory gives {:.1} GB/s: {:.0} % of that limit",
        cpu.threads(),
        seconds * 1e3,
        1.0 / seconds,
        read as f64 / 1e6,
        read as f64 / seconds / 1e9,
        bandwidth / 1e9,
        100.0 * read as f64 / seconds / bandwidth,
    );
    Ok(())
}
