//! Real processes: the `caravan` binary, started as a user starts it.

use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// No test waits longer than this for anything to be heard: two cores that also build something else
/// need a few seconds for what takes one.
const PATIENCE: Duration = Duration::from_secs(120);

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(5);

/// The release binary, built from the sources as they are.
///
/// # Panics
/// Where it cannot be built.
pub fn caravan() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--release", "--locked", "--quiet", "-p", "caravan"]).current_dir(&workspace);
        assert!(build.status().unwrap().success(), "the release binary does not build");
        // This test lies in TARGET/PROFILE/deps.
        let test = std::env::current_exe().unwrap();
        test.ancestors().nth(3).unwrap().join("release/caravan")
    })
}

/// A folder with a run file of a tiny model and some text to train on.
pub struct Place {
    /// The folder; it goes away with this.
    pub dir: tempfile::TempDir,
}

impl Place {
    /// Makes the folder.
    ///
    /// # Panics
    /// Where the disk refuses.
    #[must_use]
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("run.toml"), RUN_FILE).unwrap();
        std::fs::write(dir.path().join("text.txt"), text()).unwrap();
        Self { dir }
    }

    /// `caravan` with these arguments, in this folder.
    #[must_use]
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(caravan());
        command.args(args).current_dir(self.dir.path()).stdin(Stdio::null());
        command.env_remove("CARAVAN_LOG").env_remove("RUST_LOG");
        command
    }

    /// Runs a command to its end.
    ///
    /// # Panics
    /// Where it does not end.
    #[must_use]
    pub fn run(&self, args: &[&str]) -> Ended {
        Running::start(self.command(args)).end()
    }

    /// Starts `train` with this folder for the run.
    #[must_use]
    pub fn train(&self, run: &str, args: &[&str]) -> Running {
        let all: Vec<&str> = ["train", "run.toml", "--run", run].iter().chain(args).copied().collect();
        Running::start(self.command(&all))
    }

    /// What the coordinator of a run says at a path, once it has been started.
    ///
    /// # Panics
    /// Where there is no coordinator after a while.
    #[must_use]
    pub fn get(&self, run: &str, path: &str) -> Value {
        until(&format!("an answer of {run} to {path}"), || http(&self.address(run)?, path))
    }

    /// Where the coordinator of a run listens, if it runs.
    #[must_use]
    pub fn address(&self, run: &str) -> Option<String> {
        let url = std::fs::read_to_string(self.dir.path().join(run).join("address")).ok()?;
        Some(url.trim().strip_prefix("http://")?.to_owned())
    }

    /// Waits until a run has committed so many steps.
    ///
    /// # Panics
    /// Where it does not get there.
    pub fn reach(&self, run: &str, step: u64) {
        self.until_at_least(run, "step", step);
    }

    /// Waits until the checkpoint of this step, or a later one, is written.
    ///
    /// # Panics
    /// Where it is not.
    pub fn save(&self, run: &str, step: u64) {
        self.until_at_least(run, "checkpoint", step);
    }

    fn until_at_least(&self, run: &str, key: &str, least: u64) {
        until(&format!("{key} {least} of {run}"), || {
            let snapshot = http(&self.address(run)?, "/api/snapshot")?;
            (snapshot[key].as_u64()? >= least).then_some(())
        });
    }
}

impl Default for Place {
    fn default() -> Self {
        Self::new()
    }
}

/// Small enough for a hundred steps in seconds, large enough that they are not over before a
/// test can do something about them.
const RUN_FILE: &str = r#"name = "tiny"
seed = 7
[model]
dim = 64
layers = 4
heads = 4
kv_heads = 2
hidden = 192
vocab = 320
context = 128
[data]
paths = ["text.txt"]
[batch]
lanes = 8
sequence_length = 128
[recipe]
steps = 50
warmup_steps = 5
learning_rate = 1e-3
[cluster]
workers = 2
threads = 1
checkpoint_every = 10
listen = "127.0.0.1:0"
"#;

/// A few hundred kilobytes of text that is neither constant nor noise.
fn text() -> String {
    let words =
        ["caravan", "moves", "on", "the", "weights", "come", "out", "with", "same", "bits", "step", "42"];
    let mut text = String::new();
    let mut x = 1u64;
    for line in 0..6000 {
        for _ in 0..9 {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            text.push_str(words[(x >> 33) as usize % words.len()]);
            text.push(' ');
        }
        text.push_str(&format!("{line}\n"));
    }
    text
}

/// A process whose output is being read.
pub struct Running {
    child: Child,
    lines: Receiver<String>,
    seen: Vec<String>,
    stdout: Option<JoinHandle<String>>,
}

