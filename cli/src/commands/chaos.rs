//! `caravan chaos`: a quiet run, the same run with faults, and whether their bits are the same.

use crate::audit::audit;
use crate::chaos::quiet::Quiet;
use crate::chaos::report::{Background, Report, Verdict};
use crate::chaos::schedule::{Kind, Request, schedule};
use crate::chaos::watching::{self, Ended, Plan};
use crate::commands::train::train;
use crate::job::{self, Job};
use crate::telemetry::{self, LogTarget};
use crate::{Failure, Outcome, say};
use caravan_checkpoint::newest_intact;
use caravan_types::Digest;
use caravan_types::message::Farewell;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// What the subcommand takes.
#[derive(clap::Args)]
#[command(after_help = "\
The quiet run is in DIR/quiet and the one with faults in DIR/chaos, where DIR is that of --run, by default
.caravan/chaos/NAME-SEED. Faults, each done to one worker process of this machine:
  kill       SIGKILL; it is started again
  stop       SIGSTOP for longer than the failure budget (cluster.detect), then SIGCONT: it finds itself shut out,
             ends, is started again and joins
  slow       SIGSTOP and SIGCONT in turns, each pause well below the failure budget
  partition  its connections with its peers, with the coordinator, or with both carry nothing, one way or both ways,
             for longer than the failure budget, and then go on or break
  corrupt    one bit of its memory flips, or comes out wrong where it adds up gradients or updates weights
  disk       the next part of a checkpoint that it writes does not fit (a limit on the size of its files)
The exit code is 0 where the run finished, the hashes of the weights are equal and the audit holds.")]
pub struct Args {
    #[command(flatten)]
    job: job::Args,
    /// Decides everything that is random; taken from the clock and printed where none is given.
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// How many faults.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    faults: u32,
    /// Which kinds of faults.
    #[arg(
        long,
        value_name = "KIND,…",
        value_delimiter = ',',
        default_value = "kill,stop,slow,partition,corrupt"
    )]
    kinds: Vec<Kind>,
    /// Workers of the quiet run.
    #[arg(long, value_name = "N", default_value_t = 1)]
    quiet_workers: u32,
    /// Compare with this finished run of the same file, instead of making a quiet one.
    #[arg(long, value_name = "RUN", conflicts_with = "quiet_workers")]
    quiet: Option<PathBuf>,
    /// Do not wait with the next fault until the caravan has got over the last one. Faults of one
    /// worker may then end one another.
    #[arg(long)]
    pile_up: bool,
    /// Call the run stuck after so many seconds; by default, ten times as long as the quiet run
    /// took, and some for each fault.
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    patience: Option<u64>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Why a chaos run does not end well.
#[derive(Debug, thiserror::Error)]
enum ChaosError {
    #[error("{} exists: a chaos run begins anew. Give it another folder (--run DIR), or remove that one", .0.display())]
    Exists(PathBuf),
    #[error(
        "a disk that is full for one checkpoint needs one before the last: set cluster.checkpoint_every to less than \
         a fifth of the steps ({steps}), or leave disk out of --kinds"
    )]
    NoCheckpoint { steps: u64 },
    #[error("the quiet run did not finish, so there is nothing to compare with; {} has the details", .0.display())]
    NotQuiet(PathBuf),
    #[error("{0}")]
    NotStood(Verdict),
}

/// Runs it.
pub fn run(args: &Args, out: &mut dyn Write) -> Outcome {
    // Any number will do that is another one the next time.
    let clock =
        || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_millis() as u64 % 1_000_000);
    let seed = args.seed.unwrap_or_else(clock);
    let command = args.again(seed);
    say(&format!("seed {seed}; the same again: {command}"));
    let folder = args.folder(seed)?;
    let _telemetry = telemetry::init("coordinator", &LogTarget::File(log(&folder)?))?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;

    args.job.fits_here()?;
    let part = |workers, name: &str| job::Args { workers, run: Some(folder.join(name)), ..args.job.clone() };
    let mut chaos = Job::open(&part(args.job.workers, "chaos"))?;
    let request = args.request(seed, &chaos)?;
    let quiet = match &args.quiet {
        Some(run) => Quiet::read(run, &chaos)?,
        None => {
            let mut job = Job::open(&part(Some(args.quiet_workers), "quiet"))?;
            let begun = Instant::now();
            if runtime.block_on(train(&mut job))? != Farewell::Finished {
                return Err(ChaosError::NotQuiet(log(&folder)?).into());
            }
            let time = begun.elapsed();
            let weights = weights(&job)?.ok_or_else(|| ChaosError::NotQuiet(job.log.clone()))?;
            Quiet { weights, time }
        }
    };

    let detect = chaos.settings.cluster.timing.detect();
    let every = chaos.settings.cluster.checkpoint_every;
    let plan = Plan {
        faults: schedule(&request),
        last_disk: request
            .steps
            .saturating_sub(1)
            .checked_div(every)
            .map_or(0, |checkpoints| checkpoints * every),
        pile_up: args.pile_up,
        step: quiet.time.div_f64(request.steps.max(1) as f64),
        limit: args.patience.map_or_else(|| limit(quiet.time, detect, request.faults), Duration::from_secs),
    };
    let observed = runtime.block_on(watching::run(&mut chaos, &plan))?;
    let finished = matches!(observed.ended, Ended::Farewell(Farewell::Finished));
    let background = Background {
        seed,
        command,
        quiet,
        weights: if finished { self::weights(&chaos)? } else { None },
        audit: if finished { Some(audit(&chaos.run)?) } else { None },
    };
    tell(args, &Report::new(background, observed), out)
}

