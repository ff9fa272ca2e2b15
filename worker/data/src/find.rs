//! From what the user named to a sorted list of files.
//!
//! The list decides the order of documents in the token stream, so it depends on names alone:
//! paths in the order given, files below each sorted by path, whatever order the file system
//! lists them in. What a directory happens to contain is chosen by extension; what the user
//! names is taken as it is, and an error if it cannot be used.

use crate::cargo_lock;
use crate::error::{Action, DataError, EmptyReason};
use caravan_types::Digest;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Extensions that are read in a directory unless the request names others: prose, markup,
/// and the source code of common languages.
pub const TEXT_EXTENSIONS: &[&str] = &[
    "txt", "text", "md", "markdown", "rst", "adoc", "org", "tex", "html", "htm", "xml", "rs", "py", "pyi",
    "js", "mjs", "jsx", "ts", "tsx", "java", "kt", "scala", "go", "c", "h", "cc", "cpp", "cxx", "hpp", "cu",
    "cuh", "cs", "swift", "rb", "php", "pl", "lua", "r", "jl", "hs", "ml", "mli", "ex", "exs", "erl", "clj",
    "lisp", "el", "zig", "nim", "sh", "bash", "sql", "css", "scss", "toml", "yaml", "yml", "ini", "cfg",
    "cmake", "proto", "jsonl", "ndjson", "parquet",
];

/// Of [`TEXT_EXTENSIONS`], those of prose: long lines and long files are natural there.
pub(crate) const PROSE_EXTENSIONS: &[&str] =
    &["txt", "text", "md", "markdown", "rst", "adoc", "org", "tex", "html", "htm"];

/// What to prepare. The seed is not here: it orders the prepared windows, it does not change them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Directories, text files, JSONL or Parquet files, or `cargo:PATH/Cargo.lock` for the
    /// Rust sources of the crates in that lock file.
    pub paths: Vec<PathBuf>,
    /// Extensions (without the dot) to read in directories; [`TEXT_EXTENSIONS`] if `None`.
    pub extensions: Option<Vec<String>>,
    /// Size of the vocabulary: of the tokenizer to train, and the bound of every token.
    pub vocab_size: u32,
    /// A `tokenizer.json` to use instead of training one.
    pub tokenizer: Option<PathBuf>,
}

/// How a file's bytes become documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The whole file is one document.
    Text,
    /// A record a line.
    Jsonl,
    /// A record a row.
    Parquet,
}

impl Kind {
    fn of(path: &Path) -> Self {
        match extension(path).as_deref() {
            Some("jsonl" | "ndjson") => Self::Jsonl,
            Some("parquet") => Self::Parquet,
            _ => Self::Text,
        }
    }
}

/// A file to read.
#[derive(Clone, Debug)]
pub(crate) struct InputFile {
    /// Where it is.
    pub path: PathBuf,
    /// What it is called in the table of sources; for a crate's file without the registry's folder.
    pub name: String,
    /// How to read it.
    pub kind: Kind,
    /// Named by the user, so that it must be used or refused, never skipped.
    pub named: bool,
    /// Bytes.
    pub size: u64,
    /// Last change, nanoseconds since 1970.
    pub modified_ns: i128,
}

impl InputFile {
    pub(crate) fn is_prose(&self) -> bool {
        extension(&self.path).is_some_and(|e| PROSE_EXTENSIONS.contains(&e.as_str()))
    }

    fn new(path: PathBuf, name: String, named: bool, meta: &fs::Metadata) -> Self {
        let modified_ns = i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec());
        Self { kind: Kind::of(&path), size: meta.len(), path, name, named, modified_ns }
    }
}

fn extension(path: &Path) -> Option<String> {
    Some(path.extension()?.to_str()?.to_ascii_lowercase())
}

/// All files that `request` means, in the order of the token stream.
pub(crate) fn find(request: &Request, cargo_home: Option<&Path>) -> Result<Vec<InputFile>, DataError> {
    if request.paths.is_empty() {
        return Err(DataError::NoPaths);
    }
    let extensions: Vec<String> = match &request.extensions {
        Some(given) => given.iter().map(|e| e.trim_start_matches('.').to_ascii_lowercase()).collect(),
        None => TEXT_EXTENSIONS.iter().map(|e| (*e).to_owned()).collect(),
    };
    let mut files = Vec::new();
    for path in &request.paths {
        match path.to_str().and_then(|p| p.strip_prefix("cargo:")) {
            Some(lock) => cargo_lock::find(Path::new(lock), cargo_home, &mut files)?,
            None => find_path(path, &extensions, &mut files)?,
        }
    }
    Ok(files)
}

fn find_path(path: &Path, extensions: &[String], files: &mut Vec<InputFile>) -> Result<(), DataError> {
    let meta = match fs::metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(DataError::Missing { path: path.to_owned() });
        }
        Err(e) => return Err(DataError::io(Action::Find, path)(e)),
    };
    let empty = |why| Err(DataError::Empty { path: path.to_owned(), why });
    if meta.is_dir() {
        let before = files.len();
        walk(path, &path.display().to_string(), extensions, files)?;
        if files.len() == before {
            return empty(EmptyReason::Directory(extensions.to_vec()));
        }
    } else if !meta.is_file() {
        return empty(EmptyReason::Special);
    } else if meta.len() == 0 {
        return empty(EmptyReason::File);
    } else {
        files.push(InputFile::new(path.to_owned(), path.display().to_string(), true, &meta));
    }
    Ok(())
}

