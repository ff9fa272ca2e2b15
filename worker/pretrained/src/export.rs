//! Writing a folder: a flat model as the tensors of a layout, whole or not at all.
//!
//! [`Export`] is what will be written, before it is: it answers for its tensors as an opened
//! folder does, so that logits can be computed from them first. The same answers become the
//! files. Those are written into a folder beside the destination, made durable, read back, and
//! renamed; until then the destination is as it was.

use crate::config::{self, CONFIG, Config};
use crate::layout::{Entry, entries};
use crate::params::{self, PARAMS};
use crate::safetensors::{INDEX, ONE, header};
use crate::{Convention, Dtype, Folder, Named, PretrainedError, Source, pth};
use caravan_types::ModelShape;
use serde_json::{Map, Value, json};
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Elements that are read, rounded and written at a time.
const AT_A_TIME: u64 = 1 << 20;

/// A model in the layout in which it will be written.
pub struct Export<'a> {
    source: &'a dyn Source,
    convention: Convention,
    /// In the order of the flat model. Tests put wrong ones here.
    pub(crate) entries: Vec<Entry>,
    /// For all tensors; that of each one's source where none.
    dtype: Option<Dtype>,
}

/// What goes into a folder beside its weights.
#[derive(Clone, Debug)]
pub struct Beside {
    /// Ids of special tokens, by the keys of `config.json`.
    pub tokens: Map<String, Value>,
    /// Files, by name, with their content: the tokenizer's.
    pub files: Vec<(String, Vec<u8>)>,
    /// Bytes of a file of Hugging Face's layout at most, unless one tensor has more.
    pub shard_bytes: u64,
}

impl<'a> Export<'a> {
    /// A model in another layout; with its own number formats, or all tensors in `dtype`.
    ///
    /// # Errors
    /// Where the layout has no way to say what the model is.
    pub fn new(
        source: &'a dyn Source,
        convention: Convention,
        dtype: Option<Dtype>,
    ) -> Result<Self, PretrainedError> {
        if convention == Convention::Meta {
            params::write(source.shape())?;
        }
        Ok(Self { source, convention, entries: entries(source.shape(), convention), dtype })
    }

    fn dtype(&self, index: usize) -> Dtype {
        self.dtype.unwrap_or_else(|| self.source.dtype(index))
    }

    /// Rows of a tensor as they will be read back.
    fn values(&self, index: usize, rows: Range<u64>, out: &mut [f32]) -> Result<(), PretrainedError> {
        let Entry { parameter, rows: order, .. } = &self.entries[index];
        if *order == crate::layout::Rows::Same {
            self.source.read(parameter.offset + rows.start * parameter.cols, out)?;
        } else {
            for (row, out) in rows.zip(out.chunks_exact_mut(parameter.cols as usize)) {
                self.source.read(parameter.offset + order.flat_row(row) * parameter.cols, out)?;
            }
        }
        self.dtype(index).round(out);
        Ok(())
    }

    /// Calls `take` with the rows of a tensor, some at a time.
    fn each(
        &self,
        index: usize,
        mut take: impl FnMut(Range<u64>, &[f32]) -> Result<(), PretrainedError>,
    ) -> Result<(), PretrainedError> {
        let parameter = &self.entries[index].parameter;
        let step = (AT_A_TIME / parameter.cols).clamp(1, parameter.rows);
        let mut values = vec![0.0; (step * parameter.cols) as usize];
        for first in (0..parameter.rows).step_by(step as usize) {
            let rows = first..(first + step).min(parameter.rows);
            let values = &mut values[..((rows.end - rows.start) * parameter.cols) as usize];
            self.values(index, rows.clone(), values)?;
            take(rows, values)?;
        }
        Ok(())
    }

