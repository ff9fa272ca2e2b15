//! The one number about failures that an operator sets, and every other time that follows.
//!
//! Whoever waits to notice a failure, or gives somebody time to be noticed, asks [`Timing`] how
//! long. So the times fit together by arithmetic, and [`Timing::validate`] says which two do not
//! where an override contradicts it. Pauses between attempts that have nothing to do with how
//! soon a failure is known stay with whoever makes them.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::RangeInclusive;
use std::time::Duration;

/// Failure budgets that can be set. Below, an ordinary pause of a busy machine looks like a
/// death; above, a person is faster.
pub const DETECT: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(600);

/// The failure budget where none is set: some ten times the longest pause of a busy machine.
const USUAL_DETECT_MS: u64 = 3000;

/// The failure budget and what was set besides; all else is derived.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timing {
    detect_ms: u64,
    heartbeat_ms: Option<u64>,
    reattach_ms: Option<u64>,
}

impl Default for Timing {
    fn default() -> Self {
        Self::from_millis(USUAL_DETECT_MS)
    }
}

impl From<Duration> for Timing {
    fn from(detect: Duration) -> Self {
        Self::from_millis(millis(detect))
    }
}

impl Timing {
    /// What follows from a failure budget.
    #[must_use]
    pub const fn from_millis(detect_ms: u64) -> Self {
        Self { detect_ms, heartbeat_ms: None, reattach_ms: None }
    }

    /// With this time between heartbeats instead of the derived one.
    #[must_use]
    pub fn with_heartbeat(self, heartbeat: Option<Duration>) -> Self {
        Self { heartbeat_ms: heartbeat.map(millis), ..self }
    }

    /// With this time for members to come back instead of the derived one.
    #[must_use]
    pub fn with_reattach(self, reattach: Option<Duration>) -> Self {
        Self { reattach_ms: reattach.map(millis), ..self }
    }

    /// The failure budget.
    #[must_use]
    pub const fn detect(&self) -> Duration {
        Duration::from_millis(self.detect_ms)
    }

    /// The time between heartbeats that was set.
    #[must_use]
    pub fn set_heartbeat(&self) -> Option<Duration> {
        self.heartbeat_ms.map(Duration::from_millis)
    }

    /// The time to come back that was set.
    #[must_use]
    pub fn set_reattach(&self) -> Option<Duration> {
        self.reattach_ms.map(Duration::from_millis)
    }

    // ---- workers and the coordinator ----

    /// Between a worker's heartbeats: detect / 4, so that three may be lost or late before it
    /// counts as silent.
    #[must_use]
    pub fn heartbeat(&self) -> Duration {
        self.set_heartbeat().unwrap_or(self.detect() / 4).max(Duration::from_millis(1))
    }

    /// Of silence, and a worker is lost: the failure budget less a twentieth, which is for the last
    /// sign of life on its way and for the news of the loss, so that it is known within the budget.
    #[must_use]
    pub const fn silence(&self) -> Duration {
        Duration::from_millis(self.detect_ms - self.detect_ms / 20)
    }

    /// Without progress, and a member that others wait for is cut out. It is heard all the time,
    /// so nothing is added for what may be late on the way.
    #[must_use]
    pub const fn hang(&self) -> Duration {
        self.detect()
    }

    /// The same, for a member that opens its data or reads a checkpoint, which is one task each
    /// and as slow as a disk may be: 60 · detect, minutes by default.
    #[must_use]
    pub fn slow_disk(&self) -> Duration {
        self.detect() * 60
    }

    /// For others to accuse the same member, or for its session to close, once one has lost its
    /// connection to it: detect / 10, from 10 milliseconds to a second. Sockets of a process that
    /// died all close within milliseconds; peers that cannot be reached are given up together.
    #[must_use]
    pub fn grace(&self) -> Duration {
        (self.detect() / 10).clamp(Duration::from_millis(10), Duration::from_secs(1))
    }

    /// For a stop to be answered, and for further workers at the start: whoever is alive says
    /// something within the failure budget.
    #[must_use]
    pub const fn answer(&self) -> Duration {
        self.detect()
    }

    /// For members to come back to a restarted coordinator. They look for it all the time, every
    /// [`retry`](Self::retry), so the failure budget has several tries in it. A coordinator that
    /// is started on a finished run stays as long, to tell them.
    #[must_use]
    pub fn reattach(&self) -> Duration {
        self.set_reattach().unwrap_or(self.detect())
    }

