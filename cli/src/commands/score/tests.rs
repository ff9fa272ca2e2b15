//! Lines in, lines out, and every kind of bad line.

use super::*;
use crate::commands::testing::Tiny;
use caravan_types::SliceId;
use serde_json::Value;
use std::io::Read;

/// What came out, and the error in words where there was one.
fn score_text(checkpoint: &Path, input: &str) -> (Vec<Value>, Option<String>) {
    let checkpoint = Checkpoint::open(checkpoint).unwrap();
    let mut out = Vec::new();
    let (mut input, name) = (input.as_bytes(), Path::new("in.jsonl"));
    let outcome = score(&checkpoint, 1, (&mut input, name), (&mut out, Path::new("out")));
    let lines = String::from_utf8(out).unwrap();
    let lines = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    (lines, outcome.err().map(|e| e.to_string()))
}

fn numbers(line: &Value, key: &str) -> Vec<f64> {
    line[key].as_array().unwrap().iter().map(|n| n.as_f64().unwrap()).collect()
}

#[test]
fn every_token_but_the_first_has_a_logarithm_and_the_sum_is_the_continuations() {
    let tiny = Tiny::new();
    let checkpoint = tiny.checkpoint(3);
    let (lines, error) = score_text(
        &checkpoint,
        "{\"text\": \"line 7\"}\n\n  {\"text\": \"line\", \"continuation\": \" 7\"}\n{\"text\": \"\"}\n\
         {\"tokens\": [1, 9, 270, 4], \"from\": 2}\n{\"tokens\": [299]}",
    );
    assert_eq!((lines.len(), error), (5, None));
    for line in &lines {
        let (logprobs, greedy) = (line["logprobs"].as_array().unwrap(), line["greedy"].as_array().unwrap());
        let tokens = line["tokens"].as_array().unwrap();
        assert_eq!((logprobs.len(), greedy.len()), (tokens.len(), tokens.len()));
        assert!(logprobs[0].is_null() && greedy[0].is_null());
        assert!(logprobs[1..].iter().all(|l| l.as_f64().unwrap() < 0.0));
        assert!(greedy[1..].iter().all(Value::is_boolean));
        let from = line["from"].as_u64().unwrap() as usize;
        let sum = logprobs[from.min(logprobs.len())..].iter().fold(0.0, |sum, l| sum + l.as_f64().unwrap());
        assert_eq!(line["sum"].as_f64().unwrap().to_bits(), sum.to_bits());
    }
    // A text begins as training begins a document, and does not end.
    let tokenizer = Tokenizer::load(&checkpoint.join("tokenizer.json")).unwrap();
    let expected = [vec![tokenizer.bos()], tokenizer.encode("line 7").unwrap()].concat();
    assert_eq!(numbers(&lines[0], "tokens"), expected.iter().map(|t| f64::from(*t)).collect::<Vec<_>>());
    let before = expected.len() - tokenizer.encode("line 7").unwrap().len()
        + tokenizer.encode_split("line", " 7").unwrap().1;
    assert_eq!((lines[1]["logprobs"] == lines[0]["logprobs"], &lines[1]["from"]), (true, &before.into()));
    assert_eq!((&lines[0]["from"], &lines[3]["from"], &lines[4]["sum"]), (&1.into(), &2.into(), &0.0.into()));
}

#[test]
fn a_line_has_the_same_bits_alone_and_among_others() {
    let tiny = Tiny::new();
    let checkpoint = tiny.checkpoint(3);
    let one = "{\"text\": \"line 7 of text\"}\n";
    let (alone, _) = score_text(&checkpoint, one);
    // More than one window, of lines of all lengths; this one first, in the middle and last.
    let text = |i: usize| format!("{{\"text\": \"{}\"}}\n", "ab ".repeat(i % 9));
    let many: String = (0..3000).map(|i| if i % 1499 == 0 { one.to_owned() } else { text(i) }).collect();
    let (among, error) = score_text(&checkpoint, &many);
    assert_eq!((among.len(), error), (3000, None));
    for (i, line) in among.iter().enumerate() {
        assert_eq!(line == &alone[0], i % 1499 == 0, "line {}", i + 1);
    }
    let lengths: Vec<usize> = among.iter().map(|l| l["tokens"].as_array().unwrap().len()).collect();
    assert!(lengths.iter().sum::<usize>() > WINDOW_TOKENS, "{lengths:?}");
}

