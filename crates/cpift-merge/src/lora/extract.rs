//! `extract-lora`: the difference of each matrix of two models as a product of low rank.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;
use cpift_core::error::usage;
use cpift_core::files::{self, RECORD_NAME, StagedDir};
use cpift_core::format::checkpoint::{PeftConfig, peft_names};
use cpift_core::format::names::TensorKind;
use cpift_core::record::provenance::Recorder;
use cpift_core::run::progress;
use cpift_core::stream::random::seed_for;
use cpift_core::{BadInput, Dtype, TensorView};
use serde_json::{Map, Value, json};

use super::svd;
use crate::plan::{Source, check_compatible, share_head};
use crate::request::LayoutPolicy;

/// An extraction as it was asked for.
#[derive(Debug, Clone)]
pub(crate) struct Extraction {
    /// Model before fine-tuning.
    pub base: PathBuf,
    /// Model after it.
    pub model: PathBuf,
    /// Largest rank of a product.
    pub rank: usize,
    /// Dtype of the factors.
    pub dtype: Dtype,
    /// Directory that is created.
    pub out: PathBuf,
    pub force: bool,
}

impl Extraction {
    /// Writes the adapter, or nothing, and returns the errors of the tensors.
    ///
    /// # Errors
    /// [`cpift_core::Usage`] for a rank of 0, [`BadInput`] for models that do not belong together
    /// or do not differ.
    pub fn run(&self, mut record: Recorder) -> Result<Value> {
        if self.rank == 0 {
            return Err(usage("--rank must be at least 1"));
        }
        files::check_output_dir(&self.out, self.force)?;
        let (mut base, mut model) = (Source::open("base", &self.base)?, Source::open("model", &self.model)?);
        share_head(&mut [&mut base, &mut model]);
        check_compatible(&base, &model, LayoutPolicy::default())?;
        let inputs = base.checkpoint.inputs().chain(model.checkpoint.inputs());
        files::check_not_input("--out", &self.out, inputs)?;
        let transposed = base.config.get("model_type").and_then(Value::as_str) == Some("gpt2");
        let (mut tensors, mut errors, mut ranks) = (BTreeMap::new(), Map::new(), Map::new());
        let mut left_out = Vec::new();
        let bytes = base.checkpoint.parameters().map(|view| view.bytes.len() as u64).sum();
        let bar = progress::bytes("extracting", bytes);
        for view in base.checkpoint.parameters() {
            let tuned = model.checkpoint.get(view.name).expect("both have the same parameters");
            let difference = difference(&view, &tuned)?;
            bar.inc(view.bytes.len() as u64);
            if difference.iter().all(|v| *v == 0.0) {
                continue;
            }
            let (Some(module), [rows, columns]) = (is_layer(view.name), view.shape) else {
                left_out.push(view.name.to_owned());
                continue;
            };
            let mut product = svd::truncated(&difference, *rows, *columns, self.rank, seed_for(0, view.name));
            round(self.dtype, &mut product.left);
            round(self.dtype, &mut product.right);
            errors.insert(view.name.to_owned(), json!(svd::error(&difference, *columns, &product)));
            let rank = product.rank;
            if rank != self.rank {
                ranks.insert(module.to_owned(), json!(rank));
            }
            // A linear layer of GPT-2 stores its matrix transposed.
            let (down, up) = match transposed {
                false => ((vec![rank, *columns], product.right), (vec![*rows, rank], product.left)),
                true => (
                    (vec![rank, *rows], transpose(&product.left, *rows, rank)),
                    (vec![*columns, rank], transpose(&product.right, rank, *columns)),
                ),
            };
            let (a, b) = peft_names(module);
            tensors.insert(a, down);
            tensors.insert(b, up);
        }
        bar.finish_and_clear();
        if tensors.is_empty() {
            return Err(BadInput::new(&self.model, "no matrix of a layer differs from that of the base")
                .expected(format!("a fine-tuned model of {}", self.base.display()))
                .into());
        }
        let staged = StagedDir::create(&self.out, self.force)?;
        self.config(errors.keys(), ranks, transposed).write(staged.path(), &tensors, self.dtype)?;
        for source in [&base, &model] {
            record.input(source.role.as_str(), source.path(), source.digest()?.clone());
        }
        let summary = self.summary(errors, left_out);
        for (name, value) in summary.as_object().into_iter().flatten().filter(|(name, _)| *name != "out") {
            record.fact(name, value.clone());
        }
        record.write_to(&staged.path().join(RECORD_NAME))?;
        staged.commit()?;
        Ok(summary)
    }

    /// Settings of the adapter; the scaling, α over the rank, is 1 everywhere.
    fn config<'a>(
        &'a self,
        names: impl Iterator<Item = &'a String>,
        ranks: Map<String, Value>,
        transposed: bool,
    ) -> PeftConfig<'a> {
        PeftConfig {
            base: self.base.clone(),
            rank: self.rank,
            alpha: self.rank as f64,
            ranks,
            modules: names.filter_map(|name| is_layer(name)).collect(),
            transposed,
            ..PeftConfig::default()
        }
    }

    fn summary(&self, errors: Map<String, Value>, left_out: Vec<String>) -> Value {
        let mut sorted: Vec<f64> = errors.values().filter_map(Value::as_f64).collect();
        sorted.sort_by(f64::total_cmp);
        let (median, largest) = (sorted[(sorted.len() - 1) / 2], sorted[sorted.len() - 1]);
        log::info!(
            "{}: {} matrices, rank {}; relative error: median {median:.4}, largest {largest:.4}",
            self.out.display(),
            errors.len(),
            self.rank
        );
        if let Some(first) = left_out.first() {
            log::warn!(
                "{} tensors differ and are not in the adapter, which holds matrices of layers only: the first is {first}",
                left_out.len()
            );
        }
        json!({"out": self.out, "rank": self.rank, "errors": errors, "left_out": left_out})
    }
}

/// Module of a matrix that an adapter can hold: a weight that is no embedding.
fn is_layer(name: &str) -> Option<&str> {
    let module = name.strip_suffix(".weight")?;
    let last = module.rsplit('.').next().unwrap_or_default();
    let embedding = TensorKind::Embeddings.matches(name) || last.contains("embed") || ["wte", "wpe"].contains(&last);
    (!embedding).then_some(module)
}

/// Differences of all elements, in f32.
fn difference(base: &TensorView<'_>, model: &TensorView<'_>) -> Result<Vec<f32>> {
    let (mut before, mut after) = (vec![0f32; base.numel()], vec![0f32; base.numel()]);
    base.read(0, &mut before);
    model.read(0, &mut after);
    after.iter_mut().zip(&before).for_each(|(a, b)| *a -= b);
    if let Some(at) = after.iter().position(|v| !v.is_finite()) {
        return Err(BadInput::new(model.file, "a difference from the base that is not a finite number")
            .tensor(model.name)
            .found(format!("{} at element {at}", after[at]))
            .into());
    }
    Ok(after)
}

/// Rounds numbers to those of `dtype`.
fn round(dtype: Dtype, values: &mut [f32]) {
    use cpift_core::format::dtype::Float;
    let mut bytes = Vec::new();
    f32::write(dtype, values, &mut bytes);
    f32::read(dtype, &bytes, values);
}

fn transpose(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|column| (0..rows).map(move |row| values[row * columns + column])).collect()
}
