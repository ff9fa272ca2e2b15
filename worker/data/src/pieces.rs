//! How text is cut before merging: no token reaches across a cut.
//!
//! The rule is Llama 2's in spirit (SentencePiece with split_digits, split_by_number,
//! split_by_unicode_script, split_by_whitespace, allow_whitespace_only_pieces): every digit
//! stands alone, words and symbols do not mix, a space belongs to the word after it, and runs
//! of white space, which carry the structure of source code, are pieces of their own.
//!
//! Character classes are plain ranges, not Unicode properties: two implementations that were
//! built against different Unicode versions would cut the same text differently, and tokens
//! would depend on the version of a library. The same table makes the scanner below, which is
//! fast, and the regular expression in `tokenizer.json`, by which other programs that read the
//! file cut in the same places. A test holds the two together.

/// The character that stands for a space in tokens: U+2581, as in SentencePiece.
pub(crate) const SPACE_MARK: char = '▁';

/// Characters beyond ASCII that are symbols rather than parts of words: punctuation, currency,
/// arrows, mathematics, box drawing, CJK and full-width punctuation, emoji. Latin-1 symbols
/// come first; the blocks 2000–2BFF are all symbols but for [`SPACE_MARK`].
const SYMBOLS: &[(char, char)] = &[
    ('\u{80}', '\u{bf}'),
    ('\u{d7}', '\u{d7}'),
    ('\u{f7}', '\u{f7}'),
    ('\u{2000}', '\u{2580}'),
    ('\u{2582}', '\u{2bff}'),
    ('\u{2e00}', '\u{2e7f}'),
    ('\u{3000}', '\u{303f}'),
    ('\u{fe10}', '\u{fe1f}'),
    ('\u{fe30}', '\u{fe6f}'),
    ('\u{ff00}', '\u{ff20}'),
    ('\u{ff3b}', '\u{ff40}'),
    ('\u{ff5b}', '\u{ff65}'),
    ('\u{1f000}', '\u{1faff}'),
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Digit,
    Word,
    Symbol,
    Space,
    /// [`SPACE_MARK`] itself, which no token can hold without being taken for a space.
    Mark,
}

fn class(c: char) -> Class {
    match c {
        '0'..='9' => Class::Digit,
        'a'..='z' | 'A'..='Z' => Class::Word,
        '\t'..='\r' | ' ' => Class::Space,
        SPACE_MARK => Class::Mark,
        _ if c.is_ascii() => Class::Symbol,
        _ if SYMBOLS.iter().any(|&(first, last)| (first..=last).contains(&c)) => Class::Symbol,
        _ => Class::Word,
    }
}

/// The rule as a regular expression over text whose spaces are [`SPACE_MARK`]s already.
pub(crate) fn pattern() -> String {
    use std::fmt::Write;
    let beyond = SYMBOLS.iter().fold(String::new(), |mut out, &(first, last)| {
        // Writing to a String cannot fail.
        let _ = write!(out, r"\x{{{:x}}}-\x{{{:x}}}", u32::from(first), u32::from(last));
        out
    });
    let ascii = r"\x00-\x08\x0e-\x1f!-/:-@\[-`\{-\x7f";
    format!("[0-9]|▁?[^0-9\\t-\\r▁{ascii}{beyond}]+|▁?[{ascii}{beyond}]+|[\\t-\\r▁]+")
}

/// Cuts `text` into pieces that together are `text`.
pub(crate) fn pieces(text: &str) -> Pieces<'_> {
    Pieces { rest: text }
}

/// Iterator over the pieces of a text.
pub(crate) struct Pieces<'a> {
    rest: &'a str,
}

impl<'a> Iterator for Pieces<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        let mut chars = self.rest.chars();
        let first = chars.next()?;
        let mut of = class(first);
        let mut end = first.len_utf8();
        if first == ' '
            && let Some(second) = chars.next()
            && matches!(class(second), Class::Word | Class::Symbol)
        {
            of = class(second);
            end += second.len_utf8();
        }
        if !matches!(of, Class::Digit | Class::Mark) {
            let more = &self.rest[end..];
            end += more.find(|c| class(c) != of).unwrap_or(more.len());
        }
        let (piece, rest) = self.rest.split_at(end);
        self.rest = rest;
        Some(piece)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
    use tokenizers::{
        OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, SplitDelimiterBehavior,
    };

    #[test]
    fn source_code_is_cut_into_words_symbols_digits_and_indentation() {
        let got: Vec<_> = pieces("fn f(x: u32) {\n    x + 10  // ünï“q”\n}").collect();
        let want = [
            "fn", " f", "(", "x", ":", " u", "3", "2", ")", " {", "\n    ", "x", " +", " ", "1", "0", "  ",
            "//", " ünï", "“", "q", "”", "\n", "}",
        ];
        assert_eq!(got, want);
    }

    fn by_pattern(text: &str) -> Vec<String> {
        let split =
            Split::new(SplitPattern::Regex(pattern()), SplitDelimiterBehavior::Isolated, false).unwrap();
        let mut cut = PreTokenizedString::from(text.replace(' ', "▁"));
        split.pre_tokenize(&mut cut).unwrap();
        cut.get_splits(OffsetReferential::Original, OffsetType::Byte)
            .into_iter()
            .map(|(piece, _, _)| piece.replace('▁', " "))
            .collect()
    }

    proptest! {
        #[test]
        fn the_scanner_and_the_pattern_cut_in_the_same_places(
            text in r"([ \t\n]{0,3}[a-z_0-9(){}:;.é漢。—🦀\u{301}\u{0}\u{7f}\u{85}\u{2580}]{0,4}|[^▁]){0,24}",
        ) {
            let text = text.replace('▁', "");
            let got: Vec<_> = pieces(&text).collect();
            prop_assert_eq!(got.concat(), text.clone());
            prop_assert_eq!(got, by_pattern(&text));
        }
    }
}
