//! Experts: in place of its MLP, a block has many narrow ones, and a router sends each token to a
//! few of them.
//!
//! Shape suffixes: n tokens, x experts, k experts per token, e embedding; a = n·k assignments.

use anyhow::Result;
use tch::{Kind, Tensor, no_grad};

use super::config::ModelConfig;
use super::config_fields::ExpertsConfig;
use super::layers::{Loader, Mlp};
use crate::ffi;

/// Router and experts of a block.
pub(super) struct Experts {
    /// Matrix of the router, [x, e].
    gate: Tensor,
    experts: Vec<Mlp>,
    per_token: i64,
    normalised: bool,
}

/// The routing of the tokens of one forward pass through a block.
pub(crate) struct Routed {
    /// Probabilities of the router, [n, x] in f32, with their graph.
    probabilities_nx: Tensor,
    /// Number of tokens that each expert computed, int64 [x].
    pub counts_x: Tensor,
}

impl Routed {
    /// Sum of the probabilities of each expert over the tokens, f32 [x], with its graph.
    pub(crate) fn probability_sums(&self) -> Tensor {
        self.probabilities_nx.sum_dim_intlist([0i64].as_slice(), false, Kind::Float)
    }

    /// Number of tokens.
    pub(crate) fn tokens(&self) -> i64 {
        self.probabilities_nx.size()[0]
    }
}

impl Experts {
    /// Adapters are for the other linear layers of a block: transformers stores all experts of a
    /// block in one tensor, for which PEFT has no layer.
    pub(super) fn load(loader: &mut Loader<'_>, prefix: &str, own: &ExpertsConfig, c: &ModelConfig) -> Result<Self> {
        let gate = loader.get(&format!("{prefix}.gate.weight"), &[own.count, c.hidden_size])?;
        loader.adapters = false;
        let experts = (0..own.count).map(|x| Mlp::load(loader, &format!("{prefix}.experts.{x}"), own.width, c));
        let experts = experts.collect::<Result<_>>()?;
        loader.adapters = true;
        Ok(Self { gate, experts, per_token: own.per_token, normalised: own.normalised })
    }

    /// Maps hidden states [b, s, e] to hidden states [b, s, e].
    pub(super) fn forward(&self, x_bse: &Tensor) -> (Tensor, Routed) {
        let (kind, shape) = (x_bse.kind(), x_bse.size());
        let e = shape[2];
        let x_ne = x_bse.reshape([-1, e]);
        let logits_nx = ffi::linear(&x_ne, &self.gate.to_kind(kind), None);
        let probabilities_nx = logits_nx.softmax(-1, Kind::Float);
        let (mut weights_nk, chosen_nk) = probabilities_nx.topk(self.per_token, -1, true, true);
        if self.normalised {
            weights_nk = &weights_nk / weights_nk.sum_dim_intlist([-1i64].as_slice(), true, Kind::Float);
        }
        let (order_a, back_a, counts_x) = self.sort(&chosen_nk);
        // Copies in a permutation, whose gradient adds no two rows: the sum over a token's experts
        // has one order on every device.
        let (n, k) = (x_ne.size()[0], self.per_token);
        let copies_ae = x_ne.unsqueeze(1).expand([n, k, e], false).reshape([-1, e]);
        let sorted_ae = copies_ae.index_select(0, &order_a);
        drop(copies_ae);
        let computed_ae = self.compute(&sorted_ae, &counts_x);
        drop(sorted_ae);
        let mixed_nke = computed_ae.index_select(0, &back_a).view([n, k, e]) * weights_nk.to_kind(kind).unsqueeze(-1);
        let mixed_ne = mixed_nke.sum_dim_intlist([1i64].as_slice(), false, kind);
        (mixed_ne.view(shape.as_slice()), Routed { probabilities_nx, counts_x })
    }

    /// The assignments in the order of their experts, then of their tokens; the place of each
    /// assignment in it; and the number of each expert's.
    fn sort(&self, chosen_nk: &Tensor) -> (Tensor, Tensor, Tensor) {
        no_grad(|| {
            let chosen_a = chosen_nk.flatten(0, -1);
            let (_, order_a) = chosen_a.sort_stable(true, 0, false);
            let counts_x = chosen_a.bincount::<Tensor>(None, self.experts.len() as i64);
            let places_a = Tensor::arange(order_a.numel() as i64, (Kind::Int64, order_a.device()));
            let back_a = order_a.zeros_like().scatter(0, &order_a, &places_a);
            (order_a, back_a, counts_x)
        })
    }

