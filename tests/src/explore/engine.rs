//! A worker's engine without tensors: a value is a number that says how it came about.
//!
//! Weights, activations and gradients are hashes of what they are made from, along the same
//! dataflow as the real executor's: units in order, lanes up their tree, slices cut out of units.
//! So whatever was healed from the wrong holder, summed twice or computed on weights of another
//! step has another number than in a quiet run, and what the real one refuses is refused here.

use super::setting::Setting;
use crate::sim::random::mix;
use caravan_types::peer::{Key, LaneResult};
use caravan_types::task::{Done, SavedPart, Task};
use caravan_types::{
    Checksum, Digest, Generation, MicroId, Node, Part, SliceId, SliceSet, SliceSum, Step, Verdict,
};
use std::collections::BTreeMap;

/// What stands for a tensor.
pub(super) type Value = u64;

/// A value made from others.
fn made(kind: u64, parts: &[u64]) -> Value {
    parts.iter().fold(mix(kind), |sum, part| mix(sum.rotate_left(17) ^ mix(*part)))
}

/// What is held of one slice.
#[derive(Clone, Debug, Default)]
struct Held {
    /// Weights, and the step that they are at. Where there are moments, they are in the value.
    weights: Option<(Step, Value)>,
    moments: Option<Step>,
}

/// The engine of one worker.
#[derive(Clone, Debug, Default)]
pub(super) struct Engine {
    held: Vec<Held>,
    /// Units whose weights have a place of their own.
    units: Vec<bool>,
    stage: std::ops::Range<u32>,
    /// The step of the sums that were computed here.
    step: Option<Step>,
    /// For each node a value for each slice of the stage.
    own: Vec<(Node, Vec<Value>)>,
    /// The lane that is being added up: a value for each unit of the stage.
    open: Vec<Value>,
    /// Micro-batches that went forward: what came into each unit, and what came out.
    flights: BTreeMap<MicroId, Vec<Value>>,
    received: BTreeMap<(Step, SliceId, Node), Value>,
    finals: BTreeMap<SliceId, (Step, Value)>,
    stored: BTreeMap<Key, Value>,
    pub(super) fence: Generation,
}

/// Norms are whole numbers of so many bits, so that sums of their squares are exact.
const NORM_BITS: u32 = 20;

impl Engine {
    pub(super) fn new(setting: &Setting) -> Self {
        let held = vec![Held::default(); setting.table.len()];
        Self { held, units: vec![false; setting.shape.units() as usize], ..Self::default() }
    }

    /// Whether a task is given up.
    pub(super) fn is_fenced(&self, generation: Generation) -> bool {
        self.fence > generation
    }

    /// Does a task, like the real executor. What is applied or saved must be what a quiet run has.
    ///
    /// # Errors
    /// Where something is not here, or not what a quiet run has.
    pub(super) fn run(&mut self, setting: &Setting, task: Task) -> Result<Option<Done>, String> {
        match task {
            Task::Place { units, .. } => self.place(units),
            Task::Forward { generation, .. }
            | Task::Backward { generation, .. }
            | Task::Reduce { generation, .. }
                if self.is_fenced(generation) => {}
            Task::Forward { step, micro, .. } => self.forward(setting, step, micro)?,
            Task::Backward { generation, step, micro } => {
                return self.backward(setting, generation, step, micro);
            }
            Task::Reduce { generation, step, slice } => {
                let sum = self.total(step, slice, Node::root(setting.batch.lanes))?;
                self.received.retain(|(s, id, _), _| (*s, *id) != (step, slice));
                self.finals.insert(slice, (step, sum));
                let norms = vec![(sum >> (64 - NORM_BITS)) as f64];
                let gradient = Checksum(sum as u32);
                return Ok(Some(Done::Reduced { generation, step, slice, norms, gradient }));
            }
            Task::Verify { generation, step, slices } => {
                let sums = slices.iter().map(|id| self.sum(step, id)).collect::<Result<_, _>>()?;
                return Ok(Some(Done::Verified { generation, step, sums }));
            }
            Task::Apply { step, verdict, slices } => {
                self.apply(setting, step, verdict, &slices)?;
                let sums = slices.iter().map(|id| self.sum(step, id)).collect::<Result<_, _>>()?;
                return Ok(Some(Done::Applied { step, sums }));
            }
            Task::Diagnose { generation, .. } if self.is_fenced(generation) => {}
            Task::Diagnose { generation, step, .. } => {
                return Ok(Some(Done::Diagnosed { generation, step, finding: None }));
            }
            Task::Install(key) => self.install(key)?,
            Task::Init { slices, part } => {
                slices.iter().for_each(|id| self.set(id, part, Step(0), init(id)));
            }
            Task::Load { generation, step, slices, part } => {
                for id in slices.iter() {
                    let value = setting.truth(step, id).ok_or("a checkpoint of no step")?;
                    self.set(id, part, step, value);
                }
                return Ok(Some(Done::Loaded { generation, slices, part }));
            }
            Task::Drop(slices) => slices.iter().for_each(|id| self.drop_state(setting, id)),
            Task::Narrow { units } => self.narrow(setting, &units),
            Task::Save { generation, step, slices } => return self.save(setting, generation, step, &slices),
        }
        Ok(None)
    }

