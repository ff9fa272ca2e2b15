//! A folder with a model, open for reading: where each tensor lies, and nothing else read yet.

use crate::files::{Opened, Stored};
use crate::layout::{Cut, Entry, Rows, entries};
use crate::{Convention, Dtype, Named, PretrainedError, Source, config, params, pth, safetensors};
use caravan_types::ModelShape;
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Bytes of a read: large enough that system calls are nothing beside decoding.
const CHUNK: usize = 4 << 20;

/// Files of one model that Meta's layout may be spread over; the largest Llama has 8.
const MOST_FILES: usize = 256;

/// A part of a tensor, in one file.
#[derive(Clone, Debug)]
struct Piece {
    file: usize,
    offset: u64,
    /// What it is of the whole.
    rows: Range<u64>,
    cols: Range<u64>,
}

/// Where a tensor lies.
#[derive(Clone, Debug)]
struct Place {
    dtype: Dtype,
    pieces: Vec<Piece>,
}

/// A folder in Hugging Face's or Meta's layout.
#[derive(Debug)]
pub struct Folder {
    dir: PathBuf,
    convention: Convention,
    shape: ModelShape,
    tied: bool,
    tokens: Map<String, Value>,
    files: Vec<Opened>,
    /// In the order of the flat model.
    entries: Vec<Entry>,
    places: Vec<Place>,
    by_name: HashMap<String, usize>,
}

/// What a folder is, by what is in it; none where it is no folder of a model.
#[must_use]
pub fn kind(dir: &Path) -> Option<Convention> {
    if dir.join(config::CONFIG).exists() {
        return Some(Convention::HuggingFace);
    }
    dir.join(params::PARAMS).exists().then_some(Convention::Meta)
}

/// Tensors of several files, by name.
type Found = HashMap<String, Vec<(usize, Stored)>>;

impl Folder {
    /// Opens a folder, and checks of every tensor that it is there, with the right shape, and
    /// wholly within its file. `context` is for Meta's, which do not say theirs.
    ///
    /// # Errors
    /// With the first thing that is not as it must be.
    pub fn open(dir: &Path, context: Option<u32>) -> Result<Self, PretrainedError> {
        match kind(dir) {
            Some(Convention::HuggingFace) => Self::hugging_face(dir),
            Some(Convention::Meta) => Self::meta(dir, context),
            None => Err(PretrainedError::NotAModel(dir.to_owned())),
        }
    }

    fn hugging_face(dir: &Path) -> Result<Self, PretrainedError> {
        let config = config::read(dir)?;
        let (mut files, mut found) = (Vec::new(), Found::new());
        for path in safetensors::files(dir)? {
            let file = Opened::open(&path)?;
            for (name, stored) in safetensors::tensors(&file)? {
                let places = found.entry(name.clone()).or_default();
                if let Some((first, _)) = places.first() {
                    let first: &Opened = &files[*first];
                    return Err(PretrainedError::Copies { name, first: first.path.clone(), second: path });
                }
                places.push((files.len(), stored));
            }
            files.push(file);
        }
        let mut folder = Self::new(dir, Convention::HuggingFace, config.shape, files);
        folder.tokens = config.tokens;
        folder.tied = config.tied;
        folder.place(found)?;
        Ok(folder)
    }

    fn meta(dir: &Path, context: Option<u32>) -> Result<Self, PretrainedError> {
        let (mut files, mut found) = (Vec::new(), Found::new());
        for path in meta_files(dir)? {
            let file = Opened::open(&path)?;
            for (name, stored) in pth::tensors(&file)? {
                found.entry(name).or_default().push((files.len(), stored));
            }
            files.push(file);
        }
        let rows = |name: &str| {
            let missing = || PretrainedError::NoTensor { dir: dir.to_owned(), name: name.to_owned() };
            let pieces = found.get(name).ok_or_else(missing)?;
            let rows = pieces.iter().map(|(_, stored)| stored.shape.first().copied().unwrap_or(0));
            u32::try_from(rows.fold(0u64, u64::saturating_add)).map_err(|_| missing())
        };
        let (vocab, hidden) = (rows("output.weight")?, rows("layers.0.feed_forward.w1.weight")?);
        let shape = params::read(dir, context, vocab, hidden)?;
        let mut folder = Self::new(dir, Convention::Meta, shape, files);
        folder.place(found)?;
        Ok(folder)
    }

