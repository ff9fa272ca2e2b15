//! An engine whose numbers are hashes of how they came about: which weights a gradient was
//! computed on, in which shape partial sums were added, which norm a step was applied with.
//! Equal values mean an equal computation, so a wrong order or a stale input shows at once.

use super::random::mix;
use caravan_types::lanes::Node;
use caravan_types::peer::{Key, LaneResult};
use caravan_types::task::{Done, Task};
use caravan_types::{
    BatchShape, Generation, Lane, MicroId, Part, SliceId, SliceSet, SliceTable, Step, WorkerId,
};
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

#[derive(Clone, Debug)]
pub(crate) enum Job {
    Task(Task),
    Put(Key, u64),
    Send(WorkerId, Generation, Key),
}

/// What came of a job.
pub(crate) enum Ran {
    Nothing,
    Done(Done),
    Send(WorkerId, Generation, Key, u64),
    Applied(Step, BTreeMap<SliceId, u64>),
    Save(Generation, Step, BTreeMap<SliceId, u64>),
    Load(Generation, Step, SliceSet, Part),
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Toy {
    pub(crate) fence: Generation,
    /// The generation of the fabric.
    pub(crate) generation: Generation,
    jobs: VecDeque<Job>,
    state: BTreeMap<SliceId, (Step, u64)>,
    weights: BTreeMap<SliceId, (Step, u64)>,
    stored: BTreeMap<Key, u64>,
    gradients: BTreeMap<SliceId, (Step, u64)>,
    /// The units that are computed with.
    units: Range<u32>,
    /// Micro-batches on their way: what each unit saw of it.
    flights: BTreeMap<MicroId, BTreeMap<u32, u64>>,
    /// By slice: the sum of the micro-batches of the lane that goes back.
    open: BTreeMap<SliceId, u64>,
    /// Sums of lanes, by slice, left to right.
    own: BTreeMap<SliceId, Vec<(Node, u64)>>,
    loss: f64,
}

fn hash(parts: &[u64]) -> u64 {
    parts.iter().fold(0x1234_5678, |h, p| mix(h ^ p).wrapping_add(h << 1))
}

impl Toy {
    pub(crate) fn queue(&mut self, job: Job) {
        self.jobs.push_back(job);
    }

    pub(crate) fn busy(&self) -> bool {
        !self.jobs.is_empty()
    }

    pub(crate) fn load(
        &mut self,
        step: Step,
        slices: &SliceSet,
        part: Part,
        values: &BTreeMap<SliceId, u64>,
    ) {
        for slice in slices.iter() {
            if let Some(value) = values.get(&slice) {
                self.hold(part, slice, step, *value);
            }
        }
    }

    fn hold(&mut self, part: Part, slice: SliceId, step: Step, value: u64) {
        self.weights.insert(slice, (step, value));
        if part == Part::State {
            self.state.insert(slice, (step, value));
        }
    }

    /// Runs the first job.
    pub(crate) fn run(&mut self, table: &SliceTable, batch: &BatchShape) -> Result<Ran, String> {
        let Some(job) = self.jobs.pop_front() else { return Ok(Ran::Nothing) };
        match job {
            Job::Put(key, value) => {
                self.stored.insert(key, value);
                Ok(Ran::Nothing)
            }
            // What a computation that was given up should have left is not there to be sent.
            Job::Send(_, generation, _) if self.fence > generation => Ok(Ran::Nothing),
            Job::Send(to, generation, key) => {
                self.get(key).map(|value| Ran::Send(to, generation, key, value))
            }
            Job::Task(task) => self.task(task, table, batch),
        }
    }

    fn get(&mut self, key: Key) -> Result<u64, String> {
        let at = |held: Option<&(Step, u64)>| held.filter(|(s, _)| *s == key.step()).map(|(_, v)| *v);
        let value = match key {
            Key::Partial { .. } => self.stored.get(&key).copied(),
            Key::Weights { slice, .. } => at(self.weights.get(&slice)),
            Key::State { slice, .. } => at(self.state.get(&slice)),
            Key::Activation { .. } | Key::ActivationGradient { .. } => self.stored.remove(&key),
        };
        value.ok_or_else(|| format!("was to send {key:?} and does not have it"))
    }

