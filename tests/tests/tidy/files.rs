//! The files of the repository: what git tracks, and what it would if it were added.

use std::path::Path;
use std::process::Command;

/// One text file.
pub struct File {
    /// From the root of the repository.
    pub path: String,
    /// What it says.
    pub text: String,
    /// Its size on disk.
    pub bytes: u64,
}

impl File {
    /// The part of the path after the last dot; empty where there is none.
    pub fn extension(&self) -> &str {
        self.name().rsplit_once('.').map_or("", |(_, extension)| extension)
    }

    /// The last part of the path.
    pub fn name(&self) -> &str {
        self.path.rsplit_once('/').map_or(&self.path, |(_, name)| name)
    }

    /// The folder that it lies in; empty for the root.
    pub fn folder(&self) -> &str {
        self.path.rsplit_once('/').map_or("", |(folder, _)| folder)
    }

    /// Whether somebody else wrote it: vendored libraries, licence texts, generated locks.
    pub fn foreign(&self) -> bool {
        self.path.contains("/vendor/") || ["LICENSE", "Cargo.lock"].contains(&self.name())
    }

    /// Whether it lies below a folder of the repository, or is that file.
    pub fn below(&self, place: &str) -> bool {
        self.path.strip_prefix(place).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }

    /// Rust code without its comments: line numbers from 1, and lines.
    pub fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        let lines = self.text.lines().zip(1..);
        lines.filter(|(line, _)| !line.trim_start().starts_with("//")).map(|(line, number)| {
            let end = line.find(" // ").unwrap_or(line.len());
            (number, &line[..end])
        })
    }

    /// Lines before the test module, if there is one.
    pub fn lines_without_tests(&self) -> usize {
        let lines: Vec<&str> = self.text.lines().collect();
        let tests = lines.windows(2).position(|pair| pair[0] == "#[cfg(test)]" && pair[1].ends_with('{'));
        tests.unwrap_or(lines.len())
    }
}

/// Whether a line has a word, not as a part of a longer one.
pub fn has_word(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| {
        let inner = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
        !inner(line[..at].chars().next_back()) && !inner(line[at + word.len()..].chars().next())
    })
}

/// All files of the repository that git does not ignore; of binary ones, none is text.
pub fn files() -> Vec<File> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut git = Command::new("git");
    git.args(["ls-files", "--cached", "--others", "--exclude-standard", "-z"]).current_dir(root);
    let listed = git.output().expect("tidy asks git which files there are");
    assert!(listed.status.success(), "{}", String::from_utf8_lossy(&listed.stderr));
    let paths = String::from_utf8(listed.stdout).unwrap();
    let read = |path: &str| {
        // A file that was removed and not yet committed is listed, and is not there.
        let content = std::fs::read(root.join(path)).ok()?;
        let text = String::from_utf8(content.clone()).unwrap_or_default();
        Some(File { path: path.to_owned(), text, bytes: content.len() as u64 })
    };
    let mut files: Vec<File> = paths.split_terminator('\0').filter_map(read).collect();
    files.sort_by(|a, b| a.path.cmp(&b.path));
    assert!(files.iter().any(|file| file.path == "Cargo.toml"), "git listed another repository");
    files
}
