//! A good history passes; each way of tampering with one is found, and named.

use super::*;
use crate::commands::testing::Tiny;
use caravan_coordinator::ledger::{Entry, FORMAT, line};
use caravan_types::{Generation, NotFinite, WorkerId};
use std::fs;

/// Samples of a step of the tiny run.
const SAMPLES: u64 = 4;

fn step(tiny: &Tiny, generation: u64, step: u64) -> Entry {
    let tokens = run_data::sampler(&tiny.run).unwrap().counted_tokens(Step(step)).unwrap();
    Entry::Step {
        step: Step(step),
        generation: Generation(generation),
        loss: 5.5 / step as f64,
        norm: 0.1,
        tokens,
        first: (step - 1) * SAMPLES,
        end: step * SAMPLES,
        members: vec![WorkerId(1), WorkerId(3)],
        unix_ms: 1,
    }
}

fn open(tiny: &Tiny) -> Entry {
    Entry::Open { version: FORMAT, spec: spec_digest(tiny.run.spec()), base: Step(0), unix_ms: 1 }
}

/// Five steps, back to the third, and on to the end.
fn good(tiny: &Tiny) -> Vec<Entry> {
    let first = (1..=5).map(|s| step(tiny, 1, s));
    let back = Entry::Back { from: Step(5), to: Step(3), unix_ms: 1 };
    let second = (4..=10).map(|s| step(tiny, 2, s));
    [open(tiny)].into_iter().chain(first).chain([back]).chain(second).collect()
}

/// The lines of a ledger of these entries, with hashes that fit.
fn lines(entries: &[Entry]) -> Vec<String> {
    let mut hash = Digest::default();
    let chain = |entry| {
        let (bytes, next) = line(hash, entry);
        hash = next;
        String::from_utf8(bytes).unwrap()
    };
    entries.iter().map(chain).collect()
}

fn audited(tiny: &Tiny, lines: &[String]) -> Report {
    fs::write(tiny.run.ledger(), lines.concat()).unwrap();
    audit(&tiny.run).unwrap()
}

/// The subjects that do not hold, and all that is said of them.
fn faults(report: &Report) -> (Vec<String>, String) {
    assert_eq!(report.holds, report.checks.iter().all(|check| check.holds));
    let failed: Vec<&Check> = report.checks.iter().filter(|check| !check.holds).collect();
    let found = failed.iter().flat_map(|check| check.found.clone()).collect::<Vec<_>>().join("\n");
    (failed.iter().map(|check| check.subject.to_string()).collect(), found)
}

#[test]
fn a_good_run_passes_with_its_numbers() {
    let tiny = Tiny::new();
    tiny.checkpoint(3);
    tiny.checkpoint(10);
    let report = audited(&tiny, &lines(&good(&tiny)));
    assert_eq!(faults(&report), (vec![], String::new()));
    assert_eq!((report.steps, report.samples), (10, 40));
    let found: Vec<_> = report.checks.iter().map(|check| check.found[0].as_str()).collect();
    assert!(
        found[0].starts_with("14 lines, each with the hash over the one before; the last is "),
        "{found:?}"
    );
    assert!(found[0].ends_with(&report.head.unwrap().to_string()));
    let rest = ["steps 1 to 10, each once; the run went back once, and 2 steps were undone", "from g1 to g2"];
    rest.iter().for_each(|text| assert!(found.iter().any(|f| f.contains(text)), "{text}: {found:?}"));
    assert!(found.contains(&"0 to 39, without gap or overlap, 4 a step"), "{found:?}");
    assert!(found.iter().any(|f| f.starts_with("epoch 0 used 40 of its ")), "{found:?}");
    assert_eq!(found[8], "2, of steps 3, 10");
}

/// The same step without an update.
fn skipped(entry: Entry) -> Entry {
    let Entry::Step { step, generation, norm, tokens, first, end, members, unix_ms, .. } = entry else {
        panic!("{entry:?}")
    };
    Entry::Skip { step, generation, loss: f64::NAN, norm, tokens, first, end, members, unix_ms }
}