fn tell(args: &Args, report: &Report, out: &mut dyn Write) -> Outcome {
    if args.json {
        serde_json::to_writer_pretty(&mut *out, report)?;
        writeln!(out)?;
    } else {
        report.print(out)?;
    }
    match &report.verdict {
        Verdict::Equal => Ok(()),
        verdict => Err(ChaosError::NotStood(verdict.clone()).into()),
    }
}

/// The run is stuck after this. Workers that share cores step no faster than one, and a restart
/// takes from them what it needs, so ten times the quiet run; for each fault its own time (at
/// most 3 budgets), what the slowest detection takes (the same), and a restart; and a minute for
/// a machine that is busy with something else.
fn limit(quiet: Duration, detect: Duration, faults: u32) -> Duration {
    const BUSY: Duration = Duration::from_secs(60);
    const RESTART: Duration = Duration::from_secs(10);
    BUSY + quiet * 10 + (RESTART + detect * 6) * faults
}

/// The weights that a job has come to.
fn weights(job: &Job) -> Result<Option<Digest>, Failure> {
    Ok(newest_intact(&job.run.checkpoints())?.checkpoint.map(|c| c.weights_hash()))
}

fn log(folder: &Path) -> std::io::Result<PathBuf> {
    std::fs::create_dir_all(folder)?;
    Ok(folder.join("chaos.log"))
}

impl Args {
    /// The folder of both runs, in which there is nothing yet.
    fn folder(&self, seed: u64) -> Result<PathBuf, ChaosError> {
        /// More runs of one seed than anybody makes.
        const MOST: u32 = 1000;
        let Some(folder) = &self.job.run else {
            let name = self.job.file.file_stem().map_or("run".into(), |n| n.to_string_lossy());
            let first = Path::new(".caravan/chaos").join(format!("{name}-{seed}"));
            let free = |path: &PathBuf| !path.exists();
            let more = (2..MOST).map(|n| first.with_file_name(format!("{name}-{seed}-{n}")));
            return std::iter::once(first.clone()).chain(more).find(free).ok_or(ChaosError::Exists(first));
        };
        match ["quiet", "chaos"].map(|part| folder.join(part)).into_iter().find(|path| path.exists()) {
            Some(path) => Err(ChaosError::Exists(path)),
            None => Ok(folder.clone()),
        }
    }

    fn request(&self, seed: u64, job: &Job) -> Result<Request, ChaosError> {
        let (steps, cluster) = (job.settings.recipe.steps, &job.settings.cluster);
        let every = cluster.checkpoint_every;
        if self.kinds.contains(&Kind::Disk) && (every == 0 || every * 5 > steps) {
            return Err(ChaosError::NoCheckpoint { steps });
        }
        let (faults, kinds, workers) = (self.faults, self.kinds.clone(), cluster.workers);
        // Two workers that wait for a third one do not say what a slice's only owner has.
        let redundant = !self.pile_up && cluster.redundancy.min(workers) > 1;
        Ok(Request { seed, faults, kinds, workers, steps, redundant })
    }

    /// The command that does the same again, in a folder of its own.
    fn again(&self, seed: u64) -> String {
        let kinds: Vec<String> = self.kinds.iter().map(Kind::to_string).collect();
        let mut words =
            vec!["caravan".to_owned(), "chaos".into(), self.job.file.to_string_lossy().into_owned()];
        let mut option = |name: &str, value: String| words.extend([name.to_owned(), value]);
        option("--seed", seed.to_string());
        option("--faults", self.faults.to_string());
        option("--kinds", kinds.join(","));
        if let Some(workers) = self.job.workers {
            option("--workers", workers.to_string());
        }
        if let Some(steps) = self.job.steps {
            option("--steps", steps.to_string());
        }
        if let Some(run) = &self.quiet {
            option("--quiet", run.to_string_lossy().into_owned());
        }
        if self.quiet_workers != 1 {
            option("--quiet-workers", self.quiet_workers.to_string());
        }
        for path in &self.job.data {
            option("--data", path.to_string_lossy().into_owned());
        }
        for set in &self.job.set {
            option("--set", set.clone());
        }
        if self.pile_up {
            words.push("--pile-up".into());
        }
        words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ")
    }
}

/// A word as a shell takes it.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=,:+".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.into()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}
