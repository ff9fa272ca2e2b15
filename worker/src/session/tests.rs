//! Sessions with a coordinator over a real socket.

use super::*;
use crate::Options;
use crate::error::Exit;
use crate::stub::Stub;
use caravan_types::message::{Activity, Farewell, PROTOCOL_VERSION, Refusal};
use caravan_types::progress::{EngineProgress, Wait};
use caravan_types::{
    BatchShape, DataSpec, Digest, Generation, ModelShape, NumericsClass, Precision, Recipe, RunSpec, Step,
    WorkerId,
};
use tokio::net::TcpListener;

/// Joining takes up to a minute: enough for a loaded machine, where nothing waits for it to pass.
const LONG: Timing = Timing::from_millis(6000);

/// Joining is given up after a second.
const SHORT: Timing = Timing::from_millis(100);

fn hello() -> Hello {
    Hello {
        protocol: PROTOCOL_VERSION,
        build: "0.1.0".into(),
        name: "test".into(),
        host: "here".into(),
        fabric: "127.0.0.1:1".into(),
        families: vec!["portable".into()],
        threads: 1,
        resume: None,
        memory: 0,
        speed: 1.0,
    }
}

fn welcome() -> Welcome {
    let spec = RunSpec {
        version: caravan_types::run_spec::RUN_SPEC_VERSION,
        name: "run".into(),
        model: ModelShape::preset("260k").unwrap(),
        data: DataSpec { digest: Digest([1; 32]), tokens: 1000 },
        batch: BatchShape { lanes: 2, micro_batches: 1, sequences: 1, sequence_length: 8 },
        recipe: Recipe::default(),
        init: caravan_types::Initial::Seed,
        seed: 1,
        numerics: NumericsClass { precision: Precision::Fp32, family: "portable".into() },
    };
    Welcome {
        worker: WorkerId(5),
        spec,
        redundancy: 2,
        timing: Timing::from_millis(3000),
        checkpoint_every: 0,
        data: "data".into(),
        checkpoints: "checkpoints".into(),
        init: None,
        committed: Step(0),
    }
}

fn exit(error: WorkerError) -> Exit {
    Exit::from(&Err(error))
}

#[tokio::test]
async fn a_worker_that_is_taken_on_talks_and_listens() {
    let mut stub = Stub::start().await;
    let (address, hello) = (stub.address.clone(), hello());
    let join = Session::join(&address, &hello, LONG);
    let (joined, (mut talk, heard)) = tokio::join!(join, stub.take_on(welcome()));
    let (mut session, welcomed) = joined.map_err(|e| e.to_string()).unwrap();
    assert_eq!((heard, welcomed), (hello.clone(), welcome()));

    let beat = FromWorker::Heartbeat {
        applied: Step(3),
        activity: Activity::Computing,
        wait: Wait::Engine,
        engine: EngineProgress::default(),
    };
    session.tell(beat.clone());
    assert_eq!(talk.hear().await, Some(Up::Message(beat)));
    let stop = ToWorker::Stop { generation: Generation(2), boundary: true };
    talk.say(stop.clone()).await;
    assert_eq!(session.next().await.unwrap(), Said::Message(stop));

    session.tell(FromWorker::Leaving);
    let close = tokio::spawn(session.close());
    assert_eq!(talk.hear().await, Some(Up::Message(FromWorker::Leaving)), "said before the end, so heard");
    assert_eq!(talk.hear().await, None);
    close.await.unwrap();
}

#[tokio::test]
async fn a_refused_worker_says_why_and_is_not_to_be_started_again() {
    let refusals = [
        (Refusal::Protocol { ours: 2, theirs: 1 }, "speaks protocol 2, this worker 1"),
        (
            Refusal::Numerics { needed: "avx512".into(), offered: vec!["avx2".into()] },
            "needs the instruction family",
        ),
        (Refusal::NotTaking, "takes no more workers"),
    ];
    for (refusal, words) in refusals {
        let mut stub = Stub::start().await;
        let (address, hello) = (stub.address.clone(), hello());
        let refuse = async {
            let mut talk = stub.session().await;
            talk.hear().await.unwrap().hello().unwrap();
            talk.say(refusal).await;
            talk
        };
        let (joined, _talk) = tokio::join!(Session::join(&address, &hello, LONG), refuse);
        let error = joined.err().unwrap();
        assert!(error.to_string().contains(words), "{error}");
        assert_eq!(exit(error), Exit::Refused);
    }
}

#[tokio::test]
async fn a_worker_that_comes_when_the_run_is_finished_has_done_its_work() {
    let mut stub = Stub::start().await;
    let options = Options {
        coordinator: stub.address.clone(),
        listen: "127.0.0.1:0".parse().unwrap(),
        advertise: None,
        threads: 1,
        memory: None,
        speed: None,
        name: None,
    };
    let refuse = async {
        let mut talk = stub.session().await;
        talk.hear().await.unwrap().hello().unwrap();
        talk.say(Refusal::Over(Farewell::Finished)).await;
        talk
    };
    let (ended, _talk) = tokio::join!(crate::run(options), refuse);
    assert_eq!(Exit::from(&ended), Exit::Good, "{ended:?}");
}

