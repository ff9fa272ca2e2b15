//! Checkpoints through the public interface, on real files: what is written comes back, and
//! nothing damaged is taken for good.

#![allow(clippy::unwrap_used, reason = "in a test, whose helpers clippy does not take for one")]

use caravan_checkpoint::{CheckpointError, complete, newest_intact, prune, weights_hash, write_part};
use caravan_types::task::SavedPart;
use caravan_types::{
    BatchShape, DataSpec, Digest, Generation, ModelShape, NumericsClass, Precision, Recipe, RunSpec, SliceId,
    SliceTable, Step, WorkerId,
};
use proptest::prelude::*;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

const G: Generation = Generation(3);

/// A model of six slices, small enough to write hundreds of times.
fn spec() -> RunSpec {
    let small = ModelShape::preset("260k").unwrap();
    let model = ModelShape { dim: 32, layers: 2, heads: 4, kv_heads: 2, hidden: 64, vocab: 600, ..small };
    RunSpec {
        version: caravan_types::run_spec::RUN_SPEC_VERSION,
        name: "test".into(),
        model,
        data: DataSpec { digest: Digest([7; 32]), tokens: 1000 },
        batch: BatchShape { lanes: 4, micro_batches: 1, sequences: 2, sequence_length: 16 },
        recipe: Recipe { learning_rate: 0.1 + 0.2, ..Recipe::default() },
        init: caravan_types::Initial::Seed,
        seed: 1,
        numerics: NumericsClass { precision: Precision::Fp32, family: "portable".into() },
    }
}

/// Each slice's state at a step: no two values of a model's weights are alike.
fn states(step: u64) -> Vec<(SliceId, Vec<f32>)> {
    let value = |id: u32, i: usize| (step as f32) + (id as f32) * 1e-2 + (i as f32) * 1e-7;
    let table = SliceTable::new(&spec().model);
    table.iter().map(|(id, s)| (id, (0..3 * s.len()).map(|i| value(id.0, i)).collect())).collect()
}

/// Writes the states of `step` in as many parts as `writer` names different workers.
fn parts(root: &Path, step: u64, writer: impl Fn(u32) -> u64) -> Vec<SavedPart> {
    let mut workers: Vec<u64> = states(step).iter().map(|(id, _)| writer(id.0)).collect();
    workers.sort_unstable();
    workers.dedup();
    let part = |w: u64| {
        let mine: Vec<_> = states(step).into_iter().filter(|(id, _)| writer(id.0) == w).collect();
        write_part(root, G, Step(step), WorkerId(w), &mine).unwrap()
    };
    workers.into_iter().map(part).collect()
}

/// A complete checkpoint of two parts and a tokenizer.
fn checkpoint(root: &Path, step: u64) -> PathBuf {
    let parts = parts(root, step, |slice| u64::from(slice % 2) + 1);
    let tokenizer = root.join("source-of-the-tokenizer");
    fs::write(&tokenizer, "{\"model\":1}").unwrap();
    complete(root, G, Step(step), &spec(), &parts, Some(&tokenizer)).unwrap();
    root.join(format!("step-{step:08}"))
}

fn names(root: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(root)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .filter(|n| n.starts_with("step"))
        .collect();
    names.sort();
    names
}

#[test]
fn what_is_written_comes_back_with_the_same_bits() {
    let root = TempDir::new().unwrap();
    checkpoint(root.path(), 100);
    let found = newest_intact(root.path()).unwrap();
    assert!(found.refused.is_empty());
    let checkpoint = found.checkpoint.unwrap();
    let manifest = checkpoint.manifest();
    assert_eq!((manifest.step, manifest.samples, &manifest.spec), (Step(100), 800, &spec()));
    assert_eq!(checkpoint.states(&states(100).iter().map(|s| s.0).collect()).unwrap(), states(100));
    let some = [SliceId(1), SliceId(4)].into_iter().collect();
    let expected: Vec<_> = states(100).into_iter().filter(|s| [1, 4].contains(&s.0.0)).collect();
    assert_eq!(checkpoint.states(&some).unwrap(), expected);
    let flat: Vec<f32> = states(100).into_iter().flat_map(|(_, s)| s[..s.len() / 3].to_vec()).collect();
    assert_eq!(checkpoint.weights().unwrap(), flat);
    assert_eq!(fs::read_to_string(checkpoint.tokenizer().unwrap()).unwrap(), "{\"model\":1}");
    let unknown = [SliceId(99)].into_iter().collect();
    assert!(matches!(checkpoint.states(&unknown), Err(CheckpointError::UnknownSlice { .. })));
}

