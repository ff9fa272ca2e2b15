//! From a file to documents.
//!
//! Documents are handed to a closure one by one: a Parquet file of any size needs the memory
//! of one row, and the three formats look the same to whoever consumes them.

use crate::error::{Action, DataError};
use crate::find::{InputFile, Kind};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use parquet::schema::types::Type;
use serde::Deserialize;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// A document's content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Body {
    /// To be tokenised.
    Text(String),
    /// Tokenised elsewhere; every token is below the vocabulary's size.
    Tokens(Vec<u32>),
}

impl Body {
    pub(crate) fn is_empty(&self) -> bool {
        match self {
            Self::Text(text) => text.is_empty(),
            Self::Tokens(tokens) => tokens.is_empty(),
        }
    }
}

/// Whether a file could be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Its documents were handed on.
    Read,
    /// It was found in a directory and is no text.
    NotText,
}

/// Receives a document: its row (0 for a whole file, else counted from 1) and its content.
pub(crate) type Each<'a> = dyn FnMut(u64, Body) -> Result<(), DataError> + 'a;

/// Hands the documents of `file` to `each`. Ready tokens must be below `vocab`.
pub(crate) fn read(file: &InputFile, vocab: u32, each: &mut Each<'_>) -> Result<Outcome, DataError> {
    match file.kind {
        Kind::Text => read_text(file, each),
        Kind::Jsonl => read_jsonl(file, vocab, each).map(|()| Outcome::Read),
        Kind::Parquet => read_parquet(file, vocab, each).map(|()| Outcome::Read),
    }
}

/// A zero byte is valid UTF-8, but what is found with one in a directory is a binary file that
/// happens to carry a text file's extension.
fn read_text(file: &InputFile, each: &mut Each<'_>) -> Result<Outcome, DataError> {
    let bytes = fs::read(&file.path).map_err(DataError::io(Action::Read, &file.path))?;
    if !file.named && bytes.contains(&0) {
        return Ok(Outcome::NotText);
    }
    match String::from_utf8(bytes) {
        Ok(text) => each(0, Body::Text(text)).map(|()| Outcome::Read),
        Err(_) if !file.named => Ok(Outcome::NotText),
        Err(e) => {
            let offset = e.utf8_error().valid_up_to() as u64;
            Err(DataError::NotUtf8 { path: file.path.clone(), offset })
        }
    }
}

#[derive(Deserialize)]
struct Record {
    text: Option<String>,
    tokens: Option<Vec<u64>>,
}

fn read_jsonl(file: &InputFile, vocab: u32, each: &mut Each<'_>) -> Result<(), DataError> {
    let io = || DataError::io(Action::Read, &file.path);
    let mut reader = BufReader::new(File::open(&file.path).map_err(io())?);
    let (mut line, mut row, mut offset) = (Vec::new(), 0, 0);
    loop {
        line.clear();
        let length = reader.read_until(b'\n', &mut line).map_err(io())?;
        if length == 0 {
            return Ok(());
        }
        row += 1;
        let text = std::str::from_utf8(&line).map_err(|e| DataError::NotUtf8 {
            path: file.path.clone(),
            offset: offset + e.valid_up_to() as u64,
        })?;
        offset += length as u64;
        if text.trim().is_empty() {
            continue;
        }
        let record: Record =
            serde_json::from_str(text.trim_end()).map_err(|e| bad(file, row, not_json(&e)))?;
        each(row, body(file, row, vocab, record)?)?;
    }
}

/// The parser counts lines too, and always says 1.
fn not_json(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let what = text.split(" at line ").next().unwrap_or(&text);
    format!("column {}: {what}", error.column())
}

fn bad(file: &InputFile, row: u64, why: String) -> DataError {
    DataError::BadRecord { path: file.path.clone(), row, why, in_directory: !file.named }
}

fn body(file: &InputFile, row: u64, vocab: u32, record: Record) -> Result<Body, DataError> {
    match (record.text, record.tokens) {
        (Some(text), None) => Ok(Body::Text(text)),
        (None, Some(tokens)) => {
            let narrow = |token: u64| match u32::try_from(token) {
                Ok(t) if t < vocab => Ok(t),
                _ => Err(DataError::TokenOutside { path: file.path.clone(), row, token, vocab }),
            };
            Ok(Body::Tokens(tokens.into_iter().map(narrow).collect::<Result<_, _>>()?))
        }
        (None, None) => Err(bad(file, row, "it has neither `text` nor `tokens`".into())),
        (Some(_), Some(_)) => Err(bad(file, row, "it has both `text` and `tokens`".into())),
    }
}

