//! Writing adapters: the safetensors file of their factors, and PEFT directories.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use crate::format::dtype::{Dtype, Float};
use crate::format::json as text;
use crate::format::safetensors::{FileWriter, TensorSpec};

/// A tensor of an adapter: shape and elements.
pub type Factor = (Vec<usize>, Vec<f32>);

/// File of the factors in a PEFT directory.
pub const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";
/// File of the settings in a PEFT directory.
pub const ADAPTER_CONFIG: &str = "adapter_config.json";

/// Names of A and B of the module `module` in the file of a PEFT directory.
pub fn peft_names(module: &str) -> (String, String) {
    let name = |factor: &str| format!("base_model.model.{module}.{factor}.weight");
    (name("lora_A"), name("lora_B"))
}

/// Writes the tensors of an adapter as `dtype`.
///
/// # Errors
/// A failed write.
pub fn write_factors(
    path: &Path,
    tensors: &BTreeMap<String, Factor>,
    dtype: Dtype,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let spec = |(name, (shape, _)): (&String, &Factor)| TensorSpec { name: name.clone(), dtype, shape: shape.clone() };
    let writer = FileWriter::create(path, &tensors.iter().map(spec).collect::<Vec<_>>(), metadata)?;
    for (name, (_, values)) in tensors {
        let mut bytes = Vec::new();
        f32::write(dtype, values, &mut bytes);
        writer.write(name, 0, &bytes)?;
    }
    writer.sync()
}

/// Settings of a PEFT directory of plain LoRA.
#[derive(Debug, Clone, Default)]
pub struct PeftConfig<'a> {
    /// Base model, as a path or the name of a repository.
    pub base: PathBuf,
    /// Rank of the modules that are not in `ranks`.
    pub rank: usize,
    /// α: products are scaled by α over the rank.
    pub alpha: f64,
    /// Modules of another rank, with that rank, which is their α too.
    pub ranks: Map<String, Value>,
    /// Modules that have a product.
    pub modules: Vec<&'a str>,
    /// Scales by α over the root of the rank.
    pub rank_stabilized: bool,
    /// The weights of the base are stored transposed.
    pub transposed: bool,
    /// PEFT's type of task.
    pub task: Option<&'a str>,
}

impl PeftConfig<'_> {
    /// Writes the PEFT directory `folder`, which exists, with the factors `tensors` as `dtype`.
    ///
    /// # Errors
    /// A failed write.
    pub fn write(&self, folder: &Path, tensors: &BTreeMap<String, Factor>, dtype: Dtype) -> Result<()> {
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        write_factors(&folder.join(ADAPTER_WEIGHTS), tensors, dtype, &metadata)?;
        let path = folder.join(ADAPTER_CONFIG);
        fs::write(&path, text::to_text(&self.json())?).with_context(|| format!("writing {}", path.display()))
    }

    fn json(&self) -> Value {
        // PEFT writes a whole α as an integer.
        let alpha = if self.alpha.fract() == 0.0 { json!(self.alpha as i64) } else { json!(self.alpha) };
        json!({
            "base_model_name_or_path": self.base,
            "bias": "none",
            "fan_in_fan_out": self.transposed,
            "inference_mode": true,
            "init_lora_weights": true,
            "lora_alpha": alpha,
            "alpha_pattern": self.ranks,
            "lora_dropout": 0.0,
            "modules_to_save": null,
            "peft_type": "LORA",
            "r": self.rank,
            "rank_pattern": self.ranks,
            "target_modules": self.modules,
            "task_type": self.task,
            "use_dora": false,
            "use_rslora": self.rank_stabilized,
        })
    }
}
