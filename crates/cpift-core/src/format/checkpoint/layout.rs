//! Weight files of a checkpoint: those of a directory that are its weights, and those of an output
//! in the same layout, written as one file or as shards with an index.
//!
//! | directory | weights |
//! | --- | --- |
//! | transformers | `model.safetensors`, or shards with `model.safetensors.index.json` |
//! | a diffusers component | `diffusion_pytorch_model.safetensors`, or shards with an index |
//! | a variant of diffusers | `diffusion_pytorch_model.fp16.safetensors`, or shards with an index |
//! | any other | the only set of files, such as `consolidated.safetensors` |
//!
//! In a directory whose config.json describes a transformers model, only the first row counts:
//! transformers loads no files with other names.
//!
//! A directory with `modules.json` (sentence-transformers) or `model_index.json` (diffusers) has
//! components in subdirectories, whose tensors are called `COMPONENT/NAME`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use super::diagnose;
use crate::error::BadInput;
use crate::files::list;
use crate::format::json;
use crate::format::safetensors::{FileWriter, TensorSpec};
use crate::log_once;

/// Names of weight files that may have a variant, such as `model.fp16.safetensors`.
const STEMS: [&str; 3] = ["model", "diffusion_pytorch_model", "pytorch_model"];

/// Name of the metadata of a checkpoint that transformers and diffusers ask for.
const FORMAT: (&str, &str) = ("format", "pt");

/// Metadata that describes the content of the weights, and so does not hold for a merged output.
const HASHES: [&str; 3] = ["modelspec.hash_sha256", "sshs_legacy_hash", "sshs_model_hash"];

/// Names of the weight files of a checkpoint and the metadata in them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// True for a bare file.
    pub is_file: bool,
    /// Components; the first has the empty name, unless the directory itself has no weights.
    parts: Vec<Part>,
}

/// One component.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Part {
    /// Subdirectory, or empty for the directory itself.
    component: String,
    stem: String,
    variant: Option<String>,
    metadata: BTreeMap<String, String>,
}

impl Default for Layout {
    /// The layout of `save_pretrained`.
    fn default() -> Self {
        let metadata = BTreeMap::from([(FORMAT.0.to_owned(), FORMAT.1.to_owned())]);
        Self {
            is_file: false,
            parts: vec![Part { component: String::new(), stem: "model".into(), variant: None, metadata }],
        }
    }
}

impl Layout {
    /// The layout of a bare file with `metadata`.
    pub(super) fn of_file(metadata: &BTreeMap<String, String>) -> Self {
        let part = Part { component: String::new(), stem: String::new(), variant: None, metadata: kept(metadata) };
        Self { is_file: true, parts: vec![part] }
    }

    /// The layout of a directory with the weights `sets`, each with the metadata of its files.
    pub(super) fn of_sets<'a>(sets: impl Iterator<Item = (&'a WeightSet, BTreeMap<String, String>)>) -> Self {
        let part = |(set, metadata): (&WeightSet, BTreeMap<String, String>)| Part {
            component: set.component.clone(),
            stem: set.stem.clone(),
            variant: set.variant.clone(),
            metadata: kept(&metadata),
        };
        Self { is_file: false, parts: sets.map(part).collect() }
    }

    /// Index of the part that the tensor `name` belongs to, and its name there.
    pub(super) fn place<'a>(&self, name: &'a str) -> (usize, &'a str) {
        let inside = |part: &Part| match part.component.as_str() {
            "" => None,
            component => name.strip_prefix(component)?.strip_prefix('/'),
        };
        let found = self.parts.iter().enumerate().filter_map(|(i, part)| Some((i, inside(part)?)));
        found.min_by_key(|(_, rest)| rest.len()).unwrap_or((0, name))
    }

    /// Number of components.
    pub(super) fn parts(&self) -> usize {
        self.parts.len()
    }

    /// Subdirectories with weights of the checkpoint.
    pub fn components(&self) -> impl Iterator<Item = &str> {
        self.parts.iter().map(|part| part.component.as_str()).filter(|component| !component.is_empty())
    }

    /// Metadata of the files of component `part`.
    pub(super) fn metadata(&self, part: usize) -> &BTreeMap<String, String> {
        &self.parts[part].metadata
    }

    /// Path, below the checkpoint, of file `i` of `n` of component `part`.
    pub(super) fn file(&self, part: usize, i: usize, n: usize) -> String {
        let Part { component, stem, variant, .. } = &self.parts[part];
        let variant = variant.as_ref().map_or(String::new(), |variant| format!(".{variant}"));
        let name = match n {
            1 => format!("{stem}{variant}.safetensors"),
            n => format!("{stem}{variant}-{:05}-of-{n:05}.safetensors", i + 1),
        };
        below(component, &name)
    }

    /// Path, below the checkpoint, of the index of component `part`.
    pub(super) fn index(&self, part: usize) -> String {
        let Part { component, stem, variant, .. } = &self.parts[part];
        let variant = variant.as_ref().map_or(String::new(), |variant| format!(".{variant}"));
        below(component, &format!("{stem}.safetensors.index{variant}.json"))
    }
}

