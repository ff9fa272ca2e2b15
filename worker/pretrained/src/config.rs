//! Hugging Face's `config.json`: which of its Llamas are computed as here, and writing one.
//!
//! Keys that change what is computed are looked at one by one; a value that this program does
//! not compute is refused by name. Defaults are those of `LlamaConfig`.

use crate::settings::{Settings, number, refuse, short};
use crate::{Dtype, PretrainedError};
use caravan_types::{ModelShape, RopeScaling};
use serde_json::{Map, Value, json};
use std::path::Path;

/// The file.
pub(crate) const CONFIG: &str = "config.json";

/// What a configuration says.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Config {
    pub(crate) shape: ModelShape,
    /// Whether the head is the embedding.
    pub(crate) tied: bool,
    /// Ids of special tokens, which are handed on as they are.
    pub(crate) tokens: Map<String, Value>,
}

/// Keys of special tokens' ids.
const TOKENS: [&str; 3] = ["bos_token_id", "eos_token_id", "pad_token_id"];

/// Reads the configuration of a folder.
///
/// # Errors
/// Where it cannot be read, or is of a model that is computed otherwise.
pub(crate) fn read(dir: &Path) -> Result<Config, PretrainedError> {
    let settings = Settings::read(dir.join(CONFIG))?;
    check(&settings)?;
    let heads = settings.needed("num_attention_heads")?;
    let (theta, rope_scaling) = rope(&settings)?;
    let shape = ModelShape {
        dim: settings.needed("hidden_size")?,
        layers: settings.needed("num_hidden_layers")?,
        heads,
        kv_heads: settings.size("num_key_value_heads")?.unwrap_or(heads),
        hidden: settings.needed("intermediate_size")?,
        vocab: settings.needed("vocab_size")?,
        context: settings.size("max_position_embeddings")?.unwrap_or(2048),
        norm_eps: settings.number("rms_norm_eps")?.unwrap_or(1e-6),
        rope_theta: theta,
        rope_scaling,
    };
    settings.check(&shape)?;
    if let Some(head) = settings.size("head_dim")?.filter(|head| *head != shape.head_dim()) {
        let why = format!(
            "only heads of hidden_size / num_attention_heads = {} elements are computed; a model with {head} needs another \
             program",
            shape.head_dim()
        );
        return Err(settings.refuse("head_dim", why));
    }
    let tied = match settings.get("tie_word_embeddings") {
        None => false,
        Some(Value::Bool(tied)) => *tied,
        Some(_) => return Err(settings.refuse("tie_word_embeddings", "it must be true or false")),
    };
    let token = |key: &str| settings.get(key).map(|value| (key.to_owned(), value.clone()));
    Ok(Config { shape, tied, tokens: TOKENS.into_iter().filter_map(token).collect() })
}

/// Refuses what is computed otherwise.
fn check(settings: &Settings) -> Result<(), PretrainedError> {
    settings.only(
        "model_type",
        &[json!("llama")],
        "only \"llama\" is read: other architectures compute otherwise",
    )?;
    settings.only(
        "architectures",
        &[json!(["LlamaForCausalLM"]), json!([])],
        "only [\"LlamaForCausalLM\"] is read: other architectures compute otherwise",
    )?;
    let no_bias = "biases are not computed; only false is read";
    settings.only("attention_bias", &[json!(false)], no_bias)?;
    settings.only("mlp_bias", &[json!(false)], no_bias)?;
    settings.only("hidden_act", &[json!("silu"), json!("swish")], "only \"silu\" is computed")?;
    settings.only("sliding_window", &[], "attention always sees the whole document; only null is read")?;
    settings.only(
        "quantization_config",
        &[],
        "quantised weights are not read: dequantise the model before",
    )?;
    settings.only(
        "partial_rotary_factor",
        &[json!(1.0), json!(1)],
        "only whole heads are turned; only 1 is read",
    )?;
    if settings.get("model_type").is_none() && settings.get("architectures").is_none() {
        return Err(
            settings.refuse("model_type", "it must be \"llama\", and nothing else says what the model is")
        );
    }
    Ok(())
}