    fn task(&mut self, task: Task, table: &SliceTable, batch: &BatchShape) -> Result<Ran, String> {
        match task {
            Task::Place { units } => {
                self.units = units;
                self.stored.clear();
                self.gradients.clear();
                self.abandon();
                Ok(Ran::Nothing)
            }
            Task::Forward { generation, step, micro } => self.forward(generation, step, micro, table),
            Task::Backward { generation, step, micro } => {
                self.backward(generation, step, micro, table, batch.micro_batches)
            }
            Task::Reduce { generation, .. } if self.fence > generation => Ok(Ran::Nothing),
            Task::Reduce { generation, step, slice } => {
                let value = self.add(step, slice, Node::root(batch.lanes))?;
                self.gradients.insert(slice, (step, value));
                let blocks = table.get(slice).map_or(0, caravan_types::Slice::blocks);
                let norms = vec![(value >> 40) as f64 + 1.0; blocks];
                Ok(Ran::Done(Done::Reduced { generation, step, slice, norms }))
            }
            Task::Apply { step, norm, slices } => self.apply(step, norm, &slices),
            Task::Install(key) => {
                let value = self.stored.remove(&key).ok_or_else(|| format!("{key:?} did not come"))?;
                let part = if matches!(key, Key::State { .. }) { Part::State } else { Part::Weights };
                let slice = key.slice().ok_or_else(|| format!("{key} cannot be installed"))?;
                self.hold(part, slice, key.step(), value);
                Ok(Ran::Nothing)
            }
            Task::Init { slices, part } => {
                for slice in slices.iter() {
                    self.hold(part, slice, Step(0), hash(&[u64::from(slice.0)]));
                }
                Ok(Ran::Nothing)
            }
            Task::Load { generation, step, slices, part } => Ok(Ran::Load(generation, step, slices, part)),
            Task::Drop(slices) => {
                self.state.retain(|s, _| !slices.contains(*s));
                Ok(Ran::Nothing)
            }
            Task::Narrow { units } => {
                let unit = |slice: &SliceId| table.get(*slice).map_or(0, |s| s.unit.0);
                let state = &self.state;
                self.weights.retain(|s, _| units.contains(&unit(s)) || state.contains_key(s));
                Ok(Ran::Nothing)
            }
            Task::Save { generation, step, slices } => {
                let value = |s| self.get(Key::State { step, slice: s }).map(|v| (s, v));
                let values: Result<BTreeMap<_, _>, String> = slices.iter().map(value).collect();
                Ok(Ran::Save(generation, step, values?))
            }
        }
    }

    fn abandon(&mut self) {
        self.flights.clear();
        self.open.clear();
        self.own.clear();
    }

    /// What a unit's weights are after `step`: a hash of all its slices' values.
    fn unit(&self, unit: u32, step: Step, table: &SliceTable) -> Result<u64, String> {
        let mut all = vec![step.0];
        for (slice, _) in table.iter().filter(|(_, s)| s.unit.0 == unit) {
            match self.weights.get(&slice) {
                Some((at, value)) if *at == step => all.push(*value),
                other => return Err(format!("computes on weights {other:?} of {slice} after step {step}")),
            }
        }
        Ok(hash(&all))
    }

    fn forward(
        &mut self,
        generation: Generation,
        step: Step,
        micro: MicroId,
        table: &SliceTable,
    ) -> Result<Ran, String> {
        if self.fence > generation {
            return Ok(Ran::Nothing);
        }
        let key = Key::Activation { step, micro };
        let mut stream = match self.units.start {
            0 => hash(&[step.0, u64::from(micro.lane), u64::from(micro.index)]),
            _ => self.get(key)?,
        };
        let mut seen = BTreeMap::new();
        for unit in self.units.clone() {
            stream = hash(&[stream, self.unit(unit, Step(step.0 - 1), table)?]);
            seen.insert(unit, stream);
        }
        if !self.is_last(table) {
            self.stored.insert(key, stream);
        }
        self.flights.insert(micro, seen);
        Ok(Ran::Nothing)
    }

