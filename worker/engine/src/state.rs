//! Weights, moments, and at which step each slice of them is.
//!
//! In fp32 the master weights are the weights, so they exist once. That has one consequence:
//! weights of another step that are installed over a slice end its training state here.

use crate::layout::Layout;
use crate::{EngineError, init};
use caravan_kernels::Cpu;
use caravan_kernels::adamw::{Update, adamw};
use caravan_types::peer::Key;
use caravan_types::{ModelShape, Part, Slice, SliceId, SliceTable, Step};
use std::ops::Range;

/// First and second moments of a slice.
#[derive(Debug)]
struct Moments {
    step: Step,
    m: Vec<f32>,
    v: Vec<f32>,
}

/// What is held of one slice.
#[derive(Debug, Default)]
struct Held {
    /// The step that the weights are at.
    weights: Option<Step>,
    moments: Option<Moments>,
    /// Runs of elements within the slice, and whether AdamW decays them.
    runs: Vec<(Range<usize>, bool)>,
}

/// All weights, and the training state of some slices.
#[derive(Debug)]
pub(crate) struct State {
    shape: ModelShape,
    seed: u64,
    table: SliceTable,
    weights: Vec<f32>,
    held: Vec<Held>,
}

impl State {
    pub(crate) fn new(shape: &ModelShape, seed: u64, layout: &Layout) -> Self {
        let table = SliceTable::new(shape);
        let parameters = shape.all_parameters();
        let held = table.iter().map(|(_, slice)| Held { runs: runs(slice, &parameters), ..Held::default() });
        let held = held.collect();
        Self { shape: shape.clone(), seed, weights: vec![0.0; layout.parameters], held, table }
    }

    /// The cut of the model.
    pub(crate) fn table(&self) -> &SliceTable {
        &self.table
    }

    /// A slice by number.
    pub(crate) fn slice(&self, id: SliceId) -> Result<&Slice, EngineError> {
        self.table.get(id).ok_or(EngineError::UnknownSlice(id, self.table.len()))
    }

    /// The flat weights, if all of them are at `step`.
    pub(crate) fn weights_at(&self, step: Step) -> Result<&[f32], EngineError> {
        let wrong = self.held.iter().position(|held| held.weights != Some(step));
        match wrong {
            None => Ok(&self.weights),
            Some(i) => {
                let slice = SliceId(i as u32);
                Err(EngineError::WeightsAt { slice, expected: step, found: self.held[i].weights })
            }
        }
    }

    /// A slice's elements, its weights and what else is held of it.
    fn parts(&mut self, id: SliceId) -> Result<(Range<u64>, &mut [f32], &mut Held), EngineError> {
        let range = self.slice(id)?.range.clone();
        let elements = range.start as usize..range.end as usize;
        Ok((range, &mut self.weights[elements], &mut self.held[id.0 as usize]))
    }

    /// Values that a payload of this key must have.
    pub(crate) fn payload_len(&self, key: &Key) -> Result<usize, EngineError> {
        let n = self.slice(key.slice())?.len();
        Ok(if matches!(key, Key::State { .. }) { 3 * n } else { n })
    }

    /// A slice's weights, where they are at `step`.
    pub(crate) fn slice_weights(&self, id: SliceId, step: Step) -> Result<&[f32], EngineError> {
        let range = &self.slice(id)?.range;
        let found = self.held[id.0 as usize].weights;
        if found != Some(step) {
            return Err(EngineError::WeightsAt { slice: id, expected: step, found });
        }
        Ok(&self.weights[range.start as usize..range.end as usize])
    }

    /// A slice's master weights and moments, one after the other.
    pub(crate) fn slice_state(&self, id: SliceId, step: Step) -> Result<Vec<f32>, EngineError> {
        self.slice(id)?;
        let moments = self.held[id.0 as usize].moments.as_ref();
        match moments {
            Some(Moments { step: at, m, v }) if *at == step => {
                Ok([self.slice_weights(id, step)?, m, v].concat())
            }
            other => {
                let found = other.map(|m| m.step);
                Err(EngineError::StateAt { slice: id, expected: step, found })
            }
        }
    }

