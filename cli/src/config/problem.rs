//! What can be wrong with a run file. Every sentence says what would be right.

use caravan_types::model::PRESETS;
use caravan_types::timing::Disorder;
use std::fmt;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

/// Why there are no settings.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file is not there or cannot be read.
    #[error(
        "cannot read the run file {}: {source}. Give the path of a TOML file, such as examples/dependencies.toml",
        file.display()
    )]
    Unreadable {
        /// The file.
        file: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The file is no TOML.
    #[error("{} is no valid TOML: {source}", file.display())]
    Syntax {
        /// The file.
        file: PathBuf,
        /// Where and why.
        source: Box<toml::de::Error>,
    },
    /// Its content cannot work.
    #[error("{}{}", count(file, problems.len()), list(problems))]
    Problems {
        /// The file.
        file: PathBuf,
        /// All of them, in the order in which keys are read.
        problems: Vec<Problem>,
    },
}

fn count(file: &std::path::Path, n: usize) -> String {
    let problems = if n == 1 { "a problem".to_owned() } else { format!("{n} problems") };
    format!("{} has {problems}; nothing was started", file.display())
}

fn list(problems: &[Problem]) -> String {
    problems.iter().map(|p| format!("\n  {p}")).collect()
}

/// One thing that is wrong, and where.
#[derive(Clone, Debug, PartialEq)]
pub struct Problem {
    /// The dotted key.
    pub key: String,
    /// Its value as TOML, where it has one.
    pub value: Option<String>,
    /// The option that gave the value, where it is not from the file.
    pub option: Option<String>,
    /// What is wrong with it.
    pub fault: Fault,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.key)?;
        if let Some(value) = &self.value {
            write!(f, " = {value}")?;
        }
        if let Some(option) = &self.option {
            write!(f, " (from {option})")?;
        }
        write!(f, ": {}", self.fault)
    }
}

/// What is wrong with a key.
#[derive(Clone, Debug, PartialEq)]
pub enum Fault {
    /// It must be there and is not.
    Missing {
        /// What it is and how it could look.
        example: &'static str,
    },
    /// There is no such key.
    Unknown {
        /// The key that may have been meant.
        near: Option<String>,
    },
    /// It is the name of a table.
    IsATable {
        /// Its keys.
        keys: String,
    },
    /// A value of another type is needed.
    Kind {
        /// What is needed.
        expected: &'static str,
    },
    /// A number that is too small or too large.
    Range {
        /// Least.
        low: String,
        /// Most.
        high: String,
    },
    /// A text that is none of the known ones.
    Choice {
        /// The known ones.
        choices: String,
    },
    /// A list or a text without content.
    Empty {
        /// What is needed.
        expected: &'static str,
    },
    /// No name that can be a folder's.
    NotAName,
    /// Lanes are added in a balanced binary tree.
    NotAPowerOfTwo(u32),
    /// Heads share the width evenly.
    HeadsDoNotDivide {
        /// Width.
        dim: u32,
        /// Query heads.
        heads: u32,
    },
    /// Rotary positions turn pairs.
    OddHead {
        /// Width.
        dim: u32,
        /// Query heads.
        heads: u32,
    },
    /// Query heads share the key and value heads evenly.
    KvHeadsDoNotDivide {
        /// Query heads.
        heads: u32,
        /// Key and value heads.
        kv_heads: u32,
    },
    /// The weights that the run starts with cannot be used.
    Folder(String),
    /// The weights that the run starts with are of another model.
    NotAsInit {
        /// What it is there.
        theirs: String,
    },
    /// Rotary frequencies cannot be scaled so.
    RopeScaling {
        /// What would do.
        what: &'static str,
    },
    /// The model has no positions for such a sequence.
    LongerThanContext {
        /// Longest sequence of the model.
        context: u32,
    },
    /// Warm-up leaves no steps.
    WarmupTooLong {
        /// Steps of the run.
        steps: u64,
    },
    /// The global batch is no whole number of micro-batches a lane.
    BatchDoesNotDivide {
        /// Sequences in a global batch.
        size: u64,
        /// Lanes.
        lanes: u32,
        /// Sequences in a micro-batch.
        sequences: u32,
    },
    /// The size of the global batch is given twice, differently.
    BatchContradicts {
        /// Lanes, micro-batches, sequences.
        parts: (u32, u32, u32),
    },
    /// A stage has at least one unit.
    MoreStagesThanUnits {
        /// Units of the model: its layers, the embedding, and the norm with the head.
        units: u32,
    },
    /// A time that does not fit to the failure budget.
    Disorder {
        /// What it contradicts.
        disorder: Disorder,
        /// What would do, with this failure budget.
        range: RangeInclusive<Duration>,
        /// The failure budget.
        detect: Duration,
    },
    /// An option that is no `key=value`.
    NotAnAssignment,
}

