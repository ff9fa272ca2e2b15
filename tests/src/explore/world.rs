//! What comes of a choice.
//!
//! Cores, workers and what is on a line are interned: a state has their numbers, and what a
//! process does with an input is asked of its core once, however many states have that process.

use super::choice::{Act, Choice};
use super::frame::{BROKEN, CLOSED, Effect, Frames, Line, is_end};
use super::intern::{Interner, Plain, digest};
use super::leader::{Leader, LeaderInput, LeaderView};
use super::node::{Node, NodeInput, View};
use super::setting::{SLOTS, Setting, WORKERS};
use super::state::{CELLS, FAULTS, GONE, NODES, State, UNBORN, UP, Way, cell};
use crate::sim::Mutant;
use std::collections::HashMap;
use std::rc::Rc;

/// What an input makes of a process.
#[derive(Debug)]
pub(super) struct Local {
    pub(super) next: u32,
    pub(super) effects: Vec<Effect>,
    /// Records that a coordinator makes durable.
    records: u8,
}

/// What is known of all that can be in a state.
pub(super) struct World {
    pub(super) setting: Setting,
    pub(super) frames: Frames,
    nodes: Interner<(Node, View)>,
    leaders: Interner<(Leader, LeaderView)>,
    ways: HashMap<Rc<Way>, u32>,
    way: Vec<Rc<Way>>,
    of_nodes: HashMap<(u32, u64), Rc<Local>, Plain>,
    of_leaders: HashMap<(u32, u64), Rc<Local>, Plain>,
}

impl World {
    pub(super) fn new(setting: Setting) -> Self {
        let mut nodes = Interner::default();
        for (number, what) in [(UNBORN, "unborn"), (GONE, "gone")] {
            let nobody = nodes.number(digest(&what), || (Node::new(&setting, SLOTS), View::default()));
            debug_assert_eq!(nobody, number);
        }
        let empty = Rc::new(Way::default());
        Self {
            setting,
            frames: Frames::new(),
            nodes,
            leaders: Interner::default(),
            ways: HashMap::from([(Rc::clone(&empty), 0)]),
            way: vec![empty],
            of_nodes: HashMap::default(),
            of_leaders: HashMap::default(),
        }
    }

    /// How many different coordinators, workers, frames and contents of lines there were.
    pub(super) fn sizes(&self) -> [usize; 4] {
        [self.leaders.len(), self.nodes.len(), self.frames.len(), self.way.len()]
    }

    /// The first state: nobody has said anything yet.
    pub(super) fn beginning(&mut self) -> State {
        let mut state = State([0; CELLS]);
        let leader = Leader::new(&self.setting);
        state.0[0] = number_leader(&mut self.leaders, leader);
        for slot in 0..WORKERS {
            state.0[NODES + slot] = self.born(slot);
        }
        state
    }

    /// The same state of a world in which a bug is switched on.
    ///
    /// # Errors
    /// Where something is on its way.
    pub(super) fn with_bug(self, state: &State, mutant: Option<Mutant>) -> Result<(Self, State), String> {
        if state.0[UP..].iter().any(|cell| *cell != 0) {
            return Err("something is on its way in the first state".into());
        }
        let mut setting = self.setting.clone();
        setting.options.mutant = mutant;
        let (mut next, mut world) = (*state, Self::new(setting));
        let leader = self.coordinator(state).clone().with_bug(mutant);
        next.0[0] = number_leader(&mut world.leaders, leader);
        for slot in 0..WORKERS {
            let node = self.nodes.get(state.0[NODES + slot]).0.clone().with_bug(mutant);
            next.0[NODES + slot] = number_node(&mut world.nodes, node);
        }
        Ok((world, next))
    }

    fn born(&mut self, slot: usize) -> u32 {
        let node = Node::new(&self.setting, slot);
        number_node(&mut self.nodes, node)
    }

    pub(super) fn view(&self, state: &State, slot: usize) -> &View {
        self.view_of(state.0[NODES + slot])
    }

    pub(super) fn view_of(&self, node: u32) -> &View {
        &self.nodes.get(node).1
    }

    pub(super) fn coordinator(&self, state: &State) -> &Leader {
        &self.leaders.get(state.0[0]).0
    }

    pub(super) fn leader(&self, state: &State) -> &LeaderView {
        &self.leaders.get(state.0[0]).1
    }

    pub(super) fn way(&self, state: &State, line: Line) -> &Way {
        &self.way[state.0[cell(line)] as usize]
    }

    /// How things stand for the coordinator and, where the run goes on, for the workers.
    pub(super) fn outcome(&self, state: &State) -> u128 {
        let leader = self.coordinator(state);
        if self.is_over(state) {
            return digest(&leader.essence());
        }
        let workers: Vec<_> =
            (0..SLOTS).map(|slot| self.view(state, slot)).map(|v| (v.alive, v.applied)).collect();
        digest(&(leader.essence(), workers))
    }

    /// The slot of a worker that there was not yet.
    pub(super) fn unborn(&self, state: &State) -> Option<usize> {
        (0..SLOTS).find(|slot| state.0[NODES + slot] == UNBORN)
    }

