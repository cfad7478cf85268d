//! A mapped checkpoint: all names are checked once, so that views cannot fail afterwards. Prefixes
//! that wrappers leave in tensor names (`torch.compile`, `DistributedDataParallel`, FSDP, PEFT,
//! Lightning) are taken off.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::Result;

use super::derive::{Derived, LowRank, Rows, Scale};
use super::diagnose;
use super::layout::Layout;
use crate::error::BadInput;
use crate::format::digest::Digest;
use crate::format::dtype::{Dtype, Float};
use crate::format::safetensors::{Entry, MappedFile, TensorSpec};
use crate::log_once;

/// Name of the output embedding.
pub(super) const HEAD: &str = "lm_head.weight";
/// Name of the input embedding.
const EMBEDDING: &str = "model.embed_tokens.weight";

/// A mapped checkpoint. Tensor names are those of the model, without the prefixes of wrappers.
pub struct Checkpoint {
    /// Path as given.
    pub(super) root: PathBuf,
    /// Directory of config.json and tokenizer; none for a bare file.
    folder: Option<PathBuf>,
    layout: Layout,
    files: Vec<MappedFile>,
    /// Index of the file of each tensor, and its entry there.
    home: BTreeMap<String, (usize, Entry)>,
    tied: bool,
    /// True if the input embedding also serves as the output embedding, which has no tensor.
    head_is_embedding: bool,
    /// Tensors that are computed while they are read.
    derived: BTreeMap<String, Derived>,
    /// Stored tensors that are not tensors of the model: scales of others.
    hidden: BTreeSet<String>,
    /// Stored names by the names that the tensors have in another checkpoint of the model; empty if
    /// they are the same.
    aliases: BTreeMap<String, String>,
    /// Parameters that count as other tensors, see [`Checkpoint::skip`].
    skipped: BTreeSet<String>,
    /// Tensors of an adapter that stand for those of the model.
    replaced: BTreeMap<String, (usize, Entry)>,
    /// Adapters that are applied in order, and the digests of their files.
    adapters: Vec<(PathBuf, Digest)>,
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
    /// Little-endian elements as stored, row-major.
    pub bytes: &'a [u8],
    /// File that contains the tensor.
    pub file: &'a Path,
    /// Computation of its elements from the stored ones.
    pub(crate) derived: Option<&'a Derived>,
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
    /// Taken out of the parameters by [`Checkpoint::skip`].
    Skipped,
}

impl Checkpoint {
    /// Puts the files of all components together.
    pub(super) fn assemble(root: &Path, layout: Layout, parts: Vec<(String, Vec<MappedFile>)>) -> Result<Self> {
        let mut home: BTreeMap<String, (usize, Entry)> = BTreeMap::new();
        let mut all: Vec<MappedFile> = Vec::new();
        for (component, files) in parts {
            let names =
                files.iter().flat_map(|file| file.entries.keys().map(|name| (name.as_str(), file.path.as_path())));
            let clean = Wrappers::find(root, names)?;
            let first_file = all.len();
            for (i, file) in files.iter().enumerate() {
                for (stored, entry) in &file.entries {
                    let name = match component.as_str() {
                        "" => clean.name(stored),
                        component => format!("{component}/{}", clean.name(stored)),
                    };
                    if let Some((first, _)) = home.insert(name.clone(), (first_file + i, entry.clone())) {
                        let (message, other) = match first == first_file + i {
                            true => ("two tensors have this name once wrapper prefixes are removed", stored.clone()),
                            false => {
                                let other = files.get(first.wrapping_sub(first_file)).map(|f| f.path.display());
                                let place = other.map_or(String::new(), |path| format!("also in {path}"));
                                ("a tensor is in two shards", place)
                            }
                        };
                        return Err(BadInput::new(&file.path, message).tensor(name).found(other).into());
                    }
                }
            }
            all.extend(files);
        }
        Ok(Self {
            root: root.to_owned(),
            folder: root.is_dir().then(|| root.to_owned()),
            layout,
            files: all,
            home,
            tied: false,
            head_is_embedding: false,
            derived: BTreeMap::new(),
            hidden: BTreeSet::new(),
            replaced: BTreeMap::new(),
            aliases: BTreeMap::new(),
            skipped: BTreeSet::new(),
            adapters: Vec::new(),
        })
    }