fn below(component: &str, name: &str) -> String {
    if component.is_empty() { name.to_owned() } else { format!("{component}/{name}") }
}

/// Metadata that an output keeps: all but hashes of the content, with `format: pt`.
fn kept(metadata: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let mut kept = metadata.clone();
    kept.retain(|key, _| !HASHES.contains(&key.as_str()));
    kept.entry(FORMAT.0.to_owned()).or_insert_with(|| FORMAT.1.to_owned());
    kept
}

/// Weight files of one component of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct WeightSet {
    /// Directory of the files.
    pub folder: PathBuf,
    /// Subdirectory of the checkpoint, or empty.
    pub component: String,
    stem: String,
    variant: Option<String>,
    /// The single file, or the index of shards.
    pub place: Place,
}

/// Single file or index of a set of weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    Single(PathBuf),
    Index(PathBuf),
}

/// A file name taken apart.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Clone, Copy)]
enum Kind {
    Single,
    Index,
    Shard,
}

/// Returns stem, variant and kind of the name of a weight file.
fn parse(name: &str) -> Option<(String, Option<String>, Kind)> {
    if let Some((stem, rest)) = name.split_once(".safetensors.index.") {
        let variant = rest.strip_suffix("json")?;
        return Some((stem.to_owned(), variant.strip_suffix('.').map(str::to_owned), Kind::Index));
    }
    let name = name.strip_suffix(".safetensors")?;
    let (name, kind) = match name.rsplit_once("-of-") {
        Some((first, last)) if is_number(last) => match first.rsplit_once('-') {
            Some((stem, number)) if is_number(number) => (stem, Kind::Shard),
            _ => (name, Kind::Single),
        },
        _ => (name, Kind::Single),
    };
    match name.split_once('.') {
        Some((stem, variant)) if STEMS.contains(&stem) => Some((stem.to_owned(), Some(variant.to_owned()), kind)),
        _ => Some((name.to_owned(), None, kind)),
    }
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// Returns true for files of adapters, which are not the weights of a model.
fn is_adapter(stem: &str) -> bool {
    matches!(stem, "adapter_model" | "pytorch_lora_weights")
}

/// Weights of the checkpoint in `folder`: its own, then those of its components.
///
/// # Errors
/// [`BadInput`] if there are none, or several sets of which none has the usual name.
pub(super) fn find(folder: &Path) -> Result<Vec<WeightSet>> {
    let components = components(folder)?;
    let mut sets: Vec<WeightSet> = choose(folder, "")?.into_iter().collect();
    if sets.is_empty() && is_transformers(folder)? && diagnose::has_weights(folder) {
        return Err(diagnose::no_weights(folder).into());
    }
    for component in components {
        let inside = folder.join(&component);
        match choose(&inside, &component)? {
            Some(set) => sets.push(set),
            None if diagnose::has_weights(&inside) => return Err(diagnose::no_weights(&inside).into()),
            None => {}
        }
    }
    if sets.is_empty() { Err(diagnose::no_weights(folder).into()) } else { Ok(sets) }
}

/// Subdirectories that modules.json or model_index.json name as components, in bytewise order.
///
/// # Errors
/// [`BadInput`] for a file that is not JSON, or a path that leaves the directory.
pub(crate) fn components(folder: &Path) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    let modules = folder.join("modules.json");
    if modules.is_file() {
        let list: Value = json::read(&modules)?;
        let paths = list.as_array().into_iter().flatten().filter_map(|module| module.get("path")?.as_str());
        for path in paths.filter(|path| !path.is_empty()) {
            let inside = Path::new(path).components().all(|part| matches!(part, Component::Normal(_)));
            if !inside {
                return Err(BadInput::new(&modules, "names a module outside its directory").found(path).into());
            }
            found.insert(path.trim_end_matches('/').to_owned());
        }
    }
    let index = folder.join("model_index.json");
    if index.is_file() {
        let pipeline: Value = json::read(&index)?;
        let is_component = |(name, class): &(&String, &Value)| {
            class.is_array() && !name.starts_with(['_', '.']) && !name.contains(['/', '\\'])
        };
        found.extend(pipeline.as_object().into_iter().flatten().filter(is_component).map(|(name, _)| name.clone()));
    }
    found.retain(|component| folder.join(component).is_dir());
    Ok(found)
}

