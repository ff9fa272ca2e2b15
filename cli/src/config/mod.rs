//! From a run file to settings that can be used.
//!
//! What the user said (a TOML file, `--set key=value`, flags) is flattened to dotted keys
//! ([`reader`]), read section by section and checked as a whole ([`sections`]), and becomes
//! [`Settings`], in which nothing is optional that a run needs and no two things contradict
//! each other. All problems of a file are reported at once ([`problem`]), each with its key,
//! what is wrong and what would be right: a run that starts has no second thoughts.

mod problem;
mod reader;
mod sections;
mod settings;
mod start;

pub use problem::ConfigError;
pub use reader::Override;
pub use sections::cores;
pub use settings::{Kernels, Settings};

use reader::Reader;
use std::fs;
use std::path::Path;

/// Reads a run file, applies the overrides, and checks the whole.
///
/// Relative paths in the file are meant from the file's folder, those of overrides from the
/// current one.
///
/// # Errors
/// Where the file cannot be read or is no TOML, and with all problems of its content.
pub fn load(file: &Path, overrides: &[Override]) -> Result<Settings, ConfigError> {
    let text = fs::read_to_string(file)
        .map_err(|source| ConfigError::Unreadable { file: file.to_owned(), source })?;
    parse(file, &text, overrides)
}

/// [`load`] for a text that is in memory already.
pub(crate) fn parse(file: &Path, text: &str, overrides: &[Override]) -> Result<Settings, ConfigError> {
    let table: toml::Table = text
        .parse()
        .map_err(|source| ConfigError::Syntax { file: file.to_owned(), source: Box::new(source) })?;
    let mut reader = Reader::new(table, overrides);
    let settings = sections::read(&mut reader, file);
    let problems = reader.finish();
    match settings {
        Some(settings) if problems.is_empty() => Ok(settings),
        _ => Err(ConfigError::Problems { file: file.to_owned(), problems }),
    }
}

#[cfg(test)]
mod tests;
