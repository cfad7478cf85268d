//! Settings of a request resolved to one [`Rule`] per tensor, after a check of their ranges.

use std::collections::BTreeMap;

use anyhow::Result;
use cpift_core::error::usage;
use cpift_core::format::names;

use super::inputs::Source;
use crate::methods::sign_merge::{Sparsify, TaskVector, key};
use crate::methods::{Rule, SignMerge};
use crate::request::{Method, Request, Space, TaskWeights};
use crate::setting::Setting;

/// Weights are not divided by a sum whose magnitude is smaller than this.
const SUM_IS_ZERO: f64 = 1e-8;

/// Refuses numbers out of range, and models or a base that the method does not take.
///
/// # Errors
/// [`cpift_core::Usage`] that names the flag.
pub(crate) fn check(request: &Request) -> Result<()> {
    check_numbers(request)?;
    check_models(request)
}

/// The rule by which `cpi` merges every tensor of a backbone and `tasks` tasks.
pub(crate) fn of_tasks(weights: TaskWeights, tasks: usize) -> Rule {
    match weights {
        TaskWeights::Omega(omega) => Rule::Fold(vec![omega; tasks]),
        TaskWeights::Equal => Rule::Fold((1..=tasks).map(|i| 1.0 / (i as f64 + 1.0)).collect()),
        TaskWeights::SphericalMean => Rule::SphericalMean(vec![1.0 / (tasks as f64 + 1.0); tasks + 1]),
    }
}

/// Refuses a number that is not between 0 and 1.
pub(crate) fn require_unit(what: &str, value: f64) -> Result<()> {
    if (0.0..=1.0).contains(&value) {
        return Ok(());
    }
    Err(usage(format!("{what} must lie between 0 and 1, found {value}")))
}

/// Refuses a threshold of the linear branches that is not between 0 and π/2.
pub(crate) fn check_epsilon(value: f64) -> Result<()> {
    if (0.0..=std::f64::consts::FRAC_PI_2).contains(&value) {
        return Ok(());
    }
    Err(usage(format!("--epsilon must lie between 0 and π/2 radians, found {value}")))
}

fn check_models(request: &Request) -> Result<()> {
    let (method, n) = (request.method, request.models.len());
    let name = method.name();
    match method {
        Method::Slerp if n != 2 => return Err(usage(format!("{name} takes exactly two --model, found {n}"))),
        Method::Linear | Method::SphericalMean if n < 2 => {
            return Err(usage(format!("{name} takes at least two --model, found {n}")));
        }
        _ if n == 0 => return Err(usage(format!("{name} takes at least one --model, found none"))),
        _ => {}
    }
    let delta = method.needs_base() || request.space == Space::Delta;
    match (&request.base, delta) {
        (None, true) => {
            Err(usage(format!("{name} with these arguments needs --base: task vectors are differences from it")))
        }
        (Some(_), false) => Err(usage(format!("{name} takes a base only with --space delta"))),
        (None, false) if request.models[0].mask.is_some() => {
            Err(usage("a mask of the first model has no effect: outside its mask a model is replaced by the first one"))
        }
        _ => Ok(()),
    }
}

fn check_numbers(request: &Request) -> Result<()> {
    check_epsilon(request.epsilon)?;
    if request.method == Method::Slerp {
        request.t.values().try_for_each(|t| require_unit("--t", t))?;
    }
    for model in &request.models {
        model.density.values().try_for_each(|density| require_unit("--density", density))?;
        for weight in model.weight.values() {
            if !weight.is_finite() {
                return Err(usage(format!("--weight must be a finite number, found {weight}")));
            }
            if request.method == Method::SphericalMean && weight < 0.0 {
                return Err(usage(format!("--weight of a spherical mean must not be negative, found {weight}")));
            }
        }
    }
    match request.lambda.values().find(|x| !x.is_finite()) {
        Some(lambda) => Err(usage(format!("--lambda must be a finite number, found {lambda}"))),
        None => Ok(()),
    }
}

