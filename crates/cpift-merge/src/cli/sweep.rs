//! `--sweep`: one merge per value, with one reading of the inputs.

use anyhow::Result;
use cpift_core::error::usage;

use super::Command;
use crate::method::Method;
use crate::request::Request;
use crate::setting::Setting;

/// Several merges of the same models.
#[derive(clap::Args, Debug)]
pub(crate) struct SweepArgs {
    /// Merge once per value with one reading of the inputs: t of slerp, the weight of the second
    /// of two models of linear (the first gets 1 - V), or the lambda of task-arithmetic. The
    /// results are directories of --out named by the values
    #[arg(long, value_name = "V,V,...", value_delimiter = ',', allow_negative_numbers = true, help_heading = "Method")]
    pub(super) sweep: Vec<f64>,
}

impl Command {
    /// The merges of a `--sweep`, each with its value; `request` is the merge without it. `None` if
    /// it was not given.
    ///
    /// # Errors
    /// [`cpift_core::Usage`] for values that cannot be swept.
    pub(crate) fn sweep(&self, request: &Request) -> Result<Option<Vec<(f64, Request)>>> {
        let values = match self {
            Self::Slerp(a) => &a.sweep.sweep,
            Self::Linear(a) => &a.sweep.sweep,
            Self::TaskArithmetic(a) => &a.sweep.sweep,
            _ => return Ok(None),
        };
        if values.is_empty() {
            return Ok(None);
        }
        let mut merges: Vec<(f64, Request)> = Vec::new();
        for &value in values {
            let mut request = request.clone();
            match &mut request.models[..] {
                [first, second] if request.method == Method::Linear => {
                    first.weight = Setting::constant(1.0 - value);
                    second.weight = Setting::constant(value);
                }
                _ if request.method == Method::Linear => {
                    return Err(usage("--sweep of linear takes exactly two --model"));
                }
                _ if request.method == Method::Slerp => request.t = Setting::constant(value),
                _ => request.lambda = Setting::constant(value),
            }
            if merges.iter().any(|(other, _)| *other == value) {
                return Err(usage(format!("--sweep has the value {value} twice")));
            }
            merges.push((value, request));
        }
        Ok(Some(merges))
    }
}
