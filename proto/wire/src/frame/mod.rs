//! The frames of the fabric: what goes over a TCP connection between two members of a plan.
//!
//! Pure bytes, no I/O. A frame is a prefix of fixed size, a body and a payload:
//!
//! | offset | bytes | prefix field, little-endian |
//! |---|---|---|
//! | 0 | 4 | magic `CRVN` |
//! | 4 | 4 | protocol version |
//! | 8 | 1 | kind |
//! | 9 | 3 | zero |
//! | 12 | 4 | length of the body |
//! | 16 | 4 | length of the payload |
//! | 20 | 8 | generation |
//! | 28 | 8 | sender |
//! | 36 | 4 | CRC32C of the body |
//! | 40 | 4 | CRC32C of the payload |
//! | 44 | 4 | CRC32C of the 44 bytes before it |
//!
//! The prefix has a checksum of its own, so that nobody waits for the bytes of a length that
//! was damaged on its way. It does not name the receiver, so one encoding serves all
//! receivers of a broadcast. Magic and version come first and mean the same for ever: a
//! program of another version is told so, and not that its bytes are rubbish.
//!
//! Only the end that opened a connection sends. Its first frame is a [`Hello`]; all others are
//! [`PeerMessage`]s. A payload is raw little-endian fp32.
//!
//! Reading: [`PREFIX`] bytes, [`Prefix::decode`], then [`Prefix::body_len`] and
//! [`Prefix::payload_len`] bytes, [`Prefix::frame`] and [`Prefix::check_payload`]. An error
//! leaves nothing to go on from: close the connection.

mod body;

use crate::limits::MAX_COUNT;
use body::Body;
use caravan_types::message::PROTOCOL_VERSION;
use caravan_types::peer::{Key, PeerMessage};
use caravan_types::slices::MOST_BLOCKS;
use caravan_types::{BLOCK, Digest, Generation, WorkerId};

/// Bytes of a prefix.
pub const PREFIX: usize = 48;

/// The first bytes of every frame.
pub const MAGIC: [u8; 4] = *b"CRVN";

/// Largest body, in bytes: a vote with 2^23 block norms of 8 bytes. A block has 2^14
/// elements, so its sender may own 1.4·10^11 parameters, twice the largest Llama 2.
pub const MAX_BODY: usize = 64 << 20;

/// Largest payload for one value an element, in bytes: the largest slice, 2^20 · 4.
pub const MAX_VALUES: usize = (MOST_BLOCKS * BLOCK) as usize * 4;

/// Largest payload, in bytes: a slice's training state, three values an element.
pub const MAX_PAYLOAD: usize = 3 * MAX_VALUES;

/// Largest payload between two stages, in bytes: a micro-batch of 2^16 tokens and a width of
/// 4096. A receiver knows the one length that its run's have.
pub const MAX_STREAM: usize = 1 << 30;

/// What opens a connection. The sender's generation is in it because a
/// connection belongs to one plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Digest of the run spec: two runs on one host do not mix.
    pub run: Digest,
    /// The generation.
    pub generation: Generation,
    /// Who speaks.
    pub from: WorkerId,
    /// Whom the speaker believes to speak to.
    pub to: WorkerId,
}

/// A message of a member, without its payload.
#[derive(Clone, Debug, PartialEq)]
pub struct FrameHeader {
    /// The sender's generation.
    pub generation: Generation,
    /// The sender.
    pub from: WorkerId,
    /// The message.
    pub message: PeerMessage,
}

/// A decoded frame, without its payload.
#[derive(Clone, Debug, PartialEq)]
pub enum Frame {
    /// The opening.
    Hello(Hello),
    /// All that follows.
    Message(FrameHeader),
}

/// What is wrong with received bytes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The other end is no Caravan.
    #[error("the first bytes are {0:02x?}, not those of a Caravan frame: something else speaks to this port")]
    Magic([u8; 4]),
    /// The other end is a Caravan of another version.
    #[error("the other end speaks protocol {theirs}, this program {ours}: run the same version everywhere")]
    Protocol {
        /// Our version.
        ours: u32,
        /// Theirs.
        theirs: u32,
    },
    /// Bytes were changed on their way.
    #[error(
        "the checksum of the {part} is {is:08x}, but was sent as {sent:08x}: the bytes were damaged on their way"
    )]
    Checksum {
        /// Which part of the frame.
        part: Section,
        /// Of what was received.
        is: u32,
        /// As the sender says.
        sent: u32,
    },
    /// A kind that this version does not have.
    #[error("unknown frame kind {0}")]
    Kind(u8),
    /// A length that frames of this kind never have.
    #[error("a {part} of {is} bytes in a frame that takes {limit}")]
    Length {
        /// Which part of the frame.
        part: Section,
        /// Its length.
        is: usize,
        /// What would be right.
        limit: Limit,
    },
    /// The body ends early, goes on after its end, or has a number out of range.
    #[error("the body's {0}")]
    Body(&'static str),
}

/// A part of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Section {
    /// The first [`PREFIX`] bytes.
    Prefix,
    /// The message.
    Body,
    /// The tensor data.
    Payload,
}

