//! The two directions of a session, with the opening messages that come before the rest.

use crate::error::{Malformed, Why};
use crate::pb;
use caravan_types::message::{FromWorker, Hello, Refusal, ToWorker, Welcome};

/// Anything that a worker says to the coordinator.
#[derive(Clone, Debug, PartialEq)]
pub enum Up {
    /// The first message, and no other one.
    Hello(Hello),
    /// All that follows.
    Message(FromWorker),
}

/// Anything that the coordinator says to a worker.
#[derive(Clone, Debug, PartialEq)]
pub enum Down {
    /// The first message, for a worker that is taken on.
    Welcome(Box<Welcome>),
    /// The first and last message, for one that is not.
    Refused(Refusal),
    /// All that follows a welcome.
    Message(ToWorker),
}

impl From<Hello> for Up {
    fn from(hello: Hello) -> Self {
        Self::Hello(hello)
    }
}

impl From<FromWorker> for Up {
    fn from(message: FromWorker) -> Self {
        Self::Message(message)
    }
}

impl From<Welcome> for Down {
    fn from(welcome: Welcome) -> Self {
        Self::Welcome(Box::new(welcome))
    }
}

impl From<Refusal> for Down {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<ToWorker> for Down {
    fn from(message: ToWorker) -> Self {
        Self::Message(message)
    }
}

impl Up {
    /// The opening message.
    ///
    /// # Errors
    /// It is another one.
    pub fn hello(self) -> Result<Hello, Malformed> {
        match self {
            Self::Hello(hello) => Ok(hello),
            Self::Message(_) => Err(Why::OutOfPlace.at("FromWorker.message")),
        }
    }

    /// A message after the opening one.
    ///
    /// # Errors
    /// It is a second hello.
    pub fn message(self) -> Result<FromWorker, Malformed> {
        match self {
            Self::Message(message) => Ok(message),
            Self::Hello(_) => Err(Why::OutOfPlace.at("FromWorker.hello")),
        }
    }
}

impl Down {
    /// The answer to a hello.
    ///
    /// # Errors
    /// It is no answer to a hello.
    pub fn answer(self) -> Result<Result<Box<Welcome>, Refusal>, Malformed> {
        match self {
            Self::Welcome(welcome) => Ok(Ok(welcome)),
            Self::Refused(refusal) => Ok(Err(refusal)),
            Self::Message(_) => Err(Why::OutOfPlace.at("ToWorker.message")),
        }
    }

    /// A message after the answer.
    ///
    /// # Errors
    /// It is a second answer.
    pub fn message(self) -> Result<ToWorker, Malformed> {
        match self {
            Self::Message(message) => Ok(message),
            Self::Welcome(_) => Err(Why::OutOfPlace.at("ToWorker.welcome")),
            Self::Refused(_) => Err(Why::OutOfPlace.at("ToWorker.refused")),
        }
    }
}

impl<T: Into<Up>> From<T> for pb::FromWorker {
    fn from(up: T) -> Self {
        let message = match up.into() {
            Up::Hello(hello) => pb::from_worker::Message::Hello(hello.into()),
            Up::Message(message) => message.into(),
        };
        Self { message: Some(message) }
    }
}

impl<T: Into<Down>> From<T> for pb::ToWorker {
    fn from(down: T) -> Self {
        let message = match down.into() {
            Down::Welcome(welcome) => pb::to_worker::Message::Welcome((*welcome).into()),
            Down::Refused(refusal) => pb::to_worker::Message::Refused(refusal.into()),
            Down::Message(message) => message.into(),
        };
        Self { message: Some(message) }
    }
}
