//! What an engine shares with whoever drives it: the fence, and how far it is.
//!
//! The one thing that is written from outside while a task runs is the fence; the one thing that
//! is read is progress. Both are single words, so nobody waits for anybody.

use caravan_types::progress::{Doing, EngineProgress, Place};
use caravan_types::{Generation, MicroId};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Shared by an engine and its driver.
#[derive(Debug, Default)]
pub struct Watch {
    fence: AtomicU64,
    moved: AtomicU64,
    doing: AtomicU64,
    busy_us: AtomicU64,
    work: AtomicU64,
}

/// Bits of a unit's number, of a micro-batch's, and of a lane's, in one word with the activity.
/// Larger numbers come out cut off, in a text for people.
const UNIT: u32 = 16;
const INDEX: u32 = 16;
const LANE: u32 = 20;

impl Watch {
    /// From now on, what belongs to older generations is given up.
    pub fn raise(&self, generation: Generation) {
        self.fence.fetch_max(generation.0, Ordering::SeqCst);
    }

    /// Whether this generation has been given up.
    #[must_use]
    pub fn is_fenced(&self, generation: Generation) -> bool {
        self.fence.load(Ordering::SeqCst) > generation.0
    }

    /// Notes what is done now.
    pub fn begin(&self, doing: Doing) {
        self.doing.store(pack(doing), Ordering::Relaxed);
        self.moved.fetch_add(1, Ordering::Relaxed);
    }

    /// Notes that a forward or backward task is done: the time that it took, and its FLOPs.
    pub fn worked(&self, took: Duration, flops: u64) {
        let took_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.busy_us.fetch_add(took_us, Ordering::Relaxed);
        self.work.fetch_add(flops, Ordering::Relaxed);
    }

    /// How far the engine is.
    #[must_use]
    pub fn progress(&self) -> EngineProgress {
        let doing = unpack(self.doing.load(Ordering::Relaxed));
        EngineProgress {
            moved: self.moved.load(Ordering::Relaxed),
            doing,
            busy_ms: self.busy_us.load(Ordering::Relaxed) / 1000,
            work: self.work.load(Ordering::Relaxed),
        }
    }
}

fn pack(doing: Doing) -> u64 {
    let place = |kind: u64, Place { micro, unit }: Place| {
        let cut = |value: u32, bits: u32| u64::from(value) & ((1 << bits) - 1);
        let (unit, index, lane) = (cut(unit, UNIT), cut(micro.index, INDEX), cut(micro.lane, LANE));
        kind | (unit | index << UNIT | lane << (UNIT + INDEX)) << 8
    };
    match doing {
        Doing::Nothing => 0,
        Doing::Moving => 1,
        Doing::Forward(at) => place(2, at),
        Doing::Backward(at) => place(3, at),
        Doing::Reducing => 4,
        Doing::Applying => 5,
        Doing::Saving => 6,
        Doing::Loading => 7,
    }
}

fn unpack(word: u64) -> Doing {
    let field = |shift: u32, bits: u32| (word >> (8 + shift) & ((1 << bits) - 1)) as u32;
    let micro = MicroId { lane: field(UNIT + INDEX, LANE), index: field(UNIT, INDEX) };
    let place = Place { micro, unit: field(0, UNIT) };
    match word & 0xff {
        1 => Doing::Moving,
        2 => Doing::Forward(place),
        3 => Doing::Backward(place),
        4 => Doing::Reducing,
        5 => Doing::Applying,
        6 => Doing::Saving,
        7 => Doing::Loading,
        _ => Doing::Nothing,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_done_can_be_read_and_every_note_is_progress() {
        let watch = Watch::default();
        let place = Place { micro: MicroId { lane: 77, index: 3 }, unit: 81 };
        let all = [
            Doing::Moving,
            Doing::Forward(place),
            Doing::Backward(place),
            Doing::Reducing,
            Doing::Applying,
            Doing::Saving,
            Doing::Loading,
            Doing::Nothing,
        ];
        for (i, doing) in all.into_iter().enumerate() {
            watch.begin(doing);
            assert_eq!(
                watch.progress(),
                EngineProgress { moved: i as u64 + 1, doing, ..EngineProgress::default() }
            );
        }
    }

    #[test]
    fn times_of_less_than_a_millisecond_add_up() {
        let watch = Watch::default();
        (0..10).for_each(|_| watch.worked(Duration::from_micros(250), 7));
        assert_eq!((watch.progress().busy_ms, watch.progress().work), (2, 70));
    }

    #[test]
    fn a_fence_only_rises() {
        let watch = Watch::default();
        watch.raise(Generation(3));
        watch.raise(Generation(2));
        assert!(watch.is_fenced(Generation(2)) && !watch.is_fenced(Generation(3)));
    }
}
