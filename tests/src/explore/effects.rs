//! What an input of one process does to what is on its way to the others.

use super::frame::{BROKEN, CLOSED, Effect, Frame, Line};
use super::leader::LeaderInput;
use super::node::{Link, NodeInput, View};
use super::setting::SLOTS;
use super::state::{GONE, NODES, State, Way, cell};
use super::world::World;
use crate::sim::Mutant;

impl World {
    /// A worker is told something.
    pub(super) fn tell(&mut self, state: &mut State, slot: usize, input: NodeInput) -> Result<(), String> {
        let before = *self.view(state, slot);
        let local = self.of_node(state.0[NODES + slot], input);
        state.0[NODES + slot] = local.next;
        for effect in &local.effects {
            match effect {
                Effect::Push(line, generation, frame) => self.push(state, *line, *generation, *frame),
                Effect::Connect => self.connect(state, slot),
                Effect::Exit => {
                    self.end(state, slot, CLOSED);
                    return Ok(());
                }
                Effect::Wrong(wrong) => return Err(wrong.clone()),
                Effect::Dead | Effect::Back(..) => {}
            }
        }
        self.moved_on(state, slot, &before);
        Ok(())
    }

    pub(super) fn push(&mut self, state: &mut State, line: Line, generation: u16, frame: u32) {
        let dead = match line {
            Line::Up(from) => {
                let (leader, open) = (self.leader(state), self.view(state, from).link == Link::Open);
                let stale = || self.coordinator(state).is_stale(self.frames.get(frame));
                !leader.up || open && !leader.sessions[from].contains(&generation) || stale()
            }
            Line::Down(to) => {
                let view = self.view(state, to);
                !view.alive || view.link == Link::Lost || view.session != generation
            }
            Line::Peer(_, to) => {
                let view = self.view(state, to);
                !view.alive || generation < view.floor() && !self.setting.is(Mutant::OldConnections)
            }
        };
        if dead {
            return;
        }
        if frame == CLOSED {
            self.close(state, line, generation, CLOSED);
        } else if self.way(state, line).closed < generation {
            self.change(state, line, |way| way.frames.push((generation, frame)));
        }
    }

    /// A worker has opened its fabric: those who are gone, or have gone on, do not answer.
    fn connect(&mut self, state: &mut State, slot: usize) {
        let view = *self.view(state, slot);
        for peer in (0..SLOTS).filter(|peer| view.peers >> peer & 1 == 1) {
            let other = self.view(state, peer);
            if !other.alive || other.fence > view.generation || other.generation > view.generation {
                self.close(state, Line::Peer(peer, slot), view.generation, BROKEN);
            }
        }
    }

    /// A worker has closed the connections of older generations, or takes their frames no more.
    fn moved_on(&mut self, state: &mut State, slot: usize, before: &View) {
        let after = *self.view(state, slot);
        if self.setting.is(Mutant::OldConnections) {
            return;
        }
        let oldest = |view: &View| view.generation.max(view.fence);
        if oldest(&after) > oldest(before) {
            self.hang_up(state, slot, oldest(&after));
        }
        if after.floor() != before.floor() {
            for from in 0..SLOTS {
                let line = Line::Peer(from, slot);
                if !state.is_empty(line) {
                    self.change(state, line, |way| purge(way, after.floor()));
                }
            }
        }
        if after.link != before.link {
            let session = if after.link == Link::Lost { u16::MAX } else { after.session };
            self.change(state, Line::Down(slot), |way| purge(way, session));
        }
    }

    /// Whoever is connected with a worker in a generation below this one will lose it.
    fn hang_up(&mut self, state: &mut State, slot: usize, below: u16) {
        for to in (0..SLOTS).filter(|to| *to != slot) {
            let other = *self.view(state, to);
            if (1..below).contains(&other.live) && (other.peers & !other.lost) >> slot & 1 == 1 {
                self.close(state, Line::Peer(slot, to), other.live, BROKEN);
            }
        }
    }