    pub(super) fn change(&mut self, state: &mut State, line: Line, change: impl FnOnce(&mut Way)) {
        let mut way = self.way(state, line).clone();
        change(&mut way);
        let next = self.way.len() as u32;
        state.0[cell(line)] = match self.ways.get(&way) {
            Some(number) => *number,
            None => {
                let way = Rc::new(way);
                self.ways.insert(Rc::clone(&way), next);
                self.way.push(way);
                next
            }
        };
    }

    // ---- what comes of a choice ----

    /// What comes of a choice that is possible.
    ///
    /// # Errors
    /// The invariant that does not hold then.
    pub(super) fn happen(&mut self, state: &State, choice: Choice) -> Result<State, String> {
        let mut next = *state;
        let (a, b) = (usize::from(choice.a), usize::from(choice.b));
        next.0[FAULTS] += u32::from(choice.is_fault());
        self.act(&mut next, choice, a, b)?;
        self.hurry(&mut next)?;
        self.one_step_apart(&next)?;
        Ok(next)
    }

    fn act(&mut self, next: &mut State, choice: Choice, a: usize, b: usize) -> Result<(), String> {
        let dies = choice.dies;
        match choice.act {
            Act::Engine => self.tell(next, a, NodeInput::Engine),
            Act::Saved => self.tell(next, a, NodeInput::Saved),
            Act::Attach => self.tell(next, a, NodeInput::Attach),
            Act::Leave => self.tell(next, a, NodeInput::Leave),
            Act::Peer => match self.pop(next, Line::Peer(a, b), 0) {
                (generation, BROKEN) if generation != self.view(next, b).live => Ok(()),
                (_, BROKEN) => self.tell(next, b, NodeInput::PeerClosed(a)),
                (generation, frame) => self.tell(next, b, NodeInput::Peer(a, generation, frame)),
            },
            Act::Cut => {
                self.cut(next, Line::Peer(a, b));
                self.tell(next, b, NodeInput::PeerClosed(a))
            }
            Act::Notice => {
                self.change(next, Line::Peer(b, a), |way| way.notice = 0);
                self.tell(next, a, NodeInput::PeerClosed(b))
            }
            Act::Down => match self.pop(next, Line::Down(a), 0) {
                (_, CLOSED | BROKEN) => self.tell(next, a, NodeInput::Closed),
                (_, frame) => self.tell(next, a, NodeInput::Down(frame)),
            },
            Act::DownCut => {
                self.change(next, Line::Down(a), |way| way.frames.clear());
                self.tell(next, a, NodeInput::Closed)
            }
            Act::Up | Act::UpNext => {
                let nth = if choice.act == Act::Up { 0 } else { self.next_session(next, a).unwrap_or(0) };
                let (session, frame) = self.pop(next, Line::Up(a), nth);
                self.lead(next, LeaderInput::Up(a, session, frame), dies)
            }
            Act::UpCut => {
                let session = self.cut(next, Line::Up(a));
                self.lead(next, LeaderInput::Up(a, session, CLOSED), dies)
            }
            Act::Completed => self.lead(next, LeaderInput::Completed, dies),
            Act::Due | Act::Late => self.lead(next, LeaderInput::Due, dies),
            Act::Start => self.lead(next, LeaderInput::Start, dies),
            Act::Die => self.lead(next, LeaderInput::Die, dies),
            Act::Silence => self.lead(next, LeaderInput::Silent(a), dies),
            Act::Drain => self.lead(next, LeaderInput::Drain, dies),
            Act::Crash => {
                self.end(next, a, BROKEN);
                Ok(())
            }
            Act::Break => {
                let generation = self.view(next, a).live;
                self.close(next, Line::Peer(a, b), generation, BROKEN);
                self.change(next, Line::Peer(b, a), |way| way.notice = generation);
                Ok(())
            }
            Act::Session => {
                let session = self.view(next, a).session;
                self.close(next, Line::Up(a), session, BROKEN);
                self.close(next, Line::Down(a), session, BROKEN);
                Ok(())
            }
            Act::Join => {
                if let Some(slot) = self.unborn(next) {
                    next.0[NODES + slot] = self.born(slot);
                }
                Ok(())
            }
        }
    }

    pub(super) fn pop(&mut self, state: &mut State, line: Line, nth: usize) -> (u16, u32) {
        let frame = self.way(state, line).frames.get(nth).copied().unwrap_or((0, CLOSED));
        self.change(state, line, |way| _ = (nth < way.frames.len()).then(|| way.frames.remove(nth)));
        frame
    }

    /// Loses what is on a line up to where it ends; says the generation or session that ends.
    fn cut(&mut self, state: &mut State, line: Line) -> u16 {
        let frames = &self.way(state, line).frames;
        let end = frames.iter().position(|(_, frame)| is_end(*frame)).unwrap_or(0);
        let generation = frames.get(end).map_or(0, |(generation, _)| *generation);
        self.change(state, line, |way| _ = way.frames.drain(..=end.min(way.frames.len() - 1)));
        generation
    }

