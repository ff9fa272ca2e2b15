//! Fabrics on real sockets: they talk, they wait for each other, and nothing that a stranger
//! sends disturbs them.

use super::*;
use crate::log::Log;
use caravan_types::message::PROTOCOL_VERSION;
use caravan_types::peer::{Key, LaneResult, Prepared, SliceVote};
use caravan_types::{Checksum, ModelShape, Opinion, SliceId, SliceSum, Step};
use caravan_wire::frame::{self, FrameHeader, Hello};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Long enough for a loaded machine to answer, in tests that do not wait for it to pass.
const LONG: Duration = Duration::from_secs(20);

/// Short, in tests that do.
const SHORT: Duration = Duration::from_millis(200);

const G1: Generation = Generation(1);
const G2: Generation = Generation(2);

fn settings(worker: u64, detect: Duration) -> Settings {
    let slices = SliceTable::new(&ModelShape::preset("260k").unwrap());
    let batch = BatchShape { lanes: 4, micro_batches: 1, sequences: 1, sequence_length: 8 };
    Settings { worker: WorkerId(worker), run: Digest([7; 32]), slices, batch, dim: 64, timing: detect.into() }
}

async fn fabric(worker: u64, detect: Duration) -> (Fabric, Member) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let member = Member { worker: WorkerId(worker), fabric: listener.local_addr().unwrap().to_string() };
    (Fabric::start(listener, settings(worker, detect)), member)
}

async fn pair(detect: Duration) -> ((Fabric, Member), (Fabric, Member)) {
    let ((mut a, at_a), (mut b, at_b)) = (fabric(1, detect).await, fabric(2, detect).await);
    a.connect(G1, vec![at_b.clone()]);
    b.connect(G1, vec![at_a.clone()]);
    ((a, at_a), (b, at_b))
}

fn vote(step: u64) -> PeerMessage {
    let lanes = vec![LaneResult { lane: 0, loss: 2.0, tokens: 8 }];
    let (gradient, state) = (Checksum(7), SliceSum { weights: Checksum(8), moments: Some(Checksum(9)) });
    let slices = vec![SliceVote { slice: SliceId(0), norms: vec![1.0], gradient, state }];
    PeerMessage::Prepared(Prepared { step: Step(step), slices, weights: Opinion(0), lanes, stop_for: None })
}

fn weights(slice: u32) -> Key {
    Key::Weights { step: Step(1), slice: SliceId(slice) }
}

fn payload(fabric: &Fabric, slice: u32) -> Vec<f32> {
    let len = fabric.settings.slices.get(SliceId(slice)).unwrap().len();
    (0..len).map(|i| (i as f32).sin()).collect()
}

fn say(from: &Fabric, to: u64, message: PeerMessage) {
    from.link(WorkerId(to)).unwrap().send(message, Vec::new());
}

async fn hear(fabric: &mut Fabric) -> (Generation, WorkerId, PeerMessage, Vec<f32>) {
    match timeout(LONG, fabric.next()).await.unwrap() {
        Event::Message { generation, from, message, payload } => (generation, from, message, payload),
        Event::Lost { peer, .. } => panic!("lost {peer}"),
    }
}

async fn loses(fabric: &mut Fabric) -> (Generation, WorkerId) {
    match timeout(LONG, fabric.next()).await.unwrap() {
        Event::Lost { generation, peer } => (generation, peer),
        Event::Message { message, .. } => panic!("heard {message:?}"),
    }
}

/// Lets a fabric work for as long as something else takes.
async fn during<T>(fabric: &mut Fabric, other: impl Future<Output = T>) -> T {
    tokio::select! {
        event = fabric.next() => panic!("{event:?}"),
        done = other => done,
    }
}