    fn new(dir: &Path, convention: Convention, shape: ModelShape, files: Vec<Opened>) -> Self {
        let entries = entries(&shape, convention);
        let by_name = entries.iter().enumerate().map(|(i, entry)| (entry.name.clone(), i)).collect();
        let (tied, tokens, places) = (false, Map::new(), Vec::new());
        Self { dir: dir.to_owned(), convention, shape, tied, tokens, files, entries, places, by_name }
    }

    /// Finds each tensor's place, and refuses tensors that have none.
    fn place(&mut self, mut found: Found) -> Result<(), PretrainedError> {
        let tied = self.tied;
        for entry in self.entries.clone() {
            let place = match found.remove(&entry.name) {
                Some(stored) => self.one(&entry, stored)?,
                // The head is the last one, and the embedding the first.
                None if tied && entry.name == HEAD => self.places[0].clone(),
                None => {
                    return Err(PretrainedError::NoTensor { dir: self.dir.clone(), name: entry.name });
                }
            };
            self.places.push(place);
        }
        if tied {
            self.check_tied()?;
        }
        found.retain(|name, _| !name.ends_with(".rotary_emb.inv_freq") && name != "rope.freqs");
        match found.keys().min() {
            None => Ok(()),
            Some(name) => {
                Err(PretrainedError::Extra { dir: self.dir.clone(), count: found.len(), name: name.clone() })
            }
        }
    }

    /// The place of a tensor that lies in these files.
    fn one(&self, entry: &Entry, stored: Vec<(usize, Stored)>) -> Result<Place, PretrainedError> {
        let shape = entry.shape();
        let (rows, cols) = (entry.parameter.rows, entry.parameter.cols);
        let wrong = |(file, stored): &(usize, Stored), expected: String| PretrainedError::Shape {
            name: entry.name.clone(),
            path: self.files[*file].path.clone(),
            found: stored.shape.clone(),
            expected,
        };
        let first = &stored[0];
        if let Some(other) = stored.iter().find(|s| s.1.dtype != first.1.dtype) {
            let why = format!(
                "{} is of the type {} here, and {} elsewhere",
                entry.name, other.1.dtype, first.1.dtype
            );
            return Err(PretrainedError::file(&self.files[other.0].path, why));
        }
        let mut pieces: Vec<Piece> = Vec::new();
        for part in &stored {
            let (file, Stored { offset, shape: found, .. }) = part;
            let end = pieces.last().map_or((0, 0), |last| (last.rows.end, last.cols.end));
            let by_columns =
                entry.cut == Cut::Columns || entry.cut == Cut::Either && found.get(1) != Some(&cols);
            let (rows, cols) = match (entry.cut, found.as_slice()) {
                _ if *found == shape => (0..rows, 0..cols),
                (Cut::Whole, _) => return Err(wrong(part, format!("{shape:?}"))),
                (_, [r, c]) if by_columns && *r == rows => (0..rows, end.1..end.1.saturating_add(*c)),
                (_, [r, c]) if !by_columns && *c == cols => (end.0..end.0.saturating_add(*r), 0..cols),
                _ => return Err(wrong(part, format!("a part of {shape:?}"))),
            };
            pieces.push(Piece { file: *file, offset: *offset, rows, cols });
            if pieces.len() < stored.len() && *found == shape {
                // Each file has all of it.
                return self.copies(entry, &stored);
            }
        }
        let end = pieces.last().map_or((0, 0), |last| (last.rows.end, last.cols.end));
        if end != (rows, cols) {
            let files = self.files.len();
            let expected =
                format!("{shape:?} over all of its files, of which {files} are here; one may be missing");
            return Err(wrong(&stored[stored.len() - 1], expected));
        }
        Ok(Place { dtype: first.1.dtype, pieces })
    }

