//! The coordinator around its core: gRPC sessions, store, live page, telemetry.
//!
//! ```text
//!   workers ── gRPC ─┐                       ┌─ core (decides)
//!                    ├─ listen ─ sessions ─ driver ─ store (remembers)
//!   browser ─ HTTP ──┘     └─ http ─┐        ├─ ledger (what was committed)
//!                                   │        ├─ checkpoints (manifests)
//!                                   │        ├─ control (what the core was told)
//!                                   └──── journal (history, metrics file, live feed)
//! ```
//!
//! Two actors: the driver owns the core and everything that the run depends on; the journal owns everything
//! that people look at. The driver never waits for viewers. Nothing is decided here: what happens to a run is up to `caravan-coordinator-core`.
//!
//! Read first: `driver.rs` (the loop), `store.rs` (what is remembered), `serve.rs` (how it all is
//! put together).

mod checkpoints;
mod clock;
pub mod control;
mod driver;
mod error;
mod handle;
mod history;
mod http;
mod journal;
pub mod ledger;
mod lines;
mod listen;
mod metrics;
pub mod page;
mod serve;
mod sessions;
pub mod store;
mod trace;

pub use error::{BadSetting, CoordinatorError};
pub use handle::{Handle, Outcome, Updates};
pub use journal::Update;
pub use serve::{Options, Running, serve};
