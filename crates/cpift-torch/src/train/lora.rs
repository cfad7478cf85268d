//! Low-rank adapters ([arXiv 2106.09685](https://arxiv.org/abs/2106.09685)): linear layers compute
//! y = W·x + s·B·(A·x), and only A and B are trained. The weights of the base have no gradients,
//! moments or f32 masters; they lie in the dtype of the computation.
//!
//! A training run saves the adapters as a PEFT directory, or merged into the weights of the base,
//! which are read from its files again, so that the dtype of the computation rounds none. On
//! several ranks the weights are shared as in full training, and every rank keeps all adapters.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::rc::Rc;

use anyhow::{Result, bail};
use cpift_core::Dtype;
use cpift_core::error::usage;
use cpift_core::format::checkpoint::{Factor, PeftConfig, peft_names};
use cpift_core::hub;
use cpift_core::stream::random::seed_for;
use serde::Serialize;
use tch::{Device, Kind, Tensor, no_grad};

use crate::dist::Group;
use crate::model::{CausalLM, LowRank};
use crate::placement::{Piece, Pieces};
use crate::session::Session;
use crate::weights::{Parameters, first_not_finite, kind_of, read_part};

/// Settings of the adapters.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LoraConfig {
    /// r: rows of A and columns of B.
    pub rank: i64,
    /// α, the numerator of the scale.
    pub alpha: f64,
    /// Scales by α/√r (rsLoRA, [arXiv 2312.03732](https://arxiv.org/abs/2312.03732)) instead of
    /// α/r.
    pub rank_stabilized: bool,
    /// Names of modules, or ends of their names; empty for all linear layers of the blocks but
    /// experts.
    pub targets: Vec<String>,
    /// Form of the output.
    pub output: LoraOutput,
    /// Seed of A.
    #[serde(skip)]
    pub seed: u64,
}

/// Form in which trained adapters are saved.
#[derive(clap::ValueEnum, Serialize, Debug, Clone, Copy, PartialEq, Eq, Default)]
#[serde(rename_all = "lowercase")]
pub enum LoraOutput {
    /// A model directory with the adapters merged into the weights.
    #[default]
    Merged,
    /// A PEFT directory.
    Adapter,
}

impl LoraConfig {
    /// s, the factor of the products.
    pub fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha / if self.rank_stabilized { rank.sqrt() } else { rank }
    }

    /// Returns true if the linear layer whose weight is `name` gets an adapter. As in PEFT, a
    /// target is the name of a module, or the end of it after a dot.
    pub fn adapts(&self, name: &str) -> bool {
        let module = module_of(name);
        let fits =
            |t: &String| module.strip_suffix(t.as_str()).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
        self.targets.is_empty() || self.targets.iter().any(fits)
    }

    /// Refuses a target that is not among the linear layers, whose weights are `names`.
    ///
    /// # Errors
    /// [`cpift_core::Usage`] with the layers that there are.
    pub fn check<'a>(&self, names: impl Iterator<Item = &'a String> + Clone) -> Result<()> {
        for target in &self.targets {
            let one = Self { targets: vec![target.clone()], ..self.clone() };
            if !names.clone().any(|name| one.adapts(name)) {
                let known = last_names(names).into_iter().collect::<Vec<_>>().join(", ");
                return Err(usage(format!(
                    "--lora-target {target} is no linear layer of the model, which has {known}; experts take no adapters"
                )));
            }
        }
        Ok(())
    }

    /// `target_modules` of PEFT.
    fn target_modules<'a>(&'a self, adapted: impl Iterator<Item = &'a String>) -> Vec<&'a str> {
        if self.targets.is_empty() {
            last_names(adapted).into_iter().collect()
        } else {
            self.targets.iter().map(String::as_str).collect()
        }
    }
}

/// Module of a weight.
fn module_of(name: &str) -> &str {
    name.strip_suffix(".weight").unwrap_or(name)
}

/// Last parts of the names of modules, sorted.
fn last_names<'a>(names: impl Iterator<Item = &'a String>) -> BTreeSet<&'a str> {
    names.map(|name| module_of(name).rsplit('.').next().unwrap_or_default()).collect()
}

/// Gives the layers of `model` that `config` names new adapters and turns off the gradients of its
/// `parameters`: A uniform within ±1/√inputs, as in PEFT, and B zero.
///
/// # Errors
/// [`cpift_core::Usage`] for a target that the model does not have.
pub fn attach(model: &CausalLM, parameters: &Parameters, config: &LoraConfig) -> Result<()> {
    let names: Vec<&String> = model.adapter_slots().map(|(name, _)| name).collect();
    config.check(names.iter().copied())?;
    for weight in parameters.values() {
        let _ = weight.set_requires_grad(false);
    }
    for (name, slot) in model.adapter_slots().filter(|(name, _)| config.adapts(name)) {
        let (outputs, inputs) = parameters[name].size2()?;
        tch::manual_seed(seed_for(config.seed, name) as i64);
        let bound = 1.0 / (inputs as f64).sqrt();
        // Drawn on the CPU, so that the bits do not depend on the device.
        let a = Tensor::empty([config.rank, inputs], (Kind::Float, Device::Cpu)).uniform_(-bound, bound);
        let a = a.to_device(model.device()).set_requires_grad(true);
        let b = Tensor::zeros([outputs, config.rank], (Kind::Float, model.device())).set_requires_grad(true);
        slot.set(LowRank { a, b, scale: config.scale() });
    }
    Ok(())
}

