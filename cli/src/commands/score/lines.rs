//! From lines of JSON to tokens: everything that a person may get wrong is found here, with the
//! line that has it, so that what comes out can be scored.

use caravan_data::{DataError, Tokenizer};
use serde::Deserialize;
use std::io::{self, BufRead, Read};

/// Bytes of a line: several times what the longest context in use takes as text or tokens, and
/// a bound on the memory that a file without line ends can ask for.
const MOST_BYTES: u64 = 16 << 20;

/// What a line may have.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    text: Option<String>,
    continuation: Option<String>,
    tokens: Option<Vec<u64>>,
    from: Option<u64>,
}

/// A line that can be scored.
#[derive(Debug, PartialEq)]
pub struct Line {
    /// Its number, from 1.
    pub number: u64,
    /// One token at least, and no more than the context.
    pub tokens: Vec<u32>,
    /// Where the continuation starts: 1 at least.
    pub from: usize,
}

/// Why a line cannot be scored.
#[derive(Debug, thiserror::Error)]
#[error("{input}, line {line}: {why}")]
pub struct BadLine {
    pub input: String,
    pub line: u64,
    pub why: Why,
}

/// What is wrong with a line.
#[derive(Debug, thiserror::Error)]
pub enum Why {
    #[error("it cannot be read: {0}")]
    Unread(#[from] io::Error),
    #[error("it is longer than {} MiB: put each text on a line of its own", MOST_BYTES >> 20)]
    Endless,
    #[error("byte {0} of it is no UTF-8: convert the file to UTF-8")]
    NotUtf8(usize),
    #[error(
        "{0}. A line is {{\"text\": …, \"continuation\": …}} or {{\"tokens\": […], \"from\": …}}, the second field of each may be left out"
    )]
    NotJson(String),
    #[error("it has neither `text` nor `tokens`: give one of them")]
    Nothing,
    #[error("it has both `text` and `tokens`: give one of them")]
    Both,
    #[error("`continuation` goes with `text`: with `tokens`, say in `from` at which of them it starts")]
    ContinuationOfTokens,
    #[error(
        "`from` goes with `tokens`: with `text`, put the text that is to be summed up into `continuation`"
    )]
    FromOfText,
    #[error("its `continuation` is empty: leave it out to sum up all of `text`")]
    NoContinuation,
    #[error("its `tokens` are empty: there is nothing to score")]
    NoTokens,
    #[error("`from` is {from}, and must be from 1, since nothing predicts the first token, to {}, the last of its {tokens} tokens", tokens - 1)]
    From { from: u64, tokens: usize },
    #[error(
        "token {token} at position {position} is outside the model's vocabulary of {vocab}: was it made with another tokenizer?"
    )]
    Outside { token: u64, position: usize, vocab: u32 },
    #[error(
        "it has {tokens} tokens, and the model's context is {context}: shorten it, or cut it into several lines"
    )]
    TooLong { tokens: usize, context: u32 },
    #[error("the checkpoint has no tokenizer, since its run was trained on ready tokens: give `tokens`")]
    NoTokenizer,
    #[error(transparent)]
    Tokenizer(#[from] DataError),
    #[error(
        "the model's answer is no finite number: its weights are damaged or have diverged; use an earlier checkpoint"
    )]
    NotFinite,
}

/// The lines of an input, one by one.
pub struct Lines<'a> {
    pub input: &'a mut dyn BufRead,
    /// What errors call it.
    pub name: String,
    /// None where the checkpoint has none.
    pub tokenizer: Option<Tokenizer>,
    pub vocab: u32,
    pub context: u32,
    /// Lines read.
    pub number: u64,
}