/// The base and the scaling of rotary frequencies. Up to its version 4 the library has them as
/// `rope_theta` and `rope_scaling`, since then as `rope_parameters`.
fn rope(settings: &Settings) -> Result<(f32, Option<RopeScaling>), PretrainedError> {
    let mut theta = settings.number("rope_theta")?;
    let mut scaling = None;
    for key in ["rope_scaling", "rope_parameters"] {
        let Some(value) = settings.get(key) else { continue };
        let map = value.as_object().ok_or_else(|| settings.refuse(key, "it must be an object or null"))?;
        if let Some(value) = map.get("rope_theta") {
            theta = Some(number(&settings.path, &format!("{key}.rope_theta"), value)?);
        }
        scaling = read_scaling(&settings.path, key, map)?;
    }
    Ok((theta.unwrap_or(10_000.0), scaling))
}

fn read_scaling(
    path: &Path,
    key: &str,
    map: &Map<String, Value>,
) -> Result<Option<RopeScaling>, PretrainedError> {
    let all = Value::Object(map.clone()).to_string();
    let kind = map.get("rope_type").or_else(|| map.get("type"));
    let kind = kind.and_then(Value::as_str).unwrap_or("default");
    let needed = |name: &str| match map.get(name) {
        Some(value) => number(path, &format!("{key}.{name}"), value),
        None => Err(refuse(path, key, all.clone(), format!("{kind:?} needs {name}"))),
    };
    let (scaling, known): (_, &[&str]) = match kind {
        "default" => (None, &[]),
        "linear" => (Some(RopeScaling::Linear { factor: needed("factor")? }), &["factor"]),
        "llama3" => (
            Some(RopeScaling::Llama3 {
                factor: needed("factor")?,
                low_freq_factor: needed("low_freq_factor")?,
                high_freq_factor: needed("high_freq_factor")?,
                original_context: needed("original_max_position_embeddings")? as u32,
            }),
            &["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"],
        ),
        _ => {
            let why = "the types \"default\", \"linear\" and \"llama3\" are computed";
            return Err(refuse(path, key, all, why));
        }
    };
    let always = ["rope_type", "type", "rope_theta"];
    if let Some(name) = map.keys().find(|k| !always.contains(&k.as_str()) && !known.contains(&k.as_str())) {
        return Err(refuse(path, key, all.clone(), format!("{name} has no meaning for the type {kind:?}")));
    }
    match scaling.and_then(RopeScaling::fault) {
        Some(fault) => Err(refuse(path, key, all.clone(), fault)),
        None => Ok(scaling),
    }
}

/// A configuration, as versions 4 and 5 of the library read it.
pub(crate) fn write(config: &Config, dtype: Dtype) -> Value {
    let ModelShape {
        dim,
        layers,
        heads,
        kv_heads,
        hidden,
        vocab,
        context,
        norm_eps,
        rope_theta,
        rope_scaling,
    } = config.shape;
    let scaling = rope_scaling.map(|scaling| match scaling {
        RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": short(factor)}),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => json!({
            "rope_type": "llama3",
            "factor": short(factor),
            "low_freq_factor": short(low_freq_factor),
            "high_freq_factor": short(high_freq_factor),
            "original_max_position_embeddings": original_context,
        }),
    });
    let mut value = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": dim / heads,
        "intermediate_size": hidden,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "rms_norm_eps": short(norm_eps),
        "rope_theta": short(rope_theta),
        "rope_scaling": scaling,
        "hidden_act": "silu",
        "attention_bias": false,
        "mlp_bias": false,
        "tie_word_embeddings": config.tied,
        "torch_dtype": dtype.torch(),
    });
    for (key, id) in &config.tokens {
        value[key] = id.clone();
    }
    value
}