impl std::fmt::Display for Section {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Prefix => "prefix",
            Self::Body => "body",
            Self::Payload => "payload",
        })
    }
}

/// The lengths that a part of a frame may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// One length.
    Exactly(usize),
    /// Whole multiples of `of`, from `of` to `most`.
    Multiple {
        /// The granularity.
        of: usize,
        /// The largest length.
        most: usize,
    },
    /// Any length up to this.
    UpTo(usize),
}

impl Limit {
    fn allows(self, length: usize) -> bool {
        match self {
            Self::Exactly(exact) => length == exact,
            Self::Multiple { of, most } => length > 0 && length <= most && length.is_multiple_of(of),
            Self::UpTo(most) => length <= most,
        }
    }
}

impl std::fmt::Display for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exactly(exact) => write!(f, "{exact}"),
            Self::Multiple { of, most } => write!(f, "multiples of {of} up to {most}"),
            Self::UpTo(most) => write!(f, "at most {most}"),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Kind {
    Hello = 1,
    Partial = 2,
    Weights = 3,
    State = 4,
    Prepared = 5,
    Activation = 6,
    ActivationGradient = 7,
}

impl Kind {
    fn of(message: &PeerMessage) -> Self {
        match message {
            PeerMessage::Data(Key::Partial { .. }) => Self::Partial,
            PeerMessage::Data(Key::Weights { .. }) => Self::Weights,
            PeerMessage::Data(Key::State { .. }) => Self::State,
            PeerMessage::Data(Key::Activation { .. }) => Self::Activation,
            PeerMessage::Data(Key::ActivationGradient { .. }) => Self::ActivationGradient,
            PeerMessage::Prepared(_) => Self::Prepared,
        }
    }

    fn parse(byte: u8) -> Result<Self, FrameError> {
        let all = [
            Self::Hello,
            Self::Partial,
            Self::Weights,
            Self::State,
            Self::Prepared,
            Self::Activation,
            Self::ActivationGradient,
        ];
        all.into_iter().find(|kind| *kind as u8 == byte).ok_or(FrameError::Kind(byte))
    }

    fn body(self) -> Limit {
        match self {
            Self::Hello => Limit::Exactly(40),
            Self::Partial => Limit::Exactly(17),
            Self::Weights | Self::State => Limit::Exactly(12),
            Self::Activation | Self::ActivationGradient => Limit::Exactly(16),
            Self::Prepared => Limit::UpTo(MAX_BODY),
        }
    }

    fn payload(self) -> Limit {
        match self {
            Self::Hello | Self::Prepared => Limit::Exactly(0),
            Self::Partial | Self::Weights => Limit::Multiple { of: 4, most: MAX_VALUES },
            Self::State => Limit::Multiple { of: 12, most: MAX_PAYLOAD },
            Self::Activation | Self::ActivationGradient => Limit::Multiple { of: 4, most: MAX_STREAM },
        }
    }
}

/// The fixed first part of a frame, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix {
    kind: Kind,
    generation: Generation,
    from: WorkerId,
    body_len: usize,
    payload_len: usize,
    body_crc: u32,
    payload_crc: u32,
}

impl Prefix {
    /// Reads a prefix. The lengths that it then names are within the limits of its kind.
    ///
    /// # Errors
    /// The bytes are no prefix of this version's, or damaged, or ask for too much.
    pub fn decode(bytes: &[u8; PREFIX]) -> Result<Self, FrameError> {
        let mut fields = Body::new(bytes);
        let magic = fields.array("prefix ends early")?;
        if magic != MAGIC {
            return Err(FrameError::Magic(magic));
        }
        let theirs = fields.u32()?;
        if theirs != PROTOCOL_VERSION {
            return Err(FrameError::Protocol { ours: PROTOCOL_VERSION, theirs });
        }
        let [kind, zeros @ ..] = fields.array::<4>("prefix ends early")?;
        let (body_len, payload_len) = (fields.u32()? as usize, fields.u32()? as usize);
        let (generation, from) = (fields.u64()?, fields.u64()?);
        let (body_crc, payload_crc, sent) = (fields.u32()?, fields.u32()?, fields.u32()?);
        checked(Section::Prefix, &bytes[..PREFIX - 4], sent)?;
        let kind = Kind::parse(kind)?;
        if zeros != [0; 3] || generation >= MAX_COUNT || from >= MAX_COUNT {
            return Err(FrameError::Body("prefix has a number out of range"));
        }
        allowed(Section::Body, body_len, kind.body())?;
        allowed(Section::Payload, payload_len, kind.payload())?;
        let (generation, from) = (Generation(generation), WorkerId(from));
        Ok(Self { kind, generation, from, body_len, payload_len, body_crc, payload_crc })
    }

    /// Who sent the frame.
    #[must_use]
    pub fn sender(&self) -> WorkerId {
        self.from
    }

    /// Bytes of the body, which follows the prefix; at most [`MAX_BODY`].
    #[must_use]
    pub fn body_len(&self) -> usize {
        self.body_len
    }

