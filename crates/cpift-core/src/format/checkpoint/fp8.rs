//! Scales of weights in 8-bit floating point: `weight_scale_inv` per block (DeepSeek, Qwen) and
//! `weight_scale` per row or tensor (compressed-tensors, FBGEMM). With them the weights are numbers
//! like any others, and an output stores them in 16 bits.

use std::path::Path;

use anyhow::Result;
use serde_json::Value;

use super::derive::Scale;
use super::reader::{Checkpoint, TensorView};
use crate::error::BadInput;
use crate::format::dtype::Dtype;
use crate::log_once;

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
pub(super) fn attach(checkpoint: &mut Checkpoint, config: &Value) -> Result<()> {
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
                found.push((view.name.to_owned(), hidden, of(&view, &scale, block, dtype)?));
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
fn of(weight: &TensorView<'_>, scale: &TensorView<'_>, block: [usize; 2], dtype: Dtype) -> Result<Scale> {
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
