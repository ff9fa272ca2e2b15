//! Executes a worker's tasks, in the order given.
//!
//! The caller's duties: one executor has one caller; tasks come in the order in which the
//! worker's core emitted them; after an error the executor is not used again. The fence is
//! shared with the caller ([`Watch`]): once it is above a task's generation, computing for that
//! generation stops at the next layer, and nothing of it stays behind.

use crate::diagnose::Suspect;
use crate::flaw::Flaw;
use crate::gradients::Gradients;
use crate::model::Flight;
use crate::state::{State, Weight};
use crate::{EngineError, Model, Watch};
use caravan_kernels::adamw::Update;
use caravan_kernels::{Bf16, Cpu, Family, squared_norm};
use caravan_types::peer::{Key, LaneResult};
use caravan_types::progress::{Doing, Place};
use caravan_types::task::{Done, Task};
use caravan_types::{
    BLOCK, BatchShape, Generation, Initial, Lane, MicroBatch, MicroId, Part, Precision, Recipe, RunSpec,
    Slice, SliceId, SliceSet, SliceSum, Step, Verdict,
};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

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

    /// The weights of a slice at step 0, where a run does not start from its seed.
    ///
    /// # Errors
    /// Why they cannot be had.
    fn initial(&mut self, id: SliceId, slice: &Slice) -> Result<Vec<f32>, String> {
        Err(format!("nobody has said where weights such as those of {:?} are ({id})", slice.range))
    }
}

/// Model, training state and gradients of one worker, in the run's precision.
pub struct Executor<B, C>(Precise<B, C>);

/// An executor of each precision.
enum Precise<B, C> {
    Fp32(Typed<f32, B, C>),
    Mixed(Typed<Bf16, B, C>),
}

/// Calls the executor of the run's precision.
macro_rules! precise {
    ($executor:expr, $typed:ident => $call:expr) => {
        match $executor {
            Precise::Fp32($typed) => $call,
            Precise::Mixed($typed) => $call,
        }
    };
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
        watch: Arc<Watch>,
        batches: B,
        checkpoints: C,
    ) -> Result<Self, EngineError> {
        Ok(Self(match spec.numerics.precision {
            Precision::Fp32 => Precise::Fp32(Typed::new(spec, threads, watch, batches, checkpoints)?),
            Precision::Mixed => Precise::Mixed(Typed::new(spec, threads, watch, batches, checkpoints)?),
        }))
    }

    /// Executes a task. None where there is nothing to say: the task was given up because of
    /// the fence, the answer comes from elsewhere, or it is of a kind that has no answer.
    ///
    /// # Errors
    /// Where something that the task needs is not here, or data is damaged.
    pub fn run(&mut self, task: Task) -> Result<Option<Done>, EngineError> {
        precise!(&mut self.0, typed => typed.run(task))
    }

    /// Stores a received payload until a task uses it.
    ///
    /// # Errors
    /// Where the model has no such slice, the lanes no such node, or the length is wrong.
    pub fn put(&mut self, key: Key, payload: Vec<f32>) -> Result<(), EngineError> {
        precise!(&mut self.0, typed => typed.put(key, payload))
    }

    /// A payload to send: a sum of lane gradients computed here, weights, training state, or
    /// what goes to another stage, which is then gone from here.
    ///
    /// # Errors
    /// Where it is not here.
    pub fn get(&mut self, key: Key) -> Result<Vec<f32>, EngineError> {
        precise!(&mut self.0, typed => typed.get(key))
    }

    /// Has this machine's memory or one of its cores fail, once. False where there is nothing
    /// for it to fail on yet.
    pub fn fail(&mut self, flaw: Flaw) -> bool {
        precise!(&mut self.0, typed => typed.fail(flaw))
    }

    /// All weights that are computed with, as one flat vector, where all are at `step`.
    ///
    /// # Errors
    /// Where they are not.
    pub fn weights(&self, step: Step) -> Result<Vec<f32>, EngineError> {
        precise!(&self.0, typed => typed.weights(step))
    }
}

