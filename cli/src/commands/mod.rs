//! The subcommands.

pub mod audit;
pub mod chaos;
pub mod config;
pub mod convert;
pub mod coordinator;
pub mod generate;
pub mod inspect;
pub mod open;
pub mod replay;
pub mod score;
pub mod status;

#[cfg(test)]
pub mod testing;
pub mod train;
pub mod worker;