/// Names and factors of the adapter of the weight `name`, if it has one.
pub(crate) fn factors(model: &CausalLM, name: &str) -> Option<[(String, Tensor); 2]> {
    model.adapter(name).map(|LowRank { a, b, .. }| [(format!("{name}.lora_A"), a), (format!("{name}.lora_B"), b)])
}

/// All factors; they share storage with those in training.
pub(crate) fn pieces(model: &CausalLM) -> Pieces {
    let whole = |(name, tensor): (String, Tensor)| (name, Piece::whole(&tensor));
    model.adapter_slots().filter_map(|(name, _)| factors(model, name)).flatten().map(whole).collect()
}

/// Adds the gradients `own` of every rank to `sums`, rank by rank. Every rank keeps whole adapters,
/// gets the same sums, and makes the same update.
///
/// # Errors
/// A failed collective.
pub(crate) fn add_of_all_ranks(group: &Rc<Group>, own: &[Tensor], sums: &mut [Option<Tensor>]) -> Result<()> {
    let flat: Vec<Tensor> = own.iter().map(|grad| grad.flatten(0, -1)).collect();
    let flat = Tensor::cat(&flat, 0);
    let (count, world) = (flat.numel() as i64, group.world() as i64);
    let all = Tensor::empty([world * count], (flat.kind(), flat.device()));
    group.all_gather(&all, &flat)?.wait()?;
    for of_rank in all.view([world, count]).unbind(0) {
        let mut start = 0;
        for (grad, sum) in own.iter().zip(sums.iter_mut()) {
            let of_rank = of_rank.narrow(0, start, grad.numel() as i64).view_as(grad);
            start += grad.numel() as i64;
            match sum {
                Some(sum) => drop(sum.g_add_(&of_rank)),
                empty => *empty = Some(of_rank.copy()),
            }
        }
    }
    Ok(())
}

/// Writes the adapters of the model as a PEFT directory into `staged`, factors as `dtype`.
///
/// # Errors
/// A factor that is not finite in `dtype`, or a failed write.
pub(crate) fn save_adapter(session: &Session, config: &LoraConfig, staged: &Path, dtype: Dtype) -> Result<()> {
    let mut tensors: BTreeMap<String, Factor> = BTreeMap::new();
    let adapted: Vec<&String> = session.model.adapter_slots().map(|(n, _)| n).filter(|n| config.adapts(n)).collect();
    for name in &adapted {
        let LowRank { a, b, .. } = session.model.adapter(name).expect("attached before training");
        let (down, up) = peft_names(module_of(name));
        for (name, factor) in [(down, a), (up, b)] {
            let host = factor.detach().to_device(Device::Cpu).contiguous();
            if let Some(index) = first_not_finite(&host.to_kind(kind_of(dtype))) {
                let value = host.flatten(0, -1).double_value(&[index]);
                bail!("{name}: element {index} is {value:e}, which {dtype} does not hold\n  hint: --save-dtype f32");
            }
            let shape = host.size().iter().map(|&n| n as usize).collect();
            tensors.insert(name, (shape, Vec::try_from(host.flatten(0, -1))?));
        }
    }
    let repository = hub::repository(&session.folder).map(|name| name.split('@').next().unwrap_or_default().into());
    let peft = PeftConfig {
        base: repository.unwrap_or_else(|| session.folder.clone()),
        rank: config.rank as usize,
        alpha: config.alpha,
        modules: config.target_modules(adapted.into_iter()),
        rank_stabilized: config.rank_stabilized,
        task: Some("CAUSAL_LM"),
        ..PeftConfig::default()
    };
    peft.write(staged, &tensors, dtype)
}

/// The parameter `name` of the base, read from its file again, with its adapter merged: f32, or the
/// dtype of the file without an adapter.
///
/// # Errors
/// [`cpift_core::BadInput`] for an element of the file that is not finite.
pub(crate) fn merged(session: &Session, name: &str) -> Result<Tensor> {
    let view = session.checkpoint.get(name).expect("the parameters are those of the checkpoint");
    let shape: Vec<i64> = view.shape.iter().map(|&n| n as i64).collect();
    let base = read_part(&view, 0, view.numel() as i64)?.view(shape.as_slice());
    let Some(LowRank { a, b, scale }) = session.model.adapter(name) else { return Ok(base) };
    let [a, b] = [a, b].map(|factor| factor.detach().to_device(Device::Cpu));
    Ok(no_grad(|| base.to_kind(Kind::Float) + b.matmul(&a) * scale))
}
