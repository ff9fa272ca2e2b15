//! A run file as flat, dotted keys that are taken one by one.
//!
//! Reading by hand instead of into a struct has one reason: a derived reader stops at the
//! first value that does not fit, and this one goes on and reports all of them. A key is
//! known by being asked for, so what nobody asked for is unknown, and there is no second
//! list of keys to keep in step.

use super::problem::{Fault, Problem};
use std::collections::BTreeMap;
use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;
use toml::{Table, Value};

/// A value that is given beside the run file, and wins over it.
#[derive(Clone, Debug)]
pub struct Override {
    /// The option that gave it, as errors name it: `--set`, `--workers`.
    pub option: &'static str,
    /// The dotted key.
    pub key: String,
    /// The value.
    pub value: Value,
}

impl Override {
    /// An override by an option of its own.
    pub fn new(option: &'static str, key: &str, value: impl Into<Value>) -> Self {
        Self { option, key: key.to_owned(), value: value.into() }
    }

    /// Reads `key=value` as `--set` takes it. The value is TOML; what is no TOML is a text,
    /// so that `model.preset=15m` needs no quotes.
    #[must_use]
    pub fn set(text: &str) -> Self {
        // Without '=' the key stays empty, which the reader reports with the others.
        let (key, value) = text.split_once('=').map_or(("", text), |(k, v)| (k.trim(), v.trim()));
        let parsed = format!("v = {value}").parse::<Table>().ok().filter(|t| t.len() == 1);
        let parsed = parsed.and_then(|mut t| t.remove("v"));
        Self { option: "--set", key: key.to_owned(), value: parsed.unwrap_or_else(|| value.into()) }
    }
}

struct Entry {
    value: Value,
    option: Option<&'static str>,
    taken: bool,
}

/// The values of a run, and the problems found while taking them.
pub struct Reader {
    entries: BTreeMap<String, Entry>,
    known: Vec<&'static str>,
    problems: Vec<Problem>,
}

impl Reader {
    pub fn new(table: Table, overrides: &[Override]) -> Self {
        let mut reader = Self { entries: BTreeMap::new(), known: Vec::new(), problems: Vec::new() };
        reader.flatten("", Value::Table(table), None);
        for o in overrides {
            if o.key.is_empty() || o.key.split('.').any(str::is_empty) {
                let key = if o.key.is_empty() { format!("{} {}", o.option, o.value) } else { o.key.clone() };
                reader.problems.push(Problem {
                    key,
                    value: None,
                    option: None,
                    fault: Fault::NotAnAssignment,
                });
            } else {
                reader.flatten(&o.key, o.value.clone(), Some(o.option));
            }
        }
        reader
    }

    fn flatten(&mut self, key: &str, value: Value, option: Option<&'static str>) {
        match value {
            Value::Table(table) => {
                for (name, value) in table {
                    // A quoted key with dots in it would pass for a path.
                    let name = if name.contains('.') { format!("{name:?}") } else { name };
                    let key = if key.is_empty() { name } else { format!("{key}.{name}") };
                    self.flatten(&key, value, option);
                }
            }
            value => _ = self.entries.insert(key.to_owned(), Entry { value, option, taken: false }),
        }
    }

    /// Whether the key has a value, of whatever kind.
    pub fn has(&self, key: &str) -> bool {
        self.entries.contains_key(key)
    }

    /// Notes a problem with a key.
    pub fn fault(&mut self, key: &str, fault: Fault) {
        let entry = self.entries.get(key);
        self.problems.push(Problem {
            key: key.to_owned(),
            value: entry.map(|e| e.value.to_string()),
            option: entry.and_then(|e| e.option).map(str::to_owned),
            fault,
        });
    }

