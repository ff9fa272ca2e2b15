//! What can happen next, and how it is written down so that a trace can be told again.

use std::fmt;
use std::str::FromStr;

/// What kind of thing happens. In the comments `a` and `b` are slots of workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Act {
    /// The engine of `a` finishes its task.
    Engine,
    /// A part of a checkpoint of `a` is written.
    Saved,
    /// A frame of `a` reaches `b`, or the end of their connection does.
    Peer,
    /// `b` notices that its connection from `a` is closed; what was on it is lost.
    Cut,
    /// `a` notices that its own connection to `b` is closed.
    Notice,
    /// A frame of the coordinator reaches `a`, or the end of their session does.
    Down,
    /// `a` notices that its session has ended; what was on its way is lost.
    DownCut,
    /// `a` looks for the coordinator.
    Attach,
    /// A frame of `a` reaches the coordinator, or the end of their session does.
    Up,
    /// The same for the session that `a` has opened after that one.
    UpNext,
    /// The coordinator notices that the session of `a` has ended; what was on its way is lost.
    UpCut,
    /// A manifest is written.
    Completed,
    /// What the coordinator waits for is due.
    Due,
    /// The coordinator is started again.
    Start,
    /// `a` dies.
    Crash,
    /// The coordinator dies.
    Die,
    /// The connection from `a` to `b` breaks.
    Break,
    /// The session of `a` breaks.
    Session,
    /// `a` was not heard for too long.
    Silence,
    /// A deadline passes though answers are on their way.
    Late,
    /// A worker joins.
    Join,
    /// `a` is asked to leave.
    Leave,
    /// Somebody asks for a stop.
    Drain,
}

/// Their letters: small where nothing goes wrong, capital for faults and wishes.
const LETTERS: [(Act, char); 23] = [
    (Act::Engine, 'e'),
    (Act::Saved, 'v'),
    (Act::Peer, 'p'),
    (Act::Cut, 'x'),
    (Act::Notice, 'n'),
    (Act::Down, 'd'),
    (Act::DownCut, 'c'),
    (Act::Attach, 'a'),
    (Act::Up, 'u'),
    (Act::UpNext, 'w'),
    (Act::UpCut, 'k'),
    (Act::Completed, 'm'),
    (Act::Due, 't'),
    (Act::Start, 's'),
    (Act::Crash, 'C'),
    (Act::Die, 'D'),
    (Act::Break, 'B'),
    (Act::Session, 'S'),
    (Act::Silence, 'L'),
    (Act::Late, 'T'),
    (Act::Join, 'J'),
    (Act::Leave, 'O'),
    (Act::Drain, 'R'),
];

/// One thing that can happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Choice {
    pub(super) act: Act,
    pub(super) a: u8,
    pub(super) b: u8,
    /// Where the coordinator dies in the middle of it, before which record, counted from 0;
    /// that is a fault, too.
    pub(super) dies: Option<u8>,
}

impl Choice {
    pub(super) fn new(act: Act, a: usize, b: usize) -> Self {
        Self { act, a: a as u8, b: b as u8, dies: None }
    }

    /// Whether it is a fault or a wish.
    pub(super) fn is_fault(self) -> bool {
        self.dies.is_some() || (Act::Crash as u8..=Act::Drain as u8).contains(&(self.act as u8))
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letter = LETTERS.iter().find(|(act, _)| *act == self.act).map_or('?', |(_, letter)| *letter);
        write!(f, "{letter}{}{}{}", self.a, self.b, self.dies.map_or(0, |dies| dies + 1))
    }
}

impl FromStr for Choice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no choice: a letter and three digits");
        let mut letters = text.chars();
        let letter = letters.next().ok_or_else(wrong)?;
        let (act, _) = *LETTERS.iter().find(|(_, l)| *l == letter).ok_or_else(wrong)?;
        let mut digit = || letters.next().and_then(|c| c.to_digit(10)).ok_or_else(wrong);
        let (a, b, dies) = (digit()? as u8, digit()? as u8, digit()? as u8);
        if usize::from(a.max(b)) >= super::setting::SLOTS {
            return Err(wrong());
        }
        Ok(Self { act, a, b, dies: dies.checked_sub(1) })
    }
}

/// Choices as one word.
pub(super) fn write(choices: &[Choice]) -> String {
    choices.iter().map(Choice::to_string).collect()
}

/// Choices from that word.
///
/// # Errors
/// Where it is none.
pub(super) fn read(word: &str) -> Result<Vec<Choice>, String> {
    let letters: Vec<char> = word.chars().collect();
    letters.chunks(4).map(|choice| choice.iter().collect::<String>().parse()).collect()
}