#[tokio::test]
async fn a_coordinator_that_starts_late_is_found_and_one_that_does_not_is_named() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let (text, hello) = (address.to_string(), hello());
    let error = Session::join(&text, &hello, SHORT).await.err().unwrap();
    assert!(error.to_string().contains(&text) && error.to_string().contains("Check the address"), "{error}");
    assert_eq!(exit(error), Exit::CoordinatorGone);

    let late = async {
        tokio::task::yield_now().await;
        let mut stub = Stub::at(TcpListener::bind(address).await.unwrap());
        let talk = stub.take_on(welcome()).await;
        (stub, talk)
    };
    let (joined, _late) = tokio::join!(Session::join(&text, &hello, LONG), late);
    assert!(joined.is_ok());
}

#[tokio::test]
async fn what_accepts_connections_and_says_nothing_is_given_up() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = silent.local_addr().unwrap().to_string();
    let error = Session::join(&address, &hello(), SHORT).await.err().unwrap();
    assert!(matches!(error, WorkerError::Unreachable { .. }), "{error}");
}

#[tokio::test]
async fn an_address_that_is_none_is_not_tried_twice() {
    for address in ["", "nowhere", "host:port", "http://host:1", ":1"] {
        let error = Session::join(address, &hello(), LONG).await.err().unwrap();
        assert!(error.to_string().contains("HOST:PORT"), "{error}");
        assert_eq!(exit(error), Exit::Usage);
    }
}

#[tokio::test]
async fn a_coordinator_that_breaks_the_protocol_is_left() {
    let mut stub = Stub::start().await;
    let (address, hello) = (stub.address.clone(), hello());
    let rude = async {
        let mut talk = stub.session().await;
        talk.say(ToWorker::Goodbye(Farewell::Left)).await;
        talk
    };
    let (joined, _talk) = tokio::join!(Session::join(&address, &hello, LONG), rude);
    let error = joined.err().unwrap();
    assert!(matches!(error, WorkerError::Protocol { .. }), "{error}");
    assert_eq!(exit(error), Exit::Refused);

    let (joined, (mut talk, _)) =
        tokio::join!(Session::join(&address, &hello, LONG), stub.take_on(welcome()));
    let mut session = joined.map_err(|e| e.to_string()).unwrap().0;
    talk.say(welcome()).await;
    let error = session.next().await.err().unwrap();
    assert!(error.to_string().contains("broke the session's protocol"), "{error}");
}

#[tokio::test]
async fn a_coordinator_that_went_on_without_a_worker_says_so_and_the_worker_joins_anew() {
    let mut stub = Stub::start().await;
    let (address, hello) = (stub.address.clone(), hello());
    let (joined, (talk, _)) = tokio::join!(Session::join(&address, &hello, LONG), stub.take_on(welcome()));
    let mut session = joined.map_err(|e| e.to_string()).unwrap().0;
    drop(talk);
    assert!(matches!(session.next().await, Ok(Said::Lost(_))));
    let refuse = async {
        let mut talk = stub.session().await;
        talk.hear().await.unwrap().hello().unwrap();
        talk.say(Refusal::Fenced { worker: WorkerId(5), generation: Generation(9) }).await;
        talk
    };
    let (ended, _talk) = tokio::join!(session.next(), refuse);
    let error = ended.err().unwrap();
    assert!(error.to_string().contains("w5") && error.to_string().contains("g9"), "{error}");
    assert_eq!(exit(error), Exit::Fenced);
}

#[tokio::test]
async fn a_session_that_breaks_off_is_opened_again_with_the_same_id() {
    let ends = [(None, "closed the session"), (Some(Status::unavailable("no sense")), "no sense")];
    for (status, words) in ends {
        let mut stub = Stub::start().await;
        let (address, hello) = (stub.address.clone(), hello());
        let (joined, (mut talk, _)) =
            tokio::join!(Session::join(&address, &hello, LONG), stub.take_on(welcome()));
        let mut session = joined.map_err(|e| e.to_string()).unwrap().0;
        let peak = Peak { thread: 1e11, threads: 1, cores: 2, place: "here 0-1".into() };
        session.measured(peak.clone());
        assert_eq!(talk.hear().await, Some(Up::Message(FromWorker::Peak(peak.clone()))));
        if let Some(status) = status {
            talk.fail(status).await;
        }
        drop(talk);
        let Said::Lost(reason) = session.next().await.unwrap() else { panic!("not lost") };
        assert!(reason.contains(words), "{reason}");
        session.tell(FromWorker::Leaving);
        let (back, (mut talk, heard)) = tokio::join!(session.next(), stub.take_on(welcome()));
        assert_eq!(back.unwrap(), Said::Back(Box::new(welcome())));
        assert_eq!(heard.resume, Some(welcome().worker));
        let beat = FromWorker::Heartbeat {
            applied: Step(3),
            activity: Activity::Computing,
            wait: Wait::Engine,
            engine: EngineProgress::default(),
        };
        session.tell(beat.clone());
        let first = FromWorker::Peak(peak);
        assert_eq!(talk.hear().await, Some(Up::Message(first)), "another coordinator does not know it");
        assert_eq!(talk.hear().await, Some(Up::Message(beat)), "what was told to nobody is not kept");
    }
}