/// An executor whose weights are stored as `E`.
pub(crate) struct Typed<E: Weight, B, C> {
    pub(crate) cpu: Cpu,
    pub(crate) batch: BatchShape,
    recipe: Recipe,
    pub(crate) watch: Arc<Watch>,
    pub(crate) batches: B,
    checkpoints: C,
    init: Initial,
    pub(crate) model: Model<E>,
    pub(crate) state: State<E>,
    pub(crate) gradients: Gradients,
    /// Micro-batches on their way.
    flights: BTreeMap<MicroId, Flight<E>>,
    /// What came of the lane that goes back, so far.
    result: LaneResult,
    /// One divided by the counted tokens of the global batch.
    pub(crate) scale: f64,
    /// The first micro-batch that came out bad, where this stage cannot compute it again by itself.
    pub(crate) suspect: Option<Suspect>,
    /// Payloads to install (weights and training state), and those between stages.
    stored: BTreeMap<Key, Vec<f32>>,
    /// What is to go wrong next.
    flaw: Option<Flaw>,
}

impl<E: Weight, B: Batches, C: Checkpoints> Typed<E, B, C> {
    fn new(
        spec: &RunSpec,
        threads: usize,
        watch: Arc<Watch>,
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
        let mut model = Model::new(&spec.model)?;
        model.place(0..0, false);
        let state = State::new(&spec.model, spec.seed);
        Ok(Self {
            cpu: Cpu::new(threads, family)?,
            batch: spec.batch,
            recipe: spec.recipe.clone(),
            watch,
            batches,
            checkpoints,
            init: spec.init.clone(),
            gradients: Gradients::new(spec.batch.lanes, state.table().len()),
            model,
            state,
            flights: BTreeMap::new(),
            result: LaneResult { lane: 0, loss: 0.0, tokens: 0 },
            scale: 0.0,
            suspect: None,
            stored: BTreeMap::new(),
            flaw: None,
        })
    }

    fn run(&mut self, task: Task) -> Result<Option<Done>, EngineError> {
        match task {
            Task::Place { units, recompute } => self.place(units, recompute)?,
            Task::Forward { generation, step, micro } => self.forward(generation, step, micro)?,
            Task::Backward { generation, step, micro } => return self.backward(generation, step, micro),
            Task::Reduce { generation, step, slice } => return self.reduce(generation, step, slice),
            Task::Verify { generation, step, slices } => {
                let ids: Vec<SliceId> = slices.iter().collect();
                let (cpu, state) = (&self.cpu, &self.state);
                let sums = cpu.map(&ids, |id| Ok((*id, state.look(cpu, *id, step)?)));
                let sums = sums.into_iter().collect::<Result<_, EngineError>>()?;
                return Ok(Some(Done::Verified { generation, step, sums }));
            }
            Task::Apply { step, verdict, slices } => {
                let sums = match verdict {
                    Verdict::Update { norm } => self.apply(step, norm, &slices)?,
                    Verdict::Skip => self.skip(step, &slices)?,
                };
                return Ok(Some(Done::Applied { step, sums }));
            }
            Task::Diagnose { generation, step, lanes } => return self.diagnose(generation, step, lanes),
            Task::Install(key) => self.install(key)?,
            Task::Init { slices, part } => {
                let ids: Vec<SliceId> = slices.iter().collect();
                match self.init {
                    Initial::Seed => self.state.init(&ids, part, &self.cpu)?,
                    Initial::Weights { .. } => self.start_with(&ids, part)?,
                }
            }
            Task::Load { generation, step, slices, part } => {
                return match self.load(step, &slices, part) {
                    Ok(()) => Ok(Some(Done::Loaded { generation, slices, part })),
                    // What was set before is overwritten by the next load: nobody counts on it.
                    Err(EngineError::Checkpoint { reason, .. }) => {
                        Ok(Some(Done::LoadFailed { generation, step, reason }))
                    }
                    Err(error) => Err(error),
                };
            }
            Task::Drop(slices) => slices.iter().try_for_each(|id| self.state.drop_state(id))?,
            Task::Narrow { units } => self.state.narrow(&units),
            Task::Save { generation, step, slices } => {
                let state = |id| Ok((id, self.sound_state(id, step)?));
                let states = slices.iter().map(state).collect::<Result<Vec<_>, EngineError>>()?;
                return Ok(self.checkpoints.save(generation, step, states));
            }
        }
        Ok(None)
    }

