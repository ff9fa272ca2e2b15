//! `caravan generate`: text from a checkpoint, token by token as it comes.

use super::open::{open, tokenizer_of};
use crate::Outcome;
use crate::config::cores;
use caravan_checkpoint::Checkpoint;
use caravan_data::Tokenizer;
use caravan_engine::{Generator, Sampling, fastest};
use caravan_kernels::{Bf16, Cpu, Element, Family};
use caravan_types::Precision;
use std::io::Write;
use std::path::PathBuf;

/// What the subcommand takes.
#[derive(clap::Args)]
pub struct Args {
    /// A checkpoint, or a run's folder for its newest one.
    #[arg(long, value_name = "DIR")]
    checkpoint: PathBuf,
    /// What the text starts with.
    #[arg(long, value_name = "TEXT")]
    prompt: String,
    /// How it goes on.
    #[command(flatten)]
    options: Options,
}

/// How text is generated.
#[derive(clap::Args, Clone, Debug)]
pub struct Options {
    /// Tokens to generate at most; the model's context may end the text before.
    #[arg(long, default_value_t = 200, value_name = "N")]
    pub max_tokens: usize,
    /// 0 takes the likeliest token always, 1 draws as the model has learnt, more is wilder.
    #[arg(long, default_value_t = 0.8, value_parser = temperature)]
    pub temperature: f64,
    /// Draw from the likeliest tokens only that together have this probability.
    #[arg(long, default_value_t = 0.95, value_parser = probability)]
    pub top_p: f64,
    /// The same seed gives the same text.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Compute threads; all cores unless given.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
}

impl Default for Options {
    fn default() -> Self {
        Self { max_tokens: 200, temperature: 0.8, top_p: 0.95, seed: 0, threads: None }
    }
}

fn temperature(text: &str) -> Result<f64, String> {
    let value = text.parse().ok().filter(|t: &f64| (0.0..=100.0).contains(t));
    value.ok_or_else(|| "it must be a number from 0 to 100, such as 0.8".to_owned())
}

fn probability(text: &str) -> Result<f64, String> {
    let value = text.parse().ok().filter(|p: &f64| *p > 0.0 && *p <= 1.0);
    value.ok_or_else(|| "it must be a number above 0 and at most 1, such as 0.95".to_owned())
}

/// Why there is no text.
#[derive(Debug, thiserror::Error)]
enum GenerateError {
    #[error("the prompt has {tokens} tokens, and the model's context is {context}: shorten it")]
    PromptTooLong { tokens: usize, context: u32 },
}

/// Prints the prompt and what follows.
pub fn run(args: &Args, out: &mut dyn Write) -> Outcome {
    let checkpoint = open(&args.checkpoint)?;
    stream(&checkpoint, &args.prompt, &args.options, out)
}

/// Writes the prompt and what the model makes of it, each token as it comes, and a line's
/// end. The text ends with the document, the model's context, or `max_tokens`.
///
/// # Errors
/// Where the checkpoint has no tokenizer, cannot be read, or the prompt does not fit.
pub fn stream(checkpoint: &Checkpoint, prompt: &str, options: &Options, out: &mut dyn Write) -> Outcome {
    let numerics = &checkpoint.manifest().spec.numerics;
    // The run's family gives its bits; text from another one may differ in a late token.
    let family = Family::named(&numerics.family).unwrap_or_else(|| fastest(numerics.precision));
    let threads = options.threads.map_or(cores() as usize, usize::from);
    let cpu = Cpu::new(threads, family)?;
    match numerics.precision {
        Precision::Fp32 => stream_with::<f32>(checkpoint, &cpu, prompt, options, out),
        Precision::Mixed => stream_with::<Bf16>(checkpoint, &cpu, prompt, options, out),
    }
}

