//! What the lines of a ledger say, and whether they are the lines that were written.

use super::{Check, Faults, Subject};
use crate::estimate::grouped;
use caravan_coordinator::ledger::{Entry, FORMAT, Flaw, Line, Reader, after, line};
use caravan_types::{Digest, Generation, NotFinite, Step};
use std::io;
use std::path::Path;

/// A step of the committed history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counted {
    /// The step.
    pub step: Step,
    /// The line of the ledger that says so.
    pub line: u64,
    /// Number of its first sample.
    pub first: u64,
    /// One past the number of its last sample.
    pub end: u64,
    /// Its counted tokens.
    pub tokens: u64,
    /// Whether it passed without an update.
    pub skipped: bool,
}

/// A ledger that is being read.
#[derive(Debug)]
pub struct History {
    spec: Digest,
    other_version: Option<u64>,
    lines: u64,
    head: Option<Digest>,
    /// Lines whose hash does not fit where they stand; as many as are told of.
    misplaced: Vec<(u64, Digest, Entry)>,
    base: Step,
    last: Option<Step>,
    /// The committed history so far: about 40 MB for a million steps.
    steps: Vec<Counted>,
    backs: u64,
    halts: u64,
    undone: u64,
    generations: Option<(Generation, Generation)>,
    chain: Faults,
    format: Faults,
    run_spec: Faults,
    order: Faults,
    falling: Faults,
}

/// What a ledger says.
#[derive(Debug)]
pub struct Told {
    /// Whether it could be read at all: it is there, and of a version that this program reads.
    pub readable: bool,
    /// The step that it begins after.
    pub base: Step,
    /// The committed history.
    pub steps: Vec<Counted>,
    /// Hash of the last line.
    pub head: Option<Digest>,
    /// What was checked so far.
    pub checks: Vec<Check>,
}

impl History {
    /// For the ledger of the run with this spec.
    pub fn new(spec: Digest) -> Self {
        Self {
            spec,
            other_version: None,
            lines: 0,
            head: None,
            misplaced: Vec::new(),
            base: Step(0),
            last: None,
            steps: Vec::new(),
            backs: 0,
            halts: 0,
            undone: 0,
            generations: None,
            chain: Faults::default(),
            format: Faults::default(),
            run_spec: Faults::default(),
            order: Faults::default(),
            falling: Faults::default(),
        }
    }

    /// Takes the next line.
    pub fn read(&mut self, line: Line) {
        let Line { number, hash, entry, other_version, flaw, .. } = line;
        self.lines = number;
        self.head = hash.or(self.head);
        if let Some(version) = other_version {
            self.other_version = Some(version);
        }
        if self.other_version.is_some() {
            return;
        }
        match flaw {
            None => {}
            Some(Flaw::Torn) => self.chain.add(|| {
                format!(
                    "line {number}, the last one, is cut off in the middle: by a crash or by somebody; the next start \
                     of the run drops it"
                )
            }),
            // What can be told of it is known when all lines are.
            Some(Flaw::Chain) if self.misplaced.len() < super::MOST_TOLD && entry.is_some() => {
                self.misplaced.extend(hash.zip(entry.clone()).map(|(hash, entry)| (number, hash, entry)));
            }
            Some(flaw) => self.chain.add(|| format!("line {number}: {flaw}")),
        }
        if let Some(entry) = entry {
            self.take(number, entry);
        }
    }

    fn take(&mut self, line: u64, entry: Entry) {
        let next = after(self.last, &entry);
        if let Err(disorder) = &next {
            self.order.add(|| format!("line {line}: {disorder}"));
        }
        let skipped = matches!(entry, Entry::Skip { .. });
        match entry {
            // The history does not change.
            Entry::Halt { .. } => self.halts += 1,
            Entry::Open { spec, base, .. } => {
                if spec != self.spec {
                    let ours = self.spec;
                    self.run_spec.add(|| {
                        format!("the ledger is that of a run with spec {spec}, spec.json has {ours}")
                    });
                }
                if self.last.is_none() {
                    self.base = base;
                    self.last = Some(base);
                }
            }
            Entry::Step { step, generation, loss, norm, tokens, first, end, .. }
            | Entry::Skip { step, generation, loss, norm, tokens, first, end, .. } => {
                if skipped != NotFinite::of(norm, loss).is_some() {
                    let is = if skipped { "was skipped" } else { "was applied" };
                    self.order
                        .add(|| format!("line {line}: step {step} {is} with loss {loss} and norm {norm}"));
                }
                let (lowest, newest) = self.generations.unwrap_or((generation, generation));
                if generation < newest {
                    self.falling
                        .add(|| format!("line {line}: step {step} is of {generation}, after {newest}"));
                }
                self.generations = Some((lowest.min(generation), newest.max(generation)));
                self.steps.push(Counted { step, line, first, end, tokens, skipped });
                self.last = Some(step);
            }
            Entry::Back { to, .. } => {
                let before = self.steps.len();
                self.steps.retain(|counted| counted.step <= to);
                self.backs += 1;
                self.undone += (before - self.steps.len()) as u64;
                self.last = Some(to);
            }
        }
    }

