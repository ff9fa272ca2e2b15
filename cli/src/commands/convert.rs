//! `caravan convert`: a model from one layout to another, compared before it is written.

use crate::commands::open;
use crate::config::cores;
use crate::engine_logits;
use crate::estimate::grouped;
use crate::{Failure, Outcome, say};
use caravan_checkpoint::Checkpoint;
use caravan_data::Tokenizer;
use caravan_pretrained::{
    Beside, Convention, Dtype, Export, Flat, Folder, Named, Source, check_free, kind, verify,
};
use serde_json::{Map, json};
use std::io::Write;
use std::path::{Path, PathBuf};

/// What the subcommand takes.
#[derive(clap::Args)]
pub struct Args {
    /// A run's folder (its newest checkpoint is taken), a checkpoint, or a folder in Hugging
    /// Face's or Meta's layout.
    source: PathBuf,
    /// The folder to write, which is not there yet or is empty.
    destination: PathBuf,
    /// The layout to write.
    #[arg(long, value_name = "LAYOUT", default_value = "hf")]
    to: Layout,
    /// Number format of all weights: fp32, bf16 or fp16. The source's own unless given; a
    /// checkpoint's is fp32.
    #[arg(long, value_parser = dtype)]
    dtype: Option<Dtype>,
    /// Size of a file of weights at most, in Hugging Face's layout, such as 5GB or 500MB.
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = size)]
    shard_size: u64,
    /// The model's context in tokens, which Meta's layout does not say; its generation's unless
    /// given.
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    context: Option<u32>,
}

/// A layout that is written.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Layout {
    /// Hugging Face's: config.json, safetensors, tokenizer.json.
    Hf,
    /// Meta's: params.json, consolidated.00.pth, tokenizer.model.
    Meta,
}

fn dtype(text: &str) -> Result<Dtype, String> {
    Dtype::named(text).ok_or_else(|| "it must be fp32, bf16 or fp16".into())
}

fn size(text: &str) -> Result<u64, String> {
    let wrong = || "it must be a size with its unit, such as 5GB, 500MB or 64KB".to_owned();
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?);
    let unit = match unit {
        "GB" => 1_000_000_000,
        "MB" => 1_000_000,
        "KB" => 1000,
        _ => return Err(wrong()),
    };
    let number: u64 = number.parse().map_err(|_| wrong())?;
    number.checked_mul(unit).filter(|size| *size > 0).ok_or_else(wrong)
}

/// Why nothing can be converted.
#[derive(Debug, thiserror::Error)]
enum ConvertError {
    #[error(
        "{} holds no model: give a run's folder, a checkpoint, or a folder with config.json (Hugging Face) or params.json \
         (Meta)",
        .0.display()
    )]
    NoModel(PathBuf),
    #[error("the checkpoint {} has not as many weights as its model", .0.display())]
    Weights(PathBuf),
}

/// A model that is open.
enum Model {
    Folder(Folder),
    Checkpoint(Flat, Box<Checkpoint>),
}

impl Model {
    fn open(args: &Args) -> Result<Self, Failure> {
        let dir = &args.source;
        if kind(dir).is_some() {
            return Ok(Self::Folder(Folder::open(dir, args.context)?));
        }
        let ours = ["manifest.json", "spec.json", "checkpoints"].iter().any(|name| dir.join(name).exists());
        if !ours && !std::fs::read_dir(dir).is_ok_and(|mut entries| entries.any(is_checkpoint)) {
            return Err(ConvertError::NoModel(dir.clone()).into());
        }
        let checkpoint = open::open(dir)?;
        let shape = checkpoint.manifest().spec.model.clone();
        let flat = Flat::new(shape, checkpoint.weights()?);
        let flat = flat.ok_or_else(|| ConvertError::Weights(checkpoint.dir().to_owned()))?;
        Ok(Self::Checkpoint(flat, Box::new(checkpoint)))
    }

    fn source(&self) -> &dyn Source {
        match self {
            Self::Folder(folder) => folder,
            Self::Checkpoint(flat, _) => flat,
        }
    }

    fn named(&self) -> &dyn Named {
        match self {
            Self::Folder(folder) => folder,
            Self::Checkpoint(flat, _) => flat,
        }
    }

    fn describe(&self) -> String {
        match self {
            Self::Folder(folder) => folder.convention().name().into(),
            Self::Checkpoint(_, checkpoint) => {
                format!("the checkpoint of step {}", checkpoint.manifest().step)
            }
        }
    }
}

fn is_checkpoint(entry: std::io::Result<std::fs::DirEntry>) -> bool {
    entry.is_ok_and(|entry| entry.path().join("manifest.json").exists())
}