#[test]
fn completing_again_changes_nothing_and_another_runs_checkpoint_is_not_replaced() {
    let root = TempDir::new().unwrap();
    let dir = checkpoint(root.path(), 100);
    let before = fs::read(dir.join("manifest.json")).unwrap();
    let again = complete(root.path(), Generation(9), Step(100), &spec(), &[], None).unwrap();
    assert_eq!(again.generation, G);
    assert_eq!(fs::read(dir.join("manifest.json")).unwrap(), before);
    let other = RunSpec { seed: 2, ..spec() };
    let refused = complete(root.path(), G, Step(100), &other, &[], None).unwrap_err();
    assert!(matches!(refused, CheckpointError::OtherRun(_)), "{refused}");
}

/// Damages the newer of two checkpoints; it must be refused for the expected reason and the
/// older one used.
fn refused_after(damage: impl Fn(&Path)) -> String {
    let root = TempDir::new().unwrap();
    checkpoint(root.path(), 50);
    let newer = checkpoint(root.path(), 100);
    damage(&newer);
    let found = newest_intact(root.path()).unwrap();
    assert_eq!(found.checkpoint.unwrap().manifest().step, Step(50));
    assert_eq!(found.refused.len(), 1);
    assert_eq!(found.refused[0].name, "step-00000100");
    found.refused[0].reason.to_string()
}

fn flip_bit(path: &Path, byte: u64, bit: u32) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut value = [0];
    file.read_exact_at(&mut value, byte).unwrap();
    file.write_all_at(&[value[0] ^ 1 << bit], byte).unwrap();
}

/// Gives a manifest a new seal, as a program with another idea of its content would.
fn reseal(dir: &Path, change: impl Fn(&str) -> String) {
    let path = dir.join("manifest.json");
    let text = fs::read_to_string(&path).unwrap();
    let sealed = change(&text[9 + 64..]);
    fs::write(&path, format!("{{\"seal\":\"{}{sealed}", blake3::hash(sealed.as_bytes()).to_hex())).unwrap();
}

#[test]
fn a_truncated_part_is_refused() {
    let reason = refused_after(|dir| {
        let file = OpenOptions::new().write(true).open(dir.join("part-w2.safetensors")).unwrap();
        file.set_len(1000).unwrap();
    });
    assert!(reason.starts_with("part-w2.safetensors has 1000 bytes where "), "{reason}");
}

#[test]
fn a_missing_part_is_refused() {
    let reason = refused_after(|dir| fs::remove_file(dir.join("part-w1.safetensors")).unwrap());
    assert_eq!(reason, "part-w1.safetensors is missing");
}

#[test]
fn a_damaged_tokenizer_is_refused() {
    let reason = refused_after(|dir| flip_bit(&dir.join("tokenizer.json"), 3, 0));
    assert!(reason.starts_with("tokenizer.json is damaged"), "{reason}");
}

#[test]
fn a_manifest_of_another_version_is_refused_with_what_to_do() {
    let reason = refused_after(|dir| {
        reseal(dir, |m| m.replacen("\"version\":2,\"step\"", "\"version\":3,\"new\":0,\"step\"", 1));
    });
    assert!(reason.contains("format version 3, this program reads version 2"), "{reason}");
}

#[test]
fn a_sealed_manifest_that_contradicts_itself_or_its_folder_is_refused() {
    let reason =
        refused_after(|dir| reseal(dir, |m| m.replacen("part-w1.safetensors", "../../../etc/passwd", 1)));
    assert!(reason.contains("is no name of a part"), "{reason}");
    let reason = refused_after(|dir| reseal(dir, |m| m.replacen("\"step\":100", "\"step\":101", 1)));
    assert!(reason.contains("named after step 100"), "{reason}");
    let reason = refused_after(|dir| reseal(dir, |_| "\",\"manifest\":{}}".into()));
    assert!(reason.starts_with("manifest.json is damaged"), "{reason}");
}

