//! Executes a worker's tasks, in the order given.
//!
//! The caller's duties: one executor has one caller; tasks come in the order in which the
//! worker's core emitted them; after an error the executor is not used again. The fence is
//! the one thing shared: once it is above a task's generation, computing for that generation
//! stops at the next layer, and nothing of it stays behind.

use crate::gradients::Gradients;
use crate::state::State;
use crate::{EngineError, Model};
use caravan_kernels::adamw::Update;
use caravan_kernels::{Cpu, Family, squared_norm};
use caravan_types::peer::Key;
use caravan_types::task::{Done, Task};
use caravan_types::{
    BLOCK, BatchShape, Generation, Lane, MicroBatch, Part, Recipe, RunSpec, SliceId, SliceSet, Step,
};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Where micro-batches come from. Both answers are pure functions of the run spec and data.
pub trait Batches {
    /// One micro-batch.
    ///
    /// # Errors
    /// Why it cannot be had.
    fn micro_batch(&mut self, step: Step, lane: Lane, index: u32) -> Result<MicroBatch, String>;

    /// Tokens of the whole global batch that count in the loss.
    ///
    /// # Errors
    /// Why it is not known.
    fn counted_tokens(&mut self, step: Step) -> Result<u64, String>;
}

/// Where training state is saved and loaded. A state is master weights, first moments,
/// second moments, one after the other.
pub trait Checkpoints {
    /// Writes these slices as a part of the checkpoint of `step`. Answers with
    /// [`Done::Saved`], or with none where that comes later, from elsewhere.
    fn save(&mut self, generation: Generation, step: Step, states: Vec<(SliceId, Vec<f32>)>) -> Option<Done>;

    /// The states of these slices in the checkpoint of `step`.
    ///
    /// # Errors
    /// Why they cannot be had.
    fn load(&mut self, step: Step, slices: &SliceSet) -> Result<Vec<(SliceId, Vec<f32>)>, String>;
}

/// Model, training state and gradients of one worker.
pub struct Executor<B, C> {
    cpu: Cpu,
    batch: BatchShape,
    recipe: Recipe,
    fence: Arc<AtomicU64>,
    batches: B,
    checkpoints: C,
    model: Model<f32>,
    state: State,
    gradients: Gradients,
    /// Payloads to install: weights and training state.
    stored: std::collections::BTreeMap<Key, Vec<f32>>,
}

impl<B: Batches, C: Checkpoints> Executor<B, C> {
    /// An executor that holds nothing yet.
    ///
    /// # Errors
    /// Where this machine cannot compute the run: another instruction family, a shape that
    /// contradicts itself, no threads.
    pub fn new(
        spec: &RunSpec,
        threads: usize,
        fence: Arc<AtomicU64>,
        batches: B,
        checkpoints: C,
    ) -> Result<Self, EngineError> {
        let family = Family::named(&spec.numerics.family).ok_or_else(|| {
            let available: Vec<_> = Family::available().iter().map(|f| f.name()).collect();
            EngineError::Family { wanted: spec.numerics.family.clone(), available: available.join(", ") }
        })?;
        if !spec.batch.lanes.is_power_of_two() {
            return Err(EngineError::Shape(format!("lanes {} is no power of two", spec.batch.lanes)));
        }
        let model = Model::new(&spec.model)?;
        let state = State::new(&spec.model, spec.seed, model.layout());
        Ok(Self {
            cpu: Cpu::new(threads, family)?,
            batch: spec.batch,
            recipe: spec.recipe.clone(),
            fence,
            batches,
            checkpoints,
            gradients: Gradients::new(spec.batch.lanes, state.table().len()),
            model,
            state,
            stored: std::collections::BTreeMap::new(),
        })
    }

    /// Executes a task. None where there is nothing to say: the task was given up because of
    /// the fence, the answer comes from elsewhere, or it is of a kind that has no answer.
    ///
    /// # Errors
    /// Where something that the task needs is not here, or data or a checkpoint is damaged.
    pub fn run(&mut self, task: Task) -> Result<Option<Done>, EngineError> {
        match task {
            Task::Reset => {
                self.gradients.reset();
                self.stored.clear();
            }
            Task::Compute { generation, step, lanes } => return self.compute(generation, step, lanes),
            Task::Reduce { generation, step, slice } => return self.reduce(generation, step, slice),
            Task::Apply { step, norm, slices } => self.apply(step, norm, &slices)?,
            Task::Install(key) => self.install(key)?,
            Task::Init { slices, part } => {
                let ids: Vec<SliceId> = slices.iter().collect();
                self.state.init(&ids, part, &self.cpu)?;
            }
            Task::Load { generation, step, slices, part } => {
                self.load(step, &slices, part)?;
                return Ok(Some(Done::Loaded { generation, slices, part }));
            }
            Task::Drop(slices) => slices.iter().try_for_each(|id| self.state.drop_state(id))?,
            Task::Save { generation, step, slices } => {
                let state = |id| Ok((id, self.state.slice_state(id, step)?));
                let states = slices.iter().map(state).collect::<Result<Vec<_>, EngineError>>()?;
                return Ok(self.checkpoints.save(generation, step, states));
            }
        }
        Ok(None)
    }

    /// Stores a received payload until a task uses it.
    ///
    /// # Errors
    /// Where the model has no such slice, the lanes no such node, or the length is wrong.
    pub fn put(&mut self, key: Key, payload: Vec<f32>) -> Result<(), EngineError> {
        let expected = self.state.payload_len(&key)?;
        if payload.len() != expected {
            return Err(EngineError::Length { key, expected, got: payload.len() });
        }
        if let Key::Partial { step, slice, node } = key {
            return self.gradients.receive(step, slice, node, payload);
        }
        self.stored.insert(key, payload);
        Ok(())
    }

