//! Every value survives the wire, and no bytes from outside make a receiver panic.

use crate::error::{Malformed, Why};
use crate::limits::{MAX_SLICES, MAX_TEXT};
use crate::strategies::*;
use crate::{Down, Up, pb};
use caravan_types::message::{FromWorker, ToWorker};
use caravan_types::status::{LoggedEvent, Phase, Snapshot};
use caravan_types::{Generation, Plan, RunSpec, Step};
use proptest::prelude::*;
use prost::Message;

/// Out through the bytes of `W`, and in again.
fn through<T, W>(value: T) -> Result<T, Malformed>
where
    W: Message + Default + From<T>,
    T: TryFrom<W, Error = Malformed>,
{
    T::try_from(W::decode(W::from(value).encode_to_vec().as_slice()).unwrap())
}

proptest! {
    #[test]
    fn what_a_worker_says_survives(hello in hello(), message in from_worker()) {
        prop_assert_eq!(through::<Up, pb::FromWorker>(Up::Hello(hello.clone())), Ok(Up::Hello(hello)));
        prop_assert_eq!(through::<Up, pb::FromWorker>(message.clone().into()), Ok(Up::Message(message)));
    }

    #[test]
    fn what_the_coordinator_says_survives(
        welcome in welcome(), refusal in refusal(), message in to_worker(),
    ) {
        for down in [Down::from(welcome), refusal.into(), message.into()] {
            prop_assert_eq!(through::<Down, pb::ToWorker>(down.clone()), Ok(down));
        }
    }

    #[test]
    fn what_people_are_shown_survives(snapshot in snapshot(), event in logged_event(), phase in phase()) {
        prop_assert_eq!(through::<Snapshot, pb::Snapshot>(snapshot.clone()), Ok(snapshot));
        prop_assert_eq!(through::<LoggedEvent, pb::LoggedEvent>(event.clone()), Ok(event));
        prop_assert_eq!(through::<Phase, pb::DrainReply>(phase), Ok(phase));
    }

    /// N-1 stands on this: a learning rate that changes its last bit on the way is another run.
    #[test]
    fn a_run_spec_keeps_every_bit(spec in run_spec()) {
        let got = RunSpec::try_from(pb::RunSpec::from(&spec)).unwrap();
        prop_assert_eq!(got.recipe.learning_rate.to_bits(), spec.recipe.learning_rate.to_bits());
        prop_assert_eq!(got.model.rope_theta.to_bits(), spec.model.rope_theta.to_bits());
        prop_assert_eq!(got, spec);
    }

    #[test]
    fn rubbish_does_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        read_all(&bytes);
    }

    /// Damage to a valid message gets past protobuf, and reaches the checks behind it.
    #[test]
    fn damaged_messages_do_not_panic(
        up in from_worker(), down in to_worker(), event in logged_event(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let messages = [
            pb::FromWorker::from(up).encode_to_vec(),
            pb::ToWorker::from(down).encode_to_vec(),
            pb::LoggedEvent::from(event).encode_to_vec(),
        ];
        for mut bytes in messages {
            for (at, byte) in &damage {
                let at = at.index(bytes.len());
                bytes[at] = *byte;
            }
            read_all(&bytes);
        }
    }
}

/// Reads bytes as everything that comes from outside. What is taken in spite of all can be
/// said again: reading is the inverse of writing.
fn read_all(bytes: &[u8]) {
    if let Ok(Ok(up)) = pb::FromWorker::decode(bytes).map(Up::try_from) {
        assert!(through::<Up, pb::FromWorker>(up).is_ok());
    }
    if let Ok(Ok(down)) = pb::ToWorker::decode(bytes).map(Down::try_from) {
        assert!(through::<Down, pb::ToWorker>(down).is_ok());
    }
    if let Ok(Ok(snapshot)) = pb::Snapshot::decode(bytes).map(Snapshot::try_from) {
        assert!(through::<Snapshot, pb::Snapshot>(snapshot).is_ok());
    }
    if let Ok(Ok(event)) = pb::LoggedEvent::decode(bytes).map(LoggedEvent::try_from) {
        assert!(through::<LoggedEvent, pb::LoggedEvent>(event).is_ok());
    }
}

fn save(bounds: &[u32]) -> Result<Down, Malformed> {
    let slices = Some(pb::SliceSet { bounds: bounds.to_vec() });
    let save = pb::Save { generation: 1, step: 1, slices };
    pb::ToWorker { message: Some(pb::to_worker::Message::Save(save)) }.try_into()
}

#[test]
fn a_slice_set_that_is_none_is_refused() {
    let at = |why: Why| Err(why.at("Save.slices"));
    assert!(save(&[]).is_ok());
    assert!(save(&[0, 4, 5, 7]).is_ok());
    assert_eq!(save(&[0]), at(Why::HalfRange));
    assert_eq!(save(&[4, 4]), at(Why::NotAscending));
    assert_eq!(save(&[0, 4, 4, 7]), at(Why::NotAscending));
    assert_eq!(save(&[5, 7, 0, 4]), at(Why::NotAscending));
    let limit = u64::from(MAX_SLICES);
    assert_eq!(save(&[0, u32::MAX]), at(Why::TooLarge { is: u32::MAX.into(), limit }));
}

