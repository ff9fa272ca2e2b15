//! What is written is read back, what a crash leaves is cut off, what was changed is refused.

use super::*;
use crate::journal::tests::spec;
use caravan_types::Verdict;
use caravan_types::message::Committed;
use std::fs;
use std::path::{Path, PathBuf};

fn committed(generation: u64, step: u64) -> Committed {
    let (loss, norm) = (9.0 - step as f64 / 3.0, 1.0 / step as f64);
    Committed {
        generation: Generation(generation),
        step: Step(step),
        loss,
        norm,
        tokens: 10 * step,
        took_ms: 7,
    }
}

/// As a ledger gives it back.
fn told(generation: u64, step: u64) -> Option<Committed> {
    Some(Committed { took_ms: 0, ..committed(generation, step) })
}

fn open(path: &Path) -> Result<(Ledger, Option<Committed>), LedgerError> {
    Ledger::open(path, &spec(), None)
}

/// A closed ledger: five steps, back to the second, and two again.
async fn filled(dir: &Path) -> PathBuf {
    let path = dir.join("ledger.jsonl");
    let (mut ledger, tail) = open(&path).unwrap();
    assert_eq!(tail, None);
    for step in 1..=5 {
        ledger.step(&committed(1, step), &[WorkerId(1), WorkerId(2)]).await.unwrap();
    }
    ledger.goes_on_from(Step(5)).await.unwrap();
    ledger.goes_on_from(Step(2)).await.unwrap();
    for step in 3..=4 {
        ledger.step(&committed(2, step), &[WorkerId(2)]).await.unwrap();
    }
    ledger.sync().await.unwrap();
    path
}

fn entries(path: &Path) -> Vec<Entry> {
    let mut reader = Reader::open(path).unwrap();
    let mut entries = Vec::new();
    while let Some(line) = reader.next_line().unwrap() {
        assert_eq!(line.flaw, None, "{line:?}");
        entries.push(line.entry.unwrap());
    }
    entries
}

/// Writes a ledger of these entries, as whoever knows the format could.
fn forge(path: &Path, entries: &[Entry]) {
    let mut hash = Digest::default();
    let mut bytes = Vec::new();
    for entry in entries {
        let (line, next) = line(hash, entry);
        bytes.extend(line);
        hash = next;
    }
    fs::write(path, bytes).unwrap();
}

#[tokio::test]
async fn what_was_written_is_read_back_and_the_newest_step_is_known() {
    let dir = tempfile::tempdir().unwrap();
    let path = filled(dir.path()).await;
    let (ledger, tail) = open(&path).unwrap();
    assert_eq!((ledger.last(), tail), (Step(4), told(2, 4)));
    let entries = entries(&path);
    let kinds = entries.iter().map(|e| match e {
        Entry::Open { version, spec: digest, base, .. } => {
            assert_eq!((*version, *digest, *base), (FORMAT, spec_digest(&spec()), Step(0)));
            "open".to_owned()
        }
        Entry::Step { step, first, end, members, .. } => {
            format!("{step}: {first}..{end} by {}", members.len())
        }
        Entry::Back { from, to, .. } => format!("{from} -> {to}"),
        Entry::Skip { .. } | Entry::Halt { .. } => panic!("{e:?}"),
    });
    let samples = spec().batch.sequences_per_step();
    let step = |s: u64, n: usize| format!("{s}: {}..{} by {n}", (s - 1) * samples, s * samples);
    let mut expected = vec!["open".to_owned()];
    expected.extend((1..=5).map(|s| step(s, 2)));
    expected.extend(["5 -> 2".to_owned(), step(3, 1), step(4, 1)]);
    assert_eq!(kinds.collect::<Vec<_>>(), expected);
}

#[tokio::test]
async fn after_a_way_back_the_newest_step_is_the_one_that_it_led_to() {
    let dir = tempfile::tempdir().unwrap();
    let path = filled(dir.path()).await;
    for (to, tail) in [(3, told(2, 3)), (1, told(1, 1)), (0, None)] {
        let (mut ledger, _) = open(&path).unwrap();
        ledger.goes_on_from(Step(to)).await.unwrap();
        drop(ledger);
        let (ledger, found) = open(&path).unwrap();
        assert_eq!((ledger.last(), found), (Step(to), tail));
    }
}