#[tokio::test]
async fn payloads_and_votes_arrive_unchanged_and_in_order() {
    let ((mut a, _), (mut b, _)) = pair(LONG).await;
    let values = payload(&a, 3);
    let link = a.link(WorkerId(2)).unwrap().clone();
    link.send(vote(1), Vec::new());
    link.send(PeerMessage::Data(weights(3)), values.clone());
    link.send(vote(2), Vec::new());
    say(&b, 1, vote(9));
    let from = WorkerId(1);
    assert_eq!(hear(&mut b).await, (G1, from, vote(1), vec![]));
    assert_eq!(hear(&mut b).await, (G1, from, PeerMessage::Data(weights(3)), values));
    assert_eq!(hear(&mut b).await, (G1, from, vote(2), vec![]));
    assert_eq!(hear(&mut a).await, (G1, WorkerId(2), vote(9), vec![]));
}

#[tokio::test]
async fn a_peer_that_has_the_plan_before_us_is_heard_when_we_have_it() {
    let ((mut a, at_a), (mut b, at_b)) = (fabric(1, LONG).await, fabric(2, LONG).await);
    a.connect(G2, vec![at_b]);
    say(&a, 2, vote(1));
    while b.parking.is_empty() {
        tokio::select! {
            event = b.next() => panic!("{event:?}"),
            () = tokio::task::yield_now() => {}
        }
    }
    b.connect(G2, vec![at_a]);
    assert_eq!(hear(&mut b).await.2, vote(1));
}

#[tokio::test]
async fn a_peer_whose_plan_never_comes_here_is_not_parked_for_ever() {
    let ((mut a, _), (mut b, at_b)) = (fabric(1, LONG).await, fabric(2, SHORT).await);
    a.connect(G2, vec![at_b]);
    assert_eq!(during(&mut b, loses(&mut a)).await, (G2, WorkerId(2)));
}

#[tokio::test]
async fn a_peer_of_a_fenced_generation_is_turned_away() {
    let ((mut a, _), (mut b, at_b)) = (fabric(1, LONG).await, fabric(2, LONG).await);
    b.fence(G2);
    a.connect(G1, vec![at_b]);
    assert_eq!(during(&mut b, loses(&mut a)).await, (G1, WorkerId(2)));
    assert!(a.link(WorkerId(2)).is_none());
}

#[tokio::test]
async fn fencing_closes_what_is_open_and_parked_and_what_was_heard_is_forgotten() {
    let ((mut a, at_a), (mut b, at_b)) = pair(LONG).await;
    let (mut c, at_c) = fabric(3, LONG).await;
    say(&a, 2, vote(1));
    hear(&mut b).await;
    say(&a, 2, vote(2));
    c.connect(G2, vec![at_b.clone()]);
    b.fence(Generation(3));
    assert_eq!(loses(&mut a).await, (G1, WorkerId(2)));
    assert_eq!(during(&mut b, loses(&mut c)).await, (G2, WorkerId(2)));

    a.connect(Generation(3), vec![at_b, at_c]);
    b.connect(Generation(3), vec![at_a]);
    say(&a, 2, vote(3));
    assert_eq!(hear(&mut b).await.2, vote(3), "nothing of an older generation comes out");
}

#[tokio::test]
async fn a_peer_that_dies_is_lost_at_once_and_once() {
    let ((mut a, _), (mut b, at_b)) = pair(LONG).await;
    let (mut c, at_c) = fabric(3, LONG).await;
    say(&a, 2, vote(1));
    say(&b, 1, vote(1));
    hear(&mut a).await;
    hear(&mut b).await;
    drop(b);
    let gone = tokio::time::Instant::now();
    assert_eq!(loses(&mut a).await, (G1, WorkerId(2)));
    assert!(gone.elapsed() < LONG / 2, "known from the closed socket, not from the budget");
    drop(at_b);
    // The other connection broke as well; the next event is another peer's.
    a.connect(G2, vec![at_c]);
    c.connect(G2, Vec::new());
    assert_eq!(during(&mut c, loses(&mut a)).await, (G2, WorkerId(3)));
}

