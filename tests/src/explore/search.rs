//! Every state that can be reached, each once, depth first.

use super::choice::{Act, Choice, write};
use super::intern::Plain;
use super::setting::{Options, Setting};
use super::state::State;
use super::world::World;
use caravan_types::Step;
use std::collections::{BTreeSet, HashSet};
use std::fmt;
use std::time::Instant;

/// What was explored, where nothing was wrong.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Different states.
    pub states: usize,
    /// Choices that were made.
    pub transitions: usize,
    /// States in which nothing more can happen.
    pub ends: usize,
    /// How the run can end: a hash of what the coordinator knows and where everybody is.
    pub outcomes: BTreeSet<u128>,
    /// The longest way from the first state, in choices.
    pub depth: usize,
    /// Different coordinators, workers, frames and contents of lines.
    pub parts: [usize; 4],
    /// Seconds.
    pub seconds: f64,
    /// Whether these are all states.
    pub complete: bool,
}

/// An invariant that does not hold.
#[derive(Clone, Debug)]
pub struct Violation {
    /// Which one, and how.
    pub reason: String,
    /// What was explored.
    pub options: Options,
    /// The choices that lead there, as a word that can be replayed.
    pub word: String,
    /// The same for people, a line each.
    pub trace: Vec<String>,
}

/// A state on the way from the first one, with what is still to be tried in it.
struct Turn {
    state: State,
    hash: u128,
    choices: Vec<Choice>,
    /// The one of them that is being tried is before this one.
    next: usize,
}

/// New states between two calls of who watches.
const WATCHED: usize = 5_000_000;

/// Explores everything; `watch` is shown how far it is, now and then.
///
/// # Errors
/// The first invariant that does not hold.
pub fn explore(options: &Options, mut watch: impl FnMut(&Report)) -> Result<Report, Box<Violation>> {
    let impossible = |reason: String| Box::new(Violation::new(reason, options));
    let begin = Instant::now();
    let (mut world, first) = first(options).map_err(impossible)?;
    let mut search = Search::new(first);
    let outcome = search.run(&mut world, |report, world| {
        let (parts, seconds) = (world.sizes(), begin.elapsed().as_secs_f64());
        watch(&Report { parts, seconds, ..report.clone() });
    });
    let mut report = search.report;
    report.states = search.seen.len();
    report.parts = world.sizes();
    report.seconds = begin.elapsed().as_secs_f64();
    match outcome {
        Ok(complete) => Ok(Report { complete, ..report }),
        Err(reason) => {
            let way: Vec<Choice> =
                search.way.iter().filter_map(|turn| turn.choices.get(turn.next - 1)).copied().collect();
            let way = super::replay::shorten(&mut world, &first, way, &reason);
            let (trace, _) = super::replay::tell(&mut world, &first, &way);
            Err(Box::new(Violation { trace, word: write(&way), ..Violation::new(reason, options) }))
        }
    }
}

/// The state from which everything is explored: everybody has applied step 1 and the coordinator
/// knows; nothing is on its way, and what was asked of engines for step 2 is still to be done. A
/// bug that is to be found is switched on only here.
pub(super) fn first(options: &Options) -> Result<(World, State), String> {
    let setting = Setting::new(Options { mutant: None, ..options.clone() })?;
    let mut world = World::new(setting);
    let mut state = world.beginning();
    // Some dozen messages for each worker.
    for _ in 0..10_000 {
        let steps = world.steps(&state);
        let computing = |choice: &&Choice| choice.act == Act::Engine;
        let behind = |choice: &&Choice| world.view(&state, usize::from(choice.a)).applied < Step(1);
        let step = steps.iter().find(|choice| !computing(choice));
        match step.or_else(|| steps.iter().find(|choice| computing(choice) && behind(choice))) {
            Some(choice) => state = world.happen(&state, *choice)?,
            None => return world.with_bug(&state, options.mutant),
        }
    }
    Err("the first step is never committed".into())
}

struct Search {
    seen: HashSet<u128, Plain>,
    way: Vec<Turn>,
    on_way: HashSet<u128, Plain>,
    report: Report,
    first: State,
}

impl Search {
    fn new(first: State) -> Self {
        Self {
            seen: HashSet::default(),
            way: Vec::new(),
            on_way: HashSet::default(),
            report: Report::default(),
            first,
        }
    }

    /// Whether all states were seen.
    fn run(&mut self, world: &mut World, mut watch: impl FnMut(&Report, &World)) -> Result<bool, String> {
        self.enter(world, self.first)?;
        while let Some(turn) = self.way.last_mut() {
            let Some(choice) = turn.choices.get(turn.next).copied() else {
                let hash = turn.hash;
                self.on_way.remove(&hash);
                self.way.pop();
                continue;
            };
            turn.next += 1;
            let next = world.happen(&turn.state, choice)?;
            self.report.transitions += 1;
            self.enter(world, next)?;
            if self.seen.len() >= self.report.states + WATCHED {
                self.report.states = self.seen.len();
                watch(&self.report, world);
            }
            if self.seen.len() >= world.setting.options.most_states {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Comes to a state, for the first time or again.
    fn enter(&mut self, world: &mut World, state: State) -> Result<(), String> {
        let hash = state.hash();
        if !self.seen.insert(hash) {
            // So every way ends, and L-1 is about where it ends.
            if self.on_way.contains(&hash) {
                return Err("L-1: it can go round in circles".into());
            }
            return Ok(());
        }
        let mut choices = world.steps(&state);
        if choices.is_empty() {
            self.report.ends += 1;
            self.report.outcomes.insert(world.outcome(&state));
            check_end(world, &state)?;
        }
        let faults = world.faults(&state, &choices);
        choices.extend(faults);
        self.on_way.insert(hash);
        self.way.push(Turn { state, hash, choices, next: 0 });
        self.report.depth = self.report.depth.max(self.way.len());
        Ok(())
    }
}

/// L-1: where nothing more can happen, the run is over, or faults have cost all workers.
pub(super) fn check_end(world: &World, state: &State) -> Result<(), String> {
    let mortal = world.setting.options.kinds.iter().any(|kind| kind.costs_workers());
    if world.is_over(state) || mortal && !world.anybody(state) {
        return Ok(());
    }
    Err(format!("L-1: nothing can ever happen any more: {}", world.situation(state)))
}

impl Violation {
    fn new(reason: String, options: &Options) -> Self {
        Self { reason, options: options.clone(), word: String::new(), trace: Vec::new() }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { states, transitions, ends, depth, seconds, outcomes, .. } = self;
        let [coordinators, workers, frames, lines] = self.parts;
        let all = if self.complete { "all of them" } else { "NOT all of them" };
        write!(
            f,
            "{states} states ({all}), {transitions} transitions, {ends} ends with {} outcomes, depth {depth}, {seconds:.1} s; made of \
             {coordinators} coordinators, {workers} workers, {frames} frames, {lines} lines",
            outcomes.len()
        )
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, line) in (1..).zip(&self.trace) {
            writeln!(f, "{number:3}. {line}")?;
        }
        let Self { reason, options, word, .. } = self;
        write!(f, "{reason}\nreplay: cargo run -p tests --release -- explore {options} --replay {word}")
    }
}
