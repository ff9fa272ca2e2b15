//! Where each tensor lies in the flat model, as ranges that slice it directly.

use crate::EngineError;
use caravan_types::{ModelShape, UnitId};
use std::ops::Range;

/// Elements of the flat model.
type Elements = Range<usize>;

/// One transformer layer's tensors.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Gain of the norm before attention, `[dim]`.
    pub attention_norm: Elements,
    /// Query, key and value projections as one matrix, [dim + 2·kv, dim].
    pub qkv: Elements,
    /// Output projection of attention, [dim, dim].
    pub output: Elements,
    /// Gain of the norm before the feed-forward network, `[dim]`.
    pub mlp_norm: Elements,
    /// Gate and up projections as one matrix, [2·hidden, dim].
    pub gate_up: Elements,
    /// Down projection, [dim, hidden].
    pub down: Elements,
}

/// A model's sizes and tensors.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Width of the residual stream.
    pub dim: usize,
    /// Query heads.
    pub heads: usize,
    /// Key-value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head: usize,
    /// Width of the feed-forward network.
    pub hidden: usize,
    /// Tokens in the vocabulary.
    pub vocab: usize,
    /// Longest sequence.
    pub context: usize,
    /// Token embedding, [vocab, dim].
    pub embedding: Elements,
    /// The layers.
    pub layers: Vec<Layer>,
    /// Gain of the final norm, `[dim]`.
    pub final_norm: Elements,
    /// The head, [vocab, dim].
    pub head_weight: Elements,
    /// Number of parameters.
    pub parameters: usize,
}

impl Layout {
    /// The layout of a shape.
    ///
    /// # Errors
    /// Where sizes contradict each other.
    pub fn new(shape: &ModelShape) -> Result<Self, EngineError> {
        check(shape)?;
        let tensor = |unit: &[caravan_types::Parameter], i: usize| {
            let range = unit[i].range();
            range.start as usize..range.end as usize
        };
        let join = |unit: &[caravan_types::Parameter], i: usize, j: usize| {
            tensor(unit, i).start..tensor(unit, j).end
        };
        let layer = |number| {
            let unit = shape.unit(UnitId(number));
            Layer {
                attention_norm: tensor(&unit, 0),
                qkv: join(&unit, 1, 3),
                output: tensor(&unit, 4),
                mlp_norm: tensor(&unit, 5),
                gate_up: join(&unit, 6, 7),
                down: tensor(&unit, 8),
            }
        };
        let head = shape.unit(UnitId(shape.units() - 1));
        Ok(Self {
            dim: shape.dim as usize,
            heads: shape.heads as usize,
            kv_heads: shape.kv_heads as usize,
            head: shape.head_dim() as usize,
            hidden: shape.hidden as usize,
            vocab: shape.vocab as usize,
            context: shape.context as usize,
            embedding: tensor(&shape.unit(UnitId(0)), 0),
            layers: (1..=shape.layers).map(layer).collect(),
            final_norm: tensor(&head, 0),
            head_weight: tensor(&head, 1),
            parameters: shape.parameters() as usize,
        })
    }

    /// Width of keys, and of values.
    #[must_use]
    pub fn kv(&self) -> usize {
        self.kv_heads * self.head
    }

    /// Width of queries, keys and values together.
    #[must_use]
    pub fn qkv(&self) -> usize {
        self.dim + 2 * self.kv()
    }
}

fn check(shape: &ModelShape) -> Result<(), EngineError> {
    let ModelShape { dim, layers, heads, kv_heads, hidden, vocab, context, .. } = *shape;
    let bad = |reason: String| Err(EngineError::Shape(reason));
    for (name, value) in [
        ("dim", dim),
        ("layers", layers),
        ("heads", heads),
        ("kv_heads", kv_heads),
        ("hidden", hidden),
        ("vocab", vocab),
        ("context", context),
    ] {
        if value == 0 {
            return bad(format!("{name} is 0"));
        }
    }
    if !dim.is_multiple_of(2 * heads) {
        return bad(format!("dim {dim} must be an even multiple of heads {heads}"));
    }
    if !heads.is_multiple_of(kv_heads) {
        return bad(format!("heads {heads} must be a multiple of kv_heads {kv_heads}"));
    }
    Ok(())
}