/// The rule of every parameter of `backbone`, in bytewise name order.
///
/// # Errors
/// [`cpift_core::Usage`] if a filter fits no tensor, or a tensor has no value of a setting.
pub(crate) fn of_models(request: &Request, backbone: &Source) -> Result<Vec<Rule>> {
    let names: Vec<&str> = backbone.checkpoint.parameters().map(|view| view.name).collect();
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for (prefix, number) in names.iter().filter_map(|name| layer(name)) {
        let count = counts.entry(prefix).or_default();
        *count = (*count).max(number.saturating_add(1));
    }
    let weights = request.models.iter().map(|m| ("--weight", &m.weight));
    let densities = request.models.iter().map(|m| ("--density", &m.density));
    for (flag, setting) in
        [("--t", &request.t), ("--lambda", &request.lambda)].into_iter().chain(weights).chain(densities)
    {
        if let Some(filter) = setting.unused_filters(names.iter().copied()).first() {
            return Err(usage(format!(
                "the filter {filter} of {flag} fits no tensor of {}",
                backbone.path().display()
            )));
        }
    }
    let rule = |name: &&str| {
        let layer = layer(name).map(|(prefix, number)| (number, counts[prefix]));
        rule(request, &Place { name, layer })
    };
    names.iter().map(rule).collect()
}

/// Name of the list of layers that a tensor belongs to, and its index in that list.
fn layer(name: &str) -> Option<(&str, usize)> {
    let (prefix, number) = names::layer(name)?;
    Some((prefix.trim_end_matches(|c: char| c.is_ascii_digit()), number as usize))
}

/// Name of a tensor, with its layer and the number of layers if it belongs to one.
struct Place<'a> {
    name: &'a str,
    layer: Option<(usize, usize)>,
}

impl Place<'_> {
    fn value(&self, setting: &Setting, flag: &str) -> Result<f64> {
        setting.at(self.name, self.layer).ok_or_else(|| {
            usage(format!("no value of {flag} is for the tensor {}: add a value without a filter", self.name))
        })
    }
}

fn rule(request: &Request, place: &Place<'_>) -> Result<Rule> {
    if request.method == Method::Slerp {
        return Ok(Rule::Fold(vec![place.value(&request.t, "--t")?]));
    }
    let weights: Vec<f64> = request.models.iter().map(|m| place.value(&m.weight, "--weight")).collect::<Result<_>>()?;
    let sum: f64 = weights.iter().sum();
    let over = |divisor: f64| weights.iter().map(|w| w / divisor).collect::<Vec<f64>>();
    let normalised = || {
        if sum.is_finite() && sum.abs() >= SUM_IS_ZERO {
            return Ok(over(sum));
        }
        Err(usage(format!("--weight must be finite numbers that do not sum to 0, found {weights:?}")))
    };
    match request.method {
        Method::Slerp => unreachable!("has no weights"),
        Method::Linear if request.normalize => Ok(Rule::Linear(normalised()?)),
        Method::Linear => Ok(Rule::Linear(weights)),
        Method::SphericalMean => Ok(Rule::SphericalMean(normalised()?)),
        Method::TaskArithmetic => {
            let lambda = place.value(&request.lambda, "--lambda")?;
            let divisor = if request.normalize && sum.abs() >= SUM_IS_ZERO { sum } else { 1.0 };
            Ok(Rule::Linear(over(divisor).into_iter().map(|w| w * lambda).collect()))
        }
        Method::Ties | Method::DareLinear | Method::DareTies => {
            sign_merge(request, place, &weights).map(Rule::SignMerge)
        }
    }
}

fn sign_merge(request: &Request, place: &Place<'_>, weights: &[f64]) -> Result<SignMerge> {
    let vector = |(i, weight): (usize, &f64)| -> Result<TaskVector> {
        let density = place.value(&request.models[i].density, "--density")?;
        Ok(TaskVector { weight: *weight, density, key: key(request.seed, i, place.name) })
    };
    Ok(SignMerge {
        vectors: weights.iter().enumerate().map(vector).collect::<Result<_>>()?,
        sparsify: if request.method == Method::Ties { Sparsify::Trim } else { Sparsify::Drop },
        rescale: request.rescale,
        elect: request.method != Method::DareLinear,
        normalize: request.normalize,
        lambda: place.value(&request.lambda, "--lambda")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_counted_list_by_list() {
        assert_eq!(layer("model.layers.12.mlp.experts.3.w1.weight"), Some(("model.layers.", 12)));
        assert_eq!(layer("transformer.h.0.attn.weight"), Some(("transformer.h.", 0)));
        assert_eq!(layer("model.embed_tokens.weight"), None);
    }
}
