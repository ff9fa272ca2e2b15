//! What Caravan's tests across crates share.

pub mod cluster;