#[test]
fn what_is_wrong_with_a_line_is_told_and_the_lines_before_it_are_scored() {
    let tiny = Tiny::new();
    let checkpoint = tiny.checkpoint(3);
    let long = format!("{{\"text\": \"{}\"}}", "7 ".repeat(40));
    for (line, said) in [
        (
            "{\"txet\": \"a\"}",
            "unknown field `txet`, expected one of `text`, `continuation`, `tokens`, `from`",
        ),
        ("{\"text\": \"a\"", "at column 12: EOF while parsing"),
        ("[1, 2]", "A line is {\"text\""),
        ("{}", "it has neither `text` nor `tokens`: give one"),
        ("{\"text\": \"a\", \"tokens\": [1]}", "it has both `text` and `tokens`"),
        ("{\"text\": \"a\", \"from\": 1}", "`from` goes with `tokens`"),
        ("{\"tokens\": [1, 2], \"continuation\": \"a\"}", "`continuation` goes with `text`"),
        ("{\"text\": \"a\", \"continuation\": \"\"}", "its `continuation` is empty: leave it out"),
        ("{\"tokens\": []}", "its `tokens` are empty"),
        ("{\"tokens\": [1, -2]}", "invalid value: integer `-2`"),
        ("{\"tokens\": [1, 2, 300]}", "token 300 at position 2 is outside the model's vocabulary of 300"),
        ("{\"tokens\": [1, 4294967297]}", "token 4294967297 at position 1"),
        ("{\"tokens\": [1, 2], \"from\": 0}", "`from` is 0, and must be from 1"),
        ("{\"tokens\": [1, 2], \"from\": 2}", "to 1, the last of its 2 tokens"),
        (&long, "and the model's context is 32: shorten it"),
    ] {
        let input =
            format!("{{\"tokens\": [1, 2]}}\n\n{{\"tokens\": [3, 4]}}\n{line}\n{{\"tokens\": [5]}}\n");
        let (lines, error) = score_text(&checkpoint, &input);
        let error = error.unwrap();
        assert!(error.starts_with("in.jsonl, line 4: ") && error.contains(said), "{line}: {error}");
        assert!(error.ends_with(". The 2 lines before it are scored"), "{error}");
        assert_eq!(lines.len(), 2, "{line}");
    }
    let full = format!("{{\"tokens\": [{}1]}}", "1, ".repeat(31));
    assert_eq!(score_text(&checkpoint, &full).1, None, "the context is full, and not more");
}

#[test]
fn bytes_that_are_no_text_and_lines_without_end_are_refused() {
    let tiny = Tiny::new();
    let checkpoint = Checkpoint::open(&tiny.checkpoint(3)).unwrap();
    let refused = |input: &mut dyn BufRead| {
        let mut out = Vec::new();
        let outcome = score(&checkpoint, 1, (input, Path::new("in")), (&mut out, Path::new("out")));
        outcome.unwrap_err().to_string()
    };
    assert!(refused(&mut &b"{\"text\": \"caf\xe9\"}"[..]).contains("line 1: byte 14 of it is no UTF-8"));
    let mut endless = BufReader::new(io::repeat(b'x'));
    assert!(refused(&mut endless).contains("line 1: it is longer than 16 MiB"));
}

/// Gives the same line for ever.
struct Endless(usize);

impl Read for Endless {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        const LINE: &[u8] = b"{\"text\": \"line 7 of text 8\"}\n";
        for byte in &mut *buffer {
            *byte = LINE[self.0 % LINE.len()];
            self.0 += 1;
        }
        Ok(buffer.len())
    }
}

/// Takes so many bytes, then nothing more.
struct Full(usize, io::ErrorKind);

impl Write for Full {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 = self.0.checked_sub(bytes.len()).ok_or(self.1)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn an_input_without_end_is_scored_as_it_comes_until_nobody_takes_more() {
    let tiny = Tiny::new();
    let checkpoint = Checkpoint::open(&tiny.checkpoint(3)).unwrap();
    let against = |kind| {
        let (mut input, mut out) = (BufReader::new(Endless(0)), Full(100_000, kind));
        let outcome = score(&checkpoint, 1, (&mut input, Path::new("in")), (&mut out, Path::new("out")));
        outcome.unwrap_err()
    };
    assert!(crate::is_broken_pipe(&*against(io::ErrorKind::BrokenPipe)));
    assert!(against(io::ErrorKind::StorageFull).to_string().starts_with("cannot write out: "));
}

#[test]
fn weights_that_are_no_numbers_are_told_apart_from_bad_lines() {
    let tiny = Tiny::new();
    // The embedding of token 270 has one.
    let value =
        |slice: SliceId, i| if (slice.0, i) == (0, 270 * 32) { f32::NAN } else { i as f32 % 7.0 * 0.01 };
    let checkpoint = tiny.checkpoint_of(1, value);
    let (lines, error) = score_text(&checkpoint, "{\"tokens\": [1, 9, 4]}\n{\"tokens\": [1, 270, 4]}\n");
    assert_eq!(lines.len(), 1);
    let error = error.unwrap();
    assert!(error.starts_with("in.jsonl, line 2: the model's answer is no finite number"), "{error}");
}

#[test]
fn a_checkpoint_without_a_tokenizer_scores_tokens() {
    let tiny = Tiny::new();
    let bare = tiny.checkpoint_without_tokenizer(5);
    let (lines, error) = score_text(&bare, "{\"tokens\": [1, 2]}\n{\"text\": \"a\"}\n");
    assert_eq!(lines.len(), 1);
    assert!(error.unwrap().contains("line 2: the checkpoint has no tokenizer"));
}

#[test]
fn files_are_read_and_written_and_never_one_for_both() {
    let tiny = Tiny::new();
    tiny.checkpoint(3);
    let here = |name: &str| tiny.dir.path().join(name);
    fs::write(here("in"), "{\"tokens\": [1, 2]}\n").unwrap();
    let attempt = |input: &str, output: &str| {
        let args = Args {
            checkpoint: tiny.run.path().to_owned(),
            input: Some(here(input)),
            output: Some(here(output)),
            threads: Some(1),
        };
        run(&args, &mut io::sink()).map_err(|e| e.to_string())
    };
    attempt("in", "out").unwrap();
    assert!(fs::read_to_string(here("out")).unwrap().starts_with("{\"logprobs\":[null,-"));
    assert!(attempt("in", "in").unwrap_err().contains("is both input and output"));
    assert!(attempt("nowhere", "out").unwrap_err().contains("cannot read"));
    assert!(attempt("in", "no/folder").unwrap_err().contains("cannot write"));
    assert_eq!(fs::read_to_string(here("in")).unwrap(), "{\"tokens\": [1, 2]}\n");
}
