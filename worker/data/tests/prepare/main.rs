//! From files to an open dataset: what comes out, what is remembered, and what is refused.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod full_disk;
mod parquet;

use caravan_data::{DataError, Dataset, LEAST_VOCAB, Origin, Prepared, Progress, Request, Stage, prepare};
use std::cell::RefCell;
use std::fs;
use std::path::{Path, PathBuf};

const CODE: [&str; 3] = [
    include_str!("../../src/prepare.rs"),
    include_str!("../../src/find.rs"),
    include_str!("../../src/records.rs"),
];

fn request(paths: &[&Path]) -> Request {
    Request {
        paths: paths.iter().map(|p| (*p).to_owned()).collect(),
        extensions: None,
        vocab_size: 512,
        tokenizer: None,
    }
}

/// A folder with `data/` (three source files) and room for a cache.
fn sources() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("data/sub")).unwrap();
    for (name, text) in ["b.rs", "a.rs", "sub/c.rs"].iter().zip(CODE) {
        fs::write(dir.path().join("data").join(name), text).unwrap();
    }
    dir
}

fn prepare_in(dir: &Path) -> Result<Prepared, DataError> {
    prepare(&request(&[&dir.join("data")]), &dir.join("cache"), &())
}

fn error(path: &Path, content: impl AsRef<[u8]>) -> String {
    fs::write(path, content).unwrap();
    let cache = path.with_file_name("cache");
    let text = prepare(&request(&[path]), &cache, &()).unwrap_err().to_string();
    assert_eq!(finished(&cache), Vec::<PathBuf>::new(), "{text}");
    text
}

/// Everything in a cache folder that could be taken for prepared data.
fn finished(cache: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(cache).unwrap().map(|e| e.unwrap().path());
    entries.filter(|p| p.is_dir() && !p.ends_with("requests")).collect()
}

/// The whole stream.
fn tokens(dataset: &Dataset) -> Vec<u32> {
    let mut out = vec![0; dataset.tokens() as usize];
    dataset.read(0, &mut out).unwrap();
    out
}

#[test]
fn documents_come_out_as_they_went_in_between_borders_and_with_their_source() {
    let dir = sources();
    let prepared = prepare_in(dir.path()).unwrap();
    assert_eq!(prepared.origin, Origin::Fresh);
    let data = Dataset::open(&prepared.dir).unwrap();
    data.verify().unwrap();
    assert_eq!(data.spec(), prepared.spec);
    assert_eq!((data.documents(), data.report().documents, data.report().files), (3, 3, 3));
    let (stream, tokenizer) = (tokens(&data), data.tokenizer().unwrap());
    for (number, (name, text)) in
        [("a.rs", CODE[1]), ("b.rs", CODE[0]), ("sub/c.rs", CODE[2])].iter().enumerate()
    {
        let place = data.document(number as u64).unwrap();
        assert!(place.source.ends_with(&format!("data/{name}")), "{}", place.source);
        let document = &stream[place.first as usize..place.end as usize];
        assert_eq!((document[0], document[document.len() - 1]), (data.bos(), data.eos()));
        assert_eq!(tokenizer.decode(document), *text);
        for position in [place.first, place.end - 1] {
            assert_eq!(data.document_at(position).unwrap(), place);
        }
    }
}

#[test]
fn the_digest_follows_content_alone_whatever_the_place_the_times_and_the_threads() {
    let (one, two) = (sources(), sources());
    let with_threads = |threads, dir: &Path| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| prepare_in(dir)).unwrap()
    };
    let (first, second) = (with_threads(1, one.path()), with_threads(5, two.path()));
    assert_eq!(first.spec, second.spec);
    fs::write(two.path().join("data/a.rs"), "fn changed() {}").unwrap();
    let changed = prepare_in(two.path()).unwrap();
    assert_eq!(changed.origin, Origin::Fresh);
    assert_ne!(changed.spec.digest, first.spec.digest);
    // Back as it was, but with another time: prepared again, to the same digest.
    fs::write(two.path().join("data/a.rs"), CODE[1]).unwrap();
    assert_eq!(prepare_in(two.path()).unwrap().spec, first.spec);
}

#[test]
fn a_second_start_finds_the_result_and_a_new_vocabulary_does_not() {
    let dir = sources();
    let first = prepare_in(dir.path()).unwrap();
    let second = prepare_in(dir.path()).unwrap();
    assert_eq!(second, Prepared { origin: Origin::Cached, ..first.clone() });
    let other = Request { vocab_size: 600, ..request(&[&dir.path().join("data")]) };
    let other = prepare(&other, &dir.path().join("cache"), &()).unwrap();
    assert_eq!(other.origin, Origin::Fresh);
    assert_ne!(other.spec, first.spec);
}

