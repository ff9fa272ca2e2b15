//! An engine whose numbers are hashes of how they came about: which weights a gradient was
//! computed on, in which shape partial sums were added, which norm a step was applied with.
//! Equal values mean an equal computation, so a wrong order or a stale input shows at once.

use super::random::mix;
use caravan_types::lanes::{Node, cover};
use caravan_types::peer::Key;
use caravan_types::task::{Done, Task};
use caravan_types::{Generation, Lane, Part, SliceId, SliceSet, SliceTable, Step, WorkerId};
use std::collections::{BTreeMap, VecDeque};

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
    pub(crate) fn run(&mut self, table: &SliceTable, lanes: u32) -> Result<Ran, String> {
        let Some(job) = self.jobs.pop_front() else { return Ok(Ran::Nothing) };
        match job {
            Job::Put(key, value) => {
                self.stored.insert(key, value);
                Ok(Ran::Nothing)
            }
            Job::Send(to, generation, key) => {
                self.get(key).map(|value| Ran::Send(to, generation, key, value))
            }
            Job::Task(task) => self.task(task, table, lanes),
        }
    }

    fn get(&self, key: Key) -> Result<u64, String> {
        let at = |held: Option<&(Step, u64)>| held.filter(|(s, _)| *s == key.step()).map(|(_, v)| *v);
        let value = match key {
            Key::Partial { .. } => self.stored.get(&key).copied(),
            Key::Weights { slice, .. } => at(self.weights.get(&slice)),
            Key::State { slice, .. } => at(self.state.get(&slice)),
        };
        value.ok_or_else(|| format!("was to send {key:?} and does not have it"))
    }

    fn task(&mut self, task: Task, table: &SliceTable, lanes: u32) -> Result<Ran, String> {
        match task {
            Task::Reset => {
                self.stored.clear();
                self.gradients.clear();
                Ok(Ran::Nothing)
            }
            Task::Compute { generation, step, lanes } => self.compute(generation, step, lanes, table),
            Task::Reduce { generation, step, slice } => {
                let value = self.add(step, slice, Node::root(lanes))?;
                self.gradients.insert(slice, (step, value));
                let blocks = table.get(slice).map_or(0, caravan_types::Slice::blocks);
                let norms = vec![(value >> 40) as f64 + 1.0; blocks];
                Ok(Ran::Done(Done::Reduced { generation, step, slice, norms }))
            }
            Task::Apply { step, norm, slices } => self.apply(step, norm, &slices),
            Task::Install(key) => {
                let value = self.stored.remove(&key).ok_or_else(|| format!("{key:?} did not come"))?;
                let part = if matches!(key, Key::State { .. }) { Part::State } else { Part::Weights };
                self.hold(part, key.slice(), key.step(), value);
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
            Task::Save { generation, step, slices } => {
                let value = |s| self.get(Key::State { step, slice: s }).map(|v| (s, v));
                let values: Result<BTreeMap<_, _>, String> = slices.iter().map(value).collect();
                Ok(Ran::Save(generation, step, values?))
            }
        }
    }

    fn compute(
        &mut self,
        generation: Generation,
        step: Step,
        lanes: std::ops::Range<Lane>,
        table: &SliceTable,
    ) -> Result<Ran, String> {
        if self.fence > generation {
            return Ok(Ran::Nothing);
        }
        let mut all = vec![step.0];
        for (slice, _) in table.iter() {
            match self.weights.get(&slice) {
                Some((at, value)) if at.next() == step => all.push(*value),
                other => return Err(format!("computes step {step} on weights {other:?} of {slice}")),
            }
        }
        let weights = hash(&all);
        for (slice, _) in table.iter() {
            for node in cover(lanes.clone()) {
                let value = tree(node, &|lane| hash(&[weights, u64::from(lane), u64::from(slice.0)]));
                self.stored.insert(Key::Partial { step, slice, node }, value);
            }
        }
        let losses = lanes.map(|lane| (lane, (hash(&[weights, u64::from(lane)]) >> 40) as f64)).collect();
        Ok(Ran::Done(Done::Computed { generation, step, losses }))
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
        Ok(Ran::Applied(step, values))
    }
}

fn tree(node: Node, leaf: &impl Fn(Lane) -> u64) -> u64 {
    match node.children() {
        None => leaf(node.index),
        Some((left, right)) => hash(&[tree(left, leaf), tree(right, leaf)]),
    }
}
