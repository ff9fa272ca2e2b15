//! Prepared data, open for reading.

use crate::error::{Action, Damage, DataError};
use crate::filter::Report;
use crate::index::{Index, TOKENIZER};
use crate::records::{self, Reader};
use crate::shards::{DOCUMENT, DocumentEntry, ShardReader};
use crate::tokenizer::Tokenizer;
use caravan_types::{DataSpec, Digest};
use std::path::{Path, PathBuf};

/// A folder of prepared data: the token stream, its tokenizer, and where each document came from.
#[derive(Debug)]
pub struct Dataset {
    dir: PathBuf,
    index: Index,
    shards: ShardReader,
    documents: Reader,
    tokenizer: Option<Tokenizer>,
}

/// A document in the token stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DocumentPlace {
    /// Its number in the stream, from 0.
    pub number: u64,
    /// Position of its first token.
    pub first: u64,
    /// One past its last token.
    pub end: u64,
    /// The file that it came from.
    pub source: String,
    /// The line or row in that file, from 1; 0 where the file is one document.
    pub row: u64,
}

impl Dataset {
    /// Opens a folder that [`crate::prepare()`] has written. Checks the index against its seal
    /// and every file's length and header, and reads the tokenizer; [`Dataset::verify`] reads
    /// the rest.
    ///
    /// # Errors
    /// [`DataError::Damaged`] with the file's name, or [`DataError::Io`].
    pub fn open(dir: &Path) -> Result<Self, DataError> {
        let index = Index::read(dir)?;
        let shards = ShardReader::open(dir, &index.shards, index.vocab)?;
        let documents = Reader::open(dir, &index.documents, DOCUMENT)?;
        let tokenizer = index.tokenizer.map(|digest| open_tokenizer(dir, digest)).transpose()?;
        Ok(Self { dir: dir.to_owned(), index, shards, documents, tokenizer })
    }

    /// Reads every byte and compares it with the index.
    ///
    /// # Errors
    /// As [`Dataset::open`].
    pub fn verify(&self) -> Result<(), DataError> {
        self.shards.verify()?;
        self.documents.verify()?;
        match self.index.tokenizer {
            Some(digest) => records::verify(&self.dir.join(TOKENIZER), digest),
            None => Ok(()),
        }
    }

    /// What the run spec says about this data.
    #[must_use]
    pub fn spec(&self) -> DataSpec {
        self.index.spec()
    }

    /// The folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The tokenizer; none if the data came as ready tokens without one.
    #[must_use]
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.tokenizer.as_ref()
    }

    /// Every token is below this.
    #[must_use]
    pub fn vocab(&self) -> u32 {
        self.index.vocab
    }

    /// The token that begins every document.
    #[must_use]
    pub fn bos(&self) -> u32 {
        self.index.bos
    }

    /// The token that ends every document.
    #[must_use]
    pub fn eos(&self) -> u32 {
        self.index.eos
    }

    /// Tokens in the stream.
    #[must_use]
    pub fn tokens(&self) -> u64 {
        self.shards.tokens()
    }

    /// Documents in the stream.
    #[must_use]
    pub fn documents(&self) -> u64 {
        self.index.documents.records
    }

    /// What the preparation read and left out.
    #[must_use]
    pub fn report(&self) -> &Report {
        &self.index.report
    }

    /// Fills `out` with the tokens from position `first` on.
    ///
    /// # Errors
    /// If the range is not within the stream, a file cannot be read, or a token is outside the
    /// vocabulary.
    pub fn read(&self, first: u64, out: &mut [u32]) -> Result<(), DataError> {
        self.shards.read(first, out)
    }

    /// A document by its number.
    ///
    /// # Errors
    /// If the table cannot be read or points outside the stream.
    pub fn document(&self, number: u64) -> Result<DocumentPlace, DataError> {
        let entry = self.entry(number)?;
        let end = if number + 1 < self.documents() { self.entry(number + 1)?.first } else { self.tokens() };
        let source = usize::try_from(entry.source).ok().and_then(|s| self.index.sources.get(s));
        let Some(source) = source.filter(|_| entry.first < end) else {
            return Err(DataError::damaged(self.documents.path(), Damage::Hash));
        };
        Ok(DocumentPlace { number, first: entry.first, end, source: source.clone(), row: entry.row })
    }

    /// The document that the token at `position` belongs to.
    ///
    /// # Errors
    /// As [`Dataset::document`].
    pub fn document_at(&self, position: u64) -> Result<DocumentPlace, DataError> {
        // The last document that begins at or before `position`; the first begins at 0.
        let (mut low, mut high) = (0, self.documents());
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if self.entry(middle)?.first <= position { low = middle } else { high = middle }
        }
        self.document(low)
    }

    fn entry(&self, number: u64) -> Result<DocumentEntry, DataError> {
        let mut bytes = [0; DOCUMENT.width as usize];
        self.documents.read(number, &mut bytes)?;
        Ok(DocumentEntry::from_bytes(bytes))
    }
}

fn open_tokenizer(dir: &Path, digest: Digest) -> Result<Tokenizer, DataError> {
    let path = dir.join(TOKENIZER);
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(DataError::damaged(&path, Damage::Gone));
        }
        Err(e) => return Err(DataError::io(Action::Read, &path)(e)),
    };
    if Digest(*blake3::hash(&bytes).as_bytes()) != digest {
        return Err(DataError::damaged(&path, Damage::Hash));
    }
    Tokenizer::from_bytes(&bytes, &path)
}
