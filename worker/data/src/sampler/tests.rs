//! Every sample counts once, and always as the same tokens.

use super::*;
use crate::find::Request;
use crate::prepare::prepare;
use proptest::prelude::*;

const BOS: u32 = 1;
const EOS: u32 = 2;

/// A dataset of ready-made documents; the folder goes with the first value.
fn dataset(documents: &[Vec<u32>]) -> (tempfile::TempDir, Arc<Dataset>) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("data.jsonl");
    let lines: Vec<_> = documents.iter().map(|d| format!("{{\"tokens\": {d:?}}}\n")).collect();
    std::fs::write(&file, lines.concat()).unwrap();
    let request = Request { paths: vec![file], extensions: None, vocab_size: 70_000, tokenizer: None };
    let prepared = prepare(&request, &dir.path().join("cache"), &()).unwrap();
    let dataset = Dataset::open(&prepared.dir).unwrap();
    (dir, Arc::new(dataset))
}

/// Documents of the given lengths, each token unlike all others.
fn documents(lengths: &[usize]) -> Vec<Vec<u32>> {
    let mut next = 10;
    let mut token = || {
        next += 1;
        next
    };
    lengths.iter().map(|&n| (0..n).map(|_| token()).collect()).collect()
}

fn stream(documents: &[Vec<u32>]) -> Vec<u32> {
    documents.iter().flat_map(|d| [&[BOS], &d[..], &[EOS]].concat()).collect()
}

fn shape(lanes: u32, micro_batches: u32, sequences: u32, sequence_length: u32) -> BatchShape {
    BatchShape { lanes, micro_batches, sequences, sequence_length }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn every_window_comes_exactly_once_an_epoch_and_batches_hold_what_the_stream_holds(
        lengths in prop::collection::vec(1_usize..30, 1..12),
        seed: u64,
        (lanes, micro_batches, sequences, length) in (0_u32..3, 1_u32..3, 1_u32..4, 1_u32..12),
    ) {
        let documents = documents(&lengths);
        let stream = stream(&documents);
        let shape = shape(1 << lanes, micro_batches, sequences, length);
        prop_assume!(stream.len() > length as usize);
        let (_dir, dataset) = dataset(&documents);
        let sampler = Sampler::new(dataset, seed, shape).unwrap();
        prop_assert_eq!(sampler.windows() as usize, (stream.len() - 1) / length as usize);
        let steps = (3 * sampler.windows()).div_ceil(shape.sequences_per_step());
        let mut windows = Vec::new();
        for step in 1..=steps {
            let mut counted = 0;
            for lane in 0..shape.lanes {
                for micro_batch in 0..shape.micro_batches {
                    let batch = sampler.micro_batch(Step(step), lane, micro_batch).unwrap();
                    counted += batch.counted.iter().filter(|&&c| c).count() as u64;
                    for q in 0..shape.sequences {
                        let i = (u64::from(lane) * u64::from(micro_batches) + u64::from(micro_batch))
                            * u64::from(sequences) + u64::from(q);
                        let place = sampler.place(Step(step), i).unwrap();
                        windows.push(place.window);
                        check_sequence(&batch, q as usize, &stream[place.position as usize..])?;
                    }
                }
            }
            prop_assert_eq!(sampler.counted_tokens(Step(step)).unwrap(), counted);
        }
        for epoch in windows.chunks_exact(sampler.windows() as usize) {
            let mut sorted = epoch.to_vec();
            sorted.sort_unstable();
            prop_assert!(sorted.into_iter().eq(0..sampler.windows()));
        }
    }
}

/// Sequence `q` of `batch` against the stream from its first token on, written out plainly.
fn check_sequence(batch: &MicroBatch, q: usize, stream: &[u32]) -> Result<(), TestCaseError> {
    let at = |p: usize| q * batch.length + p;
    for p in 0..batch.length {
        prop_assert_eq!(batch.tokens[at(p)], stream[p]);
        prop_assert_eq!(batch.targets[at(p)], stream[p + 1]);
        prop_assert_eq!(batch.counted[at(p)], stream[p + 1] != BOS);
        let start = (0..=p).rev().find(|&s| stream[s] == BOS).unwrap_or(0);
        prop_assert_eq!(batch.document_start[at(p)] as usize, start);
    }
    Ok(())
}