fn transfer(to: u64, bounds: Vec<u32>) -> pb::Transfer {
    pb::Transfer {
        to,
        from: Some(pb::transfer::From::Peer(1)),
        part: pb::Part::State.into(),
        slices: Some(pb::SliceSet { bounds }),
    }
}

/// A few bytes a transfer must not become megabytes of bitmap each.
#[test]
fn a_plan_whose_transfers_would_expand_to_billions_is_refused_before_they_do() {
    let owners = vec![pb::Owners { workers: vec![] }; 1 << 16];
    let transfers = vec![transfer(2, vec![0, 1 << 16]); (1 << 14) + 1];
    let plan = pb::Plan { generation: 1, owners, transfers, ..pb::Plan::default() };
    let limit = 1 << 30;
    let why = Why::TooLarge { is: limit + (1 << 16), limit };
    assert_eq!(Plan::try_from(plan), Err(why.at("Plan.transfers")));
}

#[test]
fn a_transfer_of_slices_that_the_model_does_not_have_is_refused() {
    let owners = vec![pb::Owners { workers: vec![1] }; 3];
    let plan = |bounds| pb::Plan {
        generation: 1,
        owners: owners.clone(),
        transfers: vec![transfer(1, bounds)],
        ..pb::Plan::default()
    };
    assert!(Plan::try_from(plan(vec![0, 3])).is_ok());
    let why = Why::TooLarge { is: 4, limit: 3 };
    assert_eq!(Plan::try_from(plan(vec![0, 4])), Err(why.at("Transfer.slices")));
}

#[test]
fn members_that_do_not_ascend_are_refused() {
    let member = |worker| pb::Member { worker, fabric: String::new() };
    let plan = pb::Plan { members: vec![member(2), member(2)], ..pb::Plan::default() };
    assert_eq!(Plan::try_from(plan), Err(Why::NotAscending.at("Plan.members")));
}

#[test]
fn an_unknown_variant_and_one_that_is_not_set_are_refused() {
    for value in [0, 99, -1] {
        let beat = pb::Heartbeat { applied: 1, activity: value, ..pb::Heartbeat::default() };
        let up = pb::FromWorker { message: Some(pb::from_worker::Message::Heartbeat(beat)) };
        assert_eq!(Up::try_from(up), Err(Why::UnknownVariant(value).at("Heartbeat.activity")));
    }
    let empty = pb::FromWorker { message: None };
    assert_eq!(Up::try_from(empty), Err(Why::Missing.at("FromWorker.message")));
}

#[test]
fn a_peak_that_would_make_utilisation_anything_but_a_number_is_refused() {
    let peak = pb::Peak { thread: 1e11, threads: 2, cores: 4, place: "here 0-3".into() };
    let read = |peak| Up::try_from(pb::FromWorker { message: Some(pb::from_worker::Message::Peak(peak)) });
    assert!(read(peak.clone()).is_ok());
    for thread in [0.0, -1.0, f64::INFINITY, f64::NAN] {
        assert_eq!(read(pb::Peak { thread, ..peak.clone() }), Err(Why::NotASpeed.at("Peak.thread")));
    }
    let none = pb::Peak { threads: 0, ..peak.clone() };
    assert_eq!(read(none), Err(Why::Missing.at("Peak.threads")));
    assert_eq!(read(pb::Peak { cores: 0, ..peak }), Err(Why::Missing.at("Peak.cores")));
}

#[test]
fn a_run_spec_of_another_version_or_with_an_unknown_key_is_refused() {
    let another = pb::RunSpec { version: 1, json: b"{}".to_vec() };
    assert_eq!(RunSpec::try_from(another), Err(Why::Version { is: 1, must: 2 }.at("RunSpec.version")));
    let unknown = pb::RunSpec { version: 2, json: br#"{"version":2,"colour":"red"}"#.to_vec() };
    let error = RunSpec::try_from(unknown).unwrap_err();
    assert!(error.to_string().contains("unknown field `colour`"), "{error}");
}

/// The reason that a disk gives must arrive, even a long one that ends within a character.
#[test]
fn a_reason_that_is_too_long_is_cut_rather_than_refused() {
    let reason = "é".repeat(MAX_TEXT);
    let saved =
        FromWorker::Saved { generation: Generation(1), step: Step(1), part: Err(format!("x{reason}")) };
    let Ok(Up::Message(FromWorker::Saved { part: Err(got), .. })) = pb::FromWorker::from(saved).try_into()
    else {
        panic!("the message was refused");
    };
    assert_eq!(got.len(), MAX_TEXT - 1);
    assert!(reason.starts_with(&got[1..]));
}

#[test]
fn an_opening_message_is_taken_at_its_place_only() {
    let leaving = Up::Message(FromWorker::Leaving);
    assert_eq!(leaving.clone().hello(), Err(Why::OutOfPlace.at("FromWorker.message")));
    assert_eq!(leaving.message(), Ok(FromWorker::Leaving));
    let stop = ToWorker::Stop { generation: Generation(1), boundary: false };
    assert_eq!(Down::Message(stop).answer(), Err(Why::OutOfPlace.at("ToWorker.message")));
    let refused = Down::Refused(caravan_types::message::Refusal::NotTaking);
    assert_eq!(refused.message(), Err(Why::OutOfPlace.at("ToWorker.refused")));
}
