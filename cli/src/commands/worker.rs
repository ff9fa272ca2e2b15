//! `caravan worker`: one worker process, which joins a running coordinator.

use crate::say;
use crate::telemetry::{self, LogTarget};
use caravan_types::message::{Farewell, SPEEDS};
use caravan_worker::{Exit, Flaw, Options};
use std::io::{self, BufRead as _};
use std::net::SocketAddr;
use std::process::ExitCode;

/// Why others go on without a worker that lives, and what to do.
const FENCED: &str = "it was stopped, cut off, or stood still for longer than the failure budget, and the \
                      coordinator's events say which. Start it again, and it joins anew";

/// What the subcommand takes.
#[derive(clap::Args)]
pub struct Args {
    /// The coordinator's host and port, as it prints them.
    #[arg(long, value_name = "ADDRESS")]
    join: String,
    /// Where to listen for other workers; port 0 takes a free one.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Where other workers reach this one, where that is not where it listens: behind NAT or a
    /// proxy.
    #[arg(long, value_name = "HOST:PORT", value_parser = reachable)]
    advertise: Option<String>,
    /// Compute threads; as many as there are cores by default.
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Memory that it may use, in bytes; what it does not say does not limit what it is given.
    #[arg(long, value_name = "BYTES")]
    memory: Option<u64>,
    /// How fast it computes, relative to one ordinary core; the number of its threads by default.
    #[arg(long, value_name = "X", value_parser = speed)]
    speed: Option<f64>,
    /// A name for people; host and process by default.
    #[arg(long)]
    name: Option<String>,
    /// End when standard input does, as it does with the process that started this one. What
    /// that says in it goes wrong: `memory`, `sum` or `update` with the number of a bit, a line
    /// each.
    #[arg(long, hide = true)]
    tether: bool,
}

/// An address that others can dial.
fn reachable(text: &str) -> Result<String, String> {
    match text.rsplit_once(':').map(|(host, port)| (host, port.parse::<u16>())) {
        Some((host, Ok(1..))) if !host.is_empty() => Ok(text.to_owned()),
        _ => Err("must be a host and a port, such as 203.0.113.7:4400".to_owned()),
    }
}

/// A speed that the coordinator takes.
fn speed(text: &str) -> Result<f64, String> {
    let speed: f64 = text.parse().map_err(|_| "must be a number, such as 4 or 0.5".to_owned())?;
    if SPEEDS.contains(&speed) {
        return Ok(speed);
    }
    Err(format!("must be from {:e} to {:e}", SPEEDS.start(), SPEEDS.end()))
}

/// Works until told to end. The exit code says whether it helps to start it again.
pub fn run(args: &Args) -> Result<ExitCode, Box<dyn std::error::Error + Send + Sync>> {
    let telemetry = telemetry::init("worker", &LogTarget::Stderr)?;
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    let options = Options {
        coordinator: args.join.trim_start_matches("http://").to_owned(),
        listen: args.listen,
        advertise: args.advertise.clone(),
        threads: args.threads.unwrap_or_else(cores).max(1),
        memory: args.memory,
        speed: args.speed,
        name: args.name.clone(),
    };
    // One thread moves messages; the engine computes on its own.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let ended = runtime.block_on(async {
        let (orders, flaws) = tokio::sync::mpsc::channel(FLAWS);
        tokio::select! {
            ended = caravan_worker::run_with(options, flaws) => Some(ended),
            () = snapped(orders), if args.tether => None,
        }
    });
    match &ended {
        Some(Ok(Farewell::Fenced)) => say(&format!("ending: {}; {FENCED}", Farewell::Fenced)),
        Some(Ok(farewell)) => say(&format!("ending: {farewell}")),
        Some(Err(error)) => say(&format!("error: {error}")),
        None => say("error: the process that started this worker is gone, and nobody would look after it"),
    }
    drop(telemetry);
    // The engine may be in the middle of a step that nobody wants any more.
    runtime.shutdown_background();
    Ok(ExitCode::from(ended.as_ref().map_or(Exit::CoordinatorGone, Exit::from) as u8))
}

/// Things that are still to go wrong; whoever orders them waits for what comes of one.
const FLAWS: usize = 16;

/// Waits for the end of standard input, and hands on what is said in it: on a thread of its
/// own, as reading it cannot be given up.
async fn snapped(orders: tokio::sync::mpsc::Sender<Flaw>) {
    let (sender, ended) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        for line in io::stdin().lock().lines().map_while(Result::ok) {
            match line.parse() {
                // A worker that ends takes no more.
                Ok(flaw) => _ = orders.blocking_send(flaw),
                Err(error) => tracing::warn!(error, "standard input says what cannot be done"),
            }
        }
        // Nobody waits for it where the worker has ended.
        sender.send(()).ok();
    });
    ended.await.ok();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_cannot_dial_is_not_advertised() {
        for good in ["203.0.113.7:4400", "gpu-3.example.org:1", "[2001:db8::1]:4400"] {
            assert_eq!(reachable(good).as_deref(), Ok(good));
        }
        for bad in ["", "203.0.113.7", ":4400", "host:0", "host:http", "host:70000"] {
            assert!(reachable(bad).is_err(), "{bad}");
        }
    }
}
