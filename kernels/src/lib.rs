//! The arithmetic of a Llama and its optimiser, one operation a file.
//!
//! Nothing here knows a model, a layer or a run: an operation takes slices and sizes. Three
//! rules shape all of it.
//!
//! - **The order of every sum is fixed by shapes.** Work is dealt to threads by rows or
//!   columns of the *result*; a sum is never split by the number of threads, and the summed
//!   dimension of a matrix product is blocked by a constant ([`matmul::depth`]). So bits
//!   depend on the instruction [`Family`] and on nothing else that a machine may report.
//! - **One body, two types.** Every operation is generic over [`Real`], so that the code that
//!   trains in f32 is the code that is checked against finite differences in f64.
//! - **No libm of the platform.** Its functions differ between C libraries; exponentials are
//!   [`Real::exp`], the rest comes from the `libm` crate.
//!
//! Loops are compiled once for each family by the `kernel!` macro; the multiply-add bodies of
//! f32 and f64 products are those of the `gemm` project. [`Cpu`] carries the thread pool and the
//! family, and is the first argument of every operation: the place where another device
//! would come in. What is named `…_rows` takes a [`Family`] instead and is one thread's work on
//! some rows, for a task that does several operations on them ([`Cpu::deal`]).

mod cpu;
#[macro_use]
mod family;
pub mod adamw;
pub mod add;
pub mod attention;
mod buffer;
pub mod checksum;
mod crc;
pub mod cross_entropy;
mod element;
pub mod embedding;
pub mod log_prob;
pub mod matmul;
mod peak;
mod real;
mod reduce;
pub mod rmsnorm;
pub mod rope;
mod scratch;
pub mod squared_norm;
pub mod swiglu;
mod target;

pub use buffer::Buffer;
pub use cpu::{Cpu, CpuError};
pub use element::{Bf16, Element};
pub use family::Family;
pub use matmul::{View, ViewMut};
pub use peak::peak;
pub use real::Real;
