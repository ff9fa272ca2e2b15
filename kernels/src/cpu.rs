//! The device: a pool of threads and an instruction family.

use crate::{Family, matmul, rmsnorm};
use rayon::prelude::*;

/// Why there is no [`Cpu`].
#[derive(Debug, thiserror::Error)]
pub enum CpuError {
    /// The operating system gave no threads.
    #[error("cannot start {threads} compute threads: {source}; ask for fewer threads")]
    Threads {
        /// How many were asked for.
        threads: usize,
        /// What rayon said.
        source: rayon::ThreadPoolBuildError,
    },
}

/// The processor as the kernels use it. Number of threads: speed only. Family: bits.
#[derive(Debug)]
pub struct Cpu {
    pool: rayon::ThreadPool,
    family: Family,
}

impl Cpu {
    /// Starts a pool of `threads` (at least one).
    ///
    /// # Errors
    /// Where threads cannot be started.
    pub fn new(threads: usize, family: Family) -> Result<Self, CpuError> {
        let threads = threads.max(1);
        let builder = rayon::ThreadPoolBuilder::new().num_threads(threads);
        let pool = builder
            .thread_name(|i| format!("compute-{i}"))
            .build()
            .map_err(|source| CpuError::Threads { threads, source })?;
        Ok(Self { pool, family })
    }

    /// The instruction family.
    #[must_use]
    pub fn family(&self) -> Family {
        self.family
    }

    /// Number of threads.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// Runs a closure on the pool's threads. Operations do this by themselves; a caller that
    /// wraps many of them saves one hand-over each.
    pub fn install<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        self.pool.install(f)
    }

    /// `f` of each item, in the items' order, computed by all threads.
    pub fn map<T: Sync, U: Send>(&self, items: &[T], f: impl Fn(&T) -> U + Send + Sync) -> Vec<U> {
        self.install(|| items.par_iter().map(f).collect())
    }

    /// Rows that a task takes which does several operations one after the other on its rows, of `rows`
    /// that there are. A multiple of [`rmsnorm::ROWS`](crate::rmsnorm::ROWS).
    #[must_use]
    pub fn rows_per_task(&self, rows: usize) -> usize {
        matmul::task_rows(rows, rmsnorm::ROWS, 1, self.threads())
    }

    /// Runs `f` on each part with its number, in any order. Tuples of parts are dealt together.
    pub fn deal<P>(&self, parts: P, f: impl Fn(usize, P::Item) + Send + Sync)
    where
        P: IntoParallelIterator<Iter: IndexedParallelIterator> + Send,
    {
        self.install(|| parts.into_par_iter().with_max_len(1).enumerate().for_each(|(i, part)| f(i, part)));
    }

    /// Runs `f(0..tasks)` in any order, each task once.
    pub(crate) fn for_each(&self, tasks: usize, f: impl Fn(usize) + Send + Sync) {
        self.install(|| (0..tasks).into_par_iter().with_max_len(1).for_each(f));
    }
}