    /// Passes rows in the order of their experts through them.
    fn compute(&self, sorted_ae: &Tensor, counts_x: &Tensor) -> Tensor {
        let counts = Vec::<i64>::try_from(counts_x).expect("counts in one dimension");
        let rows = sorted_ae.split_with_sizes(counts.as_slice(), 0);
        let parts = self.experts.iter().zip(&rows).zip(&counts);
        // An expert without tokens has a gradient, which is zero.
        let parts = parts.filter(|((expert, _), count)| **count > 0 || expert.is_tracked());
        Tensor::cat(&parts.map(|((expert, rows), _)| expert.forward(rows)).collect::<Vec<_>>(), 0)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::{Value, json};
    use tch::Device;

    use super::*;
    use crate::model::CausalLM;

    /// The configuration of a small model with the fields `more`.
    fn read(more: &Value) -> Result<ModelConfig> {
        let mut config = json!({"architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 50,
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8});
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        ModelConfig::from_json(Path::new("m"), &config)
    }

    #[test]
    fn fields_say_which_blocks_have_experts_and_how_they_are_weighted() {
        let of = |more: Value| read(&more).unwrap().experts;
        let own = of(json!({})).unwrap();
        assert_eq!((own.in_block, own.normalised, own.aux_loss_coef), (vec![true; 4], false, 0.0));
        let sparse = of(json!({"decoder_sparse_step": 2, "mlp_only_layers": [1, 9]})).unwrap();
        assert_eq!(sparse.in_block, [false, false, false, true]);
        assert_eq!(of(json!({"num_experts": 0})), None);
        assert_eq!(of(json!({"num_experts": null, "num_local_experts": 3})).unwrap().count, 3);
        let added = of(json!({"output_router_logits": true})).unwrap();
        assert_eq!(added.aux_loss_coef, 0.001, "the default of transformers");
        let absent = json!({"num_experts": null, "num_experts_per_tok": null, "moe_intermediate_size": null});
        let absent = of(absent).unwrap();
        assert_eq!((absent.count, absent.per_token, absent.width), (128, 8, 768));
        // A window is that of all blocks, if it is used.
        let window = json!({"sliding_window": 8, "use_sliding_window": true, "max_window_layers": 2});
        assert_eq!(read(&window).unwrap().windows, [Some(8); 4]);
        assert_eq!(read(&json!({"sliding_window": 8})).unwrap().windows, [None; 4]);
    }

    #[test]
    fn fields_that_cannot_be_used_are_refused_by_name() {
        for (more, part) in [
            (json!({"num_experts_per_tok": 5}), "num_experts_per_tok is more than the experts of a block"),
            (json!({"num_experts_per_tok": 0}), "num_experts_per_tok"),
            (json!({"num_local_experts": 8}), "num_experts and num_local_experts disagree"),
            (json!({"decoder_sparse_step": 0}), "decoder_sparse_step"),
            (json!({"mlp_only_layers": [0.5]}), "mlp_only_layers"),
            (json!({"router_aux_loss_coef": -1.0}), "router_aux_loss_coef"),
            (json!({"shared_expert_intermediate_size": 8}), "shared_expert_intermediate_size"),
            (json!({"router_jitter_noise": 0.1}), "router_jitter_noise"),
            (json!({"n_shared_experts": 1}), "n_shared_experts"),
        ] {
            let error = read(&more).unwrap_err().to_string();
            assert!(error.contains(part), "{more}: {error}");
        }
    }

    #[test]
    fn a_missing_tensor_of_an_expert_is_named() {
        let config = read(&json!({})).unwrap();
        for name in ["model.layers.2.mlp.experts.3.up_proj.weight", "model.layers.1.mlp.gate.weight"] {
            let mut parameters = config.random_parameters(Kind::Float, Device::Cpu);
            drop(parameters.remove(name).unwrap());
            let model = CausalLM::new(config.clone(), &parameters, Path::new("m"), Kind::Float);
            let error = model.err().unwrap().to_string();
            assert!(error.contains("missing") && error.contains(name), "{error}");
        }
    }
}