#[test]
fn samples_of_a_skipped_step_count_once_and_a_halt_counts_nothing() {
    let tiny = Tiny::new();
    let mut entries = good(&tiny);
    entries[13] = skipped(entries[13].clone());
    entries.insert(13, Entry::Halt { step: Step(10), what: NotFinite::Loss, unix_ms: 1 });
    let report = audited(&tiny, &lines(&entries));
    assert_eq!(faults(&report), (vec![], String::new()));
    assert_eq!((report.steps, report.samples, report.skipped), (10, 40, 1));
    let history = report.checks.iter().find(|check| check.subject == Subject::History).unwrap();
    assert!(
        history.found[0].ends_with("it stopped once before a step that was not finite; step 10 was skipped")
    );

    // Nobody skips a step whose loss and gradient are finite.
    if let Some(Entry::Skip { loss, .. }) = entries.last_mut() {
        *loss = 1.0;
    }
    let (subjects, found) = faults(&audited(&tiny, &lines(&entries)));
    assert_eq!(subjects, ["history"]);
    assert!(found.contains("step 10 was skipped with loss 1 and norm 0.1"), "{found}");
}

#[test]
fn a_run_that_has_just_begun_passes() {
    let tiny = Tiny::new();
    let report = audited(&tiny, &lines(&[open(&tiny)]));
    assert_eq!(faults(&report), (vec![], String::new()));
    assert_eq!(report.steps, 0);
}

#[test]
fn each_way_of_tampering_is_found_and_named() {
    let tiny = Tiny::new();
    let good = lines(&good(&tiny));
    // Line n is good[n - 1]: line 1 opens, line 3 is step 2.
    let with = |change: &dyn Fn(&mut Vec<String>)| {
        let mut lines = good.clone();
        change(&mut lines);
        faults(&audited(&tiny, &lines))
    };

    let (failed, found) = with(&|l| l[2] = l[2].replace("\"loss\":2.75", "\"loss\":1.75"));
    assert_eq!((failed, found.lines().count()), (vec!["chain".to_owned()], 1), "{found}");
    assert!(found.starts_with("line 3: its hash does not fit: it was changed"), "{found}");

    let (failed, found) = with(&|l| l[2] = l[2].replace("\"tokens\":1", "\"tokens\":2"));
    assert_eq!(failed, ["chain", "tokens"]);
    assert!(found.contains("line 3: step 2 counted 2"), "{found}");

    let (failed, found) = with(&|l| drop(l.remove(2)));
    assert_eq!(failed, ["chain", "history", "samples"]);
    assert!(found.contains("line 3: step 3 follows step 1: step 2 is missing"), "{found}");
    assert!(
        found.contains("line 3: step 3 has the samples 8..12; the samples 4..8 are in no step"),
        "{found}"
    );

    let (failed, found) = with(&|l| l.swap(2, 3));
    assert_eq!(failed[..2], ["chain", "history"]);
    assert!(found.contains("line 3 is not where it was written: it stood behind line 4"), "{found}");
    assert!(found.contains("line 4 is not where it was written: it stood behind line 2"), "{found}");

    let (failed, found) = with(&|l| l.insert(3, l[2].clone()));
    assert_eq!(failed, ["chain", "history", "samples", "sequences"]);
    assert!(found.contains("line 4 is not where it was written: it stood behind line 2"), "{found}");
    assert!(found.contains("line 4: step 2 comes after step 2, and no `back` lies between"), "{found}");
    assert!(found.contains("line 4: sample 0 of step 2 is sequence "), "{found}");

    let (failed, found) = with(&|l| {
        let half = l[13].len() / 2;
        l[13].truncate(half);
    });
    assert_eq!(failed, ["chain"]);
    assert!(found.contains("line 14, the last one, is cut off in the middle"), "{found}");

    let (failed, found) = with(&|l| l[4] = "hello\n".into());
    assert_eq!(failed[..2], ["chain", "history"]);
    assert!(found.contains("line 5: it is no hash with an entry"), "{found}");

    let (failed, found) = with(&|l| l.clear());
    assert_eq!((failed, found.as_str()), (vec!["format".to_owned()], "the ledger is empty"));
}

