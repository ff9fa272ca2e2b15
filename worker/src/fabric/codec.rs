//! Frames on a socket. The bytes are `caravan_wire::frame`'s; here they are read and written,
//! and held to what this run's frames can be. Payloads go between socket and vector without
//! a copy.

use super::Settings;
use super::fault::Fault;
use caravan_types::peer::{Key, PeerMessage};
use caravan_types::{Generation, Slice, WorkerId};
use caravan_wire::frame::{Frame, FrameHeader, Hello, PREFIX, Prefix, encode, encode_hello};
use std::io::ErrorKind;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

#[cfg(target_endian = "big")]
compile_error!("payloads are little-endian fp32 and are sent as they lie in memory");

/// Bytes of a vote besides its lists: step, mark, generation, weights, and the length of two
/// lists.
const VOTE: usize = 8 + 1 + 8 + 8 + 4 + 4;

/// Bytes of a slice's vote without its norms: slice, their number, three sums and a mark.
const SLICE: usize = 4 + 4 + 3 * 4 + 1;

/// Bytes of a hello's body: hash of the run spec, and whom it is for.
const HELLO: usize = 32 + 8;

impl Settings {
    /// The largest body of this run's frames: the vote of someone who owns everything and
    /// computed all lanes.
    fn largest_body(&self) -> usize {
        let slices: usize = self.slices.iter().map(|(_, slice)| SLICE + 8 * slice.blocks()).sum();
        VOTE + slices + self.batch.lanes as usize * (4 + 8 + 8)
    }

    /// Bytes of the payload that travels with a key.
    fn payload_len(&self, key: Key) -> Result<usize, Fault> {
        let values = |slice| self.slices.get(slice).map(Slice::len).ok_or(Fault::UnknownKey(key));
        Ok(match key {
            Key::Partial { slice, .. } | Key::Weights { slice, .. } => 4 * values(slice)?,
            Key::State { slice, .. } => 3 * 4 * values(slice)?,
            Key::Activation { .. } | Key::ActivationGradient { .. } => {
                4 * self.batch.tokens_per_micro_batch() as usize * self.dim as usize
            }
        })
    }
}

/// Introduces us over a new connection.
pub async fn write_hello(
    stream: &mut (impl AsyncWrite + Unpin),
    settings: &Settings,
    generation: Generation,
    to: WorkerId,
) -> Result<(), Fault> {
    let hello = Hello { run: settings.run, generation, from: settings.worker, to };
    Ok(stream.write_all(&encode_hello(&hello)).await?)
}

/// Reads an introduction: who is it, and of which generation?
pub async fn read_hello(
    stream: &mut (impl AsyncRead + Unpin),
    settings: &Settings,
) -> Result<(Generation, WorkerId), Fault> {
    let prefix = read_prefix(stream).await?;
    // A stranger makes us reserve no more memory than this.
    if prefix.body_len() != HELLO || prefix.payload_len() != 0 {
        return Err(Fault::NoHello);
    }
    let mut body = [0; HELLO];
    read_exact(stream, &mut body).await?;
    let Frame::Hello(hello) = prefix.frame(&body)? else { return Err(Fault::NoHello) };
    if hello.run != settings.run {
        return Err(Fault::Run { ours: settings.run, theirs: hello.run });
    }
    if hello.to != settings.worker {
        return Err(Fault::WrongDoor { to: hello.to });
    }
    Ok((hello.generation, hello.from))
}

/// Sends a message with its payload.
pub async fn write_frame(
    stream: &mut (impl AsyncWrite + Unpin),
    header: &FrameHeader,
    payload: &[f32],
) -> Result<(), Fault> {
    let payload = bytemuck::cast_slice(payload);
    stream.write_all(&encode(header, payload)?).await?;
    Ok(stream.write_all(payload).await?)
}

/// Reads a message of `from` in `generation`, with its payload.
pub async fn read_frame(
    stream: &mut (impl AsyncRead + Unpin),
    settings: &Settings,
    generation: Generation,
    from: WorkerId,
) -> Result<(PeerMessage, Vec<f32>), Fault> {
    let prefix = read_prefix(stream).await?;
    let (got, limit) = (prefix.body_len(), settings.largest_body());
    if got > limit {
        return Err(Fault::BodyLength { got, limit });
    }
    let mut body = vec![0; got];
    read_exact(stream, &mut body).await?;
    let Frame::Message(header) = prefix.frame(&body)? else { return Err(Fault::SecondHello) };
    if (header.generation, header.from) != (generation, from) {
        return Err(Fault::Impostor { from: header.from, generation: header.generation });
    }
    let PeerMessage::Data(key) = header.message else { return Ok((header.message, Vec::new())) };
    let (got, expected) = (prefix.payload_len(), settings.payload_len(key)?);
    if got != expected {
        return Err(Fault::PayloadLength { key, expected, got });
    }
    let mut payload = vec![0f32; got / 4];
    let bytes = bytemuck::cast_slice_mut(&mut payload);
    read_exact(stream, bytes).await?;
    prefix.check_payload(bytes)?;
    Ok((header.message, payload))
}

async fn read_prefix(stream: &mut (impl AsyncRead + Unpin)) -> Result<Prefix, Fault> {
    let mut bytes = [0; PREFIX];
    read_exact(stream, &mut bytes).await?;
    Ok(Prefix::decode(&bytes)?)
}

/// The end of the stream is a fault of its own: it is how peers usually leave.
async fn read_exact(stream: &mut (impl AsyncRead + Unpin), bytes: &mut [u8]) -> Result<(), Fault> {
    match stream.read_exact(bytes).await {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Err(Fault::Closed),
        Err(error) => Err(Fault::Io(error)),
    }
}
