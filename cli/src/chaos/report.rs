//! What is told of a chaos run: the faults and what came of each, how long things took, where the
//! time went, and the verdict.

use super::quiet::Quiet;
use super::schedule::{Fault, Kind};
use super::timeline::{Shares, Sum, add_up};
use super::told::{Told, Unnoticed};
use super::watching::{Ended, Observed};
use crate::audit;
use caravan_types::Digest;
use caravan_types::message::Farewell;
use caravan_types::status::Snapshot;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Write};
use std::time::Duration;

/// Whether the run stood it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "verdict", rename_all = "kebab-case")]
pub enum Verdict {
    /// It finished with the bits of the quiet run, and its ledger proves it.
    Equal,
    /// It finished with other bits.
    Differs,
    /// It finished with the same bits, and its ledger does not prove what it did.
    NotProved,
    /// It was not over in time.
    Stuck,
    /// It ended before its last step.
    Failed {
        /// Why.
        reason: String,
    },
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Equal => f.write_str("the weights have the same bits as those of the quiet run"),
            Self::Differs => f.write_str("the weights DIFFER from those of the quiet run"),
            Self::NotProved => f.write_str("the weights are the same, but the audit does not hold"),
            Self::Stuck => f.write_str("STUCK: the run was not over in time"),
            Self::Failed { reason } => write!(f, "the run FAILED: {reason}"),
        }
    }
}

/// All of it.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Decides the faults.
    pub seed: u64,
    /// The command that does it again.
    pub command: String,
    /// The verdict.
    #[serde(flatten)]
    pub verdict: Verdict,
    /// The weights of the quiet run.
    pub quiet: Digest,
    /// Those of the run with faults.
    pub weights: Option<Digest>,
    /// What the quiet run took.
    pub quiet_seconds: f64,
    /// What the run with faults took.
    pub chaos_seconds: f64,
    /// The faults that were done.
    pub faults: Vec<Line>,
    /// Those for which it was too late.
    pub not_done: Vec<Fault>,
    /// How long things took.
    pub kinds: BTreeMap<Kind, Times>,
    /// Where the time went.
    #[serde(flatten)]
    pub sum: Sum,
    /// The same, in percent.
    pub percent: BTreeMap<&'static str, f64>,
    /// The audit of the run with faults.
    pub audit: Option<audit::Report>,
    /// How things stand where it is stuck.
    pub stuck: Option<Stuck>,
}

/// How things stand.
#[derive(Debug, Serialize)]
pub struct Stuck {
    snapshot: Snapshot,
    events: Vec<String>,
}

/// A fault and what came of it; times in seconds.
#[derive(Debug, Serialize)]
pub struct Line {
    #[serde(flatten)]
    fault: Fault,
    /// Since the start of the run.
    at: f64,
    /// The newest committed step then.
    at_step: u64,
    /// Whether there was a process to do it to.
    reached: bool,
    /// From the fault to an event that names the worker.
    detection: Option<f64>,
    /// Why no event does.
    unnoticed: Option<Unnoticed>,
    /// From the fault to the next committed step of whoever went on.
    recovery: Option<Credit>,
    /// From the fault to the first step that all workers commit again.
    whole: Option<Credit>,
    /// The event that names the worker.
    event: Option<String>,
    /// The number of the fault of the same worker that the event is credited to.
    noticed_with: Option<usize>,
    /// Events that named others.
    others: Vec<String>,
}

/// Where a commit that a fault was waiting for is counted.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(untagged)]
enum Credit {
    /// Here: the seconds since the fault.
    Seconds(f64),
    /// At the older fault of this number, which was waiting for the same commit.
    With { with: usize },
}

impl Credit {
    fn seconds(self) -> Option<f64> {
        match self {
            Self::Seconds(seconds) => Some(seconds),
            Self::With { .. } => None,
        }
    }

    /// Credits each commit to the first fault that was waiting for it.
    fn all(told: &[Told], commit: impl Fn(&Told) -> Option<Duration>) -> Vec<Option<Self>> {
        let mut first: BTreeMap<Duration, usize> = BTreeMap::new();
        let credit = |(number, told): (usize, &Told)| {
            let commit = commit(told)?;
            let first = *first.entry(commit).or_insert(number);
            let seconds = commit.saturating_sub(told.at).as_secs_f64();
            Some(if first == number { Self::Seconds(seconds) } else { Self::With { with: first } })
        };
        (1..).zip(told).map(credit).collect()
    }
}

impl fmt::Display for Credit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Seconds(seconds) => f.pad(&format!("{seconds:.3} s")),
            Self::With { with } => f.pad(&format!("with {with}")),
        }
    }
}

