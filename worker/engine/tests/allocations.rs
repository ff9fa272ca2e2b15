//! A step in steady state takes no memory for activations, weights or gradients: the first ones took it.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails where it stands")]
#![allow(unsafe_code, reason = "an allocator that counts")]

mod common;

use caravan_engine::{Executor, fastest};
use caravan_types::{BatchShape, ModelShape, Precision, Step};
use common::{Memory, NoCheckpoints, spec, train_step};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Bytes asked for, and the largest piece.
static TAKEN: AtomicUsize = AtomicUsize::new(0);
static LARGEST: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: the system's allocator does the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        TAKEN.fetch_add(layout.size(), Relaxed);
        LARGEST.fetch_max(layout.size(), Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn a_step_in_steady_state_takes_no_memory() {
    let model = ModelShape { layers: 2, ..ModelShape::preset("15m").unwrap() };
    for precision in [Precision::Fp32, Precision::Mixed] {
        let mut run = spec(&model, fastest(precision).name());
        run.numerics.precision = precision;
        run.batch = BatchShape { lanes: 2, micro_batches: 2, sequences: 2, sequence_length: 128 };
        let mut engine = Executor::new(&run, 2, Arc::default(), Memory::of(&run), NoCheckpoints).unwrap();
        common::begin(&mut engine, &run.model);
        let [first, .., steady] = [1, 2, 3].map(|step| {
            TAKEN.store(0, Relaxed);
            LARGEST.store(0, Relaxed);
            train_step(&mut engine, &run, Step(step));
            (TAKEN.load(Relaxed), LARGEST.load(Relaxed))
        });
        assert!(first.0 > 100 << 20, "{precision}: the first step took {first:?}");
        // Tokens, lists of norms and checksums.
        assert!(steady.0 < 1 << 20 && steady.1 < 64 << 10, "{precision}: the third step took {steady:?}");
    }
}