    /// Forgets what the next [`Task::Place`] forgets anyhow, but for final gradients that may be
    /// applied before it.
    pub(super) fn forget(&mut self, keep_finals: bool) {
        self.clear_own();
        self.received.clear();
        self.stored.clear();
        if !keep_finals {
            self.finals.clear();
        }
    }

    /// Stores what was received.
    pub(super) fn put(&mut self, key: Key, value: Value) {
        match key {
            Key::Partial { step, slice, node } => _ = self.received.insert((step, slice, node), value),
            _ => _ = self.stored.insert(key, value),
        }
    }

    /// What is to be sent.
    pub(super) fn get(&mut self, key: Key) -> Result<Value, String> {
        match key {
            Key::Partial { step, slice, node } => {
                self.find_own(step, slice, node).ok_or_else(|| format!("not here: {key}"))
            }
            Key::Weights { step, slice } => self.weights(step, slice),
            Key::State { step, slice } => self.state(step, slice),
            Key::Activation { .. } | Key::ActivationGradient { .. } => self.take(key),
        }
    }

    fn take(&mut self, key: Key) -> Result<Value, String> {
        self.stored.remove(&key).ok_or_else(|| format!("not here: {key}"))
    }

    fn weights(&self, step: Step, slice: SliceId) -> Result<Value, String> {
        let found = self.held[slice.0 as usize].weights;
        let here = found.filter(|(at, _)| *at == step).map(|(_, value)| value);
        here.ok_or_else(|| format!("weights of {slice} are at {found:?}, not at step {step}"))
    }

    fn state(&self, step: Step, slice: SliceId) -> Result<Value, String> {
        let found = self.held[slice.0 as usize].moments;
        if found != Some(step) {
            return Err(format!("the training state of {slice} is at {found:?}, not at step {step}"));
        }
        self.weights(step, slice)
    }

    /// What it has of a slice.
    fn sum(&self, step: Step, id: SliceId) -> Result<(SliceId, SliceSum), String> {
        let value = self.weights(step, id)?;
        let moments = self.held[id.0 as usize].moments.map(|_| Checksum((value >> 32) as u32));
        Ok((id, SliceSum { weights: Checksum(value as u32), moments }))
    }

    fn place(&mut self, stage: std::ops::Range<u32>) {
        stage.clone().for_each(|unit| self.units[unit as usize] = true);
        self.stage = stage;
        self.clear_own();
        self.received.clear();
        self.finals.clear();
        self.stored.clear();
    }

    fn clear_own(&mut self) {
        self.step = None;
        self.own.clear();
        self.open.clear();
        self.flights.clear();
    }

    fn narrow(&mut self, setting: &Setting, stage: &std::ops::Range<u32>) {
        for (id, slice) in setting.table.iter() {
            let unit = slice.unit.0 as usize;
            let held = &mut self.held[id.0 as usize];
            if self.units[unit] && !stage.contains(&slice.unit.0) && held.moments.is_none() {
                held.weights = None;
            }
        }
        let here = |(unit, here): (usize, &mut bool)| *here &= stage.contains(&(unit as u32));
        self.units.iter_mut().enumerate().for_each(here);
    }