/// Returns true if config.json describes a transformers model.
fn is_transformers(folder: &Path) -> Result<bool> {
    let config = folder.join("config.json");
    let config: Value = if config.exists() { json::read(&config)? } else { Value::Null };
    Ok(["model_type", "architectures"].iter().any(|key| config.get(key).is_some()))
}

/// Set of weights in `folder`, if there is one.
fn choose(folder: &Path, component: &str) -> Result<Option<WeightSet>> {
    let mut sets: BTreeMap<(String, Option<String>), BTreeSet<Kind>> = BTreeMap::new();
    for entry in list(folder)? {
        let Some((stem, variant, kind)) = entry.file_name().to_str().and_then(parse) else { continue };
        if !is_adapter(&stem) && !stem.starts_with('.') {
            sets.entry((stem, variant)).or_default().insert(kind);
        }
    }
    // Shards without an index are reported by name, elsewhere.
    sets.retain(|_, kinds| kinds.iter().any(|kind| *kind != Kind::Shard));
    let usual = STEMS.iter().find(|stem| sets.contains_key(&((**stem).to_owned(), None)));
    if usual.is_none() && component.is_empty() && is_transformers(folder)? {
        return Ok(None);
    }
    let key = match (usual, sets.len()) {
        (Some(stem), _) => ((*stem).to_owned(), None),
        (None, 0) => return Ok(None),
        (None, 1) => sets.keys().next().expect("there is one").clone(),
        (None, _) => {
            let names: Vec<String> = sets.keys().map(|(stem, variant)| shown(stem, variant.as_deref())).collect();
            return Err(BadInput::new(folder, "several sets of weights, none of them with the usual name")
                .expected("model.safetensors, diffusion_pytorch_model.safetensors, or one set of files")
                .found(names.join(", "))
                .hint("name one of the files: a single .safetensors file is read by itself")
                .into());
        }
    };
    let (stem, variant) = key.clone();
    let others = sets.len() - 1;
    if others > 0 {
        log_once::info(format!(
            "{}: {} is read, and {others} other sets of weights beside it are not",
            folder.display(),
            shown(&stem, variant.as_deref())
        ));
    }
    let suffix = variant.as_ref().map_or(String::new(), |variant| format!(".{variant}"));
    let single = folder.join(format!("{stem}{suffix}.safetensors"));
    let index = folder.join(format!("{stem}.safetensors.index{suffix}.json"));
    let place = match (sets[&key].contains(&Kind::Single), sets[&key].contains(&Kind::Index)) {
        (true, true) => {
            let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            return Err(BadInput::new(folder, format!("holds both {} and {}", name(&single), name(&index)))
                .expected("one of the two")
                .hint("remove the outdated one")
                .into());
        }
        (true, false) => Place::Single(single),
        _ => Place::Index(index),
    };
    Ok(Some(WeightSet { folder: folder.to_owned(), component: component.to_owned(), stem, variant, place }))
}

