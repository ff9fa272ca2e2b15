//! What can happen in a state.

use super::choice::{Act, Choice};
use super::frame::{BROKEN, Line};
use super::node::Link;
use super::setting::{Kind, SLOTS};
use super::state::State;
use super::world::World;
use crate::sim::Mutant;

impl World {
    /// Whether the run is over.
    pub(super) fn is_over(&self, state: &State) -> bool {
        self.leader(state).ended
    }

    /// What can happen without a fault. Time passes only where nothing else can happen, but for
    /// the time in which accusations are collected, which is a tenth of the failure budget and
    /// may be over at any moment.
    pub(super) fn steps(&self, state: &State) -> Vec<Choice> {
        let mut choices = Vec::new();
        if self.is_over(state) {
            return choices;
        }
        let leader = self.leader(state);
        for a in 0..SLOTS {
            let view = self.view(state, a);
            if view.alive {
                self.steps_of(state, a, &mut choices);
            }
            let up = &self.way(state, Line::Up(a)).frames;
            if leader.up && !up.is_empty() {
                choices.push(Choice::new(Act::Up, a, 0));
                if self.next_session(state, a).is_some() {
                    choices.push(Choice::new(Act::UpNext, a, 0));
                }
                let first = up.iter().take_while(|(session, _)| *session == up[0].0).last();
                if first.is_some_and(|end| end.1 == BROKEN && *end != up[0]) {
                    choices.push(Choice::new(Act::UpCut, a, 0));
                }
            }
        }
        if leader.writing {
            choices.push(Choice::new(Act::Completed, 0, 0));
        }
        if !leader.up {
            choices.push(Choice::new(Act::Start, 0, 0));
        }
        if leader.verdict || leader.deadline && choices.is_empty() {
            choices.push(Choice::new(Act::Due, 0, 0));
        }
        choices
    }

    /// What a worker can do, and what can reach it.
    fn steps_of(&self, state: &State, b: usize, choices: &mut Vec<Choice>) {
        let (view, old) = (self.view(state, b), self.setting.is(Mutant::OldConnections));
        if view.computing {
            choices.push(Choice::new(Act::Engine, b, 0));
        }
        if view.saving {
            choices.push(Choice::new(Act::Saved, b, 0));
        }
        if view.link == Link::Lost && self.leader(state).up {
            choices.push(Choice::new(Act::Attach, b, 0));
        }
        let down = &self.way(state, Line::Down(b)).frames;
        if !down.is_empty() {
            choices.push(Choice::new(Act::Down, b, 0));
            if down.len() > 1 && down.last().is_some_and(|(_, frame)| *frame == BROKEN) {
                choices.push(Choice::new(Act::DownCut, b, 0));
            }
        }
        for a in (0..SLOTS).filter(|a| !state.is_empty(Line::Peer(*a, b))) {
            let way = self.way(state, Line::Peer(a, b));
            let taken = |generation: u16| {
                generation == view.live || old && view.generation > 0 && generation <= view.generation
            };
            if way.frames.first().is_some_and(|(generation, _)| taken(*generation)) {
                choices.push(Choice::new(Act::Peer, a, b));
            }
            let end = way
                .frames
                .iter()
                .position(|(generation, frame)| (*generation, *frame) == (view.live, BROKEN));
            if end.is_some_and(|end| end > 0) {
                choices.push(Choice::new(Act::Cut, a, b));
            }
            if way.notice > 0 && way.notice == view.live {
                choices.push(Choice::new(Act::Notice, b, a));
            }
        }
    }

    /// What can go wrong or be wished for, where there is still a fault to come.
    pub(super) fn faults(&mut self, state: &State, steps: &[Choice]) -> Vec<Choice> {
        let mut choices = Vec::new();
        if self.is_over(state) || state.faults() >= self.setting.options.faults {
            return choices;
        }
        for kind in self.setting.options.kinds.clone() {
            self.faults_of(kind, state, steps, &mut choices);
        }
        choices
    }

    fn faults_of(&mut self, kind: Kind, state: &State, steps: &[Choice], choices: &mut Vec<Choice>) {
        let leader = *self.leader(state);
        let alive: Vec<usize> = (0..SLOTS).filter(|slot| self.view(state, *slot).alive).collect();
        let mut add = |act: Act, a: usize, b: usize| choices.push(Choice::new(act, a, b));
        match kind {
            Kind::Crash => alive.iter().for_each(|a| add(Act::Crash, *a, 0)),
            Kind::Coordinator if leader.up => {
                add(Act::Die, 0, 0);
                for step in steps {
                    for dies in 1..self.records(state, *step) {
                        choices.push(Choice { dies: Some(dies), ..*step });
                    }
                }
            }
            Kind::Break => {
                for (a, b) in alive.iter().flat_map(|a| alive.iter().map(move |b| (*a, *b))) {
                    let (one, other) = (self.view(state, a), self.view(state, b));
                    let connected = one.live > 0 && (one.peers & !one.lost) >> b & 1 == 1;
                    let reachable = other.fence <= one.live && other.generation <= one.live;
                    if connected && reachable && self.way(state, Line::Peer(a, b)).closed < one.live {
                        add(Act::Break, a, b);
                    }
                }
            }
            Kind::Session => {
                for a in alive {
                    let view = self.view(state, a);
                    let open = view.link == Link::Open && leader.sessions[a].contains(&view.session);
                    if open && self.way(state, Line::Up(a)).closed < view.session {
                        add(Act::Session, a, 0);
                    }
                }
            }
            Kind::Silence if leader.up => {
                alive
                    .iter()
                    .filter(|a| leader.members >> **a & 1 == 1)
                    .for_each(|a| add(Act::Silence, *a, 0));
            }
            Kind::Late if leader.deadline && !steps.is_empty() => add(Act::Late, 0, 0),
            Kind::Join => {
                if self.unborn(state).is_some() {
                    add(Act::Join, 0, 0);
                }
            }
            Kind::Leave => {
                let open = |a: &&usize| self.view(state, **a).worker.0 > 0 && !self.view(state, **a).leaving;
                alive.iter().filter(open).for_each(|a| add(Act::Leave, *a, 0));
            }
            Kind::Drain if leader.up && !leader.draining => add(Act::Drain, 0, 0),
            Kind::Coordinator | Kind::Silence | Kind::Late | Kind::Drain => {}
        }
    }
}