    /// Whether the head has the embedding's bits, so that one of them need not be written.
    fn tied(&self) -> Result<bool, PretrainedError> {
        let last = self.entries.len() - 1;
        if self.convention != Convention::HuggingFace || self.dtype(0) != self.dtype(last) {
            return Ok(false);
        }
        let (mut same, mut head) = (true, Vec::new());
        self.each(0, |rows, embedding| {
            if same {
                head.resize(embedding.len(), 0.0);
                self.values(last, rows, &mut head)?;
                same = embedding.iter().zip(&head).all(|(a, b)| a.to_bits() == b.to_bits());
            }
            Ok(())
        })?;
        Ok(same)
    }

    /// Appends a tensor's bytes.
    fn content(&self, index: usize, path: &Path, out: &mut dyn Write) -> Result<(), PretrainedError> {
        let (dtype, mut bytes) = (self.dtype(index), Vec::new());
        self.each(index, |_, values| {
            if values.iter().any(|v| !v.is_finite()) {
                let why = match dtype {
                    Dtype::F16 => "fp16 ends at 65504, or the weights are damaged; try bf16 or fp32",
                    _ => "the weights are damaged",
                };
                let name = self.entries[index].name.clone();
                return Err(PretrainedError::NotFinite { name, dtype, why: why.into() });
            }
            bytes.clear();
            dtype.encode(values, &mut bytes);
            out.write_all(&bytes).map_err(PretrainedError::io("write", path))
        })
    }

    /// Writes the folder.
    ///
    /// # Errors
    /// Where something is there already, the disk refuses, a weight has no number in its format,
    /// or is read back otherwise. Nothing is left behind then.
    pub fn write(&self, destination: &Path, beside: &Beside) -> Result<(), PretrainedError> {
        check_free(destination)?;
        let destination =
            &std::path::absolute(destination).map_err(PretrainedError::io("find", destination))?;
        let parent = destination.parent().unwrap_or(destination);
        fs::create_dir_all(parent).map_err(PretrainedError::io("create", parent))?;
        let name = destination.file_name().unwrap_or_default().to_string_lossy();
        let partial = Partial(parent.join(format!(".{name}.{}.partial", std::process::id())));
        let dir = &partial.0;
        fs::create_dir(dir).map_err(PretrainedError::io("create", dir))?;
        match self.convention {
            Convention::HuggingFace => self.hugging_face(dir, beside)?,
            Convention::Meta => self.meta(dir)?,
        }
        for (name, content) in &beside.files {
            write_file(&dir.join(name), content)?;
        }
        self.read_back(dir)?;
        sync_folder(dir)?;
        fs::rename(dir, destination).map_err(PretrainedError::io("rename", dir))?;
        sync_folder(parent)
    }

    fn hugging_face(&self, dir: &Path, beside: &Beside) -> Result<(), PretrainedError> {
        let tied = self.tied()?;
        let config = Config { shape: self.source.shape().clone(), tied, tokens: beside.tokens.clone() };
        write_json(&dir.join(CONFIG), &config::write(&config, self.dtype(0)))?;
        let count = self.entries.len() - usize::from(tied);
        let bytes = |i: usize| self.entries[i].parameter.len() * self.dtype(i).size();
        let (mut shards, mut size) = (vec![Vec::new()], 0);
        for i in 0..count {
            if size + bytes(i) > beside.shard_bytes && size > 0 {
                shards.push(Vec::new());
                size = 0;
            }
            size += bytes(i);
            if let Some(shard) = shards.last_mut() {
                shard.push(i);
            }
        }
        let of = shards.len();
        let mut map = Map::new();
        for (n, shard) in shards.iter().enumerate() {
            let file =
                if of == 1 { ONE.into() } else { format!("model-{:05}-of-{of:05}.safetensors", n + 1) };
            let path = dir.join(&file);
            let mut out = create(&path)?;
            let tensor = |i: &usize| {
                let entry = &self.entries[*i];
                (entry.name.clone(), entry.shape(), self.dtype(*i))
            };
            let header = header(&path, shard.iter().map(tensor))?;
            out.write_all(&header).map_err(PretrainedError::io("write", &path))?;
            for i in shard {
                self.content(*i, &path, &mut out)?;
                map.insert(self.entries[*i].name.clone(), json!(file));
            }
            finish(&path, out)?;
        }
        if of > 1 {
            let total: u64 = (0..count).map(bytes).sum();
            write_json(&dir.join(INDEX), &json!({"metadata": {"total_size": total}, "weight_map": map}))?;
        }
        Ok(())
    }

