//! What went bad first in a step whose loss or gradient is not finite.
//!
//! Nothing is looked at while a step is computed. Here its micro-batches are computed again, one
//! sequence at a time, on the same weights, and every tensor is looked at in the order of computing
//! (`pass`). A stage that needs another one's output cannot do that for all of its micro-batches:
//! it keeps what it was sent for the first one that came out bad ([`Suspect`]), which is seen in the
//! gradient that it sends back, and looks at that one. What no sequence shows by itself may be in
//! their sum.

mod pass;

use crate::EngineError;
use crate::executor::{Batches, Checkpoints, Typed};
use crate::state::Weight;
use caravan_types::non_finite::{Finding, Sample, Tensor, Value};
use caravan_types::progress::{Doing, Place};
use caravan_types::task::Done;
use caravan_types::{BatchShape, Generation, Lane, MicroBatch, MicroId, Step, UnitId};
use pass::{End, Found, Pass, Seen};
use std::ops::Range;

/// A micro-batch that came out bad, with what other stages had sent for it.
#[derive(Debug)]
pub(crate) struct Suspect {
    step: Step,
    micro: MicroId,
    /// The residual stream from the stage before.
    input: Option<Vec<f32>>,
    /// Its gradient from the stage after.
    coming: Option<Vec<f32>>,
}

/// What came of looking at micro-batches.
enum Looked {
    /// All is finite.
    Nothing,
    /// What another stage had sent was bad already: it is for that one to find.
    CameBad,
    /// The generation has ended.
    GivenUp,
    /// What went bad first.
    Found(Finding),
}

/// The first of some values that is not finite.
fn first_bad<E: Weight>(values: &[E]) -> Option<(usize, Value)> {
    values.iter().enumerate().find_map(|(i, v)| Some((i, Value::of(f64::from(v.widen()))?)))
}

/// One sequence of a micro-batch.
fn sequence(batch: &MicroBatch, number: usize) -> MicroBatch {
    let rows = number * batch.length..(number + 1) * batch.length;
    MicroBatch {
        sequences: 1,
        length: batch.length,
        tokens: batch.tokens[rows.clone()].to_vec(),
        targets: batch.targets[rows.clone()].to_vec(),
        counted: batch.counted[rows.clone()].to_vec(),
        document_start: batch.document_start[rows].to_vec(),
    }
}

impl<E: Weight, B: Batches, C: Checkpoints> Typed<E, B, C> {
    /// Looks for the first bad tensor of these lanes; none where it was given up.
    pub(crate) fn diagnose(
        &mut self,
        generation: Generation,
        step: Step,
        lanes: Range<Lane>,
    ) -> Result<Option<Done>, EngineError> {
        if self.watch.is_fenced(generation) {
            return Ok(None);
        }
        let mut finding = self.bad_weight(step)?;
        if finding.is_none() {
            finding = match self.look_at_lanes(generation, step, lanes)? {
                Looked::Found(found) => Some(found),
                // The samples themselves are fine.
                Looked::Nothing => self.bad_sum(),
                Looked::CameBad => None,
                Looked::GivenUp => return Ok(None),
            };
        }
        Ok(Some(Done::Diagnosed { generation, step, finding }))
    }

    fn look_at_lanes(
        &mut self,
        generation: Generation,
        step: Step,
        lanes: Range<Lane>,
    ) -> Result<Looked, EngineError> {
        let (whole, suspect) = (self.model.is_first() && self.model.is_last(), self.suspect.take());
        let suspects = match suspect.filter(|suspect| suspect.step == step) {
            Some(suspect) => vec![suspect],
            None if whole => self.all_of(step, lanes),
            None => Vec::new(),
        };
        for suspect in &suspects {
            match self.look_at(generation, suspect)? {
                Looked::Nothing => {}
                other => return Ok(other),
            }
        }
        Ok(Looked::Nothing)
    }

    /// Keeps what a micro-batch was computed from, where that is needed to look at it again and it
    /// is the first one of the step that came out bad.
    pub(crate) fn suspect(
        &mut self,
        step: Step,
        micro: MicroId,
        tokens: usize,
        loss: f64,
        coming: Option<&[f32]>,
    ) {
        let whole = self.model.is_first() && self.model.is_last();
        if whole || self.suspect.as_ref().is_some_and(|s| s.step == step) {
            return;
        }
        if loss.is_finite() && first_bad(self.model.input_gradient(tokens)).is_none() {
            return;
        }
        let input = (!self.model.is_first()).then(|| self.model.landed_input(tokens).to_vec());
        self.suspect = Some(Suspect { step, micro, input, coming: coming.map(<[f32]>::to_vec) });
    }

