//! Reading checkpoints: shards are mapped and all names are checked once, so that views cannot fail
//! afterwards.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::Deserialize;

use super::diagnose;
use super::sidecar::{read_config, tied};
use super::wrappers::Wrappers;
use crate::error::BadInput;
use crate::files::hub;
use crate::format::dtype::{Dtype, Float};
use crate::format::json;
use crate::format::safetensors::{Entry, MappedFile, TensorSpec};
use crate::log_once;

/// Name of the output embedding.
const HEAD: &str = "lm_head.weight";
/// Name of the input embedding.
const EMBEDDING: &str = "model.embed_tokens.weight";

/// A mapped checkpoint. Tensor names are those of the model, without the prefixes of wrappers.
pub struct Checkpoint {
    root: PathBuf,
    files: Vec<MappedFile>,
    /// Index of the file of each tensor, and its entry there.
    home: BTreeMap<String, (usize, Entry)>,
    tied: bool,
    /// True if the input embedding also serves as the output embedding, which has no tensor.
    head_is_embedding: bool,
}

/// View of one tensor of a mapped checkpoint.
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
    /// File that contains the tensor.
    pub file: &'a Path,
}

/// Reason for not counting a tensor among the D parameters of its checkpoint.
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
    /// Opens a Hugging Face directory or a bare .safetensors file.
    ///
    /// # Errors
    /// [`BadInput`] if something is missing, damaged, duplicated or only available as a pickle.
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_dir() {
            return Self::open_folder(path);
        }
        if path.symlink_metadata().is_err() {
            let error = BadInput::new(path, "no such checkpoint");
            let error = error.expected("a Hugging Face directory or a .safetensors file");
            return Err(hub::hinted(error, path).into());
        }
        if diagnose::is_pickle(path) {
            return Err(diagnose::refuse_pickle(BadInput::new(path, "is not a safetensors file"), path).into());
        }
        let file = MappedFile::open(path)?;
        Self::assemble(path, vec![file])
    }

    fn open_folder(folder: &Path) -> Result<Self> {
        let single = folder.join("model.safetensors");
        let index = folder.join("model.safetensors.index.json");
        let files = match (single.exists(), index.exists()) {
            (true, true) => {
                return Err(BadInput::new(folder, "holds both model.safetensors and model.safetensors.index.json")
                    .expected("one of the two")
                    .hint("remove the outdated one")
                    .into());
            }
            (true, false) => vec![MappedFile::open(&single)?],
            (false, true) => open_shards(folder, &index)?,
            (false, false) => return Err(diagnose::no_weights(folder).into()),
        };
        if folder.join("adapter_config.json").exists() {
            log_once::warn(format!(
                "{}: adapter_config.json is ignored: the weights beside it are read as the model",
                folder.display()
            ));
        }
        let mut checkpoint = Self::assemble(folder, files)?;
        if folder.join("config.json").exists() {
            checkpoint.find_head(tied(&read_config(folder)?));
        }
        Ok(checkpoint)
    }

    fn assemble(root: &Path, files: Vec<MappedFile>) -> Result<Self> {
        let names = files.iter().flat_map(|file| file.entries.keys().map(|name| (name.as_str(), file.path.as_path())));
        let clean = Wrappers::find(root, names)?;
        let mut home: BTreeMap<String, (usize, Entry)> = BTreeMap::new();
        for (i, file) in files.iter().enumerate() {
            for (name, entry) in &file.entries {
                if let Some((first, _)) = home.insert(clean.name(name), (i, entry.clone())) {
                    let (message, other) = match first == i {
                        true => ("two tensors have this name once wrapper prefixes are removed", name.clone()),
                        false => ("a tensor is in two shards", format!("also in {}", files[first].path.display())),
                    };
                    return Err(BadInput::new(&file.path, message).tensor(clean.name(name)).found(other).into());
                }
            }
        }
        Ok(Self { root: root.to_owned(), files, home, tied: false, head_is_embedding: false })
    }

    /// Determines whether the embeddings are tied: as `asked` by config.json, or else by the
    /// presence of an output embedding. As in transformers 5, two tensors with different values are
    /// two parameters whatever config.json says, and a tied checkpoint may store its embedding
    /// under either name.
    fn find_head(&mut self, asked: Option<bool>) {
        let (head, embedding) = (self.get(HEAD), self.get(EMBEDDING));
        self.tied = match (asked, head, embedding) {
            (None, head, _) => head.is_none(),
            (Some(false), ..) => false,
            (Some(true), Some(head), Some(embedding)) if !same_values(&head, &embedding) => {
                log_once::warn(format!(
                    "{}: {HEAD} differs from {EMBEDDING} although config.json ties them: both are kept as parameters",
                    self.root.display()
                ));
                false
            }
            (Some(true), Some(_), None) if self.is_llama_like_without_embedding() => {
                let place = self.home.remove(HEAD).expect("it was found");
                self.home.insert(EMBEDDING.to_owned(), place);
                log_once::info(format!(
                    "{}: {HEAD} is also used as the input embedding, because config.json ties them",
                    self.root.display()
                ));
                true
            }
            (Some(true), ..) => true,
        };
    }

    /// Returns true if no tensor can be the input embedding under any other name, so that the
    /// output embedding must be it.
    fn is_llama_like_without_embedding(&self) -> bool {
        let is_embedding = |name: &str| name.contains("embed") || name.contains("wte");
        self.home.keys().any(|name| name.starts_with("model.layers."))
            && !self.home.keys().any(|name| is_embedding(name))
    }

    /// Adds an output embedding `lm_head.weight`, with the values of the input embedding, to a
    /// checkpoint with tied embeddings, for use with checkpoints that have one. The stored tensors
    /// and the digest do not change.
    pub fn untie(&mut self) {
        if self.tied {
            self.tied = false;
            self.head_is_embedding = !self.home.contains_key(HEAD) && self.home.contains_key(EMBEDDING);
        }
    }

    /// Returns true if `name`, with `numel` elements, can be the output embedding that this
    /// checkpoint ties to its input embedding.
    pub fn ties(&self, name: &str, numel: u64) -> bool {
        self.tied && name == HEAD && self.get(EMBEDDING).is_some_and(|view| view.numel() as u64 == numel)
    }

    /// Returns the name under which `name` is stored. They differ only for the output embedding
    /// added by [`Checkpoint::untie`].
    pub fn stored_name<'a>(&self, name: &'a str) -> &'a str {
        if self.is_added_head(name) { EMBEDDING } else { name }
    }

    /// Returns true if `name` is the output embedding added by [`Checkpoint::untie`].
    fn is_added_head(&self, name: &str) -> bool {
        self.head_is_embedding && name == HEAD
    }

    /// Directory or file that was opened.
    pub fn path(&self) -> &Path {
        &self.root
    }

    /// Directory of the checkpoint; none for a bare file.
    pub fn folder(&self) -> Option<&Path> {
        self.root.is_dir().then_some(self.root.as_path())
    }

    /// Returns true if the output embedding is the input embedding, according to config.json or
    /// else because there is no `lm_head.weight`.
    pub fn tied(&self) -> bool {
        self.tied
    }

    /// Paths of the safetensors files.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|file| file.path.as_path())
    }

    /// String metadata of each safetensors file.
    pub fn metadata(&self) -> impl Iterator<Item = (&Path, &BTreeMap<String, String>)> {
        self.files.iter().map(|file| (file.path.as_path(), &file.metadata))
    }

    /// All tensors, in bytewise name order.
    pub fn tensors(&self) -> impl Iterator<Item = TensorView<'_>> {
        self.home.iter().map(|(name, place)| self.view(name, place))
    }

    /// Returns the tensor `name`, if there is one.
    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        if self.is_added_head(name) {
            return Some(TensorView { name: HEAD, ..self.get(EMBEDDING)? });
        }
        let (name, place) = self.home.get_key_value(name)?;
        Some(self.view(name, place))
    }

    fn view<'a>(&'a self, name: &'a str, (i, entry): &'a (usize, Entry)) -> TensorView<'a> {
        let file = &self.files[*i];
        TensorView { name, dtype: entry.dtype, shape: &entry.shape, bytes: file.bytes(entry), file: &file.path }
    }

    /// The D parameters in bytewise name order: floating-point tensors, without known buffers, and
    /// tied tensors once.
    pub fn parameters(&self) -> impl Iterator<Item = TensorView<'_>> {
        let made = self.head_is_embedding.then(|| self.get(HEAD)).flatten();
        let (before, after): (Vec<_>, Vec<_>) =
            self.tensors().filter(|view| self.excluded(view).is_none()).partition(|view| view.name < HEAD);
        before.into_iter().chain(made).chain(after)
    }

    /// Tensors that are not parameters, with the reason.
    pub fn not_parameters(&self) -> impl Iterator<Item = (TensorView<'_>, Excluded)> {
        self.tensors().filter_map(|view| Some((view, self.excluded(&view)?)))
    }

    fn excluded(&self, view: &TensorView<'_>) -> Option<Excluded> {
        if is_buffer(view.name) {
            Some(Excluded::Buffer)
        } else if !view.dtype.is_float() {
            Some(Excluded::NotFloat)
        } else if self.tied && view.name == HEAD && self.home.contains_key(EMBEDDING) {
            Some(Excluded::Tied)
        } else {
            None
        }
    }
}

