//! A worker that is asked to go while it still looks for its coordinator goes.
//!
//! A signal is for the whole process, so this test has one of its own.

use caravan_types::message::Farewell;
use caravan_worker::{Exit, Options, run};
use std::process::Command;
use tokio::net::TcpListener;

#[tokio::test]
async fn a_worker_that_was_not_taken_on_yet_leaves_at_once() {
    // Accepts and never answers, so that nothing but the signal can end the worker; and once
    // it was dialled, the worker listens to signals.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let options = Options {
        coordinator: silent.local_addr().unwrap().to_string(),
        listen: "127.0.0.1:0".parse().unwrap(),
        threads: 1,
        memory: None,
        speed: None,
        name: None,
        advertise: None,
    };
    let worker = tokio::spawn(run(options));
    let _dialled = silent.accept().await.unwrap();
    let kill = Command::new("sh").args(["-c", &format!("kill -TERM {}", std::process::id())]).status();
    assert!(kill.unwrap().success());
    let ended = worker.await.unwrap();
    assert!(matches!(ended, Ok(Farewell::Left)), "{ended:?}");
    assert_eq!(Exit::from(&ended), Exit::Good);
}