/// Converts.
pub fn run(args: &Args, out: &mut dyn Write) -> Outcome {
    check_free(&args.destination)?;
    let model = Model::open(args)?;
    let (source, shape) = (model.source(), model.source().shape());
    let convention = match args.to {
        Layout::Hf => Convention::HuggingFace,
        Layout::Meta => Convention::Meta,
    };
    let export = Export::new(source, convention, args.dtype)?;
    let beside = beside(&model, args)?;
    let parameters = grouped(shape.parameters());
    let (from, format) = (model.describe(), source.dtype(0));
    say(&format!("{}: {from}, {parameters} parameters in {format}", args.source.display()));
    if let Model::Folder(folder) = &model {
        if folder.convention() == Convention::Meta && args.context.is_none() {
            say(&format!(
                "note: Meta's layout does not say the model's context; that of its generation is taken, {} tokens \
                 (--context gives another)",
                shape.context
            ));
        }
        if folder.tied() {
            say(
                "note: its head is its embedding (tie_word_embeddings); it is written so again, as their bits are the same",
            );
        }
    }
    if convention == Convention::Meta && !beside.files.iter().any(|(name, _)| name == "tokenizer.model") {
        say("note: there is no tokenizer.model to go with Meta's layout; its code needs one to read text");
    }
    say("comparing the logits of the source, of the engine and of what will be written …");
    let threads = cores() as usize;
    verify(model.named(), &export, args.dtype, |prompts| {
        engine_logits::logits(source, prompts, args.dtype, threads)
    })?;
    say("they agree; writing …");
    export.write(&args.destination, &beside)?;
    let format = args.dtype.unwrap_or(format);
    writeln!(
        out,
        "{}: {}, {parameters} parameters in {format}",
        args.destination.display(),
        convention.name()
    )?;
    Ok(())
}

/// Files that go with a model's weights as they are, in both layouts.
const COMPANIONS: [&str; 11] = [
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
    "USE_POLICY.md",
];

fn beside(model: &Model, args: &Args) -> Result<Beside, Failure> {
    let mut beside = Beside { tokens: Map::new(), files: Vec::new(), shard_bytes: args.shard_size };
    match model {
        Model::Folder(folder) => {
            beside.tokens = folder.tokens().clone();
            for name in COMPANIONS {
                take(&mut beside, name, &folder.dir().join(name))?;
            }
            // Meta's downloads have one tokenizer beside the folders of all sizes.
            let above = folder.dir().join("../tokenizer.model");
            if folder.convention() == Convention::Meta && !folder.dir().join("tokenizer.model").exists() {
                take(&mut beside, "tokenizer.model", &above)?;
            }
        }
        Model::Checkpoint(_, checkpoint) => {
            if let Some(path) = checkpoint.tokenizer() {
                let tokenizer = Tokenizer::load(&path)?;
                beside.tokens.insert("bos_token_id".into(), json!(tokenizer.bos()));
                beside.tokens.insert("eos_token_id".into(), json!(tokenizer.eos()));
                take(&mut beside, "tokenizer.json", &path)?;
                let about = json!({
                    "tokenizer_class": "PreTrainedTokenizerFast",
                    "bos_token": "<s>",
                    "eos_token": "</s>",
                    "unk_token": "<unk>",
                });
                beside.files.push(("tokenizer_config.json".into(), format!("{about:#}\n").into_bytes()));
            }
        }
    }
    Ok(beside)
}

/// Takes a file along where it is there.
fn take(beside: &mut Beside, name: &str, path: &Path) -> Result<(), Failure> {
    if path.is_file() {
        let content = std::fs::read(path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
        beside.files.push((name.to_owned(), content));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::testing::Tiny;
    use caravan_pretrained::PretrainedError;

    fn convert(source: &Path, destination: &Path, to: Layout) -> Result<String, Failure> {
        let (source, destination) = (source.to_owned(), destination.to_owned());
        let args = Args { source, destination, to, dtype: None, shard_size: 10_000, context: Some(32) };
        let mut out = Vec::new();
        run(&args, &mut out)?;
        Ok(String::from_utf8(out).unwrap())
    }

    fn weights(folder: &Path) -> Vec<f32> {
        let folder = Folder::open(folder, Some(32)).unwrap();
        let mut out = vec![0.0; Source::shape(&folder).parameters() as usize];
        folder.read(0, &mut out).unwrap();
        out
    }

    #[test]
    fn a_run_goes_to_hugging_face_to_meta_and_back_with_its_bits_and_its_tokenizer() {
        let tiny = Tiny::new();
        let dir = |name: &str| tiny.dir.path().join(name);
        let error = convert(tiny.run.path(), &dir("a"), Layout::Hf).unwrap_err().to_string();
        assert!(error.starts_with("there is no checkpoint in"), "{error}");
        let checkpoint = tiny.checkpoint(3);
        let told = convert(tiny.run.path(), &dir("a"), Layout::Hf).unwrap();
        assert!(told.contains("Hugging Face's layout") && told.ends_with("in fp32\n"), "{told}");
        convert(&checkpoint, &dir("b"), Layout::Meta).unwrap();
        convert(&dir("b"), &dir("c"), Layout::Hf).unwrap();
        let trained = Checkpoint::open(&checkpoint).unwrap().weights().unwrap();
        for name in ["a", "b", "c"] {
            assert_eq!(weights(&dir(name)), trained, "{name}");
            let tokenizer = std::fs::read(dir(name).join("tokenizer.json")).unwrap();
            assert_eq!(tokenizer, std::fs::read(checkpoint.join("tokenizer.json")).unwrap());
        }
        let error = convert(&checkpoint, &dir("a"), Layout::Hf).unwrap_err();
        assert!(matches!(error.downcast_ref(), Some(PretrainedError::NotEmpty(_))), "{error}");
        let error = convert(&dir("texts"), &dir("d"), Layout::Hf).unwrap_err().to_string();
        assert!(error.contains("holds no model"), "{error}");
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!([size("5GB"), size("64KB")], [Ok(5_000_000_000), Ok(64_000)]);
        for bad in ["", "5", "GB", "0MB", "-1GB", "1TB", "99999999999999999999GB"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }
}