    /// A payload to send: a sum of lane gradients computed here, weights, or training state.
    ///
    /// # Errors
    /// Where it is not here.
    pub fn get(&self, key: Key) -> Result<Vec<f32>, EngineError> {
        match key {
            Key::Partial { step, slice, node } => {
                Ok(self.gradients.own(step, slice, self.state.slice(slice)?, node)?.to_vec())
            }
            Key::Weights { step, slice } => Ok(self.state.slice_weights(slice, step)?.to_vec()),
            Key::State { step, slice } => self.state.slice_state(slice, step),
        }
    }

    /// All weights as one flat vector, where all are at `step`.
    ///
    /// # Errors
    /// Where they are not.
    pub fn weights(&self, step: Step) -> Result<&[f32], EngineError> {
        self.state.weights_at(step)
    }

    fn compute(
        &mut self,
        generation: Generation,
        step: Step,
        lanes: Range<Lane>,
    ) -> Result<Option<Done>, EngineError> {
        if lanes.is_empty() || lanes.end > self.batch.lanes {
            return Err(EngineError::Lanes(lanes.start, lanes.end, self.batch.lanes));
        }
        let counted = self.batches.counted_tokens(step);
        let counted = counted.map_err(|reason| EngineError::Counted { step, reason })?;
        // Nothing counts: no loss and no gradient, rather than a division by zero.
        let scale = if counted == 0 { 0.0 } else { 1.0 / counted as f64 };
        self.gradients.start(step);
        let mut losses = Vec::with_capacity(lanes.len());
        for lane in lanes {
            let mut gradient = self.gradients.buffer(&self.cpu, self.model.layout().parameters);
            match self.lane(generation, step, lane, scale, &mut gradient) {
                Ok(Some(loss)) => {
                    losses.push((lane, loss));
                    self.gradients.push(&self.cpu, lane, gradient);
                }
                stopped => {
                    self.gradients.give_back(gradient);
                    self.gradients.abandon();
                    return stopped.map(|_| None);
                }
            }
        }
        Ok(Some(Done::Computed { generation, step, losses }))
    }

    /// Adds up one lane's micro-batches, in order; none where the fence has passed.
    fn lane(
        &mut self,
        generation: Generation,
        step: Step,
        lane: Lane,
        scale: f64,
        gradient: &mut [f32],
    ) -> Result<Option<f64>, EngineError> {
        let fence = &self.fence;
        let stop = || fence.load(Ordering::Acquire) > generation.0;
        let before = Step(step.0.saturating_sub(1));
        let mut loss = 0.0;
        for index in 0..self.batch.micro_batches {
            if stop() {
                return Ok(None);
            }
            let bad = |reason| EngineError::Batch { step, lane, index, reason };
            let batch = self.batches.micro_batch(step, lane, index).map_err(bad)?;
            let weights = self.state.weights_at(before)?;
            let part = self.model.gradient(&self.cpu, weights, gradient, &batch, scale, &stop);
            match part.map_err(bad)? {
                Some(part) => loss += part,
                None => return Ok(None),
            }
        }
        Ok(Some(loss))
    }

    fn reduce(
        &mut self,
        generation: Generation,
        step: Step,
        id: SliceId,
    ) -> Result<Option<Done>, EngineError> {
        if self.fence.load(Ordering::Acquire) > generation.0 {
            return Ok(None);
        }
        let slice = self.state.slice(id)?;
        let gradient = self.gradients.reduce(&self.cpu, step, id, slice)?;
        let norms = squared_norm::squared_norms(&self.cpu, gradient, BLOCK as usize);
        Ok(Some(Done::Reduced { generation, step, slice: id, norms }))
    }

    fn apply(&mut self, step: Step, norm: f64, slices: &SliceSet) -> Result<(), EngineError> {
        let recipe = &self.recipe;
        let update = Update {
            step: step.0,
            learning_rate: recipe.learning_rate_at(step),
            beta1: recipe.beta1,
            beta2: recipe.beta2,
            epsilon: recipe.epsilon,
            weight_decay: recipe.weight_decay,
            scale: recipe.clip_scale(norm),
        };
        for id in slices.iter() {
            let gradient = self.gradients.last(step, id, self.state.slice(id)?)?;
            self.state.apply(&self.cpu, id, &update, gradient)?;
        }
        self.gradients.applied(step, slices);
        Ok(())
    }

    fn install(&mut self, key: Key) -> Result<(), EngineError> {
        let payload = self.stored.remove(&key).ok_or(EngineError::Missing(key))?;
        match key {
            Key::Weights { step, slice } => self.state.set_weights(slice, step, &payload),
            Key::State { step, slice } => self.state.set_state(slice, step, &payload),
            // Never stored under such a key: sums are used by Reduce.
            Key::Partial { .. } => Err(EngineError::Missing(key)),
        }
    }

    fn load(&mut self, step: Step, slices: &SliceSet, part: Part) -> Result<(), EngineError> {
        let bad = |reason: String| EngineError::Checkpoint { step, reason };
        let states = self.checkpoints.load(step, slices).map_err(bad)?;
        let mut missing = slices.clone();
        for (id, values) in states {
            let n = self.state.slice(id)?.len();
            if !missing.remove(id) {
                return Err(bad(format!("slice {id} was given twice, or was not asked for")));
            }
            if values.len() != 3 * n {
                return Err(bad(format!("slice {id} has {} values instead of {}", values.len(), 3 * n)));
            }
            match part {
                Part::Weights => self.state.set_weights(id, step, &values[..n])?,
                Part::State => self.state.set_state(id, step, &values)?,
            }
        }
        match missing.iter().next() {
            Some(id) => Err(bad(format!("slice {id} is not in it"))),
            None => Ok(()),
        }
    }
}