fn stream_with<E: Element<Sum = f32>>(
    checkpoint: &Checkpoint,
    cpu: &Cpu,
    prompt: &str,
    options: &Options,
    out: &mut dyn Write,
) -> Outcome {
    let spec = &checkpoint.manifest().spec;
    let tokenizer = Tokenizer::load(&tokenizer_of(checkpoint)?)?;
    let weights: Vec<E> = checkpoint.weights()?.into_iter().map(E::narrow).collect();
    let mut generator = Generator::new(cpu, &spec.model, &weights)?;
    drop(weights);
    let mut tokens = vec![tokenizer.bos()];
    tokens.extend(tokenizer.encode(prompt)?);
    let (context, used) = (spec.model.context, tokens.len());
    if used > context as usize {
        return Err(GenerateError::PromptTooLong { tokens: used, context }.into());
    }
    write!(out, "{prompt}")?;
    out.flush()?;
    let sampling = Sampling { temperature: options.temperature, top_p: options.top_p, seed: options.seed };
    let mut decoder = tokenizer.decoder_within();
    for _ in 0..options.max_tokens.min(context as usize - used) {
        cpu.install(|| generator.read(&tokens))?;
        let token = generator.choose(&sampling);
        if token == tokenizer.eos() || token == tokenizer.bos() {
            break;
        }
        write!(out, "{}", decoder.push(token))?;
        out.flush()?;
        tokens = vec![token];
    }
    writeln!(out, "{}", decoder.finish())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::testing::Tiny;
    use std::fs;
    use std::path::Path;

    fn generate(checkpoint: &Path, prompt: &str, seed: u64) -> Result<String, String> {
        let options = Options { max_tokens: 12, threads: Some(1), seed, ..Options::default() };
        let args = Args { checkpoint: checkpoint.to_owned(), prompt: prompt.to_owned(), options };
        let mut out = Vec::new();
        run(&args, &mut out).map_err(|e| e.to_string())?;
        Ok(String::from_utf8(out).unwrap())
    }

    #[test]
    fn a_run_gives_the_text_of_its_newest_intact_checkpoint() {
        let tiny = Tiny::new();
        let error = generate(tiny.run.path(), "line", 1).unwrap_err();
        assert!(error.starts_with("there is no checkpoint in"), "{error}");
        let (old, new) = (tiny.checkpoint(5), tiny.checkpoint(7));
        let text = generate(&new, "line 3", 1).unwrap();
        assert!(text.starts_with("line 3") && text.len() > 8, "{text:?}");
        assert_eq!(generate(tiny.run.path(), "line 3", 1).unwrap(), text);
        assert_ne!(generate(tiny.run.path(), "line 3", 2).unwrap(), text);

        fs::remove_file(new.join("part-w1.safetensors")).unwrap();
        let of_old = generate(&old, "line 3", 1).unwrap();
        assert_eq!(generate(&tiny.run.checkpoints(), "line 3", 1).unwrap(), of_old);
        let error = generate(&new, "line 3", 1).unwrap_err();
        assert!(error.contains("cannot be used: part-w1.safetensors is missing"), "{error}");
        fs::remove_file(old.join("manifest.json")).unwrap();
        let error = generate(tiny.run.path(), "line 3", 1).unwrap_err();
        assert!(error.contains("is intact\n  step-00000007: part-w1"), "{error}");
    }

    #[test]
    fn the_context_ends_a_text_and_a_prompt_beyond_it_is_refused() {
        let tiny = Tiny::new();
        let checkpoint = tiny.checkpoint(1);
        let error = generate(&checkpoint, &"a b c d ".repeat(20), 1).unwrap_err();
        assert!(error.contains("and the model's context is 32: shorten it"), "{error}");
        let options = Options { max_tokens: 1000, threads: Some(1), ..Options::default() };
        let mut out = Vec::new();
        stream(&Checkpoint::open(&checkpoint).unwrap(), "", &options, &mut out).unwrap();
        assert!(out.ends_with(b"\n"));
    }

    #[test]
    fn sampling_values_out_of_range_are_told() {
        assert!(temperature("-1").is_err() && temperature("nan").is_err() && temperature("0").is_ok());
        assert!(probability("0").is_err() && probability("1.1").is_err() && probability("1").is_ok());
    }
}
