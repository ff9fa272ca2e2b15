//! Meta's `params.json`: reading and writing it.
//!
//! It names neither the vocabulary's size (Llama 2 has -1 there), nor the width of the
//! feed-forward network (a rule gives that), nor the context: the first two are seen from the
//! weights, and the context is that of the model's generation unless it is given.

use crate::PretrainedError;
use crate::settings::{Settings, short};
use caravan_types::{ModelShape, RopeScaling};
use serde_json::{Value, json};
use std::path::Path;

/// The file.
pub(crate) const PARAMS: &str = "params.json";

/// The one scaling of rotary frequencies that Meta's code has, behind `use_scaled_rope`.
pub(crate) const SCALED: RopeScaling =
    RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 8192 };

/// All keys that are understood; any other one changes what Meta's code computes.
const KNOWN: [&str; 12] = [
    "dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "vocab_size",
    "multiple_of",
    "ffn_dim_multiplier",
    "norm_eps",
    "rope_theta",
    "use_scaled_rope",
    "max_seq_len",
    "max_batch_size",
];

/// Reads the parameters of a folder; `vocab` and `hidden` are those that its weights show.
///
/// # Errors
/// Where they cannot be read, are of another kind of model, or contradict the weights.
pub(crate) fn read(
    dir: &Path,
    context: Option<u32>,
    vocab: u32,
    hidden: u32,
) -> Result<ModelShape, PretrainedError> {
    let settings = Settings::read(dir.join(PARAMS))?;
    if let Some(key) = settings.map.keys().find(|key| !KNOWN.contains(&key.as_str())) {
        return Err(
            settings.refuse(key, "it is not known what it changes; Llama 1, 2 and 3 have no such key")
        );
    }
    let scaled = match settings.get("use_scaled_rope") {
        None => false,
        Some(Value::Bool(scaled)) => *scaled,
        Some(_) => return Err(settings.refuse("use_scaled_rope", "it must be true or false")),
    };
    let heads = settings.needed("n_heads")?;
    let rope_theta = settings.number("rope_theta")?.unwrap_or(10_000.0);
    let usual = match (scaled, rope_theta) {
        (true, _) => 131_072,
        (false, 500_000.0) => 8192,
        _ => 4096,
    };
    let shape = ModelShape {
        dim: settings.needed("dim")?,
        layers: settings.needed("n_layers")?,
        heads,
        kv_heads: settings.size("n_kv_heads")?.unwrap_or(heads),
        hidden,
        vocab,
        context: context.or(settings.size("max_seq_len")?).unwrap_or(usual),
        norm_eps: settings.number("norm_eps")?.unwrap_or(1e-5),
        rope_theta,
        rope_scaling: scaled.then_some(SCALED),
    };
    settings.check(&shape)?;
    if let Some(said) = settings.get("vocab_size").and_then(Value::as_u64).filter(|v| *v != u64::from(vocab))
    {
        return Err(settings.refuse(
            "vocab_size",
            format!("the weights are for {vocab} tokens, not {said}; a file of the model may be missing"),
        ));
    }
    let multiple_of = settings.size("multiple_of")?.unwrap_or(256);
    let multiplier = settings.get("ffn_dim_multiplier").and_then(Value::as_f64).unwrap_or(1.0);
    if multiple_of > 1 << 20 || !(0.0..=64.0).contains(&multiplier) {
        return Err(settings.refuse("multiple_of", "no width follows from it and ffn_dim_multiplier"));
    }
    let by_rule = ModelShape::ffn_hidden(shape.dim, multiplier, multiple_of);
    if by_rule != hidden {
        let why = format!(
            "with it the feed-forward network is {by_rule} wide, and the weights are for {hidden}; a file of the model may be missing"
        );
        return Err(settings.refuse("ffn_dim_multiplier", why));
    }
    Ok(shape)
}

/// The parameters of a shape.
///
/// # Errors
/// Where Meta's code has no way to compute it.
pub(crate) fn write(shape: &ModelShape) -> Result<Value, PretrainedError> {
    if let Some(scaling) = shape.rope_scaling.filter(|scaling| *scaling != SCALED) {
        return Err(PretrainedError::NoPlace {
            layout: "Meta's layout",
            what: format!("a scaling of rotary frequencies by {scaling}"),
            why: "it has Llama 3.1's scaling or none; write Hugging Face's layout instead",
        });
    }
    let (multiple_of, multiplier) = rule(shape.dim, shape.hidden);
    let mut value = json!({
        "dim": shape.dim,
        "n_layers": shape.layers,
        "n_heads": shape.heads,
        "n_kv_heads": shape.kv_heads,
        "vocab_size": shape.vocab,
        "multiple_of": multiple_of,
        "norm_eps": short(shape.norm_eps),
        "rope_theta": short(shape.rope_theta),
    });
    if let Some(multiplier) = multiplier {
        value["ffn_dim_multiplier"] = json!(multiplier);
    }
    if shape.rope_scaling.is_some() {
        value["use_scaled_rope"] = json!(true);
    }
    Ok(value)
}

/// Numbers by which the paper's rule gives this width: those of a published model where they do,
/// else a rounding to the width itself.
fn rule(dim: u32, hidden: u32) -> (u32, Option<f64>) {
    let published = [(256, None), (256, Some(1.3)), (1024, Some(1.3)), (4096, Some(1.3)), (256, Some(1.5))];
    let gives = |(multiple_of, multiplier): &(u32, Option<f64>)| {
        ModelShape::ffn_hidden(dim, multiplier.unwrap_or(1.0), *multiple_of) == hidden
    };
    let before = 8 * u64::from(dim) / 3;
    let rounded = match u64::from(hidden) >= before {
        true => (hidden, None),
        false => (hidden, Some(f64::from(hidden) / before as f64)),
    };
    published.into_iter().find(gives).unwrap_or(rounded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_width_has_numbers_that_give_it() {
        for dim in [2, 16, 64, 288, 4096, 8192] {
            for hidden in (1..400).chain([11008, 14336, 22016, 28672]) {
                let (multiple_of, multiplier) = rule(dim, hidden);
                let found = ModelShape::ffn_hidden(dim, multiplier.unwrap_or(1.0), multiple_of);
                assert_eq!(found, hidden, "{dim}: {multiple_of} {multiplier:?}");
            }
        }
        assert_eq!(rule(4096, 11008), (256, None));
    }
}
