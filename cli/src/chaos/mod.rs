//! Chaos: a run whose workers are killed, stopped, slowed and cut off on purpose, by a schedule
//! that a seed decides, and that must come to the same bits as a quiet one.
//!
//! `schedule` says what is to be done, `inject` does it (with the proxies of `proxy` between the
//! processes), `watching` runs the caravan, `told` notes what came of each fault, `timeline` says
//! where the time went, and `report` tells it all. `quiet` is the run to compare with.

pub mod inject;
pub mod proxy;
pub mod quiet;
pub mod report;
pub mod schedule;
pub mod timeline;
pub mod told;
pub mod watching;