    /// All micro-batches of some lanes, for a stage that is the whole model.
    fn all_of(&self, step: Step, lanes: Range<Lane>) -> Vec<Suspect> {
        let of_lane = |lane| (0..self.batch.micro_batches).map(move |index| MicroId { lane, index });
        let suspect = |micro| Suspect { step, micro, input: None, coming: None };
        lanes.flat_map(of_lane).map(suspect).collect()
    }

    /// The first weight of the stage that is not finite: nothing else can have gone bad first.
    fn bad_weight(&self, step: Step) -> Result<Option<Finding>, EngineError> {
        let before = Step(step.0.saturating_sub(1));
        let weights = self.state.weights_at(before, self.model.units())?;
        for unit in self.model.units() {
            self.watch.begin(Doing::Moving);
            if let Some((at, value)) = first_bad(weights[unit]) {
                let (name, element) = self.parameter(unit, at);
                return Ok(Some(Finding { tensor: Tensor::Weight(name), element, value, sample: None }));
            }
        }
        Ok(None)
    }

    /// The first element that is not finite in the gradient sums of our own lanes.
    fn bad_sum(&self) -> Option<Finding> {
        let (at, value) = self.gradients.own_sums().find_map(first_bad)?;
        let (mut unit, mut at) = (self.model.units().start, at);
        while at >= self.model.layout().unit_lens[unit] {
            at -= self.model.layout().unit_lens[unit];
            unit += 1;
        }
        let (name, element) = self.parameter(unit, at);
        Some(Finding { tensor: Tensor::WeightGradient(name), element, value, sample: None })
    }

    /// The parameter of a unit's element, and which of its elements that is.
    fn parameter(&self, unit: usize, at: usize) -> (String, u64) {
        let unit = UnitId(unit as u32);
        let start = self.state.shape().unit_range(unit).start;
        let mut parameters = self.state.shape().unit(unit).into_iter();
        let found = parameters.find(|p| p.range().contains(&(start + at as u64)));
        found.map_or((String::new(), at as u64), |p| (p.name, start + at as u64 - p.offset))
    }

    /// Computes a micro-batch again, sequence by sequence.
    fn look_at(&mut self, generation: Generation, suspect: &Suspect) -> Result<Looked, EngineError> {
        let Suspect { step, micro, input, coming } = suspect;
        let bad = |reason| EngineError::Batch { step: *step, micro: *micro, reason };
        let batch = self.batches.micro_batch(*step, micro.lane, micro.index).map_err(bad)?;
        let weights = self.state.weights_at(Step(step.0.saturating_sub(1)), self.model.units())?;
        let (layout, epsilon, turns) = self.model.parts();
        let width = batch.length * layout.dim;
        for number in 0..batch.sequences {
            let rows = number * width..(number + 1) * width;
            let cut = |stream: &'_ Option<Vec<f32>>| stream.as_ref().map(|s| s[rows.clone()].to_vec());
            let watch = &self.watch;
            let pass = Pass {
                cpu: &self.cpu,
                layout,
                epsilon,
                turns,
                weights: &weights,
                units: self.model.units(),
                batch: sequence(&batch, number),
                scale: self.scale,
                stop: &|unit| {
                    watch.begin(Doing::Forward(Place { micro: *micro, unit }));
                    watch.is_fenced(generation)
                },
            };
            match pass.run(cut(input), cut(coming)) {
                Ok(()) => {}
                Err(End::Stopped) => return Ok(Looked::GivenUp),
                Err(End::Came) => return Ok(Looked::CameBad),
                Err(End::Found(found)) => {
                    return Ok(Looked::Found(self.finding(*step, *micro, number, &found)));
                }
            }
        }
        Ok(Looked::Nothing)
    }

    fn finding(&self, step: Step, micro: MicroId, sequence: usize, found: &Found) -> Finding {
        let Found { tensor, position, element, value } = *found;
        let (tensor, element) = match tensor {
            Seen::Out(module) => (Tensor::Activation(module), element as u64),
            Seen::Back(module) => (Tensor::ActivationGradient(module), element as u64),
            Seen::Weight(unit, start) => {
                let (name, element) = self.parameter(unit, start + element);
                (Tensor::WeightGradient(name), element)
            }
        };
        Finding { tensor, element, value, sample: Some(self.sample(step, micro, sequence, position)) }
    }

    fn sample(&self, step: Step, micro: MicroId, sequence: usize, position: Option<usize>) -> Sample {
        let BatchShape { micro_batches, sequences, .. } = self.batch;
        let before = u64::from(micro.lane) * u64::from(micro_batches) + u64::from(micro.index);
        let in_step = before * u64::from(sequences) + sequence as u64;
        let number = step.0.saturating_sub(1).saturating_mul(self.batch.sequences_per_step()) + in_step;
        Sample { micro, sequence: sequence as u32, number, position: position.map(|p| p as u32) }
    }
}
