//! A store in one file: an append-only log of checksummed lines.
//!
//! A line is `checksum record`: eight hexadecimal digits of CRC-32C over the rest, and the record
//! as JSON (which has no line breaks inside), so that it can be read with any pager. The first
//! line names the format. A line without its line break at the very end of the file is what a
//! crash in the middle of an append leaves: nobody was told of it, so it is dropped, aloud.
//! Anything else that does not fit its checksum was durable once, and is refused: to guess there
//! could give a generation twice.
//!
//! Every opening, and every append that makes the log long, writes the few records that are left
//! of it aside and renames them over it, which bounds its length and clears a torn end away.

use super::{Damage, State, Store, StoreError};
use caravan_coordinator_core::Record;
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Version of the log's format; a reader refuses any other.
pub const FORMAT: u32 = 5;

/// The log is compacted when it is longer: a few hundred plans of a small caravan, and read back
/// in a moment. A plan that is this long itself is given the room of two.
const COMPACT_ABOVE: u64 = 4 << 20;

const LOG: &str = "store.log";
const ASIDE: &str = "store.log.new";
const LOCK: &str = "store.lock";

/// The first line.
#[derive(Serialize, Deserialize)]
struct Header {
    caravan_store: u32,
}

/// The embedded store: a folder with a log and a lock.
#[derive(Debug)]
pub struct FileStore {
    folder: PathBuf,
    path: PathBuf,
    log: Arc<File>,
    /// What the log adds up to.
    state: State,
    /// Length of the log.
    bytes: u64,
    /// The length at which it is compacted.
    compact_at: u64,
    /// Held as long as the store is open; the system lets go of it when the process ends.
    _lock: File,
}

impl FileStore {
    /// Opens the store in `folder`, making an empty one where there is none, and says what it
    /// adds up to. Blocks on the disk.
    ///
    /// # Errors
    /// Where the folder cannot be used, another process uses it, or the log is damaged.
    pub fn open(folder: &Path) -> Result<(Self, State), StoreError> {
        fs::create_dir_all(folder).map_err(io_error("create the folder", folder))?;
        let lock = lock(folder)?;
        let path = folder.join(LOG);
        let state = match fs::read(&path) {
            Ok(bytes) => read(&path, &bytes)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => State::default(),
            Err(e) => return Err(io_error("read", &path)(e)),
        };
        let (log, bytes) = compact(folder, &state)?;
        let (folder, log) = (folder.to_path_buf(), Arc::new(log));
        let compact_at = COMPACT_ABOVE.max(2 * bytes);
        let store = Self { folder, path, log, state: state.clone(), bytes, compact_at, _lock: lock };
        Ok((store, state))
    }

    async fn compact(&mut self) -> Result<(), StoreError> {
        let (folder, state) = (self.folder.clone(), self.state.clone());
        let compacted = tokio::task::spawn_blocking(move || compact(&folder, &state)).await;
        let failed = |e| io_error("compact", &self.path)(io::Error::other(e));
        let (log, bytes) = compacted.map_err(failed)??;
        (self.log, self.bytes) = (Arc::new(log), bytes);
        self.compact_at = self.compact_at.max(2 * bytes);
        Ok(())
    }
}

impl Store for FileStore {
    async fn append(&mut self, records: &[Record]) -> Result<(), StoreError> {
        let lines = lines(records).map_err(io_error("write to", &self.path))?;
        let (log, length) = (Arc::clone(&self.log), lines.len() as u64);
        let write = move || (&*log).write_all(&lines).and_then(|()| log.sync_data());
        let written = tokio::task::spawn_blocking(write).await;
        written.unwrap_or_else(|e| Err(io::Error::other(e))).map_err(io_error("write to", &self.path))?;
        records.iter().for_each(|record| self.state.add(record.clone()));
        self.bytes += length;
        if self.bytes > self.compact_at { self.compact().await } else { Ok(()) }
    }
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.to_path_buf();
    move |source| StoreError::Io { action, path, source }
}

