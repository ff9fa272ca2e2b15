//! Weights, moments, and at which step each slice of them is.
//!
//! Weights of the units that are computed with lie unit by unit; a slice that is owned without
//! its unit being computed with has weights of its own. A new plan may ask for other units:
//! those of the old one stay until they are given up, since others may have to be healed with
//! them.
//!
//! Where weights are f32 they are the master weights, so they exist once; others are the master
//! weights, rounded. Weights of another step that are installed over a slice end its training
//! state here.
//!
//! Whatever is put here is summed up once it lies in memory, and looked at again before it is
//! used for good: what has changed in between, memory has changed.

use crate::{EngineError, init};
use caravan_kernels::adamw::{Sums, Trained, Update, adamw};
use caravan_kernels::checksum::{checksum, flip};
use caravan_kernels::{Bf16, Buffer, Cpu, Element, add};
use caravan_types::{
    Checksum, ModelShape, Part, Slice, SliceId, SliceSum, SliceTable, Step, Subject, UnitId,
};
use std::ops::Range;

/// What weights are stored as: f32, or bf16 with f32 master weights.
pub trait Weight: Element<Sum = f32> {}

impl Weight for f32 {}
impl Weight for Bf16 {}

/// Master weights, and first and second moments of a slice.
#[derive(Debug)]
struct Moments {
    step: Step,
    /// Empty where the weights are the master weights.
    master: Buffer<f32>,
    m: Buffer<f32>,
    v: Buffer<f32>,
}

/// What is held of one slice.
#[derive(Debug, Default)]
struct Held {
    /// The step that the weights are at.
    weights: Option<Step>,
    moments: Option<Moments>,
    /// Of weights and moments, when they were put here.
    sum: SliceSum,
    /// Runs of elements within the slice, and whether AdamW decays them.
    runs: Vec<(Range<usize>, bool)>,
}

/// All weights, and the training state of some slices.
#[derive(Debug)]
pub(crate) struct State<E> {
    shape: ModelShape,
    seed: u64,
    table: SliceTable,
    /// Elements of each unit that is here; else empty.
    units: Vec<Buffer<E>>,
    /// Slices of each unit.
    by_unit: Vec<Range<usize>>,
    /// Weights of each slice that is here while its unit is not; else empty.
    loose: Vec<Vec<E>>,
    held: Vec<Held>,
}

impl<E: Weight> State<E> {
    pub(crate) fn new(shape: &ModelShape, seed: u64) -> Self {
        let table = SliceTable::new(shape);
        let parameters = shape.all_parameters();
        let held = table.iter().map(|(_, slice)| Held { runs: runs(slice, &parameters), ..Held::default() });
        let held = held.collect();
        let units: Vec<u32> = table.iter().map(|(_, slice)| slice.unit.0).collect();
        let of = |unit: u32| units.partition_point(|u| *u < unit)..units.partition_point(|u| *u <= unit);
        Self {
            shape: shape.clone(),
            seed,
            units: vec![Buffer::default(); shape.units() as usize],
            by_unit: (0..shape.units()).map(of).collect(),
            loose: vec![Vec::new(); table.len()],
            held,
            table,
        }
    }

    /// Elements of the flat model in these units, which exist.
    pub(crate) fn elements(&self, units: &Range<u32>) -> Range<u64> {
        if units.is_empty() {
            return 0..0;
        }
        let (first, last) = (UnitId(units.start), UnitId(units.end - 1));
        self.shape.unit_range(first).start..self.shape.unit_range(last).end
    }

    /// Whether the model has these units.
    pub(crate) fn has(&self, units: &Range<u32>) -> Result<(), EngineError> {
        if units.end > self.shape.units() {
            return Err(EngineError::Units(units.start, units.end, self.shape.units()));
        }
        Ok(())
    }

    /// Gets ready to compute with these units, which the model has. What was here stays.
    pub(crate) fn place(&mut self, units: &Range<u32>) {
        for unit in units.start as usize..units.end as usize {
            if !self.units[unit].is_empty() {
                continue;
            }
            let range = self.shape.unit_range(UnitId(unit as u32));
            let mut elements = Buffer::zeros((range.end - range.start) as usize);
            for id in self.by_unit[unit].clone() {
                let loose = std::mem::take(&mut self.loose[id]);
                if !loose.is_empty() {
                    elements[self.within(id)].copy_from_slice(&loose);
                }
            }
            self.units[unit] = elements;
        }
    }

