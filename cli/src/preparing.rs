//! How far the preparation of data is: a bar a stage on a terminal, a line a stage elsewhere.

use crate::estimate::{bytes, grouped};
use caravan_data::{Progress, Stage};
use indicatif::{ProgressBar, ProgressStyle};
use std::io::{self, IsTerminal, Write};
use std::sync::{Mutex, PoisonError};

/// Shows the progress of a preparation on standard error.
pub struct Preparing {
    terminal: bool,
    /// The stage that is shown; the preparation may report from several threads.
    now: Mutex<Option<(Stage, ProgressBar)>>,
}

impl Preparing {
    /// Nothing is shown before the first report.
    #[must_use]
    pub fn new() -> Self {
        Self { terminal: io::stderr().is_terminal(), now: Mutex::new(None) }
    }

    fn start(&self, stage: Stage, total: u64) -> ProgressBar {
        if !self.terminal {
            // A progress line that cannot be written is no reason to stop preparing.
            writeln!(io::stderr(), "{}", plain(stage, total)).ok();
            return ProgressBar::hidden();
        }
        let bar = ProgressBar::new(total);
        let style = ProgressStyle::with_template(template(stage));
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_prefix(stage.to_string());
        bar
    }
}

impl Progress for Preparing {
    fn update(&self, stage: Stage, done: u64, total: u64) {
        // What a panicking thread left here is still a bar.
        let mut now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
        if now.as_ref().is_none_or(|(shown, _)| *shown != stage) {
            if let Some((_, bar)) = now.take() {
                bar.abandon();
            }
            *now = Some((stage, self.start(stage, total)));
        }
        if let Some((_, bar)) = &*now {
            bar.set_length(total);
            bar.set_position(done);
            if total > 0 && done == total {
                bar.abandon();
            }
        }
    }
}

impl Drop for Preparing {
    fn drop(&mut self) {
        if let Some((_, bar)) = self.now.get_mut().unwrap_or_else(PoisonError::into_inner) {
            bar.abandon();
        }
    }
}

fn plain(stage: Stage, total: u64) -> String {
    match stage {
        Stage::Read | Stage::Write if total > 0 => format!("{stage}: {}", bytes(total)),
        Stage::Find if total > 0 => format!("{stage}: {}", grouped(total)),
        _ => format!("{stage} …"),
    }
}

fn template(stage: Stage) -> &'static str {
    match stage {
        Stage::Read | Stage::Write => "{prefix:32} [{bar:30}] {bytes:>10} of {total_bytes:10} {eta}",
        Stage::Wait => "{prefix:32} {elapsed}",
        Stage::Find | Stage::Train => "{prefix:32} [{bar:30}] {human_pos:>10} of {human_len}",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAGES: [Stage; 5] = [Stage::Wait, Stage::Find, Stage::Read, Stage::Train, Stage::Write];

    #[test]
    fn all_templates_are_valid() {
        for stage in STAGES {
            assert!(ProgressStyle::with_template(template(stage)).is_ok(), "{stage}");
        }
    }

    #[test]
    fn plain_lines_name_the_stage_and_its_size_where_it_is_known() {
        assert_eq!(plain(Stage::Read, 3 << 20), "reading and dropping duplicates: 3.00 MiB");
        assert_eq!(plain(Stage::Find, 1234), "finding files: 1,234");
        assert_eq!(plain(Stage::Find, 0), "finding files …");
    }

    #[test]
    fn stages_may_come_in_any_order_and_repeat() {
        let preparing = Preparing { terminal: true, now: Mutex::new(None) };
        for stage in STAGES.iter().chain(&STAGES) {
            preparing.update(*stage, 0, 0);
            preparing.update(*stage, 5, 5);
        }
    }
}