    /// Takes a key that must be there. None where it is not or does not fit; the problem is
    /// noted then.
    pub fn require<T>(
        &mut self,
        key: &'static str,
        example: &'static str,
        take: impl FnOnce(&mut Self, &'static str) -> Option<T>,
    ) -> Option<T> {
        let taken = take(self, key);
        if !self.has(key) {
            self.fault(key, Fault::Missing { example });
        }
        taken
    }

    fn take<T>(
        &mut self,
        key: &'static str,
        expected: &'static str,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Option<T> {
        self.known.push(key);
        let entry = self.entries.get_mut(key)?;
        entry.taken = true;
        let read = read(&entry.value);
        if read.is_none() {
            self.fault(key, Fault::Kind { expected });
        }
        read
    }

    fn within<T: PartialOrd + Display>(
        &mut self,
        key: &str,
        value: T,
        range: &RangeInclusive<T>,
    ) -> Option<T> {
        if range.contains(&value) {
            return Some(value);
        }
        let (low, high) = (range.start().to_string(), range.end().to_string());
        self.fault(key, Fault::Range { low, high });
        None
    }

    /// A whole number within a range.
    pub fn integer(&mut self, key: &'static str, range: RangeInclusive<u64>) -> Option<u64> {
        let value = self.take(key, "a whole number", Value::as_integer)?;
        let Ok(value) = u64::try_from(value) else {
            let (low, high) = (range.start().to_string(), range.end().to_string());
            self.fault(key, Fault::Range { low, high });
            return None;
        };
        self.within(key, value, &range)
    }

    /// A whole number of 32 bits within a range.
    pub fn integer32(&mut self, key: &'static str, range: RangeInclusive<u32>) -> Option<u32> {
        let wide = u64::from(*range.start())..=u64::from(*range.end());
        self.integer(key, wide).and_then(|v| u32::try_from(v).ok())
    }

    /// A number within a range.
    pub fn number(&mut self, key: &'static str, range: RangeInclusive<f64>) -> Option<f64> {
        let number = |v: &Value| v.as_float().or_else(|| v.as_integer().map(|i| i as f64));
        let value = self.take(key, "a number", number)?;
        self.within(key, value, &range)
    }

    /// Yes or no.
    pub fn boolean(&mut self, key: &'static str) -> Option<bool> {
        self.take(key, "true or false", Value::as_bool)
    }

    /// A text.
    pub fn text(&mut self, key: &'static str) -> Option<String> {
        self.parsed(key, "a text in quotes", |t| Some(t.to_owned()))
    }

    /// A text in a form that `parse` understands.
    pub fn parsed<T>(
        &mut self,
        key: &'static str,
        expected: &'static str,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Option<T> {
        self.take(key, expected, |v| parse(v.as_str()?))
    }

    /// A text that is one of a few.
    pub fn choice<T>(
        &mut self,
        key: &'static str,
        choices: &str,
        pick: impl FnOnce(&str) -> Option<T>,
    ) -> Option<T> {
        let text = self.text(key)?;
        let picked = pick(&text);
        if picked.is_none() {
            self.fault(key, Fault::Choice { choices: choices.to_owned() });
        }
        picked
    }

    /// A list of texts; a single text is a list of one.
    pub fn texts(&mut self, key: &'static str) -> Option<Vec<String>> {
        self.take(key, "a list of texts, such as [\"a\", \"b\"]", |v| match v {
            Value::String(one) => Some(vec![one.clone()]),
            Value::Array(many) => many.iter().map(|v| v.as_str().map(str::to_owned)).collect(),
            _ => None,
        })
    }

    /// A time with its unit, such as `"3s"`, within a range.
    pub fn duration(&mut self, key: &'static str, range: RangeInclusive<Duration>) -> Option<Duration> {
        let value =
            self.parsed(key, "a time with its unit, such as \"3s\", \"500ms\" or \"1m\"", duration)?;
        if range.contains(&value) {
            return Some(value);
        }
        let (low, high) = (format!("{:?}", range.start()), format!("{:?}", range.end()));
        self.fault(key, Fault::Range { low, high });
        None
    }

    /// What relative paths in a key are meant from: the folder of the run file, or the current
    /// one where an option gave them.
    pub fn base(&self, key: &str, file: &Path) -> PathBuf {
        match self.entries.get(key) {
            Some(Entry { option: Some(_), .. }) => PathBuf::new(),
            _ => file.parent().map(Path::to_owned).unwrap_or_default(),
        }
    }

    /// All problems, those of keys that nobody asked for included.
    pub fn finish(mut self) -> Vec<Problem> {
        let unknown: Vec<String> =
            self.entries.iter().filter(|(_, e)| !e.taken).map(|(k, _)| k.clone()).collect();
        for key in unknown {
            let inside = format!("{key}.");
            let keys: Vec<_> = self.known.iter().filter_map(|k| k.strip_prefix(inside.as_str())).collect();
            let fault = match keys.as_slice() {
                [] => Fault::Unknown { near: nearest(&self.known, &key) },
                keys => Fault::IsATable { keys: keys.join(", ") },
            };
            self.fault(&key, fault);
        }
        self.problems
    }
}

/// Likeness from which on a known key is suggested for an unknown one.
const ALIKE: f64 = 0.8;

/// The known key that is most like an unknown one. The last name counts most: a right name in
/// a wrong table is more often meant than a wrong name in the right one.
fn nearest(known: &[&str], key: &str) -> Option<String> {
    let split = |key: &str| {
        let (table, name) = key.rsplit_once('.').unwrap_or(("", key));
        (table.to_owned(), name.to_owned())
    };
    let (table, name) = split(key);
    let likeness = |known: &str| {
        let (in_table, named) = split(known);
        0.9 * strsim::jaro_winkler(&named, &name) + 0.1 * strsim::jaro_winkler(&in_table, &table)
    };
    let best = known.iter().map(|k| (likeness(k), *k)).max_by(|a, b| a.0.total_cmp(&b.0))?;
    (best.0 >= ALIKE).then(|| best.1.to_owned())
}

fn duration(text: &str) -> Option<Duration> {
    let (number, unit) = text.split_at(text.find(|c: char| c.is_ascii_alphabetic())?);
    let seconds = match unit {
        "ms" => 0.001,
        "s" => 1.0,
        "m" => 60.0,
        _ => return None,
    };
    let number: f64 = number.trim().parse().ok()?;
    Duration::try_from_secs_f64(number * seconds).ok()
}
