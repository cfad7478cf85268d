//! `cpift-eval divergence`: how far a model's predictions have moved from another's, as the
//! Kullback-Leibler divergence per target token.

use std::path::PathBuf;

use anyhow::{Result, bail};
use cpift_core::Checkpoint;
use cpift_core::error::usage;
use cpift_core::files::{StagedFile, check_not_input, check_output};
use cpift_core::format::checkpoint::check_same_parameters;
use cpift_core::format::digest::Digest;
use cpift_core::format::json;
use cpift_core::format::scores::MetricValue;
use cpift_core::format::tasks::Tasks;
use cpift_core::record::provenance::Recorder;
use cpift_core::record::up_to_date::Expected;
use cpift_core::run::cli::Common;
use cpift_core::run::progress;
use cpift_data::{self as data, Layout, Overlong};
use cpift_torch::score::divergences;
use cpift_torch::session::{ModelInfo, Session};
use cpift_torch::workers::Workers;
use log::info;
use serde_json::json;

use crate::args::DivergenceArgs;
use crate::run::STAGE;

/// Format version of the file.
const FORMAT_VERSION: u32 = 1;

/// Measures the divergence on every task and writes it as JSON.
///
/// # Errors
/// [`cpift_core::Usage`] and [`cpift_core::BadInput`] before any model is loaded; a divergence that
/// is not finite. Nothing is written then.
pub(crate) fn run(args: &DivergenceArgs, common: &Common) -> Result<()> {
    if args.limit == Some(0) {
        return Err(usage("--limit must be at least 1"));
    }
    let recorder = Recorder::start(STAGE);
    args.inference.on_ranks(common, |workers| measure(args, common, workers, recorder))
}

/// Measures the divergence; with several ranks all share the rows, and rank 0 writes.
fn measure(args: &DivergenceArgs, common: &Common, workers: &Workers, mut recorder: Recorder) -> Result<()> {
    if workers.agree("the output is up to date", || common.up_to_date(&Expected::new(STAGE, &args.out)))? {
        return Ok(());
    }
    check_output(&args.out, common.force())?;
    let list = Tasks::read(&args.tasks)?;
    let tasks = list.selected(&args.only)?;
    let inputs = [&args.tasks, &args.model, &args.reference].into_iter().chain(tasks.iter().map(|task| &task.eval));
    check_not_input("--out", &args.out, inputs.map(PathBuf::as_path))?;
    check_same_parameters(&Checkpoint::open(&args.model)?, &Checkpoint::open(&args.reference)?)?;
    let info = ModelInfo::open(&args.model, list.template()?)?;
    let mut examples = Vec::new();
    for task in &tasks {
        let mut rows = data::read_rows(&task.eval, &Layout::of(task)?)?;
        rows.truncate(args.limit.unwrap_or(usize::MAX));
        let chat = info.text.with(&task.template_args);
        let encoded = data::encode_rows(&task.eval, &rows, chat, info.context_of(task, None), Overlong::Truncate)?;
        examples.push(encoded.examples);
    }
    let device = workers.placement.device;
    let open = |folder| Session::for_inference(folder, list.template()?, device, args.inference.kind(device));
    let (mut model, reference) = (open(&args.model)?, open(&args.reference)?);
    model.model.row_sharers = workers.placement.group.clone();
    let digests = [("model", &model.digest), ("reference", &reference.digest)];
    workers.check_same(&digests.map(|(name, digest)| (name.to_owned(), json!(digest))).into_iter().collect())?;
    let mut figures = Vec::new();
    for (task, examples) in tasks.iter().zip(&examples) {
        let bar = progress::items("divergence", examples.len() as u64);
        let each = divergences(&reference.model, &model.model, examples, args.inference.batch_size, || bar.inc(1))?;
        bar.finish_and_clear();
        if let Some((example, kl)) = examples.iter().zip(&each).find(|(_, kl)| !kl.is_finite()) {
            bail!("{}: {}: the divergence is {kl}", task.name, example.place);
        }
        let value = MetricValue::mean("kl", &each);
        info!("{}: kl {} ({} rows)", task.name, value.shown(|x| format!("{x:.5}")), value.n);
        figures.push(json!({"task": task.name, "kl": value}));
        recorder.input(format!("eval:{}", task.name), &task.eval, Digest::of_file(&task.eval)?);
    }
    if !workers.leads() {
        return Ok(());
    }
    recorder.tasks(&list, tasks.iter().map(|task| task.name.as_str()))?;
    recorder.input("model", &args.model, model.digest.clone());
    recorder.input("reference", &args.reference, reference.digest.clone());
    let value = json!({"format_version": FORMAT_VERSION, "model": args.model.display().to_string(),
        "model_digest": model.digest, "reference": args.reference.display().to_string(),
        "reference_digest": reference.digest, "tasks": figures});
    recorder.commit(StagedFile::of_text(&args.out, &json::to_text(&value)?, common.force())?.into_path(), &[])?;
    common.print_json(&value);
    Ok(())
}