#[test]
fn leftovers_of_a_killed_preparation_are_removed() {
    let dir = sources();
    let leftover = dir.path().join("cache/12345.partial");
    fs::create_dir_all(&leftover).unwrap();
    fs::write(leftover.join("tokens-00000.bin"), "half").unwrap();
    prepare_in(dir.path()).unwrap();
    assert!(!leftover.exists());
}

#[test]
fn two_preparations_at_once_do_the_work_once() {
    let dir = sources();
    let results: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| prepare_in(dir.path()).unwrap())).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert_eq!(results.iter().filter(|p| p.origin == Origin::Fresh).count(), 1);
    assert!(results.iter().all(|p| p.spec == results[0].spec));
}

#[derive(Default)]
struct Recorder(RefCell<Vec<(Stage, u64, u64)>>);

impl Progress for Recorder {
    fn update(&self, stage: Stage, done: u64, total: u64) {
        self.0.borrow_mut().push((stage, done, total));
    }
}

#[test]
fn progress_goes_through_the_stages_in_order_each_from_nothing_to_all() {
    let dir = sources();
    let recorder = Recorder::default();
    prepare(&request(&[&dir.path().join("data")]), &dir.path().join("cache"), &recorder).unwrap();
    let updates = recorder.0.into_inner();
    assert!(updates.is_sorted_by_key(|&(stage, done, _)| (stage, done)), "{updates:?}");
    for stage in [Stage::Find, Stage::Read, Stage::Train, Stage::Write] {
        let of: Vec<_> = updates.iter().filter(|u| u.0 == stage).collect();
        assert_eq!(of[0].1, 0);
        assert!(of.last().is_some_and(|u| u.1 == u.2 && u.2 > 0), "{of:?}");
    }
}

#[test]
fn copies_generated_and_binary_files_in_a_directory_are_left_out_and_counted() {
    let dir = sources();
    let data = dir.path().join("data");
    fs::write(data.join("copy.rs"), CODE[0]).unwrap();
    fs::write(data.join("giant.rs"), "let x = 1;\n".repeat(200_000)).unwrap();
    fs::write(data.join("marked.rs"), "// @generated by a machine\nfn f() {}\n").unwrap();
    fs::write(data.join("bindings.rs"), "/* automatically generated by a machine */\nfn g() {}\n").unwrap();
    fs::write(data.join("long.rs"), format!("const T: &str = \"{}\";\n", "x".repeat(9_000))).unwrap();
    fs::write(data.join("table.rs"), format!("{}\n", "0x00, ".repeat(100)).repeat(50)).unwrap();
    fs::write(data.join("latin1.txt"), b"caf\xe9").unwrap();
    fs::write(data.join("binary.txt"), b"ELF\0\0").unwrap();
    // Prose may be long, in all and by line.
    fs::write(data.join("book.txt"), "It was a dark and stormy night. ".repeat(40_000)).unwrap();
    let report = prepare_in(dir.path()).unwrap().report;
    assert_eq!((report.documents, report.duplicates, report.generated, report.not_text), (4, 1, 5, 2));
    let told = report.to_string();
    let left_out = "1 duplicates left out, 5 generated left out, 2 not UTF-8 text left out";
    assert!(told.ends_with(left_out), "{told}");
}

#[test]
fn a_named_file_is_taken_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("marked.rs");
    fs::write(&file, "// @generated\n\0fn f() {}\n").unwrap();
    let prepared = prepare(&request(&[&file]), &dir.path().join("cache"), &()).unwrap();
    assert_eq!(prepared.report.documents, 1);
}

#[test]
fn jsonl_text_and_tokens_become_documents_with_their_lines() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("data.jsonl");
    fs::write(&file, "{\"text\": \"one\", \"other\": 1}\n\n{\"text\": \"two\\n\"}\n{\"text\": \"\"}")
        .unwrap();
    let prepared = prepare(&request(&[&file]), &dir.path().join("cache"), &()).unwrap();
    let data = Dataset::open(&prepared.dir).unwrap();
    assert_eq!((data.documents(), data.report().empty), (2, 1));
    assert_eq!(data.document(1).unwrap().row, 3);
    assert_eq!(data.tokenizer().unwrap().decode(&tokens(&data)), "onetwo\n");

    fs::write(&file, "{\"tokens\": [7, 8]}\n{\"tokens\": [1, 9, 2]}\n").unwrap();
    let prepared = prepare(&request(&[&file]), &dir.path().join("cache"), &()).unwrap();
    let data = Dataset::open(&prepared.dir).unwrap();
    assert!(data.tokenizer().is_none());
    assert_eq!(tokens(&data), [1, 7, 8, 2, 1, 9, 2]);
}