fn shown(stem: &str, variant: Option<&str>) -> String {
    variant.map_or_else(|| format!("{stem}.safetensors"), |variant| format!("{stem}.{variant}.safetensors"))
}

/// Writes the tensors of a checkpoint, a directory or a file, which the caller stages.
pub struct CheckpointWriter {
    files: Vec<FileWriter>,
    /// File of each tensor and its name there.
    home: BTreeMap<String, (usize, String)>,
}

impl CheckpointWriter {
    /// Default maximum size of a shard in bytes: 5 GB, as in `save_pretrained`.
    pub const SHARD_SIZE: u64 = 5_000_000_000;

    /// As [`CheckpointWriter::create_like`], in the layout of `save_pretrained`.
    pub fn create(folder: &Path, specs: &[TensorSpec], shard_size: u64) -> Result<Self> {
        Self::create_like(&Layout::default(), folder, specs, shard_size)
    }

    /// Creates the safetensors files for `specs` in the directory `path` (for the layout of a bare
    /// file, the file `path`), under the names and with the metadata of `layout`. A file of a
    /// directory has at most `shard_size` bytes of tensors (a larger tensor gets a shard of its
    /// own); a component with more than one file has an index.
    pub fn create_like(layout: &Layout, path: &Path, specs: &[TensorSpec], shard_size: u64) -> Result<Self> {
        let mut writer = Self { files: Vec::new(), home: BTreeMap::new() };
        for (part, specs) in by_part(layout, specs).into_iter().enumerate() {
            if specs.is_empty() && part > 0 {
                continue;
            }
            writer.create_part(layout, part, path, &specs, shard_size)?;
        }
        Ok(writer)
    }

    /// Creates the files of one component, for `specs` whose first part is the name of the tensor
    /// in the checkpoint.
    fn create_part(
        &mut self,
        layout: &Layout,
        part: usize,
        path: &Path,
        specs: &[(String, TensorSpec)],
        shard_size: u64,
    ) -> Result<()> {
        let shards = split(specs, if layout.is_file { u64::MAX } else { shard_size });
        let mut weight_map = Map::new();
        for (i, shard) in shards.iter().enumerate() {
            let name = layout.file(part, i, shards.len());
            let file = if layout.is_file { path.to_owned() } else { path.join(&name) };
            if let Some(folder) = file.parent().filter(|folder| !layout.is_file && !folder.exists()) {
                fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
            }
            let short = name.rsplit('/').next().unwrap_or(&name);
            for (full, spec) in shard {
                self.home.insert(full.clone(), (self.files.len(), spec.name.clone()));
                weight_map.insert(spec.name.clone(), Value::from(short));
            }
            let specs: Vec<TensorSpec> = shard.iter().map(|(_, spec)| spec.clone()).collect();
            self.files.push(FileWriter::create(&file, &specs, layout.metadata(part))?);
        }
        if shards.len() > 1 {
            weight_map.sort_keys();
            let total: usize = specs.iter().map(|(_, spec)| spec.nbytes()).sum();
            let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
            let path = path.join(layout.index(part));
            fs::write(&path, json::to_text(&index)?).with_context(|| format!("writing {}", path.display()))?;
        }
        Ok(())
    }

    /// Number of files that [`CheckpointWriter::create_like`] creates.
    pub fn shards(layout: &Layout, specs: &[TensorSpec], shard_size: u64) -> usize {
        let size = if layout.is_file { u64::MAX } else { shard_size };
        let parts = by_part(layout, specs).into_iter().enumerate();
        parts.filter(|(part, specs)| *part == 0 || !specs.is_empty()).map(|(_, specs)| split(&specs, size).len()).sum()
    }

