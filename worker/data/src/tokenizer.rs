//! Text to tokens and back, by a Llama-style `tokenizer.json`.
//!
//! The file is that of the `tokenizers` crate, which reads it, trains it and merges pieces.
//! What lies around the merging is done here, for two reasons. Speed: the crate tracks the
//! origin of every byte through every transformation, which costs four times the merging.
//! Losslessness: Llama's tokenizer turns U+2581, its mark for a space, into a space when it
//! occurs in the text itself, and `<s>` in the text into a document border; here the former
//! becomes its three bytes and the latter four ordinary characters. So
//! `decode(encode(text)) == text` for every text, and text can never forge a border.
//!
//! Two kinds of file are understood: Llama 2's own (no pre-tokenizer), and the ones trained
//! here, which name the rule of [`crate::pieces`]. Any other is refused rather than guessed at.

use crate::error::{Action, DataError};
use crate::pieces::{SPACE_MARK, pattern, pieces};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use tokenizers::models::bpe::BPE;
use tokenizers::{Model, ModelWrapper, Tokenizer as Library};

/// Special tokens in the order of their ids in a trained tokenizer: unknown, begin and end of
/// a document.
pub(crate) const SPECIALS: [&str; 3] = ["<unk>", "<s>", "</s>"];

/// Id of `<s>` in Llama's tokenizer, and where ready tokens come without a tokenizer.
pub const LLAMA_BOS: u32 = 1;
/// Id of `</s>`, likewise.
pub const LLAMA_EOS: u32 = 2;

/// The largest id that is believed: 64 times the largest vocabularies in use. A table with a
/// place for every id is made, so a file must not be able to ask for any size.
const LARGEST_ID: u32 = 1 << 24;

/// Name of the token for one byte.
pub(crate) fn byte_token(byte: u8) -> String {
    format!("<0x{byte:02X}>")
}

