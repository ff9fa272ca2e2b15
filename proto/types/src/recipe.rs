//! The optimiser's recipe: AdamW, warm-up, cosine, clipping.

use crate::{NonFinitePolicy, Step};
use serde::{Deserialize, Serialize};
use std::f64::consts::PI;

/// AdamW (arXiv 1711.05101) with the learning-rate schedule and values of the Llama 2 paper
/// (arXiv 2307.09288, section 2.2).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Length of the run in optimiser steps; the cosine ends here.
    pub steps: u64,
    /// Steps of linear warm-up.
    pub warmup_steps: u64,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Final learning rate as a share of the peak.
    pub final_ratio: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay, for matrices.
    pub weight_decay: f64,
    /// Gradients are scaled down to this global norm.
    pub clip_norm: f64,
    /// What is done with a step whose loss or gradient is not finite.
    pub non_finite: NonFinitePolicy,
}

impl Default for Recipe {
    fn default() -> Self {
        Self {
            steps: 476_837,
            warmup_steps: 2000,
            learning_rate: 3e-4,
            final_ratio: 0.1,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-5,
            weight_decay: 0.1,
            clip_norm: 1.0,
            non_finite: NonFinitePolicy::Stop,
        }
    }
}

impl Recipe {
    /// The learning rate with which `step` (1 for the first) is applied: linear from
    /// `peak / warmup` to the peak, then half a cosine down to `final_ratio · peak` at the
    /// last step, and flat after it. The cosine is the `libm` crate's: the same bits on every
    /// machine, which the platform's does not promise.
    #[must_use]
    pub fn learning_rate_at(&self, step: Step) -> f64 {
        let (s, warmup, end) = (step.0 as f64, self.warmup_steps as f64, self.steps as f64);
        if s < warmup {
            return self.learning_rate * s / warmup;
        }
        let done = if end > warmup { ((s - warmup) / (end - warmup)).min(1.0) } else { 1.0 };
        let cosine = 0.5 * (1.0 + libm::cos(PI * done));
        self.learning_rate * (self.final_ratio + (1.0 - self.final_ratio) * cosine)
    }

    /// What gradients of this global norm are multiplied by, as PyTorch's
    /// `clip_grad_norm_` does it: `min(1, clip / (norm + 1e-6))`.
    #[must_use]
    pub fn clip_scale(&self, norm: f64) -> f64 {
        (self.clip_norm / (norm + 1e-6)).min(1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_warms_up_to_the_peak_and_falls_to_a_tenth() {
        let r = Recipe { steps: 100, warmup_steps: 10, learning_rate: 1.0, ..Recipe::default() };
        assert_eq!(r.learning_rate_at(Step(1)), 0.1);
        assert_eq!(r.learning_rate_at(Step(10)), 1.0);
        assert!((r.learning_rate_at(Step(55)) - 0.55).abs() < 1e-12);
        assert!((r.learning_rate_at(Step(100)) - 0.1).abs() < 1e-12);
        assert!((r.learning_rate_at(Step(500)) - 0.1).abs() < 1e-12);
    }
}
