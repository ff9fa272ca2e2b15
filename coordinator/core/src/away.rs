//! Time in which the coordinator itself was away: its process stopped, its host suspended, a disk
//! that took seconds.
//!
//! What members said meanwhile waits in their sockets, so they look silent and as if they stood
//! still, all of them, and a coordinator that believed that would cut everybody out. It shows in
//! a deadline that comes late: the driver's duty is to come back at the moment that was asked for.
//! Then that time is nobody's silence, and there is some more for what waits to be read. Who is
//! dead is noticed by so much later, and once at most in each failure budget: a coordinator that
//! is always late still notices.

use crate::{Core, Millis};
use caravan_types::timing::millis;

/// What was asked of the driver, and when it was late for the last time.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Away {
    asked: Option<Millis>,
    excused: Option<Millis>,
}

impl Core {
    /// Notes until when the coordinator may sleep.
    pub(crate) fn will_be_back(&mut self) {
        self.away.asked = self.next_deadline();
    }

    /// Looks whether it slept for longer.
    pub(crate) fn is_back(&mut self, now: Millis) {
        let timing = self.config.timing;
        let Some(late) = self.away.asked.and_then(|asked| now.checked_sub(asked)) else { return };
        let again = self.away.excused.is_some_and(|at| now < at + millis(timing.silence()));
        // A busy machine is late by so much now and then, which three heartbeats outlast.
        if late <= millis(timing.grace()) / 10 || again {
            return;
        }
        self.away.excused = Some(now);
        let more = late + millis(timing.grace());
        self.members.excuse(now, more);
        for deadline in [&mut self.deadline, &mut self.accusations.until].into_iter().flatten() {
            *deadline += more;
        }
    }
}
