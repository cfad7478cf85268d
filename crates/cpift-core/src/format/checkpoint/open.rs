//! Opening checkpoints: the weight files of a directory are found and mapped, scales and adapters
//! attached.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use serde::Deserialize;
use serde_json::Value;

use super::layout::{self, Layout, Place, WeightSet};
use super::reader::{Checkpoint, HEAD, is_buffer};
use super::sidecar::{read_config, tied};
use super::{adapter, diagnose, fp8};
use crate::error::BadInput;
use crate::format::json;
use crate::format::safetensors::MappedFile;
use crate::hub;
use crate::log_once;

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Opens a Hugging Face directory, a bare .safetensors file, or `MODEL+ADAPTER`, a model whose
    /// weights are those of MODEL with ADAPTER merged into them.
    ///
    /// # Errors
    /// [`BadInput`] if something is missing, damaged, duplicated or only available as a pickle.
    pub fn open(path: &Path) -> Result<Self> {
        if let Some((model, lora)) = adapter::split(path) {
            let mut checkpoint = Self::open(&model)?;
            checkpoint.root = path.to_owned();
            adapter::apply(&mut checkpoint, &lora)?;
            return Ok(checkpoint);
        }
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
        let layout = Layout::of_file(&file.metadata);
        let mut checkpoint = Self::assemble(path, layout, vec![(String::new(), vec![file])])?;
        fp8::attach(&mut checkpoint, &Value::Null)?;
        Ok(checkpoint)
    }

    fn open_folder(folder: &Path) -> Result<Self> {
        let sets = layout::find(folder)?;
        let mut parts = Vec::new();
        for set in &sets {
            let files = match &set.place {
                Place::Single(file) => vec![MappedFile::open(file)?],
                Place::Index(index) => open_shards(set, index)?,
            };
            parts.push((set.component.clone(), files));
        }
        if folder.join("adapter_config.json").exists() {
            log_once::warn(format!(
                "{}: adapter_config.json is ignored: the weights beside it are read as the model",
                folder.display()
            ));
        }
        let all = |files: &Vec<MappedFile>| files.iter().rev().flat_map(|file| file.metadata.clone()).collect();
        let layout = Layout::of_sets(sets.iter().zip(&parts).map(|(set, (_, files))| (set, all(files))));
        let mut checkpoint = Self::assemble(folder, layout, parts)?;
        let config = folder.join("config.json").exists().then(|| read_config(folder)).transpose()?;
        if let Some(config) = &config {
            checkpoint.find_head(tied(config));
        }
        fp8::attach(&mut checkpoint, config.as_ref().unwrap_or(&Value::Null))?;
        Ok(checkpoint)
    }
}

fn open_shards(set: &WeightSet, index_path: &Path) -> Result<Vec<MappedFile>> {
    let folder = set.folder.as_path();
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
