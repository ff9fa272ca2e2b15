//! Which tokens belong to which step: a pure function of (data, seed, shape, step, index).
//!
//! The stream is cut into windows of `sequence_length` tokens, each read together with the one
//! token after it, the last target; so every token but the first is predicted once an epoch,
//! and a tail shorter than a window is not used. Sample n of the run (n = (step − 1) · B + i)
//! is window π(n mod W) of epoch n div W, where π is that epoch's own keyed permutation. No
//! state moves: any step can be read by anyone, in any order, again.

use crate::dataset::Dataset;
use crate::error::DataError;
use crate::permutation::Permutation;
use caravan_types::{BatchShape, MicroBatch, Step};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

/// Steps whose token count is remembered: a worker asks for the current step, and after a
/// membership change perhaps for the one before or after it.
const REMEMBERED_STEPS: usize = 4;

/// Reads batches of one run.
#[derive(Debug)]
pub struct Sampler {
    dataset: Arc<Dataset>,
    seed: u64,
    shape: BatchShape,
    windows: u64,
    /// (step, counted tokens) of the steps asked for last.
    counts: Mutex<VecDeque<(u64, u64)>>,
}

/// Where a sample lies in the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// How often the data was gone through before, from 0.
    pub epoch: u64,
    /// The window, from 0.
    pub window: u64,
    /// Position of its first token in the stream.
    pub position: u64,
}

impl Sampler {
    /// A sampler of `dataset` for a run with this seed and batch shape.
    ///
    /// # Errors
    /// If the shape has a zero in it, or the data is shorter than one sequence.
    pub fn new(dataset: Arc<Dataset>, seed: u64, shape: BatchShape) -> Result<Self, DataError> {
        if shape.tokens_per_step() == 0 {
            let BatchShape { lanes, micro_batches, sequences, sequence_length } = shape;
            return Err(DataError::EmptyBatch { lanes, micro_batches, sequences, sequence_length });
        }
        let (tokens, length) = (dataset.tokens(), u64::from(shape.sequence_length));
        let windows = tokens.saturating_sub(1) / length;
        if windows == 0 {
            return Err(DataError::TooFewTokens { tokens, needed: length + 1 });
        }
        Ok(Self { dataset, seed, shape, windows, counts: Mutex::new(VecDeque::new()) })
    }

    /// The data.
    #[must_use]
    pub fn dataset(&self) -> &Arc<Dataset> {
        &self.dataset
    }

    /// The batch shape.
    #[must_use]
    pub fn shape(&self) -> BatchShape {
        self.shape
    }

    /// Windows in an epoch.
    #[must_use]
    pub fn windows(&self) -> u64 {
        self.windows
    }

    /// Where sample `index` (0 .. sequences per step) of `step` lies.
    ///
    /// # Errors
    /// If there is no such sample.
    pub fn place(&self, step: Step, index: u64) -> Result<Place, DataError> {
        let batch = self.shape.sequences_per_step();
        let before = step.0.checked_sub(1).and_then(|s| s.checked_mul(batch));
        let sample = before.filter(|_| index < batch).and_then(|n| n.checked_add(index));
        let Some(sample) = sample else {
            return Err(DataError::NoSuchSample { step: step.0, index, samples: batch });
        };
        let epoch = sample / self.windows;
        let window = Permutation::new(self.seed, epoch, self.windows).at(sample % self.windows);
        Ok(Place { epoch, window, position: window * u64::from(self.shape.sequence_length) })
    }

    /// Micro-batch `index` of `lane` in `step`: sequence q is sample
    /// (lane · micro-batches + index) · sequences + q.
    ///
    /// # Errors
    /// If there is no such batch, or the data cannot be read.
    pub fn micro_batch(&self, step: Step, lane: u32, index: u32) -> Result<MicroBatch, DataError> {
        let (sequences, length) = (self.shape.sequences as usize, self.shape.sequence_length as usize);
        let size = sequences * length;
        let mut batch = MicroBatch {
            sequences,
            length,
            tokens: Vec::with_capacity(size),
            targets: Vec::with_capacity(size),
            counted: Vec::with_capacity(size),
            document_start: Vec::with_capacity(size),
        };
        let mut window = vec![0; length + 1];
        let first = self.first_sample(step, lane, index)?;
        for sequence in 0..u64::from(self.shape.sequences) {
            let place = self.place(step, first + sequence)?;
            self.dataset.read(place.position, &mut window)?;
            self.append(&window, &mut batch);
        }
        Ok(batch)
    }

    /// Targets of the whole global batch of `step` that count in the loss.
    ///
    /// # Errors
    /// If there is no such step, or the data cannot be read.
    pub fn counted_tokens(&self, step: Step) -> Result<u64, DataError> {
        // Every critical section leaves the queue whole, so a poisoned lock guards sound data.
        let counts = || self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&(_, count)) = counts().iter().find(|(s, _)| *s == step.0) {
            return Ok(count);
        }
        let mut targets = vec![0; self.shape.sequence_length as usize];
        let mut count = 0;
        for index in 0..self.shape.sequences_per_step() {
            let place = self.place(step, index)?;
            self.dataset.read(place.position + 1, &mut targets)?;
            count += targets.iter().filter(|&&target| self.is_counted(target)).count() as u64;
        }
        let mut counts = counts();
        counts.push_back((step.0, count));
        if counts.len() > REMEMBERED_STEPS {
            counts.pop_front();
        }
        Ok(count)
    }

    /// The number within its step of the first sample of a micro-batch.
    pub(crate) fn first_sample(&self, step: Step, lane: u32, index: u32) -> Result<u64, DataError> {
        let shape = &self.shape;
        if step.0 == 0 || lane >= shape.lanes || index >= shape.micro_batches {
            let BatchShape { lanes, micro_batches, .. } = *shape;
            return Err(DataError::NoSuchBatch {
                step: step.0,
                lane,
                micro_batch: index,
                lanes,
                micro_batches,
            });
        }
        let before = u64::from(lane) * u64::from(shape.micro_batches) + u64::from(index);
        Ok(before * u64::from(shape.sequences))
    }

    /// A target that begins a document says nothing about the one before it.
    fn is_counted(&self, target: u32) -> bool {
        target != self.dataset.bos()
    }

    fn append(&self, window: &[u32], batch: &mut MicroBatch) {
        let mut start = 0;
        for (position, pair) in (0_u32..).zip(window.windows(2)) {
            let (token, target) = (pair[0], pair[1]);
            if token == self.dataset.bos() {
                start = position;
            }
            batch.tokens.push(token);
            batch.targets.push(target);
            batch.counted.push(self.is_counted(target));
            batch.document_start.push(start);
        }
    }
}

#[cfg(test)]
mod tests;