    fn meta(&self, dir: &Path) -> Result<(), PretrainedError> {
        write_json(&dir.join(PARAMS), &params::write(self.source.shape())?)?;
        let path = dir.join("consolidated.00.pth");
        let mut out = create(&path)?;
        let tensors: Vec<_> = self
            .entries
            .iter()
            .enumerate()
            .map(|(i, e)| (e.name.clone(), e.shape(), self.dtype(i)))
            .collect();
        pth::write(&path, &mut out, &tensors, |i, out| self.content(i, &path, out))?;
        finish(&path, out)
    }

    /// Whether what is in the files now is what was to be written.
    fn read_back(&self, dir: &Path) -> Result<(), PretrainedError> {
        let written = Folder::open(dir, Some(self.source.shape().context))?;
        if Source::shape(&written) != self.source.shape() {
            return Err(PretrainedError::ReadBack { name: "the configuration".into() });
        }
        let mut there = Vec::new();
        for (index, entry) in self.entries.iter().enumerate() {
            self.each(index, |rows, values| {
                there.resize(values.len(), 0.0);
                written.rows(&entry.name, rows, &mut there)?;
                match values.iter().zip(&there).all(|(a, b)| a.to_bits() == b.to_bits()) {
                    true => Ok(()),
                    false => Err(PretrainedError::ReadBack { name: entry.name.clone() }),
                }
            })?;
        }
        Ok(())
    }
}

impl Named for Export<'_> {
    fn shape(&self) -> &ModelShape {
        self.source.shape()
    }

    fn convention(&self) -> Convention {
        self.convention
    }

    fn rows(&self, name: &str, rows: Range<u64>, out: &mut [f32]) -> Result<(), PretrainedError> {
        let missing = || PretrainedError::Engine(format!("there is no tensor {name}"));
        let index = self.entries.iter().position(|entry| entry.name == name).ok_or_else(missing)?;
        if rows.end > self.entries[index].parameter.rows {
            return Err(missing());
        }
        self.values(index, rows, out)
    }
}

/// Whether a folder can be written here.
///
/// # Errors
/// [`PretrainedError::NotEmpty`] where something is there.
pub fn check_free(destination: &Path) -> Result<(), PretrainedError> {
    match fs::read_dir(destination) {
        Ok(mut entries) => match entries.next() {
            None => Ok(()),
            Some(_) => Err(PretrainedError::NotEmpty(destination.to_owned())),
        },
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(PretrainedError::io("write a folder at", destination)(e)),
    }
}

/// A folder in the making, which goes unless it was renamed.
struct Partial(PathBuf);

impl Drop for Partial {
    fn drop(&mut self) {
        // After a success it is not there any more; after a failure, the error that is on its
        // way says more than a second one.
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn create(path: &Path) -> Result<BufWriter<File>, PretrainedError> {
    let file = File::create(path).map_err(PretrainedError::io("create", path))?;
    Ok(BufWriter::with_capacity(1 << 18, file))
}

fn finish(path: &Path, mut out: BufWriter<File>) -> Result<(), PretrainedError> {
    out.flush().map_err(PretrainedError::io("write", path))?;
    out.get_ref().sync_all().map_err(PretrainedError::io("sync", path))
}

fn write_file(path: &Path, content: &[u8]) -> Result<(), PretrainedError> {
    let mut out = create(path)?;
    out.write_all(content).map_err(PretrainedError::io("write", path))?;
    finish(path, out)
}

fn write_json(path: &Path, value: &Value) -> Result<(), PretrainedError> {
    write_file(path, format!("{value:#}\n").as_bytes())
}

fn sync_folder(path: &Path) -> Result<(), PretrainedError> {
    let folder = File::open(path).map_err(PretrainedError::io("open", path))?;
    folder.sync_all().map_err(PretrainedError::io("sync", path))
}
