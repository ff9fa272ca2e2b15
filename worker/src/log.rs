//! What was logged on a test's thread.

use std::io::{Result, Write};
use std::sync::{Arc, Mutex};
use tracing::subscriber::{DefaultGuard, set_default};

/// A log in memory.
#[derive(Clone, Default)]
pub struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    /// Takes what this thread logs from now on, until the guard is dropped.
    pub fn listen(&self) -> DefaultGuard {
        let log = self.clone();
        set_default(tracing_subscriber::fmt().with_ansi(false).with_writer(move || log.clone()).finish())
    }

    pub fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }

    /// How many lines have all of these words.
    pub fn lines(&self, words: &[&str]) -> usize {
        self.text().lines().filter(|line| words.iter().all(|word| line.contains(word))).count()
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}