#[test]
fn a_part_of_another_step_is_neither_completed_nor_read() {
    let reason = refused_after(|dir| {
        let other = dir.with_file_name("step-00000050");
        fs::copy(other.join("part-w1.safetensors"), dir.join("part-w1.safetensors")).unwrap();
    });
    assert!(reason.contains("part-w1.safetensors"), "{reason}");

    let root = TempDir::new().unwrap();
    let old = parts(root.path(), 50, |_| 1);
    let new = parts(root.path(), 51, |_| 1);
    let partial = |step: u64| root.path().join(format!("step-{step:08}.g3.partial/part-w1.safetensors"));
    fs::copy(partial(50), partial(51)).unwrap();
    assert_eq!(old[0].bytes, new[0].bytes);
    let error = complete(root.path(), G, Step(51), &spec(), &new, None).unwrap_err();
    assert!(matches!(error, CheckpointError::WrongStep { found: Step(50), .. }), "{error}");
    assert!(newest_intact(root.path()).unwrap().checkpoint.is_none());
}

#[test]
fn missing_double_and_unknown_slices_are_not_completed() {
    let root = TempDir::new().unwrap();
    let parts = parts(root.path(), 1, |slice| u64::from(slice % 2) + 1);
    let fails = |parts: &[SavedPart]| complete(root.path(), G, Step(1), &spec(), parts, None).unwrap_err();
    let error = fails(&parts[..1]);
    assert!(matches!(error, CheckpointError::SliceMissing { first: SliceId(1), .. }), "{error}");
    let mut doubled = parts.clone();
    let slice = parts[0].slices[0];
    doubled[1].slices.push(slice);
    assert!(matches!(fails(&doubled), CheckpointError::SliceTwice { .. }));
    let mut unknown = parts.clone();
    unknown[0].slices.push((SliceId(77), Digest::default()));
    assert!(matches!(fails(&unknown), CheckpointError::UnknownSlice { .. }));
    let mut outside = parts.clone();
    outside[0].file = "../part-w1.safetensors".into();
    assert!(matches!(fails(&outside), CheckpointError::FileName { .. }));
    let wrong = [(SliceId(0), vec![0.0; 4])];
    let error = write_part(root.path(), G, Step(1), WorkerId(1), &wrong).unwrap_err();
    assert!(matches!(error, CheckpointError::StateLength { .. }));
    assert!(complete(root.path(), G, Step(1), &spec(), &parts, None).is_ok());
}

#[test]
fn what_was_interrupted_before_the_rename_is_ignored_and_later_removed() {
    let root = TempDir::new().unwrap();
    checkpoint(root.path(), 50);
    parts(root.path(), 60, |_| 1);
    assert_eq!(newest_intact(root.path()).unwrap().checkpoint.unwrap().manifest().step, Step(50));
    prune(root.path(), Step(50), 3).unwrap();
    assert_eq!(
        names(root.path()),
        ["step-00000050", "step-00000060.g3.partial"],
        "60 may still be completed"
    );
    checkpoint(root.path(), 100);
    prune(root.path(), Step(100), 3).unwrap();
    assert_eq!(names(root.path()), ["step-00000050", "step-00000100"]);
}

#[test]
fn what_is_written_after_the_run_went_back_is_not_removed_for_a_damaged_one_that_is_newer() {
    let root = TempDir::new().unwrap();
    for step in [10, 20, 30, 40, 50] {
        checkpoint(root.path(), step);
    }
    fs::write(root.path().join("step-00000050/part-w1.safetensors"), "rot").unwrap();
    parts(root.path(), 50, |_| 1);
    prune(root.path(), Step(40), 2).unwrap();
    let left = ["step-00000030", "step-00000040", "step-00000050", "step-00000050.g3.partial"];
    assert_eq!(names(root.path()), left);
}

