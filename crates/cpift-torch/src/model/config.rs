//! The model configuration: config.json of the supported families. A field that changes the maths
//! and is not implemented is an error.

use std::path::Path;

use anyhow::Result;
use cpift_core::error::usage;
use cpift_core::format::rope::{RopeParameters, RopeScaling};
use cpift_core::{BadInput, Checkpoint, log_once};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::config_fields::{BESIDE_TEXT, DEFAULT_POSITIONS, ExpertsConfig, Fields, check_fields};
use super::families::{Biases, BlockNorms, Descriptor, FAMILIES, Family, NormWeight, QkNorm, Windows};
use crate::weights::Parameters;

/// Name of the embedding table.
pub const EMBEDDING: &str = "model.embed_tokens.weight";

/// Activation function of the MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x·sigmoid(x).
    Silu,
    /// GELU, tanh approximation.
    GeluTanh,
    /// GELU, exact.
    Gelu,
}

/// A model configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Model family.
    pub family: Family,
    /// e: width of the residual stream.
    pub hidden_size: i64,
    /// f: width of the MLP.
    pub intermediate_size: i64,
    /// Number of decoder blocks.
    pub num_hidden_layers: i64,
    /// h: query heads.
    pub num_attention_heads: i64,
    /// k: key and value heads (GQA).
    pub num_key_value_heads: i64,
    /// d: width of a head.
    pub head_dim: i64,
    /// v: rows of the embedding.
    pub vocab_size: i64,
    /// Context length in tokens.
    pub max_position_embeddings: i64,
    /// Epsilon of the RMS norms.
    pub rms_norm_eps: f64,
    /// Rotary settings of each block; none if it has no rotary embeddings.
    pub ropes: Vec<Option<RopeParameters>>,
    /// True if the output matrix is the embedding table.
    pub tie_word_embeddings: bool,
    /// Biases on q, k and v.
    pub qkv_bias: bool,
    /// A bias on o.
    pub o_bias: bool,
    /// Biases in the MLP.
    pub mlp_bias: bool,
    /// One matrix for q, k and v, and one for both inputs of the gated MLP.
    pub fused: bool,
    /// RMS norms of q and k.
    pub qk_norm: Option<QkNorm>,
    /// Activation function of the MLP.
    pub activation: Activation,
    /// Norms of a block.
    pub block_norms: BlockNorms,
    /// Use of the weights of norms.
    pub norm_weight: NormWeight,
    /// Factor of the embedded tokens (Gemma: √e).
    pub embedding_scale: Option<f64>,
    /// Rounds that factor to the dtype of the hidden states first, as transformers does for Gemma.
    pub rounds_embedding_scale: bool,
    /// Factor of q·k.
    pub attention_scale: f64,
    /// Factor of what attention and MLP add to the residual stream.
    pub residual_scale: Option<f64>,
    /// Soft cap of attention scores: cap·tanh(x / cap).
    pub attention_softcap: Option<f64>,
    /// Soft cap of logits.
    pub logit_softcap: Option<f64>,
    /// Divisor of logits.
    pub logit_divisor: Option<f64>,
    /// Sliding window of each block: number of tokens a query attends to, itself included; none is
    /// full causal attention.
    pub windows: Vec<Option<i64>>,
    /// Experts, if some blocks have them in place of an MLP.
    pub experts: Option<ExpertsConfig>,
    /// True if the text model is a part of the checkpoint's model.
    pub nested: bool,
    /// Unknown fields of config.json, with their values.
    pub unknown_fields: Vec<String>,
}