    /// The place of a tensor that every file has whole: the first one's, if the others are equal.
    fn copies(&self, entry: &Entry, stored: &[(usize, Stored)]) -> Result<Place, PretrainedError> {
        let (first, dtype) = (&stored[0], stored[0].1.dtype);
        let mut values = Vec::with_capacity(stored.len());
        for (file, copy) in stored {
            if copy.shape != entry.shape() || entry.cut != Cut::Whole {
                return Err(PretrainedError::Shape {
                    name: entry.name.clone(),
                    path: self.files[*file].path.clone(),
                    found: copy.shape.clone(),
                    expected: "a part of what is whole in another file".into(),
                });
            }
            let mut bytes = vec![0; (entry.parameter.len() * dtype.size()) as usize];
            self.files[*file].read_at(copy.offset, &mut bytes)?;
            values.push((bytes, *file));
        }
        let other = values.iter().find(|(bytes, _)| *bytes != values[0].0);
        if let Some((_, file)) = other {
            return Err(PretrainedError::Copies {
                name: entry.name.clone(),
                first: self.files[first.0].path.clone(),
                second: self.files[*file].path.clone(),
            });
        }
        let (rows, cols) = (0..entry.parameter.rows, 0..entry.parameter.cols);
        Ok(Place { dtype, pieces: vec![Piece { file: first.0, offset: first.1.offset, rows, cols }] })
    }

    /// A head that is stored although it is the embedding must be it.
    fn check_tied(&self) -> Result<(), PretrainedError> {
        let at = |place: &Place| place.pieces.first().map(|p| (p.file, p.offset));
        if self.places.first().map(at) == self.places.last().map(at) {
            return Ok(());
        }
        let (embedding, head) = (&self.entries[0], &self.entries[self.entries.len() - 1]);
        let mut pair = [Vec::new(), Vec::new()];
        for row in 0..embedding.parameter.rows {
            for (values, entry) in pair.iter_mut().zip([embedding, head]) {
                values.resize(embedding.parameter.cols as usize, 0.0);
                self.rows(&entry.name, row..row + 1, values)?;
            }
            if pair[0].iter().zip(&pair[1]).any(|(a, b)| a.to_bits() != b.to_bits()) {
                let why = format!(
                    "tie_word_embeddings is true, so {} is {}, but it is stored with other values: set it to false to have \
                     a head of its own",
                    head.name, embedding.name
                );
                return Err(PretrainedError::file(&self.dir.join(config::CONFIG), why));
            }
        }
        Ok(())
    }

    /// The folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether its configuration says that the head is the embedding.
    #[must_use]
    pub fn tied(&self) -> bool {
        self.tied
    }

    /// Ids of special tokens, by the keys of `config.json`; none in Meta's layout.
    #[must_use]
    pub fn tokens(&self) -> &Map<String, Value> {
        &self.tokens
    }

    /// The files that hold weights.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|file| file.path.as_path())
    }

    /// Fills `out` with elements of a row of a tensor, from column `first` on.
    fn row(&self, place: &Place, row: u64, first: u64, out: &mut [f32]) -> Result<(), PretrainedError> {
        let end = first + out.len() as u64;
        for piece in place.pieces.iter().filter(|piece| piece.rows.contains(&row)) {
            let (from, to) = (first.max(piece.cols.start), end.min(piece.cols.end));
            if from < to {
                let width = piece.cols.end - piece.cols.start;
                let at = (row - piece.rows.start) * width + (from - piece.cols.start);
                self.elements(
                    place.dtype,
                    piece,
                    at,
                    &mut out[(from - first) as usize..(to - first) as usize],
                )?;
            }
        }
        Ok(())
    }

    /// Fills `out` with elements of a piece, which lie one after the other.
    fn elements(
        &self,
        dtype: Dtype,
        piece: &Piece,
        first: u64,
        out: &mut [f32],
    ) -> Result<(), PretrainedError> {
        let size = dtype.size() as usize;
        let mut bytes = vec![0; CHUNK.min(out.len() * size)];
        let mut at = piece.offset + first * dtype.size();
        for out in out.chunks_mut(CHUNK / size) {
            let bytes = &mut bytes[..out.len() * size];
            self.files[piece.file].read_at(at, bytes)?;
            dtype.decode(bytes, out);
            at += bytes.len() as u64;
        }
        Ok(())
    }

    /// Fills `out` with elements of a tensor as it is stored, from element `first` on.
    fn within(&self, place: &Place, cols: u64, first: u64, out: &mut [f32]) -> Result<(), PretrainedError> {
        if let [piece] = place.pieces.as_slice() {
            return self.elements(place.dtype, piece, first, out);
        }
        let mut at = first;
        let mut rest = out;
        while !rest.is_empty() {
            let n = (cols - at % cols).min(rest.len() as u64) as usize;
            let (out, after) = rest.split_at_mut(n);
            self.row(place, at / cols, at % cols, out)?;
            (rest, at) = (after, at + n as u64);
        }
        Ok(())
    }
}

