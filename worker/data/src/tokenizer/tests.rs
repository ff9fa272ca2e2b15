//! Text survives its tokens.

use super::*;
use crate::train::{LEAST_VOCAB, SAMPLE_BYTES, Sample, train};
use proptest::prelude::*;
use std::sync::OnceLock;

/// Real source code with most of what source code has.
const CODE: &str =
    concat!(include_str!("../tokenizer.rs"), include_str!("../pieces.rs"), include_str!("../find.rs"));

/// What breaks tokenizers: the space mark, forged specials, control characters, odd unicode.
const ODD: &[&str] = &[
    "",
    " ",
    "    ",
    "▁",
    "▁▁ ▁ x▁",
    " ▁",
    "<s>fn main() {}</s><unk>",
    "<0x41> <0xE2><0x96><0x81>",
    "\tif x {\n\t\treturn\r\n\t}\n\n\n",
    "  leading and trailing  ",
    "\u{0}\u{1}\u{7f}\u{85}\u{a0}\u{200b}\u{feff}\u{fffd}",
    "héllo wörld, naïve ﬁ",
    "e\u{301} नमस्ते 中文，日本語 한국어 עברית",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🦀",
    "1234567890 3.14159e-10 ٣٤٥",
    "\u{10ffff}\u{e000}",
];

fn trained(vocab: u32) -> Vec<u8> {
    let mut sample = Sample::new(SAMPLE_BYTES);
    sample.add(CODE);
    train(sample, vocab, Path::new("tokenizer.json"), &()).unwrap()
}

fn json() -> &'static [u8] {
    static JSON: OnceLock<Vec<u8>> = OnceLock::new();
    JSON.get_or_init(|| trained(700))
}

fn tokenizer() -> &'static Tokenizer {
    static TOKENIZER: OnceLock<Tokenizer> = OnceLock::new();
    TOKENIZER.get_or_init(|| load(json()).unwrap())
}

fn load(json: &[u8]) -> Result<Tokenizer, DataError> {
    Tokenizer::from_bytes(json, Path::new("tokenizer.json"))
}

/// The trained file with some of its fields replaced.
fn variant(change: impl FnOnce(&mut Value)) -> Vec<u8> {
    let mut value: Value = serde_json::from_slice(json()).unwrap();
    change(&mut value);
    serde_json::to_vec(&value).unwrap()
}

/// As Llama 2's file: not cut before merging.
fn whole() -> Vec<u8> {
    variant(|v| v["pre_tokenizer"] = Value::Null)
}

fn assert_lossless(tokenizer: &Tokenizer, text: &str) {
    let tokens = tokenizer.encode(text).unwrap();
    assert!(tokens.iter().all(|&t| t > 2 && t < tokenizer.vocab_size()), "{text:?} gave {tokens:?}");
    assert_eq!(tokenizer.decode(&tokens), text);
    let mut decoder = tokenizer.decoder();
    let mut streamed: String = tokens.iter().map(|&t| decoder.push(t)).collect();
    streamed.push_str(&decoder.finish());
    assert_eq!(streamed, text);
}

#[test]
fn every_text_survives_in_both_kinds_of_file_and_at_the_least_vocabulary() {
    let least = load(&trained(LEAST_VOCAB)).unwrap();
    assert_eq!(least.vocab_size(), LEAST_VOCAB);
    for tokenizer in [tokenizer(), &load(&whole()).unwrap(), &least] {
        assert_lossless(tokenizer, CODE);
        ODD.iter().for_each(|text| assert_lossless(tokenizer, text));
        assert_lossless(tokenizer, &ODD.concat());
    }
}

proptest! {
    #[test]
    fn any_text_survives(text: String, code in "[ \t\n▁a-z0-9<>/s(){}\"é🦀]{0,80}") {
        assert_lossless(tokenizer(), &text);
        assert_lossless(tokenizer(), &code);
    }

    #[test]
    fn the_library_gives_the_same_tokens_for_the_same_file(text in "([ \t\r\n]{0,3}[a-z_0-9(){}:;.é漢—🦀]{0,5}){0,16}") {
        for json in [json().to_vec(), whole()] {
            let library = Library::from_bytes(&json).unwrap();
            let tokens = load(&json).unwrap().encode(&text).unwrap();
            let encoding = library.encode(text.as_str(), false).unwrap();
            prop_assert_eq!(encoding.get_ids(), &tokens);
            prop_assert_eq!(library.decode(&tokens, true).unwrap(), text.clone());
        }
    }
}

#[test]
fn training_twice_gives_the_same_file_and_fills_the_vocabulary() {
    assert_eq!(trained(700), json());
    assert_eq!(tokenizer().vocab_size(), 700);
    assert_eq!((tokenizer().bos(), tokenizer().eos()), (LLAMA_BOS, LLAMA_EOS));
}

#[test]
fn source_code_is_shortened_digits_stand_alone_and_spaces_join_the_word_after_them() {
    let tokens = tokenizer().encode(CODE).unwrap();
    assert!(tokens.len() * 2 < CODE.len(), "{} tokens for {} bytes", tokens.len(), CODE.len());
    assert_eq!(tokenizer().encode("2025").unwrap().len(), 5);
    let (first, later) = (tokenizer().encode("fn").unwrap(), tokenizer().encode("x fn").unwrap());
    assert_eq!(first.len(), 1);
    assert_eq!(later.last(), first.first());
}