/// Takes the folder for this process. The lock is a file of its own because the log is replaced
/// by a rename, which would leave a lock on the file that is gone.
fn lock(folder: &Path) -> Result<File, StoreError> {
    let path = folder.join(LOCK);
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
    let file = file.map_err(io_error("open", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(StoreError::InUse { path: folder.to_path_buf() }),
        Err(TryLockError::Error(e)) => Err(io_error("lock", &path)(e)),
    }
}

/// Adds up a log.
fn read(path: &Path, bytes: &[u8]) -> Result<State, StoreError> {
    let damaged = |offset, what| StoreError::Damaged { path: path.to_path_buf(), offset, what };
    let mut state = State::default();
    let mut offset = 0;
    for (number, line) in bytes.split_inclusive(|&b| b == b'\n').enumerate() {
        let whole = line.strip_suffix(b"\n");
        let Some(text) = checked(whole.unwrap_or(line)) else {
            if whole.is_none() && number > 0 {
                tracing::warn!(
                    file = %path.display(), offset, bytes = line.len(),
                    "the store ends in a record that was not written to its end (a crash, or a full disk); nobody \
                     was told of it, it is dropped"
                );
                break;
            }
            return Err(damaged(offset, if number == 0 { Damage::Header } else { Damage::Checksum }));
        };
        if number == 0 {
            let header: Header = serde_json::from_slice(text).map_err(|_| damaged(offset, Damage::Header))?;
            if header.caravan_store != FORMAT {
                let path = path.to_path_buf();
                return Err(StoreError::Version { path, found: header.caravan_store, ours: FORMAT });
            }
        } else {
            state.add(serde_json::from_slice(text).map_err(|_| damaged(offset, Damage::Record))?);
        }
        offset += line.len() as u64;
    }
    if bytes.is_empty() { Err(damaged(0, Damage::Header)) } else { Ok(state) }
}

/// The text of a line whose checksum fits.
fn checked(line: &[u8]) -> Option<&[u8]> {
    let (sum, text) = line.split_at_checked(8)?;
    let text = text.strip_prefix(b" ")?;
    (sum == checksum(text).as_bytes()).then_some(text)
}

fn checksum(text: &[u8]) -> String {
    format!("{:08x}", crc32c::crc32c(text))
}

fn line(value: &impl Serialize) -> io::Result<Vec<u8>> {
    let text = serde_json::to_vec(value)?;
    Ok([checksum(&text).as_bytes(), b" ", &text, b"\n"].concat())
}

fn lines(records: &[Record]) -> io::Result<Vec<u8>> {
    Ok(records.iter().map(line).collect::<io::Result<Vec<_>>>()?.concat())
}

/// Replaces the log by the fewest records that say the same, and opens it, with its length. A
/// crash before the rename leaves the old log, one after it the new one.
fn compact(folder: &Path, state: &State) -> Result<(File, u64), StoreError> {
    let (aside, path) = (folder.join(ASIDE), folder.join(LOG));
    let write = || -> io::Result<(File, u64)> {
        let bytes = [line(&Header { caravan_store: FORMAT })?, lines(&state.records())?].concat();
        let mut file = File::create(&aside)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        Ok((file, bytes.len() as u64))
    };
    let written = write().map_err(io_error("write", &aside))?;
    fs::rename(&aside, &path).map_err(io_error("replace", &path))?;
    let synced = File::open(folder).and_then(|f| f.sync_all());
    synced.map_err(io_error("make durable", folder))?;
    Ok(written)
}

#[cfg(test)]
mod tests {
    use super::*;
    use caravan_types::{Generation, Plan, Step, Verdict};
    use std::sync::Arc;

    fn plan(generation: u64) -> Arc<Plan> {
        Arc::new(Plan {
            generation: Generation(generation),
            base: Step(7),
            verdict: Some(Verdict::Update { norm: 0.1 }),
            recompute: false,
            members: vec![],
            pipelines: vec![],
            owners: vec![],
            transfers: vec![],
            idle: vec![],
            disputes: vec![],
        })
    }

    fn some_records() -> Vec<Record> {
        vec![
            Record::Worker(3),
            Record::Generation(Generation(5)),
            Record::Plan(plan(5)),
            Record::Checkpoint(Step(40)),
        ]
    }

    fn some_state() -> State {
        State { generation: Generation(5), next_worker: 3, plan: Some(plan(5)), checkpoint: Some(Step(40)) }
    }

    /// A closed store with [`some_records`] in it, and its log's path.
    async fn filled() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let (mut store, state) = FileStore::open(dir.path()).unwrap();
        assert_eq!(state, State::default());
        for record in some_records() {
            store.append(&[record]).await.unwrap();
        }
        let path = dir.path().join(LOG);
        (dir, path)
    }

    #[tokio::test]
    async fn what_was_appended_is_there_after_every_opening() {
        let (dir, path) = filled().await;
        for _ in 0..3 {
            let (_, state) = FileStore::open(dir.path()).unwrap();
            assert_eq!(state, some_state());
        }
        assert_eq!(fs::read_to_string(path).unwrap().lines().count(), 5, "compacted: a header, four records");
    }

    #[tokio::test]
    async fn a_long_log_is_compacted_while_it_is_used() {
        let dir = tempfile::tempdir().unwrap();
        let (mut store, _) = FileStore::open(dir.path()).unwrap();
        store.compact_at = 1000;
        for generation in 1..=100 {
            let records = [Record::Generation(Generation(generation)), Record::Plan(plan(generation))];
            store.append(&records).await.unwrap();
            assert_eq!(fs::metadata(dir.path().join(LOG)).unwrap().len(), store.bytes);
            assert!(store.bytes <= 1000);
        }
        drop(store);
        let (_, state) = FileStore::open(dir.path()).unwrap();
        assert_eq!(state, State { generation: Generation(100), plan: Some(plan(100)), ..State::default() });
    }

    #[tokio::test]
    async fn a_torn_end_is_dropped_at_every_length_and_the_rest_is_kept() {
        let (dir, path) = filled().await;
        let whole = fs::read(&path).unwrap();
        let last = line(&some_records()[3]).unwrap().len();
        for missing in 2..last {
            fs::write(&path, &whole[..whole.len() - missing]).unwrap();
            let (_, state) = FileStore::open(dir.path()).unwrap();
            assert_eq!(state, State { checkpoint: None, ..some_state() }, "{missing} bytes missing");
        }
        fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        let (_, state) = FileStore::open(dir.path()).unwrap();
        assert_eq!(state, some_state(), "only the line break is missing: the record is whole");
    }

    #[tokio::test]
    async fn a_flipped_bit_anywhere_before_the_last_line_break_is_refused_with_its_place() {
        let (dir, path) = filled().await;
        let whole = fs::read(&path).unwrap();
        for at in 0..whole.len() - 1 {
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << (at % 7);
            fs::write(&path, &bytes).unwrap();
            let error = FileStore::open(dir.path()).unwrap_err();
            let line_start = whole[..at].iter().rposition(|&b| b == b'\n').map_or(0, |i| i + 1) as u64;
            match &error {
                StoreError::Damaged { offset, .. } => {
                    assert_eq!(*offset, line_start, "flip at {at}: {error}")
                }
                other => panic!("flip at {at}: {other}"),
            }
            assert_eq!(fs::read(&path).unwrap(), bytes, "a refused store is left as it was");
        }
    }

    #[test]
    fn rubbish_an_empty_file_and_another_version_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(LOG);
        for rubbish in [&b""[..], b"\n", b"hello\n", b"hello", &[0; 100], &[0xff; 100]] {
            fs::write(&path, rubbish).unwrap();
            let error = FileStore::open(dir.path()).unwrap_err();
            assert!(matches!(error, StoreError::Damaged { offset: 0, what: Damage::Header, .. }), "{error}");
        }
        fs::write(&path, line(&Header { caravan_store: 9 }).unwrap()).unwrap();
        let error = FileStore::open(dir.path()).unwrap_err();
        assert!(error.to_string().contains("has store format 9, this program reads 5"), "{error}");
    }

    #[test]
    fn a_valid_line_that_is_no_record_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let header = line(&Header { caravan_store: FORMAT }).unwrap();
        fs::write(dir.path().join(LOG), [&header[..], &line(&"surprise").unwrap()].concat()).unwrap();
        let error = FileStore::open(dir.path()).unwrap_err();
        assert!(matches!(error, StoreError::Damaged { what: Damage::Record, .. }), "{error}");
    }

    #[test]
    fn a_second_coordinator_on_one_folder_is_refused_until_the_first_one_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let first = FileStore::open(dir.path()).unwrap();
        let error = FileStore::open(dir.path()).unwrap_err();
        assert!(error.to_string().contains("in use by another coordinator"), "{error}");
        drop(first);
        FileStore::open(dir.path()).unwrap();
    }

    #[tokio::test]
    async fn a_full_disk_is_an_error_that_says_what_to_do() {
        let (dir, _) = filled().await;
        let (mut store, _) = FileStore::open(dir.path()).unwrap();
        // The device that is always full stands in for the log: the same system calls fail.
        store.log = Arc::new(OpenOptions::new().append(true).open("/dev/full").unwrap());
        let error = store.append(&some_records()).await.unwrap_err();
        assert!(error.to_string().contains("Free some space and start again"), "{error}");
        drop(store);
        let (_, state) = FileStore::open(dir.path()).unwrap();
        assert_eq!(state, some_state());
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        let error = FileStore::open(&dir.path().join("file/below")).unwrap_err();
        assert!(error.to_string().contains("cannot create the folder"), "{error}");
    }

    #[test]
    fn fencing_numbers_never_go_back() {
        let mut state = some_state();
        state.add(Record::Generation(Generation(2)));
        state.add(Record::Worker(1));
        state.add(Record::Plan(plan(9)));
        assert_eq!((state.generation, state.next_worker), (Generation(9), 3));
    }
}
