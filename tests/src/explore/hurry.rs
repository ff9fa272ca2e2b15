//! What is done at once, because it may as well happen now as at any other moment.
//!
//! Three reasons make that sound; each is about pairs of things that can happen:
//!
//! - *Gathered*: a partial sum, a vote or an answer of the engine that only completes a set, and a
//!   report or a word for a checkpoint that is not the last one, or is only sent. Nobody notices
//!   before the set is whole; and since sets are forgotten with their generation, losing a piece
//!   is the same as the engine, or the piece after it, being too late.
//! - *Alone*: a worker without a plan takes nothing but what the coordinator tells it, in order,
//!   so there is no other order.
//! - *Unheard*: what a session would say when it is over, or before it is welcomed, is said to
//!   nobody; so it does not matter when the one or the other is noticed.
//!
//! The last two hold once no more faults are to come, as do those about ends of connections.

use super::frame::{BROKEN, Effect, Frame, Line, is_end};
use super::leader::LeaderInput;
use super::node::{Link, NodeInput};
use super::setting::SLOTS;
use super::state::{NODES, State};
use super::world::World;
use caravan_types::message::{FromWorker, ToWorker};

impl World {
    /// Does all that may as well happen now.
    ///
    /// # Errors
    /// The invariant that does not hold then.
    pub(super) fn hurry(&mut self, state: &mut State) -> Result<(), String> {
        if !self.setting.options.eager {
            return Ok(());
        }
        let last = state.faults() >= self.setting.options.faults;
        if last {
            (0..SLOTS).for_each(|slot| self.ignore_ends(state, slot));
        }
        let mut slot = 0;
        while slot < SLOTS && !self.is_over(state) {
            let report = |frame: &Frame| matches!(frame, Frame::Up(FromWorker::Report(_)));
            let done = self.gather(state, slot)
                || self.reach(state, slot, is_word)
                || last && (self.reach(state, slot, report) || self.obey(state, slot)?);
            slot = if done { 0 } else { slot + 1 };
        }
        Ok(())
    }

    /// One thing that only completes a set.
    fn gather(&mut self, state: &mut State, slot: usize) -> bool {
        let view = *self.view(state, slot);
        if view.live == 0 {
            return false;
        }
        if view.gathering && self.quietly(state, slot, NodeInput::Engine) {
            return true;
        }
        for from in 0..SLOTS {
            let line = Line::Peer(from, slot);
            if state.is_empty(line) {
                continue;
            }
            if let Some((generation, frame)) = self.way(state, line).frames.first().copied()
                && generation == view.live
                && self.frames.get(frame).is_gathered()
                && self.quietly(state, slot, NodeInput::Peer(from, generation, frame))
            {
                self.pop(state, line, 0);
                return true;
            }
        }
        false
    }

    /// Tells a worker something, unless anybody would notice or it would have more to report. A
    /// word for a checkpoint is noticed only where it is heard.
    fn quietly(&mut self, state: &mut State, slot: usize, input: NodeInput) -> bool {
        let before = self.view(state, slot).reported();
        let local = self.of_node(state.0[NODES + slot], input);
        let mut words = Vec::new();
        for effect in &local.effects {
            match effect {
                Effect::Push(line, session, frame) if is_word(self.frames.get(*frame)) => {
                    words.push((*line, *session, *frame));
                }
                _ => return false,
            }
        }
        if self.view_of(local.next).reported() != before {
            return false;
        }
        state.0[NODES + slot] = local.next;
        for (line, session, frame) in words {
            self.push(state, line, session, frame);
        }
        true
    }

    /// What only completes a set of the coordinator's reaches it, where others are missing still.
    fn reach(&mut self, state: &mut State, slot: usize, is: fn(&Frame) -> bool) -> bool {
        if state.is_empty(Line::Up(slot)) {
            return false;
        }
        let Some((session, frame)) = self.way(state, Line::Up(slot)).frames.first().copied() else {
            return false;
        };
        if !is(self.frames.get(frame)) || !self.leader(state).up {
            return false;
        }
        let local = self.of_leader(state.0[0], LeaderInput::Up(slot, session, frame), None);
        if local.effects.is_empty() {
            state.0[0] = local.next;
            self.pop(state, Line::Up(slot), 0);
        }
        local.effects.is_empty()
    }

    /// What comes to a worker that nothing else can come to, or that nobody hears.
    fn obey(&mut self, state: &mut State, slot: usize) -> Result<bool, String> {
        let (view, up) = (*self.view(state, slot), self.leader(state).up);
        if !up {
            self.lead(state, LeaderInput::Start, None)?;
            return Ok(true);
        }
        if !view.alive {
            return Ok(false);
        }
        if view.link == Link::Lost {
            self.tell(state, slot, NodeInput::Attach)?;
            return Ok(true);
        }
        let down = &self.way(state, Line::Down(slot)).frames;
        let Some(&(_, frame)) = down.first() else { return Ok(false) };
        let broken = down.iter().any(|(_, frame)| *frame == BROKEN);
        let alone = view.live == 0 && !view.computing && !view.saving && !broken;
        let ended = is_end(frame);
        let known = matches!(self.frames.get(frame), Frame::Down(ToWorker::Plan(_))) && {
            let local = self.of_node(state.0[NODES + slot], NodeInput::Down(frame));
            local.effects.is_empty() && local.next == state.0[NODES + slot]
        };
        if alone || ended || known {
            self.pop(state, Line::Down(slot), 0);
            self.tell(state, slot, if ended { NodeInput::Closed } else { NodeInput::Down(frame) })?;
        }
        Ok(alone || ended || known)
    }

    /// Once no more faults are to come, a worker that has been told to stop at once need not hear
    /// who else is gone: it would tell the coordinator, who knows, and send to nobody.
    fn ignore_ends(&mut self, state: &mut State, slot: usize) {
        let view = *self.view(state, slot);
        if view.live == 0 || state.is_empty(Line::Down(slot)) {
            return;
        }
        let down = &self.way(state, Line::Down(slot)).frames;
        let stopped = |(session, frame): &(u16, u32)| {
            *session == view.session && self.frames.get(*frame).stops(view.live)
        };
        let broken = down.iter().any(|(_, frame)| *frame == BROKEN);
        if broken || !self.leader(state).up || !down.iter().any(stopped) {
            return;
        }
        for from in 0..SLOTS {
            let line = Line::Peer(from, slot);
            if state.is_empty(line) {
                continue;
            }
            let way = self.way(state, line);
            let ends = |(generation, frame): &(u16, u32)| (*generation, *frame) == (view.live, BROKEN);
            if way.notice == view.live || way.frames.iter().any(ends) {
                self.change(state, line, |way| {
                    way.frames.retain(|frame| !ends(frame));
                    way.notice = 0;
                });
            }
        }
    }
}

/// Whether an owner vouches for a checkpoint.
fn is_word(frame: &Frame) -> bool {
    matches!(frame, Frame::Up(FromWorker::Vouched { .. }))
}