impl ModelConfig {
    /// Reads the parsed config.json of `folder`.
    ///
    /// # Errors
    /// [`cpift_core::BadInput`] for an unknown architecture, a missing field, or a field that
    /// changes the maths and is not implemented.
    pub fn from_json(folder: &Path, config: &Value) -> Result<Self> {
        let mut fields = Fields::new(folder, config);
        let d = descriptor(&fields)?;
        let mut unknown_fields = Vec::new();
        if let Some(part) = d.inside {
            unknown_fields = check_fields(&fields, BESIDE_TEXT)?;
            fields = fields.part(part)?;
        }
        fields.set_defaults(d.defaults);
        unknown_fields.extend(check_fields(&fields, d.fields)?);
        let heads = fields.int("num_attention_heads")?;
        let hidden = fields.int("hidden_size")?;
        let head_dim = fields.int_or("head_dim", hidden / heads)?;
        let asked = fields.bool_or("attention_bias", false)?;
        let scale = if d.gemma { fields.float_or("query_pre_attn_scalar", 256.0)? } else { head_dim as f64 };
        let softcap = |key| if d.gemma { fields.positive_float(key) } else { refuse(&fields, key).map(|()| None) };
        let multiplier = |key| if d.fields.contains(&key) { fields.positive_float(key) } else { Ok(None) };
        let attention_scale = match d.fields.contains(&"attention_multiplier") {
            true => multiplier("attention_multiplier")?.unwrap_or(1.0),
            false => scale.powf(-0.5),
        };
        let windows = windows(d, &fields)?;
        let mut config = Self {
            family: d.family,
            hidden_size: hidden,
            intermediate_size: fields.int("intermediate_size")?,
            num_hidden_layers: fields.int("num_hidden_layers")?,
            num_attention_heads: heads,
            num_key_value_heads: fields.int_or("num_key_value_heads", heads)?,
            head_dim,
            vocab_size: fields.int("vocab_size")?,
            max_position_embeddings: fields.int_or("max_position_embeddings", DEFAULT_POSITIONS)?,
            rms_norm_eps: fields.float_or("rms_norm_eps", d.norm_eps)?,
            ropes: ropes(d, &fields, &windows)?,
            tie_word_embeddings: fields.bool_or("tie_word_embeddings", d.tied)?,
            fused: d.fused,
            qkv_bias: d.biases == Biases::Qkv || d.biases == Biases::Asked && asked,
            o_bias: d.biases == Biases::Asked && asked,
            mlp_bias: d.mlp_bias && fields.bool_or("mlp_bias", false)?,
            qk_norm: d.qk_norm,
            activation: activation(d, &fields)?,
            block_norms: d.block_norms,
            norm_weight: d.norm_weight,
            embedding_scale: match d.gemma {
                true => Some((hidden as f64).sqrt()),
                false => multiplier("embedding_multiplier")?,
            },
            rounds_embedding_scale: d.gemma,
            attention_scale,
            residual_scale: multiplier("residual_multiplier")?,
            attention_softcap: softcap("attn_logit_softcapping")?,
            logit_softcap: softcap("final_logit_softcapping")?,
            logit_divisor: multiplier("logits_scaling")?,
            windows,
            experts: if d.experts { ExpertsConfig::read(&fields)? } else { None },
            nested: d.inside.is_some(),
            unknown_fields,
        };
        if !d.gemma {
            refuse(&fields, "query_pre_attn_scalar")?;
        }
        config.check_shapes(&fields)?;
        config.limit_context(&fields);
        Ok(config)
    }

    /// Unties the output matrix if `checkpoint`, whose config this is, has one of its own although
    /// config.json ties it.
    pub fn untie_as(&mut self, checkpoint: &Checkpoint) {
        self.tie_word_embeddings &= checkpoint.tied();
    }

    /// Takes the tensors of other parts, such as a vision tower, out of the parameters of
    /// `checkpoint`, whose config this is.
    pub fn keep_text(&self, checkpoint: &mut Checkpoint) {
        if self.nested {
            let base = text_base(checkpoint.parameters().map(|view| view.name)).to_owned();
            let other = |name: &str| !name.starts_with(&base) && !name.ends_with("lm_head.weight");
            let others: Vec<String> =
                checkpoint.parameters().map(|view| view.name.to_owned()).filter(|name| other(name)).collect();
            checkpoint.skip(others);
        }
    }

    /// Sets the factor of the load-balancing loss, if it is given.
    ///
    /// # Errors
    /// [`cpift_core::Usage`] for a model without experts.
    pub fn set_router_aux_loss(&mut self, coef: Option<f64>) -> Result<()> {
        match (&mut self.experts, coef) {
            (_, None) => Ok(()),
            (Some(experts), Some(coef)) => {
                experts.aux_loss_coef = coef;
                Ok(())
            }
            (None, Some(_)) => Err(usage("--router-aux-loss-coef: the model has no experts")),
        }
    }

