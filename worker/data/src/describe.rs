//! The batch of any step in words: what `caravan inspect` shows.

use crate::dataset::DocumentPlace;
use crate::error::DataError;
use crate::sampler::Sampler;
use caravan_types::Step;
use serde::Serialize;

/// The global batch of a step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StepBatch {
    /// The step, from 1.
    pub step: u64,
    /// Targets that count in the loss.
    pub counted_tokens: u64,
    /// In sample order: by lane, micro-batch, sequence.
    pub sequences: Vec<SequenceView>,
}

/// One sequence of a global batch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SequenceView {
    /// Lane.
    pub lane: u32,
    /// Micro-batch within the lane.
    pub micro_batch: u32,
    /// Sequence within the micro-batch.
    pub sequence: u32,
    /// How often the data was gone through before.
    pub epoch: u64,
    /// Window of the stream.
    pub window: u64,
    /// Position of the first token in the stream.
    pub position: u64,
    /// Input tokens.
    pub tokens: Vec<u32>,
    /// The token to predict at each position.
    pub targets: Vec<u32>,
    /// The loss mask: whether that prediction counts.
    pub counted: Vec<bool>,
    /// The documents that the input tokens belong to, in order; each begins where the one
    /// before it ends.
    pub documents: Vec<DocumentView>,
}

/// The part of a document that lies in a sequence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DocumentView {
    /// The file that it came from.
    pub source: String,
    /// The line or row in that file, from 1; 0 where the file is one document.
    pub row: u64,
    /// First position in the sequence.
    pub start: usize,
    /// One past the last position in the sequence.
    pub end: usize,
    /// Tokens of the document that lie before the sequence.
    pub skipped_tokens: u64,
    /// The part as text; none if the data has no tokenizer.
    pub text: Option<String>,
}

impl Sampler {
    /// Everything about the batch of `step`.
    ///
    /// # Errors
    /// If there is no such step, or the data cannot be read.
    pub fn describe(&self, step: Step) -> Result<StepBatch, DataError> {
        let shape = self.shape();
        let length = shape.sequence_length as usize;
        let mut sequences = Vec::new();
        for lane in 0..shape.lanes {
            for micro_batch in 0..shape.micro_batches {
                let batch = self.micro_batch(step, lane, micro_batch)?;
                let first = self.first_sample(step, lane, micro_batch)?;
                for sequence in 0..shape.sequences {
                    let place = self.place(step, first + u64::from(sequence))?;
                    let range = sequence as usize * length..(sequence as usize + 1) * length;
                    let tokens = batch.tokens[range.clone()].to_vec();
                    sequences.push(SequenceView {
                        lane,
                        micro_batch,
                        sequence,
                        epoch: place.epoch,
                        window: place.window,
                        position: place.position,
                        documents: self.documents_of(place.position, &tokens)?,
                        tokens,
                        targets: batch.targets[range.clone()].to_vec(),
                        counted: batch.counted[range].to_vec(),
                    });
                }
            }
        }
        Ok(StepBatch { step: step.0, counted_tokens: self.counted_tokens(step)?, sequences })
    }

    fn documents_of(&self, position: u64, tokens: &[u32]) -> Result<Vec<DocumentView>, DataError> {
        let data = self.dataset();
        let end = position + tokens.len() as u64;
        let mut views = Vec::new();
        let mut document = data.document_at(position)?;
        loop {
            views.push(self.view(&document, position, tokens));
            if document.end >= end {
                return Ok(views);
            }
            document = data.document(document.number + 1)?;
        }
    }

    fn view(&self, document: &DocumentPlace, position: u64, tokens: &[u32]) -> DocumentView {
        let within = |p: u64| (p.saturating_sub(position) as usize).min(tokens.len());
        let (start, end) = (within(document.first), within(document.end));
        let skipped_tokens = position.saturating_sub(document.first);
        let text = self.dataset().tokenizer().map(|tokenizer| {
            let mut decoder =
                if skipped_tokens == 0 { tokenizer.decoder() } else { tokenizer.decoder_within() };
            let mut text: String = tokens[start..end].iter().map(|&token| decoder.push(token)).collect();
            text.push_str(&decoder.finish());
            text
        });
        DocumentView { source: document.source.clone(), row: document.row, start, end, skipped_tokens, text }
    }
}
