//! Opening checkpoints: the weight files of a directory are found and mapped, scales and adapters
//! attached.
//!
//! Scales belong to weights in 8-bit floating point: `weight_scale_inv` per block (DeepSeek, Qwen)
//! and `weight_scale` per row or tensor (compressed-tensors, FBGEMM). With them the weights are
//! numbers like any others, and an output stores them in 16 bits.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use serde::Deserialize;
use serde_json::Value;

use super::derive::Scale;
use super::layout::{self, Layout, Place, WeightSet};
use super::reader::{Checkpoint, HEAD, TensorView, is_buffer};
use super::sidecar::{read_config, tied};
use super::{adapter, diagnose};
use crate::error::BadInput;
use crate::format::dtype::Dtype;
use crate::format::json;
use crate::format::safetensors::MappedFile;
use crate::{hub, log_once};

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
        attach_scales(&mut checkpoint, &Value::Null)?;
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
        attach_scales(&mut checkpoint, config.as_ref().unwrap_or(&Value::Null))?;
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

/// Rows and columns of a block where config.json does not say.
const BLOCK: usize = 128;

/// Names that scales of `X.weight` have after `X.`.
const SCALES: [&str; 3] = ["weight_scale_inv", "weight_scale", "scale_weight"];

/// Names of the scales of activations, which a merged checkpoint does not have.
const ACTIVATIONS: [&str; 4] = ["input_scale", "activation_scale", "input_scale_ub", "scale_input"];

/// Methods of quantization whose weights are floats with scales.
const METHODS: [&str; 4] = ["fp8", "compressed-tensors", "fbgemm_fp8", "modelopt"];

/// Name of the quantization method in config.json, if there is one.
pub fn quantization(config: &Value) -> Option<&str> {
    let nested = || config.get("text_config").and_then(|inner| inner.get("quantization_config"));
    let found = config.get("quantization_config").filter(|q| !q.is_null()).or_else(nested)?;
    Some(found.get("quant_method").and_then(Value::as_str).unwrap_or("unknown"))
}

/// Returns `config` without the description of scales, which an output does not have.
pub fn without_quantization(mut config: Value) -> Value {
    if quantization(&config).is_some() {
        let object = config.as_object_mut().expect("it has a key");
        object.remove("quantization_config");
        if let Some(inner) = object.get_mut("text_config").and_then(Value::as_object_mut) {
            inner.remove("quantization_config");
        }
    }
    config
}

/// Returns the reason and the hint if config.json names a quantization whose weights cannot be
/// read as numbers.
fn unreadable(config: &Value) -> Option<(String, &'static str)> {
    let method = quantization(config)?;
    if METHODS.contains(&method) {
        return None;
    }
    let hint = match method {
        "gptq" | "awq" => {
            "use the model that was quantised (the card or _name_or_path names it); AutoAWQ and GPTQModel cannot give the \
             full weights back"
        }
        "bitsandbytes" => {
            "use the model that was quantised, or load it in transformers and call model.dequantize() and \
             save_pretrained(dir)"
        }
        _ => "use the floating-point checkpoint that was quantised",
    };
    Some((method.to_owned(), hint))
}

/// Refuses the checkpoint at `path` if its `config` names such a quantization.
///
/// # Errors
/// [`BadInput`] with the way to full weights.
pub fn check_readable(path: &Path, config: &Value) -> Result<()> {
    let Some((method, hint)) = unreadable(config) else { return Ok(()) };
    Err(quantised(path, &method).hint(hint).into())
}

fn quantised(path: &Path, how: &str) -> BadInput {
    BadInput::new(path, format!("is quantised ({how}; quantization_config of config.json)"))
        .expected("floating-point weights, or 8-bit ones with their scales")
}

