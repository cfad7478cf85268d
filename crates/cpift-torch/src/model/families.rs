//! The supported families: what each has in place of LLaMA's parts. Adding a family means adding a
//! descriptor and its line in [`FAMILIES`].

use super::config_fields::EXPERT_FIELDS;

/// Supported model families.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// `LlamaForCausalLM`: LLaMA 1 to 3, SmolLM2 and others.
    Llama,
    /// `MistralForCausalLM`: Mistral 7B, Ministral 8B.
    Mistral,
    /// `MinistralForCausalLM`: Mistral with `layer_types`.
    Ministral,
    /// `Qwen2ForCausalLM`: Qwen1.5, Qwen2, Qwen2.5.
    Qwen2,
    /// `Qwen3ForCausalLM`.
    Qwen3,
    /// `Qwen3MoeForCausalLM`: Qwen3 with experts.
    Qwen3Moe,
    /// `Gemma2ForCausalLM`.
    Gemma2,
    /// `Gemma3ForCausalLM`, and the text model of `Gemma3ForConditionalGeneration`.
    Gemma3,
    /// `Phi3ForCausalLM`: Phi-3, Phi-3.5, Phi-4, Phi-4-mini.
    Phi3,
    /// `Olmo2ForCausalLM`.
    Olmo2,
    /// `GraniteForCausalLM`: Granite 3 and the dense models of Granite 4.
    Granite,
    /// `SmolLM3ForCausalLM`.
    SmolLm3,
}

/// All families, in the order in which errors name them.
pub(super) const FAMILIES: [&Descriptor; 13] = [
    &LLAMA,
    &MISTRAL,
    &MINISTRAL,
    &QWEN2,
    &QWEN3,
    &QWEN3_MOE,
    &GEMMA2,
    &GEMMA3,
    &GEMMA3_WITH_VISION,
    &PHI3,
    &OLMO2,
    &GRANITE,
    &SMOLLM3,
];

/// The parts of a family that config.json does not describe, and the fields that describe the rest.
pub(super) struct Descriptor {
    /// Name in the field `architectures`.
    pub architecture: &'static str,
    pub family: Family,
    /// Values of absent fields, as in transformers.
    pub defaults: &'static [(&'static str, i64)],
    /// Fields that only this family reads, or few.
    pub fields: &'static [&'static str],
    /// Biases of attention.
    pub biases: Biases,
    /// True if the MLP has biases by the field `mlp_bias`.
    pub mlp_bias: bool,
    /// One matrix for q, k and v, and one for both inputs of the gated MLP.
    pub fused: bool,
    pub windows: Windows,
    /// Default of `rms_norm_eps`.
    pub norm_eps: f64,
    pub block_norms: BlockNorms,
    pub norm_weight: NormWeight,
    pub qk_norm: Option<QkNorm>,
    /// Field of the activation function and its default.
    pub activation: (&'static str, &'static str),
    /// Default of `tie_word_embeddings`.
    pub tied: bool,
    /// Rotary settings of their own for blocks with a window, by `rope_local_base_freq`.
    pub local_rope: bool,
    /// Field that describes the text model, if it is a part of the model.
    pub inside: Option<&'static str>,
    /// Soft caps, `query_pre_attn_scalar` and scaled embeddings.
    pub gemma: bool,
    /// Experts in place of the MLP of some blocks.
    pub experts: bool,
}

/// Biases of attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Biases {
    Never,
    /// On q, k and v.
    Qkv,
    /// On all four matrices, by the field `attention_bias`.
    Asked,
}

/// Blocks with a sliding window, if config.json has no `layer_types`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Windows {
    /// The field `sliding_window` is refused.
    Never,
    /// All blocks; `layer_types` is not read.
    All,
    /// With `use_sliding_window` all blocks; `layer_types` is not read.
    AllIfUsed,
    /// All blocks that `layer_types` does not name otherwise.
    Named,
    /// With `use_sliding_window` those from `max_window_layers` on.
    FromLayer,
    /// Every second block, from the first on.
    EverySecond,
    /// All but every n-th, by `sliding_window_pattern`.
    AllButEvery,
    /// With `use_sliding_window` those without rotary embeddings.
    WithoutRope,
}

/// Norms of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockNorms {
    /// Before attention and MLP.
    Before,
    /// Before and after both.
    Around,
    /// After attention and MLP.
    After,
}

impl BlockNorms {
    /// Names of the norms before attention, after it, before the MLP and after it.
    pub(crate) fn names(self) -> [Option<&'static str>; 4] {
        let (input, post) = (Some("input_layernorm"), Some("post_attention_layernorm"));
        match self {
            Self::Before => [input, None, post, None],
            Self::After => [None, post, None, Some("post_feedforward_layernorm")],
            Self::Around => [input, post, Some("pre_feedforward_layernorm"), Some("post_feedforward_layernorm")],
        }
    }
}

/// Use of a norm's weight w on the normed values x.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormWeight {
    /// x·w in the dtype of the computation.
    Plain,
    /// x·w in f32.
    Wide,
    /// x·(1 + w) in f32.
    PlusOne,
}

/// Norms of q and k.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// Over each head.
    Head,
    /// Over all heads together.
    Projection,
}

