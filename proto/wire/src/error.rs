//! What can be wrong with a message from outside.

use caravan_types::timing::Disorder;
use std::fmt;

/// A message that has the shape of the .proto files but does not mean anything.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed message: {field} {why}")]
pub struct Malformed {
    /// The field, as `Message.field` of the .proto files.
    pub field: &'static str,
    /// What is wrong with it.
    pub why: Why,
}

/// What is wrong with a field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Why {
    /// It must be there.
    Missing,
    /// The sender knows a variant that this program does not, or sent rubbish.
    UnknownVariant(i32),
    /// A number or length above its limit.
    TooLarge {
        /// What it is.
        is: u64,
        /// The largest that is taken.
        limit: u64,
    },
    /// A number that is no speed: not positive, or beyond what arithmetic with it bears.
    NotASpeed,
    /// A number that must be finite.
    NotFinite,
    /// A byte string that must have one length has another.
    Length {
        /// Its length.
        is: usize,
        /// What it must be.
        must: usize,
    },
    /// Bounds or ids that must ascend do not.
    NotAscending,
    /// A set of ranges has a start without an end.
    HalfRange,
    /// A version that this program does not read.
    Version {
        /// What was sent.
        is: u32,
        /// What this program reads.
        must: u32,
    },
    /// Text in another format, with what its parser says.
    Unreadable(String),
    /// Times that contradict each other.
    Disorder(Disorder),
    /// A message that belongs at another place of the conversation.
    OutOfPlace,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => f.write_str("is missing"),
            Self::UnknownVariant(value) => write!(f, "has the unknown value {value}"),
            Self::TooLarge { is, limit } => write!(f, "is {is}, more than the limit of {limit}"),
            Self::NotASpeed => f.write_str("is no speed"),
            Self::NotFinite => f.write_str("is not finite"),
            Self::Length { is, must } => write!(f, "has {is} bytes, not {must}"),
            Self::NotAscending => f.write_str("does not ascend"),
            Self::HalfRange => f.write_str("has a range without an end"),
            Self::Version { is, must } => write!(f, "has version {is}; this program reads version {must}"),
            Self::Unreadable(error) => write!(f, "cannot be read: {error}"),
            Self::Disorder(disorder) => write!(f, "contradicts what follows from it: {disorder}"),
            Self::OutOfPlace => f.write_str("does not belong at this place of the session"),
        }
    }
}

impl Why {
    /// The error for this reason at a field.
    pub(crate) fn at(self, field: &'static str) -> Malformed {
        Malformed { field, why: self }
    }
}

impl From<Malformed> for tonic::Status {
    fn from(error: Malformed) -> Self {
        Self::invalid_argument(error.to_string())
    }
}