    fn put(&mut self, key: Key, payload: Vec<f32>) -> Result<(), EngineError> {
        let expected = self.payload_len(key)?;
        if payload.len() != expected {
            return Err(EngineError::Length { key, expected, got: payload.len() });
        }
        if let Key::Partial { step, slice, node } = key {
            return self.gradients.receive(step, slice, node, payload);
        }
        self.stored.insert(key, payload);
        Ok(())
    }

    /// Values that a payload of this key must have.
    fn payload_len(&self, key: Key) -> Result<usize, EngineError> {
        let slice = |id| self.state.slice(id).map(caravan_types::Slice::len);
        match key {
            Key::Partial { slice: id, .. } | Key::Weights { slice: id, .. } => slice(id),
            Key::State { slice: id, .. } => Ok(3 * slice(id)?),
            Key::Activation { micro, .. } | Key::ActivationGradient { micro, .. } => {
                self.check_micro(micro)?;
                Ok(self.batch.tokens_per_micro_batch() as usize * self.model.layout().dim)
            }
        }
    }

    fn get(&mut self, key: Key) -> Result<Vec<f32>, EngineError> {
        match key {
            Key::Partial { step, slice, node } => {
                Ok(self.gradients.own(step, slice, self.state.slice(slice)?, node)?.to_vec())
            }
            Key::Weights { step, slice } => Ok(widened(self.state.sound_weights(&self.cpu, slice, step)?)),
            Key::State { step, slice } => self.sound_state(slice, step),
            Key::Activation { .. } | Key::ActivationGradient { .. } => self.take(key),
        }
    }

    /// Training state that leaves this machine's memory.
    fn sound_state(&self, id: SliceId, step: Step) -> Result<Vec<f32>, EngineError> {
        let state = self.state.slice_state(id, step)?;
        self.state.verify(&self.cpu, id, step)?;
        Ok(state)
    }

    fn fail(&mut self, flaw: Flaw) -> bool {
        match flaw {
            Flaw::Memory(bit) => return self.state.flip(bit),
            Flaw::Sum(_) | Flaw::Update(_) => self.flaw = Some(flaw),
        }
        true
    }

    fn take(&mut self, key: Key) -> Result<Vec<f32>, EngineError> {
        self.stored.remove(&key).ok_or(EngineError::Missing(key))
    }

    fn weights(&self, step: Step) -> Result<Vec<f32>, EngineError> {
        let slices = self.state.table().iter();
        let weights = slices.map(|(id, _)| self.state.slice_weights(id, step));
        Ok(widened(&weights.collect::<Result<Vec<_>, _>>()?.concat()))
    }

    fn place(&mut self, units: Range<u32>, recompute: bool) -> Result<(), EngineError> {
        self.state.has(&units)?;
        // What is given up goes before anything new is taken.
        self.flights.clear();
        self.stored.clear();
        self.suspect = None;
        self.model.place(units.start as usize..units.end as usize, recompute);
        self.gradients.place(self.state.elements(&units));
        self.state.place(&units);
        Ok(())
    }

    fn check_micro(&self, micro: MicroId) -> Result<(), EngineError> {
        let BatchShape { lanes, micro_batches, .. } = self.batch;
        if micro.lane < lanes && micro.index < micro_batches {
            return Ok(());
        }
        Err(EngineError::Micro { micro, lanes, micro_batches })
    }

