//! Files of lines that are only ever added to: reading them back, and what a crash leaves.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};

/// Longest line, in bytes. A step of a caravan of a hundred thousand members takes about 1 MiB;
/// a plan of a thousand members and half a million slices about 16 MiB.
pub(crate) const LONGEST: u64 = 64 << 20;

/// Reads a file line by line.
#[derive(Debug)]
pub(crate) struct Lines {
    reader: BufReader<File>,
    line: Vec<u8>,
    /// Where the next line starts.
    offset: u64,
    number: u64,
}

/// One line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RawLine<'a> {
    /// From 1.
    pub number: u64,
    /// Where it starts in the file.
    pub offset: u64,
    /// Without its line break.
    pub text: &'a [u8],
    /// Whether it has its line break: only the last line of a file can lack it.
    pub whole: bool,
}

impl Lines {
    /// Reads from the beginning.
    pub(crate) fn new(mut file: File) -> io::Result<Self> {
        file.seek(SeekFrom::Start(0))?;
        Ok(Self { reader: BufReader::new(file), line: Vec::new(), offset: 0, number: 0 })
    }

    /// Where the next line starts.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// The next line; none at the end. One that is longer than [`LONGEST`] is an error.
    pub(crate) fn next(&mut self) -> io::Result<Option<RawLine<'_>>> {
        self.line.clear();
        let offset = self.offset;
        let length = (&mut self.reader).take(LONGEST).read_until(b'\n', &mut self.line)? as u64;
        if length == 0 {
            return Ok(None);
        }
        let whole = self.line.last() == Some(&b'\n');
        self.number += 1;
        if !whole && length == LONGEST {
            let what = format!("line {} is longer than {LONGEST} bytes", self.number);
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        self.offset += length;
        let text = self.line.strip_suffix(b"\n").unwrap_or(&self.line);
        Ok(Some(RawLine { number: self.number, offset, text, whole }))
    }
}

/// Where the last whole line of a file ends, and how long the file is.
pub(crate) fn whole_end(file: &mut File) -> io::Result<(u64, u64)> {
    let length = file.seek(SeekFrom::End(0))?;
    let mut end = length;
    let mut block = vec![0; 1 << 16];
    while end > 0 {
        let start = end.saturating_sub(block.len() as u64);
        let part = &mut block[..(end - start) as usize];
        file.seek(SeekFrom::Start(start))?;
        file.read_exact(part)?;
        if let Some(at) = part.iter().rposition(|&byte| byte == b'\n') {
            return Ok((start + at as u64 + 1, length));
        }
        end = start;
    }
    Ok((0, length))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn lines_come_with_number_and_place_and_the_last_one_may_lack_its_end() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"one\n\nthree").unwrap();
        let mut lines = Lines::new(file.try_clone().unwrap()).unwrap();
        let mut read = Vec::new();
        while let Some(RawLine { number, offset, text, whole }) = lines.next().unwrap() {
            read.push((number, offset, String::from_utf8(text.to_vec()).unwrap(), whole));
        }
        assert_eq!(
            read,
            [(1, 0, "one".into(), true), (2, 4, String::new(), true), (3, 5, "three".into(), false)]
        );
    }

    #[test]
    fn the_end_of_the_last_whole_line_is_found_across_blocks_and_where_there_is_none() {
        for (before, after) in [(0, 0), (0, 10), (1, 0), (70_000, 5), (5, 70_000), (65_536, 65_536)] {
            let mut file = tempfile::tempfile().unwrap();
            let mut bytes = vec![b'x'; before];
            if let Some(last) = bytes.last_mut() {
                *last = b'\n';
            }
            bytes.extend(vec![b'y'; after]);
            file.write_all(&bytes).unwrap();
            assert_eq!(whole_end(&mut file).unwrap(), (before as u64, (before + after) as u64));
        }
    }
}
