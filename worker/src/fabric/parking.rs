//! Connections of generations that we have no plan for yet.

use super::fault::Fault;
use super::listen::Opening;
use caravan_types::Generation;
use std::time::Duration;
use tokio::time::{Instant, sleep_until};

/// Room for the peers of one generation; more than one is not waited for, as nobody gets a
/// plan before everybody has stopped for it.
const ROOM: usize = 1024;

/// Parked connections, oldest first.
pub struct Parking {
    patience: Duration,
    parked: Vec<(Instant, Opening)>,
}

impl Parking {
    pub fn new(patience: Duration) -> Self {
        Self { patience, parked: Vec::new() }
    }

    /// Parks a connection, or closes it where there is no room.
    pub fn park(&mut self, opening: Opening) {
        if self.parked.len() == ROOM {
            return opening.close(&Fault::NoRoom);
        }
        self.parked.push((Instant::now() + self.patience, opening));
    }

    /// Whether nobody waits.
    #[cfg(test)]
    pub fn is_empty(&self) -> bool {
        self.parked.is_empty()
    }

    /// Lets the connections of a generation go on.
    pub fn leave(&mut self, generation: Generation) -> Vec<Opening> {
        self.parked.extract_if(.., |(_, o)| o.generation == generation).map(|(_, opening)| opening).collect()
    }

    /// Closes those of older generations.
    pub fn fence(&mut self, fence: Generation) {
        for (_, opening) in self.parked.extract_if(.., |(_, o)| o.generation < fence) {
            opening.close(&Fault::Fenced { generation: opening.generation, fence });
        }
    }

    /// Waits until one has waited too long, and closes it. Never returns where none waits.
    pub async fn expire(&mut self) {
        let Some((until, _)) = self.parked.first() else {
            return std::future::pending().await;
        };
        sleep_until(*until).await;
        let (_, opening) = self.parked.remove(0);
        opening.close(&Fault::ParkedTooLong(self.patience));
    }
}