    /// Gives up computing: nothing of it stays.
    fn abandon(&mut self) {
        self.gradients.abandon();
        self.flights.clear();
    }

    fn forward(&mut self, generation: Generation, step: Step, micro: MicroId) -> Result<(), EngineError> {
        self.check_micro(micro)?;
        let watch = &self.watch;
        if watch.is_fenced(generation) {
            return Ok(());
        }
        let stop = |unit| {
            watch.begin(Doing::Forward(Place { micro, unit }));
            watch.is_fenced(generation)
        };
        if self.gradients.start(step) {
            self.flights.clear();
            let counted = self.batches.counted_tokens(step);
            let counted = counted.map_err(|reason| EngineError::Counted { step, reason })?;
            // Nothing counts: no loss and no gradient, rather than a division by zero.
            self.scale = if counted == 0 { 0.0 } else { 1.0 / counted as f64 };
        }
        let bad = |reason| EngineError::Batch { step, micro, reason };
        let key = Key::Activation { step, micro };
        let input = match self.model.is_first() {
            true => None,
            false => Some(self.stored.remove(&key).ok_or(EngineError::Missing(key))?),
        };
        let batch = self.batches.micro_batch(step, micro.lane, micro.index).map_err(bad)?;
        let before = Step(step.0.saturating_sub(1));
        let weights = self.state.weights_at(before, self.model.units())?;
        let flight = self.model.forward(&self.cpu, &weights, batch, input.as_deref(), &stop).map_err(bad)?;
        let Some(flight) = flight else {
            self.abandon();
            return Ok(());
        };
        if !self.model.is_last() {
            self.stored.insert(key, self.model.output(&flight).to_vec());
        }
        self.flights.insert(micro, flight);
        Ok(())
    }

    fn backward(
        &mut self,
        generation: Generation,
        step: Step,
        micro: MicroId,
    ) -> Result<Option<Done>, EngineError> {
        self.check_micro(micro)?;
        let watch = &self.watch;
        if watch.is_fenced(generation) {
            return Ok(None);
        }
        let stop = |unit| {
            watch.begin(Doing::Backward(Place { micro, unit }));
            watch.is_fenced(generation)
        };
        let turn = |reason| EngineError::OutOfTurn { step, micro, reason };
        let flight = self.flights.remove(&micro).ok_or_else(|| turn("it did not go forward"))?;
        let key = Key::ActivationGradient { step, micro };
        let coming = match self.model.is_last() {
            true => None,
            false => Some(self.stored.remove(&key).ok_or(EngineError::Missing(key))?),
        };
        let bad = |reason| EngineError::Batch { step, micro, reason };
        let before = Step(step.0.saturating_sub(1));
        let weights = self.state.weights_at(before, self.model.units())?;
        let open = self.gradients.lane(&self.cpu, micro);
        let mut rest = open.ok_or_else(|| turn("its lane's micro-batches did not come in order"))?;
        let mut gradient = Vec::with_capacity(weights.len());
        for unit in &weights {
            let (unit, after) = rest.split_at_mut(unit.len());
            gradient.push(unit);
            rest = after;
        }
        let (tokens, counted) = flight.tokens();
        let part = self
            .model
            .backward(&self.cpu, &weights, &mut gradient, flight, coming.as_deref(), self.scale, &stop)
            .map_err(bad)?;
        let Some(loss) = part else {
            self.abandon();
            return Ok(None);
        };
        self.suspect(step, micro, tokens, loss, coming.as_deref());
        if !self.model.is_first() {
            self.stored.insert(key, self.model.input_gradient(tokens).to_vec());
        }
        if micro.index == 0 {
            self.result = LaneResult { lane: micro.lane, loss: 0.0, tokens: 0 };
        }
        self.result.loss += loss;
        self.result.tokens += counted;
        if micro.index + 1 < self.batch.micro_batches {
            return Ok(None);
        }
        self.gradients.close(&self.cpu);
        Ok(Some(Done::Lane { generation, step, result: self.result }))
    }

