//! The fields of a config.json that describe experts, and the tensors that follow from them.

use anyhow::Result;

use super::config_fields::Fields;

/// Fields of config.json that [`ExpertsConfig::read`] reads.
pub(super) const EXPERT_FIELDS: &[&str] = &[
    "decoder_sparse_step",
    "mlp_only_layers",
    "moe_intermediate_size",
    "norm_topk_prob",
    "num_experts",
    "num_experts_per_tok",
    "num_local_experts",
    "output_router_logits",
    "router_aux_loss_coef",
];

/// Default of `router_aux_loss_coef` in transformers.
const AUX_LOSS_COEF: f64 = 0.001;

/// The experts of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct ExpertsConfig {
    /// x: experts per block.
    pub count: i64,
    /// k: experts that compute each token.
    pub per_token: i64,
    /// Width of an expert.
    pub width: i64,
    /// Divides the weights of a token's experts by their sum.
    pub normalised: bool,
    /// True for the blocks that have experts.
    pub in_block: Vec<bool>,
    /// Factor of the load-balancing loss in training; 0 if it is not added.
    pub aux_loss_coef: f64,
}

impl ExpertsConfig {
    /// Reads the fields [`EXPERT_FIELDS`]; none if no block has experts.
    pub(super) fn read(fields: &Fields) -> Result<Option<Self>> {
        let named = ["num_experts", "num_local_experts"].map(|key| fields.get(key).map(|_| key));
        if let [Some(_), Some(_)] = named
            && fields.get("num_experts") != fields.get("num_local_experts")
        {
            return Err(fields.bad("num_experts and num_local_experts disagree").into());
        }
        let count = fields.count_or(named.into_iter().flatten().next().unwrap_or("num_experts"), 128)?;
        let per_token = fields.int_or("num_experts_per_tok", 8)?;
        let step = fields.int_or("decoder_sparse_step", 1)?;
        let dense = fields.integers("mlp_only_layers")?.unwrap_or_default();
        let width = fields.int_or("moe_intermediate_size", 768)?;
        let layers = fields.int("num_hidden_layers")?;
        let in_block: Vec<bool> =
            (0..layers).map(|layer| count > 0 && !dense.contains(&layer) && (layer + 1) % step == 0).collect();
        let coef = fields.float_or("router_aux_loss_coef", AUX_LOSS_COEF)?;
        if !(coef.is_finite() && coef >= 0.0) {
            return Err(fields
                .bad("router_aux_loss_coef cannot be used")
                .expected("0 or more")
                .found(coef.to_string())
                .into());
        }
        if !in_block.contains(&true) {
            return Ok(None);
        }
        if per_token > count {
            return Err(fields
                .bad("num_experts_per_tok is more than the experts of a block")
                .expected(format!("1 to {count}, which is num_experts"))
                .found(per_token.to_string())
                .into());
        }
        let added = fields.bool_or("output_router_logits", false)?;
        Ok(Some(Self {
            count,
            per_token,
            width,
            normalised: fields.bool_or("norm_topk_prob", false)?,
            in_block,
            aux_loss_coef: if added { coef } else { 0.0 },
        }))
    }

    /// Number of parameters of the experts that do not compute a token.
    pub(crate) fn idle(&self, e: i64) -> i64 {
        let blocks = self.in_block.iter().filter(|has| **has).count() as i64;
        blocks * (self.count - self.per_token) * 3 * self.width * e
    }

    /// Returns true for the names of the matrices of routers and experts.
    pub(super) fn is_part(name: &str) -> bool {
        name.contains(".mlp.experts.") || name.ends_with(".mlp.gate.weight")
    }

    /// Name within a block and shape of every tensor of the router and the experts, given the
    /// embedding width.
    pub(super) fn shapes(&self, e: i64) -> impl Iterator<Item = (String, [i64; 2])> {
        let (f, count) = (self.width, self.count);
        let of_expert = move |x: i64| {
            [("gate_proj", [f, e]), ("up_proj", [f, e]), ("down_proj", [e, f])]
                .map(|(name, shape)| (format!("mlp.experts.{x}.{name}.weight"), shape))
        };
        std::iter::once(("mlp.gate.weight".to_owned(), [count, e])).chain((0..count).flat_map(of_expert))
    }
}
