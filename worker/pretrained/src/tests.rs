//! Whole folders: there and back, wrong conversions that must be refused, and damage.

use crate::layout::Rows;
use crate::{Beside, Convention, Dtype, Export, Flat, Folder, Named, PretrainedError, Prompts, Source};
use crate::{logits, pickle, pth, verify};
use caravan_types::{ModelShape, RopeScaling};
use proptest::prelude::*;
use serde_json::{Map, Value, json};
use std::fs::{self, File};
use std::path::Path;
use tempfile::TempDir;

fn tiny() -> ModelShape {
    let small = ModelShape::preset("260k").unwrap();
    ModelShape { dim: 32, layers: 2, heads: 4, kv_heads: 2, hidden: 48, vocab: 60, context: 64, ..small }
}

/// Weights as small as those of an untrained model, which hide mistakes best.
fn weights(shape: &ModelShape, seed: u64) -> Flat {
    let mut state = seed;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u32 << 24) as f32 - 0.5
    };
    let mut values = Vec::new();
    for p in shape.all_parameters() {
        let (mean, spread) = if p.vector { (1.0, 0.1) } else { (0.0, 0.07) };
        values.extend((0..p.len()).map(|_| mean + spread * uniform()));
    }
    Flat::new(shape.clone(), values).unwrap()
}

fn beside(shard_bytes: u64) -> Beside {
    let tokens = Map::from_iter([("bos_token_id".into(), json!(1)), ("eos_token_id".into(), json!([2, 3]))]);
    Beside { tokens, files: vec![("tokenizer.json".into(), b"{}".to_vec())], shard_bytes }
}

fn write(source: &dyn Source, to: Convention, dtype: Option<Dtype>, dir: &Path) -> Folder {
    Export::new(source, to, dtype).unwrap().write(dir, &beside(20_000)).unwrap();
    Folder::open(dir, Some(source.shape().context)).unwrap()
}

fn all(source: &dyn Source) -> Vec<u32> {
    let mut out = vec![0.0; source.shape().parameters() as usize];
    source.read(0, &mut out).unwrap();
    out.into_iter().map(f32::to_bits).collect()
}

fn dtypes() -> impl Strategy<Value = Dtype> {
    prop::sample::select(vec![Dtype::F32, Dtype::Bf16, Dtype::F16])
}

