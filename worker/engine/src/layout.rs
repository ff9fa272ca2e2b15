//! Where each tensor lies within its unit, as ranges that slice the unit's elements directly.
//!
//! Units are placed whole, so a worker holds some units' elements and no others; all layers are
//! laid out alike.

use crate::EngineError;
use caravan_kernels::{Element, View};
use caravan_types::{ModelShape, RopeScaling, UnitId};
use std::ops::Range;

/// Elements of a unit.
type Elements = Range<usize>;

/// A transformer layer's tensors.
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
    /// Number of layers: units 1 to this. Unit 0 is the token embedding, [vocab, dim].
    pub layers: usize,
    /// Each layer's tensors.
    pub layer: Layer,
    /// Gain of the final norm, `[dim]`, in the last unit.
    pub final_norm: Elements,
    /// The head, [vocab, dim], in the last unit.
    pub head_weight: Elements,
    /// Elements of each unit; the flat model is one after the other.
    pub unit_lens: Vec<usize>,
}

impl Layout {
    /// The layout of a shape.
    ///
    /// # Errors
    /// Where sizes contradict each other.
    pub fn new(shape: &ModelShape) -> Result<Self, EngineError> {
        check(shape)?;
        let units = shape.units();
        let tensor = |unit: u32, i: usize| {
            let (start, range) = (shape.unit_range(UnitId(unit)).start, shape.unit(UnitId(unit))[i].range());
            (range.start - start) as usize..(range.end - start) as usize
        };
        let join = |i: usize, j: usize| tensor(1, i).start..tensor(1, j).end;
        let len = |unit| {
            let range = shape.unit_range(UnitId(unit));
            (range.end - range.start) as usize
        };
        Ok(Self {
            dim: shape.dim as usize,
            heads: shape.heads as usize,
            kv_heads: shape.kv_heads as usize,
            head: shape.head_dim() as usize,
            hidden: shape.hidden as usize,
            vocab: shape.vocab as usize,
            context: shape.context as usize,
            layers: shape.layers as usize,
            layer: Layer {
                attention_norm: tensor(1, 0),
                qkv: join(1, 3),
                output: tensor(1, 4),
                mlp_norm: tensor(1, 5),
                gate_up: join(6, 7),
                down: tensor(1, 8),
            },
            final_norm: tensor(units - 1, 0),
            head_weight: tensor(units - 1, 1),
            unit_lens: (0..units).map(len).collect(),
        })
    }

    /// Number of parameters.
    #[must_use]
    pub fn parameters(&self) -> usize {
        self.unit_lens.iter().sum()
    }

    /// Number of units.
    #[must_use]
    pub fn units(&self) -> usize {
        self.unit_lens.len()
    }

    /// A flat model, unit by unit. Its length is [`Layout::parameters`].
    #[must_use]
    pub fn split<'a, R>(&self, flat: &'a [R]) -> Vec<&'a [R]> {
        let mut rest = flat;
        let unit = |len: &usize| {
            let (unit, after) = rest.split_at(*len);
            rest = after;
            unit
        };
        self.unit_lens.iter().map(unit).collect()
    }

    /// As [`Layout::split`], to write to.
    #[must_use]
    pub fn split_mut<'a, R>(&self, flat: &'a mut [R]) -> Vec<&'a mut [R]> {
        let mut rest = flat;
        let unit = |len: &usize| {
            let (unit, after) = std::mem::take(&mut rest).split_at_mut(*len);
            rest = after;
            unit
        };
        self.unit_lens.iter().map(unit).collect()
    }

    /// A layer's matrices, as [out, in]: the projection of queries, keys and values, that of attention's
    /// output, gate and up, and down. `w` is the layer's unit.
    #[must_use]
    pub fn factors<'a, E: Element>(&self, w: &'a [E]) -> [View<'a, E>; 4] {
        let Layer { qkv, output, gate_up, down, .. } = &self.layer;
        let matrix = |range: &Elements, inputs| View::rows_of(&w[range.clone()], inputs);
        [
            matrix(qkv, self.dim),
            matrix(output, self.dim),
            matrix(gate_up, self.dim),
            matrix(down, self.hidden),
        ]
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
    if let Some(fault) = shape.rope_scaling.and_then(RopeScaling::fault) {
        return bad(format!("rope_scaling: {fault}"));
    }
    Ok(())
}
