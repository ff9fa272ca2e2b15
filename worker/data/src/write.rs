//! Documents into shards: tokenised in parallel, written in order.

use crate::error::DataError;
use crate::filter::{Document, documents};
use crate::find::InputFile;
use crate::index::{DOCUMENTS, Index};
use crate::progress::{Progress, Stage};
use crate::read::Body;
use crate::records::Writer;
use crate::shards::{DOCUMENT, DocumentEntry, SHARD_TOKENS, ShardWriter};
use crate::tokenizer::{Encoder, Tokenizer};
use rayon::prelude::*;
use std::path::Path;

/// Bytes of documents that are tokenised together: enough to keep all threads busy for some
/// tenths of a second, little enough to hold in memory twice.
const BATCH_BYTES: usize = 8 << 20;

/// Parts of a batch per thread, so that one with harder text does not keep the others waiting.
const PARTS_PER_THREAD: usize = 2;

/// Writes shards and the document table into `dir`. `borders` are the tokens that begin and
/// end a document. Without a tokenizer, all documents must be ready tokens.
pub(crate) fn write(
    files: &[InputFile],
    vocab: u32,
    tokenizer: Option<&Tokenizer>,
    borders: (u32, u32),
    dir: &Path,
    progress: &dyn Progress,
) -> Result<Index, DataError> {
    let mut stream = Stream {
        shards: ShardWriter::new(dir, vocab, SHARD_TOKENS),
        documents: Writer::create(&dir.join(DOCUMENTS), DOCUMENT)?,
        encoders: match tokenizer {
            Some(t) => {
                (0..rayon::current_num_threads() * PARTS_PER_THREAD).map(|_| Encoder::new(t)).collect()
            }
            None => Vec::new(),
        },
        borders,
    };
    let (mut batch, mut bytes) = (Vec::new(), 0);
    let report = documents(files, vocab, (progress, Stage::Write), &mut |document| {
        bytes += match &document.body {
            Body::Text(text) => text.len(),
            Body::Tokens(tokens) => 4 * tokens.len(),
        };
        batch.push(document);
        if bytes >= BATCH_BYTES {
            bytes = 0;
            stream.append(std::mem::take(&mut batch))?;
        }
        Ok(())
    })?;
    stream.append(batch)?;
    Ok(Index {
        vocab,
        bos: borders.0,
        eos: borders.1,
        shards: stream.shards.finish()?,
        sources: files.iter().map(|f| f.name.clone()).collect(),
        report,
        ..Index::new(stream.documents.finish()?)
    })
}

struct Stream<'t> {
    shards: ShardWriter,
    documents: Writer,
    encoders: Vec<Encoder<'t>>,
    borders: (u32, u32),
}

impl Stream<'_> {
    /// Appends the documents of `batch` in their order, whichever thread tokenised them.
    fn append(&mut self, batch: Vec<Document>) -> Result<(), DataError> {
        if self.encoders.is_empty() {
            return batch.iter().try_for_each(|document| match &document.body {
                Body::Tokens(tokens) => self.append_one(document, tokens),
                Body::Text(_) => Err(DataError::Mixed),
            });
        }
        let part = batch.len().div_ceil(self.encoders.len()).max(1);
        let encoded: Vec<Vec<Vec<u32>>> = batch
            .par_chunks(part)
            .zip(self.encoders.par_iter_mut())
            .map(|(part, encoder)| part.iter().map(|document| encode(encoder, &document.body)).collect())
            .collect::<Result<_, _>>()?;
        for (document, tokens) in batch.iter().zip(encoded.iter().flatten()) {
            self.append_one(document, tokens)?;
        }
        Ok(())
    }

    /// `<s>` … `</s>`; tokens that come with their borders keep them.
    fn append_one(&mut self, document: &Document, tokens: &[u32]) -> Result<(), DataError> {
        let entry =
            DocumentEntry { first: self.shards.tokens(), source: document.source as u64, row: document.row };
        self.documents.append(&entry.to_bytes())?;
        let (bos, eos) = self.borders;
        if tokens.first() != Some(&bos) {
            self.shards.append(&[bos])?;
        }
        self.shards.append(tokens)?;
        if tokens.last() != Some(&eos) {
            self.shards.append(&[eos])?;
        }
        Ok(())
    }
}

fn encode(encoder: &mut Encoder<'_>, body: &Body) -> Result<Vec<u32>, DataError> {
    match body {
        Body::Text(text) => {
            let mut tokens = Vec::with_capacity(text.len() / 2);
            encoder.encode(text, &mut tokens)?;
            Ok(tokens)
        }
        Body::Tokens(tokens) => Ok(tokens.clone()),
    }
}