fn shapes() -> impl Strategy<Value = ModelShape> {
    let scaling = prop_oneof![
        Just(None),
        Just(Some(crate::params::SCALED)),
        Just(Some(RopeScaling::Linear { factor: 2.5 })),
    ];
    (1..4u32, 1..3u32, 1..4u32, 1..4u32, 1..90u32, 1..50u32, scaling).prop_map(
        |(half, groups, kv_heads, layers, hidden, vocab, rope_scaling)| {
            let heads = groups * kv_heads;
            ModelShape {
                dim: 2 * half * heads,
                layers,
                heads,
                kv_heads,
                hidden,
                vocab,
                rope_scaling,
                rope_theta: 5e5,
                ..tiny()
            }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn there_and_back_keeps_every_bit_of_every_shape(shape in shapes(), dtype in dtypes(), seed: u64) {
        let dir = TempDir::new().unwrap();
        let first = write(&weights(&shape, seed), Convention::HuggingFace, Some(dtype), &dir.path().join("a"));
        if matches!(shape.rope_scaling, Some(RopeScaling::Linear { .. })) {
            let refused = Export::new(&first, Convention::Meta, None).err();
            let told = matches!(refused, Some(PretrainedError::NoPlace { .. }));
            prop_assert!(told);
            return Ok(());
        }
        let meta = write(&first, Convention::Meta, None, &dir.path().join("b"));
        let back = write(&meta, Convention::HuggingFace, None, &dir.path().join("c"));
        prop_assert_eq!(all(&first), all(&meta));
        prop_assert_eq!(all(&first), all(&back));
        prop_assert_eq!(Source::shape(&back), &shape);
        prop_assert_eq!(back.dtype(0), dtype);
        // Any part alone is that part of the whole.
        let (whole, n) = (all(&meta), shape.parameters());
        for (start, end) in [(0, n), (n / 3, n / 2), (n / 2, n / 2 + 1), (n - 1, n)] {
            let mut part = vec![0.0; (end - start) as usize];
            meta.read(start, &mut part).unwrap();
            let bits = part.into_iter().map(f32::to_bits);
            prop_assert!(bits.eq(whole[start as usize..end as usize].iter().copied()));
        }
    }

    #[test]
    fn rubbish_instead_of_a_pickle_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        pickle::read(&bytes).unwrap_err();
    }
}

/// The logits of the flat model stand in for the engine's.
fn refused(source: &dyn Source, named: &dyn Named, export: &Export<'_>) -> Option<PretrainedError> {
    let flat = Flat::new(source.shape().clone(), all(source).into_iter().map(f32::from_bits).collect());
    verify(named, export, None, |prompts| logits(&flat.unwrap(), prompts, None)).err()
}

#[test]
fn conversions_that_move_logits_by_ever_so_little_are_refused() {
    let dir = TempDir::new().unwrap();
    let flat = weights(&tiny(), 7);
    for (from, to) in
        [(Convention::HuggingFace, Convention::Meta), (Convention::Meta, Convention::HuggingFace)]
    {
        let source = write(&flat, from, None, &dir.path().join(from.name()));
        let export = || Export::new(&source, to, None).unwrap();
        assert!(refused(&source, &source, &export()).is_none());
        let mut swapped = export();
        for layer in 0..2 {
            let (gate, up) = (1 + 9 * layer + 6, 1 + 9 * layer + 7);
            let name = swapped.entries[gate].name.clone();
            swapped.entries[gate].name = std::mem::replace(&mut swapped.entries[up].name, name);
        }
        let mut mutants = vec![("gate and up swapped", swapped)];
        // What is not permuted, or is so although it need not, or in heads of another size.
        let rows = |export: &mut Export<'_>, part: usize, rows: Rows| {
            (0..2).for_each(|layer| export.entries[1 + 9 * layer + part].rows = rows);
        };
        let head = u64::from(tiny().head_dim());
        let wrong = if to == Convention::Meta { Rows::Same } else { Rows::Pairs { head } };
        for (name, parts) in [("queries and keys", vec![1, 2]), ("queries", vec![1]), ("keys", vec![2])] {
            let mut mutant = export();
            parts.iter().for_each(|part| rows(&mut mutant, *part, wrong));
            mutants.push((name, mutant));
        }
        let mut other_heads = export();
        rows(&mut other_heads, 2, Rows::Pairs { head: head / 2 });
        mutants.push(("keys in as many heads as queries", other_heads));
        for (name, mutant) in mutants {
            let refused = refused(&source, &source, &mutant);
            assert!(matches!(refused, Some(PretrainedError::Mismatch { .. })), "{name}: {refused:?}");
        }
    }
}

#[test]
fn a_model_that_is_read_wrongly_is_refused_although_it_is_written_wrongly_too() {
    let dir = TempDir::new().unwrap();
    let meta = write(&weights(&tiny(), 8), Convention::Meta, None, dir.path());
    // Read as if its rows were the flat model's, and written likewise.
    let mut as_it_lies = vec![0.0; tiny().parameters() as usize];
    for entry in crate::layout::entries(&tiny(), Convention::Meta) {
        let range = entry.parameter.range();
        let out = &mut as_it_lies[range.start as usize..range.end as usize];
        meta.rows(&entry.name, 0..entry.parameter.rows, out).unwrap();
    }
    let flat = Flat::new(tiny(), as_it_lies).unwrap();
    let mut export = Export::new(&flat, Convention::Meta, None).unwrap();
    export.entries.iter_mut().for_each(|entry| entry.rows = Rows::Same);
    let refused = refused(&flat, &meta, &export).unwrap().to_string();
    assert!(refused.contains("of the flat model in Caravan's engine differ by"), "{refused}");
}