    /// Determines whether the embeddings are tied: as `asked` by config.json, or else by the
    /// presence of an output embedding. As in transformers 5, two tensors with different values are
    /// two parameters whatever config.json says, and a tied checkpoint may store its embedding
    /// under either name.
    pub(super) fn find_head(&mut self, asked: Option<bool>) {
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
            if let Some(derived) = self.derived.get(EMBEDDING).filter(|_| self.head_is_embedding) {
                self.derived.insert(HEAD.to_owned(), derived.clone());
            }
        }
    }

    /// Returns true if `name`, with `numel` elements, can be the output embedding that this
    /// checkpoint ties to its input embedding.
    pub fn ties(&self, name: &str, numel: u64) -> bool {
        self.tied && name == HEAD && self.get(EMBEDDING).is_some_and(|view| view.numel() as u64 == numel)
    }

    /// Returns the name under which `name` is stored. They differ only for the output embedding
    /// added by [`Checkpoint::untie`].
    pub fn stored_name<'a>(&'a self, name: &'a str) -> &'a str {
        let name = if self.is_added_head(name) { EMBEDDING } else { name };
        self.aliases.get(name).map_or(name, String::as_str)
    }

    /// Takes `names` out of the parameters, so that they count as other tensors of the checkpoint.
    pub fn skip(&mut self, names: impl IntoIterator<Item = String>) {
        self.skipped.extend(names);
    }

    /// Gives the tensors the names that they have in `like`, if those differ by one prefix, and
    /// returns a description of the change. Nothing happens if the names are the same, or if no
    /// prefix or several make them so.
    pub fn align_names(&mut self, like: &Self) -> Option<String> {
        let ours: Vec<String> = self.parameters().map(|view| view.name.to_owned()).collect();
        let theirs: BTreeSet<&str> = like.parameters().map(|view| view.name).collect();
        if ours.iter().any(|name| theirs.contains(name.as_str())) {
            return None;
        }
        let mut changes: BTreeMap<String, (bool, String)> = BTreeMap::new();
        for (added, names) in [(true, &mut theirs.iter().copied()), (false, &mut ours.iter().map(String::as_str))]
            as [(bool, &mut dyn Iterator<Item = &str>); 2]
        {
            for name in names {
                for (at, _) in name.match_indices('.') {
                    let prefix = &name[..=at];
                    changes.insert(format!("{added}{prefix}"), (added, prefix.to_owned()));
                }
            }
        }
        let renamed = |added: bool, prefix: &str, name: &str| match added {
            true => format!("{prefix}{name}"),
            false => name.strip_prefix(prefix).unwrap_or(name).to_owned(),
        };
        let enough = ours.len().min(theirs.len());
        let same = |name: &String, new: &String| {
            like.get(new).is_some_and(|view| self.get(name).is_some_and(|own| own.shape == view.shape))
        };
        let fits = |(added, prefix): &&(bool, String)| {
            let pairs = ours.iter().map(|name| (name, renamed(*added, prefix, name)));
            pairs.filter(|(name, new)| theirs.contains(new.as_str()) && same(name, new)).count() == enough
        };
        let mut fitting = changes.values().filter(fits);
        let (Some((added, prefix)), None) = (fitting.next(), fitting.next()) else { return None };
        let aliases: BTreeMap<String, String> =
            self.home.keys().map(|name| (renamed(*added, prefix, name), name.clone())).collect();
        if aliases.len() < self.home.len() {
            return None;
        }
        self.aliases = aliases;
        let done = if *added { "added to" } else { "removed from" };
        Some(format!("the prefix {prefix} is {done} the names of {}", self.root.display()))
    }

    /// Returns true if `name` is the output embedding added by [`Checkpoint::untie`].
    fn is_added_head(&self, name: &str) -> bool {
        self.head_is_embedding && name == HEAD
    }

    /// Names of the weight files and the metadata in them.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Files and directories that were opened: the model and the adapter.
    pub fn inputs(&self) -> impl Iterator<Item = &Path> {
        let model = self.folder.as_deref().or_else(|| self.files.first().map(|file| file.path.as_path()));
        model.into_iter().chain(self.adapters.iter().map(|(path, _)| path.as_path()))
    }

    /// Returns the digest of this checkpoint, given that of its stored tensors and side files: an
    /// adapter is a part of the content.
    pub fn with_adapter(&self, stored: Digest) -> Digest {
        let with =
            |digest: Digest, (_, own): &(PathBuf, Digest)| Digest::of_chunks([digest.to_string(), own.to_string()]);
        self.adapters.iter().fold(stored, with)
    }

    /// Merges an adapter: replaces stored tensors by those of `file`, and adds computed ones.
    pub(super) fn adapt(
        &mut self,
        path: PathBuf,
        digest: Digest,
        file: MappedFile,
        replaced: Vec<(String, Entry)>,
        products: Vec<(String, LowRank)>,
    ) {
        self.files.push(file);
        for (name, entry) in replaced {
            self.replaced.insert(name, (self.files.len() - 1, entry));
        }
        for (name, product) in products {
            self.derived.entry(name).or_default().low_rank.push(product);
        }
        self.adapters.push((path, digest));
    }

    /// Multiplies the tensor `name` by `scale`, which is stored as the tensor `hidden`.
    pub(super) fn scale(&mut self, name: String, hidden: Vec<String>, scale: Scale) {
        self.hidden.extend(hidden);
        self.derived.entry(name).or_default().scale = Some(scale);
    }

    /// Gives the matrix `name` other rows.
    ///
    /// # Panics
    /// If the checkpoint has no such tensor.
    pub fn map_rows(&mut self, name: &str, rows: Rows) {
        let stored = self.stored_name(name).to_owned();
        assert!(self.home.contains_key(&stored), "{name} is stored");
        // An added output embedding has rows of its own: other models may give them.
        let key = if self.is_added_head(name) { HEAD.to_owned() } else { stored };
        self.derived.entry(key).or_default().map_rows(rows);
    }

    /// Returns true if [`Checkpoint::map_rows`] was called.
    pub fn has_mapped_rows(&self) -> bool {
        self.derived.values().any(|derived| derived.rows.is_some())
    }

    /// Hides a stored tensor that is no tensor of the model.
    pub(super) fn hide(&mut self, name: String) {
        self.hidden.insert(name);
    }

    /// Directory or file that was opened, or `MODEL+ADAPTER`.
    pub fn path(&self) -> &Path {
        &self.root
    }

    /// Directory of the checkpoint; none for a bare file.
    pub fn folder(&self) -> Option<&Path> {
        self.folder.as_deref()
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

    /// All tensors as stored, in bytewise name order.
    pub fn tensors(&self) -> impl Iterator<Item = TensorView<'_>> {
        self.home.iter().map(|(name, place)| self.stored(name, place))
    }

    /// Returns the tensor stored as `name`, if there is one.
    pub fn stored_tensor(&self, name: &str) -> Option<TensorView<'_>> {
        let (name, place) = self.home.get_key_value(name)?;
        Some(self.stored(name, place))
    }

    /// Tensors of the model, in bytewise name order.
    fn of_model(&self) -> impl Iterator<Item = TensorView<'_>> {
        let stored = self.home.keys().filter(|_| self.aliases.is_empty());
        let visible = stored.chain(self.aliases.keys()).filter(|name| !self.hidden.contains(self.stored_name(name)));
        visible.map(|name| self.get(name).expect("it is a stored tensor"))
    }

    /// Returns the tensor `name` of the model, if there is one.
    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        if self.is_added_head(name) {
            let stored = self.stored_name(HEAD);
            let place = self.replaced.get(stored).or_else(|| self.home.get(stored))?;
            return Some(self.computed(self.stored(HEAD, place), HEAD));
        }
        let (name, stored) = match self.aliases.is_empty() {
            true => self.home.get_key_value(name).map(|(name, _)| (name, name))?,
            false => self.aliases.get_key_value(name)?,
        };
        if self.hidden.contains(stored) {
            return None;
        }
        let view = self.stored(name, self.replaced.get(stored).unwrap_or(&self.home[stored]));
        Some(self.computed(view, stored))
    }

    /// A view of stored elements with the computation that `key` names in place of any other.
    fn computed<'a>(&'a self, view: TensorView<'a>, key: &str) -> TensorView<'a> {
        let derived = self.derived.get(key);
        TensorView { derived, shape: derived.and_then(Derived::shape).unwrap_or(view.shape), ..view }
    }

    fn stored<'a>(&'a self, name: &'a str, (i, entry): &'a (usize, Entry)) -> TensorView<'a> {
        let file = &self.files[*i];
        let (shape, bytes) = (entry.shape.as_slice(), file.bytes(entry));
        TensorView { name, dtype: entry.dtype, shape, bytes, file: &file.path, derived: None }
    }

    /// The D parameters in bytewise name order: floating-point tensors, without known buffers, and
    /// tied tensors once.
    pub fn parameters(&self) -> impl Iterator<Item = TensorView<'_>> {
        let made = self.head_is_embedding.then(|| self.get(HEAD)).flatten();
        let (before, after): (Vec<_>, Vec<_>) =
            self.of_model().filter(|view| self.excluded(view).is_none()).partition(|view| view.name < HEAD);
        before.into_iter().chain(made).chain(after)
    }

    /// Tensors that are not parameters, with the reason.
    pub fn not_parameters(&self) -> impl Iterator<Item = (TensorView<'_>, Excluded)> {
        self.of_model().filter_map(|view| Some((view, self.excluded(&view)?)))
    }

    fn excluded(&self, view: &TensorView<'_>) -> Option<Excluded> {
        if self.skipped.contains(view.name) {
            Some(Excluded::Skipped)
        } else if is_buffer(view.name) {
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
        match self.derived.and_then(Derived::shape) {
            None => self.bytes.len() / self.dtype.size(),
            Some(shape) => shape.iter().product(),
        }
    }

    /// The same tensor under the name that it has in an output.
    pub fn named(self, name: &'a str) -> Self {
        Self { name, ..self }
    }

    /// Dtype as which an output stores this tensor, if nothing else is asked for.
    pub fn output_dtype(&self) -> Dtype {
        self.derived.and_then(|derived| derived.scale.as_ref()).map_or(self.dtype, |scale| scale.dtype)
    }

    /// Returns true if the elements are those that are stored, none computed.
    pub fn is_plain(&self) -> bool {
        self.derived.is_none()
    }

    /// Returns true if `bytes` are the elements of the stored tensor of this name, so that they can
    /// be hashed while the tensor is read.
    pub fn is_as_stored(&self, checkpoint: &Checkpoint) -> bool {
        let stored = checkpoint.stored_tensor(checkpoint.stored_name(self.name));
        stored.is_some_and(|stored| stored.bytes.as_ptr() == self.bytes.as_ptr() && self.numel() == stored.numel())
    }

    /// Bytes of the stored elements `start..start + len`.
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
        match self.derived {
            None => T::read(self.dtype, self.slice(start, out.len()), out),
            Some(derived) => derived.read(self.dtype, self.bytes, start, out),
        }
    }

    /// Name, dtype and shape, for writing a tensor like this one.
    pub fn spec(&self) -> TensorSpec {
        TensorSpec { name: self.name.to_owned(), dtype: self.output_dtype(), shape: self.shape.to_vec() }
    }
}