    fn set(&mut self, id: SliceId, part: Part, step: Step, value: Value) {
        let held = &mut self.held[id.0 as usize];
        if part == Part::Weights && held.moments == Some(step) {
            return;
        }
        held.weights = Some((step, value));
        held.moments = (part == Part::State).then_some(step);
    }

    fn drop_state(&mut self, setting: &Setting, id: SliceId) {
        let unit = setting.table.get(id).map_or(0, |slice| slice.unit.0 as usize);
        let held = &mut self.held[id.0 as usize];
        held.moments = None;
        if !self.units[unit] {
            held.weights = None;
        }
    }

    fn install(&mut self, key: Key) -> Result<(), String> {
        let value = self.take(key)?;
        match key {
            Key::Weights { step, slice } => self.set(slice, Part::Weights, step, value),
            Key::State { step, slice } => self.set(slice, Part::State, step, value),
            _ => return Err(format!("nothing to install: {key}")),
        }
        Ok(())
    }

    /// The weights of a unit of the stage, at a step.
    fn unit(&self, setting: &Setting, unit: u32, step: Step) -> Result<Value, String> {
        let of_unit = setting.table.iter().filter(|(_, slice)| slice.unit.0 == unit);
        let values: Result<Vec<_>, _> = of_unit.map(|(id, _)| self.weights(step, id)).collect();
        Ok(made(1, &values?))
    }

    fn forward(&mut self, setting: &Setting, step: Step, micro: MicroId) -> Result<(), String> {
        if self.step != Some(step) {
            self.clear_own();
            self.received.retain(|(s, ..), _| *s >= step);
            self.step = Some(step);
        }
        let key = Key::Activation { step, micro };
        let mut at = match self.stage.start {
            0 => made(2, &[step.0, u64::from(micro.lane), u64::from(micro.index)]),
            _ => self.take(key)?,
        };
        let mut way = vec![at];
        for unit in self.stage.clone() {
            at = made(3, &[at, self.unit(setting, unit, Step(step.0 - 1))?]);
            way.push(at);
        }
        if self.stage.end < setting.shape.units() {
            self.stored.insert(key, at);
        }
        self.flights.insert(micro, way);
        Ok(())
    }

    fn backward(
        &mut self,
        setting: &Setting,
        generation: Generation,
        step: Step,
        micro: MicroId,
    ) -> Result<Option<Done>, String> {
        let way = self.flights.remove(&micro).ok_or_else(|| format!("{micro} did not go forward"))?;
        let key = Key::ActivationGradient { step, micro };
        let mut at = match self.stage.end == setting.shape.units() {
            true => made(4, &way[way.len() - 1..]),
            false => self.take(key)?,
        };
        self.open.resize(self.stage.len(), 0);
        for unit in self.stage.clone().rev() {
            let i = (unit - self.stage.start) as usize;
            at = made(5, &[at, way[i], self.unit(setting, unit, Step(step.0 - 1))?]);
            self.open[i] = made(6, &[self.open[i], at]);
        }
        if self.stage.start > 0 {
            self.stored.insert(key, at);
        }
        if micro.index + 1 < setting.batch.micro_batches {
            return Ok(None);
        }
        self.close(setting, micro);
        let loss = if setting.bad == Some(step) { f64::NAN } else { 1.0 };
        let result = LaneResult { lane: micro.lane, loss, tokens: 1 };
        Ok(Some(Done::Lane { generation, step, result }))
    }

    /// The open lane is whole: it is added to what is its sibling, and so on upwards.
    fn close(&mut self, setting: &Setting, micro: MicroId) {
        let open = std::mem::take(&mut self.open);
        let of_slice = |(id, slice): (SliceId, &caravan_types::Slice)| {
            let unit = slice.unit.0.checked_sub(self.stage.start).and_then(|i| open.get(i as usize));
            unit.map_or(0, |gradient| made(7, &[*gradient, u64::from(id.0)]))
        };
        let (mut node, mut sum) = (Node::leaf(micro.lane), setting.table.iter().map(of_slice).collect());
        while let Some((left, total)) = self.own.pop() {
            if !left.is_left() || left.parent() != node.parent() {
                self.own.push((left, total));
                break;
            }
            let halves: Vec<Value> = total.iter().zip(&sum).map(|(l, r): (_, &Value)| add(*l, *r)).collect();
            (node, sum) = (node.parent(), halves);
        }
        self.own.push((node, sum));
    }

