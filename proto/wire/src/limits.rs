//! What a receiver takes: every number, text and list from outside is held to a bound before
//! anything is allocated for it.

use crate::error::{Malformed, Why};
use caravan_types::message::SPEEDS;
use caravan_types::peak::FLOPS;
use caravan_types::{Digest, Generation, SliceId, SliceSet, Step, WorkerId};
use std::ops::Range;

/// Largest gRPC message, in bytes: 2^19 slices (a model of 5·10^11 parameters at the largest
/// slice of 2^20) · 64 bytes. The longest mention of a slice is the one in `Saved`, with 43
/// bytes: framing 2, number 1 + 5, digest 1 + 1 + 32, rounded up. A plan names two owners a
/// slice, with 2 + 2 · 10 bytes at most.
pub const MAX_MESSAGE: usize = 64 << 19;

/// Slice numbers are below this: 2^24 slices of 2^20 elements are a model of 1.7·10^13
/// parameters, and a full [`SliceSet`] is a bitmap of 2 MiB.
pub const MAX_SLICES: u32 = 1 << 24;

/// Lanes are below this. A lane is at least one sequence, so a batch of 2^20 lanes and
/// 4096 tokens is 4·10^9 tokens, a thousand times that of the Llama 2 paper.
pub const MAX_LANES: u32 = 1 << 20;

/// Members of a plan. As many as lanes can be put to work.
pub const MAX_MEMBERS: usize = 1 << 20;

/// Transformer layers and the units at both ends: a thousand times the deepest Llama.
pub const MAX_UNITS: u32 = 1 << 17;

/// Steps, generations, workers: they count up by ones and never come near this, and there is
/// room for adding a few without overflow.
pub const MAX_COUNT: u64 = 1 << 62;

/// Longest text, in bytes: Linux's PATH_MAX. Nothing that a person reads on a line is longer.
pub const MAX_TEXT: usize = 4096;

/// Longest list of short texts (instruction families).
pub const MAX_TEXTS: usize = 64;

/// Longest run spec, in bytes: some thirty numbers and three texts of [`MAX_TEXT`].
pub const MAX_RUN_SPEC: usize = 1 << 16;

/// Longest event as JSON, in bytes: the numbers of a hundred thousand members of a plan.
pub const MAX_EVENT: usize = 1 << 20;

/// Slices that the sets of one plan may hold together, each set counted up to its largest
/// member: as bitmaps, 128 MiB. A thousand members that each get the weights of 2^19 slices
/// from one other member need half of it.
pub const MAX_PLAN_SLICES: u64 = 1 << 30;

/// A value that must be present.
pub(crate) fn required<T>(value: Option<T>, field: &'static str) -> Result<T, Malformed> {
    value.ok_or_else(|| Why::Missing.at(field))
}

/// Refuses a number that is not below its limit.
pub(crate) fn below(value: u64, limit: u64, field: &'static str) -> Result<u64, Malformed> {
    if value < limit { Ok(value) } else { Err(Why::TooLarge { is: value, limit: limit - 1 }.at(field)) }
}

/// Refuses a list that is longer than its limit.
pub(crate) fn count<T>(list: &[T], limit: usize, field: &'static str) -> Result<(), Malformed> {
    if list.len() <= limit {
        return Ok(());
    }
    Err(Why::TooLarge { is: list.len() as u64, limit: limit as u64 }.at(field))
}

pub(crate) fn text(value: String, field: &'static str) -> Result<String, Malformed> {
    count(value.as_bytes(), MAX_TEXT, field)?;
    Ok(value)
}

pub(crate) fn texts(values: Vec<String>, field: &'static str) -> Result<Vec<String>, Malformed> {
    count(&values, MAX_TEXTS, field)?;
    values.into_iter().map(|value| text(value, field)).collect()
}

/// Cuts a text for people to what a receiver takes, at a character's border. A reason that is
/// too long must not cost its sender the session.
pub(crate) fn cut(mut text: String) -> String {
    if text.len() > MAX_TEXT {
        let end = (0..=MAX_TEXT).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        text.truncate(end);
    }
    text
}

pub(crate) fn step(value: u64, field: &'static str) -> Result<Step, Malformed> {
    below(value, MAX_COUNT, field).map(Step)
}

pub(crate) fn generation(value: u64, field: &'static str) -> Result<Generation, Malformed> {
    below(value, MAX_COUNT, field).map(Generation)
}

pub(crate) fn worker(value: u64, field: &'static str) -> Result<WorkerId, Malformed> {
    below(value, MAX_COUNT, field).map(WorkerId)
}

pub(crate) fn workers(values: Vec<u64>, field: &'static str) -> Result<Vec<WorkerId>, Malformed> {
    count(&values, MAX_MEMBERS, field)?;
    values.into_iter().map(|value| worker(value, field)).collect()
}

pub(crate) fn slice(value: u32, field: &'static str) -> Result<SliceId, Malformed> {
    below(value.into(), MAX_SLICES.into(), field)?;
    Ok(SliceId(value))
}

/// A range whose end is at most `limit`; it may be empty.
pub(crate) fn range(start: u32, end: u32, limit: u32, field: &'static str) -> Result<Range<u32>, Malformed> {
    if start > end {
        return Err(Why::NotAscending.at(field));
    }
    below(end.into(), u64::from(limit) + 1, field)?;
    Ok(start..end)
}

pub(crate) fn speed(value: f64, field: &'static str) -> Result<f64, Malformed> {
    if SPEEDS.contains(&value) { Ok(value) } else { Err(Why::NotASpeed.at(field)) }
}

pub(crate) fn flops(value: f64, field: &'static str) -> Result<f64, Malformed> {
    if FLOPS.contains(&value) { Ok(value) } else { Err(Why::NotASpeed.at(field)) }
}

/// A number of what there must be one of at least.
pub(crate) fn some(value: u32, field: &'static str) -> Result<u32, Malformed> {
    if value > 0 { Ok(value) } else { Err(Why::Missing.at(field)) }
}

pub(crate) fn digest(bytes: &[u8], field: &'static str) -> Result<Digest, Malformed> {
    let exact = bytes.try_into().map_err(|_| Why::Length { is: bytes.len(), must: 32 }.at(field))?;
    Ok(Digest(exact))
}

/// The set that these bounds describe, refused before it is expanded where a bound is beyond
/// `limit`. Strictly ascending bounds make the form of each set unique.
pub(crate) fn slice_set(bounds: &[u32], limit: u32, field: &'static str) -> Result<SliceSet, Malformed> {
    if !bounds.len().is_multiple_of(2) {
        return Err(Why::HalfRange.at(field));
    }
    if !bounds.is_sorted_by(|a, b| a < b) {
        return Err(Why::NotAscending.at(field));
    }
    below(bounds.last().copied().unwrap_or(0).into(), u64::from(limit) + 1, field)?;
    Ok(bounds.chunks_exact(2).flat_map(|pair| pair[0]..pair[1]).map(SliceId).collect())
}