    /// What it all adds up to. Reads the ledger once more where a line is out of place, to see
    /// where it belongs.
    pub fn finish(mut self, path: &Path) -> io::Result<Told> {
        for (number, hash, entry) in std::mem::take(&mut self.misplaced) {
            let place = belongs(path, hash, &entry)?;
            self.chain.add(|| match place {
                Some(0) => format!("line {number} is not where it was written: it was the first line"),
                Some(place) => {
                    format!("line {number} is not where it was written: it stood behind line {place}")
                }
                None => format!("line {number}: {}", Flaw::Chain),
            });
        }
        if let Some(version) = self.other_version {
            self.format.add(|| format!("version {version}, this program reads {FORMAT}"));
        } else if self.lines == 0 {
            self.format.add(|| "the ledger is empty".to_owned());
        }
        if !self.format.told.is_empty() {
            let checks = vec![self.format.check(Subject::Format, String::new)];
            return Ok(Told { readable: false, base: Step(0), steps: Vec::new(), head: None, checks });
        }
        if self.base > Step(0) {
            let base = self.base;
            self.order.add(|| {
                format!("the ledger begins after step {base}: what the run was trained on until there is not in it")
            });
        }
        let (lines, head) = (self.lines, self.head.unwrap_or_default());
        let (backs, halts, undone) = (self.backs, self.halts, self.undone);
        let skipped = told_skipped(&self.steps);
        let range = self.steps.first().zip(self.steps.last()).map(|(a, b)| (a.step, b.step));
        let checks = vec![
            self.chain.check(Subject::Chain, || {
                format!(
                    "{} lines, each with the hash over the one before; the last is {head}",
                    grouped(lines)
                )
            }),
            self.format.check(Subject::Format, || format!("version {FORMAT}")),
            self.run_spec.check(Subject::RunSpec, || format!("that of spec.json, {}", self.spec)),
            self.order.check(Subject::History, || {
                let mut found =
                    range.map_or("no step yet".to_owned(), |(a, b)| format!("steps {a} to {b}, each once"));
                let times = |n: u64| if n == 1 { "once".to_owned() } else { format!("{n} times") };
                if backs > 0 {
                    let times = times(backs);
                    found += &format!("; the run went back {times}, and {undone} steps were undone");
                }
                if halts > 0 {
                    let times = times(halts);
                    found += &format!("; it stopped {times} before a step that was not finite");
                }
                found + &skipped
            }),
            self.falling.check(Subject::Generations, || match self.generations {
                Some((first, last)) => format!("from {first} to {last}, never falling"),
                None => "none yet".to_owned(),
            }),
        ];
        Ok(Told { readable: true, base: self.base, steps: self.steps, head: self.head, checks })
    }
}

/// Which steps passed without an update, behind what else is said.
fn told_skipped(steps: &[Counted]) -> String {
    let skipped: Vec<String> = steps.iter().filter(|s| s.skipped).map(|s| s.step.to_string()).collect();
    let told = skipped[..skipped.len().min(super::MOST_TOLD)].join(", ");
    let more = if skipped.len() > super::MOST_TOLD { ", …" } else { "" };
    match skipped.len() {
        0 => String::new(),
        1 => format!("; step {told} was skipped"),
        n => format!("; {n} were skipped: {told}{more}"),
    }
}

/// The line behind which an entry has the hash that it gives itself: 0 for the beginning.
fn belongs(path: &Path, hash: Digest, entry: &Entry) -> io::Result<Option<u64>> {
    if line(Digest::default(), entry).1 == hash {
        return Ok(Some(0));
    }
    let mut reader = Reader::open(path)?;
    while let Some(other) = reader.next_line()? {
        if other.hash.is_some_and(|before| line(before, entry).1 == hash) {
            return Ok(Some(other.number));
        }
    }
    Ok(None)
}