const LLAMA: Descriptor = Descriptor {
    architecture: "LlamaForCausalLM",
    family: Family::Llama,
    defaults: &[("max_position_embeddings", 2048)],
    fields: &[],
    biases: Biases::Asked,
    mlp_bias: true,
    fused: false,
    windows: Windows::Never,
    norm_eps: 1e-6,
    block_norms: BlockNorms::Before,
    norm_weight: NormWeight::Plain,
    qk_norm: None,
    activation: ("hidden_act", "silu"),
    tied: false,
    local_rope: false,
    inside: None,
    gemma: false,
    experts: false,
};

const MISTRAL: Descriptor = Descriptor {
    architecture: "MistralForCausalLM",
    family: Family::Mistral,
    defaults: &[("max_position_embeddings", 131_072), ("sliding_window", 4096)],
    biases: Biases::Never,
    mlp_bias: false,
    windows: Windows::All,
    ..LLAMA
};

const MINISTRAL: Descriptor =
    Descriptor { architecture: "MinistralForCausalLM", family: Family::Ministral, windows: Windows::Named, ..MISTRAL };

const QWEN2: Descriptor = Descriptor {
    architecture: "Qwen2ForCausalLM",
    family: Family::Qwen2,
    defaults: &[("max_position_embeddings", 32768), ("sliding_window", 4096)],
    biases: Biases::Qkv,
    mlp_bias: false,
    windows: Windows::FromLayer,
    ..LLAMA
};

const QWEN3: Descriptor = Descriptor {
    architecture: "Qwen3ForCausalLM",
    family: Family::Qwen3,
    defaults: &[("max_position_embeddings", 32768), ("sliding_window", 4096), ("head_dim", 128)],
    biases: Biases::Asked,
    qk_norm: Some(QkNorm::Head),
    ..QWEN2
};

/// Without a default of `head_dim`, as in transformers.
const QWEN3_MOE: Descriptor = Descriptor {
    architecture: "Qwen3MoeForCausalLM",
    family: Family::Qwen3Moe,
    defaults: &[
        ("max_position_embeddings", 32768),
        ("sliding_window", 4096),
        ("num_key_value_heads", 4),
        ("intermediate_size", 6144),
    ],
    fields: EXPERT_FIELDS,
    windows: Windows::AllIfUsed,
    experts: true,
    ..QWEN3
};

const GEMMA2: Descriptor = Descriptor {
    architecture: "Gemma2ForCausalLM",
    family: Family::Gemma2,
    defaults: &[
        ("max_position_embeddings", 8192),
        ("sliding_window", 4096),
        ("head_dim", 256),
        ("attn_logit_softcapping", 50),
        ("final_logit_softcapping", 30),
    ],
    mlp_bias: false,
    windows: Windows::EverySecond,
    block_norms: BlockNorms::Around,
    norm_weight: NormWeight::PlusOne,
    // hidden_act is ignored, as in transformers.
    activation: ("hidden_activation", "gelu_pytorch_tanh"),
    tied: true,
    gemma: true,
    ..LLAMA
};

const GEMMA3: Descriptor = Descriptor {
    architecture: "Gemma3ForCausalLM",
    family: Family::Gemma3,
    // Published files leave out all that is as in the model of 4 B parameters.
    defaults: &[
        ("max_position_embeddings", 131_072),
        ("sliding_window", 4096),
        ("head_dim", 256),
        ("num_attention_heads", 8),
        ("num_key_value_heads", 4),
        ("vocab_size", 262_208),
        ("rope_theta", 1_000_000),
    ],
    fields: &["rope_local_base_freq", "sliding_window_pattern"],
    windows: Windows::AllButEvery,
    qk_norm: Some(QkNorm::Head),
    local_rope: true,
    ..GEMMA2
};

const GEMMA3_WITH_VISION: Descriptor =
    Descriptor { architecture: "Gemma3ForConditionalGeneration", inside: Some("text_config"), ..GEMMA3 };

/// Phi-4-mini rotates three quarters of each head, by `partial_rotary_factor`.
const PHI3: Descriptor = Descriptor {
    architecture: "Phi3ForCausalLM",
    family: Family::Phi3,
    defaults: &[("max_position_embeddings", 4096)],
    fields: &["partial_rotary_factor"],
    biases: Biases::Never,
    mlp_bias: false,
    fused: true,
    windows: Windows::All,
    norm_eps: 1e-5,
    ..LLAMA
};

const OLMO2: Descriptor = Descriptor {
    architecture: "Olmo2ForCausalLM",
    family: Family::Olmo2,
    mlp_bias: false,
    norm_eps: 1e-5,
    block_norms: BlockNorms::After,
    norm_weight: NormWeight::Wide,
    qk_norm: Some(QkNorm::Projection),
    ..LLAMA
};

const GRANITE: Descriptor = Descriptor {
    architecture: "GraniteForCausalLM",
    family: Family::Granite,
    fields: &["attention_multiplier", "embedding_multiplier", "logits_scaling", "residual_multiplier"],
    ..LLAMA
};

const SMOLLM3: Descriptor = Descriptor {
    architecture: "SmolLM3ForCausalLM",
    family: Family::SmolLm3,
    defaults: &[("max_position_embeddings", 32768), ("num_key_value_heads", 4), ("rope_theta", 2_000_000)],
    fields: &["no_rope_layers", "no_rope_layer_interval"],
    windows: Windows::WithoutRope,
    tied: true,
    ..LLAMA
};
