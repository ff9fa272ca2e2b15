//! Training the tokenizer on a bounded sample.
//!
//! The sample is drawn by content: the data is cut into chunks, and the chunks with the
//! smallest hashes are kept, as many as fit. That is a fair draw without a random number, does
//! not depend on the order of the files, and needs the memory of the sample only.

use crate::error::DataError;
use crate::pieces::{SPACE_MARK, pieces};
use crate::progress::{Progress, Stage};
use crate::tokenizer::{SPECIALS, byte_token, llama_normalizer, piece_splitter};
use serde_json::json;
use std::collections::{BinaryHeap, HashSet};
use std::path::Path;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::{AddedToken, Tokenizer as Library, Trainer};

/// Bytes of text that a tokenizer is trained on, however much data there is: a bound on time
/// and memory. Training on this much Rust takes 3 to 4 s on 2 cores.
pub(crate) const SAMPLE_BYTES: usize = 16 << 20;

/// The sample is drawn in chunks of at most this, so that one large file does not crowd out
/// the others, or is not left out whole.
const CHUNK_BYTES: usize = 64 << 10;

/// Llama 2's max_sentencepiece_length, in characters.
const TOKEN_CHARS: usize = 16;

/// Llama 2's character_coverage: 99.995 % of all characters get a token, the rest is spelled
/// in bytes. In parts of 100,000.
const COVERAGE: u64 = 99_995;

/// The least vocabulary: specials, bytes, and the mark for a space, whose bytes stand for the
/// mark itself and cannot also stand for a space.
pub const LEAST_VOCAB: u32 = SPECIALS.len() as u32 + 256 + 1;

/// The chunks with the smallest hashes: as many as it takes to reach a number of bytes.
pub(crate) struct Sample {
    limit: usize,
    bytes: usize,
    /// Largest hash first.
    chunks: BinaryHeap<([u8; 32], String)>,
}

impl Sample {
    pub(crate) fn new(limit: usize) -> Self {
        Self { limit, bytes: 0, chunks: BinaryHeap::new() }
    }

    pub(crate) fn add(&mut self, mut text: &str) {
        while !text.is_empty() {
            let (chunk, rest) = text.split_at(text.floor_char_boundary(CHUNK_BYTES.min(text.len())));
            text = rest;
            let hash = *blake3::hash(chunk.as_bytes()).as_bytes();
            self.bytes += chunk.len();
            self.chunks.push((hash, chunk.to_owned()));
            // The largest hash goes when the others fill the sample without it, so that what is
            // left is the same in whatever order the chunks came.
            while self.chunks.peek().is_some_and(|(_, last)| self.bytes - last.len() >= self.limit) {
                self.bytes -= self.chunks.pop().map_or(0, |(_, dropped)| dropped.len());
            }
        }
    }

    fn into_texts(self) -> Vec<String> {
        self.chunks.into_sorted_vec().into_iter().map(|(_, text)| text).collect()
    }
}

/// Trains a tokenizer of at most `vocab` tokens and returns its `tokenizer.json`. The same
/// sample gives the same bytes.
///
/// # Errors
/// If `vocab` is below [`LEAST_VOCAB`], or the library fails; `path` is named then.
pub(crate) fn train(
    sample: Sample,
    vocab: u32,
    path: &Path,
    progress: &dyn Progress,
) -> Result<Vec<u8>, DataError> {
    let failed =
        |e: &dyn std::fmt::Display| DataError::Tokenizer { path: path.to_owned(), why: e.to_string() };
    if vocab < LEAST_VOCAB {
        return Err(DataError::VocabTooSmall { vocab, least: LEAST_VOCAB });
    }
    let texts = sample.into_texts();
    progress.update(Stage::Train, 0, 2);
    let alphabet = alphabet(&texts, vocab);
    let specials = SPECIALS.iter().map(|s| (*s).to_owned()).chain((0..=255).map(byte_token));
    let mut trainer = BpeTrainer::builder()
        .show_progress(false)
        .vocab_size(vocab as usize)
        .special_tokens(specials.map(|s| AddedToken::from(s, true)).collect())
        .initial_alphabet(alphabet.clone())
        .max_token_length(Some(TOKEN_CHARS))
        .build();
    // A character without a token of its own separates its neighbours, as its bytes will.
    let words = |text: &str| {
        let text = format!(" {text}");
        let words = pieces(&text).filter(|p| !p.starts_with(SPACE_MARK)).flat_map(|piece| {
            let marked = piece.replace(' ', "▁");
            let known = marked.split(|c| !alphabet.contains(&c)).filter(|w| !w.is_empty());
            known.map(str::to_owned).collect::<Vec<_>>()
        });
        Ok(words.collect())
    };
    trainer.feed(texts.iter(), words).map_err(|e| failed(&e))?;
    progress.update(Stage::Train, 1, 2);
    let mut model = BPE::default();
    trainer.train(&mut model).map_err(|e| failed(&e))?;
    model.unk_token = Some(SPECIALS[0].to_owned());
    model.fuse_unk = true;
    model.byte_fallback = true;
    let json = file(&model).map_err(|e| failed(&e))?;
    progress.update(Stage::Train, 2, 2);
    Ok(json)
}

