//! Names in the checkpoints' folder, and what they mean.

use crate::CheckpointError;
use caravan_types::{Generation, Step, WorkerId};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// A folder with a name that this crate gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A complete checkpoint.
    Complete,
    /// One that is being written, or was when its writer died.
    Partial,
    /// One that was found damaged when its step was reached again.
    Damaged,
}

pub(crate) fn complete_name(step: Step) -> String {
    format!("step-{:08}", step.0)
}

pub(crate) fn partial(root: &Path, generation: Generation, step: Step) -> PathBuf {
    root.join(format!("{}.{generation}.partial", complete_name(step)))
}

pub(crate) fn damaged(root: &Path, step: Step) -> PathBuf {
    root.join(format!("{}.damaged", complete_name(step)))
}

pub(crate) fn part_name(worker: WorkerId) -> String {
    format!("part-{worker}.safetensors")
}

/// Part names come over the network and from manifests, and become paths: anything but the
/// one form is refused.
pub(crate) fn check_part_name(name: &str) -> Result<(), CheckpointError> {
    let worker = name.strip_prefix("part-w").and_then(|n| n.strip_suffix(".safetensors"));
    match worker {
        Some(id) if !id.is_empty() && id.bytes().all(|b| b.is_ascii_digit()) => Ok(()),
        _ => Err(CheckpointError::FileName { file: name.chars().take(80).collect() }),
    }
}

/// The step and kind of a folder by its name; none for a name of other making.
pub(crate) fn parse(name: &str) -> Option<(Step, Kind)> {
    let rest = name.strip_prefix("step-")?;
    let (number, suffix) = rest.split_at(rest.find('.').unwrap_or(rest.len()));
    if number.len() < 8 || !number.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let kind = match suffix {
        "" => Kind::Complete,
        ".damaged" => Kind::Damaged,
        s if s.starts_with(".g") && s.ends_with(".partial") => Kind::Partial,
        _ => return None,
    };
    Some((Step(number.parse().ok()?), kind))
}

/// The checkpoint folders of one place, newest step first; none where the place is not there.
pub(crate) fn list(root: &Path) -> Result<Vec<(Step, Kind, PathBuf)>, CheckpointError> {
    let entries = match fs::read_dir(root) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(CheckpointError::io("list", root)(e)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(CheckpointError::io("list", root))?;
        if let Some((step, kind)) = entry.file_name().to_str().and_then(parse) {
            found.push((step, kind, entry.path()));
        }
    }
    found.sort_by(|a, b| b.0.cmp(&a.0).then_with(|| a.2.cmp(&b.2)));
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back_and_foreign_ones_ignored() {
        assert_eq!(parse(&complete_name(Step(100))), Some((Step(100), Kind::Complete)));
        assert_eq!(parse("step-123456789"), Some((Step(123_456_789), Kind::Complete)));
        let partial = partial(Path::new(""), Generation(3), Step(7));
        assert_eq!(partial.to_str().and_then(parse), Some((Step(7), Kind::Partial)));
        for foreign in ["step-7", "step-00000001.zip", "step-0000000x", "old", "step-", ""] {
            assert_eq!(parse(foreign), None, "{foreign}");
        }
    }

    #[test]
    fn only_names_of_parts_pass_as_names_of_parts() {
        assert!(check_part_name(&part_name(WorkerId(12))).is_ok());
        for bad in ["", "part-w.safetensors", "part-w1", "../part-w1.safetensors", "part-w1/.safetensors"] {
            assert!(check_part_name(bad).is_err(), "{bad}");
        }
    }
}
