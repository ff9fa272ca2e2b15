//! Chaos: a run whose workers are killed, stopped, slowed and cut off on purpose, by a schedule
//! that a seed decides, and that must come to the same bits as a quiet one.
//!
//! `schedule` says what is to be done, `inject` does it, `watching` runs the caravan and notes
//! what came of it, `timeline` says where the time went, and `report` tells it all.

pub mod inject;
pub mod proxy;
pub mod report;
pub mod schedule;
pub mod timeline;
pub mod watching;