#[test]
fn an_unreported_part_does_not_get_into_the_checkpoint() {
    let root = TempDir::new().unwrap();
    let parts = parts(root.path(), 1, |_| 1);
    write_part(root.path(), G, Step(1), WorkerId(8), &states(1)[..1]).unwrap();
    complete(root.path(), G, Step(1), &spec(), &parts, None).unwrap();
    assert!(!root.path().join("step-00000001/part-w8.safetensors").exists());
}

#[test]
fn a_damaged_checkpoint_is_set_aside_when_its_step_is_reached_again() {
    let root = TempDir::new().unwrap();
    let dir = checkpoint(root.path(), 100);
    fs::remove_file(dir.join("part-w1.safetensors")).unwrap();
    checkpoint(root.path(), 100);
    assert_eq!(names(root.path()), ["step-00000100", "step-00000100.damaged"]);
    assert!(newest_intact(root.path()).unwrap().refused.is_empty());
}

#[test]
fn prune_keeps_the_newest_and_never_removes_the_last() {
    let root = TempDir::new().unwrap();
    for step in [10, 20, 30, 40] {
        checkpoint(root.path(), step);
    }
    prune(root.path(), Step(40), 3).unwrap();
    assert_eq!(names(root.path()), ["step-00000020", "step-00000030", "step-00000040"]);
    prune(root.path(), Step(40), 0).unwrap();
    assert_eq!(names(root.path()), ["step-00000040"]);
}

/// `/dev/full` answers every write with the error of a full disk.
#[test]
fn a_full_disk_is_named_and_harms_no_older_checkpoint() {
    let root = TempDir::new().unwrap();
    checkpoint(root.path(), 50);
    let partial = root.path().join("step-00000100.g3.partial");
    fs::create_dir(&partial).unwrap();
    symlink("/dev/full", partial.join("part-w1.safetensors")).unwrap();
    let error = write_part(root.path(), G, Step(100), WorkerId(1), &states(100)).unwrap_err().to_string();
    assert!(error.contains("No space left") && error.contains("free some space"), "{error}");
    assert_eq!(fs::read_dir(&partial).unwrap().count(), 0, "the unfinished part is gone");

    let parts = parts(root.path(), 100, |_| 1);
    symlink("/dev/full", partial.join("manifest.json")).unwrap();
    let error = complete(root.path(), G, Step(100), &spec(), &parts, None).unwrap_err().to_string();
    assert!(error.contains("No space left"), "{error}");
    assert_eq!(newest_intact(root.path()).unwrap().checkpoint.unwrap().manifest().step, Step(50));
}

#[test]
fn a_folder_that_is_not_there_has_no_checkpoint() {
    let root = TempDir::new().unwrap();
    let found = newest_intact(&root.path().join("none")).unwrap();
    assert!(found.checkpoint.is_none() && found.refused.is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn any_deal_of_slices_gives_the_same_weights_hash(deal in proptest::collection::vec(0u64..4, 6)) {
        let root = TempDir::new().unwrap();
        let parts = parts(root.path(), 1, |slice| deal[slice as usize]);
        let manifest = complete(root.path(), G, Step(1), &spec(), &parts, None).unwrap();
        let mut all: Vec<_> = parts.iter().flat_map(|p| p.slices.clone()).collect();
        all.sort();
        prop_assert_eq!(all.len(), 6);
        prop_assert_eq!(manifest.weights, weights_hash(all.iter().map(|(_, d)| d)));
        let checkpoint = newest_intact(root.path()).unwrap().checkpoint.unwrap();
        prop_assert_eq!(checkpoint.states(&(0..6).map(SliceId).collect()).unwrap(), states(1));
    }

    #[test]
    fn a_bit_flipped_anywhere_is_found(file in 0usize..3, place in 0.0..1.0f64, bit in 0u32..8) {
        let name = ["manifest.json", "part-w1.safetensors", "part-w2.safetensors"][file];
        let reason = refused_after(|dir| {
            let path = dir.join(name);
            let bytes = fs::metadata(&path).unwrap().len();
            flip_bit(&path, (place * bytes as f64) as u64, bit);
        });
        prop_assert!(reason.contains(name), "{}", reason);
    }
}
