//! Low-rank adapters ([arXiv 2106.09685](https://arxiv.org/abs/2106.09685)) as a baseline: every
//! linear layer's weight is W = W₀ + (α/r)·B·A, and only A and B are trained.
//!
//! Their gradients follow from the weight's by the chain rule, ∂A = (α/r)·Bᵀ·∂W and ∂B =
//! (α/r)·∂W·Aᵀ, so that the forward and backward pass stay the same and the weights are merged
//! after every step. The training is LoRA's; the memory is that of full fine-tuning.

use cpift_core::stream::random::seed_for;
use tch::{Kind, Tensor, no_grad};

use super::pass::ParamGroups;

/// The embedding table.
const EMBEDDING: &str = "embed_tokens.weight";
/// The output layer, which has no adapter, as the embedding has none.
const HEAD: &str = "lm_head.weight";

/// Settings of the adapters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoraConfig {
    /// Rank: rows of A and columns of B.
    pub rank: i64,
    /// α: the product is scaled by α/rank.
    pub alpha: f64,
    /// Seed of A.
    pub seed: u64,
}

/// The adapters of a model.
pub(crate) struct Adapters {
    scale: f64,
    list: Vec<Adapter>,
}

struct Adapter {
    /// Index of the weight in the list of trainable parameters.
    place: usize,
    name: String,
    weight: Tensor,
    /// W₀, in the weight's dtype.
    before: Tensor,
    a: Tensor,
    b: Tensor,
}

impl Adapters {
    /// New adapters for every linear layer among `units`: A uniform within ±1/√(inputs), as in
    /// PEFT, and B zero.
    pub fn new(units: &ParamGroups, config: LoraConfig) -> Self {
        let linear = |(_, (name, weight)): &(usize, &(String, Tensor))| {
            weight.dim() == 2 && !name.ends_with(EMBEDDING) && !name.ends_with(HEAD)
        };
        let adapter = |(place, (name, weight)): (usize, &(String, Tensor))| {
            let (outputs, inputs) = weight.size2().expect("two dimensions");
            tch::manual_seed(seed_for(config.seed, name) as i64);
            let bound = 1.0 / (inputs as f64).sqrt();
            // Drawn on the CPU, so that the bits do not depend on the device.
            let a = Tensor::empty([config.rank, inputs], (Kind::Float, tch::Device::Cpu)).uniform_(-bound, bound);
            Adapter {
                place,
                name: name.clone(),
                before: weight.detach().copy(),
                a: a.to_device(weight.device()),
                b: Tensor::zeros([outputs, config.rank], (Kind::Float, weight.device())),
                weight: weight.shallow_clone(),
            }
        };
        let list = no_grad(|| units.list.iter().enumerate().filter(linear).map(adapter).collect());
        Self { scale: config.alpha / config.rank as f64, list }
    }

    /// A and B of each adapter by name, in the order of [`Adapters::gradients`]; they share
    /// storage.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        let pair = |x: &Adapter| {
            [(format!("{}.lora_A", x.name), x.a.shallow_clone()), (format!("{}.lora_B", x.name), x.b.shallow_clone())]
        };
        self.list.iter().flat_map(pair).collect()
    }

    /// Gradients of all A and B, from those of the trainable parameters.
    pub fn gradients(&self, grads: &[Tensor]) -> Vec<Tensor> {
        let pair = |x: &Adapter| {
            let grad = grads[x.place].to_kind(Kind::Float);
            [x.b.tr().matmul(&grad) * self.scale, grad.matmul(&x.a.tr()) * self.scale]
        };
        no_grad(|| self.list.iter().flat_map(pair).collect())
    }

    /// Merges the adapters into the weights.
    pub fn merge(&self) {
        no_grad(|| {
            for x in &self.list {
                let merged = x.before.to_kind(Kind::Float) + x.b.matmul(&x.a) * self.scale;
                x.weight.shallow_clone().copy_(&merged);
            }
        });
    }

    /// Name and weight without its adapter, for a saved state.
    pub fn before(&self) -> impl Iterator<Item = (&String, &Tensor)> {
        self.list.iter().map(|x| (&x.name, &x.before))
    }
}