    /// Bytes of the payload, which follows the body; at most [`MAX_STREAM`].
    #[must_use]
    pub fn payload_len(&self) -> usize {
        self.payload_len
    }

    /// Reads the body that came with this prefix.
    ///
    /// # Errors
    /// It is damaged or no body of this kind.
    pub fn frame(&self, body: &[u8]) -> Result<Frame, FrameError> {
        allowed(Section::Body, body.len(), Limit::Exactly(self.body_len))?;
        checked(Section::Body, body, self.body_crc)?;
        let (generation, from) = (self.generation, self.from);
        let mut fields = Body::new(body);
        let frame = match self.kind {
            Kind::Hello => {
                let (run, to) = fields.hello()?;
                Frame::Hello(Hello { run, generation, from, to })
            }
            Kind::Partial => Frame::Message(self.header(PeerMessage::Data(fields.partial()?))),
            Kind::Weights => {
                let (step, slice) = fields.step_and_slice()?;
                Frame::Message(self.header(PeerMessage::Data(Key::Weights { step, slice })))
            }
            Kind::State => {
                let (step, slice) = fields.step_and_slice()?;
                Frame::Message(self.header(PeerMessage::Data(Key::State { step, slice })))
            }
            Kind::Activation => {
                let (step, micro) = fields.step_and_micro()?;
                Frame::Message(self.header(PeerMessage::Data(Key::Activation { step, micro })))
            }
            Kind::ActivationGradient => {
                let (step, micro) = fields.step_and_micro()?;
                Frame::Message(self.header(PeerMessage::Data(Key::ActivationGradient { step, micro })))
            }
            Kind::Prepared => Frame::Message(self.header(PeerMessage::Prepared(fields.prepared()?))),
        };
        fields.end()?;
        Ok(frame)
    }

    fn header(&self, message: PeerMessage) -> FrameHeader {
        FrameHeader { generation: self.generation, from: self.from, message }
    }

    /// Checks the payload that came with this prefix.
    ///
    /// # Errors
    /// It is damaged.
    pub fn check_payload(&self, payload: &[u8]) -> Result<(), FrameError> {
        allowed(Section::Payload, payload.len(), Limit::Exactly(self.payload_len))?;
        checked(Section::Payload, payload, self.payload_crc)
    }
}

/// Prefix and body of a message, with the checksum of its payload; the payload's own bytes go
/// out after them, and are not copied.
///
/// # Errors
/// The payload or the vote is larger than a receiver takes, or not of a length that this kind
/// of message has.
pub fn encode(header: &FrameHeader, payload: &[u8]) -> Result<Vec<u8>, FrameError> {
    let kind = Kind::of(&header.message);
    let mut out = vec![0; PREFIX];
    body::put_message(&mut out, &header.message);
    finish(out, kind, header.generation, header.from, payload)
}

/// The frame that opens a connection.
#[must_use]
pub fn encode_hello(hello: &Hello) -> Vec<u8> {
    let mut out = vec![0; PREFIX];
    body::put_hello(&mut out, hello.run, hello.to);
    fill(&mut out, Kind::Hello, hello.generation, hello.from, &[]);
    out
}

fn finish(
    mut out: Vec<u8>,
    kind: Kind,
    generation: Generation,
    from: WorkerId,
    payload: &[u8],
) -> Result<Vec<u8>, FrameError> {
    allowed(Section::Body, out.len() - PREFIX, kind.body())?;
    allowed(Section::Payload, payload.len(), kind.payload())?;
    fill(&mut out, kind, generation, from, payload);
    Ok(out)
}

/// Writes the prefix before the body that stands in `out` already. The lengths are within
/// their limits, so they fit.
fn fill(out: &mut [u8], kind: Kind, generation: Generation, from: WorkerId, payload: &[u8]) {
    let (prefix, body) = out.split_at_mut(PREFIX);
    prefix[0..4].copy_from_slice(&MAGIC);
    prefix[4..8].copy_from_slice(&PROTOCOL_VERSION.to_le_bytes());
    prefix[8] = kind as u8;
    prefix[12..16].copy_from_slice(&(body.len() as u32).to_le_bytes());
    prefix[16..20].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    prefix[20..28].copy_from_slice(&generation.0.to_le_bytes());
    prefix[28..36].copy_from_slice(&from.0.to_le_bytes());
    prefix[36..40].copy_from_slice(&crc32c::crc32c(body).to_le_bytes());
    prefix[40..44].copy_from_slice(&crc32c::crc32c(payload).to_le_bytes());
    let crc = crc32c::crc32c(&prefix[..44]);
    prefix[44..48].copy_from_slice(&crc.to_le_bytes());
}

fn allowed(part: Section, is: usize, limit: Limit) -> Result<(), FrameError> {
    if limit.allows(is) { Ok(()) } else { Err(FrameError::Length { part, is, limit }) }
}

fn checked(part: Section, bytes: &[u8], sent: u32) -> Result<(), FrameError> {
    let is = crc32c::crc32c(bytes);
    if is == sent { Ok(()) } else { Err(FrameError::Checksum { part, is, sent }) }
}

#[cfg(test)]
mod tests;