    fn is_last(&self, table: &SliceTable) -> bool {
        table.iter().last().is_some_and(|(_, s)| self.units.end == s.unit.0 + 1)
    }

    fn backward(
        &mut self,
        generation: Generation,
        step: Step,
        micro: MicroId,
        table: &SliceTable,
        micro_batches: u32,
    ) -> Result<Ran, String> {
        if self.fence > generation {
            return Ok(Ran::Nothing);
        }
        let seen = self.flights.remove(&micro).ok_or_else(|| format!("{micro} did not go forward"))?;
        let key = Key::ActivationGradient { step, micro };
        let last = seen.last_key_value().map_or(0, |(_, stream)| *stream);
        let mut stream = if self.is_last(table) { hash(&[last, 1]) } else { self.get(key)? };
        if micro.index == 0 {
            self.open.clear();
            self.loss = 0.0;
        }
        self.loss += (last >> 40) as f64;
        for unit in self.units.clone().rev() {
            stream = hash(&[stream, seen[&unit]]);
            for (slice, _) in table.iter().filter(|(_, s)| s.unit.0 == unit) {
                let sum = self.open.entry(slice).or_default();
                *sum = hash(&[*sum, stream, u64::from(slice.0)]);
            }
        }
        if self.units.start > 0 {
            self.stored.insert(key, stream);
        }
        if micro.index + 1 < micro_batches {
            return Ok(Ran::Nothing);
        }
        for (slice, sum) in std::mem::take(&mut self.open) {
            self.carry(step, slice, micro.lane, sum);
        }
        let result = LaneResult { lane: micro.lane, loss: self.loss, tokens: 1 };
        Ok(Ran::Done(Done::Lane { generation, step, result }))
    }

    /// Adds a lane's sum to those left of it, like a carry in a binary counter.
    fn carry(&mut self, step: Step, slice: SliceId, lane: Lane, sum: u64) {
        let own = self.own.entry(slice).or_default();
        let (mut node, mut sum) = (Node::leaf(lane), sum);
        while let Some((left, total)) = own.last().copied()
            && left.is_left()
            && left.parent() == node.parent()
        {
            own.pop();
            (node, sum) = (node.parent(), hash(&[total, sum]));
        }
        own.push((node, sum));
        // What is left of an earlier step is overwritten, as its keys have another step.
        self.stored.insert(Key::Partial { step, slice, node }, sum);
    }

    fn add(&self, step: Step, slice: SliceId, node: Node) -> Result<u64, String> {
        if let Some(value) = self.stored.get(&Key::Partial { step, slice, node }) {
            return Ok(*value);
        }
        let (left, right) =
            node.children().ok_or_else(|| format!("step {step}, {slice}: no sum of {node}"))?;
        Ok(hash(&[self.add(step, slice, left)?, self.add(step, slice, right)?]))
    }

    fn apply(&mut self, step: Step, norm: f64, slices: &SliceSet) -> Result<Ran, String> {
        let mut values = BTreeMap::new();
        for slice in slices.iter() {
            let gradient = self.gradients.get(&slice).filter(|(s, _)| *s == step);
            let state = self.state.get(&slice).filter(|(s, _)| s.next() == step);
            let ((_, gradient), (_, state)) = gradient
                .zip(state)
                .ok_or_else(|| format!("applies step {step} to {slice} without its gradient or state"))?;
            values.insert(slice, hash(&[*state, *gradient, norm.to_bits()]));
        }
        for (slice, value) in &values {
            self.hold(Part::State, *slice, step, *value);
        }
        self.stored.retain(|key, _| key.step() > step || !matches!(key, Key::Partial { .. }));
        self.own.clear();
        Ok(Ran::Applied(step, values))
    }
}
