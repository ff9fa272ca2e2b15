//! Caravan's tests across crates: scenarios, real processes, goldens, tidy.