#[test]
fn a_given_tokenizer_is_used_kept_and_checked_against_the_vocabulary() {
    let dir = sources();
    let prepared = prepare_in(dir.path()).unwrap();
    let tokenizer = prepared.dir.join("tokenizer.json");
    let mixed = dir.path().join("mixed.jsonl");
    fs::write(&mixed, "{\"tokens\": [300, 301]}\n{\"text\": \"fn main() {}\"}\n").unwrap();
    let given = Request { tokenizer: Some(tokenizer.clone()), ..request(&[&mixed]) };
    let cache = dir.path().join("cache");
    let data = Dataset::open(&prepare(&given, &cache, &()).unwrap().dir).unwrap();
    assert_eq!(fs::read(data.dir().join("tokenizer.json")).unwrap(), fs::read(&tokenizer).unwrap());
    assert_eq!(tokens(&data)[..5], [1, 300, 301, 2, 1]);
    assert!(data.tokenizer().unwrap().decode(&tokens(&data)).ends_with("fn main() {}"));

    let small = Request { vocab_size: 400, ..given.clone() };
    let text = prepare(&small, &cache, &()).unwrap_err().to_string();
    assert!(text.contains("512 tokens") && text.contains("vocabulary is 400"), "{text}");
    let text = prepare(&request(&[&mixed]), &cache, &()).unwrap_err().to_string();
    assert!(text.contains("both text and ready tokens"), "{text}");
    let gone = Request { tokenizer: Some("/no/such/tokenizer.json".into()), ..given };
    assert!(prepare(&gone, &cache, &()).unwrap_err().to_string().contains("/no/such/tokenizer.json"));
}

#[test]
fn bad_input_is_refused_by_file_and_place_and_leaves_nothing_that_looks_finished() {
    let dir = tempfile::tempdir().unwrap();
    let (text, jsonl) = (dir.path().join("bad.txt"), dir.path().join("bad.jsonl"));
    let not_utf8 = error(&text, b"good until here\xff");
    assert!(not_utf8.contains("bad.txt is not UTF-8") && not_utf8.contains("byte 15"), "{not_utf8}");
    let not_utf8 = error(&jsonl, b"{\"text\": \"x\"}\n{\"text\": \"\xff\"}\n");
    assert!(not_utf8.contains("bad.jsonl") && not_utf8.contains("byte 24"), "{not_utf8}");
    for (line, why) in [
        ("{\"txt\": \"x\"}", "neither `text` nor `tokens`"),
        ("{\"text\": \"x\", \"tokens\": [1]}", "both"),
        ("{\"tokens\": [1, -2]}", "-2"),
        ("{\"tokens\": [1.5]}", "1.5"),
        ("{\"text\": \"unfinished", "column 20: EOF"),
        ("[]", "record"),
    ] {
        let got = error(&jsonl, format!("{{\"text\": \"fine\"}}\n{line}\n"));
        assert!(got.contains("bad.jsonl, record 2") && got.contains(why), "{got}");
    }
    let outside = error(&jsonl, "{\"tokens\": [511]}\n{\"tokens\": [3, 512]}\n");
    assert!(outside.contains("record 2: token 512") && outside.contains("vocabulary of 512"), "{outside}");
    assert!(error(&jsonl, "\n\n").contains("no document is left"));
    assert!(error(&dir.path().join("bad.parquet"), "PAR1 not really").contains("cannot be read as Parquet"));
    let found = Request { vocab_size: LEAST_VOCAB - 1, ..request(&[&text]) };
    let small = prepare(&found, &dir.path().join("cache"), &()).unwrap_err().to_string();
    assert!(small.contains("vocabulary of 259 is too small"), "{small}");
}

#[test]
fn a_damaged_file_is_refused_by_its_name_and_prepared_again() {
    let dir = sources();
    let folder = prepare_in(dir.path()).unwrap().dir;
    for name in ["tokens-00000.bin", "documents.bin", "tokenizer.json", "index.json"] {
        let path = folder.join(name);
        let whole = fs::read(&path).unwrap();
        let mut flipped = whole.clone();
        flipped[whole.len() / 2] ^= 1;
        let refused = |content: &[u8]| {
            fs::write(&path, content).unwrap();
            let error = Dataset::open(&folder).and_then(|d| d.verify()).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("damaged"), "{error}");
            // The sources are still there.
            let again = prepare_in(dir.path()).unwrap();
            assert!(matches!(&again.origin, Origin::Rebuilt(why) if why.contains(name)), "{}", again.origin);
            assert_eq!(fs::read(&path).unwrap(), whole);
        };
        refused(&flipped);
        refused(&[&whole[..], b"x"].concat()[1..]);
        refused(&whole[..whole.len() - 1]);
        fs::remove_file(&path).unwrap();
        assert!(matches!(Dataset::open(&folder), Err(DataError::Damaged { .. })));
        assert!(matches!(prepare_in(dir.path()).unwrap().origin, Origin::Rebuilt(_)));
    }
}