/// Returns true for buffers in old checkpoints that the model computes itself.
pub(super) fn is_buffer(name: &str) -> bool {
    let in_rotary = |buffer: &&str| name.strip_suffix(*buffer).is_some_and(|before| before.ends_with("rotary_emb."));
    name.rsplit('.').next() == Some("inv_freq") || ["cos_cached", "sin_cached"].iter().any(in_rotary)
}

/// Returns true if two tensors have the same shape and values; their floating-point dtypes may
/// differ.
fn same_values(a: &TensorView<'_>, b: &TensorView<'_>) -> bool {
    const BLOCK: usize = 1 << 12;
    if a.shape != b.shape || !a.dtype.is_float() || !b.dtype.is_float() {
        return false;
    }
    let plain = a.derived.is_none() && b.derived.is_none();
    if plain && a.dtype == b.dtype && a.bytes == b.bytes {
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
                .expected("F64, F32, F16, BF16 or F8")
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
                .expected("F64, F32, F16, BF16 or F8")
                .found(expected.dtype.name())
                .into());
        }
    }
    Ok(())
}

/// Prefixes that wrappers of a whole model add to all names.
const PREFIXES: [&str; 5] = ["_orig_mod.", "module.", "base_model.model.", "_fsdp_wrapped_module.", "_forward_module."];

