//! The token stream as a row of files, and the table of its documents.

use crate::error::{Damage, DataError};
use crate::records::{Entry, Format, Reader, Writer};
use std::path::{Path, PathBuf};

/// Tokens per shard: 128 MiB at two bytes each, small enough to hash, copy or replace one by
/// itself in about a second, large enough that 2T tokens are 30,000 files.
pub(crate) const SHARD_TOKENS: u64 = 1 << 26;

/// A document's entry in the table: first token, source, row; 8 bytes each.
pub(crate) const DOCUMENT: Format = Format { magic: *b"CARAVDOC", width: 24 };

/// Two bytes a token where the vocabulary fits.
pub(crate) fn token_format(vocab: u32) -> Format {
    Format { magic: *b"CARAVTOK", width: if vocab <= 1 << 16 { 2 } else { 4 } }
}

/// Writes the stream, a new file every `limit` tokens.
pub(crate) struct ShardWriter {
    dir: PathBuf,
    format: Format,
    limit: u64,
    current: Option<Writer>,
    finished: Vec<Entry>,
    tokens: u64,
}

impl ShardWriter {
    pub(crate) fn new(dir: &Path, vocab: u32, limit: u64) -> Self {
        let format = token_format(vocab);
        Self { dir: dir.to_owned(), format, limit, current: None, finished: Vec::new(), tokens: 0 }
    }

    /// Tokens so far.
    pub(crate) fn tokens(&self) -> u64 {
        self.tokens
    }

    pub(crate) fn append(&mut self, mut tokens: &[u32]) -> Result<(), DataError> {
        while !tokens.is_empty() {
            let mut writer = match self.current.take() {
                Some(writer) => writer,
                None => {
                    let name = format!("tokens-{:05}.bin", self.finished.len());
                    Writer::create(&self.dir.join(name), self.format)?
                }
            };
            let room = usize::try_from(self.limit - writer.count()).unwrap_or(usize::MAX);
            let (now, later) = tokens.split_at(room.min(tokens.len()));
            writer.append(&self.encode(now))?;
            self.tokens += now.len() as u64;
            tokens = later;
            if writer.count() == self.limit {
                self.finished.push(writer.finish()?);
            } else {
                self.current = Some(writer);
            }
        }
        Ok(())
    }

    fn encode(&self, tokens: &[u32]) -> Vec<u8> {
        let width = self.format.width as usize;
        let mut bytes = Vec::with_capacity(tokens.len() * width);
        for token in tokens {
            // Every token is below the vocabulary, which chose the width.
            bytes.extend_from_slice(&token.to_le_bytes()[..width]);
        }
        bytes
    }

    pub(crate) fn finish(mut self) -> Result<Vec<Entry>, DataError> {
        if let Some(writer) = self.current.take() {
            self.finished.push(writer.finish()?);
        }
        Ok(self.finished)
    }
}

/// Reads the stream as if it were one array.
#[derive(Debug)]
pub(crate) struct ShardReader {
    /// With the position of its first token in the stream.
    shards: Vec<(u64, Reader)>,
    tokens: u64,
    format: Format,
    vocab: u32,
}

impl ShardReader {
    pub(crate) fn open(dir: &Path, entries: &[Entry], vocab: u32) -> Result<Self, DataError> {
        let format = token_format(vocab);
        let mut first = 0;
        let mut shards = Vec::with_capacity(entries.len());
        for entry in entries {
            shards.push((first, Reader::open(dir, entry, format)?));
            first += entry.records;
        }
        Ok(Self { shards, tokens: first, format, vocab })
    }

    /// Fills `out` with the tokens from `first` on, which must all lie in the stream.
    pub(crate) fn read(&self, mut first: u64, mut out: &mut [u32]) -> Result<(), DataError> {
        let needed = first.saturating_add(out.len() as u64);
        if needed > self.tokens {
            return Err(DataError::TooFewTokens { tokens: self.tokens, needed });
        }
        let width = self.format.width as usize;
        while !out.is_empty() {
            let at = self.shards.partition_point(|(start, _)| *start <= first).saturating_sub(1);
            let (start, shard) = &self.shards[at];
            let left = usize::try_from(start + shard.count() - first).unwrap_or(usize::MAX);
            let (now, later) = out.split_at_mut(left.min(out.len()));
            let mut bytes = vec![0; now.len() * width];
            shard.read(first - start, &mut bytes)?;
            for (token, bytes) in now.iter_mut().zip(bytes.chunks_exact(width)) {
                let mut wide = [0; 4];
                wide[..width].copy_from_slice(bytes);
                *token = u32::from_le_bytes(wide);
                if *token >= self.vocab {
                    let damage = Damage::Token { token: *token, vocab: self.vocab };
                    return Err(DataError::damaged(shard.path(), damage));
                }
            }
            first += now.len() as u64;
            out = later;
        }
        Ok(())
    }

    /// Tokens in the stream.
    pub(crate) fn tokens(&self) -> u64 {
        self.tokens
    }

    pub(crate) fn verify(&self) -> Result<(), DataError> {
        self.shards.iter().try_for_each(|(_, shard)| shard.verify())
    }
}

/// Where a document came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DocumentEntry {
    /// Position of its first token in the stream.
    pub first: u64,
    /// Index into the names of sources.
    pub source: u64,
    /// Row in that source, from 1; 0 for a whole file.
    pub row: u64,
}

impl DocumentEntry {
    pub(crate) fn to_bytes(self) -> [u8; DOCUMENT.width as usize] {
        let mut bytes = [0; DOCUMENT.width as usize];
        for (out, value) in bytes.chunks_exact_mut(8).zip([self.first, self.source, self.row]) {
            out.copy_from_slice(&value.to_le_bytes());
        }
        bytes
    }

    pub(crate) fn from_bytes(bytes: [u8; DOCUMENT.width as usize]) -> Self {
        let field = |i: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[8 * i..8 * i + 8]);
            u64::from_le_bytes(word)
        };
        Self { first: field(0), source: field(1), row: field(2) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_reads_the_same_across_shard_borders_at_both_widths() {
        for vocab in [1 << 16, (1 << 16) + 1] {
            let dir = tempfile::tempdir().unwrap();
            let tokens: Vec<u32> = (0..1000).map(|i| (i * 7919) % vocab).collect();
            let mut writer = ShardWriter::new(dir.path(), vocab, 64);
            tokens.chunks(37).for_each(|chunk| writer.append(chunk).unwrap());
            assert_eq!(writer.tokens(), 1000);
            let entries = writer.finish().unwrap();
            assert_eq!(entries.len(), 16);
            let reader = ShardReader::open(dir.path(), &entries, vocab).unwrap();
            reader.verify().unwrap();
            for (first, length) in [(0, 1000), (63, 2), (64, 64), (100, 300), (999, 1)] {
                let mut out = vec![0; length];
                reader.read(first as u64, &mut out).unwrap();
                assert_eq!(out, tokens[first..first + length]);
            }
            assert!(reader.read(999, &mut [0; 2]).is_err());
        }
    }

    #[test]
    fn a_token_beyond_the_vocabulary_is_damage_not_an_index_out_of_bounds_later() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = ShardWriter::new(dir.path(), 1000, 64);
        writer.append(&[5, 999]).unwrap();
        let entries = writer.finish().unwrap();
        let reader = ShardReader::open(dir.path(), &entries, 999).unwrap();
        let text = reader.read(0, &mut [0; 2]).unwrap_err().to_string();
        assert!(text.contains("tokens-00000.bin") && text.contains("token 999"), "{text}");
    }
}