/// What came of each fault, in the run that was observed.
fn lines(observed: &Observed) -> Vec<Line> {
    let recovery = Credit::all(&observed.told, |told| told.committed);
    let whole = Credit::all(&observed.told, |told| told.whole);
    let line = |(told, (recovery, whole)): (&Told, (Option<Credit>, Option<Credit>))| Line {
        fault: told.fault,
        at: told.at.as_secs_f64(),
        at_step: told.at_step,
        reached: told.reached.unwrap_or(true),
        detection: told.noticed.as_ref().map(|(at, _)| at.saturating_sub(told.at).as_secs_f64()),
        unnoticed: told.unnoticed(observed.wall, observed.grace),
        recovery,
        whole,
        event: told.noticed.as_ref().map(|(_, event)| event.clone()),
        noticed_with: told.same.map(|at| at + 1),
        others: told.others.iter().map(|(_, event)| event.clone()).collect(),
    };
    observed.told.iter().zip(recovery.into_iter().zip(whole)).map(line).collect()
}

/// How long things took that were done several times, in seconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    count: usize,
    median: f64,
    /// The smallest that 99 of 100 do not exceed: the largest, where there are fewer.
    p99: f64,
    max: f64,
}

impl Spread {
    fn of(values: impl Iterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        let count = values.len();
        // The nearest rank.
        let rank = |percent: usize| values.get((count * percent).div_ceil(100).saturating_sub(1)).copied();
        Some(Self { count, median: rank(50)?, p99: rank(99)?, max: rank(100)? })
    }
}

/// Times of one kind of fault.
#[derive(Debug, Serialize)]
pub struct Times {
    detection: Option<Spread>,
    recovery: Option<Spread>,
    whole: Option<Spread>,
}

/// What a report is made of, besides what was observed.
#[derive(Debug)]
pub struct Background {
    /// Decides the faults.
    pub seed: u64,
    /// The command that does it again.
    pub command: String,
    /// The quiet run.
    pub quiet: Quiet,
    /// The weights of the run with faults, where it has come to some.
    pub weights: Option<Digest>,
    /// Its audit.
    pub audit: Option<audit::Report>,
}

impl Report {
    /// Puts it together.
    #[must_use]
    pub fn new(background: Background, observed: Observed) -> Self {
        let Background { seed, command, quiet, weights, audit } = background;
        let verdict = match &observed.ended {
            Ended::Stuck { .. } => Verdict::Stuck,
            Ended::Failed(reason) => Verdict::Failed { reason: reason.clone() },
            Ended::Farewell(Farewell::Finished) if weights != Some(quiet.weights) => Verdict::Differs,
            Ended::Farewell(Farewell::Finished) if audit.as_ref().is_some_and(|a| a.holds) => Verdict::Equal,
            Ended::Farewell(Farewell::Finished) => Verdict::NotProved,
            Ended::Farewell(farewell) => Verdict::Failed { reason: farewell.to_string() },
        };
        let sum = add_up(&observed.timeline, observed.wall);
        let shares = sum.seconds.per_mille().map(|tenths| f64::from(tenths) / 10.0);
        let faults = lines(&observed);
        Self {
            seed,
            command,
            verdict,
            quiet: quiet.weights,
            weights,
            quiet_seconds: quiet.time.as_secs_f64(),
            chaos_seconds: observed.wall.as_secs_f64(),
            kinds: times(&faults),
            faults,
            not_done: observed.left,
            sum,
            percent: Shares::NAMES.into_iter().zip(shares).collect(),
            audit,
            stuck: match observed.ended {
                Ended::Stuck { snapshot, events } => Some(Stuck { snapshot: (*snapshot).clone(), events }),
                _ => None,
            },
        }
    }