fn not_as_init(theirs: &str) -> String {
    format!(
        "the model whose weights `init` names has {theirs} here: leave this out, or start with other weights"
    )
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing { example } => write!(f, "is missing: {example}"),
            Self::Unknown { near: Some(near) } => write!(f, "there is no such setting; did you mean {near}?"),
            Self::Unknown { near: None } => f.write_str("there is no such setting; `caravan config FILE` prints all that there are"),
            Self::IsATable { keys } => write!(f, "is a table, with the keys {keys}"),
            Self::Kind { expected } => write!(f, "must be {expected}"),
            Self::Range { low, high } => write!(f, "must be from {low} to {high}"),
            Self::Choice { choices } => write!(f, "must be one of {choices}"),
            Self::Empty { expected } => write!(f, "is empty: it needs {expected}"),
            Self::NotAName => f.write_str(
                "must be 1 to 64 letters, digits, '-', '_' or '.', not starting with '.': a folder is named after it",
            ),
            Self::NotAPowerOfTwo(lanes) => {
                let above = lanes.next_power_of_two();
                write!(
                    f,
                    "must be a power of two, such as {} or {above}: lane gradients are added in a balanced binary tree",
                    above / 2
                )
            }
            Self::HeadsDoNotDivide { dim, heads } => write!(
                f,
                "{heads} heads cannot share model.dim = {dim} evenly; {} would",
                counts(*dim, *heads)
            ),
            Self::OddHead { dim, heads } => write!(
                f,
                "a head would have {} dimensions, and rotary positions need an even number; {} heads would do",
                dim / heads,
                counts(*dim, *heads)
            ),
            Self::KvHeadsDoNotDivide { heads, kv_heads } => write!(
                f,
                "{heads} query heads cannot share {kv_heads} key and value heads evenly; {} would",
                nearest((1..=*heads).filter(|k| heads % k == 0), *kv_heads)
            ),
            Self::Folder(why) => f.write_str(why),
            Self::NotAsInit { theirs } => f.write_str(&not_as_init(theirs)),
            Self::RopeScaling { what } => f.write_str(what),
            Self::LongerThanContext { context } => write!(
                f,
                "is longer than model.context = {context}: make it at most {context}, or raise model.context"
            ),
            Self::WarmupTooLong { steps } => write!(
                f,
                "must be less than recipe.steps = {steps}; without it, warm-up takes a tenth of the run and at most \
                 2000 steps"
            ),
            Self::BatchDoesNotDivide { size, lanes, sequences } => {
                let grain = u64::from(*lanes) * u64::from(*sequences);
                let below = size / grain * grain;
                write!(f, "must be a multiple of batch.lanes × batch.sequences = {lanes} × {sequences} = {grain}: ")?;
                if below > 0 { write!(f, "{below} or {}", below + grain) } else { write!(f, "{grain}, for example") }
            }
            Self::BatchContradicts { parts: (lanes, micro_batches, sequences) } => write!(
                f,
                "batch.lanes × batch.micro_batches × batch.sequences is {lanes} × {micro_batches} × {sequences} = {}: \
                 give batch.size or batch.micro_batches, not both",
                u64::from(*lanes) * u64::from(*micro_batches) * u64::from(*sequences)
            ),
            Self::MoreStagesThanUnits { units } => write!(
                f,
                "must be at most {units}, the model's layers with its embedding and its head, of which every stage \
                 has at least one; 0 lets Caravan choose"
            ),
            Self::Disorder { disorder, range, detect } => f.write_str(&fitting(disorder, range, *detect)),
            Self::NotAnAssignment => {
                f.write_str("must be key=value with a dotted key, such as --set recipe.steps=100")
            }
        }
    }
}

/// What a time contradicts, and which would not.
fn fitting(disorder: &Disorder, range: &RangeInclusive<Duration>, detect: Duration) -> String {
    let (low, high) = (range.start(), range.end());
    format!(
        "{disorder}; with cluster.detect = \"{detect:?}\" it may be from {low:?} to {high:?}, or not be set at all"
    )
}

/// Head counts near `wanted` that share `dim` with an even size each.
fn counts(dim: u32, wanted: u32) -> String {
    nearest((1..=dim).filter(|h| dim.is_multiple_of(*h) && (dim / h).is_multiple_of(2)), wanted)
}

/// The next smaller and the next larger candidate.
fn nearest(candidates: impl Iterator<Item = u32>, wanted: u32) -> String {
    let (mut below, mut above) = (None, None);
    for candidate in candidates {
        if candidate <= wanted {
            below = Some(candidate);
        } else if above.is_none() {
            above = Some(candidate);
        }
    }
    match (below, above) {
        (Some(a), Some(b)) => format!("{a} or {b}"),
        (Some(a), None) | (None, Some(a)) => a.to_string(),
        (None, None) => "no number".to_owned(),
    }
}

/// The presets as a list for people.
pub fn presets() -> String {
    PRESETS.map(|p| format!("{p:?}")).join(", ")
}
