//! Whether a conversion computes what its source computes.
//!
//! A wrong permutation of rotary pairs, or heads shared out wrongly, moves a model's logits by
//! little: less than rounding to bf16 does. So they are computed in fp64 from weights that are
//! rounded as they will be written, and must be the same up to the rounding of fp64.

use crate::{Dtype, Export, Named, PretrainedError, Prompts, reference};

/// The most by which logits may differ, as a part of the largest one. Sums in another order
/// differ by some 10⁻¹⁶ each, and a hundred layers make less than 10⁻¹² of it; a single pair of
/// rows that is turned with the wrong frequency makes 10⁻⁸ and more of weights as small as those
/// of an untrained model.
pub const TOLERANCE: f64 = 1e-10;

/// Computes logits in three ways, and compares them: from the source's tensors in its own
/// convention, from the flat model by `engine`, and from the tensors that will be written.
///
/// # Errors
/// [`PretrainedError::Mismatch`] with the pair that differs, or where one cannot be computed.
pub fn verify(
    source: &dyn Named,
    export: &Export<'_>,
    dtype: Option<Dtype>,
    engine: impl FnOnce(&Prompts) -> Result<Vec<f64>, PretrainedError>,
) -> Result<(), PretrainedError> {
    let prompts = Prompts::new(source.shape());
    let theirs = reference::logits(source, &prompts, dtype)?;
    let ours = engine(&prompts)?;
    compare(("the source", &theirs), ("the flat model in Caravan's engine", &ours))?;
    let written = reference::logits(export, &prompts, None)?;
    compare(("the source", &theirs), ("the destination", &written))
}

/// Compares logits.
///
/// # Errors
/// [`PretrainedError::Mismatch`], or [`PretrainedError::NoLogits`] where some are not finite.
pub fn compare(
    (left, a): (&'static str, &[f64]),
    (right, b): (&'static str, &[f64]),
) -> Result<(), PretrainedError> {
    for (name, logits) in [(left, a), (right, b)] {
        if logits.iter().any(|logit| !logit.is_finite()) {
            return Err(PretrainedError::NoLogits(name));
        }
    }
    let most = a.iter().chain(b).fold(f64::MIN_POSITIVE, |most, logit| most.max(logit.abs()));
    let difference = match a.len() == b.len() {
        true => a.iter().zip(b).fold(0.0, |most: f64, (a, b)| most.max((a - b).abs())) / most,
        false => f64::INFINITY,
    };
    if difference > TOLERANCE {
        return Err(PretrainedError::Mismatch { left, right, difference, tolerance: TOLERANCE });
    }
    Ok(())
}
