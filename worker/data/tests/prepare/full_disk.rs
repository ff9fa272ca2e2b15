//! A disk that fills up while shards are written.
//!
//! A limit on the size of files stands in for it: it needs no privilege, hits the same writes,
//! and the error takes the same way. It can only be set from outside, so the test runs itself
//! again under a shell that sets it. A device that is really full is tested beside the writer.

use caravan_data::{Origin, Request, prepare};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const FOLDER: &str = "CARAVAN_TEST_FULL_DISK";

fn request(dir: &Path) -> Request {
    Request { paths: vec![dir.join("data.jsonl")], extensions: None, vocab_size: 512, tokenizer: None }
}

#[test]
fn a_full_disk_names_the_file_and_leaves_nothing_that_looks_finished() {
    if let Some(dir) = std::env::var_os(FOLDER).map(PathBuf::from) {
        let error = prepare(&request(&dir), &dir.join("cache"), &()).unwrap_err();
        fs::write(dir.join("error"), error.to_string()).unwrap();
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    // 400 KB of tokens against a limit of 64 or 128 KB (shells count in blocks of 512 or 1024).
    let lines: Vec<_> =
        (0..1000).map(|i| format!("{{\"tokens\": {:?}}}\n", vec![3 + i % 500; 200 + i])).collect();
    fs::write(dir.path().join("data.jsonl"), lines.concat()).unwrap();
    let status = Command::new("sh")
        .args(["-c", "trap '' XFSZ; ulimit -f 128; exec \"$0\" --exact \"$1\""])
        .arg(std::env::current_exe().unwrap())
        .arg("full_disk::a_full_disk_names_the_file_and_leaves_nothing_that_looks_finished")
        .env(FOLDER, dir.path())
        .stdout(std::process::Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());
    let error = fs::read_to_string(dir.path().join("error")).unwrap();
    assert!(error.contains("tokens-00000.bin") && error.contains("free some space"), "{error}");
    let left: Vec<_> =
        fs::read_dir(dir.path().join("cache")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| name == "lock" || name == "requests"), "{left:?}");
    assert_eq!(fs::read_dir(dir.path().join("cache/requests")).unwrap().count(), 0);
    // With room, the same command goes through.
    assert_eq!(prepare(&request(dir.path()), &dir.path().join("cache"), &()).unwrap().origin, Origin::Fresh);
}