impl Lines<'_> {
    /// The next line that is not blank; none at the end.
    pub fn next(&mut self) -> Result<Option<Line>, BadLine> {
        loop {
            let number = self.number + 1;
            let mut bytes = Vec::new();
            let read = Read::take(&mut *self.input, MOST_BYTES + 1).read_until(b'\n', &mut bytes);
            let length = read.map_err(|e| self.bad(number, e.into()))?;
            self.number = number;
            if length == 0 {
                return Ok(None);
            }
            if length as u64 > MOST_BYTES {
                return Err(self.bad(number, Why::Endless));
            }
            if !bytes.trim_ascii().is_empty() {
                return match self.parse(&bytes) {
                    Ok((tokens, from)) => Ok(Some(Line { number, tokens, from })),
                    Err(why) => Err(self.bad(number, why)),
                };
            }
        }
    }

    /// A line of this input that is bad.
    pub fn bad(&self, line: u64, why: Why) -> BadLine {
        BadLine { input: self.name.clone(), line, why }
    }

    fn parse(&self, bytes: &[u8]) -> Result<(Vec<u32>, usize), Why> {
        let text = std::str::from_utf8(bytes).map_err(|e| Why::NotUtf8(e.valid_up_to() + 1))?;
        let record: Record = serde_json::from_str(text.trim()).map_err(|e| Why::NotJson(not_json(&e)))?;
        let (tokens, from) = match record {
            Record { text: Some(_), tokens: Some(_), .. } => return Err(Why::Both),
            Record { text: Some(_), from: Some(_), .. } => return Err(Why::FromOfText),
            Record { tokens: Some(_), continuation: Some(_), .. } => return Err(Why::ContinuationOfTokens),
            Record { text: Some(text), continuation, .. } => self.of_text(&text, continuation.as_deref())?,
            Record { tokens: Some(tokens), from, .. } => self.of_tokens(&tokens, from)?,
            Record { .. } => return Err(Why::Nothing),
        };
        if tokens.len() > self.context as usize {
            return Err(Why::TooLong { tokens: tokens.len(), context: self.context });
        }
        Ok((tokens, from))
    }

    /// As training begins a document: `<s>`, then the text. What ends one in training, `</s>`,
    /// would say that the text is over, which nobody said.
    fn of_text(&self, text: &str, continuation: Option<&str>) -> Result<(Vec<u32>, usize), Why> {
        let tokenizer = self.tokenizer.as_ref().ok_or(Why::NoTokenizer)?;
        let mut tokens = vec![tokenizer.bos()];
        let from = match continuation {
            Some("") => return Err(Why::NoContinuation),
            Some(continuation) => {
                let (all, before) = tokenizer.encode_split(text, continuation)?;
                tokens.extend(all);
                1 + before
            }
            None => {
                tokens.extend(tokenizer.encode(text)?);
                1
            }
        };
        match tokens.iter().position(|token| *token >= self.vocab) {
            Some(position) => {
                Err(Why::Outside { token: tokens[position].into(), position, vocab: self.vocab })
            }
            None => Ok((tokens, from)),
        }
    }

    /// Exactly these, with nothing put before them.
    fn of_tokens(&self, given: &[u64], from: Option<u64>) -> Result<(Vec<u32>, usize), Why> {
        if given.is_empty() {
            return Err(Why::NoTokens);
        }
        let last = given.len() as u64 - 1;
        if let Some(from) = from.filter(|from| !(1..=last).contains(from)) {
            return Err(Why::From { from, tokens: given.len() });
        }
        let mut tokens = Vec::with_capacity(given.len());
        for (position, token) in given.iter().enumerate() {
            let known = u32::try_from(*token).ok().filter(|token| *token < self.vocab);
            tokens.push(known.ok_or(Why::Outside { token: *token, position, vocab: self.vocab })?);
        }
        // Not above `last`, which is a length in memory.
        Ok((tokens, from.unwrap_or(1) as usize))
    }
}

/// The parser counts lines too, and always says 1.
fn not_json(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let what = text.split(" at line ").next().unwrap_or(&text);
    format!("at column {}: {what}", error.column())
}
