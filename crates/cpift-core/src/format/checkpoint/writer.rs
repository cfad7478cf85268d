//! Writing checkpoints, as one file or as shards with an index, by positional writes from any
//! thread.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use crate::format::json;
use crate::format::safetensors::{FileWriter, TensorSpec};

/// Writes the tensors of a checkpoint directory, which the caller stages.
pub struct CheckpointWriter {
    files: Vec<FileWriter>,
    home: BTreeMap<String, usize>,
}

impl CheckpointWriter {
    /// Default maximum size of a shard in bytes: 5 GB, as in `save_pretrained`.
    pub const SHARD_SIZE: u64 = 5_000_000_000;

    /// Creates the safetensors files for `specs` in `folder`, with metadata `format: pt` and at
    /// most `shard_size` bytes of tensors each (a larger tensor gets a shard of its own), and an
    /// index if there is more than one file.
    pub fn create(folder: &Path, specs: &[TensorSpec], shard_size: u64) -> Result<Self> {
        let shards = split(specs, shard_size);
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        let (mut files, mut home, mut weight_map) = (Vec::new(), BTreeMap::new(), Map::new());
        for (i, shard) in shards.iter().enumerate() {
            let name = match shards.len() {
                1 => "model.safetensors".to_owned(),
                n => format!("model-{:05}-of-{n:05}.safetensors", i + 1),
            };
            for spec in shard {
                home.insert(spec.name.clone(), i);
                weight_map.insert(spec.name.clone(), Value::from(name.as_str()));
            }
            files.push(FileWriter::create(&folder.join(&name), shard, &metadata)?);
        }
        if shards.len() > 1 {
            weight_map.sort_keys();
            let total: usize = specs.iter().map(TensorSpec::nbytes).sum();
            let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
            let path = folder.join("model.safetensors.index.json");
            fs::write(&path, json::to_text(&index)?).with_context(|| format!("writing {}", path.display()))?;
        }
        Ok(Self { files, home })
    }

    /// Number of files that [`CheckpointWriter::create`] creates.
    pub fn shards(specs: &[TensorSpec], shard_size: u64) -> usize {
        split(specs, shard_size).len()
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
        self.files[self.home[name]].write(name, offset, bytes)
    }
}

/// Distributes tensors over shards in bytewise name order.
fn split(specs: &[TensorSpec], shard_size: u64) -> Vec<Vec<TensorSpec>> {
    let mut sorted = specs.to_vec();
    sorted.sort_by(|a, b| a.name.cmp(&b.name));
    let mut shards: Vec<Vec<TensorSpec>> = vec![Vec::new()];
    let mut filled = 0u64;
    for spec in sorted {
        let bytes = spec.nbytes() as u64;
        if filled > 0 && filled + bytes > shard_size {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        shards.last_mut().expect("there is always one shard").push(spec);
    }
    shards
}
