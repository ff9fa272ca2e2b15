//! What Caravan's tests across crates share.

pub mod browser;
pub mod cluster;
pub mod process;
