//! Opening checkpoints: every shard mapped, every name checked once, views that cannot fail afterwards.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::Deserialize;

use super::config::tied;
use super::digest::Digest;
use super::dtype::{Dtype, Float};
use super::read_config;
use crate::error::BadInput;
use crate::json;
use crate::provenance::Provenance;
use crate::safetensors::{Entry, MappedFile, TensorSpec};

/// A mapped checkpoint.
pub struct Checkpoint {
    root: PathBuf,
    files: Vec<MappedFile>,
    home: BTreeMap<String, usize>,
    tied: bool,
}

/// One tensor of a mapped checkpoint.
#[derive(Clone, Copy)]
pub struct TensorView<'a> {
    /// Name in the checkpoint.
    pub name: &'a str,
    /// Element type.
    pub dtype: Dtype,
    /// Shape; empty for a scalar.
    pub shape: &'a [usize],
    /// Little-endian elements, row-major.
    pub bytes: &'a [u8],
    /// The file it lies in.
    pub file: &'a Path,
}

/// Why a tensor of a checkpoint is not one of its D parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Excluded {
    /// A buffer that old checkpoints carry, such as `rotary_emb.inv_freq`.
    Buffer,
    /// Not floating-point.
    NotFloat,
    /// `lm_head.weight` of a model with tied embeddings: the same parameter as the input embedding.
    Tied,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Opens a Hugging Face folder, or a bare .safetensors file.
    ///
    /// # Errors
    /// [`BadInput`] when something is missing, damaged, duplicated, or only there as a pickle.
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_dir() {
            return Self::open_folder(path);
        }
        if path.symlink_metadata().is_err() {
            return Err(BadInput::new(path, "no such checkpoint")
                .expected("a Hugging Face folder or a .safetensors file")
                .into());
        }
        if is_pickle(path) {
            return Err(refuse_pickle(BadInput::new(path, "is no safetensors file"), path).into());
        }
        let file = MappedFile::open(path)?;
        Self::assemble(path, vec![file], false)
    }

    fn open_folder(folder: &Path) -> Result<Self> {
        let single = folder.join("model.safetensors");
        let index = folder.join("model.safetensors.index.json");
        let files = match (single.exists(), index.exists()) {
            (true, true) => {
                return Err(BadInput::new(folder, "holds both model.safetensors and model.safetensors.index.json")
                    .expected("one of the two")
                    .hint("remove the one that is stale")
                    .into());
            }
            (true, false) => vec![MappedFile::open(&single)?],
            (false, true) => open_shards(folder, &index)?,
            (false, false) => return Err(no_weights(folder).into()),
        };
        // Where the config is silent, the family's default shows in the tensors.
        let head = files.iter().any(|file| file.entries.contains_key("lm_head.weight"));
        let tied = folder.join("config.json").exists() && tied(&read_config(folder)?).unwrap_or(!head);
        Self::assemble(folder, files, tied)
    }

    fn assemble(root: &Path, files: Vec<MappedFile>, tied: bool) -> Result<Self> {
        let mut home = BTreeMap::new();
        for (i, file) in files.iter().enumerate() {
            for name in file.entries.keys() {
                if let Some(first) = home.insert(name.clone(), i) {
                    return Err(BadInput::new(&file.path, "a tensor is in two shards")
                        .tensor(name)
                        .found(format!("also in {}", files[first].path.display()))
                        .into());
                }
            }
        }
        Ok(Self { root: root.to_owned(), files, home, tied })
    }

    /// The folder or file that was opened.
    pub fn path(&self) -> &Path {
        &self.root
    }

    /// The folder, when the checkpoint is one rather than a bare file.
    pub fn folder(&self) -> Option<&Path> {
        self.root.is_dir().then_some(self.root.as_path())
    }

    /// Whether the output embedding is the input embedding, by config.json or, where that does not say, because there is no
    /// `lm_head.weight`.
    pub fn tied(&self) -> bool {
        self.tied
    }

    /// The safetensors files.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|file| file.path.as_path())
    }

    /// The string metadata of each safetensors file.
    pub fn metadata(&self) -> impl Iterator<Item = (&Path, &BTreeMap<String, String>)> {
        self.files.iter().map(|file| (file.path.as_path(), &file.metadata))
    }

    /// All tensors, in bytewise name order.
    pub fn tensors(&self) -> impl Iterator<Item = TensorView<'_>> {
        self.home.keys().map(|name| self.get(name).expect("home lists tensors that exist"))
    }

    /// The tensor `name`, if there is one.
    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        let (name, &i) = self.home.get_key_value(name)?;
        let file = &self.files[i];
        let Entry { dtype, shape, .. } = &file.entries[name];
        Some(TensorView { name, dtype: *dtype, shape, bytes: file.bytes(&file.entries[name]), file: &file.path })
    }

    /// The D parameters: floating-point tensors without known buffers, a tied tensor once; bytewise name order.
    pub fn parameters(&self) -> impl Iterator<Item = TensorView<'_>> {
        self.tensors().filter(|view| self.excluded(view).is_none())
    }

    /// The tensors that are not parameters, with the reason.
    pub fn not_parameters(&self) -> impl Iterator<Item = (TensorView<'_>, Excluded)> {
        self.tensors().filter_map(|view| Some((view, self.excluded(&view)?)))
    }

    fn excluded(&self, view: &TensorView<'_>) -> Option<Excluded> {
        if view.name.ends_with("rotary_emb.inv_freq") {
            Some(Excluded::Buffer)
        } else if !view.dtype.is_float() {
            Some(Excluded::NotFloat)
        } else if self.tied && view.name == "lm_head.weight" && self.home.contains_key("model.embed_tokens.weight") {
            Some(Excluded::Tied)
        } else {
            None
        }
    }

    /// The content digest recorded in cpift.json, where there is one and the files' sizes and times still match it.
    pub fn recorded_digest(&self) -> Option<Digest> {
        let folder = self.folder()?;
        Provenance::recorded_digest(folder).filter(|record| record.holds_for(folder)).map(|record| record.blake3)
    }

    /// The content digest: the recorded one, or else computed.
    ///
    /// # Errors
    /// I/O errors on the side files.
    pub fn digest(&self) -> Result<Digest> {
        self.recorded_digest().map_or_else(|| Digest::of_checkpoint(self), Ok)
    }
}

