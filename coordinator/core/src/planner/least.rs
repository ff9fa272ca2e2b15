//! The least of a discrete set of times for which something can be done.

/// Halvings: each drops at least one candidate and half of the range; see `fit`.
const MOST_HALVINGS: u32 = 200;

/// The least time that works. `works` is false below it and true from it on; it gives the
/// largest candidate that is not above what it was asked for, and works as well. `above` gives
/// the least candidate above a time that does not work. `high` works, nothing below `low` does.
pub(super) fn least(
    (mut low, mut high): (f64, f64),
    mut works: impl FnMut(f64) -> Option<f64>,
    mut above: impl FnMut(f64) -> f64,
) -> f64 {
    for _ in 0..MOST_HALVINGS {
        if low >= high {
            break;
        }
        let middle = low + (high - low) / 2.0;
        match works(middle) {
            Some(candidate) => high = candidate,
            None => low = above(middle),
        }
    }
    high
}
