//! Running a plan: measure, settle the coefficients, write, record.

use anyhow::{Context, Result};
use cpift_core::checkpoint::{Excluded, TensorView, copy_sidecars};
use cpift_core::files::StagedDir;
use cpift_core::provenance::Recorder;
use cpift_core::{CheckpointWriter, TensorSpec, json};

use crate::plan::{Plan, Weights};
use crate::report::Summary;
use crate::sphere::{self, Combination};
use crate::stream::{self, Measure, Tensor};

/// Runs `plan`: the output folder appears whole, with provenance inside, or not at all.
///
/// # Errors
/// [`cpift_core::BadInput`] where an input holds a number that is not finite; I/O errors.
pub fn merge(plan: &Plan, mut record: Recorder) -> Result<Summary> {
    let tensors = plan.tensors();
    let measures = match plan.weights {
        Weights::Linear(_) => Vec::new(),
        _ => stream::measure(plan, &tensors)?,
    };
    let combinations = combinations(plan, &measures, tensors.len());
    let staged = StagedDir::create(&plan.output.dir, plan.output.force)?;
    let copied = write_tensors(plan, &tensors, &combinations, staged.path())?;
    let config = staged.path().join("config.json");
    std::fs::write(&config, json::to_text(&plan.output.config)?)
        .with_context(|| format!("writing {}", config.display()))?;
    copy_sidecars(&plan.output.side_files, staged.path())?;
    let summary = Summary::of(plan, &measures, &combinations, copied);
    record_inputs(plan, &mut record)?;
    for (name, value) in summary.facts() {
        record.fact(&name, value);
    }
    record.write_into(staged.path())?;
    staged.commit()?;
    Ok(summary)
}

/// The coefficients of every tensor.
fn combinations(plan: &Plan, measures: &[Measure], tensors: usize) -> Vec<Combination> {
    match &plan.weights {
        Weights::Linear(weights) => {
            vec![Combination { coefficients: weights.clone(), steps: Vec::new() }; tensors]
        }
        Weights::Fold(omegas) => measures.iter().map(|m| sphere::fold(&m.gram, omegas, plan.epsilon)).collect(),
        Weights::SphericalMean(weights) => {
            measures.iter().map(|m| sphere::spherical_mean(&m.gram, weights, plan.epsilon)).collect()
        }
    }
}

/// Writes the weights into `folder` and returns the names of the tensors that were copied from the first operand.
fn write_tensors(
    plan: &Plan,
    tensors: &[Tensor<'_>],
    combinations: &[Combination],
    folder: &std::path::Path,
) -> Result<Vec<String>> {
    let first = &plan.operands[0].checkpoint;
    // A tied lm_head is the input embedding once more; transformers restores it from config.json.
    let kept = first.not_parameters().filter(|(_, why)| *why != Excluded::Tied);
    let copies: Vec<TensorView<'_>> = kept.map(|(view, _)| view).collect();
    let specs: Vec<TensorSpec> = plan.specs().into_iter().chain(copies.iter().map(TensorView::spec)).collect();
    let writer = CheckpointWriter::create(folder, &specs, plan.output.shard_size)?;
    let coefficients: Vec<&[f64]> = combinations.iter().map(|c| c.coefficients.as_slice()).collect();
    stream::write(plan, tensors, &coefficients, &writer)?;
    for view in &copies {
        writer.write(view.name, 0, view.bytes)?;
    }
    Ok(copies.iter().map(|view| view.name.to_owned()).collect())
}

fn record_inputs(plan: &Plan, record: &mut Recorder) -> Result<()> {
    for source in plan.operands.iter().chain(&plan.base) {
        record.input(source.role.as_str(), source.path(), source.digest()?.clone());
    }
    for (role, (path, digest)) in &plan.files {
        record.input(role.as_str(), path, digest.clone());
    }
    Ok(())
}
