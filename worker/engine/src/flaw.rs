//! Faults of the machine, for tests.

use std::fmt;
use std::str::FromStr;

/// A fault of the machine, to try what comes of it. The number says which bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flaw {
    /// Memory that holds weights or training state flips a bit.
    Memory(u64),
    /// The next final gradient is summed up wrong.
    Sum(u64),
    /// The next update computes wrong weights.
    Update(u64),
}

impl fmt::Display for Flaw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Self::Memory(_) => "memory",
            Self::Sum(_) => "sum",
            Self::Update(_) => "update",
        };
        write!(f, "{name} {}", self.bit())
    }
}

impl FromStr for Flaw {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let unknown = || format!("{text:?} is no flaw: memory, sum or update with the number of a bit");
        let (name, bit) = text.split_once(' ').ok_or_else(unknown)?;
        let bit = bit.parse().map_err(|_| unknown())?;
        match name {
            "memory" => Ok(Self::Memory(bit)),
            "sum" => Ok(Self::Sum(bit)),
            "update" => Ok(Self::Update(bit)),
            _ => Err(unknown()),
        }
    }
}

impl Flaw {
    pub(crate) fn bit(self) -> u64 {
        let (Self::Memory(bit) | Self::Sum(bit) | Self::Update(bit)) = self;
        bit
    }
}
