//! Decides: membership, generations, plans, heal. A pure state machine without clock, runtime or I/O.