#[test]
fn another_number_format_is_compared_with_what_rounding_leaves() {
    let dir = TempDir::new().unwrap();
    let flat = weights(&tiny(), 9);
    for dtype in [Dtype::Bf16, Dtype::F16] {
        let export = Export::new(&flat, Convention::Meta, Some(dtype)).unwrap();
        verify(&flat, &export, Some(dtype), |prompts| logits(&flat, prompts, Some(dtype))).unwrap();
        let exact = logits(&flat, &Prompts::new(&tiny()), None).unwrap();
        let rounded = logits(&flat, &Prompts::new(&tiny()), Some(dtype)).unwrap();
        assert_ne!(exact, rounded);
    }
    let mut large = vec![1.0; tiny().parameters() as usize];
    large[5] = 1e6;
    let large = Flat::new(tiny(), large).unwrap();
    let export = Export::new(&large, Convention::HuggingFace, Some(Dtype::F16)).unwrap();
    let error = export.write(&dir.path().join("x"), &beside(1 << 20)).unwrap_err().to_string();
    assert!(
        error.contains("model.embed_tokens.weight has a value that is no finite number in fp16"),
        "{error}"
    );
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left behind");
}

#[test]
fn a_head_with_the_embeddings_bits_is_written_once_and_read_twice() {
    let dir = TempDir::new().unwrap();
    let shape = tiny();
    let mut values: Vec<f32> = all(&weights(&shape, 3)).into_iter().map(f32::from_bits).collect();
    let table = (shape.vocab * shape.dim) as usize;
    let at = values.len() - table;
    let (embedding, head) = values.split_at_mut(at);
    head.copy_from_slice(&embedding[..table]);
    let flat = Flat::new(shape.clone(), values.clone()).unwrap();
    let tied = write(&flat, Convention::HuggingFace, None, &dir.path().join("tied"));
    assert!(tied.tied());
    assert_eq!(all(&tied), all(&flat));
    assert_eq!(tied.tokens(), &beside(1).tokens);
    let meta = write(&tied, Convention::Meta, None, &dir.path().join("meta"));
    assert!(write(&meta, Convention::HuggingFace, None, &dir.path().join("again")).tied());
    values[at] += 1.0;
    let flat = Flat::new(shape, values).unwrap();
    assert!(!write(&flat, Convention::HuggingFace, None, &dir.path().join("own")).tied());
}

/// Cuts a model as Meta's model parallelism does.
fn spread(flat: &Flat, n: u64, dir: &Path) {
    let export = Export::new(flat, Convention::Meta, None).unwrap();
    fs::write(dir.join("params.json"), crate::params::write(Source::shape(flat)).unwrap().to_string())
        .unwrap();
    for rank in 0..n {
        let mut tensors = Vec::new();
        let mut contents = Vec::new();
        for entry in &export.entries {
            let (rows, cols) = (entry.parameter.rows, entry.parameter.cols);
            let mut values = vec![0.0; (rows * cols) as usize];
            export.rows(&entry.name, 0..rows, &mut values).unwrap();
            let by_columns = [".wo.", ".w2.", "tok_emb"].iter().any(|part| entry.name.contains(part));
            let (shape, part): (_, Vec<f32>) = if entry.parameter.vector {
                (vec![cols], values)
            } else if by_columns {
                let width = (cols / n) as usize;
                let part = |row: &[f32]| row[rank as usize * width..][..width].to_vec();
                (vec![rows, cols / n], values.chunks_exact(cols as usize).flat_map(part).collect())
            } else {
                let size = (rows / n * cols) as usize;
                (vec![rows / n, cols], values[rank as usize * size..][..size].to_vec())
            };
            tensors.push((entry.name.clone(), shape, Dtype::F32));
            contents.push(part);
        }
        let path = dir.join(format!("consolidated.{rank:02}.pth"));
        let out = File::create(&path).unwrap();
        let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        pth::write(&path, out, &tensors, |i, out| {
            out.write_all(&bytes(&contents[i])).map_err(PretrainedError::io("write", &path))
        })
        .unwrap();
    }
}

