//! Settings of a request resolved to one [`Rule`] per tensor, after a check of their ranges.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use cpift_core::error::usage;
use cpift_core::format::names;

use super::inputs::Source;
use crate::method::{Base, Method};
use crate::methods::pointwise::RamPlus;
use crate::methods::sign_merge::{Sparsify, TaskVector, key};
use crate::methods::spectral::Kind;
use crate::methods::sphere::Stop;
use crate::methods::{Along, Combine, Pointwise, Rule, SignMerge, Spectral};
use crate::request::{ModelRequest, Request, Space, TaskWeights, Values};
use crate::setting::Setting;

/// Weights are not divided by a sum whose magnitude is smaller than this.
const SUM_IS_ZERO: f64 = 1e-8;

/// Refuses numbers out of range, and models or a base that the method does not take.
///
/// # Errors
/// [`cpift_core::Usage`] that names the flag.
pub(crate) fn check(request: &Request) -> Result<()> {
    for part in request.slices.iter().map(|slice| &slice.request).chain([request]) {
        check_numbers(part)?;
    }
    if request.protect.is_some() && request.within.is_some() {
        return Err(usage("a mask of the merge and protected elements exclude one another: make one mask of both"));
    }
    if request.slices.is_empty() {
        return check_models(request);
    }
    let models = request.slices.iter().flat_map(|slice| &slice.request.models);
    if request.protect.is_some() || request.within.is_some() || models.into_iter().any(|model| model.mask.is_some()) {
        return Err(usage("masks are of whole models, and slices rearrange their layers: use models"));
    }
    if request.base.is_some() && request.method.base() == Base::Model {
        return Err(usage("space: delta is not supported with slices"));
    }
    Ok(())
}