/// The most frequent characters up to [`COVERAGE`], but at most half of the tokens that are
/// left beside specials and bytes: merges are worth more than rare characters.
fn alphabet(texts: &[String], vocab: u32) -> HashSet<char> {
    let mut counts = vec![0_u64; char::MAX as usize + 1];
    for c in texts.iter().flat_map(|t| t.chars()) {
        counts[c as usize] += 1;
    }
    counts[SPACE_MARK as usize] = 0;
    counts[' ' as usize] = 0;
    let total: u64 = counts.iter().sum();
    let mut found: Vec<(u64, char)> = (0_u32..)
        .zip(counts)
        .filter(|&(_, n)| n > 0)
        .filter_map(|(c, n)| Some((n, char::from_u32(c)?)))
        .collect();
    found.sort_by_key(|&(n, c)| (std::cmp::Reverse(n), c));
    let most = (vocab + 1 - LEAST_VOCAB) as usize / 2;
    let mut covered = 0;
    let frequent = found.into_iter().take(most).take_while(|&(n, _)| {
        let wanted = covered * 100_000 < total * COVERAGE;
        covered += n;
        wanted
    });
    frequent.map(|(_, c)| c).chain([SPACE_MARK]).collect()
}

/// A `tokenizer.json` in Llama's form, spelled by the library: its order of fields is fixed,
/// while that of a JSON value depends on a feature that any crate of the build may turn on.
fn file(model: &BPE) -> tokenizers::Result<Vec<u8>> {
    let special = |(id, content): (usize, &&str)| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let described = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": SPECIALS.iter().enumerate().map(special).collect::<Vec<_>>(),
        "normalizer": llama_normalizer(),
        "pre_tokenizer": piece_splitter(),
        "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": model,
    });
    Ok(Library::from_bytes(serde_json::to_vec(&described)?)?.to_string(false)?.into_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sample_depends_on_content_not_on_order_and_stays_within_its_bound() {
        let texts: Vec<String> = (0..200).map(|i| format!("document {i} ").repeat(i + 1)).collect();
        let mut forward = Sample::new(20_000);
        texts.iter().for_each(|t| forward.add(t));
        let mut backward = Sample::new(20_000);
        texts.iter().rev().for_each(|t| backward.add(t));
        assert!((20_000..20_000 + texts[199].len()).contains(&forward.bytes));
        assert!(forward.into_texts() == backward.into_texts());
    }

    #[test]
    fn a_document_larger_than_a_chunk_is_cut_between_characters() {
        let mut sample = Sample::new(usize::MAX);
        sample.add(&"é".repeat(CHUNK_BYTES));
        sample.add(&format!("x{}", "é".repeat(CHUNK_BYTES)));
        assert_eq!(sample.bytes, 4 * CHUNK_BYTES + 1);
        assert!(sample.into_texts().iter().all(|t| t.len() <= CHUNK_BYTES));
    }

    #[test]
    fn the_alphabet_leaves_room_for_merges_and_always_has_the_space_mark() {
        let texts = vec!["aaa bb c".to_owned()];
        assert_eq!(alphabet(&texts, LEAST_VOCAB), HashSet::from(['▁']));
        assert_eq!(alphabet(&texts, LEAST_VOCAB + 3), HashSet::from(['▁', 'a', 'b']));
        assert_eq!(alphabet(&texts, 4096), HashSet::from(['▁', 'a', 'b', 'c']));
    }
}