#[test]
fn files_of_model_parallelism_are_merged_along_their_axes() {
    let flat = weights(&tiny(), 11);
    for n in [1, 2] {
        let dir = TempDir::new().unwrap();
        spread(&flat, n, dir.path());
        let folder = Folder::open(dir.path(), Some(64)).unwrap();
        assert_eq!(all(&folder), all(&flat));
        assert!(refused(&folder, &folder, &Export::new(&folder, Convention::Meta, None).unwrap()).is_none());
    }
    let dir = TempDir::new().unwrap();
    spread(&flat, 2, dir.path());
    fs::remove_file(dir.path().join("consolidated.01.pth")).unwrap();
    let error = Folder::open(dir.path(), None).unwrap_err().to_string();
    assert!(error.contains("for 30 tokens, not 60") && error.contains("may be missing"), "{error}");
    spread(&flat, 2, dir.path());
    fs::remove_file(dir.path().join("consolidated.00.pth")).unwrap();
    let error = Folder::open(dir.path(), None).unwrap_err().to_string();
    assert!(error.contains("consolidated.00.pth is missing: the model is spread over 2 files"), "{error}");
}

#[test]
fn what_is_there_is_never_written_over() {
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("x"), "").unwrap();
    let flat = weights(&tiny(), 1);
    let export = Export::new(&flat, Convention::Meta, None).unwrap();
    let error = export.write(dir.path(), &beside(1)).unwrap_err();
    assert!(matches!(error, PretrainedError::NotEmpty(_)), "{error}");
    assert!(matches!(export.write(&dir.path().join("x"), &beside(1)), Err(PretrainedError::Io { .. })));
    fs::create_dir(dir.path().join("empty")).unwrap();
    export.write(&dir.path().join("empty"), &beside(1)).unwrap();
}

#[test]
fn models_that_are_computed_otherwise_are_refused_by_key_and_value() {
    let dir = TempDir::new().unwrap();
    write(&weights(&tiny(), 1), Convention::HuggingFace, None, &dir.path().join("a"));
    let path = dir.path().join("a/config.json");
    let good: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for (key, value, expected) in [
        ("model_type", json!("mistral"), "only \"llama\" is read"),
        ("architectures", json!(["LlamaForSequenceClassification"]), "only [\"LlamaForCausalLM\"]"),
        ("attention_bias", json!(true), "biases are not computed"),
        ("mlp_bias", json!(true), "biases are not computed"),
        ("hidden_act", json!("gelu"), "only \"silu\" is computed"),
        ("head_dim", json!(16), "only heads of hidden_size / num_attention_heads = 8 elements"),
        ("sliding_window", json!(4096), "only null is read"),
        ("quantization_config", json!({"bits": 4}), "dequantise the model before"),
        ("rope_scaling", json!({"rope_type": "yarn", "factor": 4}), "\"linear\" and \"llama3\" are computed"),
        ("rope_scaling", json!({"type": "dynamic", "factor": 4}), "\"linear\" and \"llama3\" are computed"),
        ("rope_scaling", json!({"type": "linear"}), "\"linear\" needs factor"),
        ("rope_scaling", json!({"type": "linear", "factor": 0.5}), "factor must be a number of at least 1"),
        (
            "rope_parameters",
            json!({"rope_type": "default", "attention_factor": 2}),
            "attention_factor has no meaning",
        ),
        ("num_attention_heads", json!(5), "the width 32 must be an even multiple of it"),
        ("num_key_value_heads", json!(3), "the number of heads, 4, must be a multiple of it"),
        ("vocab_size", json!(-1), "it must be a whole number from 1"),
        ("hidden_size", json!(1u64 << 40), "it must be a whole number from 1"),
        ("num_hidden_layers", json!(1 << 20), "it must be at most 1024"),
        ("rms_norm_eps", json!("small"), "it must be a number above 0"),
        ("tie_word_embeddings", json!(true), "tie_word_embeddings is true"),
        ("tie_word_embeddings", json!(1), "it must be true or false"),
        ("vocab_size", json!(61), "must have [61, 32]"),
        ("num_hidden_layers", json!(3), "has no tensor model.layers.2.input_layernorm.weight"),
        ("num_hidden_layers", json!(1), "has 9 tensors that no Llama of its configuration has"),
    ] {
        let mut config = good.clone();
        config[key] = value.clone();
        fs::write(&path, config.to_string()).unwrap();
        let error = Folder::open(&dir.path().join("a"), None).unwrap_err().to_string();
        assert!(error.contains(expected), "{key} = {value}: {error}");
    }
    // Version 5 of transformers has one key for both.
    let mut config = good.clone();
    config.as_object_mut().unwrap().retain(|key, _| !key.starts_with("rope_"));
    config["rope_parameters"] = json!({"rope_type": "linear", "factor": 3.0, "rope_theta": 1234.0});
    fs::write(&path, config.to_string()).unwrap();
    let folder = Folder::open(&dir.path().join("a"), None).unwrap();
    let shape = Source::shape(&folder);
    assert_eq!((shape.rope_theta, shape.rope_scaling), (1234.0, Some(RopeScaling::Linear { factor: 3.0 })));
}

