//! Writing checkpoints, as one file or as shards with an index, by positional writes from any
//! thread.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use super::layout::Layout;
use crate::format::json;
use crate::format::safetensors::{FileWriter, TensorSpec};

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
