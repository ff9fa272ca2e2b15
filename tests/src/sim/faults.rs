//! What goes wrong, and what that breaks.

use super::coordinator::Leader;
use super::network::{End, Frame, Line};
use super::options::{DETECT_MS, FOR_EVER_MS, Fault};
use super::worker::Node;
use super::world::{Due, QUIET_MS, World};
use caravan_coordinator_core::Input as ToCoordinator;
use caravan_engine::Flaw;
use caravan_worker_core::Input;

impl World<'_> {
    pub(super) fn strike(&mut self, fault: Fault) -> Result<(), String> {
        self.outcome.faults += 1;
        let victims: Vec<u64> = self.nodes.keys().copied().collect();
        let victim = self.random.pick(victims.into_iter());
        match (fault, victim) {
            (Fault::Kill, Some(victim)) => self.end(victim, Some(50)),
            (Fault::Pause(ms), Some(victim)) => self.pause(victim, ms),
            (Fault::ClockJump(ms), Some(victim)) => {
                if let Some(node) = self.nodes.get_mut(&victim) {
                    node.offset += ms;
                }
            }
            (Fault::Leave, Some(victim)) => return self.work(victim, Input::Leave, None),
            (Fault::Break, Some(victim)) => self.break_one(victim),
            (Fault::Partition { ms, inward, outward, coordinator }, Some(victim)) => {
                self.partition(victim, ms, (inward, outward), coordinator);
            }
            (Fault::Join, _) => self.at(0, Due::Start),
            (Fault::Drain, _) => return self.coordinate(ToCoordinator::Drain, None),
            (Fault::CoordinatorDies(ms), _) => {
                // In the middle of what it does next, or at once.
                if self.random.below(2) == 0 {
                    let outputs = self.random.below(6);
                    self.doom(outputs);
                } else {
                    self.depose(ms);
                }
            }
            (Fault::StoreFails, _) => self.doom(0),
            (Fault::DiskLost, _) => {
                // Found out when the coordinator is started, which looks for an intact one.
                self.depose(100);
                let disk = &mut *self.disk.borrow_mut();
                // The last one is what a run is for; losing it is losing the run.
                if disk.complete.last_key_value().is_some_and(|(step, _)| step.0 < self.options.steps) {
                    disk.lost.extend(disk.complete.pop_last().map(|(step, _)| step));
                }
            }
            (Fault::Corrupt(flaw), Some(victim)) => self.corrupt(victim, flaw),
            (_, None) => {}
        }
        Ok(())
    }

    /// A bit flips at rest, which its own worker finds; or, where there is somebody to compare
    /// with, something is computed wrong.
    fn corrupt(&mut self, victim: u64, flaw: Flaw) {
        let stepping = self.leader.as_ref().and_then(Leader::stepping);
        let redundant = stepping.is_some_and(|generation| {
            let member = |n: &Node| {
                n.paused.is_none() && n.generation == generation && n.is_stepping() && n.engine.is_sound()
            };
            let lives = |worker| self.process_of(worker).is_some();
            self.checks.is_redundant(generation, lives) && self.nodes.values().all(member)
        });
        let Some(node) = self.nodes.get_mut(&victim) else { return };
        let compared = redundant && self.network.is_whole() && node.worker.is_some();
        let flaw = match flaw {
            Flaw::Sum(bit) | Flaw::Update(bit) if !compared => Flaw::Memory(bit),
            flaw => flaw,
        };
        if !matches!(flaw, Flaw::Memory(_)) {
            self.quiet_until = self.now + QUIET_MS;
        }
        node.engine.fail(flaw);
        self.outcome.flaws.push(flaw);
    }

    fn pause(&mut self, victim: u64, ms: u64) {
        if let Some(node) = self.nodes.get_mut(&victim) {
            node.paused.get_or_insert_with(Vec::new);
            if ms < FOR_EVER_MS {
                self.at(ms, Due::Resume(victim));
            } else {
                // Somebody takes its place in the end.
                self.at(3 * DETECT_MS, Due::Start);
            }
        }
    }

    /// What came meanwhile is found all at once, in order.
    pub(super) fn resume(&mut self, process: u64) -> Result<(), String> {
        let waiting = self.nodes.get_mut(&process).and_then(|n| n.paused.take()).unwrap_or_default();
        for due in waiting {
            self.at(0, due);
        }
        Ok(())
    }

    /// One connection between two workers breaks, at both ends.
    fn break_one(&mut self, victim: u64) {
        let Some(node) = self.nodes.get(&victim) else { return };
        let (Some(worker), generation) = (node.worker, node.generation) else { return };
        let peers: Vec<_> = node.peers.iter().copied().collect();
        let Some(peer) = self.random.pick(peers.into_iter()) else { return };
        let Some(other) = self.process_of(peer) else { return };
        for (from, to, lost) in [(victim, other, worker), (other, victim, peer)] {
            let line = Line { from: End::Worker(from), to: End::Worker(to), generation: generation.0 };
            self.send(line, Frame::PeerLost { generation, peer: lost });
        }
    }

    fn partition(&mut self, victim: u64, ms: u64, (inward, outward): (bool, bool), coordinator: bool) {
        let me = End::Worker(victim);
        let mut others: Vec<End> =
            self.nodes.keys().filter(|p| **p != victim).map(|p| End::Worker(*p)).collect();
        if coordinator {
            others.push(End::Coordinator);
        }
        let mut ends = Vec::new();
        for other in others {
            ends.extend(inward.then_some((other, me)));
            ends.extend(outward.then_some((me, other)));
        }
        ends.iter().for_each(|(a, b)| self.network.set_cut(*a, *b, true));
        self.at(DETECT_MS, Due::Snap(ends.clone()));
        self.at(ms, Due::Mend(ends));
    }

    /// Whatever is still cut has been so for as long as the failure budget: connections over it
    /// break, at both ends, and what was on its way is lost.
    pub(super) fn snap(&mut self, ends: &[(End, End)]) -> Result<(), String> {
        for &(from, to) in
            ends.iter().filter(|(from, to)| self.network.is_cut(*from, *to)).collect::<Vec<_>>()
        {
            self.network.held.retain(|(line, _)| (line.from, line.to) != (from, to));
            match (from, to) {
                (End::Worker(a), End::Worker(b)) => {
                    for (near, far) in [(a, b), (b, a)] {
                        let Some(peer) = self.nodes.get(&far).and_then(|n| n.worker) else { continue };
                        let Some(generation) = self.nodes.get(&near).map(|n| n.generation) else { continue };
                        let line = Line { from: End::Worker(0), to: End::Worker(near), generation: 0 };
                        self.at(0, Due::Frame(line, Frame::PeerLost { generation, peer }));
                    }
                }
                (End::Worker(process), End::Coordinator) | (End::Coordinator, End::Worker(process)) => {
                    let Some(session) = self.nodes.get(&process).and_then(|n| n.session) else { continue };
                    // Each end notices by itself; the network has nothing to carry.
                    let near = Line { from: End::Worker(0), to: End::Worker(process), generation: 0 };
                    self.at(0, Due::Frame(near, Frame::Closed(session)));
                    let far = Line { from: End::Worker(0), to: End::Coordinator, generation: 0 };
                    self.at(0, Due::Frame(far, Frame::Closed(session)));
                }
                (End::Coordinator, End::Coordinator) => {}
            }
        }
        Ok(())
    }
}