    /// Where the frames of the second session on a line begin.
    pub(super) fn next_session(&self, state: &State, slot: usize) -> Option<usize> {
        let frames = &self.way(state, Line::Up(slot)).frames;
        let first = frames.first()?.0;
        frames.iter().position(|(session, _)| *session != first)
    }

    /// Nothing goes through a line any more, and its receiver will notice.
    pub(super) fn close(&mut self, state: &mut State, line: Line, generation: u16, end: u32) {
        let late = |to: usize| generation < self.view(state, to).floor();
        let over = matches!(line, Line::Peer(_, to) if late(to));
        if !over && self.way(state, line).closed < generation {
            self.change(state, line, |way| {
                way.frames.push((generation, end));
                way.closed = generation;
            });
        }
    }

    /// How many records an input makes durable that a choice gives to the coordinator.
    pub(super) fn records(&mut self, state: &State, choice: Choice) -> u8 {
        let a = usize::from(choice.a);
        let first = |nth: usize| {
            let frame = self.way(state, Line::Up(a)).frames.get(nth);
            frame.map(|(session, frame)| LeaderInput::Up(a, *session, *frame))
        };
        let input = match choice.act {
            Act::Up => first(0),
            Act::UpNext => self.next_session(state, a).and_then(first),
            Act::Completed => Some(LeaderInput::Completed),
            Act::Due => Some(LeaderInput::Due),
            _ => None,
        };
        input.map_or(0, |input| self.of_leader(state.0[0], input, None).records)
    }

    pub(super) fn of_leader(&mut self, leader: u32, input: LeaderInput, dies: Option<u8>) -> Rc<Local> {
        let (kind, slot, session, frame) = match input {
            LeaderInput::Up(slot, session, frame) => (0, slot, session, frame),
            LeaderInput::Completed => (1, 0, 0, 0),
            LeaderInput::Due => (2, 0, 0, 0),
            LeaderInput::Silent(slot) => (3, slot, 0, 0),
            LeaderInput::Drain => (4, 0, 0, 0),
            LeaderInput::Die => (5, 0, 0, 0),
            LeaderInput::Start => (6, 0, 0, 0),
        };
        let dies_at = u64::from(dies.map_or(0, |dies| dies + 1));
        let key =
            kind << 60 | dies_at << 52 | (slot as u64) << 48 | u64::from(session) << 32 | u64::from(frame);
        if let Some(local) = self.of_leaders.get(&(leader, key)) {
            return Rc::clone(local);
        }
        let mut next = self.leaders.get(leader).0.clone();
        let (effects, records) = next.take(&self.setting, &mut self.frames, input, dies);
        let local = Rc::new(Local { next: number_leader(&mut self.leaders, next), effects, records });
        self.of_leaders.insert((leader, key), Rc::clone(&local));
        local
    }

    pub(super) fn of_node(&mut self, node: u32, input: NodeInput) -> Rc<Local> {
        let (kind, slot, generation, frame) = match input {
            NodeInput::Down(frame) => (0, 0, 0, frame),
            NodeInput::Peer(slot, generation, frame) => (1, slot, generation, frame),
            NodeInput::PeerClosed(slot) => (2, slot, 0, 0),
            NodeInput::Closed => (3, 0, 0, 0),
            NodeInput::Engine => (4, 0, 0, 0),
            NodeInput::Saved => (5, 0, 0, 0),
            NodeInput::Attach => (6, 0, 0, 0),
            NodeInput::Leave => (7, 0, 0, 0),
        };
        let key = kind << 60 | (slot as u64) << 48 | u64::from(generation) << 32 | u64::from(frame);
        if let Some(local) = self.of_nodes.get(&(node, key)) {
            return Rc::clone(local);
        }
        let mut next = self.nodes.get(node).0.clone();
        let effects = next.take(&self.setting, &mut self.frames, input);
        let local = Rc::new(Local { next: number_node(&mut self.nodes, next), effects, records: 0 });
        self.of_nodes.insert((node, key), Rc::clone(&local));
        local
    }

    /// C-1: members of a generation are at most one step apart.
    fn one_step_apart(&self, state: &State) -> Result<(), String> {
        for a in 0..SLOTS {
            let one = self.view(state, a);
            if one.generation == 0 {
                continue;
            }
            for other in (a + 1..SLOTS).map(|b| self.view(state, b)) {
                let together = one.generation == other.generation;
                if together && one.applied.0.abs_diff(other.applied.0) > 1 {
                    return Err(format!(
                        "C-1: {} and {} are at steps {} and {} of one generation",
                        one.worker, other.worker, one.applied, other.applied
                    ));
                }
            }
        }
        Ok(())
    }
}

fn number_leader(leaders: &mut Interner<(Leader, LeaderView)>, leader: Leader) -> u32 {
    let essence = digest(&leader.essence());
    leaders.number(essence, || {
        let view = leader.view();
        (leader, view)
    })
}

fn number_node(nodes: &mut Interner<(Node, View)>, node: Node) -> u32 {
    let essence = digest(&node.essence());
    nodes.number(essence, || {
        let view = node.view();
        (node, view)
    })
}