    fn reduce(
        &mut self,
        generation: Generation,
        step: Step,
        id: SliceId,
    ) -> Result<Option<Done>, EngineError> {
        if self.watch.is_fenced(generation) {
            return Ok(None);
        }
        let slice = self.state.slice(id)?;
        let flaw = self.flaw.take_if(|flaw| matches!(flaw, Flaw::Sum(_))).map(Flaw::bit);
        let Self { cpu, gradients, .. } = self;
        let (norms, gradient) = cpu.install(|| {
            let (values, gradient) = gradients.reduce(cpu, step, id, slice, flaw)?;
            Ok::<_, EngineError>((squared_norm::squared_norms(cpu, values, BLOCK as usize), gradient))
        })?;
        Ok(Some(Done::Reduced { generation, step, slice: id, norms, gradient }))
    }

    fn apply(
        &mut self,
        step: Step,
        norm: f64,
        slices: &SliceSet,
    ) -> Result<Vec<(SliceId, SliceSum)>, EngineError> {
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
        let Self { cpu, state, gradients, watch, flaw, .. } = self;
        let sums = cpu.install(|| {
            let apply = |id| {
                watch.begin(Doing::Applying);
                let gradient = gradients.sound(cpu, step, id, state.slice(id)?)?;
                let flaw = flaw.take_if(|flaw| matches!(flaw, Flaw::Update(_))).map(Flaw::bit);
                Ok((id, state.apply(cpu, id, &update, gradient, flaw)?))
            };
            slices.iter().map(apply).collect::<Result<_, EngineError>>()
        })?;
        self.gradients.applied(step, slices);
        Ok(sums)
    }

    /// Has slices as they are at a step that passes without an update.
    fn skip(&mut self, step: Step, slices: &SliceSet) -> Result<Vec<(SliceId, SliceSum)>, EngineError> {
        let mut sums = Vec::with_capacity(slices.len());
        for id in slices.iter() {
            self.watch.begin(Doing::Applying);
            sums.push((id, self.state.skip(&self.cpu, id, step)?));
        }
        self.gradients.applied(step, slices);
        Ok(sums)
    }

    fn install(&mut self, key: Key) -> Result<(), EngineError> {
        let payload = self.take(key)?;
        match key {
            Key::Weights { step, slice } => self.state.set_weights(&self.cpu, slice, step, &payload),
            Key::State { step, slice } => self.state.set_state(&self.cpu, slice, step, &payload),
            // Used by other tasks.
            Key::Partial { .. } | Key::Activation { .. } | Key::ActivationGradient { .. } => {
                Err(EngineError::Missing(key))
            }
        }
    }

    /// Takes weights that were there before the run into use.
    fn start_with(&mut self, ids: &[SliceId], part: Part) -> Result<(), EngineError> {
        for id in ids {
            let slice = self.state.slice(*id)?.clone();
            let bad = |reason| EngineError::Initial { slice: *id, reason };
            let values = self.checkpoints.initial(*id, &slice).map_err(bad)?;
            if values.len() != slice.len() {
                return Err(bad(format!("{} values instead of {}", values.len(), slice.len())));
            }
            self.state.begin(&self.cpu, *id, part, values)?;
        }
        Ok(())
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
                Part::Weights => self.state.set_weights(&self.cpu, id, step, &values[..n])?,
                Part::State => self.state.set_state(&self.cpu, id, step, &values)?,
            }
        }
        match missing.iter().next() {
            Some(id) => Err(bad(format!("slice {id} is not in it"))),
            None => Ok(()),
        }
    }
}

/// Exactly these values.
fn widened<E: Weight>(values: &[E]) -> Vec<f32> {
    values.iter().map(|x| x.widen()).collect()
}