impl<'a> TensorView<'a> {
    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.bytes.len() / self.dtype.size()
    }

    /// The bytes of elements `start..start + len`.
    ///
    /// # Panics
    /// When the range runs past the tensor's end.
    #[inline(always)]
    pub fn slice(&self, start: usize, len: usize) -> &'a [u8] {
        let size = self.dtype.size();
        &self.bytes[start * size..(start + len) * size]
    }

    /// Elements `start..start + out.len()` as `T`.
    ///
    /// # Panics
    /// When the tensor is not floating-point or the range runs past its end.
    #[inline(always)]
    pub fn read<T: Float>(&self, start: usize, out: &mut [T]) {
        T::read(self.dtype, self.slice(start, out.len()), out);
    }

    /// What this tensor is, to write another like it.
    pub fn spec(&self) -> TensorSpec {
        TensorSpec { name: self.name.to_owned(), dtype: self.dtype, shape: self.shape.to_vec() }
    }
}

/// Checks that `other` has exactly the parameters of `base`, by name and shape.
///
/// # Errors
/// [`BadInput`] that names the first parameter that is missing, extra or of another shape.
pub fn check_same_parameters(base: &Checkpoint, other: &Checkpoint) -> Result<()> {
    let hint = "both must be checkpoints of one model";
    for view in base.parameters() {
        let Some(found) = other.get(view.name) else {
            return Err(BadInput::new(other.path(), format!("a tensor of {} is missing", base.path().display()))
                .tensor(view.name)
                .hint(hint)
                .into());
        };
        if !found.dtype.is_float() {
            return Err(BadInput::new(found.file, "a parameter that is not floating-point")
                .tensor(view.name)
                .expected("F64, F32, F16 or BF16")
                .found(found.dtype.name())
                .hint("quantised checkpoints cannot be used: take the floating-point one")
                .into());
        }
        if found.shape != view.shape {
            return Err(BadInput::new(found.file, format!("a shape differs from {}", base.path().display()))
                .tensor(view.name)
                .expected(format!("{:?}", view.shape))
                .found(format!("{:?}", found.shape))
                .hint(hint)
                .into());
        }
    }
    for view in other.parameters() {
        let Some(expected) = base.get(view.name) else {
            return Err(BadInput::new(view.file, format!("a tensor that {} does not have", base.path().display()))
                .tensor(view.name)
                .hint(hint)
                .into());
        };
        if !expected.dtype.is_float() {
            return Err(BadInput::new(expected.file, "a parameter that is not floating-point")
                .tensor(view.name)
                .expected("F64, F32, F16 or BF16")
                .found(expected.dtype.name())
                .into());
        }
    }
    Ok(())
}