    /// At most between two attempts to find the coordinator: detect / 6, and no more than half a
    /// second, which nobody notices; no less than a connection takes to be refused from afar.
    #[must_use]
    pub fn retry(&self) -> Duration {
        (self.detect() / 6).clamp(Duration::from_millis(20), Duration::from_millis(500))
    }

    // ---- the session's connection ----

    /// For a worker to find a coordinator that starts beside it: 10 · detect. The run's failure
    /// budget comes with the welcome, so before that it is the usual one.
    #[must_use]
    pub fn join(&self) -> Duration {
        self.detect() * 10
    }

    /// For one attempt to connect, and for a hello to follow.
    #[must_use]
    pub const fn connect(&self) -> Duration {
        self.detect()
    }

    /// Between signs of life that a worker asks of an idle coordinator: 3 · detect. Stepping does
    /// not wait for it, so there is no hurry.
    #[must_use]
    pub fn session_probe(&self) -> Duration {
        self.detect() * 3
    }

    /// For that sign of life: 20 · detect and at least ten seconds. A worker that hangs up on a
    /// coordinator that is only busy or paused is lost to it, so this is only for a host that is
    /// gone without a word.
    #[must_use]
    pub fn session_answer(&self) -> Duration {
        (self.detect() * 20).max(Duration::from_secs(10))
    }

    /// For a worker to go on without a coordinator: 200 · detect, from a minute, in which a
    /// process is started again, to a day, so that workers of a run that was given up do not
    /// compute for longer.
    #[must_use]
    pub fn orphaned(&self) -> Duration {
        (self.detect() * 200).clamp(Duration::from_secs(60), Duration::from_secs(24 * 3600))
    }

    /// Between probes of an idle connection to the coordinator's port, a browser's for example.
    /// The kernel counts in whole seconds.
    #[must_use]
    pub fn port_probe(&self) -> Duration {
        self.detect().max(Duration::from_secs(1))
    }

    // ---- between workers ----

    /// For a peer to be reached, which may be starting still. Who is not reached by then would
    /// have been lost by its silence.
    #[must_use]
    pub const fn dial(&self) -> Duration {
        self.silence()
    }

    /// At most between two attempts to reach it: detect / 15, from 10 to 200 milliseconds.
    #[must_use]
    pub fn redial(&self) -> Duration {
        (self.detect() / 15).clamp(Duration::from_millis(10), Duration::from_millis(200))
    }

    /// Until a connection that was opened to us must have introduced itself.
    #[must_use]
    pub const fn introduce(&self) -> Duration {
        self.detect()
    }

    /// Probes of an idle connection that may go unanswered.
    pub const PEER_PROBES: u32 = 2;

    /// Between such probes, and before the first: with silence / 3, the second one is missed when
    /// the time of silence is over. The kernel counts in whole seconds, so at least one.
    #[must_use]
    pub fn peer_probe(&self) -> Duration {
        (self.silence() / (Self::PEER_PROBES + 1)).max(Duration::from_secs(1))
    }

    /// For a peer's kernel to acknowledge what was sent, or to have room for it.
    #[must_use]
    pub const fn unacknowledged(&self) -> Duration {
        self.silence()
    }

    /// For a connection to wait for its plan: 4 · detect. A plan comes within the budget of the
    /// failure that it answers and that of one more during regrouping; as much again for slow
    /// disks and many workers.
    #[must_use]
    pub fn parked(&self) -> Duration {
        self.detect() * 4
    }

    // ---- farewells ----

    /// For the coordinator to have heard a worker's goodbye: detect / 6, from a tenth of a second
    /// to two seconds, since the two have just spoken.
    #[must_use]
    pub fn close(&self) -> Duration {
        (self.detect() / 6).clamp(Duration::from_millis(100), Duration::from_secs(2))
    }

    /// For all workers to have heard the coordinator's: detect, and no more than half a minute,
    /// as nothing depends on it.
    #[must_use]
    pub fn see_off(&self) -> Duration {
        self.detect().min(Duration::from_secs(30))
    }