    /// Syncs everything written so far to disk. Other threads may continue writing.
    pub fn sync(&self) -> Result<()> {
        self.files.iter().try_for_each(FileWriter::sync)
    }

    /// Writes `bytes` at byte `offset` of the tensor `name`.
    ///
    /// # Panics
    /// If the tensor is not among the specs or the bytes extend past its end.
    pub fn write(&self, name: &str, offset: u64, bytes: &[u8]) -> Result<()> {
        let (file, name) = &self.home[name];
        self.files[*file].write(name, offset, bytes)
    }
}

/// The tensors of each component, with their names in the checkpoint and their specs in the file.
fn by_part(layout: &Layout, specs: &[TensorSpec]) -> Vec<Vec<(String, TensorSpec)>> {
    let mut parts = vec![Vec::new(); layout.parts()];
    for spec in specs {
        let (part, name) = layout.place(&spec.name);
        parts[part].push((spec.name.clone(), TensorSpec { name: name.to_owned(), ..spec.clone() }));
    }
    parts
}

/// Distributes tensors over shards in bytewise name order.
fn split(specs: &[(String, TensorSpec)], shard_size: u64) -> Vec<Vec<(String, TensorSpec)>> {
    let mut sorted = specs.to_vec();
    sorted.sort_by(|a, b| a.0.cmp(&b.0));
    let mut shards: Vec<Vec<(String, TensorSpec)>> = vec![Vec::new()];
    let mut filled = 0u64;
    for spec in sorted {
        let bytes = spec.1.nbytes() as u64;
        if filled > 0 && filled + bytes > shard_size {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        shards.last_mut().expect("there is always one shard").push(spec);
    }
    shards
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_apart_and_put_together_again() {
        for (name, stem, variant, kind) in [
            ("model.safetensors", "model", None, Kind::Single),
            ("model.fp16.safetensors", "model", Some("fp16"), Kind::Single),
            ("model-00001-of-00002.safetensors", "model", None, Kind::Shard),
            ("model.safetensors.index.json", "model", None, Kind::Index),
            ("model.safetensors.index.fp16.json", "model", Some("fp16"), Kind::Index),
            ("diffusion_pytorch_model.non_ema.safetensors", "diffusion_pytorch_model", Some("non_ema"), Kind::Single),
            ("sd_xl_base_1.0.safetensors", "sd_xl_base_1.0", None, Kind::Single),
            ("consolidated.safetensors", "consolidated", None, Kind::Single),
            ("a-of-b.safetensors", "a-of-b", None, Kind::Single),
        ] {
            assert_eq!(parse(name), Some((stem.to_owned(), variant.map(str::to_owned), kind)), "{name}");
            let set = WeightSet {
                folder: PathBuf::new(),
                component: String::new(),
                stem: stem.to_owned(),
                variant: variant.map(str::to_owned),
                place: Place::Single(PathBuf::new()),
            };
            let layout = Layout::of_sets([(&set, BTreeMap::new())].into_iter());
            let again = match kind {
                Kind::Single => layout.file(0, 0, 1),
                Kind::Shard => layout.file(0, 0, 2),
                Kind::Index => layout.index(0),
            };
            assert_eq!(again, name);
        }
        assert_eq!(parse("model.bin"), None);
    }

    #[test]
    fn hashes_of_the_content_are_dropped_and_the_format_is_added() {
        let text = |pairs: &[(&str, &str)]| {
            pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect::<BTreeMap<String, String>>()
        };
        let found = kept(&text(&[("sshs_model_hash", "1"), ("ss_seed", "7"), ("modelspec.title", "t")]));
        assert_eq!(found, text(&[("format", "pt"), ("ss_seed", "7"), ("modelspec.title", "t")]));
    }
}