fn open_shards(folder: &Path, index_path: &Path) -> Result<Vec<MappedFile>> {
    let index: Index = json::read(index_path)?;
    let mut shards: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (tensor, file) in &index.weight_map {
        if file.contains(['/', '\\']) || file.starts_with('.') {
            return Err(BadInput::new(index_path, "names a shard outside its folder")
                .tensor(tensor)
                .found(file.as_str())
                .into());
        }
        shards.entry(file).or_default().push(tensor);
    }
    let mut files = Vec::new();
    for (name, tensors) in shards {
        let path = folder.join(name);
        if !path.is_file() {
            return Err(BadInput::new(&path, format!("a shard named in {} is missing", index_path.display()))
                .tensor(tensors[0])
                .hint("fetch or copy the shard again")
                .into());
        }
        let file = MappedFile::open(&path)?;
        for tensor in &tensors {
            if !file.entries.contains_key(*tensor) {
                return Err(BadInput::new(&path, "a tensor that the index places here is missing")
                    .tensor(*tensor)
                    .into());
            }
        }
        if let Some(extra) = file.entries.keys().find(|k| index.weight_map.get(*k).map(String::as_str) != Some(name)) {
            return Err(BadInput::new(&path, "holds a tensor that the index does not place here").tensor(extra).into());
        }
        files.push(file);
    }
    warn_of_strays(folder, &files);
    Ok(files)
}

/// Tells of shards that the index does not name: what an older save left.
fn warn_of_strays(folder: &Path, files: &[MappedFile]) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let name = entry.file_name();
        let shard = name.to_string_lossy();
        if shard.starts_with("model-") && shard.ends_with(".safetensors") && !files.iter().any(|f| f.path == path) {
            log::warn!("{}: not named in the index, and not read", path.display());
        }
    }
}

fn no_weights(folder: &Path) -> BadInput {
    let error = BadInput::new(folder, "no weights in this folder")
        .expected("model.safetensors or model.safetensors.index.json");
    let mut names: Vec<PathBuf> = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path()).collect();
    names.sort();
    match names.iter().find(|path| is_pickle(path)) {
        Some(pickle) => refuse_pickle(error, pickle),
        None => error,
    }
}

/// By its name: what PyTorch saves as a pickle, which runs code when it is read.
fn is_pickle(path: &Path) -> bool {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    let index = path.to_string_lossy().ends_with(".bin.index.json");
    index || ["bin", "pt", "pth", "ckpt", "pkl"].iter().any(|known| extension.eq_ignore_ascii_case(known))
}

fn refuse_pickle(error: BadInput, pickle: &Path) -> BadInput {
    let name = pickle.file_name().unwrap_or_default().display();
    error.found(format!("a pickled checkpoint ({name}), which is never opened: reading it could run code")).hint(
        "where you trust it, convert it: load it in transformers and call save_pretrained(dir, \
         safe_serialization=True), or torch.load(file, weights_only=True) and safetensors.torch.save_file",
    )
}
