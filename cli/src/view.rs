//! What a person sees of a run while it trains: one live line on a terminal with what happens
//! above it, plain lines elsewhere.
//!
//! It goes to standard error: standard output is for results.

use crate::estimate::grouped;
use caravan_types::status::{LoggedEvent, Phase, Snapshot, StepMetrics};
use indicatif::{ProgressBar, ProgressStyle};
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

/// Without a terminal, steps are told no more often than this: a log is to be read.
const PLAIN_EVERY_MS: u64 = 2000;

/// The live line turns its wheel this often, so that a hanging run is told from a hanging
/// terminal.
const TICK: Duration = Duration::from_millis(200);

/// Shows a run.
pub struct View {
    to: To,
    steps: u64,
    /// When the last plain line was written, by the coordinator's clock.
    told_ms: u64,
    eta_seconds: Option<f64>,
}

enum To {
    Terminal(ProgressBar),
    Lines(Box<dyn Write + Send>),
}

impl View {
    /// A view on standard error, for a run of so many steps.
    #[must_use]
    pub fn new(steps: u64) -> Self {
        if !io::stderr().is_terminal() {
            return Self::lines(steps, Box::new(io::stderr()));
        }
        let bar = ProgressBar::new(steps);
        // The template is a constant of this program: that it parses is tested.
        let style = ProgressStyle::with_template(TEMPLATE).unwrap_or_else(|_| ProgressStyle::default_bar());
        bar.set_style(style);
        bar.enable_steady_tick(TICK);
        Self { to: To::Terminal(bar), steps, told_ms: 0, eta_seconds: None }
    }

    fn lines(steps: u64, out: Box<dyn Write + Send>) -> Self {
        Self { to: To::Lines(out), steps, told_ms: 0, eta_seconds: None }
    }

    /// The run at this moment.
    pub fn snapshot(&mut self, snapshot: &Snapshot) {
        self.eta_seconds = snapshot.eta_seconds;
        let To::Terminal(bar) = &self.to else { return };
        bar.set_position(snapshot.step.0);
        if snapshot.phase != Phase::Running {
            bar.set_message(format!("{}, {} workers", snapshot.phase, snapshot.workers.len()));
        }
    }

    /// A step was committed.
    pub fn step(&mut self, step: &StepMetrics) {
        let line = step_line(step, self.steps, self.eta_seconds);
        match &mut self.to {
            To::Terminal(bar) => {
                bar.set_position(step.step.0);
                bar.set_message(line);
            }
            To::Lines(out) => {
                let due = step.unix_ms.saturating_sub(self.told_ms) >= PLAIN_EVERY_MS;
                if due || step.step.0 == self.steps {
                    self.told_ms = step.unix_ms;
                    tell(out, &line);
                }
            }
        }
    }

    /// Something happened.
    pub fn event(&mut self, event: &LoggedEvent) {
        self.say(&event.text);
    }

    /// A line of the program's own.
    pub fn say(&mut self, line: &str) {
        match &mut self.to {
            To::Terminal(bar) => bar.println(line),
            To::Lines(out) => tell(out, line),
        }
    }
}

impl Drop for View {
    fn drop(&mut self) {
        if let To::Terminal(bar) = &self.to {
            bar.abandon();
        }
    }
}

const TEMPLATE: &str = "{spinner} [{bar:20}] {wide_msg}";

/// A view that nobody reads any more must not end the run.
fn tell(out: &mut dyn Write, line: &str) {
    writeln!(out, "{line}").and_then(|()| out.flush()).ok();
}

/// A committed step in one line.
#[must_use]
pub fn step_line(m: &StepMetrics, steps: u64, eta_seconds: Option<f64>) -> String {
    let eta = eta_seconds.map_or(String::new(), |s| format!("  eta {}", time(s)));
    let mfu = m.mfu.map_or(String::new(), |share| format!("  mfu {:.1} %", 100.0 * share));
    format!(
        "step {}/{steps}  loss {:.4}  lr {:.2e}  norm {:.3}  {} tokens/s{mfu}{eta}  {} worker{}  {}",
        m.step,
        m.loss,
        m.learning_rate,
        m.norm,
        grouped(m.tokens_per_second.round() as u64),
        m.workers,
        if m.workers == 1 { "" } else { "s" },
        m.generation,
    )
}

/// Seconds as people say them: `45s`, `3m20s`, `2h05m`, `3d04h`.
#[must_use]
pub fn time(seconds: f64) -> String {
    let s = seconds.max(0.0).round() as u64;
    match s {
        0..60 => format!("{s}s"),
        60..3600 => format!("{}m{:02}s", s / 60, s % 60),
        3600..86_400 => format!("{}h{:02}m", s / 3600, s / 60 % 60),
        _ => format!("{}d{:02}h", s / 86_400, s / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use caravan_types::status::Event;
    use caravan_types::{Generation, Step};
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn metrics(step: u64, unix_ms: u64) -> StepMetrics {
        StepMetrics {
            step: Step(step),
            generation: Generation(3),
            loss: 4.5,
            norm: 0.83,
            learning_rate: 1.8e-3,
            tokens: 2048,
            tokens_per_second: 2301.4,
            mfu: Some(0.613),
            workers: 2,
            unix_ms,
        }
    }

    #[test]
    fn without_a_terminal_steps_are_told_now_and_then_and_events_and_the_last_step_always() {
        let out = Shared::default();
        let mut view = View::lines(30, Box::new(out.clone()));
        for step in 1..=29 {
            view.step(&metrics(step, 10_000 + step * 100));
        }
        let event = Event::CheckpointWritten { step: Step(29) };
        view.event(&LoggedEvent { number: 0, unix_ms: 0, step: Step(29), text: event.to_string(), event });
        view.snapshot(&Snapshot { eta_seconds: Some(0.0), ..Snapshot::default() });
        view.step(&metrics(30, 13_000));
        let text = String::from_utf8(out.0.lock().unwrap().clone()).unwrap();
        let lines: Vec<_> = text.lines().collect();
        let first =
            "step 1/30  loss 4.5000  lr 1.80e-3  norm 0.830  2,301 tokens/s  mfu 61.3 %  2 workers  g3";
        assert_eq!(lines[0], first);
        let unknown = step_line(&StepMetrics { mfu: None, ..metrics(1, 0) }, 30, None);
        assert_eq!(unknown, first.replace("  mfu 61.3 %", ""));
        assert!(lines[1].starts_with("step 21/30"), "{text}");
        assert_eq!(lines[2], "checkpoint of step 29 written");
        assert!(lines[3].starts_with("step 30/30") && lines[3].contains("  eta 0s  "), "{text}");
        assert_eq!(lines.len(), 4);
    }

    #[test]
    fn times_are_said_as_people_say_them() {
        assert_eq!([0.4, 59.4, 200.0, 7500.0, 273_600.0].map(time), ["0s", "59s", "3m20s", "2h05m", "3d04h"]);
    }

    #[test]
    fn the_live_lines_template_is_valid() {
        assert!(ProgressStyle::with_template(TEMPLATE).is_ok());
    }
}