    /// Gives up the weights of all other units, but for slices with training state.
    pub(crate) fn narrow(&mut self, units: &Range<u32>) {
        for unit in 0..self.units.len() {
            if units.contains(&(unit as u32)) || self.units[unit].is_empty() {
                continue;
            }
            let elements = std::mem::take(&mut self.units[unit]);
            for id in self.by_unit[unit].clone() {
                let within = self.within(id);
                match self.held[id].moments {
                    Some(_) => self.loose[id] = elements[within].to_vec(),
                    None => self.held[id].weights = None,
                }
            }
        }
    }

    /// A slice's elements within its unit; the slice exists.
    fn within(&self, id: usize) -> Range<usize> {
        let Some(slice) = self.table.get(SliceId(id as u32)) else { return 0..0 };
        let start = self.shape.unit_range(slice.unit).start;
        (slice.range.start - start) as usize..(slice.range.end - start) as usize
    }

    /// The model.
    pub(crate) fn shape(&self) -> &ModelShape {
        &self.shape
    }

    /// The cut of the model.
    pub(crate) fn table(&self) -> &SliceTable {
        &self.table
    }

    /// A slice by number.
    pub(crate) fn slice(&self, id: SliceId) -> Result<&Slice, EngineError> {
        self.table.get(id).ok_or(EngineError::UnknownSlice(id, self.table.len()))
    }