#[test]
fn a_batch_depends_on_seed_step_and_place_and_on_nothing_that_happened_before() {
    let (_dir, data) = dataset(&documents(&[500, 300, 700]));
    let shape = shape(2, 2, 2, 16);
    let sampler = |seed| Sampler::new(Arc::clone(&data), seed, shape).unwrap();
    let one = sampler(7);
    let forwards: Vec<_> = (1..=20).map(|s| one.micro_batch(Step(s), 1, 0).unwrap()).collect();
    let two = sampler(7);
    let mut backwards: Vec<_> = (1..=20).rev().map(|s| two.micro_batch(Step(s), 1, 0).unwrap()).collect();
    backwards.reverse();
    assert_eq!(forwards, backwards);
    assert_ne!(forwards[0], forwards[1]);
    assert_ne!(forwards[0], sampler(8).micro_batch(Step(1), 1, 0).unwrap());
    assert_ne!(forwards[0], one.micro_batch(Step(1), 0, 0).unwrap());
    // Asked again after it was forgotten, a count is the same.
    let counts: Vec<_> = (1..=20).map(|s| one.counted_tokens(Step(s)).unwrap()).collect();
    assert_eq!(counts, (1..=20).map(|s| one.counted_tokens(Step(s)).unwrap()).collect::<Vec<_>>());
}

#[test]
fn impossible_shapes_steps_and_places_are_errors() {
    let (_dir, data) = dataset(&documents(&[8]));
    let new = |shape| Sampler::new(Arc::clone(&data), 1, shape);
    let text = new(shape(1, 1, 1, 10)).unwrap_err().to_string();
    assert!(text.contains("10 tokens") && text.contains("needs 11"), "{text}");
    assert!(new(shape(1, 0, 1, 4)).unwrap_err().to_string().contains("0 micro-batches"));
    let sampler = new(shape(2, 1, 1, 9)).unwrap();
    assert_eq!(sampler.windows(), 1);
    for (step, lane, index) in [(0, 0, 0), (1, 2, 0), (1, 0, 1), (u64::MAX, 0, 0)] {
        assert!(sampler.micro_batch(Step(step), lane, index).is_err(), "{step} {lane} {index}");
    }
    assert!(sampler.place(Step(1), 2).is_err());
    assert!(sampler.counted_tokens(Step(0)).is_err());
    assert!(sampler.describe(Step(0)).is_err());
}

#[test]
fn a_description_names_the_documents_of_every_position() {
    let (_dir, data) = dataset(&documents(&[3, 4, 50]));
    let sampler = Sampler::new(Arc::clone(&data), 3, shape(1, 1, 1, 14)).unwrap();
    let first = (1..100).find(|&s| sampler.place(Step(s), 0).unwrap().window == 0).unwrap();
    let batch = sampler.describe(Step(first)).unwrap();
    let sequence = &batch.sequences[0];
    let spans: Vec<_> =
        sequence.documents.iter().map(|d| (d.row, d.start, d.end, d.skipped_tokens)).collect();
    assert_eq!(spans, [(1, 0, 5, 0), (2, 5, 11, 0), (3, 11, 14, 0)]);
    assert!(sequence.documents[0].source.ends_with("data.jsonl"));
    assert_eq!(sequence.documents[0].text, None);
    assert_eq!(sequence.counted.iter().filter(|c| !**c).count(), 2);
    assert_eq!(batch.counted_tokens, 12);
    let later = (1..100).find(|&s| sampler.place(Step(s), 0).unwrap().window == 1).unwrap();
    let documents = &sampler.describe(Step(later)).unwrap().sequences[0].documents;
    assert_eq!((documents[0].row, documents[0].skipped_tokens, documents.len()), (3, 3, 1));
    assert!(serde_json::to_string(&batch).unwrap().contains("\"documents\""));
}

#[test]
fn the_first_batches_are_pinned_because_runs_depend_on_them() {
    let (_dir, data) = dataset(&documents(&[100]));
    let sampler = Sampler::new(data, 42, shape(2, 1, 1, 4)).unwrap();
    let windows: Vec<_> =
        (1..=4).flat_map(|s| [0, 1].map(|i| sampler.place(Step(s), i).unwrap().window)).collect();
    assert_eq!(windows, [10, 17, 20, 1, 18, 6, 11, 12]);
}