/// Llama's normaliser, as `tokenizer.json` spells it: a space in front, then marks for spaces.
pub(crate) fn llama_normalizer() -> Value {
    json!({"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]})
}

/// The pre-tokenizer of the tokenizers trained here.
pub(crate) fn piece_splitter() -> Value {
    json!({"type": "Split", "pattern": {"Regex": pattern()}, "behavior": "Isolated", "invert": false})
}

/// How a text is cut before merging.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cut {
    /// By [`crate::pieces`].
    Pieces,
    /// Not at all, as in Llama's own file.
    Whole,
}

/// What a token stands for in the text.
#[derive(Clone, Debug)]
enum Surface {
    Text(String),
    Byte(u8),
    /// Special tokens, and ids that the file leaves out.
    Nothing,
}

/// A Llama-style BPE tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    model: BPE,
    cut: Cut,
    surfaces: Vec<Surface>,
    bytes: [u32; 256],
    bos: u32,
    eos: u32,
    /// For errors only.
    path: PathBuf,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// If the file cannot be read or is not a Llama-style BPE tokenizer with byte fallback.
    pub fn load(path: &Path) -> Result<Self, DataError> {
        let bytes = std::fs::read(path).map_err(DataError::io(Action::Read, path))?;
        Self::from_bytes(&bytes, path)
    }

    /// Reads the content of a `tokenizer.json`; `path` is named in errors.
    ///
    /// # Errors
    /// As [`Tokenizer::load`].
    pub fn from_bytes(bytes: &[u8], path: &Path) -> Result<Self, DataError> {
        let bad = |why: String| DataError::Tokenizer { path: path.to_owned(), why };
        let library = Library::from_bytes(bytes).map_err(|e| bad(format!("not a tokenizer.json: {e}")))?;
        let cut = cut_of(&library).map_err(bad)?;
        let ModelWrapper::BPE(model) = library.get_model() else {
            return Err(bad("its model is not BPE".into()));
        };
        if !model.byte_fallback {
            return Err(bad("it has no byte fallback, so some text would be lost".into()));
        }
        let id = |token: &str| {
            library.token_to_id(token).ok_or_else(|| bad(format!("the token {token} is missing")))
        };
        let mut byte_ids = [0; 256];
        for byte in 0..=255 {
            byte_ids[usize::from(byte)] = id(&byte_token(byte))?;
        }
        id(&SPACE_MARK.to_string())?;
        let vocab = library.get_vocab(true);
        if let Some((token, id)) = vocab.iter().find(|&(_, &id)| id > LARGEST_ID) {
            return Err(bad(format!("the token {token:?} has the id {id}, ids end at {LARGEST_ID}")));
        }
        let surfaces = surfaces(&library, vocab, &byte_ids);
        let (bos, eos) = (id(SPECIALS[1])?, id(SPECIALS[2])?);
        Ok(Self { model: model.clone(), cut, surfaces, bytes: byte_ids, bos, eos, path: path.to_owned() })
    }

    /// One more than the highest id.
    #[must_use]
    pub fn vocab_size(&self) -> u32 {
        u32::try_from(self.surfaces.len()).unwrap_or(u32::MAX)
    }

    /// Begins every document.
    #[must_use]
    pub fn bos(&self) -> u32 {
        self.bos
    }

    /// Ends every document.
    #[must_use]
    pub fn eos(&self) -> u32 {
        self.eos
    }

    /// The tokens of `text`, without document borders.
    ///
    /// # Errors
    /// If the tokenizer's own tables contradict each other.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, DataError> {
        let mut out = Vec::new();
        Encoder::new(self).encode(text, &mut out)?;
        Ok(out)
    }

    /// The tokens of `text` with `continuation` behind it, as of one text, and how many of them
    /// have nothing of the continuation. A token that reaches across the border has, so that
    /// all of the continuation is in what follows: where the border fell does not change tokens.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_split(&self, text: &str, continuation: &str) -> Result<(Vec<u32>, usize), DataError> {
        let tokens = self.encode(&format!("{text}{continuation}"))?;
        // The dummy prefix is the text's, where there is one.
        let border = if text.is_empty() { 0 } else { 1 + text.len() };
        let mut end = 0;
        let before = tokens.iter().take_while(|token| {
            end += match self.surfaces.get(**token as usize) {
                Some(Surface::Text(surface)) => surface.len(),
                Some(Surface::Byte(_)) => 1,
                Some(Surface::Nothing) | None => 0,
            };
            end <= border
        });
        let before = before.count();
        Ok((tokens, before))
    }

    /// The text of `tokens`. Document borders give no text; bytes that are no UTF-8 give U+FFFD.
    #[must_use]
    pub fn decode(&self, tokens: &[u32]) -> String {
        let mut decoder = self.decoder();
        let mut text: String = tokens.iter().map(|&token| decoder.push(token)).collect();
        text.push_str(&decoder.finish());
        text
    }

    /// Decodes token by token, from the start of a text.
    #[must_use]
    pub fn decoder(&self) -> Decoder<'_> {
        Decoder { tokenizer: self, pending: Vec::new(), at_start: true }
    }

    /// Decodes token by token, from the middle of a text: after a prompt, say.
    #[must_use]
    pub fn decoder_within(&self) -> Decoder<'_> {
        Decoder { at_start: false, ..self.decoder() }
    }

    fn merge(&self, piece: &str, out: &mut Vec<u32>) -> Result<(), DataError> {
        let marked = piece.replace(' ', "▁");
        let tokens = self
            .model
            .tokenize(&marked)
            .map_err(|e| DataError::Tokenizer { path: self.path.clone(), why: e.to_string() })?;
        out.extend(tokens.into_iter().map(|t| t.id));
        Ok(())
    }
}

fn cut_of(library: &Library) -> Result<Cut, String> {
    let value = |v: serde_json::Result<Value>| v.map_err(|e| e.to_string());
    let normalizer = value(serde_json::to_value(library.get_normalizer()))?;
    let splitter = value(serde_json::to_value(library.get_pre_tokenizer()))?;
    let metaspace = splitter["type"] == "Metaspace"
        && splitter["replacement"] == "▁"
        && splitter["prepend_scheme"] != "never"
        && splitter["split"] == false;
    if normalizer == llama_normalizer() && splitter == piece_splitter() {
        Ok(Cut::Pieces)
    } else if normalizer == llama_normalizer() && splitter.is_null() || normalizer.is_null() && metaspace {
        Ok(Cut::Whole)
    } else {
        Err("it prepares text otherwise than Llama 2's tokenizer (a space in front, ▁ for spaces)".into())
    }
}

fn surfaces(library: &Library, vocab: HashMap<String, u32>, bytes: &[u32; 256]) -> Vec<Surface> {
    let size = vocab.values().max().map_or(0, |&max| max as usize + 1);
    let mut surfaces = vec![Surface::Nothing; size];
    for (text, id) in vocab {
        surfaces[id as usize] = Surface::Text(text.replace(SPACE_MARK, " "));
    }
    for (byte, &id) in (0..=255).zip(bytes) {
        surfaces[id as usize] = Surface::Byte(byte);
    }
    for (id, token) in library.get_added_tokens_decoder() {
        if token.special {
            surfaces[id as usize] = Surface::Nothing;
        }
    }
    surfaces
}