#[tokio::test]
async fn a_peer_that_is_nowhere_is_lost_after_the_budget() {
    let (mut a, _) = fabric(1, SHORT).await;
    // A port that was free a moment ago and is closed.
    let nowhere = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().to_string();
    let started = tokio::time::Instant::now();
    a.connect(G1, vec![Member { worker: WorkerId(2), fabric: nowhere }]);
    assert_eq!(loses(&mut a).await, (G1, WorkerId(2)));
    assert!(started.elapsed() >= SHORT / 2);
}

#[tokio::test]
async fn a_peer_that_starts_late_is_reached() {
    let ((mut a, at_a), listener) = (fabric(1, LONG).await, TcpListener::bind("127.0.0.1:0").await.unwrap());
    let address = listener.local_addr().unwrap();
    drop(listener);
    a.connect(G1, vec![Member { worker: WorkerId(2), fabric: address.to_string() }]);
    say(&a, 2, vote(1));
    tokio::task::yield_now().await;
    let mut b = Fabric::start(TcpListener::bind(address).await.unwrap(), settings(2, LONG));
    b.connect(G1, vec![at_a]);
    assert_eq!(hear(&mut b).await.2, vote(1));
}

#[tokio::test]
async fn a_peer_that_takes_nothing_is_given_up_when_its_queue_is_full() {
    let (mut a, _) = fabric(1, LONG).await;
    let deaf = TcpListener::bind("127.0.0.1:0").await.unwrap();
    a.connect(G1, vec![Member { worker: WorkerId(2), fabric: deaf.local_addr().unwrap().to_string() }]);
    let link = a.link(WorkerId(2)).unwrap().clone();
    let values = payload(&a, 0);
    let room = crate::engine::frames_of_two_steps(&a.settings.slices, &a.settings.batch);
    for _ in 0..=room + 4 {
        link.send(PeerMessage::Data(weights(0)), values.clone());
    }
    assert_eq!(loses(&mut a).await, (G1, WorkerId(2)));
}