/// Hugging Face's name of the head.
const HEAD: &str = "lm_head.weight";

impl Source for Folder {
    fn shape(&self) -> &ModelShape {
        &self.shape
    }

    fn dtype(&self, parameter: usize) -> Dtype {
        self.places.get(parameter).map_or(Dtype::F32, |place| place.dtype)
    }

    fn read(&self, first: u64, out: &mut [f32]) -> Result<(), PretrainedError> {
        let end = first + out.len() as u64;
        let mut index = self.entries.partition_point(|entry| entry.parameter.range().end <= first);
        let (mut at, mut rest) = (first, out);
        while !rest.is_empty() {
            let (Some(entry), Some(place)) = (self.entries.get(index), self.places.get(index)) else {
                return Err(PretrainedError::Engine("elements outside of the model".into()));
            };
            let (start, cols) = (entry.parameter.offset, entry.parameter.cols);
            let n = (entry.parameter.range().end.min(end) - at) as usize;
            let (mut part, after) = rest.split_at_mut(n);
            let mut element = at - start;
            if entry.rows == Rows::Same {
                self.within(place, cols, element, part)?;
            } else {
                while !part.is_empty() {
                    let n = (cols - element % cols).min(part.len() as u64) as usize;
                    let (row, others) = part.split_at_mut(n);
                    self.row(place, entry.rows.named_row(element / cols), element % cols, row)?;
                    (part, element) = (others, element + n as u64);
                }
            }
            (rest, at, index) = (after, at + n as u64, index + 1);
        }
        Ok(())
    }
}

impl Named for Folder {
    fn shape(&self) -> &ModelShape {
        &self.shape
    }

    fn convention(&self) -> Convention {
        self.convention
    }

    fn rows(&self, name: &str, rows: Range<u64>, out: &mut [f32]) -> Result<(), PretrainedError> {
        let index = self.by_name.get(name);
        let found = index.and_then(|i| Some((self.entries.get(*i)?, self.places.get(*i)?)));
        let missing = || PretrainedError::NoTensor { dir: self.dir.clone(), name: name.to_owned() };
        let (entry, place) = found.ok_or_else(missing)?;
        let cols = entry.parameter.cols;
        if rows.end > entry.parameter.rows || out.len() as u64 != (rows.end - rows.start) * cols {
            return Err(missing());
        }
        self.within(place, cols, rows.start * cols, out)
    }
}

/// The files of a folder in Meta's layout, in the order of their numbers.
fn meta_files(dir: &Path) -> Result<Vec<PathBuf>, PretrainedError> {
    let name = |n: usize| dir.join(format!("consolidated.{n:02}.pth"));
    let mut count = 0;
    for entry in fs::read_dir(dir).map_err(PretrainedError::io("list", dir))? {
        let file = entry.map_err(PretrainedError::io("list", dir))?.file_name();
        let number = file.to_str().and_then(|f| f.strip_prefix("consolidated.")?.strip_suffix(".pth"));
        if let Some(number) = number.and_then(|n| n.parse::<usize>().ok()).filter(|n| *n < MOST_FILES) {
            count = count.max(number + 1);
        }
    }
    if let Some(missing) = (0..count.max(1)).map(name).find(|path| !path.exists()) {
        let why = match count {
            0 => "Meta's layout has the weights in it".to_owned(),
            _ => format!("the model is spread over {count} files, and all are needed"),
        };
        return Err(PretrainedError::Missing { path: missing, why });
    }
    Ok((0..count).map(name).collect())
}