    /// Each unit's weights, if all of these units' are here and at `step`; others are empty.
    pub(crate) fn weights_at(&self, step: Step, units: Range<usize>) -> Result<Vec<&[E]>, EngineError> {
        for id in self.by_unit[units.clone()].iter().cloned().flatten() {
            let found = self.held[id].weights;
            if found != Some(step) {
                let slice = SliceId(id as u32);
                return Err(EngineError::WeightsAt { slice, expected: step, found });
            }
        }
        let here = |(u, unit): (usize, &'_ Buffer<E>)| units.contains(&u) && !unit.is_empty();
        let pick = |(u, unit)| if here((u, unit)) { &**unit } else { &[] };
        Ok(self.units.iter().enumerate().map(pick).collect())
    }

    /// A slice's weights and what else is held of it. Makes room for them where there is none.
    fn parts(&mut self, id: SliceId) -> Result<(&mut [E], &mut Held), EngineError> {
        let (unit, len) = {
            let slice = self.slice(id)?;
            (slice.unit.0 as usize, slice.len())
        };
        let within = self.within(id.0 as usize);
        let held = &mut self.held[id.0 as usize];
        if !self.units[unit].is_empty() {
            return Ok((&mut self.units[unit][within], held));
        }
        let loose = &mut self.loose[id.0 as usize];
        loose.resize(len, E::default());
        Ok((loose, held))
    }

    /// A slice's weights, where they are at `step`.
    pub(crate) fn slice_weights(&self, id: SliceId, step: Step) -> Result<&[E], EngineError> {
        let unit = self.slice(id)?.unit.0 as usize;
        let found = self.held[id.0 as usize].weights;
        if found != Some(step) {
            return Err(EngineError::WeightsAt { slice: id, expected: step, found });
        }
        match &*self.units[unit] {
            [] => Ok(&self.loose[id.0 as usize]),
            elements => Ok(&elements[self.within(id.0 as usize)]),
        }
    }

    /// A slice's weights, where they are at `step`, and are what was put here.
    pub(crate) fn sound_weights(&self, cpu: &Cpu, id: SliceId, step: Step) -> Result<&[E], EngineError> {
        let weights = self.slice_weights(id, step)?;
        let expected = self.held[id.0 as usize].sum.weights;
        if expected == sum_of(cpu, &[weights]) {
            return Ok(weights);
        }
        Err(EngineError::Corrupt { slice: id, step, what: Subject::State })
    }

    /// What was put here of a slice, if its weights are what is here. Moments are looked at
    /// before they are used or leave.
    pub(crate) fn look(&self, cpu: &Cpu, id: SliceId, step: Step) -> Result<SliceSum, EngineError> {
        self.sound_weights(cpu, id, step)?;
        Ok(self.held[id.0 as usize].sum)
    }

    /// What was put here of a slice, if that is what is here.
    pub(crate) fn verify(&self, cpu: &Cpu, id: SliceId, step: Step) -> Result<SliceSum, EngineError> {
        self.sound_weights(cpu, id, step)?;
        let held = &self.held[id.0 as usize];
        let Some(Moments { step, master, m, v }) = &held.moments else { return Ok(held.sum) };
        if held.sum.moments == Some(sum_of(cpu, &[master, m, v])) {
            return Ok(held.sum);
        }
        Err(EngineError::Corrupt { slice: id, step: *step, what: Subject::State })
    }

    /// Sums up what lies in memory now of a slice.
    fn sum_up(&mut self, cpu: &Cpu, id: SliceId) -> Result<SliceSum, EngineError> {
        let (weights, held) = self.parts(id)?;
        let weights = sum_of(cpu, &[weights]);
        held.sum = SliceSum {
            weights,
            moments: held.moments.as_ref().map(|Moments { master, m, v, .. }| sum_of(cpu, &[master, m, v])),
        };
        Ok(held.sum)
    }

    /// A slice's master weights and moments, one after the other.
    pub(crate) fn slice_state(&self, id: SliceId, step: Step) -> Result<Vec<f32>, EngineError> {
        self.slice(id)?;
        let moments = self.held[id.0 as usize].moments.as_ref();
        match moments {
            Some(Moments { step: at, master, m, v }) if *at == step => {
                let mut state: Vec<f32> = match &**master {
                    [] => self.slice_weights(id, step)?.iter().map(|w| w.widen()).collect(),
                    master => master.to_vec(),
                };
                state.extend_from_slice(m);
                state.extend_from_slice(v);
                Ok(state)
            }
            other => {
                let found = other.map(|m| m.step);
                Err(EngineError::StateAt { slice: id, expected: step, found })
            }
        }
    }

    /// Takes weights into use. Where training state of that very step is here, it has them.
    pub(crate) fn set_weights(
        &mut self,
        cpu: &Cpu,
        id: SliceId,
        step: Step,
        new: &[f32],
    ) -> Result<(), EngineError> {
        let (weights, held) = self.parts(id)?;
        if held.moments.as_ref().is_some_and(|m| m.step == step) {
            return Ok(());
        }
        add::narrow(cpu, weights, new);
        held.weights = Some(step);
        held.moments = None;
        self.sum_up(cpu, id).map(|_| ())
    }

    /// Takes training state (master weights, moments) into use.
    pub(crate) fn set_state(
        &mut self,
        cpu: &Cpu,
        id: SliceId,
        step: Step,
        new: &[f32],
    ) -> Result<(), EngineError> {
        let (weights, held) = self.parts(id)?;
        let (master, moments) = new.split_at(weights.len());
        let (m, v) = moments.split_at(weights.len());
        add::narrow(cpu, weights, master);
        let master = if E::IS_SUM { Buffer::default() } else { Buffer::from(master) };
        held.weights = Some(step);
        held.moments = Some(Moments { step, master, m: Buffer::from(m), v: Buffer::from(v) });
        self.sum_up(cpu, id).map(|_| ())
    }

    /// Makes slices from the seed, at step 0.
    pub(crate) fn init(&mut self, ids: &[SliceId], part: Part, cpu: &Cpu) -> Result<(), EngineError> {
        let slices = ids.iter().map(|id| self.slice(*id)).collect::<Result<Vec<_>, _>>()?;
        let made = cpu.map(&slices, |slice| {
            let mut values = vec![0.0; slice.len()];
            init::fill(&self.shape, self.seed, slice.range.clone(), &mut values);
            values
        });
        ids.iter().zip(made).try_for_each(|(id, values)| self.begin(cpu, *id, part, values))
    }

    /// Takes a slice's weights at step 0 into use; its moments are zero then.
    pub(crate) fn begin(
        &mut self,
        cpu: &Cpu,
        id: SliceId,
        part: Part,
        mut values: Vec<f32>,
    ) -> Result<(), EngineError> {
        match part {
            Part::Weights => self.set_weights(cpu, id, Step(0), &values),
            Part::State => {
                values.resize(3 * values.len(), 0.0);
                self.set_state(cpu, id, Step(0), &values)
            }
        }
    }

    /// Drops a slice's training state; its weights stay where its unit is computed with.
    pub(crate) fn drop_state(&mut self, id: SliceId) -> Result<(), EngineError> {
        let unit = self.slice(id)?.unit.0 as usize;
        let held = &mut self.held[id.0 as usize];
        held.moments = None;
        held.sum.moments = None;
        if self.units[unit].is_empty() {
            self.loose[id.0 as usize] = Vec::new();
            held.weights = None;
        }
        Ok(())
    }

    /// One AdamW update of a slice, which must be one step behind and sound. `flaw` is a bit of
    /// the new weights that comes out wrong, where that is to be tried.
    pub(crate) fn apply(
        &mut self,
        cpu: &Cpu,
        id: SliceId,
        update: &Update,
        gradient: &[f32],
        flaw: Option<u64>,
    ) -> Result<SliceSum, EngineError> {
        let (step, before) = (Step(update.step), Step(update.step.saturating_sub(1)));
        self.slice_weights(id, before)?;
        let (weights, held) = self.parts(id)?;
        let found = held.moments.as_ref().map(|m| m.step);
        let Some(moments) = held.moments.as_mut().filter(|m| m.step == before) else {
            return Err(EngineError::StateAt { slice: id, expected: before, found });
        };
        let of_run = |(run, decayed): &(Range<usize>, bool)| {
            let weight_decay = if *decayed { update.weight_decay } else { 0.0 };
            (run.clone(), Update { weight_decay, ..*update })
        };
        let runs: Vec<_> = held.runs.iter().map(of_run).collect();
        let Moments { master, m, v, .. } = moments;
        let [was, mut is] = adamw(cpu, &runs, gradient, Trained { weights: &mut *weights, master, m, v });
        let sum =
            |sums: Sums| SliceSum { weights: Checksum(sums.weights), moments: Some(Checksum(sums.moments)) };
        if sum(was) != held.sum {
            return Err(EngineError::Corrupt { slice: id, step: before, what: Subject::State });
        }
        moments.step = step;
        held.weights = Some(step);
        if let Some(bit) = flaw {
            flip(weights, bit);
            is.weights = checksum(cpu, &[weights]);
        }
        held.sum = sum(is);
        Ok(held.sum)
    }

    /// Has a slice's training state, which must be one step behind and sound, at `step` as it is.
    pub(crate) fn skip(&mut self, cpu: &Cpu, id: SliceId, step: Step) -> Result<SliceSum, EngineError> {
        let before = Step(step.0.saturating_sub(1));
        let sum = self.verify(cpu, id, before)?;
        let held = &mut self.held[id.0 as usize];
        let found = held.moments.as_ref().map(|m| m.step);
        let Some(moments) = held.moments.as_mut().filter(|m| m.step == before) else {
            return Err(EngineError::StateAt { slice: id, expected: before, found });
        };
        moments.step = step;
        held.weights = Some(step);
        Ok(sum)
    }

    /// Flips a bit of what is held, as a cosmic ray would: the choice is a function of `bit`.
    /// False where nothing is held.
    pub(crate) fn flip(&mut self, bit: u64) -> bool {
        let held = |h: &(usize, &Held)| h.1.weights.is_some();
        let slices: Vec<usize> = self.held.iter().enumerate().filter(held).map(|(i, _)| i).collect();
        if slices.is_empty() {
            return false;
        }
        let id = SliceId(slices[bit as usize % slices.len()] as u32);
        let bit = bit / slices.len() as u64;
        let Ok((weights, held)) = self.parts(id) else { return false };
        match held.moments.as_mut().filter(|_| !bit.is_multiple_of(3)) {
            Some(moments) if bit % 3 == 1 && (bit / 3).is_multiple_of(2) && !moments.master.is_empty() => {
                flip(&mut moments.master, bit / 6);
            }
            Some(moments) if bit % 3 == 1 => flip(&mut moments.m, bit / 3),
            Some(moments) => flip(&mut moments.v, bit / 3),
            None => flip(weights, bit / 3),
        }
        true
    }
}

fn sum_of<E: Element>(cpu: &Cpu, vectors: &[&[E]]) -> Checksum {
    Checksum(checksum(cpu, vectors))
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