    /// Takes weights into use. Where training state of that very step is here, it has them.
    pub(crate) fn set_weights(&mut self, id: SliceId, step: Step, new: &[f32]) -> Result<(), EngineError> {
        let (_, weights, held) = self.parts(id)?;
        if held.moments.as_ref().is_some_and(|m| m.step == step) {
            return Ok(());
        }
        weights.copy_from_slice(new);
        held.weights = Some(step);
        held.moments = None;
        Ok(())
    }

    /// Takes training state (master weights, moments) into use.
    pub(crate) fn set_state(&mut self, id: SliceId, step: Step, new: &[f32]) -> Result<(), EngineError> {
        let (_, weights, held) = self.parts(id)?;
        let (master, moments) = new.split_at(weights.len());
        let (m, v) = moments.split_at(weights.len());
        weights.copy_from_slice(master);
        held.weights = Some(step);
        held.moments = Some(Moments { step, m: m.to_vec(), v: v.to_vec() });
        Ok(())
    }

    /// Makes slices from the seed, at step 0.
    pub(crate) fn init(&mut self, ids: &[SliceId], part: Part, cpu: &Cpu) -> Result<(), EngineError> {
        let slices = ids.iter().map(|id| self.slice(*id)).collect::<Result<Vec<_>, _>>()?;
        let made = cpu.map(&slices, |slice| {
            let mut values = vec![0.0; slice.len()];
            init::fill(&self.shape, self.seed, slice.range.clone(), &mut values);
            values
        });
        for (id, mut values) in ids.iter().zip(made) {
            match part {
                Part::Weights => self.set_weights(*id, Step(0), &values)?,
                Part::State => {
                    values.resize(3 * values.len(), 0.0);
                    self.set_state(*id, Step(0), &values)?;
                }
            }
        }
        Ok(())
    }

    /// Drops a slice's training state; its weights stay.
    pub(crate) fn drop_state(&mut self, id: SliceId) -> Result<(), EngineError> {
        self.parts(id)?.2.moments = None;
        Ok(())
    }

    /// One AdamW update of a slice, which must be one step behind.
    pub(crate) fn apply(
        &mut self,
        cpu: &Cpu,
        id: SliceId,
        update: &Update,
        gradient: &[f32],
    ) -> Result<(), EngineError> {
        let (step, before) = (Step(update.step), Step(update.step.saturating_sub(1)));
        let (_, weights, held) = self.parts(id)?;
        let found = held.moments.as_ref().map(|m| m.step);
        let Some(moments) = held.moments.as_mut().filter(|m| m.step == before) else {
            return Err(EngineError::StateAt { slice: id, expected: before, found });
        };
        for (run, decayed) in &held.runs {
            let weight_decay = if *decayed { update.weight_decay } else { 0.0 };
            let (m, v) = (&mut moments.m[run.clone()], &mut moments.v[run.clone()]);
            let update = Update { weight_decay, ..*update };
            adamw(cpu, &update, &gradient[run.clone()], &mut weights[run.clone()], m, v);
        }
        moments.step = step;
        held.weights = Some(step);
        Ok(())
    }
}

/// A slice's runs of decayed and of other parameters.
fn runs(slice: &Slice, parameters: &[caravan_types::Parameter]) -> Vec<(Range<usize>, bool)> {
    let mut runs: Vec<(Range<usize>, bool)> = Vec::new();
    let first = parameters.partition_point(|p| p.range().end <= slice.range.start);
    for parameter in parameters[first..].iter().take_while(|p| p.offset < slice.range.end) {
        let (start, end) =
            (parameter.offset.max(slice.range.start), parameter.range().end.min(slice.range.end));
        let run = (start - slice.range.start) as usize..(end - slice.range.start) as usize;
        match runs.last_mut() {
            Some((last, decayed)) if *decayed == parameter.decayed() => last.end = run.end,
            _ => runs.push((run, parameter.decayed())),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_tile_every_slice_and_gains_are_not_decayed() {
        let shape = ModelShape::preset("260k").unwrap();
        let parameters = shape.all_parameters();
        let mut bare = 0;
        for (_, slice) in SliceTable::new(&shape).iter() {
            let mut at = 0;
            for (run, decayed) in runs(slice, &parameters) {
                assert_eq!(run.start, at);
                at = run.end;
                bare += if decayed { 0 } else { run.len() };
            }
            assert_eq!(at, slice.len());
        }
        assert_eq!(bare, 64 * (2 * 5 + 1));
    }
}