    /// A worker's process ends: having said what it had to say, or not.
    pub(super) fn end(&mut self, state: &mut State, slot: usize, end: u32) {
        let view = *self.view(state, slot);
        state.0[NODES + slot] = GONE;
        for from in 0..SLOTS {
            state.0[cell(Line::Peer(from, slot))] = 0;
        }
        state.0[cell(Line::Down(slot))] = 0;
        self.hang_up(state, slot, u16::MAX);
        let leader = self.leader(state);
        if leader.up && view.link != Link::Lost {
            self.close(state, Line::Up(slot), view.session, end);
        }
        self.purge_up(state, slot);
    }

    /// The coordinator is told something.
    pub(super) fn lead(
        &mut self,
        state: &mut State,
        input: LeaderInput,
        dies: Option<u8>,
    ) -> Result<(), String> {
        let local = self.of_leader(state.0[0], input, dies);
        state.0[0] = local.next;
        for effect in &local.effects {
            match effect {
                Effect::Push(line, session, frame) => self.push(state, *line, *session, *frame),
                Effect::Dead => self.dead(state),
                Effect::Back(owners, what) => {
                    let alive = (0..SLOTS).filter(|slot| self.view(state, *slot).alive);
                    let alive = alive.fold(0u8, |mask, slot| mask | 1 << slot);
                    if !owners.is_empty() && owners.iter().all(|mask| mask & alive != 0) {
                        return Err(format!("C-2: {what}, though every slice had a living owner"));
                    }
                }
                Effect::Wrong(wrong) => return Err(wrong.clone()),
                Effect::Connect | Effect::Exit => {}
            }
        }
        for slot in 0..SLOTS {
            self.purge_up(state, slot);
        }
        Ok(())
    }

    /// The coordinator is gone: its sessions end, and what was for it is lost.
    fn dead(&mut self, state: &mut State) {
        for slot in 0..SLOTS {
            state.0[cell(Line::Up(slot))] = 0;
            let view = *self.view(state, slot);
            if view.alive && view.link != Link::Lost {
                self.close(state, Line::Down(slot), view.session, BROKEN);
                // What was said before hanging up may be lost now, too.
                self.change(state, Line::Down(slot), |way| {
                    way.frames
                        .iter_mut()
                        .filter(|(_, frame)| *frame == CLOSED)
                        .for_each(|(_, frame)| *frame = BROKEN);
                });
            }
        }
    }

    /// Drops what is of sessions that the coordinator does not have any more.
    fn purge_up(&mut self, state: &mut State, slot: usize) {
        if state.is_empty(Line::Up(slot)) {
            return;
        }
        let way = self.way(state, Line::Up(slot));
        let leader = self.leader(state);
        let greets = |frame: u32| matches!(self.frames.get(frame), Frame::Hello(_));
        let coming = way.frames.iter().filter(|(_, frame)| greets(*frame)).map(|(session, _)| *session).min();
        let open = leader.sessions[slot];
        let known = |session: u16| coming.is_some_and(|c| session >= c) || open.contains(&session);
        let core = self.coordinator(state);
        let kept = |(session, frame): &(u16, u32)| known(*session) && !core.is_stale(self.frames.get(*frame));
        if way.frames.iter().all(kept) && (way.closed == 0 || known(way.closed)) {
            return;
        }
        let frames = way.frames.iter().copied().filter(kept).collect();
        // A worker sends nothing in a session that it knows to be over.
        let closed = if known(way.closed) { way.closed } else { 0 };
        self.change(state, Line::Up(slot), |way| (way.frames, way.closed) = (frames, closed));
    }
}

/// Drops what is of older generations than this.
fn purge(way: &mut Way, floor: u16) {
    way.frames.retain(|(generation, _)| *generation >= floor);
    if way.closed < floor {
        way.closed = 0;
    }
    if way.notice < floor {
        way.notice = 0;
    }
}
