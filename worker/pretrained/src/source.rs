//! What a model's weights can be asked, wherever they lie: elements of the flat model, and rows
//! of tensors by the names that they have there.

use crate::{Convention, Dtype, PretrainedError};
use caravan_types::ModelShape;
use std::ops::Range;

/// Weights as a flat model.
pub trait Source: Sync {
    /// The model.
    fn shape(&self) -> &ModelShape;

    /// How the parameter of this number, in the order of the flat model, is stored.
    fn dtype(&self, parameter: usize) -> Dtype;

    /// Fills `out` with the elements from `first` on.
    ///
    /// # Errors
    /// Where a file cannot be read. A range outside of the model is one, too.
    fn read(&self, first: u64, out: &mut [f32]) -> Result<(), PretrainedError>;
}

/// Weights as tensors with the names, shapes and rotary pairs of a convention.
pub trait Named: Sync {
    /// The model.
    fn shape(&self) -> &ModelShape;

    /// Whose names and pairs these are.
    fn convention(&self) -> Convention;

    /// Fills `out` with whole rows of a tensor; a vector has one row.
    ///
    /// # Errors
    /// Where there is no such tensor, or a file cannot be read.
    fn rows(&self, name: &str, rows: Range<u64>, out: &mut [f32]) -> Result<(), PretrainedError>;
}

/// A flat model in memory, in fp32, with Hugging Face's names: a checkpoint of Caravan's.
#[derive(Debug)]
pub struct Flat {
    shape: ModelShape,
    weights: Vec<f32>,
}

impl Flat {
    /// A model of this shape; none where there are more or fewer weights than it has.
    #[must_use]
    pub fn new(shape: ModelShape, weights: Vec<f32>) -> Option<Self> {
        (weights.len() as u64 == shape.parameters()).then_some(Self { shape, weights })
    }
}

impl Source for Flat {
    fn shape(&self) -> &ModelShape {
        &self.shape
    }

    fn dtype(&self, _: usize) -> Dtype {
        Dtype::F32
    }

    fn read(&self, first: u64, out: &mut [f32]) -> Result<(), PretrainedError> {
        let from = self.weights.get(first as usize..).and_then(|rest| rest.get(..out.len()));
        out.copy_from_slice(
            from.ok_or_else(|| PretrainedError::Engine("elements outside of the model".into()))?,
        );
        Ok(())
    }
}

impl Named for Flat {
    fn shape(&self) -> &ModelShape {
        &self.shape
    }

    fn convention(&self) -> Convention {
        Convention::HuggingFace
    }

    fn rows(&self, name: &str, rows: Range<u64>, out: &mut [f32]) -> Result<(), PretrainedError> {
        let found = self.shape.all_parameters().into_iter().find(|p| p.name == name);
        let found = found.ok_or_else(|| PretrainedError::Engine(format!("there is no tensor {name}")))?;
        self.read(found.offset + rows.start * found.cols, out)
    }
}
