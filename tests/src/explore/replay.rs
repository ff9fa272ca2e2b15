//! A way through the states told for people, and made short.

use super::choice::{Act, Choice};
use super::frame::{Frame, Line, is_end};
use super::search::check_end;
use super::setting::SLOTS;
use super::state::State;
use super::world::World;

impl World {
    /// Whether any worker lives.
    pub(super) fn anybody(&self, state: &State) -> bool {
        (0..SLOTS).any(|slot| self.view(state, slot).alive)
    }

    /// Where everybody is.
    pub(super) fn situation(&self, state: &State) -> String {
        let leader = self.leader(state);
        let mut text =
            format!("coordinator {} at step {}", if leader.up { "up" } else { "down" }, leader.committed);
        for slot in (0..SLOTS).filter(|slot| self.view(state, *slot).alive) {
            let view = self.view(state, slot);
            let place = if view.live > 0 { format!("in g{}", view.live) } else { "without a plan".into() };
            text +=
                &format!("; process {} at step {} {place}, session {:?}", slot + 1, view.applied, view.link);
        }
        text
    }

    /// A choice in words.
    fn words(&self, state: &State, choice: Choice) -> String {
        let (a, b) = (usize::from(choice.a), usize::from(choice.b));
        let process = |slot: usize| format!("process {}", slot + 1);
        let text = match choice.act {
            Act::Engine => format!("{}: its engine finishes a task", process(a)),
            Act::Saved => format!("{}: its part of a checkpoint is written", process(a)),
            Act::Peer => format!(
                "{} hears from {}: {}",
                process(b),
                process(a),
                self.frame(state, Line::Peer(a, b), 0)
            ),
            Act::Cut => format!("{} loses {} and what was on its way", process(b), process(a)),
            Act::Notice => format!("{}: its connection to {} is closed", process(a), process(b)),
            Act::Down => {
                format!("{} hears from the coordinator: {}", process(a), self.frame(state, Line::Down(a), 0))
            }
            Act::DownCut => format!("{}: its session ends, and what was on its way is lost", process(a)),
            Act::Attach => format!("{} looks for the coordinator", process(a)),
            Act::Up => {
                format!("the coordinator hears from {}: {}", process(a), self.frame(state, Line::Up(a), 0))
            }
            Act::UpNext => {
                let nth = self.next_session(state, a).unwrap_or(0);
                let frame = self.frame(state, Line::Up(a), nth);
                format!("the coordinator hears from {} in its newer session: {frame}", process(a))
            }
            Act::UpCut => {
                format!("the coordinator: the session of {} ends, what was on its way is lost", process(a))
            }
            Act::Completed => "a manifest is written".into(),
            Act::Due => "time passes: the coordinator waits no longer".into(),
            Act::Start => "the coordinator is started again".into(),
            Act::Crash => format!("FAULT {} dies", process(a)),
            Act::Die => "FAULT the coordinator dies".into(),
            Act::Break => format!("FAULT the connection from {} to {} breaks", process(a), process(b)),
            Act::Session => format!("FAULT the session of {} breaks", process(a)),
            Act::Silence => format!("FAULT {} was not heard for too long", process(a)),
            Act::Late => "FAULT a deadline passes though answers are on their way".into(),
            Act::Join => "WISH one more worker comes".into(),
            Act::Leave => format!("WISH {} is asked to leave", process(a)),
            Act::Drain => "WISH the run is to stop".into(),
        };
        match choice.dies {
            Some(dies) => format!("{text}; FAULT it dies in the middle of it, before record {}", dies + 1),
            None => text,
        }
    }

    fn frame(&self, state: &State, line: Line, nth: usize) -> String {
        let Some((generation, number)) = self.way(state, line).frames.get(nth) else {
            return "nothing".into();
        };
        if is_end(*number) {
            return "the end".into();
        }
        let text = match self.frames.get(*number) {
            Frame::Peer(_, message, _) => format!("g{generation} {message:?}"),
            Frame::Up(message) => format!("{message:?}"),
            Frame::Down(message) => format!("{message:?}"),
            other => format!("{other:?}"),
        };
        match text.char_indices().nth(300) {
            Some((end, _)) => format!("{} …", &text[..end]),
            None => text,
        }
    }

    /// Whether a choice is one that this state has.
    fn is_possible(&mut self, state: &State, choice: Choice) -> bool {
        let steps = self.steps(state);
        steps.contains(&choice) || self.faults(state, &steps).contains(&choice)
    }
}

/// Follows choices, leaving out those that are not possible; says what was done, and how it ended.
pub(super) fn follow(
    world: &mut World,
    first: &State,
    way: &[Choice],
) -> (Vec<Choice>, Result<State, String>) {
    let (mut state, mut done) = (*first, Vec::new());
    for choice in way {
        if !world.is_possible(&state, *choice) {
            continue;
        }
        done.push(*choice);
        match world.happen(&state, *choice) {
            Ok(next) => state = next,
            Err(wrong) => return (done, Err(wrong)),
        }
    }
    let end = if world.steps(&state).is_empty() { check_end(world, &state) } else { Ok(()) };
    (done, end.map(|()| state))
}

/// The invariant that a reason is about.
fn invariant(reason: &str) -> &str {
    reason.split(':').next().unwrap_or(reason)
}

/// A shorter way that ends with the same invariant: choices are left out for as long as that works.
pub(super) fn shorten(world: &mut World, first: &State, way: Vec<Choice>, reason: &str) -> Vec<Choice> {
    let mut way = way;
    let mut length = way.len() / 2;
    while length > 0 {
        let mut at = 0;
        while at < way.len() {
            let mut shorter = way.clone();
            shorter.drain(at..(at + length).min(way.len()));
            match follow(world, first, &shorter) {
                (done, Err(wrong)) if invariant(&wrong) == invariant(reason) => way = done,
                _ => at += length,
            }
        }
        length /= 2;
    }
    way
}

/// Tells a way, a line for each choice, and how it ends.
pub(super) fn tell(world: &mut World, first: &State, way: &[Choice]) -> (Vec<String>, Result<(), String>) {
    let (mut state, mut lines) = (*first, Vec::new());
    for choice in way {
        if !world.is_possible(&state, *choice) {
            return (lines, Err(format!("not possible here: {choice}")));
        }
        lines.push(world.words(&state, *choice));
        match world.happen(&state, *choice) {
            Ok(next) => state = next,
            Err(wrong) => return (lines, Err(wrong)),
        }
    }
    let end = if world.steps(&state).is_empty() { check_end(world, &state) } else { Ok(()) };
    lines.push(world.situation(&state));
    (lines, end)
}