#[test]
fn a_ledger_of_another_run_or_version_or_with_a_late_beginning_is_named() {
    let tiny = Tiny::new();
    let entries = good(&tiny);
    let opened = |version, seed, base| {
        let mut spec = tiny.run.spec().clone();
        spec.seed = seed;
        Entry::Open { version, spec: spec_digest(&spec), base: Step(base), unix_ms: 1 }
    };
    let with = |first: Entry, rest: &[Entry]| {
        let lines = lines(&[&[first], rest].concat());
        faults(&audited(&tiny, &lines))
    };
    let (failed, found) = with(opened(FORMAT, 2, 0), &entries[1..]);
    assert_eq!(failed, ["run spec"]);
    assert!(found.contains("the ledger is that of a run with spec "), "{found}");
    let (failed, found) = with(opened(7, 1, 0), &[]);
    assert_eq!((failed, found.as_str()), (vec!["format".to_owned()], "version 7, this program reads 2"));
    let (failed, found) = with(opened(FORMAT, 1, 3), &entries[7..]);
    assert_eq!((failed, found.lines().count()), (vec!["history".to_owned()], 1), "{found}");
    assert!(found.contains("the ledger begins after step 3"), "{found}");
}

#[test]
fn a_forger_whose_hashes_fit_has_to_tell_a_history_that_adds_up() {
    let tiny = Tiny::new();
    let with = |change: &dyn Fn(&mut Vec<Entry>)| {
        let mut entries = good(&tiny);
        change(&mut entries);
        faults(&audited(&tiny, &lines(&entries)))
    };
    let (failed, found) = with(&|e| drop(e.remove(6)));
    assert_eq!(failed[0], "history");
    assert!(found.contains("line 7: step 4 comes after step 5"), "{found}");

    let (failed, found) = with(&|e| e[3] = step(&tiny, 5, 3));
    assert_eq!(failed, ["generations"]);
    assert!(found.contains("line 5: step 4 is of g1, after g5"), "{found}");

    let (failed, found) = with(&|e| {
        if let Entry::Step { first, end, .. } = &mut e[3] {
            (*first, *end) = (4, 8);
        }
    });
    assert_eq!(failed, ["samples"]);
    assert!(found.contains("line 4: step 3 has the samples 4..8; those below 8 counted before"), "{found}");
    assert!(found.contains("which are not the 4 of that step"), "{found}");

    let (failed, _) = with(&|e| {
        if let Entry::Step { tokens, .. } = &mut e[3] {
            *tokens -= 1;
        }
    });
    assert_eq!(failed, ["tokens"]);
}

#[test]
fn a_checkpoint_of_a_step_that_was_never_committed_is_found_and_a_damaged_one_is_not_counted() {
    let tiny = Tiny::new();
    let damaged = tiny.checkpoint(8);
    fs::write(damaged.join("manifest.json"), "{}").unwrap();
    let six = lines(&good(&tiny)[..6]);
    assert_eq!(faults(&audited(&tiny, &six)), (vec![], String::new()));
    tiny.checkpoint(7);
    let (failed, found) = faults(&audited(&tiny, &six));
    assert_eq!(failed, ["checkpoints"]);
    assert_eq!(found, "there is a checkpoint of step 7, which is not in the history (its newest step is 5)");
}

#[test]
fn every_epoch_is_gone_through_to_its_end_each_sequence_once() {
    let tiny = Tiny::new();
    let sampler = run_data::sampler(&tiny.run).unwrap();
    let windows = sampler.windows();
    let counted = |n: u64| Counted {
        step: Step(n),
        line: n + 1,
        first: 4 * (n - 1),
        end: 4 * n,
        tokens: 0,
        skipped: false,
    };
    let steps: Vec<_> = (1..=windows).map(counted).collect();
    let check = data::sequences(&sampler, &steps);
    assert!(check.holds && check.found[0].starts_with("3 epochs used each of their"), "{check:?}");

    let mut skipped = steps.clone();
    skipped.remove(2);
    let check = data::sequences(&sampler, &skipped);
    assert!(check.found[0].contains("epoch 0 is over, and 4 of its"), "{check:?}");

    let twice = [&steps[..3], &steps[2..]].concat();
    let check = data::sequences(&sampler, &twice);
    assert!(check.found[0].contains("line 4: sample 0 of step 3 is sequence "), "{check:?}");
}

#[test]
fn a_run_without_a_ledger_or_without_its_data_is_not_proved() {
    let tiny = Tiny::new();
    let error = audit(&tiny.run).unwrap_err().to_string();
    assert!(error.contains("the run has no ledger at ") && error.contains("ledger.jsonl"), "{error}");
    let ledger = lines(&good(&tiny));
    fs::rename(tiny.run.data().unwrap(), tiny.dir.path().join("elsewhere")).unwrap();
    let (failed, found) = faults(&audited(&tiny, &ledger));
    assert_eq!(failed, ["sequences", "tokens"]);
    assert!(found.contains("cannot be checked: "), "{found}");
}