impl<'a> TensorView<'a> {
    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.bytes.len() / self.dtype.size()
    }

    /// Bytes of the elements `start..start + len`.
    ///
    /// # Panics
    /// If the range extends past the end of the tensor.
    #[inline(always)]
    pub fn slice(&self, start: usize, len: usize) -> &'a [u8] {
        let size = self.dtype.size();
        &self.bytes[start * size..(start + len) * size]
    }

    /// Reads the elements `start..start + out.len()` as `T`.
    ///
    /// # Panics
    /// If the tensor is not floating-point or the range extends past its end.
    #[inline(always)]
    pub fn read<T: Float>(&self, start: usize, out: &mut [T]) {
        T::read(self.dtype, self.slice(start, out.len()), out);
    }

    /// Name, dtype and shape, for writing a tensor like this one.
    pub fn spec(&self) -> TensorSpec {
        TensorSpec { name: self.name.to_owned(), dtype: self.dtype, shape: self.shape.to_vec() }
    }
}

/// Returns true for buffers in old checkpoints that the model computes itself.
fn is_buffer(name: &str) -> bool {
    ["inv_freq", "cos_cached", "sin_cached"]
        .iter()
        .any(|buffer| name.strip_suffix(buffer).is_some_and(|before| before.ends_with("rotary_emb.")))
}