#[test]
fn a_character_spread_over_tokens_appears_with_its_last_byte() {
    let tokens = tokenizer().encode("a🜁b").unwrap();
    let mut decoder = tokenizer().decoder();
    let parts: Vec<String> = tokens.iter().map(|&t| decoder.push(t)).collect();
    assert_eq!(parts, ["a", "", "", "", "🜁", "b"]);
    assert_eq!(decoder.finish(), "");
}

#[test]
fn cut_characters_and_stray_bytes_decode_to_replacement_characters() {
    let t = tokenizer();
    let tokens = t.encode("🜁").unwrap();
    assert_eq!(t.decode(&tokens[..tokens.len() - 1]), "\u{fffd}");
    assert_eq!(
        t.decode(&[t.bytes[0xff], t.bytes[b'x' as usize], t.bytes[0xe2], t.bos()]),
        "\u{fffd}x\u{fffd}"
    );
    assert_eq!(t.decode(&[u32::MAX, t.bytes[b'y' as usize]]), "y");
}

#[test]
fn borders_give_no_text_and_a_continuation_keeps_its_space() {
    let t = tokenizer();
    let word = t.encode("fn").unwrap();
    let stream = [&[t.bos()], &word[..], &[t.eos(), t.bos()], &word, &[t.eos()]].concat();
    assert_eq!(t.decode(&stream), "fnfn");
    assert_eq!(t.decoder_within().push(word[0]), " fn");
}

#[test]
fn a_continuation_begins_with_the_first_token_that_has_any_of_it() {
    let t = tokenizer();
    let split = |text: &str, continuation: &str| {
        let (tokens, before) = t.encode_split(text, continuation).unwrap();
        assert_eq!(tokens, t.encode(&format!("{text}{continuation}")).unwrap());
        (t.decode(&tokens[..before]), tokens.len() - before)
    };
    let both = t.encode("let fn").unwrap().len();
    assert_eq!(split("let", " fn"), ("let".into(), 1));
    // The space is the text's, but its token has the word, too.
    assert_eq!(split("let ", "fn"), ("let".into(), 1));
    assert_eq!(split("let f", "n"), ("let".into(), 1));
    assert_eq!(split("", "let fn"), (String::new(), both));
    // Where nothing is before it, even the dummy prefix is the continuation's.
    assert_eq!(split("", "1"), (String::new(), t.encode("1").unwrap().len()));
    assert_eq!(split("let fn", ""), ("let fn".into(), 0));
    // A character of four tokens, on either side.
    assert_eq!(split("a🜁", "b"), ("a🜁".into(), 1));
    assert_eq!(split("a", "🜁"), ("a".into(), 4));
    assert_eq!(split("a▁", "▁b"), ("a▁".into(), 4));
}

proptest! {
    #[test]
    fn what_is_before_a_continuation_is_all_that_has_nothing_of_it(
        text in "[ \n▁a-z0-9(){}é🦀]{0,20}", continuation in "[ \n▁a-z0-9(){}é🦀]{1,20}",
    ) {
        for tokenizer in [tokenizer(), &load(&whole()).unwrap()] {
            let (tokens, before) = tokenizer.encode_split(&text, &continuation).unwrap();
            let known = tokenizer.decode(&tokens[..before]);
            prop_assert!(text.starts_with(&known), "{known:?} {text:?}");
            let more = tokenizer.decode(&tokens[..=before]);
            prop_assert!(!text.starts_with(&more) || text.is_empty(), "{more:?} {text:?}");
        }
    }
}

#[test]
fn a_metaspace_file_is_llamas_too() {
    let json = variant(|v| {
        v["normalizer"] = Value::Null;
        v["pre_tokenizer"] =
            json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false});
    });
    let tokenizer = load(&json).unwrap();
    assert_eq!(tokenizer.encode(CODE).unwrap(), load(&whole()).unwrap().encode(CODE).unwrap());
}

#[test]
fn files_that_would_lose_text_or_are_no_tokenizers_are_refused_with_the_reason() {
    let reason = |json: &[u8]| load(json).unwrap_err().to_string();
    assert!(reason(b"{}").contains("not a tokenizer.json"));
    assert!(reason(b"\xff").contains("not a tokenizer.json"));
    assert!(reason(&variant(|v| v["model"]["byte_fallback"] = false.into())).contains("byte fallback"));
    assert!(reason(&variant(|v| v["normalizer"] = json!({"type": "Lowercase"}))).contains("Llama 2"));
    assert!(
        reason(&variant(|v| v["pre_tokenizer"] = json!({"type": "BertPreTokenizer"}))).contains("Llama 2")
    );
    let no_border = variant(|v| {
        v["added_tokens"] = json!([]);
        let vocab = v["model"]["vocab"].as_object_mut().unwrap();
        let id = vocab.remove("</s>").unwrap();
        vocab.insert("<end>".into(), id);
    });
    assert!(reason(&no_border).contains("</s>"));
    let far = variant(|v| v["model"]["vocab"]["far away"] = u32::MAX.into());
    assert!(reason(&far).contains("far away"), "{}", reason(&far));
    assert!(Tokenizer::load(Path::new("/no/such.json")).unwrap_err().to_string().contains("/no/such.json"));
}

#[test]
fn a_vocabulary_that_cannot_hold_the_bytes_is_refused() {
    let error = train(Sample::new(1), LEAST_VOCAB - 1, Path::new("x"), &()).unwrap_err();
    assert!(error.to_string().contains("259") && error.to_string().contains("260"), "{error}");
}