    /// For local worker processes to end once the run has: 10 · [`close`](Self::close), and at
    /// least five seconds, as a busy machine takes its time to free memory.
    #[must_use]
    pub fn farewell(&self) -> Duration {
        (self.close() * 10).max(Duration::from_secs(5))
    }

    /// Heartbeats that may be set: two at least fit into the time of silence, so that one may be
    /// late.
    #[must_use]
    pub fn heartbeats(&self) -> RangeInclusive<Duration> {
        Duration::from_millis(1)..=self.silence() / 2
    }

    /// Times to come back that may be set: two attempts at least, and not longer than anybody
    /// tries.
    #[must_use]
    pub fn reattaches(&self) -> RangeInclusive<Duration> {
        self.retry() * 2..=self.orphaned()
    }

    /// All times, in the order of their names here, each with what it is.
    #[must_use]
    pub fn table(&self) -> [(Duration, &'static str); 21] {
        [
            (self.heartbeat(), "between a worker's heartbeats"),
            (self.silence(), "of silence, and a worker is lost"),
            (self.hang(), "without progress, and a member that others wait for is cut out"),
            (self.slow_disk(), "the same while it opens data or reads a checkpoint"),
            (self.grace(), "to hear who else lost a member, and whether it is dead"),
            (self.answer(), "to report for a new generation, and to be there for the first plan"),
            (self.reattach(), "for members to come back to a restarted coordinator"),
            (self.retry(), "at most between attempts to find the coordinator"),
            (self.connect(), "for one such attempt, and for the hello that follows"),
            (self.session_probe(), "between signs of life asked of an idle coordinator"),
            (self.session_answer(), "for the coordinator to give one"),
            (self.orphaned(), "for a worker to go on without a coordinator"),
            (self.port_probe(), "between probes of an idle connection to the coordinator"),
            (self.dial(), "to reach another worker, and for it to introduce itself"),
            (self.redial(), "at most between attempts to reach it"),
            (self.peer_probe(), "between probes of an idle connection of two workers"),
            (self.unacknowledged(), "for sent data to be acknowledged"),
            (self.parked(), "that a connection may wait for its plan"),
            (self.close(), "for a worker's goodbye to be heard"),
            (self.see_off(), "for the coordinator's goodbyes to be heard"),
            (self.farewell(), "for local workers to end after the run"),
        ]
    }

    /// Checks that the times fit together. Derived ones do; one that was set may not.
    ///
    /// # Errors
    /// The first two that do not, with the reason.
    pub fn validate(&self) -> Result<(), Disorder> {
        let all = self.budget_orders().into_iter().chain(self.peer_orders()).chain(self.session_orders());
        let broken = all.into_iter().find(|order| order.least.1 > order.most.1);
        broken.map_or(Ok(()), Err)
    }

    /// What must hold between the failure budget and what counts as a failure.
    fn budget_orders(&self) -> [Disorder; 5] {
        [
            order(
                ("100ms", *DETECT.start()),
                ("detect", self.detect()),
                "a shorter budget calls workers dead that are only busy",
            ),
            order(("detect", self.detect()), ("600s", *DETECT.end()), "a person would have noticed by then"),
            order(
                ("two heartbeats", self.heartbeat() * 2),
                ("silence", self.silence()),
                "one heartbeat may be late or lost without its worker being lost",
            ),
            order(
                ("silence", self.silence()),
                ("hang", self.hang()),
                "who is silent is dead, and is not to be called hanging",
            ),
            order(("hang", self.hang()), ("slow disk", self.slow_disk()), "a disk is slower than an engine"),
        ]
    }

    /// What must hold between workers.
    fn peer_orders(&self) -> [Disorder; 7] {
        let second = Duration::from_secs(1);
        [
            order(
                ("grace", self.grace()),
                ("dial", self.dial()),
                "what broke once is tried again within the failure budget",
            ),
            order(
                ("dial", self.dial()),
                ("silence", self.silence()),
                "a peer that cannot be reached is reported before it is lost by its silence",
            ),
            order(
                ("introduce", self.introduce()),
                ("parked", self.parked()),
                "a connection introduces itself before it is parked",
            ),
            order(
                ("two redials", self.redial() * 2),
                ("dial", self.dial()),
                "a peer that is starting is tried again",
            ),
            order(
                ("unacknowledged", self.unacknowledged()),
                ("silence", self.silence()),
                "a connection to a dead host breaks within the failure budget",
            ),
            order(
                ("three peer probes", self.peer_probe() * 3),
                ("silence, or 3s", self.silence().max(second * 3)),
                "an idle connection to a dead host breaks within the failure budget",
            ),
            order(
                ("answer and dial", self.answer() + self.dial()),
                ("parked", self.parked()),
                "a connection outlives the regrouping that makes its plan",
            ),
        ]
    }

    /// What must hold between workers and the coordinator.
    fn session_orders(&self) -> [Disorder; 7] {
        [
            order(
                ("silence", self.silence()),
                ("session answer", self.session_answer()),
                "a worker does not hang up on a coordinator that is only busy",
            ),
            order(
                ("two retries", self.retry() * 2),
                ("reattach", self.reattach()),
                "members try at least twice before they count as dead",
            ),
            order(
                ("reattach", self.reattach()),
                ("orphaned", self.orphaned()),
                "members that have given up are not waited for",
            ),
            order(
                ("session answer", self.session_answer()),
                ("orphaned", self.orphaned()),
                "a coordinator that is gone is looked for again",
            ),
            order(
                ("close", self.close()),
                ("see off", self.see_off()),
                "a worker ends before the coordinator stops listening",
            ),
            order(
                ("see off", self.see_off()),
                ("detect", self.detect()),
                "whoever is silent is not waited for",
            ),
            order(
                ("close", self.close()),
                ("farewell", self.farewell()),
                "a worker says goodbye before it is killed",
            ),
        ]
    }
}

/// One thing that must hold.
const fn order(
    least: (&'static str, Duration),
    most: (&'static str, Duration),
    reason: &'static str,
) -> Disorder {
    Disorder { least, most, reason }
}

/// Two times of which the first must not be longer than the second, and is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disorder {
    /// What must not be longer, and how long it is.
    pub least: (&'static str, Duration),
    /// Than what, and how long that is.
    pub most: (&'static str, Duration),
    /// Why not.
    pub reason: &'static str,
}

impl fmt::Display for Disorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ((least, a), (most, b)) = (self.least, self.most);
        write!(f, "{least} ({a:?}) must not be longer than {most} ({b:?}): {}", self.reason)
    }
}

impl std::error::Error for Disorder {}

/// Whole milliseconds, which is how the cores count time.
#[must_use]
pub fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every millisecond up to a second, then in steps of a part in a thousand: all floors and
    /// ceilings are passed.
    #[test]
    fn what_is_derived_is_in_order_for_every_budget() {
        let mut detect_ms = 100;
        while detect_ms <= 600_000 {
            let timing = Timing::from_millis(detect_ms);
            assert_eq!(timing.validate(), Ok(()), "{detect_ms}");
            assert!(timing.heartbeats().contains(&timing.heartbeat()), "{detect_ms}");
            assert!(timing.reattaches().contains(&timing.reattach()), "{detect_ms}");
            detect_ms += (detect_ms / 1000).max(1);
        }
        assert_eq!(Timing::from_millis(600_000).validate(), Ok(()));
    }

    #[test]
    fn a_budget_out_of_its_range_is_refused() {
        for detect_ms in [0, 99, 600_001, u64::MAX / 1_000_000] {
            assert!(Timing::from_millis(detect_ms).validate().is_err(), "{detect_ms}");
        }
    }

    #[test]
    fn an_override_is_in_order_exactly_within_its_range() {
        let timing = Timing::default();
        let heartbeat = |ms| timing.with_heartbeat(Some(Duration::from_millis(ms))).validate();
        assert_eq!((heartbeat(1), heartbeat(1425)), (Ok(()), Ok(())));
        let told = heartbeat(1426).map_err(|e| e.to_string());
        let expected = "two heartbeats (2.852s) must not be longer than silence (2.85s): one heartbeat may be late or lost without its worker being lost";
        assert_eq!(told, Err(expected.into()));
        let reattach = |ms| timing.with_reattach(Some(Duration::from_millis(ms))).validate();
        assert_eq!((reattach(1000), reattach(600_000)), (Ok(()), Ok(())));
        let reason = |r: Result<(), Disorder>| r.map_err(|e| e.reason);
        assert_eq!(reason(reattach(999)), Err("members try at least twice before they count as dead"));
        assert_eq!(reason(reattach(600_001)), Err("members that have given up are not waited for"));
    }
}
