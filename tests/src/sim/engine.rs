//! A worker's engine in the simulation: the real executor on a tiny model, with made-up data and
//! checkpoints in memory. One job at a time, in order, as the engine's thread does it.

use super::options::Bad;
use caravan_engine::{Batches, Checkpoints, EngineError, Executor, Flaw, Watch};
use caravan_types::peer::{Key, LaneResult};
use caravan_types::task::{Done, SavedPart, Task};
use caravan_types::{
    Digest, Generation, Lane, MicroBatch, NotFinite, RunSpec, SliceId, SliceSet, SliceTable, Step, WorkerId,
};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;
use std::sync::Arc;

/// Training states of slices, as a disk that all workers share has them: by who wrote them for
/// which generation and step, and those that are complete.
#[derive(Debug, Default)]
pub(super) struct Disk {
    pub(super) parts: BTreeMap<(Generation, Step), BTreeMap<SliceId, Vec<f32>>>,
    pub(super) complete: BTreeMap<Step, BTreeMap<SliceId, Vec<f32>>>,
    /// Checkpoints that were complete and are gone.
    pub(super) lost: BTreeSet<Step>,
}

/// Something for the engine to do.
#[derive(Debug)]
pub(super) enum Job {
    Task(Task),
    Put(Key, Vec<f32>),
    Send(WorkerId, Generation, Key),
}

/// What came of a job.
pub(super) enum Ran {
    Nothing,
    Done(Done),
    Send(WorkerId, Generation, Key, Vec<f32>),
    /// The digest of each slice's training state after the step, and what the core is told.
    Applied(Step, Vec<(SliceId, Digest)>, Done),
    /// Memory does not hold what was put there: the real one's process ends.
    Corrupt(String),
}

/// Batches that are a function of step, lane and number.
pub(super) struct Data {
    spec: RunSpec,
    /// A bug: data of a redone step differs.
    salt: u64,
}