/// Adds the non-empty files of the wanted extensions below `root`, sorted by path. Their names
/// begin with `name`. Hidden entries and folders marked as caches (<https://bford.info/cachedir/>,
/// Cargo's `target` for one) are left out, and so are links to folders: they may form a circle.
pub(crate) fn walk(
    root: &Path,
    name: &str,
    extensions: &[String],
    files: &mut Vec<InputFile>,
) -> Result<(), DataError> {
    let first = files.len();
    let mut folders = vec![(root.to_owned(), name.trim_end_matches('/').to_owned())];
    while let Some((folder, folder_name)) = folders.pop() {
        let listing = fs::read_dir(&folder).map_err(DataError::io(Action::Find, &folder))?;
        for entry in listing {
            let entry = entry.map_err(DataError::io(Action::Find, &folder))?;
            let (path, file_name) = (entry.path(), entry.file_name());
            let file_name = file_name.to_string_lossy();
            if file_name.starts_with('.') {
                continue;
            }
            let name = format!("{folder_name}/{file_name}");
            let kind = entry.file_type().map_err(DataError::io(Action::Find, &path))?;
            if kind.is_dir() {
                if !path.join("CACHEDIR.TAG").exists() {
                    folders.push((path, name));
                }
            } else if extension(&path).is_some_and(|e| extensions.contains(&e)) {
                match fs::metadata(&path) {
                    Ok(meta) if meta.is_file() && meta.len() > 0 => {
                        files.push(InputFile::new(path, name, false, &meta));
                    }
                    Ok(_) => {}
                    // A dangling link names no file.
                    Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                    Err(e) => return Err(DataError::io(Action::Find, &path)(e)),
                }
            }
        }
    }
    files[first..].sort_by(|a, b| a.path.cmp(&b.path));
    Ok(())
}

/// Changes whenever a file of the list was added, removed, resized or touched.
pub(crate) fn fingerprint(files: &[InputFile]) -> Digest {
    let mut hasher = blake3::Hasher::new();
    for file in files {
        let path = file.path.as_os_str().as_encoded_bytes();
        hasher.update(&(path.len() as u64).to_le_bytes()).update(path);
        hasher.update(&file.size.to_le_bytes()).update(&file.modified_ns.to_le_bytes());
    }
    Digest(*hasher.finalize().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(path: &Path) -> Request {
        Request { paths: vec![path.to_owned()], extensions: None, vocab_size: 300, tokenizer: None }
    }

    fn names(files: &[InputFile], root: &Path) -> Vec<String> {
        files.iter().map(|f| f.path.strip_prefix(root).unwrap().display().to_string()).collect()
    }

    #[test]
    fn files_come_sorted_and_hidden_cached_empty_and_foreign_ones_stay_out() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        for sub in ["b", "a/deep", ".git", "target"] {
            fs::create_dir_all(root.join(sub)).unwrap();
        }
        for file in ["z.rs", "b/m.txt", "a/deep/x.py", "a.rs", ".hidden.rs", ".git/c.rs", "image.png"] {
            fs::write(root.join(file), "text").unwrap();
        }
        fs::write(root.join("target/CACHEDIR.TAG"), "Signature: 8a477f597d28d172789f06886806bc55").unwrap();
        fs::write(root.join("target/gen.rs"), "text").unwrap();
        fs::write(root.join("empty.rs"), "").unwrap();
        std::os::unix::fs::symlink(root, root.join("circle")).unwrap();
        std::os::unix::fs::symlink("nowhere", root.join("dangling.rs")).unwrap();
        let files = find(&request(root), None).unwrap();
        assert_eq!(names(&files, root), ["a/deep/x.py", "a.rs", "b/m.txt", "z.rs"]);

        let only = Request { extensions: Some(vec![".RS".into()]), ..request(root) };
        assert_eq!(names(&find(&only, None).unwrap(), root), ["a.rs", "z.rs"]);
    }

    #[test]
    fn a_missing_an_empty_and_no_path_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("nothing-here");
        let text = find(&request(&missing), None).unwrap_err().to_string();
        assert!(text.contains("nothing-here") && text.contains("no such file"), "{text}");
        let text = find(&request(dir.path()), None).unwrap_err().to_string();
        assert!(text.contains("no non-empty file") && text.contains(".rs"), "{text}");
        let file = dir.path().join("empty.txt");
        fs::write(&file, "").unwrap();
        let text = find(&request(&file), None).unwrap_err().to_string();
        assert!(text.contains("empty.txt") && text.contains("the file is empty"), "{text}");
        let none = Request { paths: vec![], ..request(&file) };
        assert!(matches!(find(&none, None), Err(DataError::NoPaths)));
    }

    #[test]
    fn the_fingerprint_follows_size_time_and_name() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a.rs"), "one").unwrap();
        let before = fingerprint(&find(&request(dir.path()), None).unwrap());
        assert_eq!(before, fingerprint(&find(&request(dir.path()), None).unwrap()));
        fs::write(dir.path().join("b.rs"), "two").unwrap();
        let more = fingerprint(&find(&request(dir.path()), None).unwrap());
        assert_ne!(before, more);
        let file = fs::File::options().write(true).open(dir.path().join("a.rs")).unwrap();
        file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        assert_ne!(more, fingerprint(&find(&request(dir.path()), None).unwrap()));
    }
}