    /// Warns once of each unknown field; with `strict`, refuses them.
    ///
    /// # Errors
    /// [`BadInput`] naming all unknown fields, with `strict`.
    pub fn check_unknown_fields(&self, folder: &Path, strict: bool) -> Result<()> {
        let path = if folder.is_file() { folder.to_owned() } else { folder.join("config.json") };
        if strict && !self.unknown_fields.is_empty() {
            return Err(BadInput::new(path, "fields that this program does not know, which --strict-config refuses")
                .found(self.unknown_fields.join(", "))
                .hint("where a field has no effect on the output of the model, remove it from config.json or leave out --strict-config")
                .into());
        }
        for field in &self.unknown_fields {
            log_once::warn(format!(
                "{}: {field} is not a field that this program knows, and is ignored; --strict-config refuses such fields",
                path.display()
            ));
        }
        Ok(())
    }

    fn check_shapes(&self, fields: &Fields) -> Result<()> {
        let rotated = self.ropes.iter().flatten().map(|rope| rotated(self.head_dim, rope));
        if self.num_attention_heads % self.num_key_value_heads != 0 || rotated.clone().any(|d| d < 2 || d % 2 != 0) {
            return Err(fields
                .bad("heads that do not divide")
                .expected("num_attention_heads a multiple of num_key_value_heads, the rotated part of head_dim even")
                .into());
        }
        for (rope, rotated) in self.ropes.iter().flatten().zip(rotated) {
            if let RopeScaling::LongRope { short, .. } = &rope.scaling
                && short.len() as i64 * 2 != rotated
            {
                return Err(fields
                    .bad("short_factor of the rotary settings does not fit")
                    .expected(format!("{} numbers", rotated / 2))
                    .found(format!("{} numbers", short.len()))
                    .into());
            }
        }
        Ok(())
    }

    /// Limits the context to the one that the factors of longrope are for.
    fn limit_context(&mut self, fields: &Fields) {
        let limit = self.ropes.iter().flatten().find_map(|rope| match rope.scaling {
            RopeScaling::LongRope { original, .. } => Some(original as i64),
            _ => None,
        });
        if let Some(limit) = limit.filter(|limit| *limit < self.max_position_embeddings) {
            log_once::info(format!(
                "{}: contexts are limited to {limit} tokens: the factors of longrope for longer ones are not implemented",
                fields.path().display()
            ));
            self.max_position_embeddings = limit;
        }
    }
}

/// Start of the names of a text model's tensors but the output matrix: of all, except in a model
/// with other parts, `model.`.
pub(super) fn text_base<'a>(mut names: impl Iterator<Item = &'a str>) -> &'a str {
    names.find_map(|name| name.strip_suffix("embed_tokens.weight")).unwrap_or("model.")
}

/// Number of elements of a head that `rope` rotates.
pub(super) fn rotated(head_dim: i64, rope: &RopeParameters) -> i64 {
    (head_dim as f64 * rope.partial) as i64
}

fn descriptor(fields: &Fields) -> Result<&'static Descriptor> {
    let found = fields.words("architectures")?.unwrap_or_default();
    let known = FAMILIES.iter().find(|d| found.iter().any(|f| f == d.architecture));
    known.copied().ok_or_else(|| {
        let names: Vec<&str> = FAMILIES.iter().map(|d| d.architecture).collect();
        fields
            .bad("an architecture this program does not know")
            .expected(names.join(", "))
            .found(if found.is_empty() { "no architectures field".into() } else { found.join(", ") })
            .into()
    })
}

/// Refuses a field that only other families read.
fn refuse(fields: &Fields, key: &str) -> Result<()> {
    match fields.get(key) {
        None => Ok(()),
        Some(value) => Err(fields
            .bad(format!("{key} = {value} changes the maths in a way that this architecture does not have"))
            .expected("no such field")
            .into()),
    }
}

/// Activation function.
fn activation(d: &Descriptor, fields: &Fields) -> Result<Activation> {
    let (key, default) = d.activation;
    match fields.text_or(key, default)? {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu_pytorch_tanh" => Ok(Activation::GeluTanh),
        "gelu" => Ok(Activation::Gelu),
        other => Err(fields
            .bad(format!("{key} = {other:?} is not implemented"))
            .expected("silu, gelu or gelu_pytorch_tanh")
            .into()),
    }
}