/// What strangers send, and the reason that the log gives.
fn strange() -> Vec<(Vec<u8>, &'static str)> {
    let hello = Hello { run: Digest([7; 32]), generation: G1, from: WorkerId(3), to: WorkerId(1) };
    let good = frame::encode_hello(&hello);
    let mut version = good.clone();
    version[4..8].copy_from_slice(&(PROTOCOL_VERSION + 1).to_le_bytes());
    let mut flipped = good.clone();
    flipped[frame::PREFIX + 3] ^= 1;
    let mut endless = good.clone();
    endless[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
    let crc = crc32c::crc32c(&endless[..44]).to_le_bytes();
    endless[44..48].copy_from_slice(&crc);
    let header = FrameHeader { generation: G1, from: WorkerId(3), message: vote(1) };
    vec![
        (
            b"GET / HTTP/1.1\r\nHost: caravan.example:7070\r\nAccept: */*\r\n\r\n".to_vec(),
            "something else speaks",
        ),
        (version, "speaks protocol"),
        (flipped, "checksum of the body"),
        (endless, "body of 4294967295 bytes"),
        (frame::encode_hello(&Hello { run: Digest([8; 32]), ..hello }), "belongs to the run 0808"),
        (frame::encode_hello(&Hello { to: WorkerId(9), ..hello }), "looks for w9"),
        (frame::encode_hello(&Hello { generation: Generation(0), ..hello }), "generation g0 is over"),
        (good, "w3 is no member of g1"),
        (frame::encode_hello(&Hello { from: WorkerId(2), ..hello }), "w2 already has a connection"),
        (frame::encode(&header, &[]).unwrap(), "does not say who it is"),
    ]
}

#[tokio::test]
async fn strangers_are_turned_away_with_a_reason_and_nobody_else_notices() {
    let log = Log::default();
    let _guard = log.listen();
    let ((mut a, at_a), (b, _)) = pair(LONG).await;
    a.fence(G1);
    say(&b, 1, vote(1));
    hear(&mut a).await;
    for (bytes, reason) in strange() {
        let mut stranger = TcpStream::connect(&at_a.fabric).await.unwrap();
        let address = stranger.local_addr().unwrap();
        stranger.write_all(&bytes).await.unwrap();
        during(&mut a, turned_away(&mut stranger)).await;
        assert_eq!(log.lines(&[&format!("peer={address}"), reason]), 1, "{address} {reason}\n{}", log.text());
    }
    say(&b, 1, vote(2));
    assert_eq!(hear(&mut a).await.2, vote(2));
}

#[tokio::test]
async fn a_stranger_that_says_nothing_is_turned_away_after_the_budget() {
    let (mut a, at_a) = fabric(1, SHORT).await;
    let mut mute = TcpStream::connect(&at_a.fabric).await.unwrap();
    during(&mut a, turned_away(&mut mute)).await;
}

/// What a member sends that no member should.
fn broken(a: &Fabric) -> Vec<(Vec<u8>, &'static str)> {
    let header = |message| FrameHeader { generation: G1, from: WorkerId(2), message };
    let whole = |header: &FrameHeader, values: &[f32]| {
        let payload: &[u8] = bytemuck::cast_slice(values);
        [frame::encode(header, payload).unwrap(), payload.to_vec()].concat()
    };
    let values = payload(a, 0);
    let mut flipped = whole(&header(PeerMessage::Data(weights(0))), &values);
    let last = flipped.len() - 1;
    flipped[last] ^= 0x40;
    let (gradient, state) = (Checksum(0), SliceSum::default());
    let slice = |i| SliceVote { slice: SliceId(i), norms: vec![0.0; 60], gradient, state };
    let many = Prepared {
        step: Step(1),
        slices: (0..99).map(slice).collect(),
        weights: Opinion(0),
        lanes: Vec::new(),
        stop_for: None,
    };
    vec![
        (flipped, "checksum of the payload"),
        (whole(&header(PeerMessage::Data(weights(0))), &values[1..]), "came with"),
        (whole(&header(PeerMessage::Data(weights(9999))), &values), "is not of this model"),
        (whole(&header(PeerMessage::Prepared(many)), &[]), "this run's have at most"),
        (whole(&FrameHeader { from: WorkerId(3), ..header(vote(1)) }, &[]), "did not introduce itself"),
        (whole(&FrameHeader { generation: G2, ..header(vote(1)) }, &[]), "did not introduce itself"),
        (hello_of(2), "a second time"),
        (b"rubbish".repeat(20), "something else speaks"),
    ]
}

fn hello_of(worker: u64) -> Vec<u8> {
    let (run, from, to) = (Digest([7; 32]), WorkerId(worker), WorkerId(1));
    frame::encode_hello(&Hello { run, generation: G1, from, to })
}

#[tokio::test]
async fn a_member_that_sends_rubbish_is_lost_and_the_others_are_not() {
    let (sample, _) = fabric(1, LONG).await;
    for (bytes, reason) in broken(&sample) {
        let log = Log::default();
        let _guard = log.listen();
        let ((mut a, at_a), (mut c, at_c)) = (fabric(1, LONG).await, fabric(3, LONG).await);
        // Stays open, so that nothing but the rubbish can be what loses the member.
        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let member = Member { worker: WorkerId(2), fabric: silent.local_addr().unwrap().to_string() };
        a.connect(G1, vec![member, at_c]);
        c.connect(G1, vec![at_a.clone()]);
        let mut stream = TcpStream::connect(&at_a.fabric).await.unwrap();
        stream.write_all(&[hello_of(2), bytes].concat()).await.unwrap();
        assert_eq!(loses(&mut a).await, (G1, WorkerId(2)), "{reason}");
        assert!(log.text().contains(reason), "{reason}\n{}", log.text());
        say(&c, 1, vote(1));
        assert_eq!(hear(&mut a).await.1, WorkerId(3), "{reason}");
    }
}

/// Waits for the end of a connection that the other side closes.
async fn turned_away(stranger: &mut TcpStream) {
    // Bytes that were not read make it a reset.
    let end = timeout(LONG, stranger.read(&mut [0])).await.unwrap();
    assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
}
