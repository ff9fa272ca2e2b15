//! What is done to whom, and when: a pure function of a seed.

use super::proxy::Way;
use caravan_worker::Flaw;
use clap::ValueEnum;
use serde::Serialize;
use std::fmt;

/// What can be done to a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// SIGKILL.
    Kill,
    /// SIGSTOP for longer than the failure budget, then SIGCONT.
    Stop,
    /// SIGSTOP and SIGCONT in turns, each pause well below the failure budget.
    Slow,
    /// Its connections carry nothing for longer than the failure budget.
    Partition,
    /// Its next part of a checkpoint cannot be written.
    Disk,
    /// Its memory or one of its cores fails once, and nothing says so.
    Corrupt,
}

impl Kind {
    /// Whether the others go on without the worker, once it is noticed.
    #[must_use]
    pub fn regroups(self) -> bool {
        self != Self::Disk
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kill => "kill",
            Self::Stop => "stop",
            Self::Slow => "slow",
            Self::Partition => "partition",
            Self::Disk => "disk",
            Self::Corrupt => "corrupt",
        })
    }
}

/// Which of a worker's connections carry nothing, and in which direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Cut {
    /// What other workers send it.
    FromPeers,
    /// What it sends other workers.
    ToPeers,
    /// Both.
    Peers,
    /// What it tells the coordinator.
    ToCoordinator,
    /// What the coordinator tells it.
    FromCoordinator,
    /// Both.
    Coordinator,
    /// All of it.
    Everything,
}

impl Cut {
    /// The ways of a slot's worker that it cuts.
    #[must_use]
    pub fn ways(self, slot: u32) -> Vec<Way> {
        let peers = [Way::FromPeers(slot), Way::ToPeers(slot)];
        let coordinator = [Way::ToCoordinator(slot), Way::FromCoordinator(slot)];
        match self {
            Self::FromPeers => peers[..1].to_vec(),
            Self::ToPeers => peers[1..].to_vec(),
            Self::Peers => peers.to_vec(),
            Self::ToCoordinator => coordinator[..1].to_vec(),
            Self::FromCoordinator => coordinator[1..].to_vec(),
            Self::Coordinator => coordinator.to_vec(),
            Self::Everything => [peers, coordinator].concat(),
        }
    }
}

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::FromPeers => "from its peers",
            Self::ToPeers => "to its peers",
            Self::Peers => "from and to its peers",
            Self::ToCoordinator => "to the coordinator",
            Self::FromCoordinator => "from the coordinator",
            Self::Coordinator => "from and to the coordinator",
            Self::Everything => "from and to anybody",
        })
    }
}

/// What is done. Lengths are shares of the failure budget, which a schedule does not know.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Act {
    /// SIGKILL.
    Kill,
    /// Stopped for so many failure budgets.
    Stop {
        /// More than one.
        budgets: f64,
    },
    /// Stopped for a share of the failure budget, and as long not, so many times.
    Slow {
        /// Well below one.
        budgets: f64,
        /// How often.
        pauses: u32,
    },
    /// Cut off for so many failure budgets.
    Partition {
        /// From what.
        cut: Cut,
        /// More than one.
        budgets: f64,
        /// Whether the connections then break, instead of carrying what was held back.
        breaks: bool,
    },
    /// No file that it writes may grow past a few bytes, until a checkpoint was tried.
    Disk,
    /// One bit comes out wrong.
    Corrupt {
        /// Where.
        place: Place,
        /// Which one.
        bit: u64,
    },
}

/// Where a bit comes out wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Place {
    /// In memory, in weights or training state.
    Memory,
    /// In the next sum of gradients.
    Sum,
    /// In the next update of weights.
    Update,
}

impl Place {
    /// What the worker is told.
    #[must_use]
    pub fn flaw(self, bit: u64) -> Flaw {
        match self {
            Self::Memory => Flaw::Memory(bit),
            Self::Sum => Flaw::Sum(bit),
            Self::Update => Flaw::Update(bit),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Memory => "memory",
            Self::Sum => "the next sum of gradients",
            Self::Update => "the next update of weights",
        })
    }
}

impl Act {
    /// Its kind.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Kill => Kind::Kill,
            Self::Stop { .. } => Kind::Stop,
            Self::Slow { .. } => Kind::Slow,
            Self::Partition { .. } => Kind::Partition,
            Self::Disk => Kind::Disk,
            Self::Corrupt { .. } => Kind::Corrupt,
        }
    }

    /// Whether somebody has to notice it, since nothing goes on before. A worker that is only not
    /// told anything by the coordinator steps on: it is told nothing while nothing happens.
    #[must_use]
    pub fn is_noticed(&self) -> bool {
        match self {
            Self::Kill | Self::Stop { .. } => true,
            Self::Partition { cut, .. } => *cut != Cut::FromCoordinator,
            // Weights whose bits flip just before they are replaced harm nobody.
            Self::Corrupt { place, .. } => *place != Place::Memory,
            Self::Slow { .. } | Self::Disk => false,
        }
    }
}

impl fmt::Display for Act {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kill => f.write_str("kill"),
            Self::Stop { budgets } => write!(f, "stop for {budgets:.1} failure budgets"),
            Self::Slow { budgets, pauses } => {
                write!(f, "slow: {pauses} pauses of {budgets:.1} failure budgets")
            }
            Self::Partition { cut, budgets, breaks } => {
                let then = if *breaks { ", then broken" } else { "" };
                write!(f, "partition: nothing {cut} for {budgets:.1} failure budgets{then}")
            }
            Self::Disk => f.write_str("disk: no room for the next checkpoint"),
            Self::Corrupt { place, .. } => write!(f, "corrupt: a bit flips in {place}"),
        }
    }
}

