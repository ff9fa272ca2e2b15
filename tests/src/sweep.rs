//! Many seeds of the simulation, on all cores.

use crate::sim::{Bad, Broken, Mutant, Options, Truth, run};
use caravan_types::message::Farewell;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

/// What decides bits: lanes, micro-batches, steps, and those that are not finite.
type Bits = (u32, u32, u64, Vec<Bad>);
type Known = Arc<Mutex<BTreeMap<Bits, Arc<Truth>>>>;

/// What quiet runs on one worker come to, by what decides bits; made when first asked for.
#[derive(Clone, Default)]
pub struct Truths {
    known: Known,
}

impl Truths {
    /// The one that a run is compared with.
    ///
    /// # Panics
    /// Where a quiet run on one worker does not come to its end.
    #[must_use]
    #[allow(clippy::expect_used, clippy::panic, reason = "nothing can be compared without it")]
    pub fn of(&self, options: &Options) -> Arc<Truth> {
        let key = (options.lanes, options.micro_batches, options.steps, options.bad.clone());
        let mut known = self.known.lock().expect("nobody panics while it is held");
        let make = || {
            let quiet = Options::quiet(options.lanes, options.micro_batches, options.steps);
            let quiet = Options { bad: options.bad.clone(), ..quiet };
            Arc::new(run(&quiet, None).unwrap_or_else(|e| panic!("quiet run: {e}")).1)
        };
        Arc::clone(known.entry(key).or_insert_with(make))
    }
}

/// What came of a sweep in which nothing went wrong.
#[derive(Debug, Default)]
pub struct Sweep {
    /// How runs ended.
    pub ends: BTreeMap<String, u64>,
    /// Faults that struck.
    pub faults: u64,
}

/// The first seed that failed.
#[derive(Debug)]
pub struct Failure {
    /// The seed.
    pub seed: u64,
    /// Its options.
    pub options: String,
    /// What went wrong.
    pub reason: String,
}

impl Sweep {
    /// Runs seeds, with a bug switched on or without.
    ///
    /// # Errors
    /// The lowest seed that failed among those that were tried before all threads stopped.
    #[allow(clippy::expect_used, reason = "a panic of a thread is that of the sweep")]
    pub fn run(seeds: Range<u64>, mutant: Option<Mutant>) -> Result<Self, Failure> {
        let (next, truths) = (AtomicU64::new(seeds.start), Truths::default());
        let found: Mutex<(Self, Option<Failure>)> = Mutex::default();
        let threads = thread::available_parallelism().map_or(1, usize::from);
        thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    loop {
                        let seed = next.fetch_add(1, Ordering::Relaxed);
                        if seed >= seeds.end {
                            return;
                        }
                        let options = Options { mutant, ..Options::random(seed) };
                        let outcome = run(&options, Some(&truths.of(&options)));
                        let (sweep, failure) = &mut *found.lock().expect("nobody panics while it is held");
                        match outcome {
                            Ok((outcome, _)) => {
                                sweep.faults += outcome.faults as u64;
                                let end = outcome.farewell.map_or("none".into(), |f| format!("{f:?}"));
                                *sweep.ends.entry(end).or_default() += 1;
                                if outcome.farewell == Some(Farewell::Failed) {
                                    let reason = "the run ended as failed".into();
                                    failure.get_or_insert(Failure {
                                        seed,
                                        options: options.to_string(),
                                        reason,
                                    });
                                    next.store(seeds.end, Ordering::Relaxed);
                                }
                            }
                            Err(Broken { reason, .. }) => {
                                if failure.as_ref().is_none_or(|f| seed < f.seed) {
                                    *failure = Some(Failure { seed, options: options.to_string(), reason });
                                }
                                next.store(seeds.end, Ordering::Relaxed);
                            }
                        }
                    }
                });
            }
        });
        let (sweep, failure) = found.into_inner().expect("nobody panics while it is held");
        failure.map_or(Ok(sweep), Err)
    }
}

impl fmt::Display for Sweep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} faults; ", self.faults)?;
        self.ends.iter().try_for_each(|(end, count)| write!(f, "{count} {end} "))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, options, reason } = self;
        write!(f, "{options}\n{reason}\nreplay: cargo run -p tests --release -- sim --seed {seed}")
    }
}
