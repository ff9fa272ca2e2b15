//! What Caravan's tests across crates share.

#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails where it stands")]
pub mod browser;
pub mod explore;
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails where it stands")]
pub mod process;
pub mod sim;
pub mod sweep;