/// One thing that is done.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Fault {
    /// The worker, from 1.
    pub slot: u32,
    /// Once this step is committed.
    pub step: u64,
    /// So far into the next one, as a share of how long one takes.
    pub moment: f64,
    /// What.
    #[serde(flatten)]
    pub act: Act,
}

/// What a schedule is made of.
#[derive(Clone, Debug)]
pub struct Request {
    /// Decides everything that is left open.
    pub seed: u64,
    /// How many faults.
    pub faults: u32,
    /// Of which kinds; not empty.
    pub kinds: Vec<Kind>,
    /// Workers.
    pub workers: u32,
    /// Steps of the run.
    pub steps: u64,
    /// Whether every slice has a second owner whenever a fault comes: what one computes wrong, only
    /// another one can tell.
    pub redundant: bool,
}

/// Faults come in the first four fifths of a run: the last one is to be got over before the end.
const LAST: (u64, u64) = (4, 5);

/// The faults, in order of their steps. One comes in each of as many equal parts of the run, so
/// that there is time to get over it.
#[must_use]
pub fn schedule(request: &Request) -> Vec<Fault> {
    let mut random = Random::new(request.seed);
    let span = (request.steps * LAST.0 / LAST.1).max(1);
    let faults = u64::from(request.faults);
    let at = |n: u64| span * n / faults.max(1);
    (0..faults)
        .map(|n| {
            let step = at(n) + 1 + random.below(at(n + 1) - at(n));
            let slot = 1 + random.below(u64::from(request.workers)) as u32;
            let moment = random.share();
            let kind = request.kinds[random.below(request.kinds.len() as u64) as usize];
            Fault { slot, step, moment, act: act(kind, request.redundant, &mut random) }
        })
        .collect()
}

fn act(kind: Kind, redundant: bool, random: &mut Random) -> Act {
    match kind {
        Kind::Kill => Act::Kill,
        Kind::Stop => Act::Stop { budgets: 1.5 + random.share() },
        Kind::Slow => Act::Slow { budgets: 0.1 + 0.2 * random.share(), pauses: 3 + random.below(6) as u32 },
        Kind::Partition => {
            let cuts = Cut::value_variants();
            Act::Partition {
                cut: cuts[random.below(cuts.len() as u64) as usize],
                budgets: 1.5 + random.share(),
                breaks: random.below(2) == 1,
            }
        }
        Kind::Disk => Act::Disk,
        Kind::Corrupt => {
            let bit = random.next() >> 1;
            let place = [Place::Memory, Place::Sum, Place::Update][random.below(3) as usize];
            Act::Corrupt { place: if redundant { place } else { Place::Memory }, bit }
        }
    }
}

/// A stream of random numbers: SplitMix64 (Steele, Lea and Flood, 2014).
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// Below `n`; 0 where n is 0.
    fn below(&mut self, n: u64) -> u64 {
        self.next().checked_rem(n).unwrap_or(0)
    }

    /// From 0 to 1, in thousandths, so that it reads well.
    fn share(&mut self) -> f64 {
        self.below(1000) as f64 / 1000.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(seed: u64) -> Request {
        let kinds = vec![Kind::Kill, Kind::Stop, Kind::Slow, Kind::Partition, Kind::Disk];
        Request { seed, faults: 40, kinds, workers: 3, steps: 1000, redundant: true }
    }

    #[test]
    fn the_same_seed_gives_the_same_schedule_and_another_one_another() {
        assert_eq!(schedule(&request(7)), schedule(&request(7)));
        assert_ne!(schedule(&request(7)), schedule(&request(8)));
        // Whoever repeats a run of last year wants that run.
        let first = schedule(&request(7))[0];
        assert_eq!((first.slot, first.step, first.act.kind()), (1, 8, Kind::Partition), "{first:?}");
    }

    #[test]
    fn faults_are_spread_over_the_run_and_every_kind_and_worker_has_some() {
        let faults = schedule(&request(1));
        assert_eq!(faults.len(), 40);
        assert!(faults.windows(2).all(|w| w[0].step < w[1].step));
        assert!(faults.iter().all(|f| (1..=800).contains(&f.step) && (0.0..1.0).contains(&f.moment)));
        for kind in request(1).kinds {
            assert!(faults.iter().any(|f| f.act.kind() == kind), "{kind}");
        }
        for slot in 1..=3 {
            assert!(faults.iter().any(|f| f.slot == slot), "{slot}");
        }
    }

    #[test]
    fn what_only_a_second_owner_can_tell_is_done_only_where_there_is_one() {
        let places = |redundant| {
            let faults = schedule(&Request { kinds: vec![Kind::Corrupt], redundant, ..request(3) });
            faults.into_iter().map(|fault| match fault.act {
                Act::Corrupt { place, .. } => place,
                other => panic!("{other}"),
            })
        };
        assert!(places(false).all(|place| place == Place::Memory));
        for place in [Place::Memory, Place::Sum, Place::Update] {
            assert!(places(true).any(|p| p == place), "{place}");
        }
    }

    #[test]
    fn more_faults_than_steps_and_none_at_all_are_schedules_too() {
        assert_eq!(schedule(&Request { steps: 3, ..request(1) }).len(), 40);
        assert!(schedule(&Request { faults: 0, ..request(1) }).is_empty());
    }

    #[test]
    fn stops_and_partitions_outlast_the_failure_budget_and_pauses_do_not() {
        for seed in 0..50 {
            for fault in schedule(&request(seed)) {
                match fault.act {
                    Act::Stop { budgets } | Act::Partition { budgets, .. } => assert!(budgets >= 1.5),
                    Act::Slow { budgets, .. } => assert!(budgets <= 0.3),
                    Act::Kill | Act::Disk | Act::Corrupt { .. } => {}
                }
            }
        }
    }
}