#[test]
fn nothing_in_a_pickle_is_run() {
    for (bytes, expected) in [
        (&b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R."[..], "wants to run os.system"),
        (b"\x80\x04\x8c\x05posix\x8c\x06system\x93.", "wants to run posix.system"),
        (b"\x80\x02ctorch\nDoubleStorage\n.", "tensors in a DoubleStorage"),
        (b"\x80\x02}q\x00X\x01\x00\x00\x00aK\x01s.", "\"a\" is a number, not a tensor"),
        (b"\x80\x02]q\x00.", "it holds a tuple"),
        (b"\x80\x02(", "it ends in the middle"),
        (b"\x80\x02t.", "it closes what it has not opened"),
        (b"\x80\x02i", "the instruction 0x69"),
    ] {
        let error = pickle::read(bytes).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
    // Tuples that double, and such that lie ever deeper in each other.
    let doubling = [&b"\x80\x02)"[..], &b"q\x00h\x00\x86".repeat(40), b"."].concat();
    assert!(pickle::read(&doubling).unwrap_err().contains("deep in each other"));
    let deep = [&b"\x80\x02"[..], &b"}K\x01".repeat(100_000), b"K\x02", &b"s".repeat(100_000), b"."].concat();
    pickle::read(&deep).unwrap_err();
}

/// Every file cut short anywhere, and with any byte changed: an error or a model, never a panic.
#[test]
fn damaged_files_are_refused_or_read_but_never_panic() {
    let shape = ModelShape { layers: 1, ..tiny() };
    for convention in [Convention::HuggingFace, Convention::Meta] {
        let dir = TempDir::new().unwrap();
        let folder = dir.path().join("a");
        write(&weights(&shape, 5), convention, Some(Dtype::Bf16), &folder);
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let good = fs::read(&path).unwrap();
            // Weights themselves may have any bits; what describes them is at the ends.
            let places = (0..good.len()).filter(|at| *at < 400 || at + 400 > good.len() || at % 41 == 0);
            for at in places {
                let mut bad = good.clone();
                bad[at] ^= [1, 0x20, 0x80, 0xff][at % 4];
                fs::write(&path, &bad).unwrap();
                if let Ok(found) = Folder::open(&folder, None) {
                    all(&found);
                }
                if at % 7 == 0 {
                    fs::write(&path, &good[..at]).unwrap();
                    let name = path.file_name().unwrap();
                    let read = Folder::open(&folder, None);
                    assert!(read.is_err() || name == "tokenizer.json", "{name:?} cut at {at}");
                }
            }
            fs::write(&path, &good).unwrap();
        }
        Folder::open(&folder, None).unwrap();
    }
}
