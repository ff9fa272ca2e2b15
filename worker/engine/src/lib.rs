//! Model and optimiser on one device. Knows no ranks, peers or plans.
