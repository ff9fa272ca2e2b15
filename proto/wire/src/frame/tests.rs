//! Frames survive their bytes, and nothing else does.

use super::*;
use crate::strategies::{counter, peer_message};
use caravan_types::peer::Prepared;
use caravan_types::{Node, SliceId, Step};
use proptest::prelude::*;

/// Reads one frame from bytes in memory.
fn decode(bytes: &[u8]) -> Result<(Frame, Vec<u8>), FrameError> {
    let Some((prefix, rest)) = bytes.split_first_chunk::<PREFIX>() else {
        return Err(FrameError::Body("prefix ends early"));
    };
    let prefix = Prefix::decode(prefix)?;
    let (body, rest) = rest.split_at(prefix.body_len().min(rest.len()));
    let frame = prefix.frame(body)?;
    prefix.check_payload(rest)?;
    Ok((frame, rest.to_vec()))
}

fn whole(header: &FrameHeader, payload: &[u8]) -> Vec<u8> {
    let mut bytes = encode(header, payload).unwrap();
    bytes.extend_from_slice(payload);
    bytes
}

/// A payload that fits a message.
fn payload(message: &PeerMessage, values: usize) -> Vec<u8> {
    let each = match message {
        PeerMessage::Data(Key::State { .. }) => 12,
        PeerMessage::Data(_) => 4,
        PeerMessage::Prepared(_) => 0,
    };
    (0..each * values).map(|i| i as u8).collect()
}

prop_compose! {
    fn any_frame()(generation in counter(), from in counter(), message in peer_message(), values in 1usize..40)
        -> (FrameHeader, Vec<u8>)
    {
        let payload = payload(&message, values);
        (FrameHeader { generation: Generation(generation), from: WorkerId(from), message }, payload)
    }
}

proptest! {
    #[test]
    fn a_message_survives_its_bytes((header, payload) in any_frame()) {
        let (frame, got) = decode(&whole(&header, &payload)).unwrap();
        prop_assert_eq!(frame, Frame::Message(header));
        prop_assert_eq!(got, payload);
    }

    #[test]
    fn a_hello_survives_its_bytes(run: [u8; 32], generation in counter(), from in counter(), to in counter()) {
        let hello = Hello {
            run: Digest(run),
            generation: Generation(generation),
            from: WorkerId(from),
            to: WorkerId(to),
        };
        prop_assert_eq!(decode(&encode_hello(&hello)).unwrap(), (Frame::Hello(hello), vec![]));
    }

    #[test]
    fn one_flipped_bit_anywhere_is_noticed((header, payload) in any_frame(), at: prop::sample::Index, bit in 0u8..8) {
        let mut bytes = whole(&header, &payload);
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        prop_assert!(decode(&bytes).is_err());
    }

    #[test]
    fn a_cut_frame_is_noticed((header, payload) in any_frame(), at: prop::sample::Index) {
        let bytes = whole(&header, &payload);
        prop_assert!(decode(&bytes[..at.index(bytes.len())]).is_err());
    }

    #[test]
    fn rubbish_is_refused_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(decode(&bytes).is_err());
    }

    /// A liar computes correct checksums, so the body's own checks are all that is left.
    #[test]
    fn rubbish_with_good_checksums_does_not_panic(
        kind in 0u8..8,
        generation: u64,
        body in prop::collection::vec(prop_oneof![Just(0u8), Just(1u8), any::<u8>()], 0..120),
        values in 0usize..4,
    ) {
        let payload = vec![7; values * 4];
        let mut bytes = vec![0; PREFIX];
        bytes.extend_from_slice(&body);
        fill(&mut bytes, Kind::Prepared, Generation(generation), WorkerId(1), &payload);
        bytes[8] = kind;
        let crc = crc32c::crc32c(&bytes[..44]).to_le_bytes();
        bytes[44..48].copy_from_slice(&crc);
        bytes.extend_from_slice(&payload);
        // What is taken in spite of all is a message that could have been sent.
        if let Ok((Frame::Message(header), payload)) = decode(&bytes) {
            prop_assert_eq!(whole(&header, &payload), bytes);
        }
    }
}

fn weights(slice: u32) -> FrameHeader {
    let message = PeerMessage::Data(Key::Weights { step: Step(1), slice: SliceId(slice) });
    FrameHeader { generation: Generation(1), from: WorkerId(1), message }
}

#[test]
fn something_else_on_the_port_is_named_as_such() {
    let http = *b"GET / HTTP/1.1\r\nHost: 127.0.0.1:7070\r\nAccept: */*";
    let prefix: &[u8; PREFIX] = http.first_chunk().unwrap();
    assert_eq!(Prefix::decode(prefix), Err(FrameError::Magic(*b"GET ")));
}

#[test]
fn another_version_is_told_so_whatever_the_rest_of_its_frame_looks_like() {
    let mut prefix = [0xff; PREFIX];
    prefix[..4].copy_from_slice(&MAGIC);
    prefix[4..8].copy_from_slice(&99u32.to_le_bytes());
    let expected = FrameError::Protocol { ours: PROTOCOL_VERSION, theirs: 99 };
    assert_eq!(Prefix::decode(&prefix), Err(expected));
}

#[test]
fn a_payload_that_is_no_slice_is_not_sent() {
    for bad in [0, 3, MAX_VALUES + 4] {
        let error = encode(&weights(0), &vec![0; bad]).unwrap_err();
        assert!(matches!(error, FrameError::Length { part: Section::Payload, .. }), "{error}");
    }
    assert!(encode(&weights(0), &vec![0; MAX_VALUES]).is_ok());
}

#[test]
fn a_length_beyond_its_limit_is_refused_before_anything_is_read_for_it() {
    let mut bytes: [u8; PREFIX] = *encode(&weights(0), &[0; 4]).unwrap().first_chunk().unwrap();
    bytes[16..20].copy_from_slice(&u32::MAX.to_le_bytes());
    let crc = crc32c::crc32c(&bytes[..44]).to_le_bytes();
    bytes[44..48].copy_from_slice(&crc);
    assert!(matches!(Prefix::decode(&bytes), Err(FrameError::Length { part: Section::Payload, .. })));
}

#[test]
fn a_list_that_claims_more_than_there_is_costs_no_memory() {
    let vote = Prepared {
        step: Step(1),
        slices: vec![],
        weights: caravan_types::Opinion(0),
        lanes: vec![],
        stop_for: None,
    };
    let header = FrameHeader { message: PeerMessage::Prepared(vote), ..weights(0) };
    let mut bytes = encode(&header, &[]).unwrap();
    let norms = PREFIX + 17;
    bytes[norms..norms + 4].copy_from_slice(&u32::MAX.to_le_bytes());
    fill(&mut bytes, Kind::Prepared, Generation(1), WorkerId(1), &[]);
    assert_eq!(decode(&bytes), Err(FrameError::Body("list is longer than the body")));
}

#[test]
fn a_tree_node_beyond_all_lanes_is_refused() {
    let node = Node { level: 200, index: 0 };
    let key = Key::Partial { step: Step(1), slice: SliceId(0), node };
    let header = FrameHeader { message: PeerMessage::Data(key), ..weights(0) };
    assert_eq!(decode(&whole(&header, &[0; 4])), Err(FrameError::Body("tree node is out of range")));
}