/// Returns true if two tensors have the same shape and values; their floating-point dtypes may
/// differ.
fn same_values(a: &TensorView<'_>, b: &TensorView<'_>) -> bool {
    const BLOCK: usize = 1 << 12;
    if a.shape != b.shape || !a.dtype.is_float() || !b.dtype.is_float() {
        return false;
    }
    if a.dtype == b.dtype && a.bytes == b.bytes {
        return true;
    }
    let (mut left, mut right) = ([0f64; BLOCK], [0f64; BLOCK]);
    (0..a.numel()).step_by(BLOCK).all(|start| {
        let len = BLOCK.min(a.numel() - start);
        a.read(start, &mut left[..len]);
        b.read(start, &mut right[..len]);
        left[..len] == right[..len]
    })
}

/// Checks that `other` has exactly the parameters of `base`, by name and shape.
///
/// # Errors
/// [`BadInput`] with the first parameter that is missing, extra or of a different shape.
pub fn check_same_parameters(base: &Checkpoint, other: &Checkpoint) -> Result<()> {
    let hint = "both must be checkpoints of the same model";
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
                .hint("quantized checkpoints are not supported: use the floating-point one")
                .into());
        }
        if found.shape != view.shape {
            return Err(BadInput::new(found.file, format!("the shape differs from that in {}", base.path().display()))
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
            return Err(BadInput::new(index_path, "names a shard outside its directory")
                .tensor(tensor)
                .found(file.as_str())
                .into());
        }
        shards.entry(file).or_default().push(tensor);
    }
    // The output embedding of a tied model and buffers may be listed in the index and missing from
    // the files.
    let tied = folder.join("config.json").exists() && tied(&read_config(folder)?) == Some(true);
    let counts = |tensor: &&str| !(is_buffer(tensor) || tied && tensor.ends_with(HEAD));
    let mut files = Vec::new();
    for (name, tensors) in shards {
        let path = folder.join(name);
        if !path.is_file() {
            let Some(tensor) = tensors.iter().find(|tensor| counts(tensor)) else { continue };
            return Err(BadInput::new(&path, format!("a shard named in {} is missing", index_path.display()))
                .tensor(*tensor)
                .hint("download or copy the shard again")
                .into());
        }
        let file = MappedFile::open(&path)?;
        if let Some(tensor) = tensors.iter().filter(|t| counts(t)).find(|t| !file.entries.contains_key(**t)) {
            return Err(BadInput::new(&path, format!("a tensor that {} places here is missing", index_path.display()))
                .tensor(*tensor)
                .hint("the index and the shard are from different saves: download both again")
                .into());
        }
        if let Some(extra) = file.entries.keys().find(|k| index.weight_map.get(*k).map(String::as_str) != Some(name)) {
            return Err(BadInput::new(&path, "holds a tensor that the index does not place here").tensor(extra).into());
        }
        files.push(file);
    }
    warn_about_stray_shards(folder, &files);
    Ok(files)
}

/// Warns about shards that the index does not name, probably left by an earlier save.
fn warn_about_stray_shards(folder: &Path, files: &[MappedFile]) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let name = entry.file_name();
        let shard = name.to_string_lossy();
        if shard.starts_with("model-") && shard.ends_with(".safetensors") && !files.iter().any(|f| f.path == path) {
            log::warn!("{}: not listed in the index and ignored", path.display());
        }
    }
}