/// The rule by which `cpi` merges every tensor of a backbone and `tasks` tasks.
pub(crate) fn of_tasks(weights: TaskWeights, tasks: usize) -> Rule {
    match weights {
        TaskWeights::Omega(omega) => Rule::Fold(vec![omega; tasks]),
        TaskWeights::Equal => Rule::Fold((1..=tasks).map(|i| 1.0 / (i as f64 + 1.0)).collect()),
        TaskWeights::SphericalMean => Rule::SphericalMean(vec![1.0 / (tasks as f64 + 1.0); tasks + 1], Stop::FULL),
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
    let (name, range) = (method.name(), method.models());
    if !range.contains(&n) {
        let count = match (*range.start(), *range.end()) {
            (1, 1) => "exactly one".to_owned(),
            (2, 2) => "exactly two".to_owned(),
            (2, usize::MAX) => "at least two".to_owned(),
            (1, usize::MAX) => "at least one".to_owned(),
            (least, most) => format!("{least} to {most}"),
        };
        let found = if n == 0 { "none".to_owned() } else { n.to_string() };
        return Err(usage(format!("{name} takes {count} --model, found {found}")));
    }
    let delta = method.needs_base() || method.is_spherical() && request.space == Space::Delta;
    match (&request.base, delta) {
        (None, true) => {
            Err(usage(format!("{name} with these arguments needs --base: task vectors are differences from it")))
        }
        (Some(_), false) if method.base() != Base::Optional => {
            Err(usage(format!("{name} takes a base only with --space delta")))
        }
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
    check_values(request.method, &request.values)?;
    request.models.iter().try_for_each(|model| check_values(request.method, &model.values))?;
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

fn check_values(method: Method, values: &Values) -> Result<()> {
    for (name, setting) in values.iter() {
        let parameter = method.parameter(name).expect("parameters are those of the method");
        if let Some(value) = setting.values().find(|value| !parameter.range.contains(value)) {
            let (least, most) = (parameter.range.start(), parameter.range.end());
            return Err(usage(format!("{} must lie between {least:?} and {most:?}, found {value}", flag_of(name))));
        }
    }
    Ok(())
}

/// Name of the flag of a parameter.
fn flag_of(name: &str) -> String {
    format!("--{}", name.replace('_', "-"))
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
    check_filters(request, &names.iter().copied().collect(), &backbone.path().display().to_string())?;
    let rule = |name: &&str| {
        let layer = layer(name).map(|(prefix, number)| (number, counts[prefix]));
        rule(request, &Place { name, of_models: vec![*name; request.models.len()], layer })
    };
    names.iter().map(rule).collect()
}

/// Refuses a filter that fits none of `names`, the tensors of `place`.
///
/// # Errors
/// [`cpift_core::Usage`] that names filter and flag.
pub(super) fn check_filters(request: &Request, names: &BTreeSet<&str>, place: &str) -> Result<()> {
    let shared = [("t", &request.t), ("lambda", &request.lambda)].into_iter().chain(request.values.iter());
    let own = request.models.iter().flat_map(|m| {
        [("weight", &m.weight), ("density", &m.density)].into_iter().chain(m.values.iter()).collect::<Vec<_>>()
    });
    for (name, setting) in shared.chain(own) {
        if let Some(filter) = setting.unused_filters(names.iter().copied()).first() {
            return Err(usage(format!("the filter {filter} of {} fits no tensor of {place}", flag_of(name))));
        }
    }
    Ok(())
}

/// Name of the list of layers that a tensor belongs to, and its index in that list.
fn layer(name: &str) -> Option<(&str, usize)> {
    let (prefix, number) = names::layer(name)?;
    Some((prefix.trim_end_matches(|c: char| c.is_ascii_digit()), number as usize))
}

/// Name of a tensor of the output and of those it is made of, with its layer and the number of
/// layers if it belongs to one.
pub(super) struct Place<'a> {
    pub name: &'a str,
    /// Name in each model.
    pub of_models: Vec<&'a str>,
    pub layer: Option<(usize, usize)>,
}

impl Place<'_> {
    fn value(&self, setting: &Setting, flag: &str) -> Result<f64> {
        self.of(self.name, setting, flag)
    }

    fn of(&self, name: &str, setting: &Setting, flag: &str) -> Result<f64> {
        setting
            .at(name, self.layer)
            .ok_or_else(|| usage(format!("no value of {flag} is for the tensor {name}: add a value without a filter")))
    }

    /// Value of the parameter `name` of the merge, or its default.
    fn shared(&self, request: &Request, name: &str) -> f64 {
        let default = request.method.parameter(name).expect("a parameter of the method").default;
        request.values.get(name).and_then(|setting| setting.at(self.name, self.layer)).unwrap_or(default)
    }

    fn flag(&self, request: &Request, name: &str) -> bool {
        self.shared(request, name) != 0.0
    }

    /// Value of the parameter `name` of the model at index `i`, or its default.
    fn of_model(&self, request: &Request, i: usize, name: &str) -> f64 {
        let default = request.method.parameter(name).expect("a parameter of the method").default;
        let setting = request.models[i].values.get(name);
        setting.and_then(|setting| setting.at(self.of_models[i], self.layer)).unwrap_or(default)
    }
}

/// The rule of one tensor.
pub(super) fn rule(request: &Request, place: &Place<'_>) -> Result<Rule> {
    let method = request.method;
    let lambda = || place.value(&request.lambda, "--lambda");
    let t = || place.value(&request.t, "--t");
    match method {
        Method::Slerp => Ok(Rule::Fold(vec![t()?])),
        Method::Passthrough => Ok(Rule::Linear(vec![place.of_model(request, 0, "scale")])),
        Method::ModelStock => Ok(Rule::Combine(Combine::ModelStock, along(place.flag(request, "filter_wise"), false))),
        Method::NearSwap => Ok(Rule::Pointwise(Pointwise::NearSwap { t: t()? })),
        Method::ArceeFusion => Ok(Rule::Pointwise(Pointwise::Fusion)),
        Method::Sce => Ok(Rule::Pointwise(Pointwise::Sce { select_topk: place.shared(request, "select_topk") })),
        Method::Ram => Ok(Rule::Pointwise(Pointwise::Ram { epsilon: place.shared(request, "epsilon"), plus: None })),
        Method::RamPlus => {
            let [r, alpha, epsilon] = ["r", "alpha", "epsilon"].map(|name| place.shared(request, name));
            Ok(Rule::Pointwise(Pointwise::Ram { epsilon, plus: Some(RamPlus { r, alpha }) }))
        }
        Method::TsvM => Ok(Rule::Spectral(Spectral { kind: Kind::TsvM, lambda: lambda()? })),
        Method::IsoC => Ok(Rule::Spectral(Spectral { kind: Kind::IsoC, lambda: lambda()? })),
        Method::Wudi => Ok(Rule::Spectral(Spectral { kind: Kind::Wudi, lambda: lambda()? })),
        _ => weighted(request, place),
    }
}

/// Vectors that are combined by themselves: rows unless `columns` is set, or whole tensors.
fn along(parts: bool, columns: bool) -> Along {
    match (parts, columns) {
        (false, _) => Along::Whole,
        (true, false) => Along::Rows,
        (true, true) => Along::Columns,
    }
}

/// The rule of a method whose models have weights.
fn weighted(request: &Request, place: &Place<'_>) -> Result<Rule> {
    let weight = |(m, name): (&ModelRequest, &&str)| place.of(name, &m.weight, "--weight");
    let weights: Vec<f64> = request.models.iter().zip(&place.of_models).map(weight).collect::<Result<_>>()?;
    let sum: f64 = weights.iter().sum();
    let over = |divisor: f64| weights.iter().map(|w| w / divisor).collect::<Vec<f64>>();
    let normalised = || {
        if sum.is_finite() && sum.abs() >= SUM_IS_ZERO {
            return Ok(over(sum));
        }
        Err(usage(format!("--weight must be finite numbers that do not sum to 0, found {weights:?}")))
    };
    match request.method {
        Method::Linear if request.normalize => Ok(Rule::Linear(normalised()?)),
        Method::Linear => Ok(Rule::Linear(weights)),
        Method::SphericalMean => {
            let stop = Stop { max_iter: place.shared(request, "max_iter") as usize, tol: place.shared(request, "tol") };
            Ok(Rule::SphericalMean(normalised()?, stop))
        }
        Method::NuSlerp => {
            let t = if sum.abs() < 1e-6 { 0.5 } else { weights[1] / sum };
            let [flatten, columns] = ["nuslerp_flatten", "nuslerp_row_wise"].map(|name| place.flag(request, name));
            Ok(Rule::Combine(Combine::NuSlerp(t), along(!flatten, columns)))
        }
        Method::MultiSlerp => {
            let weights = if place.flag(request, "normalize_weights") { normalised()? } else { weights };
            Ok(Rule::Combine(Combine::MultiSlerp { weights, eps: place.shared(request, "eps") }, Along::Whole))
        }
        Method::TaskArithmetic => {
            let lambda = place.value(&request.lambda, "--lambda")?;
            let divisor = if request.normalize && sum.abs() >= SUM_IS_ZERO { sum } else { 1.0 };
            Ok(Rule::Linear(over(divisor).into_iter().map(|w| w * lambda).collect()))
        }
        _ => sign_merge(request, place, &weights).map(Rule::SignMerge),
    }
}

fn sign_merge(request: &Request, place: &Place<'_>, weights: &[f64]) -> Result<SignMerge> {
    let sparsify = match request.method {
        Method::Ties => Sparsify::Trim,
        Method::Breadcrumbs | Method::BreadcrumbsTies => Sparsify::Outliers,
        Method::Della | Method::DellaLinear => Sparsify::Prune,
        _ => Sparsify::Drop,
    };
    let vector = |(i, weight): (usize, &f64)| -> Result<TaskVector> {
        let density = place.of(place.of_models[i], &request.models[i].density, "--density")?;
        let spread = match sparsify {
            Sparsify::Outliers => place.of_model(request, i, "gamma"),
            Sparsify::Prune => place.of_model(request, i, "epsilon"),
            Sparsify::Trim | Sparsify::Drop => 0.0,
        };
        let drawn = sparsify == Sparsify::Prune && density > 0.0 && density < 1.0;
        if drawn && (density - spread <= 0.0 || density + spread >= 1.0) {
            return Err(usage(format!(
                "--density plus and minus --epsilon must lie between 0 and 1, found {density} and {spread} for {}",
                place.name
            )));
        }
        Ok(TaskVector { weight: *weight, density, key: key(request.seed, i, place.name), spread })
    };
    Ok(SignMerge {
        vectors: weights.iter().enumerate().map(vector).collect::<Result<_>>()?,
        sparsify,
        rescale: request.rescale,
        elect: request.method.elects(),
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