/// Sliding window of each block, by `layer_types` if given, else by the family's rule.
fn windows(d: &Descriptor, fields: &Fields) -> Result<Vec<Option<i64>>> {
    let layers = fields.int("num_hidden_layers")? as usize;
    let window = match d.windows {
        Windows::Never => {
            refuse(fields, "sliding_window")?;
            None
        }
        Windows::FromLayer | Windows::WithoutRope | Windows::AllIfUsed
            if !fields.bool_or("use_sliding_window", false)? =>
        {
            None
        }
        _ => fields.optional_int("sliding_window")?,
    };
    let pattern = if d.windows == Windows::AllButEvery { fields.int_or("sliding_window_pattern", 6)? } else { 1 };
    let first_windowed = fields.count_or("max_window_layers", 28)? as usize;
    let with_rope = with_rope(d, fields)?;
    let by_family = |layer: usize| match d.windows {
        Windows::Never | Windows::All | Windows::AllIfUsed | Windows::Named => true,
        Windows::FromLayer => layer >= first_windowed,
        Windows::EverySecond => layer.is_multiple_of(2),
        Windows::AllButEvery => !(layer + 1).is_multiple_of(pattern as usize),
        Windows::WithoutRope => !with_rope[layer],
    };
    let named =
        if matches!(d.windows, Windows::All | Windows::AllIfUsed) { None } else { fields.words("layer_types")? };
    let Some(types) = named else {
        return Ok((0..layers).map(|layer| window.filter(|_| by_family(layer))).collect());
    };
    if types.len() != layers {
        let found = format!("{} entries", types.len());
        return Err(fields.bad("layer_types does not fit").expected(format!("{layers} entries")).found(found).into());
    }
    types
        .iter()
        .map(|kind| match kind.as_str() {
            "full_attention" => Ok(None),
            "sliding_attention" if window.is_some() => Ok(window),
            "sliding_attention" => {
                Err(fields.bad("layer_types names sliding_attention, but there is no sliding_window").into())
            }
            other => Err(fields
                .bad(format!("layer_types names {other:?}"))
                .expected("full_attention or sliding_attention")
                .into()),
        })
        .collect()
}

/// True for the blocks with rotary embeddings: those that `no_rope_layers` marks with 1, or else
/// all but every `no_rope_layer_interval`-th.
fn with_rope(d: &Descriptor, fields: &Fields) -> Result<Vec<bool>> {
    let layers = fields.int("num_hidden_layers")? as usize;
    if !d.fields.contains(&"no_rope_layers") {
        return Ok(vec![true; layers]);
    }
    let interval = fields.int_or("no_rope_layer_interval", 4)? as usize;
    match fields.flags("no_rope_layers")? {
        None => Ok((0..layers).map(|layer| !(layer + 1).is_multiple_of(interval)).collect()),
        // As in transformers, entries beyond the layers have no effect.
        Some(flags) if flags.len() >= layers => Ok(flags[..layers].to_vec()),
        Some(flags) => Err(fields
            .bad("no_rope_layers does not fit")
            .expected(format!("{layers} entries"))
            .found(format!("{} entries", flags.len()))
            .into()),
    }
}

/// Rotary settings of each block, by its layer type if config.json has settings by layer type; none
/// for a block without rotary embeddings.
fn ropes(d: &Descriptor, fields: &Fields, windows: &[Option<i64>]) -> Result<Vec<Option<RopeParameters>>> {
    let settings = fields.rope()?;
    for note in &settings.notes {
        log_once::warn(format!("{}: {note}", fields.path().display()));
    }
    let local = match d.local_rope && fields.get("rope_parameters").is_none() {
        true => Some(RopeParameters {
            theta: fields.positive_float("rope_local_base_freq")?.unwrap_or(1e4),
            scaling: RopeScaling::Default,
            partial: 1.0,
        }),
        false => None,
    };
    // transformers ignores settings of Gemma 3 that are not by layer type.
    let by_type = |value: &Value| value.get("full_attention").is_some();
    if d.local_rope && fields.get("rope_parameters").is_some_and(|value| !by_type(value)) {
        let error = fields.bad("rope_parameters has one setting for all layers");
        return Err(error.expected("an entry full_attention and an entry sliding_attention").into());
    }
    let of_block = |(layer, window): (usize, &Option<i64>)| {
        if let Some(local) = local.as_ref().filter(|_| window.is_some()) {
            return Ok(local.clone());
        }
        let layer_type = if window.is_some() { "sliding_attention" } else { "full_attention" };
        let Some(rope) = settings.of(layer_type) else {
            let message =
                format!("the rotary settings by layer type have none for {layer_type}, which layer {layer} is");
            return Err(fields.bad(message).expected(format!("an entry {layer_type} in rope_parameters")).into());
        };
        // transformers computes Phi-3's yarn as longrope.
        if d.family == Family::Phi3 && !matches!(rope.scaling, RopeScaling::Default | RopeScaling::LongRope { .. }) {
            return Err(fields.bad("a rotary scaling that Phi-3 does not have").expected("default or longrope").into());
        }
        if rope.partial != 1.0 && !d.fields.contains(&"partial_rotary_factor") {
            let message = format!("partial_rotary_factor = {} is not a setting of this architecture", rope.partial);
            return Err(fields.bad(message).expected("1 (the whole head is rotated)").into());
        }
        Ok(rope.clone())
    };
    let all: Vec<RopeParameters> = windows.iter().enumerate().map(of_block).collect::<Result<_>>()?;
    Ok(all.into_iter().zip(with_rope(d, fields)?).map(|(rope, has)| has.then_some(rope)).collect())
}

