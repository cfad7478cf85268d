//! Checkpoints in any layout that the format allows: tensors in any order, shard and alignment.
//! Conversions without code of this project.

use std::fs;
use std::path::{Path, PathBuf};

use cpift_core::Dtype;
use half::{bf16, f16};
use serde_json::{Map, json};
use tempfile::TempDir;

use crate::{Numbers, Tensor, Tensors};

/// Temporary directory, in /dev/shm if available, so that tests with thousands of outputs do not
/// wait for a disk.
///
/// # Panics
/// On I/O errors.
pub fn memory_dir() -> TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory).unwrap() } else { tempfile::tempdir().unwrap() }
}

impl Tensor {
    /// Elements as f64, converted without code of this project.
    pub fn numbers(&self) -> Vec<f64> {
        fn each<const N: usize>(bytes: &[u8], convert: impl Fn([u8; N]) -> f64) -> Vec<f64> {
            bytes.as_chunks().0.iter().map(|chunk| convert(*chunk)).collect()
        }
        match self.dtype {
            Dtype::F64 => each(&self.bytes, f64::from_le_bytes),
            Dtype::F32 => each(&self.bytes, |b| f32::from_le_bytes(b).into()),
            Dtype::F16 => each(&self.bytes, |b| f16::from_le_bytes(b).into()),
            Dtype::BF16 => each(&self.bytes, |b| bf16::from_le_bytes(b).into()),
            other => panic!("{other} is not floating-point"),
        }
    }

    /// Creates a tensor of `values`, rounded to `dtype` without code of this project.
    pub fn of_numbers(dtype: Dtype, shape: &[usize], values: &[f64]) -> Self {
        assert_eq!(values.len(), shape.iter().product::<usize>());
        let bytes = match dtype {
            Dtype::F64 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Dtype::F32 => values.iter().flat_map(|v| (*v as f32).to_le_bytes()).collect(),
            Dtype::F16 => values.iter().flat_map(|v| f16::from_f64(*v).to_le_bytes()).collect(),
            Dtype::BF16 => values.iter().flat_map(|v| bf16::from_f64(*v).to_le_bytes()).collect(),
            other => panic!("{other} is not floating-point"),
        };
        Self { dtype, shape: shape.to_vec(), bytes }
    }
}

/// Writes a checkpoint directory with a random layout: one file or up to as many shards as tensors,
/// tensors in any order, and headers of any length, so that elements are not aligned.
///
/// # Panics
/// On I/O errors.
pub fn write_anyhow(folder: &Path, tensors: &Tensors, seed: u64) -> PathBuf {
    let mut numbers = Numbers(seed);
    fs::create_dir_all(folder).unwrap();
    let config = json!({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32"});
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let shards = 1 + numbers.bits() as usize % tensors.len().max(1);
    let mut parts: Vec<Vec<(&String, &Tensor)>> = vec![Vec::new(); shards];
    for entry in tensors {
        let part = &mut parts[numbers.bits() as usize % shards];
        let place = numbers.bits() as usize % (part.len() + 1);
        part.insert(place, entry);
    }
    parts.retain(|part| !part.is_empty());
    if let [part] = parts.as_slice() {
        write_part(&folder.join("model.safetensors"), part, numbers.bits());
        return folder.to_owned();
    }
    let mut map = Map::new();
    for (i, part) in parts.iter().enumerate() {
        let name = format!("model-{:05}-of-{:05}.safetensors", i + 1, parts.len());
        write_part(&folder.join(&name), part, numbers.bits());
        map.extend(part.iter().map(|(tensor, _)| ((*tensor).clone(), name.clone().into())));
    }
    let index = json!({"metadata": {}, "weight_map": map});
    fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
    folder.to_owned()
}

fn write_part(path: &Path, tensors: &[(&String, &Tensor)], seed: u64) {
    let mut header = Map::new();
    let mut at = 0;
    for (name, tensor) in tensors {
        let end = at + tensor.bytes.len();
        let entry = json!({"dtype": tensor.dtype.name(), "shape": tensor.shape, "data_offsets": [at, end]});
        header.insert((*name).clone(), entry);
        at = end;
    }
    let text = serde_json::Value::Object(header).to_string() + &" ".repeat(seed as usize % 9);
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text.bytes());
    tensors.iter().for_each(|(_, tensor)| bytes.extend(&tensor.bytes));
    fs::write(path, bytes).unwrap();
}

/// Installs a logger that discards everything, for tests whose hundreds of runs in one process are
/// expected to warn.
pub fn silence() {
    struct Silent;
    impl log::Log for Silent {
        fn enabled(&self, _: &log::Metadata<'_>) -> bool {
            false
        }
        fn log(&self, _: &log::Record<'_>) {}
        fn flush(&self) {}
    }
    // Fails if another test has already installed this logger.
    let _ = log::set_logger(&Silent);
}

/// Runs `work` in a pool of `threads` threads.
///
/// # Panics
/// If they cannot be started.
pub fn with_threads<R: Send>(threads: usize, work: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(work)
}