fn mix(x: u64) -> u64 {
    super::random::mix(x.wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

impl Batches for Data {
    fn micro_batch(&mut self, step: Step, lane: Lane, index: u32) -> Result<MicroBatch, String> {
        let (sequences, length) =
            (self.spec.batch.sequences as usize, self.spec.batch.sequence_length as usize);
        let n = sequences * length;
        let seed = mix(step.0 << 40 | u64::from(lane) << 20 | u64::from(index)) ^ self.salt;
        let token = |i: usize| (mix(seed ^ i as u64) % u64::from(self.spec.model.vocab)) as u32;
        Ok(MicroBatch {
            sequences,
            length,
            tokens: (0..n).map(token).collect(),
            targets: (1..=n).map(token).collect(),
            counted: (0..n).map(|i| i % 3 != 2).collect(),
            document_start: (0..n).map(|i| (i % length / 3 * 3) as u32).collect(),
        })
    }

    fn counted_tokens(&mut self, _: Step) -> Result<u64, String> {
        let n = self.spec.batch.sequences * self.spec.batch.sequence_length;
        let counted = (0..n).filter(|i| i % 3 != 2).count() as u64;
        Ok(counted * u64::from(self.spec.batch.lanes * self.spec.batch.micro_batches))
    }
}

/// A part of a checkpoint: training states of some slices.
type Part = (Generation, Step, Vec<(SliceId, Vec<f32>)>);

/// One worker's way to the disk.
pub(super) struct Folder {
    disk: Rc<RefCell<Disk>>,
    writer: u64,
    /// A bug: what is told to be written is written when the next part is.
    late: Option<Part>,
    is_late: bool,
}

fn digest(values: &[f32]) -> Digest {
    let mut hasher = blake3::Hasher::new();
    values.iter().for_each(|v| _ = hasher.update(&v.to_le_bytes()));
    Digest(*hasher.finalize().as_bytes())
}

impl Checkpoints for Folder {
    fn save(&mut self, generation: Generation, step: Step, states: Vec<(SliceId, Vec<f32>)>) -> Option<Done> {
        let slices = states.iter().map(|(id, s)| (*id, digest(&s[..s.len() / 3]))).collect();
        let now = if self.is_late {
            self.late.replace((generation, step, states))
        } else {
            Some((generation, step, states))
        };
        if let Some((generation, step, states)) = now {
            self.disk.borrow_mut().parts.entry((generation, step)).or_default().extend(states);
        }
        let part =
            SavedPart { file: format!("w{}", self.writer), bytes: 1, digest: Digest::default(), slices };
        Some(Done::Saved { generation, step, part: Ok(part) })
    }

    fn load(&mut self, step: Step, slices: &SliceSet) -> Result<Vec<(SliceId, Vec<f32>)>, String> {
        let disk = self.disk.borrow();
        let states = disk.complete.get(&step).ok_or_else(|| format!("no checkpoint of step {step}"))?;
        Ok(slices.iter().filter_map(|id| Some((id, states.get(&id)?.clone()))).collect())
    }
}

/// The engine of one worker process.
pub(super) struct Engine {
    executor: Executor<Data, Folder>,
    pub(super) watch: Arc<Watch>,
    jobs: VecDeque<Job>,
    flaw: Option<Flaw>,
    /// Whether an update was computed wrong.
    pub(super) is_wrong: bool,
    bad: Vec<Bad>,
}

impl Engine {
    /// Has something go wrong.
    pub(super) fn fail(&mut self, flaw: Flaw) {
        self.executor.fail(flaw);
        self.flaw = Some(flaw);
    }

    /// Whether nothing is wrong that nobody has found.
    pub(super) fn is_sound(&self) -> bool {
        self.flaw.is_none() && !self.is_wrong
    }

    /// Whether a task is the one that goes wrong.
    fn struck(&mut self, task: &Task) {
        let hit = match self.flaw {
            Some(Flaw::Sum(_)) => {
                matches!(task, Task::Reduce { generation, .. } if !self.watch.is_fenced(*generation))
            }
            Some(Flaw::Update(_)) => matches!(task, Task::Apply { slices, .. } if !slices.is_empty()),
            Some(Flaw::Memory(_)) | None => false,
        };
        if hit {
            // A wrong sum is never applied; a wrong update is there until somebody finds it.
            self.is_wrong = matches!(self.flaw, Some(Flaw::Update(_)));
            self.flaw = None;
        }
    }

    /// # Errors
    /// Where the executor refuses the run.
    pub(super) fn new(
        spec: &RunSpec,
        disk: &Rc<RefCell<Disk>>,
        writer: u64,
        salt: u64,
        is_late: bool,
        bad: &[Bad],
    ) -> Result<Self, String> {
        let watch = Arc::<Watch>::default();
        let data = Data { spec: spec.clone(), salt };
        let folder = Folder { disk: Rc::clone(disk), writer, late: None, is_late };
        let executor = Executor::new(spec, 1, Arc::clone(&watch), data, folder).map_err(|e| e.to_string())?;
        Ok(Self { executor, watch, jobs: VecDeque::new(), flaw: None, is_wrong: false, bad: bad.to_vec() })
    }

    /// Makes of a marked step what data would that is not finite: the loss of its first lane, or the
    /// gradient of its first slice, whoever computes it.
    fn spoil(&self, done: Done) -> Done {
        let is_bad = |step: Step, what| self.bad.contains(&Bad { step, what });
        match done {
            Done::Lane { generation, step, result } if result.lane == 0 && is_bad(step, NotFinite::Loss) => {
                Done::Lane { generation, step, result: LaneResult { loss: f64::NAN, ..result } }
            }
            Done::Reduced { generation, step, slice: SliceId(0), gradient, .. }
                if is_bad(step, NotFinite::Gradient) =>
            {
                let norms = vec![f64::INFINITY];
                Done::Reduced { generation, step, slice: SliceId(0), norms, gradient }
            }
            done => done,
        }
    }

    pub(super) fn queue(&mut self, job: Job) {
        self.jobs.push_back(job);
    }

    pub(super) fn busy(&self) -> bool {
        !self.jobs.is_empty()
    }

    /// Does the first job.
    ///
    /// # Errors
    /// Where the real one's process would end.
    pub(super) fn run(&mut self) -> Result<Ran, String> {
        let Some(job) = self.jobs.pop_front() else { return Ok(Ran::Nothing) };
        let what = format!("{job:?}");
        match self.work(job) {
            Ok(ran) => Ok(ran),
            Err(error @ EngineError::Corrupt { .. }) => Ok(Ran::Corrupt(error.to_string())),
            Err(error) => Err(format!("{}: {error}", what.chars().take(120).collect::<String>())),
        }
    }

    fn work(&mut self, job: Job) -> Result<Ran, EngineError> {
        if let Job::Task(task) = &job {
            self.struck(task);
        }
        match job {
            Job::Put(key, payload) => self.executor.put(key, payload).map(|()| Ran::Nothing),
            // What a computation that was given up should have left is not there to be sent.
            Job::Send(_, generation, _) if self.watch.is_fenced(generation) => Ok(Ran::Nothing),
            Job::Send(to, generation, key) => {
                let payload = self.executor.get(key)?;
                Ok(Ran::Send(to, generation, key, payload))
            }
            Job::Task(Task::Apply { step, verdict, slices }) => {
                let ids: Vec<SliceId> = slices.iter().collect();
                let done = self.executor.run(Task::Apply { step, verdict, slices })?;
                let state = |slice| Ok((slice, digest(&self.executor.get(Key::State { step, slice })?)));
                let states = ids.into_iter().map(state).collect::<Result<_, EngineError>>()?;
                Ok(done.map_or(Ran::Nothing, |done| Ran::Applied(step, states, done)))
            }
            Job::Task(task) => {
                let done = self.executor.run(task)?.map(|done| self.spoil(done));
                Ok(done.map_or(Ran::Nothing, Ran::Done))
            }
        }
    }

    /// Slices in a checkpoint, against what a quiet run has.
    pub(super) fn digests(states: &BTreeMap<SliceId, Vec<f32>>) -> Vec<(SliceId, Digest)> {
        states.iter().map(|(id, state)| (*id, digest(state))).collect()
    }
}

/// The slices of a run's model.
pub(super) fn table(spec: &RunSpec) -> SliceTable {
    SliceTable::new(&spec.model)
}
