//! Parquet files as other programs write them.

use ::parquet::basic::Compression;
use ::parquet::data_type::{ByteArray, ByteArrayType, Int32Type};
use ::parquet::file::properties::WriterProperties;
use ::parquet::file::writer::{SerializedColumnWriter, SerializedFileWriter};
use ::parquet::schema::parser::parse_message_type;
use caravan_data::{Dataset, Request, prepare};
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

/// Writes a file of two row groups; `column` fills the n-th column of a group.
fn write(
    path: &Path,
    schema: &str,
    compression: Compression,
    column: impl Fn(usize, usize, &mut SerializedColumnWriter<'_>),
) {
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let properties = Arc::new(WriterProperties::builder().set_compression(compression).build());
    let mut writer = SerializedFileWriter::new(File::create(path).unwrap(), schema, properties).unwrap();
    for group in 0..2 {
        let mut rows = writer.next_row_group().unwrap();
        let mut number = 0;
        while let Some(mut out) = rows.next_column().unwrap() {
            column(group, number, &mut out);
            out.close().unwrap();
            number += 1;
        }
        rows.close().unwrap();
    }
    writer.close().unwrap();
}

fn open(path: &Path) -> Result<Dataset, String> {
    let request =
        Request { paths: vec![path.to_owned()], extensions: None, vocab_size: 512, tokenizer: None };
    let prepared = prepare(&request, &path.with_file_name("cache"), &()).map_err(|e| e.to_string())?;
    Dataset::open(&prepared.dir).map_err(|e| e.to_string())
}

fn tokens(data: &Dataset) -> Vec<u32> {
    let mut out = vec![0; data.tokens() as usize];
    data.read(0, &mut out).unwrap();
    out
}

#[test]
fn the_text_column_is_read_in_every_codec_and_nulls_are_passed_over() {
    let schema = "message m { required int32 id; optional binary text (UTF8); }";
    for compression in [Compression::UNCOMPRESSED, Compression::SNAPPY, Compression::ZSTD(Default::default())]
    {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data.parquet");
        write(&path, schema, compression, |group, number, out| {
            if number == 0 {
                out.typed::<Int32Type>().write_batch(&[1, 2, 3], None, None).unwrap();
            } else {
                let texts = [format!("first {group}"), format!("third {group}")];
                let texts = texts.map(|t| ByteArray::from(t.into_bytes()));
                out.typed::<ByteArrayType>().write_batch(&texts, Some(&[1, 0, 1]), None).unwrap();
            }
        });
        let data = open(&path).unwrap();
        assert_eq!(data.tokenizer().unwrap().decode(&tokens(&data)), "first 0third 0first 1third 1");
        assert_eq!((0..4).map(|d| data.document(d).unwrap().row).collect::<Vec<_>>(), [1, 3, 4, 6]);
    }
}

#[test]
fn a_list_of_tokens_is_read_and_checked_against_the_vocabulary() {
    let schema =
        "message m { required group tokens (LIST) { repeated group list { required int32 element; } } }";
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data.parquet");
    let write_tokens = |last: i32| {
        write(&path, schema, Compression::SNAPPY, |group, _, out| {
            let values = [5, 6, 7, if group == 1 { last } else { 8 }];
            out.typed::<Int32Type>().write_batch(&values, Some(&[1; 4]), Some(&[0, 1, 0, 1])).unwrap();
        });
    };
    write_tokens(9);
    assert_eq!(tokens(&open(&path).unwrap()), [1, 5, 6, 2, 1, 7, 8, 2, 1, 7, 9, 2]);
    write_tokens(512);
    let text = open(&path).unwrap_err();
    assert!(text.contains("data.parquet, record 4: token 512"), "{text}");
    write_tokens(-1);
    assert!(open(&path).unwrap_err().contains("record 4"));
}

#[test]
fn a_file_without_either_column_or_with_another_type_says_what_it_has() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data.parquet");
    let numbers = |_: usize, _: usize, out: &mut SerializedColumnWriter<'_>| {
        out.typed::<Int32Type>().write_batch(&[1], None, None).unwrap();
    };
    write(&path, "message m { required int32 id; }", Compression::SNAPPY, numbers);
    let text = open(&path).unwrap_err();
    assert!(text.contains("no column `text` or `tokens`, only id"), "{text}");
    write(&path, "message m { required int32 text; }", Compression::SNAPPY, numbers);
    let text = open(&path).unwrap_err();
    assert!(text.contains("record 1") && text.contains("holds 1"), "{text}");
    // Cut off: the footer is gone.
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    assert!(open(&path).unwrap_err().contains("cannot be read as Parquet"));
}