/// Pieces that an [`Encoder`] remembers: about 100 bytes each, so 3 MB, and there are two
/// encoders a thread. Pieces are remembered as they come, and the frequent ones come first.
const REMEMBERED_PIECES: usize = 1 << 15;

/// Longer pieces hardly come twice.
const REMEMBERED_BYTES: usize = 32;

/// Encodes many texts, remembering the tokens of frequent pieces. What it remembers changes
/// its speed, never its result.
pub(crate) struct Encoder<'t> {
    tokenizer: &'t Tokenizer,
    /// Range in `arena` of a piece's tokens.
    known: HashMap<Box<str>, (usize, usize)>,
    arena: Vec<u32>,
}

impl<'t> Encoder<'t> {
    pub(crate) fn new(tokenizer: &'t Tokenizer) -> Self {
        Self { tokenizer, known: HashMap::new(), arena: Vec::new() }
    }

    /// Appends the tokens of `text` to `out`.
    pub(crate) fn encode(&mut self, text: &str, out: &mut Vec<u32>) -> Result<(), DataError> {
        if text.is_empty() {
            return Ok(());
        }
        // Llama's dummy prefix: the first word of a text has the token of a later one.
        let text = format!(" {text}");
        match self.tokenizer.cut {
            Cut::Pieces => pieces(&text).try_for_each(|piece| self.piece(piece, out)),
            Cut::Whole => text.split_inclusive(SPACE_MARK).try_for_each(|part| {
                let plain = part.strip_suffix(SPACE_MARK);
                self.tokenizer.merge(plain.unwrap_or(part), out)?;
                plain.map_or(Ok(()), |_| self.piece("▁", out))
            }),
        }
    }

    fn piece(&mut self, piece: &str, out: &mut Vec<u32>) -> Result<(), DataError> {
        if piece.starts_with(SPACE_MARK) {
            out.extend(piece.bytes().map(|b| self.tokenizer.bytes[usize::from(b)]));
            return Ok(());
        }
        if let Some(&(start, end)) = self.known.get(piece) {
            out.extend_from_slice(&self.arena[start..end]);
            return Ok(());
        }
        let before = out.len();
        self.tokenizer.merge(piece, out)?;
        if piece.len() <= REMEMBERED_BYTES && self.known.len() < REMEMBERED_PIECES {
            let start = self.arena.len();
            self.arena.extend_from_slice(&out[before..]);
            self.known.insert(piece.into(), (start, self.arena.len()));
        }
        Ok(())
    }
}

/// Turns tokens into text as they come. A character whose bytes are spread over several tokens
/// appears when its last byte is there.
#[derive(Debug)]
pub struct Decoder<'t> {
    tokenizer: &'t Tokenizer,
    /// Bytes of an unfinished character: at most 3 between calls.
    pending: Vec<u8>,
    /// The next text begins with the dummy prefix.
    at_start: bool,
}

impl Decoder<'_> {
    /// The text that `token` completes. A token outside the vocabulary gives none.
    pub fn push(&mut self, token: u32) -> String {
        let surface = self.tokenizer.surfaces.get(token as usize);
        match surface {
            Some(Surface::Text(text)) => {
                let text = if self.at_start { text.strip_prefix(' ').unwrap_or(text) } else { text };
                self.pending.extend_from_slice(text.as_bytes());
            }
            Some(Surface::Byte(byte)) => self.pending.push(*byte),
            Some(Surface::Nothing) | None => {
                let rest = self.finish();
                self.at_start |= token == self.tokenizer.bos;
                return rest;
            }
        }
        self.at_start = false;
        self.complete()
    }

    /// What is left at the end: U+FFFD for an unfinished character.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned()
    }

    fn complete(&mut self) -> String {
        let mut out = String::new();
        loop {
            match std::str::from_utf8(&self.pending) {
                Ok(text) => {
                    out.push_str(text);
                    self.pending.clear();
                    return out;
                }
                Err(e) => {
                    let valid = e.valid_up_to();
                    out.push_str(&String::from_utf8_lossy(&self.pending[..valid]));
                    let bad = e.error_len();
                    self.pending.drain(..valid + bad.unwrap_or(0));
                    if bad.is_none() {
                        return out;
                    }
                    out.push(char::REPLACEMENT_CHARACTER);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