/// Name parts that wrappers of single layers add; no module of a model has such a name.
const INSIDE: [&str; 3] = ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."];

/// Wrapper prefixes of the tensor names of a checkpoint.
struct Wrappers {
    /// Prefix that all names share, such as `module._orig_mod.`.
    prefix: String,
}

impl Wrappers {
    /// Finds the prefixes of the tensors `names`, each given with its file, in the checkpoint at
    /// `root`.
    ///
    /// # Errors
    /// [`BadInput`] if only some names have a prefix, or if there are tensors of an adapter.
    fn find<'a>(root: &Path, names: impl Iterator<Item = (&'a str, &'a Path)> + Clone) -> Result<Self> {
        if let Some((name, file)) = names.clone().find(|(name, _)| diagnose::is_adapter_tensor(name)) {
            return Err(diagnose::adapter_tensor(root, file, name).into());
        }
        let mut prefix = String::new();
        loop {
            let rest = |name: &'a str| &name[prefix.len()..];
            let Some((first, _)) = names.clone().next() else { break };
            // A LightningModule stores the model in its attribute `model`.
            let lightning = names
                .clone()
                .all(|(name, _)| ["model.model.", "model.lm_head."].iter().any(|start| rest(name).starts_with(start)));
            let found =
                if lightning { Some("model.") } else { PREFIXES.into_iter().find(|p| rest(first).starts_with(p)) };
            let partly = |p: &str| names.clone().find(|(name, _)| !rest(name).starts_with(p));
            match found {
                Some(p) => match partly(p) {
                    None => prefix += p,
                    Some((without, file)) => return Err(mixed(file, p, first, without).into()),
                },
                None => {
                    let with = |(name, _): &(&'a str, _)| PREFIXES.into_iter().find(|p| rest(name).starts_with(p));
                    if let Some(pair) = names.clone().find(|pair| with(pair).is_some()) {
                        return Err(mixed(pair.1, with(&pair).unwrap_or_default(), pair.0, first).into());
                    }
                    break;
                }
            }
        }
        if !prefix.is_empty() {
            log_once::info(format!("{}: all names begin with {prefix}, which is removed", root.display()));
        }
        Ok(Self { prefix })
    }