#[tokio::test]
async fn a_skipped_step_is_a_part_of_the_history_and_a_halt_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = filled(dir.path()).await;
    let (mut ledger, _) = open(&path).unwrap();
    let bad = |step| Committed { loss: f64::NAN, ..committed(3, step) };
    for step in [5, 6] {
        ledger.step(&bad(step), &[WorkerId(2)]).await.unwrap();
    }
    assert_eq!((ledger.last(), ledger.skipped()), (Step(6), 2));
    ledger.goes_on_from(Step(5)).await.unwrap();
    ledger.halt(Step(6), NotFinite::Gradient).await.unwrap();
    drop(ledger);
    let samples = spec().batch.sequences_per_step();
    let entries = entries(&path);
    let skip = entries.iter().rev().find_map(|entry| match entry {
        Entry::Skip { step: Step(5), first, end, .. } => Some((*first, *end)),
        _ => None,
    });
    assert_eq!(skip, Some((4 * samples, 5 * samples)));
    let (mut ledger, tail) = open(&path).unwrap();
    assert_eq!((ledger.last(), ledger.skipped()), (Step(5), 1));
    assert_eq!(tail.map(|tail| (tail.step, tail.verdict())), Some((Step(5), Verdict::Skip)));
    // Started again, it comes to the same end.
    ledger.halt(Step(6), NotFinite::Gradient).await.unwrap();
    forge(&path, &[entries[0].clone(), Entry::Halt { step: Step(2), what: NotFinite::Loss, unix_ms: 0 }]);
    assert!(matches!(open(&path), Err(LedgerError::Damaged { line: 2, .. })));
}

#[tokio::test]
async fn numbers_that_are_none_keep_their_bits() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ledger.jsonl");
    let (mut ledger, _) = open(&path).unwrap();
    let odd = Committed { loss: f64::NAN, norm: f64::INFINITY, ..committed(1, 1) };
    ledger.step(&odd, &[]).await.unwrap();
    drop(ledger);
    let tail = open(&path).unwrap().1.unwrap();
    assert_eq!(tail.loss.to_bits(), odd.loss.to_bits());
    assert_eq!(tail.norm.to_bits(), odd.norm.to_bits());
}

#[tokio::test]
async fn a_torn_end_is_cut_off_at_every_length_and_the_chain_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let path = filled(dir.path()).await;
    let whole = fs::read(&path).unwrap();
    let before = whole[..whole.len() - 1].iter().rposition(|&b| b == b'\n').unwrap() + 1;
    for length in before..whole.len() {
        fs::write(&path, &whole[..length]).unwrap();
        let (mut ledger, tail) = open(&path).unwrap();
        assert_eq!((ledger.last(), tail), (Step(3), told(2, 3)), "{length}");
        assert_eq!(fs::metadata(&path).unwrap().len(), before as u64);
        ledger.step(&committed(3, 4), &[]).await.unwrap();
        drop(ledger);
        assert_eq!(open(&path).unwrap().1, told(3, 4));
    }
    // Some file systems leave zeros where a crash took the data of the last write away.
    fs::write(&path, [&whole[..before], &[0; 300]].concat()).unwrap();
    assert_eq!(open(&path).unwrap().1, told(2, 3));
    // A crash in the very first write.
    fs::write(&path, &whole[..20]).unwrap();
    assert_eq!(open(&path).unwrap().0.last(), Step(0));
    assert_eq!(entries(&path).len(), 1);
}

#[tokio::test]
async fn a_flipped_bit_anywhere_is_refused_with_its_line_and_the_file_is_left_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let path = filled(dir.path()).await;
    let whole = fs::read(&path).unwrap();
    for at in 0..whole.len() - 1 {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 7);
        fs::write(&path, &bytes).unwrap();
        let number = whole[..at].iter().filter(|&&b| b == b'\n').count() as u64 + 1;
        match open(&path).unwrap_err() {
            LedgerError::Damaged { line, .. } => assert_eq!(line, number, "flip at {at}"),
            LedgerError::Version { .. } => assert_eq!(number, 1, "flip at {at}"),
            other => panic!("flip at {at}: {other}"),
        }
        assert_eq!(fs::read(&path).unwrap(), bytes);
    }
}

