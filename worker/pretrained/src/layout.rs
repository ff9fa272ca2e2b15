//! Which tensors a folder has, by name, and how each lies in the flat model.
//!
//! The flat model is Hugging Face's: the same names, the same rows. Meta's has other names and
//! turns other pairs in its rotary embedding: of a head's rows, 0 and 1, 2 and 3 and so on are
//! turned together, where the flat model's are 0 and half, 1 and half + 1 and so on. So rows of
//! the query and key projections are dealt out anew, within each head; all other rows, and all
//! columns, are where they were.

use caravan_types::{ModelShape, Parameter};

/// Whose names and rotary pairs a set of tensors has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Convention {
    /// `LlamaForCausalLM`: element i of a head is turned with element i + half.
    HuggingFace,
    /// Meta's own code: element 2i is turned with element 2i + 1.
    Meta,
}

impl Convention {
    /// For messages.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::HuggingFace => "Hugging Face's layout",
            Self::Meta => "Meta's layout",
        }
    }
}

/// Along what a tensor is cut where a model is spread over several files for model parallelism.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    /// Each file has some of the rows.
    Rows,
    /// Each file has some of the columns.
    Columns,
    /// Either: Llama 2 cut its embedding's columns, Llama 3 its rows.
    Either,
    /// Each file has all of it.
    Whole,
}

/// How rows of a named tensor lie in the flat model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rows {
    /// As they are.
    Same,
    /// In heads of so many rows, with pairs side by side.
    Pairs {
        /// Rows of a head.
        head: u64,
    },
}

impl Rows {
    /// The row of the flat model that is row `row` of the named tensor.
    pub(crate) fn flat_row(self, row: u64) -> u64 {
        let Self::Pairs { head } = self else { return row };
        let (first, i) = (row - row % head, row % head);
        first + i / 2 + i % 2 * (head / 2)
    }

    /// The row of the named tensor that is row `row` of the flat model.
    pub(crate) fn named_row(self, row: u64) -> u64 {
        let Self::Pairs { head } = self else { return row };
        let (first, i, half) = (row - row % head, row % head, head / 2);
        first + i % half * 2 + i / half
    }
}

/// A tensor of a folder.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Entry {
    /// Its name there.
    pub(crate) name: String,
    /// What it is in the flat model.
    pub(crate) parameter: Parameter,
    pub(crate) rows: Rows,
    pub(crate) cut: Cut,
}

impl Entry {
    /// Its shape as stored.
    pub(crate) fn shape(&self) -> Vec<u64> {
        let Parameter { rows, cols, vector, .. } = self.parameter;
        if vector { vec![cols] } else { vec![rows, cols] }
    }
}

/// All tensors of a model in the order of the flat model.
pub(crate) fn entries(shape: &ModelShape, convention: Convention) -> Vec<Entry> {
    let entry = |parameter: Parameter| match convention {
        Convention::HuggingFace => {
            Entry { name: parameter.name.clone(), parameter, rows: Rows::Same, cut: Cut::Whole }
        }
        Convention::Meta => meta(parameter, shape),
    };
    shape.all_parameters().into_iter().map(entry).collect()
}

fn meta(parameter: Parameter, shape: &ModelShape) -> Entry {
    let layer = parameter.unit.0.saturating_sub(1);
    let of_layer = parameter.name.strip_prefix(&format!("model.layers.{layer}."));
    let pairs = Rows::Pairs { head: u64::from(shape.head_dim()) };
    let (part, rows, cut) = match of_layer.unwrap_or(&parameter.name) {
        "model.embed_tokens.weight" => ("tok_embeddings", Rows::Same, Cut::Either),
        "input_layernorm.weight" => ("attention_norm", Rows::Same, Cut::Whole),
        "self_attn.q_proj.weight" => ("attention.wq", pairs, Cut::Rows),
        "self_attn.k_proj.weight" => ("attention.wk", pairs, Cut::Rows),
        "self_attn.v_proj.weight" => ("attention.wv", Rows::Same, Cut::Rows),
        "self_attn.o_proj.weight" => ("attention.wo", Rows::Same, Cut::Columns),
        "post_attention_layernorm.weight" => ("ffn_norm", Rows::Same, Cut::Whole),
        "mlp.gate_proj.weight" => ("feed_forward.w1", Rows::Same, Cut::Rows),
        "mlp.up_proj.weight" => ("feed_forward.w3", Rows::Same, Cut::Rows),
        "mlp.down_proj.weight" => ("feed_forward.w2", Rows::Same, Cut::Columns),
        "model.norm.weight" => ("norm", Rows::Same, Cut::Whole),
        _ => ("output", Rows::Same, Cut::Rows),
    };
    let name = match of_layer {
        Some(_) => format!("layers.{layer}.{part}.weight"),
        None => format!("{part}.weight"),
    };
    Entry { name, parameter, rows, cut }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn rows_of_a_head_are_dealt_out_and_back() {
        let pairs = Rows::Pairs { head: 6 };
        let flat: Vec<u64> = (0..12).map(|row| pairs.flat_row(row)).collect();
        assert_eq!(flat, [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]);
        for rows in [pairs, Rows::Same, Rows::Pairs { head: 2 }] {
            assert!((0..12).all(|row| rows.named_row(rows.flat_row(row)) == row));
        }
    }

    #[test]
    fn every_tensor_has_a_name_of_its_own() {
        let shape = ModelShape::preset("260k").unwrap();
        for convention in [Convention::HuggingFace, Convention::Meta] {
            let names: BTreeSet<_> = entries(&shape, convention).into_iter().map(|e| e.name).collect();
            assert_eq!(names.len(), shape.all_parameters().len());
            assert_eq!(names.contains("layers.4.feed_forward.w2.weight"), convention == Convention::Meta);
        }
    }
}
