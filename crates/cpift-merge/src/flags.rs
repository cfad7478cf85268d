//! From what was typed to a [`Request`].

use std::path::PathBuf;

use anyhow::Result;
use cpift_core::error::usage;
use cpift_core::run::cli::Named;

use crate::cli::{
    DareArgs, DensityArgs, LinearArgs, ModelArgs, SlerpArgs, SphereArgs, SphericalMeanArgs, TaskArithmeticArgs,
    TaskVectorArgs, TiesArgs,
};
use crate::request::{Method, ModelRequest, Request};
use crate::setting::Setting;

impl LinearArgs {
    pub(crate) fn request(&self) -> Result<Request> {
        let mut request = plain(Method::Linear, &self.models, &self.weights)?;
        request.normalize = self.normalize;
        Ok(request)
    }
}

impl SlerpArgs {
    pub(crate) fn request(&self) -> Result<Request> {
        let mut request = plain(Method::Slerp, &self.models, &[])?;
        request.t = one(&self.t).unwrap_or(request.t);
        request.epsilon = self.epsilon.unwrap_or(request.epsilon);
        self.sphere.put_into(&mut request);
        Ok(request)
    }
}

impl SphericalMeanArgs {
    pub(crate) fn request(&self) -> Result<Request> {
        let mut request = plain(Method::SphericalMean, &self.models, &self.weights)?;
        request.epsilon = self.epsilon.unwrap_or(0.0);
        self.sphere.put_into(&mut request);
        Ok(request)
    }
}

impl TaskArithmeticArgs {
    pub(crate) fn request(&self) -> Result<Request> {
        let mut request = self.vectors.request(Method::TaskArithmetic)?;
        request.normalize = self.normalize;
        Ok(request)
    }
}

impl TiesArgs {
    pub(crate) fn request(&self) -> Result<Request> {
        let mut request = self.vectors.request(Method::Ties)?;
        self.density.put_into(&mut request)?;
        request.normalize = self.normalize;
        Ok(request)
    }
}

impl DareArgs {
    pub(crate) fn request(&self) -> Result<Request> {
        let method = if self.elect_sign { Method::DareTies } else { Method::DareLinear };
        let mut request = self.vectors.request(method)?;
        self.density.put_into(&mut request)?;
        request.normalize = self.normalize;
        request.seed = self.seed;
        Ok(request)
    }
}

impl TaskVectorArgs {
    fn request(&self, method: Method) -> Result<Request> {
        let mut request = plain(method, &self.models, &self.weights)?;
        request.base = Some(self.base.clone());
        request.lambda = one(&self.lambda).unwrap_or(request.lambda);
        Ok(request)
    }
}

impl SphereArgs {
    fn put_into(&self, request: &mut Request) {
        request.space = self.space;
        request.base.clone_from(&self.base);
    }
}

impl DensityArgs {
    fn put_into(&self, request: &mut Request) -> Result<()> {
        let (given, models) = (self.densities.len(), request.models.len());
        if given != 1 && given != models {
            return Err(usage(format!("expected one --density, or one for each of {models} --model, found {given}")));
        }
        for (i, model) in request.models.iter_mut().enumerate() {
            model.density = self.densities[i.min(given - 1)].clone();
        }
        request.rescale = self.rescale.unwrap_or(request.rescale);
        Ok(())
    }
}

/// A request with its models, their weights and masks.
fn plain(method: Method, args: &ModelArgs, weights: &[Setting]) -> Result<Request> {
    let mut request = Request::new(method);
    request.models = args.models.iter().map(ModelRequest::new).collect();
    let n = request.models.len();
    if !weights.is_empty() && weights.len() != n {
        return Err(usage(format!("expected one --weight for each of {n} --model, found {}", weights.len())));
    }
    for (model, weight) in request.models.iter_mut().zip(weights) {
        model.weight = weight.clone();
    }
    for mask in &args.masks {
        let model = &mut request.models[numbered(mask, &args.models)?];
        if model.mask.replace(mask.path.clone()).is_some() {
            return Err(usage(format!("--mask {} is for a model that has one already", mask.name)));
        }
    }
    request.protect.clone_from(&args.protect);
    Ok(request)
}

/// Which model a `--mask` is for: its number, or the name of its folder.
fn numbered(mask: &Named, models: &[PathBuf]) -> Result<usize> {
    let named = |path: &PathBuf| path.file_name().is_some_and(|name| *name == *mask.name);
    let number = mask.name.parse::<usize>().ok().filter(|n| (1..=models.len()).contains(n)).map(|n| n - 1);
    let mut fitting = (0..models.len()).filter(|i| number == Some(*i) || named(&models[*i]));
    match (fitting.next(), fitting.next()) {
        (Some(i), None) => Ok(i),
        (Some(_), Some(_)) => {
            Err(usage(format!("--mask {}: that fits several models, by number and by name of folder", mask.name)))
        }
        (None, _) => Err(usage(format!(
            "--mask {}: no model has that number or name; expected 1 to {} or the name of a folder",
            mask.name,
            models.len()
        ))),
    }
}

/// All values of one flag, those without a filter last; `None` where it was not given.
fn one(given: &[Setting]) -> Option<Setting> {
    let (filtered, rest): (Vec<_>, Vec<_>) =
        given.iter().flat_map(|setting| setting.rules().iter().cloned()).partition(|rule| rule.filter.is_some());
    let mut all = Setting::default();
    filtered.into_iter().chain(rest).for_each(|rule| all.push(rule));
    (!given.is_empty()).then_some(all)
}