impl ModelConfig {
    /// Name and shape of every parameter, in forward order.
    pub fn parameter_shapes(&self) -> Vec<(String, Vec<i64>)> {
        let mut all = vec![(EMBEDDING.to_owned(), vec![self.vocab_size, self.hidden_size])];
        (0..self.num_hidden_layers).for_each(|layer| self.block_shapes(layer, &mut all));
        all.push(("model.norm.weight".to_owned(), vec![self.hidden_size]));
        if !self.tie_word_embeddings {
            all.push(("lm_head.weight".to_owned(), vec![self.vocab_size, self.hidden_size]));
        }
        all
    }

    /// Names and shapes of the parameters of each block.
    pub(crate) fn blocks(&self) -> impl Iterator<Item = Vec<(String, Vec<i64>)>> {
        (0..self.num_hidden_layers).map(|layer| {
            let mut own = Vec::new();
            self.block_shapes(layer, &mut own);
            own
        })
    }

    fn block_shapes(&self, layer: i64, all: &mut Vec<(String, Vec<i64>)>) {
        let (e, f, d) = (self.hidden_size, self.intermediate_size, self.head_dim);
        let (q, kv) = (self.num_attention_heads * d, self.num_key_value_heads * d);
        let mut add = |name: &str, shape: &[i64]| all.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
        let matrices: &[_] = if self.fused {
            &[("self_attn.qkv_proj", q + 2 * kv, e, self.qkv_bias), ("self_attn.o_proj", e, q, self.o_bias)]
        } else {
            &[
                ("self_attn.q_proj", q, e, self.qkv_bias),
                ("self_attn.k_proj", kv, e, self.qkv_bias),
                ("self_attn.v_proj", kv, e, self.qkv_bias),
                ("self_attn.o_proj", e, q, self.o_bias),
            ]
        };
        let dense: &[_] = if self.fused {
            &[("mlp.gate_up_proj", 2 * f, e, self.mlp_bias), ("mlp.down_proj", e, f, self.mlp_bias)]
        } else {
            &[
                ("mlp.gate_proj", f, e, self.mlp_bias),
                ("mlp.up_proj", f, e, self.mlp_bias),
                ("mlp.down_proj", e, f, self.mlp_bias),
            ]
        };
        let experts = self.experts_of(layer as usize);
        let dense = if experts.is_some() { &[] } else { dense };
        for &(name, rows, columns, bias) in matrices.iter().chain(dense) {
            add(&format!("{name}.weight"), &[rows, columns]);
            if bias {
                add(&format!("{name}.bias"), &[rows]);
            }
        }
        if let Some(experts) = experts {
            experts.shapes(e).for_each(|(name, shape)| add(&name, &shape));
        }
        if let Some([q, k]) = self.qk_norm_widths() {
            add("self_attn.q_norm.weight", &[q]);
            add("self_attn.k_norm.weight", &[k]);
        }
        self.block_norms.names().into_iter().flatten().for_each(|name| add(&format!("{name}.weight"), &[e]));
    }

    /// Experts of the block `layer`, if it has some.
    pub(crate) fn experts_of(&self, layer: usize) -> Option<&ExpertsConfig> {
        self.experts.as_ref().filter(|experts| experts.in_block[layer])
    }

    /// Name and shape of the weight of every linear layer that takes an adapter, block by block.
    pub fn adaptable(&self) -> impl Iterator<Item = (String, Vec<i64>)> {
        self.parameter_shapes().into_iter().filter(|(name, shape)| {
            name.starts_with("model.layers.") && shape.len() == 2 && !ExpertsConfig::is_part(name)
        })
    }