/// A process that has ended.
#[derive(Debug)]
pub struct Ended {
    /// How.
    pub status: ExitStatus,
    /// All of its standard output.
    pub stdout: String,
    /// All of its standard error.
    pub stderr: String,
}

impl Running {
    /// Starts a process.
    ///
    /// # Panics
    /// Where it cannot be started.
    #[must_use]
    pub fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut out = child.stdout.take().unwrap();
        let err = BufReader::new(child.stderr.take().unwrap());
        let stdout = std::thread::spawn(move || {
            let mut text = String::new();
            out.read_to_string(&mut text).unwrap();
            text
        });
        let (sender, lines) = channel();
        std::thread::spawn(move || err.lines().map_while(Result::ok).try_for_each(|l| sender.send(l)));
        Self { child, lines, seen: Vec::new(), stdout: Some(stdout) }
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The processes that it has started and that live, oldest first.
    ///
    /// # Panics
    /// Where it is gone.
    #[must_use]
    pub fn children(&self) -> Vec<u32> {
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap();
        let lists = threads.filter_map(|t| std::fs::read_to_string(t.ok()?.path().join("children")).ok());
        let mut children: Vec<u32> = lists
            .flat_map(|l| l.split_whitespace().filter_map(|p| p.parse().ok()).collect::<Vec<_>>())
            .collect();
        children.sort_unstable();
        children
    }

    /// Waits for a line on standard error with this in it.
    ///
    /// # Panics
    /// Where it ends, or a long time passes, without it.
    pub fn wait_for(&mut self, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    self.seen.push(line.clone());
                    if line.contains(text) {
                        return line;
                    }
                }
                Err(e) => panic!("no {text:?} ({e}) in:\n{}", self.seen.join("\n")),
            }
        }
    }

    /// Sends it a signal, such as "KILL".
    pub fn signal(&self, signal: &str) {
        kill(self.pid(), signal);
    }

    /// Waits until it has ended: for as long as it says something now and then, since a whole run on
    /// a machine that does much else may take any time.
    ///
    /// # Panics
    /// Where it falls silent and does not end.
    #[must_use]
    pub fn end(mut self) -> Ended {
        let (began, mut heard) = (Instant::now(), Instant::now());
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            let before = self.seen.len();
            self.seen.extend(self.lines.try_iter());
            if self.seen.len() > before {
                heard = Instant::now();
            }
            let said = || self.seen.join("\n");
            assert!(heard.elapsed() < PATIENCE, "silent for {PATIENCE:?} since:\n{}", said());
            assert!(began.elapsed() < 10 * PATIENCE, "no end of it:\n{}", said());
            std::thread::sleep(PAUSE);
        };
        self.seen.extend(self.lines.iter());
        let stdout = self.stdout.take().map_or_else(String::new, |t| t.join().unwrap());
        Ended { status, stdout, stderr: self.seen.join("\n") }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Gone already where the test came to its end.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Ended {
    /// The hash on the last line of standard output.
    ///
    /// # Panics
    /// Where it failed or there is none.
    #[must_use]
    pub fn weights(&self) -> String {
        assert!(self.status.success(), "{self:?}");
        let last = self.stdout.lines().last().unwrap_or_default();
        last.strip_prefix("weights: ").unwrap_or_else(|| panic!("no weights: {self:?}")).to_owned()
    }

    /// What it said of its failure.
    ///
    /// # Panics
    /// Where it did not fail by itself.
    #[must_use]
    pub fn error(&self) -> &str {
        assert!(!self.status.success() && self.status.signal().is_none(), "{self:?}");
        assert!(!self.stderr.contains("panicked"), "{self:?}");
        &self.stderr
    }
}

/// Sends a process a signal.
///
/// # Panics
/// Where there is no `kill`.
pub fn kill(pid: u32, signal: &str) {
    Command::new("kill").args([&format!("-{signal}"), &pid.to_string()]).status().unwrap();
}

/// Asks again and again, until there is an answer.
///
/// # Panics
/// Where there is none for a long time.
pub fn until<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "waited {PATIENCE:?} for {what}");
        std::thread::sleep(PAUSE);
    }
}

/// One GET request; none where nobody answers or the answer is no JSON.
#[must_use]
pub fn http(address: &str, path: &str) -> Option<Value> {
    let mut stream = TcpStream::connect(address).ok()?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").ok()?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).ok()?;
    let answer = String::from_utf8(answer).ok()?;
    let (_, body) = answer.split_once("\r\n\r\n")?;
    serde_json::from_str(body).ok()
}
