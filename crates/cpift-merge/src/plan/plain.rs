//! The plan of the plain methods, from a [`Request`] that flags or a recipe made.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;
use cpift_core::error::usage;
use cpift_core::format::digest::Digest;
use cpift_core::format::names;
use cpift_core::{Mask, files};

use super::inputs::{Source, check_compatible, share_head};
use super::output::resolve;
use super::{Plan, check_epsilon, require_unit};
use crate::card;
use crate::cli::{OutputArgs, Space};
use crate::methods::sign_merge::key;
use crate::methods::{Conflict, Rule, SignMerge, Sparsify};
use crate::request::{Method, Request};
use crate::setting::Setting;

/// Weights whose sum is smaller than this are not divided by it.
const SUM_IS_ZERO: f64 = 1e-8;

/// Resolves a merge by one of the plain methods.
///
/// # Errors
/// [`cpift_core::Usage`] and [`cpift_core::BadInput`] as the arguments and inputs deserve.
pub fn plan(request: &Request, output: &OutputArgs, force: bool) -> Result<Plan> {
    check_numbers(request)?;
    check_models(request)?;
    if !output.dry_run {
        files::check_output_dir(&output.out, force)?;
    }
    let open =
        |(i, model): (usize, &crate::request::ModelRequest)| Source::open(format!("model:{}", i + 1), &model.path);
    let mut operands: Vec<Source> = request.models.iter().enumerate().map(open).collect::<Result<_>>()?;
    let mut base = request.base.as_deref().map(|path| Source::open("base", path)).transpose()?;
    share_head(&mut operands.iter_mut().chain(&mut base).collect::<Vec<_>>());
    let operands: Vec<Arc<Source>> = operands.into_iter().map(Arc::new).collect();
    let base = base.map(Arc::new);
    let backbone = base.as_ref().unwrap_or(&operands[0]);
    let everything: Vec<&Source> = base.iter().chain(&operands).map(Arc::as_ref).collect();
    for other in everything.iter().filter(|source| !std::ptr::eq(**source, backbone.as_ref())) {
        check_compatible(backbone, other)?;
    }
    files::check_not_input("--out", &output.out, everything.iter().map(|source| source.path()))?;
    let destination = resolve(output, force, &everything, backbone, backbone, &everything)?;
    let rules = rules(request, backbone)?;
    let mut files = BTreeMap::new();
    let mut open_mask = |role: String, path: &Path| open_mask(role, path, backbone, &mut files);
    let mut masks = Vec::new();
    for (i, model) in request.models.iter().enumerate() {
        masks.push(model.mask.as_deref().map(|path| open_mask(format!("mask:{}", i + 1), path)).transpose()?);
    }
    if masks.iter().all(Option::is_none) {
        masks.clear();
    }
    let protect = request.protect.as_deref().map(|path| open_mask("protect".into(), path)).transpose()?;
    files::check_not_input("--out", &output.out, files.values().map(|(path, _)| path.as_path()))?;
    Ok(Plan {
        method: request.method.name(),
        base,
        operands,
        rules,
        space: if request.method.needs_base() { Space::Delta } else { request.space },
        epsilon: request.epsilon,
        cores: Vec::new(),
        conflict: Conflict::MaxDelta,
        masks,
        protect,
        seed: matches!(request.method, Method::DareLinear | Method::DareTies).then_some(request.seed),
        card: card::of_request(request, destination.dtype),
        output: destination,
        files,
    })
}

/// Opens a mask of the backbone's parameters.
fn open_mask(
    role: String,
    path: &Path,
    backbone: &Source,
    files: &mut BTreeMap<String, (PathBuf, Digest)>,
) -> Result<Mask> {
    let mask = Mask::open(path)?;
    // Any mask of this layout will do, whatever base it was made for.
    mask.check_base(&backbone.checkpoint, &mask.header.base)?;
    mask.verify()?;
    if backbone.known_digest().is_some_and(|digest| *digest != mask.header.base) {
        log::warn!("{}: made for another base than {}", path.display(), backbone.path().display());
    }
    files.insert(role, (path.to_owned(), Digest::of_file(path)?));
    Ok(mask)
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
        (None, true) => Err(usage(format!("{name} here needs --base: task vectors are differences from it"))),
        (Some(_), false) => Err(usage(format!("{name} has no use for a base, unless with --space delta"))),
        (None, false) if request.models[0].mask.is_some() => {
            Err(usage("a mask of the first model has no effect: outside its mask a model counts as the first one"))
        }
        _ => Ok(()),
    }
}

/// Refuses numbers out of range, whatever tensor they are for.
fn check_numbers(request: &Request) -> Result<()> {
    check_epsilon(request.epsilon)?;
    if request.method == Method::Slerp {
        request.t.values().try_for_each(|t| require_unit("--t", t))?;
    }
    for model in &request.models {
        for density in model.density.values() {
            if !(0.0..=1.0).contains(&density) {
                return Err(usage(format!("--density must lie between 0 and 1, found {density}")));
            }
        }
        for weight in model.weight.values() {
            if !weight.is_finite() {
                return Err(usage(format!("--weight must be finite numbers, found {weight}")));
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

/// The rule of every parameter, in bytewise name order.
fn rules(request: &Request, backbone: &Source) -> Result<Vec<Rule>> {
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

/// The name of the list of layers a tensor lies in, and its number there.
fn layer(name: &str) -> Option<(&str, usize)> {
    let (prefix, number) = names::layer(name)?;
    Some((prefix.trim_end_matches(|c: char| c.is_ascii_digit()), number as usize))
}

/// A tensor's name, with its layer and the number of layers where it is in one.
struct Place<'a> {
    name: &'a str,
    layer: Option<(usize, usize)>,
}

impl Place<'_> {
    fn value(&self, setting: &Setting, flag: &str) -> Result<f64> {
        setting.at(self.name, self.layer).ok_or_else(|| {
            usage(format!("no value of {flag} is for the tensor {}: add one without a filter", self.name))
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
        Method::Ties | Method::DareLinear | Method::DareTies => consensus(request, place, weights).map(Rule::SignMerge),
    }
}

fn consensus(request: &Request, place: &Place<'_>, weights: Vec<f64>) -> Result<SignMerge> {
    let densities = request.models.iter().map(|m| place.value(&m.density, "--density")).collect::<Result<_>>()?;
    let keys = (0..weights.len()).map(|i| key(request.seed, i, place.name)).collect();
    let sparsify = if request.method == Method::Ties { Sparsify::Trim } else { Sparsify::Drop { keys } };
    Ok(SignMerge {
        sparsify,
        densities,
        weights,
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