fn read_parquet(file: &InputFile, vocab: u32, each: &mut Each<'_>) -> Result<(), DataError> {
    let bad_file = |why: String| DataError::BadParquet { path: file.path.clone(), why };
    let handle = File::open(&file.path).map_err(DataError::io(Action::Read, &file.path))?;
    let reader = contained(file, || SerializedFileReader::new(handle))?;
    let schema = reader.metadata().file_metadata().schema();
    // Only the wanted column is decoded; other columns may be of any size.
    let column = ["text", "tokens"].iter().find_map(|n| schema.get_fields().iter().find(|f| f.name() == *n));
    let Some(column) = column else {
        let names: Vec<_> = schema.get_fields().iter().map(|f| f.name()).collect();
        return Err(bad_file(format!("it has no column `text` or `tokens`, only {}", names.join(", "))));
    };
    let projection = || Type::group_type_builder(schema.name()).with_fields(vec![Arc::clone(column)]).build();
    let mut records = contained(file, || reader.get_row_iter(Some(projection()?)))?;
    let mut row = 0;
    while let Some(record) = contained(file, || records.next().transpose())? {
        row += 1;
        let Some((_, field)) = record.into_columns().pop() else {
            return Err(bad(file, row, "it has no value".into()));
        };
        if field != Field::Null {
            each(row, body(file, row, vocab, record_of(file, row, field)?)?)?;
        }
    }
    Ok(())
}

/// Runs a call into the Parquet library, which reports most damage as errors and some by a
/// panic ("column start and length should not be negative"). After either, the file is not
/// looked at again.
fn contained<T>(file: &InputFile, call: impl FnOnce() -> parquet::errors::Result<T>) -> Result<T, DataError> {
    let why = match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(error)) => error.to_string(),
        Err(panic) => match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
            (Some(why), _) => (*why).to_owned(),
            (None, Some(why)) => why.clone(),
            (None, None) => "the reader gave up".to_owned(),
        },
    };
    Err(DataError::BadParquet { path: file.path.clone(), why })
}

fn record_of(file: &InputFile, row: u64, field: Field) -> Result<Record, DataError> {
    match field {
        Field::Str(text) => Ok(Record { text: Some(text), tokens: None }),
        Field::Bytes(bytes) => match String::from_utf8(bytes.data().to_vec()) {
            Ok(text) => Ok(Record { text: Some(text), tokens: None }),
            Err(e) => Err(bad(file, row, format!("the text is not UTF-8: {e}"))),
        },
        Field::ListInternal(list) => {
            let token = |field: &Field| match *field {
                Field::Byte(v) => u64::try_from(v).ok(),
                Field::Short(v) => u64::try_from(v).ok(),
                Field::Int(v) => u64::try_from(v).ok(),
                Field::Long(v) => u64::try_from(v).ok(),
                Field::UByte(v) => Some(u64::from(v)),
                Field::UShort(v) => Some(u64::from(v)),
                Field::UInt(v) => Some(u64::from(v)),
                Field::ULong(v) => Some(v),
                _ => None,
            };
            let tokens: Option<Vec<u64>> = list.elements().iter().map(token).collect();
            match tokens {
                Some(tokens) => Ok(Record { text: None, tokens: Some(tokens) }),
                None => Err(bad(file, row, "`tokens` is not a list of non-negative integers".into())),
            }
        }
        other => Err(bad(file, row, format!("it holds {other} where text or a list of integers belongs"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parquet::data_type::{ByteArray, ByteArrayType};
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;

    /// Every byte of a small file changed in turn, and every length cut off: the result is data
    /// or an error, not a panic inside the library.
    #[test]
    fn no_damage_to_a_parquet_file_brings_the_process_down() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data.parquet");
        let schema = Arc::new(parse_message_type("message m { required binary text (UTF8); }").unwrap());
        let mut writer =
            SerializedFileWriter::new(File::create(&path).unwrap(), schema, Arc::default()).unwrap();
        let mut rows = writer.next_row_group().unwrap();
        let mut column = rows.next_column().unwrap().unwrap();
        let texts = ["some text", "some other text"].map(|t| ByteArray::from(t.as_bytes().to_vec()));
        column.typed::<ByteArrayType>().write_batch(&texts, None, None).unwrap();
        column.close().unwrap();
        rows.close().unwrap();
        writer.close().unwrap();
        let whole = fs::read(&path).unwrap();
        let attempt = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            let (path, name) = (path.clone(), String::new());
            let file = InputFile { path, name, kind: Kind::Parquet, named: true, size: 1, modified_ns: 0 };
            let mut documents = 0;
            read(&file, 100, &mut |_, _| {
                documents += 1;
                Ok(())
            })
            .map(|_| documents)
        };
        assert_eq!(attempt(&whole).unwrap(), 2);
        let mut refused = 0;
        for at in 0..whole.len() {
            for flip in [0x01, 0x10, 0x80, 0xff] {
                let mut bytes = whole.clone();
                bytes[at] ^= flip;
                refused += usize::from(attempt(&bytes).is_err());
            }
            assert!(attempt(&whole[..at]).is_err(), "cut at {at}");
        }
        assert!(refused > whole.len(), "{refused} refused");
    }
}
