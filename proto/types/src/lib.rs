//! Caravan's vocabulary: ids, model shape, lanes, slices, plans and messages.
//!
//! Plain data that every other crate may use: no I/O, no clock, no async. Two rules decide
//! what belongs here: it is spoken by at least two crates, and it means the same to both.
//! Behaviour is limited to arithmetic on the data itself (which lanes a tree node covers,
//! where a parameter lies in the flat model); decisions are made in the two cores.

pub mod batch;
pub mod cost;
pub mod dispute;
pub mod exact;
pub mod ids;
pub mod lanes;
pub mod message;
pub mod model;
pub mod non_finite;
pub mod peak;
pub mod peer;
pub mod plan;
pub mod progress;
pub mod recipe;
pub mod run_spec;
pub mod slices;
pub mod status;
pub mod task;
pub mod timing;

pub use batch::{BatchShape, MicroBatch, MicroId};
pub use dispute::{Checksum, Dispute, Opinion, SliceSum, Subject};
pub use ids::{Digest, Generation, SliceId, Step, UnitId, WorkerId};
pub use lanes::{Lane, Node};
pub use model::{ModelShape, Parameter, RopeScaling};
pub use non_finite::{NonFinite, NonFinitePolicy, NotFinite, Verdict};
pub use peak::Peak;
pub use plan::{IdleReason, Member, Part, Pipeline, Plan, Source, Stage, Transfer};
pub use recipe::Recipe;
pub use run_spec::{DataSpec, Initial, NumericsClass, Precision, RunSpec};
pub use slices::{BLOCK, Slice, SliceSet, SliceTable};
pub use timing::Timing;