    /// For people.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        self.print_faults(out)?;
        self.print_times(out)?;
        self.print_shares(out)?;
        if let Some(audit) = &self.audit {
            let failed: Vec<String> = audit
                .checks
                .iter()
                .filter(|c| !c.holds)
                .map(|c| format!("{}: {}", c.subject, c.found.join("; ")))
                .collect();
            match failed.as_slice() {
                [] => writeln!(out, "\naudit: each of {} samples counted exactly once", audit.samples)?,
                failed => writeln!(out, "\naudit FAILS: {}", failed.join("\n             "))?,
            }
        }
        if let Some(Stuck { snapshot, events }) = &self.stuck {
            writeln!(out, "\nthe last events:")?;
            events.iter().try_for_each(|event| writeln!(out, "  {event}"))?;
            writeln!(
                out,
                "how things stand: step {} of {}, {}, {}",
                snapshot.step, snapshot.steps, snapshot.generation, snapshot.phase
            )?;
            for w in &snapshot.workers {
                writeln!(
                    out,
                    "  {} ({}): step {}, heard {} ms ago",
                    w.worker, w.name, w.applied, w.silent_ms
                )?;
            }
        }
        writeln!(out, "\nthe same again: {}", self.command)?;
        writeln!(out, "quiet weights: {}", self.quiet)?;
        if let Some(weights) = self.weights {
            writeln!(out, "chaos weights: {weights}")?;
        }
        writeln!(out, "verdict: {}", self.verdict)
    }

    fn print_faults(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "\n  #   time    step  worker    detection  recovery     whole  what")?;
        for (n, line) in (1..).zip(&self.faults) {
            let [recovery, whole] =
                [line.recovery, line.whole].map(|c| c.map_or("-".into(), |c| c.to_string()));
            writeln!(
                out,
                "{n:>3} {:>5.1}s {:>6}  worker-{:<2} {:>9} {recovery:>9} {whole:>9}  {}",
                line.at,
                line.at_step,
                line.fault.slot,
                seconds(line.detection),
                line.fault.act,
            )?;
            let why = line.unnoticed.iter().map(|why| match line.noticed_with {
                Some(with) => format!("{why} ({with})"),
                None => why.to_string(),
            });
            let mut notes = line.event.iter().cloned().chain(why).chain(line.others.iter().cloned());
            notes.try_for_each(|note| writeln!(out, "{:60}{note}", ""))?;
        }
        if !self.not_done.is_empty() {
            writeln!(out, "it was too late for {} more faults", self.not_done.len())?;
        }
        Ok(())
    }

    fn print_times(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "\nkind       what       count    median       p99       max")?;
        for (kind, times) in &self.kinds {
            for (what, spread) in
                [("detection", times.detection), ("recovery", times.recovery), ("whole", times.whole)]
            {
                let Some(Spread { count, median, p99, max }) = spread else { continue };
                let [median, p99, max] = [median, p99, max].map(|s| seconds(Some(s)));
                writeln!(
                    out,
                    "{:<10} {what:<10} {count:>5} {median:>9} {p99:>9} {max:>9}",
                    kind.to_string()
                )?;
            }
        }
        writeln!(
            out,
            "detection: until an event names the worker; recovery: until those who went on commit a step; whole: \
             until all workers do. What several faults were waiting for counts once, at the first of them"
        )
    }

    fn print_shares(&self, out: &mut dyn Write) -> io::Result<()> {
        let Sum { committed_again, in_flight_again, generations, step, .. } = self.sum;
        writeln!(
            out,
            "\n{generations} generations; {in_flight_again} steps in flight and {committed_again} committed steps \
             were done again; a step takes {}",
            seconds(Some(step))
        )?;
        writeln!(out, "{:.1} s, of which", self.chaos_seconds)?;
        let how = [
            "steps that count, each from the commit before it",
            "from the last commit to the fault that stopped the step, and steps after a way back",
            "from such a fault to the event that names a worker",
            "from there to the plan, and what the first step after it takes longer than a step does",
            "before the first plan, and after the last commit",
        ];
        let shares = self.sum.seconds.per_mille();
        for ((name, share), how) in Shares::NAMES.iter().zip(shares).zip(how) {
            writeln!(out, "{:>5.1} %  {name:<24}{how}", f64::from(share) / 10.0)?;
        }
        Ok(())
    }
}

fn times(faults: &[Line]) -> BTreeMap<Kind, Times> {
    let mut kinds: BTreeMap<Kind, Vec<&Line>> = BTreeMap::new();
    for line in faults {
        kinds.entry(line.fault.act.kind()).or_default().push(line);
    }
    let times = |lines: &[&Line]| Times {
        detection: Spread::of(lines.iter().filter_map(|l| l.detection)),
        recovery: Spread::of(lines.iter().filter_map(|l| l.recovery?.seconds())),
        whole: Spread::of(lines.iter().filter_map(|l| l.whole?.seconds())),
    };
    kinds.iter().map(|(kind, lines)| (*kind, times(lines))).collect()
}

fn seconds(seconds: Option<f64>) -> String {
    seconds.map_or_else(|| "-".into(), |s| format!("{s:.3} s"))
}

#[cfg(test)]
mod tests {
    use super::super::schedule::Act;
    use super::super::told::Notes;
    use super::*;
    use caravan_types::Generation;

    #[test]
    fn a_spread_is_by_nearest_rank() {
        assert_eq!(Spread::of([].into_iter()), None);
        let one = Spread::of([2.0].into_iter()).unwrap();
        assert_eq!((one.count, one.median, one.p99, one.max), (1, 2.0, 2.0, 2.0));
        let many = Spread::of((1..=200).rev().map(f64::from)).unwrap();
        assert_eq!((many.median, many.p99, many.max), (100.0, 198.0, 200.0));
    }

    #[test]
    fn a_commit_that_several_faults_were_waiting_for_is_counted_at_the_first_of_them() {
        let commits = [Some(5), Some(5), None, Some(7)];
        let mut notes = Notes::new(Duration::from_secs(1));
        for at in 0..commits.len() as u64 {
            let fault = Fault { slot: 1, step: at, moment: 0.0, act: Act::Kill };
            notes.begins(fault, (Duration::from_secs(at), at), None, Generation(1));
        }
        let told = notes.told();
        let of = |told: &Told| commits[told.at_step as usize].map(Duration::from_secs);
        let credits =
            [Some(Credit::Seconds(5.0)), Some(Credit::With { with: 1 }), None, Some(Credit::Seconds(4.0))];
        assert_eq!(Credit::all(&told, of), credits);
    }
}
