//! The worker's side of the step protocol. A pure state machine without clock, runtime or I/O.
