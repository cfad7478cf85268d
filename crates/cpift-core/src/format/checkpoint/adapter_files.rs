//! Files of LoRA adapters: the key styles of PEFT, diffusers and kohya, in which a key names a
//! module and a part of its product; and what is written, the safetensors file of the factors and
//! PEFT directories.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use crate::format::dtype::{Dtype, Float};
use crate::format::json as text;
use crate::format::safetensors::{FileWriter, TensorSpec};

/// A parsed key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Key {
    /// Name of the module, without prefixes of wrappers.
    pub module: String,
    /// True if the dots in the name are written as underscores.
    pub underscored: bool,
    /// Component of a pipeline that the module belongs to, such as `unet`; else empty.
    pub component: String,
    /// Part of the product.
    pub part: Part,
}

/// Part of a product, or another tensor of an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    /// The factor with the columns of the weight: A, or down.
    Down,
    /// The factor with the rows of the weight: B, or up.
    Up,
    /// A of an embedding, one column per token.
    EmbeddingDown,
    /// B of an embedding.
    EmbeddingUp,
    /// Norms of the rows (DoRA).
    Magnitude,
    /// Numerator of the scaling.
    Alpha,
    /// A tensor of the model that the adapter replaces.
    Whole,
}

/// Key that no supported kind of adapter has, with the name of the kind if it is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Unknown(pub &'static str);

/// Prefixes of kohya's keys, and the component that each stands for.
const KOHYA: [(&str, &str); 6] = [
    ("lora_unet_", "unet"),
    ("lora_transformer_", "transformer"),
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("lora_te3_", "text_encoder_3"),
    ("lora_te_", "text_encoder"),
];

/// Prefixes of the keys of diffusers.
const COMPONENTS: [&str; 5] = ["unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3"];

/// Parts of keys of other kinds of adapters.
const OTHERS: [(&str, &str); 10] = [
    ("lora_mid", "LoCon with a decomposed convolution (lora_mid)"),
    ("hada_", "LoHa"),
    ("lokr_", "LoKr"),
    ("dora_scale", "DoRA in kohya's spelling (dora_scale)"),
    ("ia3_", "IA3"),
    ("vera_", "VeRA"),
    ("oft_", "OFT"),
    ("boft_", "BOFT"),
    ("trainable_tokens", "trainable tokens"),
    ("lora_E", "AdaLoRA"),
];

/// Parses the name of a tensor of an adapter.
pub(super) fn parse(name: &str) -> Result<Key, Unknown> {
    // PEFT saves whole modules under these names, next to the model's own.
    let pieces: Vec<&str> = name.split('.').filter(|p| !["modules_to_save", "base_layer"].contains(p)).collect();
    if let Some((_, kind)) = OTHERS.iter().find(|(part, _)| pieces.iter().any(|piece| piece.starts_with(part))) {
        return Err(Unknown(kind));
    }
    let last = pieces.last().copied().unwrap_or_default();
    let (module, part): (String, Part) = if let Some((at, part)) = position(&pieces) {
        match &pieces[at + 1..] {
            [] | ["weight"] | ["default"] | ["default", "weight"] => (pieces[..at].join("."), part),
            [.., "bias"] => return Err(Unknown("LoRA with biases of its own (lora_bias)")),
            _ => return Err(Unknown("a key of an unknown style")),
        }
    } else if let [module @ .., projection, side @ ("down" | "up"), "weight"] = &pieces[..]
        && let Some(projection) = projection.strip_suffix("lora")
    {
        // The first style of diffusers: `attn1.processor.to_q_lora.down.weight`,
        // `to_q.lora.down.weight`.
        let module: Vec<&str> = module.iter().copied().filter(|piece| *piece != "processor").collect();
        let own = match projection.trim_end_matches('_') {
            "" => Vec::new(),
            "to_out" => vec!["to_out", "0"],
            own => vec![own],
        };
        let part = if *side == "down" { Part::Down } else { Part::Up };
        ([module, own].concat().join("."), part)
    } else if last == "alpha" {
        (pieces[..pieces.len() - 1].join("."), Part::Alpha)
    } else {
        (pieces.join("."), Part::Whole)
    };
    let module = module.strip_prefix("base_model.model.").unwrap_or(&module).to_owned();
    let module = module.strip_prefix("diffusion_model.").unwrap_or(&module).to_owned();
    if let Some((prefix, component)) = KOHYA.iter().find(|(prefix, _)| module.starts_with(prefix)) {
        let module = module[prefix.len()..].to_owned();
        return Ok(Key { module, underscored: true, component: (*component).to_owned(), part });
    }
    let component = COMPONENTS.iter().find(|c| module.strip_prefix(**c).is_some_and(|rest| rest.starts_with('.')));
    let component = component.copied().unwrap_or_default().to_owned();
    let module = if component.is_empty() { module } else { module[component.len() + 1..].to_owned() };
    Ok(Key { module, underscored: false, component, part })
}

/// Place of the piece that names a part, and the part.
fn position(pieces: &[&str]) -> Option<(usize, Part)> {
    pieces.iter().enumerate().find_map(|(at, piece)| {
        let part = match *piece {
            "lora_A" | "lora_down" => Part::Down,
            "lora_B" | "lora_up" => Part::Up,
            "lora_embedding_A" => Part::EmbeddingDown,
            "lora_embedding_B" => Part::EmbeddingUp,
            "lora_magnitude_vector" => Part::Magnitude,
            _ => return None,
        };
        Some((at, part))
    })
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_all_styles_are_parsed() {
        let to_q = "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q";
        for (name, module, component, part) in [
            ("base_model.model.model.layers.0.q_proj.lora_A.weight", "model.layers.0.q_proj", "", Part::Down),
            ("base_model.model.model.layers.0.q_proj.lora_B.default.weight", "model.layers.0.q_proj", "", Part::Up),
            ("base_model.model.model.embed_tokens.lora_embedding_A", "model.embed_tokens", "", Part::EmbeddingDown),
            ("base_model.model.h.0.c_attn.lora_magnitude_vector", "h.0.c_attn", "", Part::Magnitude),
            ("base_model.model.classifier.modules_to_save.weight", "classifier.weight", "", Part::Whole),
            ("base_model.model.score.weight", "score.weight", "", Part::Whole),
            ("base_model.model.model.embed_tokens.base_layer.weight", "model.embed_tokens.weight", "", Part::Whole),
            (&format!("unet.{to_q}.lora_A.weight"), to_q, "unet", Part::Down),
            (&format!("unet.{to_q}.lora.up.weight"), to_q, "unet", Part::Up),
            ("unet.mid.attn1.processor.to_out_lora.down.weight", "mid.attn1.to_out.0", "unet", Part::Down),
            ("transformer.blocks.0.ff.lora_B.weight", "blocks.0.ff", "transformer", Part::Up),
        ] {
            let key = parse(name).unwrap();
            let expected = Key { module: module.into(), underscored: false, component: component.into(), part };
            assert_eq!(key, expected, "{name}");
        }
        let key = parse("lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha").unwrap();
        assert_eq!((key.module.as_str(), key.part), ("text_model_encoder_layers_0_mlp_fc1", Part::Alpha));
        assert!(key.underscored && key.component == "text_encoder");
        for (name, kind) in [
            ("lora_unet_mid.hada_w1_a", "LoHa"),
            ("lora_unet_mid.lokr_w1", "LoKr"),
            ("base_model.model.q.lora_B.bias", "LoRA with biases"),
            ("base_model.model.q.lora_A.other.thing", "unknown style"),
        ] {
            assert!(parse(name).unwrap_err().0.contains(kind), "{name}");
        }
    }
}