    /// Widths of the norms of q and k.
    pub(super) fn qk_norm_widths(&self) -> Option<[i64; 2]> {
        let heads = [self.num_attention_heads, self.num_key_value_heads];
        self.qk_norm.map(|kind| match kind {
            QkNorm::Head => [self.head_dim; 2],
            QkNorm::Projection => heads.map(|n| n * self.head_dim),
        })
    }

    /// Random parameters, for benchmarks: normal with standard deviation 0.02; norm weights 1.
    pub fn random_parameters(&self, kind: Kind, device: Device) -> Parameters {
        let make = |(name, shape): (String, Vec<i64>)| {
            let tensor = if name.ends_with("norm.weight") && self.norm_weight != NormWeight::PlusOne {
                Tensor::ones(&shape, (kind, device))
            } else {
                Tensor::randn(&shape, (kind, device)).g_mul_scalar_(0.02)
            };
            (name, tensor.set_requires_grad(true))
        };
        self.parameter_shapes().into_iter().map(make).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn config() -> Value {
        json!({"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
               "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100})
    }

    fn read(architecture: &str, more: &Value) -> Result<ModelConfig> {
        let mut c = config();
        c["architectures"] = json!([architecture]);
        for (key, value) in more.as_object().unwrap() {
            c[key] = value.clone();
        }
        ModelConfig::from_json(Path::new("m"), &c)
    }

    #[test]
    fn absent_fields_take_the_defaults_of_transformers() {
        let c = ModelConfig::from_json(Path::new("m"), &config()).unwrap();
        assert_eq!((c.num_key_value_heads, c.head_dim, c.ropes[1].as_ref().unwrap().theta), (4, 16, 10_000.0));
        assert!(!c.tie_word_embeddings);
        let gemma = read("Gemma2ForCausalLM", &json!({"num_hidden_layers": 3})).unwrap();
        assert_eq!((gemma.head_dim, gemma.attention_scale, gemma.tie_word_embeddings), (256, 1.0 / 16.0, true));
        assert_eq!(gemma.windows, [Some(4096), None, Some(4096)]);
        assert_eq!((gemma.attention_softcap, gemma.logit_softcap), (Some(50.0), Some(30.0)));
        assert_eq!(read("Qwen3ForCausalLM", &json!({})).unwrap().head_dim, 128);
        assert_eq!(read("MistralForCausalLM", &json!({})).unwrap().windows, [Some(4096); 2]);
        assert_eq!(read("MistralForCausalLM", &json!({"sliding_window": null})).unwrap().windows, [None; 2]);
    }

    #[test]
    fn windows_are_where_the_family_has_them() {
        let published = json!({"sliding_window": 32768, "max_window_layers": 1, "use_sliding_window": false});
        assert_eq!(read("Qwen2ForCausalLM", &published).unwrap().windows, [None, None]);
        let used = json!({"sliding_window": 8, "max_window_layers": 1, "use_sliding_window": true});
        assert_eq!(read("Qwen2ForCausalLM", &used).unwrap().windows, [None, Some(8)]);
        let named = json!({"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]});
        assert_eq!(read("Gemma2ForCausalLM", &named).unwrap().windows, [None, Some(8)]);
        let short = json!({"sliding_window": 8, "layer_types": ["full_attention"]});
        assert!(read("Gemma2ForCausalLM", &short).unwrap_err().to_string().contains("layer_types"));
        let strange = json!({"sliding_window": 8, "layer_types": ["full_attention", "chunked_attention"]});
        assert!(read("Gemma2ForCausalLM", &strange).unwrap_err().to_string().contains("chunked_attention"));
    }

    #[test]
    fn published_files_of_the_new_families_are_read() {
        let phi = json!({"hidden_size": 3072, "num_attention_heads": 24, "partial_rotary_factor": 0.75,
            "max_position_embeddings": 131_072, "original_max_position_embeddings": 4096, "sliding_window": 262_144,
            "embd_pdrop": 0.0, "resid_pdrop": 0.0, "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": false,
            "mlp_bias": false, "attention_bias": false, "rope_theta": 1e4,
            "rope_scaling": {"type": "longrope", "short_factor": vec![1.0; 48], "long_factor": vec![2.0; 48]}});
        let c = read("Phi3ForCausalLM", &phi).unwrap();
        assert_eq!((c.max_position_embeddings, c.windows[0], c.unknown_fields.len()), (4096, Some(262_144), 0));
        assert_eq!(rotated(c.head_dim, c.ropes[0].as_ref().unwrap()), 96);
        let mut yarn = phi.clone();
        yarn["rope_scaling"] = json!({"type": "yarn", "factor": 32.0});
        assert!(read("Phi3ForCausalLM", &yarn).unwrap_err().to_string().contains("default or longrope"));
        let mut short = phi;
        short["rope_scaling"]["short_factor"] = json!(vec![1.0; 64]);
        let error = read("Phi3ForCausalLM", &short).unwrap_err().to_string();
        assert!(error.contains("expected: 48 numbers") && error.contains("64 numbers"), "{error}");
        let olmo = read("Olmo2ForCausalLM", &json!({"attention_bias": false, "rope_theta": 500_000})).unwrap();
        assert_eq!((olmo.qk_norm_widths(), olmo.tie_word_embeddings), (Some([64, 64]), false));
        let granite = json!({"attention_multiplier": 0.015_625, "embedding_multiplier": 12.0, "logits_scaling": 8.0,
            "residual_multiplier": 0.22, "mlp_bias": false});
        let granite = read("GraniteForCausalLM", &granite).unwrap();
        assert_eq!((granite.attention_scale, granite.embedding_scale), (0.015_625, Some(12.0)));
        assert_eq!((granite.residual_scale, granite.logit_divisor), (Some(0.22), Some(8.0)));
        assert_eq!(read("GraniteForCausalLM", &json!({})).unwrap().attention_scale, 1.0);
        let rotates = |more: Value| {
            let c = read("SmolLM3ForCausalLM", &more).unwrap();
            c.ropes.iter().map(Option::is_some).collect::<Vec<bool>>()
        };
        let smol = json!({"num_hidden_layers": 5, "no_rope_layer_interval": 4, "max_window_layers": 28,
            "use_sliding_window": false, "sliding_window": null, "layer_types": vec!["full_attention"; 5]});
        assert_eq!(rotates(smol), [true, true, true, false, true]);
        assert_eq!(rotates(json!({"no_rope_layers": [0, 1, 1]})), [false, true]);
        let error = read("SmolLM3ForCausalLM", &json!({"no_rope_layers": [1]})).unwrap_err().to_string();
        assert!(error.contains("no_rope_layers does not fit"), "{error}");
    }

    #[test]
    fn gemma3_has_the_defaults_of_transformers_and_may_be_a_part_of_a_model() {
        // As published: all that is as in the model of 4 B parameters is left out.
        let text = json!({"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
            "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024});
        let mut whole = json!({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text,
            "vision_config": {"hidden_size": 1152}, "mm_tokens_per_image": 256, "model_type": "gemma3"});
        let read = |whole: &Value| ModelConfig::from_json(Path::new("m"), whole);
        let c = read(&whole).unwrap();
        assert_eq!((c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.vocab_size), (8, 4, 256, 262_208));
        assert_eq!((c.attention_scale, c.attention_softcap, c.tie_word_embeddings), (1.0 / 16.0, None, true));
        assert_eq!(&c.windows[4..7], [Some(1024), None, Some(1024)]);
        let [local, global] = [4, 5].map(|layer| c.ropes[layer].as_ref().unwrap());
        assert_eq!((local.theta, &local.scaling), (1e4, &RopeScaling::Default));
        assert_eq!((global.theta, &global.scaling), (1e6, &RopeScaling::Linear { factor: 8.0 }));
        let mut flat = whole.clone();
        flat["text_config"]["rope_scaling"] = Value::Null;
        flat["text_config"]["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 1e6});
        assert!(read(&flat).unwrap_err().to_string().contains("one setting for all layers"));
        whole["some_new_multiplier"] = json!(2.0);
        assert!(read(&whole).unwrap_err().to_string().contains("some_new_multiplier"));
        whole.as_object_mut().unwrap().remove("some_new_multiplier");
        whole.as_object_mut().unwrap().remove("text_config");
        assert!(read(&whole).unwrap_err().to_string().contains("text_config cannot be used"));
    }

    #[test]
    fn what_changes_the_maths_is_refused_by_name() {
        for (key, value) in [
            ("hidden_act", json!("relu2")),
            ("sliding_window", json!(4096)),
            ("final_logit_softcapping", json!(30.0)),
            ("query_pre_attn_scalar", json!(224)),
            ("quantization_config", json!({"bits": 4})),
            ("attention_dropout", json!(0.1)),
            ("rope_scaling", json!({"rope_type": "mrope"})),
            ("some_new_multiplier", json!(0.5)),
            ("logits_cap", json!(30.0)),
            ("clip_qkv", json!(8.0)),
            ("use_qk_norm", json!(true)),
            ("num_experts", json!(8)),
            ("no_rope_layers", json!([1, 0])),
            ("rotary_emb_base", json!(1e6)),
            ("rope_local_base_freq", json!(1e4)),
            ("partial_rotary_factor", json!(0.5)),
            ("attention_sinks", json!(4)),
            ("is_causal", json!(false)),
            ("use_bidirectional_attention", json!(true)),
            ("use_rope", json!(false)),
            ("embd_pdrop", json!(0.1)),
            ("quantization", json!({"bits": 4})),
            ("per_layer_config", json!({"0": {"head_dim": 8}})),
            ("vision_config", json!({"hidden_size": 8})),
            ("architectures", json!(["MambaForCausalLM"])),
        ] {
            let mut c = config();
            c[key] = value;
            let error = ModelConfig::from_json(Path::new("m"), &c).unwrap_err().to_string();
            let part = match key {
                "architectures" => "Gemma2ForCausalLM, Gemma3ForCausalLM",
                "rope_scaling" => "rope scaling",
                other => other,
            };
            assert!(error.contains(part), "{key}: {error}");
        }
    }

    #[test]
    fn layer_types_have_rotary_settings_of_their_own() {
        let nested = json!({"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"], "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}});
        let ropes = read("Gemma2ForCausalLM", &nested).unwrap().ropes;
        let ropes: Vec<&RopeParameters> = ropes.iter().flatten().collect();
        assert_eq!((ropes[0].theta, &ropes[0].scaling), (1e6, &RopeScaling::Linear { factor: 8.0 }));
        assert_eq!((ropes[1].theta, &ropes[1].scaling), (1e4, &RopeScaling::Default));
        let mut half = nested;
        half["rope_parameters"].as_object_mut().unwrap().remove("sliding_attention");
        let error = read("Gemma2ForCausalLM", &half).unwrap_err().to_string();
        assert!(error.contains("none for sliding_attention, which layer 1 is"), "{error}");
    }

    #[test]
    fn fields_of_published_configs_are_passed_over() {
        for field in [
            json!({"is_llama_config": true, "rope_interleaved": false}),
            json!({"transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}}),
            json!({"unsloth_fixed": true, "unsloth_version": "2026.4.5"}),
            json!({"max_sequence_length": 2048, "pad_token_id": -1}),
            json!({"activation": "swiglu", "hidden_act": "silu"}),
            json!({"neftune_noise_alpha": 5, "gradient_checkpointing": true}),
            json!({"is_causal": true, "attention_probs_dropout_prob": 0.0, "num_experts": 0, "vision_config": null}),
        ] {
            let config = read("LlamaForCausalLM", &field).unwrap_or_else(|e| panic!("{field}: {e}"));
            assert_eq!(config.unknown_fields, [""; 0], "{field}");
        }
    }

    #[test]
    fn unknown_fields_are_refused_only_where_that_is_asked_for() {
        let config = read("LlamaForCausalLM", &json!({"our_lab_note": "v2", "another": 3, "off": false})).unwrap();
        assert_eq!(config.unknown_fields, ["our_lab_note = \"v2\"", "another = 3"]);
        assert!(config.check_unknown_fields(Path::new("m"), false).is_ok());
        let error = config.check_unknown_fields(Path::new("m"), true).unwrap_err().to_string();
        assert!(error.contains("m/config.json") && error.contains("our_lab_note = \"v2\""), "{error}");
        assert!(read("LlamaForCausalLM", &json!({})).unwrap().check_unknown_fields(Path::new("m"), true).is_ok());
    }

    #[test]
    fn what_cannot_matter_is_passed_over() {
        let more = json!({"_name_or_path": "x", "transformers_version": "5", "bos_token_id": 1, "use_cache": true,
            "pretraining_tp": 1, "some_new_switch": false, "attention_dropout": 0.0, "torch_dtype": "bfloat16"});
        assert!(read("LlamaForCausalLM", &more).is_ok());
    }
}
