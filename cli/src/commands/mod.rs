//! The subcommands.

pub mod config;
pub mod coordinator;
pub mod generate;
pub mod inspect;
pub mod status;

#[cfg(test)]
mod testing;
pub mod train;
pub mod worker;