/// Attaches the scales of all weights of 8 bits in `checkpoint`.
///
/// # Errors
/// [`BadInput`] for a scale that is missing although config.json asks for it, or of another shape.
fn attach_scales(checkpoint: &mut Checkpoint, config: &Value) -> Result<()> {
    let asked = quantization(config).is_some_and(|method| METHODS.contains(&method));
    let size = config.pointer("/quantization_config/weight_block_size").and_then(Value::as_array);
    let size = size.and_then(|list| Some([list.first()?.as_u64()? as usize, list.get(1)?.as_u64()? as usize]));
    let block = size.filter(|block| block.iter().all(|n| *n > 0)).unwrap_or([BLOCK; 2]);
    let dtype = match config.get("torch_dtype").or_else(|| config.get("dtype")).and_then(Value::as_str) {
        Some("float16") => Dtype::F16,
        Some("float32") => Dtype::F32,
        _ => Dtype::BF16,
    };
    let mut found: Vec<(String, Vec<String>, Scale)> = Vec::new();
    let mut activations = Vec::new();
    for view in checkpoint.tensors() {
        let Some((module, last)) = view.name.rsplit_once('.') else { continue };
        if ACTIVATIONS.contains(&last) && asked {
            activations.push(view.name.to_owned());
        }
        if asked && (last == "weight_packed" || last == "weight" && !view.dtype.is_float()) {
            return Err(quantised(checkpoint.path(), "weights in integers")
                .tensor(view.name)
                .found(view.dtype.to_string())
                .hint("use the floating-point checkpoint that was quantised")
                .into());
        }
        if last != "weight" || !view.dtype.is_f8() {
            continue;
        }
        let scale = SCALES.iter().find_map(|end| checkpoint.stored_tensor(&format!("{module}.{end}")));
        match scale {
            Some(scale) => {
                let hidden = vec![scale.name.to_owned()];
                found.push((view.name.to_owned(), hidden, scale_of(&view, &scale, block, dtype)?));
            }
            None if asked => {
                return Err(BadInput::new(view.file, "the scale of a weight in 8 bits is missing")
                    .tensor(view.name)
                    .expected(format!("{module}.{} or {module}.{}", SCALES[0], SCALES[1]))
                    .found("quantization_config in config.json, and no scale")
                    .hint("download the checkpoint again, with all its shards")
                    .into());
            }
            None => {}
        }
    }
    if !found.is_empty() {
        log_once::info(format!(
            "{}: {} weights of 8 bits are read with their scales, as {dtype}",
            checkpoint.path().display(),
            found.len()
        ));
    }
    found.into_iter().for_each(|(name, hidden, scale)| checkpoint.scale(name, hidden, scale));
    activations.into_iter().for_each(|name| checkpoint.hide(name));
    Ok(())
}

/// The scale of `weight` from the tensor that holds it.
fn scale_of(weight: &TensorView<'_>, scale: &TensorView<'_>, block: [usize; 2], dtype: Dtype) -> Result<Scale> {
    let wrong = |expected: String| {
        BadInput::new(scale.file, format!("the shape does not fit the weight {}", weight.name))
            .tensor(scale.name)
            .expected(expected)
            .found(format!("{:?}", scale.shape))
    };
    if !scale.dtype.is_float() {
        return Err(wrong("floating-point numbers".to_owned()).found(scale.dtype.name()).into());
    }
    let mut values = vec![0f32; scale.numel()];
    scale.read(0, &mut values);
    let (columns, rows) = match weight.shape {
        [.., columns] => (*columns, weight.numel() / (*columns).max(1)),
        [] => (1, 1),
    };
    if values.len() == 1 {
        return Ok(Scale { columns: columns.max(1), block: [rows.max(1), columns.max(1)], blocks: 1, values, dtype });
    }
    if values.len() == rows && scale.shape.last() == Some(&1) || scale.shape == [rows] {
        return Ok(Scale { columns: columns.max(1), block: [1, columns.max(1)], blocks: 1, values, dtype });
    }
    // Blocks; matrices of several experts stand one below the other, where no block crosses them.
    let [stack @ .., height, _] = weight.shape else { return Err(wrong("one scale per tensor".to_owned()).into()) };
    let expected: Vec<usize> =
        stack.iter().copied().chain([height.div_ceil(block[0]), columns.div_ceil(block[1])]).collect();
    if scale.shape != expected || !stack.is_empty() && !height.is_multiple_of(block[0]) {
        return Err(wrong(format!("{expected:?}, one per block of {block:?}, or [{rows}, 1], or one")).into());
    }
    Ok(Scale { columns: columns.max(1), block, blocks: columns.div_ceil(block[1]), values, dtype })
}
