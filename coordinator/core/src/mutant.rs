//! Classic bugs of elastic trainers, for the simulator to find. Only with the feature `mutants`,
//! and even then off unless asked for.

/// A bug.
#[cfg(feature = "mutants")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    /// A holder of another step counts as a holder.
    HealFromAnotherStep,
    /// A leaver is let go before others have what it holds.
    DropLeaversSlices,
    /// A restarted coordinator takes it that everybody has the plan.
    PlanToldOnce,
}

/// Whether a bug is switched on.
#[cfg(feature = "mutants")]
macro_rules! mutant {
    ($core:expr, $bug:ident) => {
        $core.mutant == Some(crate::Mutant::$bug)
    };
}

/// There are no bugs to switch on.
#[cfg(not(feature = "mutants"))]
macro_rules! mutant {
    ($core:expr, $bug:ident) => {
        false
    };
}