    fn find_own(&self, step: Step, slice: SliceId, node: Node) -> Option<Value> {
        let (_, sums) = self.own.iter().find(|(n, _)| *n == node && self.step == Some(step))?;
        sums.get(slice.0 as usize).copied().filter(|value| *value != 0)
    }

    fn total(&self, step: Step, slice: SliceId, node: Node) -> Result<Value, String> {
        let here = self.find_own(step, slice, node);
        if let Some(sum) = here.or_else(|| self.received.get(&(step, slice, node)).copied()) {
            return Ok(sum);
        }
        let missing = || format!("no gradient of {slice} over {node} for step {step}");
        let (left, right) = node.children().ok_or_else(missing)?;
        Ok(add(self.total(step, slice, left)?, self.total(step, slice, right)?))
    }

    fn apply(
        &mut self,
        setting: &Setting,
        step: Step,
        verdict: Verdict,
        slices: &SliceSet,
    ) -> Result<(), String> {
        for id in slices.iter() {
            let gradient = self.finals.remove(&id).filter(|(at, _)| *at == step);
            let (_, gradient) = gradient.ok_or_else(|| format!("{id} is not reduced for step {step}"))?;
            let before = self.state(Step(step.0 - 1), id)?;
            let value = match verdict {
                Verdict::Update { norm } => made(8, &[before, gradient, norm.to_bits()]),
                Verdict::Skip => before,
            };
            if setting.truth(step, id).is_some_and(|truth| truth != value) {
                return Err(format!("{id} has other bits after step {step}"));
            }
            self.set(id, Part::State, step, value);
        }
        self.received.retain(|(s, ..), _| *s > step);
        Ok(())
    }

    fn save(
        &self,
        setting: &Setting,
        generation: Generation,
        step: Step,
        slices: &SliceSet,
    ) -> Result<Option<Done>, String> {
        for id in slices.iter() {
            if setting.truth(step, id) != Some(self.state(step, id)?) {
                return Err(format!("a checkpoint of step {step} would have other bits in {id}"));
            }
        }
        let slices: Vec<_> = slices.iter().map(|id| (id, Digest::default())).collect();
        let file = slices.first().map_or_else(String::new, |(id, _)| format!("from {id}"));
        let part = Ok(SavedPart { file, bytes: 1, digest: Digest::default(), slices });
        Ok(Some(Done::Saved { generation, step, part }))
    }
}

/// The sum of two halves; nothing, which is 0, where there is nothing on both sides.
fn add(left: Value, right: Value) -> Value {
    if (left, right) == (0, 0) { 0 } else { made(9, &[left, right]) }
}

/// A slice made from the seed.
fn init(id: SliceId) -> Value {
    made(10, &[u64::from(id.0)])
}

/// By step, from 0, and slice: what one worker comes to that does everything itself.
pub(super) fn truth(setting: &Setting) -> Result<Vec<Vec<Value>>, String> {
    let (mut engine, all) = (Engine::new(setting), SliceSet::all(setting.table.len()));
    let generation = Generation(1);
    engine.run(setting, Task::Place { units: 0..setting.shape.units(), recompute: false })?;
    engine.run(setting, Task::Init { slices: all.clone(), part: Part::State })?;
    let mut truth = Vec::new();
    for step in (0..=setting.steps).map(Step) {
        if step > Step(0) {
            for lane in 0..setting.batch.lanes {
                for index in 0..setting.batch.micro_batches {
                    let micro = MicroId { lane, index };
                    engine.run(setting, Task::Forward { generation, step, micro })?;
                    engine.run(setting, Task::Backward { generation, step, micro })?;
                }
            }
            let mut squares = 0.0;
            for slice in all.iter() {
                if let Some(Done::Reduced { norms, .. }) =
                    engine.run(setting, Task::Reduce { generation, step, slice })?
                {
                    squares += norms.iter().sum::<f64>();
                }
            }
            let loss = if setting.bad == Some(step) { f64::NAN } else { 1.0 };
            let verdict = Verdict::of(f64::sqrt(squares), loss);
            engine.run(setting, Task::Apply { step, verdict, slices: all.clone() })?;
        }
        truth.push(all.iter().map(|id| engine.state(step, id)).collect::<Result<_, _>>()?);
    }
    Ok(truth)
}