    /// Returns the name of the tensor `name` in the model.
    fn name(&self, name: &str) -> String {
        let name = &name[self.prefix.len()..];
        INSIDE
            .iter()
            .fold(name.to_owned(), |name, part| if name.contains(part) { name.replace(part, "") } else { name })
    }
}

fn mixed(file: &Path, prefix: &str, with: &str, without: &str) -> BadInput {
    BadInput::new(file, format!("some names begin with the prefix {prefix} of a wrapper and others do not"))
        .tensor(with)
        .expected(format!("{prefix} on all names or on none"))
        .found(format!("{without} without it"))
        .hint("save the unwrapped model: call its save_pretrained, not the one of the wrapper")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clean(names: &[&str]) -> Result<Vec<String>> {
        let file = Path::new("m.safetensors");
        let wrappers = Wrappers::find(file, names.iter().map(|name| (*name, file)))?;
        Ok(names.iter().map(|name| wrappers.name(name)).collect())
    }

    #[test]
    fn common_prefixes_are_removed_in_any_nesting() {
        let own = ["lm_head.weight", "model.layers.0.w", "model.norm.weight"];
        for prefix in
            ["", "_orig_mod.", "module.", "base_model.model.", "module._orig_mod.", "_orig_mod.module.", "model."]
        {
            let named: Vec<String> = own.iter().map(|name| format!("{prefix}{name}")).collect();
            let named: Vec<&str> = named.iter().map(String::as_str).collect();
            assert_eq!(clean(&named).unwrap(), own, "{prefix}");
        }
    }

    #[test]
    fn layer_wrappers_are_removed() {
        let names = ["lm_head.weight", "model.layers.0._orig_mod.w", "model.layers.1._checkpoint_wrapped_module.w"];
        assert_eq!(clean(&names).unwrap(), ["lm_head.weight", "model.layers.0.w", "model.layers.1.w"]);
    }

    #[test]
    fn a_prefix_on_only_some_names_is_refused() {
        for names in [["module.a", "b"], ["a", "module.b"]] {
            let error = clean(&names).unwrap_err().to_string();
            assert!(error.contains("the prefix module. of a wrapper"), "{error}");
        }
    }

    #[test]
    fn adapters_are_refused() {
        let error = clean(&["base_model.model.model.layers.0.q_proj.lora_A.weight"]).unwrap_err().to_string();
        assert!(error.contains("adapter"), "{error}");
    }
}