#[tokio::test]
async fn entries_that_cannot_follow_are_refused_though_their_hashes_fit() {
    let dir = tempfile::tempdir().unwrap();
    let path = filled(dir.path()).await;
    let good = entries(&path);
    let without = |n: usize| [&good[..n], &good[n + 1..]].concat();
    let twice = |n: usize| [&good[..=n], &good[n..]].concat();
    let cases = [
        (without(0), 1, "begins with the entry `open`"),
        (twice(0), 2, "a second entry `open`"),
        (without(2), 3, "step 3 follows step 1: step 2 is missing"),
        ([&good[..2], &good[4..]].concat(), 3, "steps 2 to 3 are missing"),
        (twice(3), 5, "step 3 comes after step 3, and no `back`"),
        (without(6), 7, "step 3 comes after step 5"),
        (without(5), 6, "went back from step 5 to step 2, but its newest step was 4"),
    ];
    for (entries, number, words) in cases {
        forge(&path, &entries);
        let error = open(&path).unwrap_err();
        assert!(matches!(error, LedgerError::Damaged { line, .. } if line == number), "{error}");
        assert!(error.to_string().contains(words), "{error}");
        assert!(error.to_string().contains("Restore the file from a copy"), "{error}");
    }
}

#[tokio::test]
async fn the_ledger_of_another_run_version_or_time_is_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let path = filled(dir.path()).await;
    let mut other = spec();
    other.seed += 1;
    let error = Ledger::open(&path, &other, None).unwrap_err();
    assert!(matches!(error, LedgerError::OtherRun { .. }), "{error}");
    let error = Ledger::open(&path, &spec(), Some(Step(5))).unwrap_err();
    assert!(error.to_string().contains("ends with step 4, the run goes on from step 5"), "{error}");
    Ledger::open(&path, &spec(), Some(Step(4))).unwrap();

    let open_entry = Entry::Open { version: 9, spec: spec_digest(&spec()), base: Step(0), unix_ms: 0 };
    forge(&path, &[open_entry]);
    let error = open(&path).unwrap_err();
    assert!(error.to_string().contains("has format 9, this program reads 2"), "{error}");
}

#[tokio::test]
async fn a_run_without_its_ledger_begins_one_where_it_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ledger.jsonl");
    let (mut ledger, tail) = Ledger::open(&path, &spec(), Some(Step(7))).unwrap();
    assert_eq!((ledger.last(), tail), (Step(7), None));
    ledger.step(&committed(3, 8), &[]).await.unwrap();
    assert!(matches!(entries(&path)[0], Entry::Open { base: Step(7), .. }));
}

#[tokio::test]
async fn a_step_that_is_not_the_next_one_and_a_plan_from_the_future_are_gaps() {
    let dir = tempfile::tempdir().unwrap();
    let path = filled(dir.path()).await;
    let (mut ledger, _) = open(&path).unwrap();
    for step in [4, 6] {
        let error = ledger.step(&committed(2, step), &[]).await.unwrap_err();
        assert!(matches!(error, LedgerError::Gap { last: Step(4), .. }), "{error}");
    }
    assert!(matches!(ledger.goes_on_from(Step(5)).await, Err(LedgerError::Gap { .. })));
}

#[tokio::test]
async fn a_full_disk_is_an_error_that_says_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let path = filled(dir.path()).await;
    let (mut ledger, _) = open(&path).unwrap();
    ledger.fill_disk();
    let error = ledger.step(&committed(2, 5), &[]).await.unwrap_err();
    assert!(error.to_string().contains("Free some space and start again"), "{error}");
    assert_eq!(ledger.last(), Step(4));
    assert_eq!(open(&path).unwrap().1, told(2, 4));
}
