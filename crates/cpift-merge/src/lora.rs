//! Adapters as outputs. `extract-lora` writes the difference of each matrix of two models as a
//! product of low rank; `merge-adapters` writes the weighted sum of the products of several
//! adapters as one adapter, exact by concatenation or compressed to a rank.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use anyhow::{Context, Result};
use cpift_core::error::usage;
use cpift_core::files::{self, RECORD_NAME, StagedDir, StagedPath};
use cpift_core::format::checkpoint::{
    ADAPTER_CONFIG, ADAPTER_WEIGHTS, Factor, LoraFile, LoraPair, PeftConfig, peft_names, read_lora, write_factors,
};
use cpift_core::format::json;
use cpift_core::format::names::TensorKind;
use cpift_core::record::provenance::Recorder;
use cpift_core::run::progress;
use cpift_core::stream::random::seed_for;
use cpift_core::{BadInput, Dtype, TensorView};
use serde_json::{Map, Value, json};

use crate::plan::{Source, check_compatible, share_head};
use crate::request::LayoutPolicy;
use crate::svd;

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

/// A combination as it was asked for.
#[derive(Debug, Clone)]
pub(crate) struct Combination {
    /// Adapters in order.
    pub adapters: Vec<PathBuf>,
    /// Weight of each; empty for equal weights with the sum 1.
    pub weights: Vec<f64>,
    /// Rank of the result; by default the sum of the ranks, which is exact.
    pub rank: Option<usize>,
    /// Dtype of the factors.
    pub dtype: Dtype,
    /// Directory if the first adapter is a PEFT directory, else a file.
    pub out: PathBuf,
    pub force: bool,
}

impl Combination {
    /// Writes the adapter, or nothing, and returns the errors of compression.
    ///
    /// # Errors
    /// [`cpift_core::Usage`] for numbers out of range, [`BadInput`] for adapters that cannot be
    /// combined.
    pub fn run(&self, mut record: Recorder) -> Result<Value> {
        let n = self.adapters.len();
        if n < 2 || self.rank == Some(0) || self.weights.iter().any(|w| !w.is_finite()) {
            return Err(usage(
                "merge-adapters takes two or more --adapter, finite --weight and a --rank of at least 1",
            ));
        }
        if !self.weights.is_empty() && self.weights.len() != n {
            return Err(usage(format!(
                "expected one --weight for each of {n} --adapter, found {}",
                self.weights.len()
            )));
        }
        let all: Vec<LoraFile> = self.adapters.iter().map(|path| read_lora(path)).collect::<Result<_>>()?;
        let first = &all[0];
        if first.config.is_some() {
            files::check_output_dir(&self.out, self.force)?;
        } else {
            files::check_output(&self.out, self.force)?;
        }
        files::check_not_input("--out", &self.out, self.adapters.iter().map(PathBuf::as_path))?;
        for other in &all[1..] {
            let problem = if other.underscored != first.underscored {
                "is written in another key style than the first adapter"
            } else if other.transposed != first.transposed {
                "has another fan_in_fan_out than the first adapter"
            } else {
                continue;
            };
            return Err(BadInput::new(&other.path, problem)
                .hint("merge each adapter into its model, and merge the models: MODEL+ADAPTER")
                .into());
        }
        let mut tensors: BTreeMap<String, Factor> = BTreeMap::new();
        let (mut errors, mut ranks) = (Map::new(), BTreeMap::new());
        let modules: BTreeSet<&String> = all.iter().flat_map(|adapter| adapter.pairs.keys()).collect();
        for module in modules {
            let pairs: Vec<(f64, &LoraPair, &LoraFile)> = all
                .iter()
                .enumerate()
                .filter_map(|(i, adapter)| Some((self.weight(i), adapter.pairs.get(module)?, adapter)))
                .collect();
            let (pair, error) = self.sum(module, &pairs)?;
            errors.extend(error.map(|error| (module.trim_start_matches('/').to_owned(), json!(error))));
            ranks.insert(module.clone(), pair.rank);
            let (down, up, alpha) = pair.names;
            // The scaling is in the factors: alpha equals the rank.
            tensors.extend(alpha.map(|name| (name, (Vec::new(), vec![pair.rank as f32]))));
            tensors.insert(down, (pair.shapes.0, pair.right));
            tensors.insert(up, (pair.shapes.1, pair.left));
        }
        for (i, adapter) in all.iter().enumerate() {
            record.input(format!("adapter:{}", i + 1), &adapter.path, adapter.digest.clone());
        }
        let largest = ranks.values().copied().max().unwrap_or(0);
        let summary = json!({"out": self.out, "modules": ranks.len(), "rank": largest, "errors": errors});
        for (name, value) in summary.as_object().into_iter().flatten().filter(|(name, _)| *name != "out") {
            record.fact(name, value.clone());
        }
        log::info!("{}: {} modules, rank {largest} at most", self.out.display(), ranks.len());
        self.write(first, &tensors, &ranks, record)?;
        Ok(summary)
    }

    fn weight(&self, i: usize) -> f64 {
        self.weights.get(i).copied().unwrap_or(1.0 / self.adapters.len() as f64)
    }

    /// The weighted sum of the products of a module, and the error if it is compressed.
    fn sum(&self, module: &str, pairs: &[(f64, &LoraPair, &LoraFile)]) -> Result<(LoraPair, Option<f64>)> {
        let (_, first, _) = pairs[0];
        let (rows, columns) = (first.left.len() / first.rank, first.right.len() / first.rank);
        for (_, pair, adapter) in pairs {
            if pair.shapes.0[1..] != first.shapes.0[1..] || pair.left.len() != rows * pair.rank {
                return Err(BadInput::new(&adapter.path, "the module has another shape than in the first adapter")
                    .tensor(&pair.names.1)
                    .expected(format!("{rows} × {columns}"))
                    .found(format!("{} × {}", pair.left.len() / pair.rank, pair.right.len() / pair.rank))
                    .hint("only adapters of one model can be combined")
                    .into());
            }
        }
        let whole: usize = pairs.iter().map(|(_, pair, _)| pair.rank).sum();
        let (mut left, mut right) = (Vec::with_capacity(rows * whole), Vec::with_capacity(whole * columns));
        for row in 0..rows {
            for (weight, pair, _) in pairs {
                left.extend(pair.left[row * pair.rank..][..pair.rank].iter().map(|v| (f64::from(*v) * weight) as f32));
            }
        }
        pairs.iter().for_each(|(_, pair, _)| right.extend(&pair.right));
        let mut product = svd::Product { left, right, rank: whole };
        let mut error = None;
        if let Some(rank) = self.rank.filter(|rank| *rank < whole) {
            let matrix = product_of(&product, rows, columns);
            product = svd::truncated(&matrix, rows, columns, rank, seed_for(0, module));
            error = Some(svd::error(&matrix, columns, &product));
            if product.rank == 0 {
                // A sum of zero still has a product of rank 1.
                product = svd::Product { left: vec![0.0; rows], right: vec![0.0; columns], rank: 1 };
            }
        }
        let (mut down, mut up) = first.shapes.clone();
        (down[0], up[1]) = (product.rank, product.rank);
        let svd::Product { left, right, rank } = product;
        Ok((LoraPair { names: first.names.clone(), shapes: (down, up), left, right, rank }, error))
    }

    fn write(
        &self,
        first: &LoraFile,
        tensors: &BTreeMap<String, Factor>,
        ranks: &BTreeMap<String, usize>,
        record: Recorder,
    ) -> Result<()> {
        let mut metadata = first.metadata.clone();
        ["sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", "lora_adapter_metadata"]
            .iter()
            .for_each(|key| drop(metadata.remove(*key)));
        let Some(config) = &first.config else {
            let staged = StagedPath::create(&self.out, self.force)?;
            write_factors(&staged.path(), tensors, self.dtype, &metadata)?;
            return record.commit(staged, &[]);
        };
        let staged = StagedDir::create(&self.out, self.force)?;
        write_factors(&staged.path().join(ADAPTER_WEIGHTS), tensors, self.dtype, &metadata)?;
        let mut config = config.clone();
        let largest = ranks.values().copied().max().unwrap_or(0);
        let modules: Vec<&str> = ranks.keys().map(|module| module.trim_start_matches('/')).collect();
        let pattern: Map<String, Value> = ranks
            .iter()
            .filter(|(_, rank)| **rank != largest)
            .map(|(module, rank)| (module.trim_start_matches('/').to_owned(), json!(rank)))
            .collect();
        if let Some(object) = config.as_object_mut() {
            object.insert("r".into(), json!(largest));
            object.insert("lora_alpha".into(), json!(largest));
            object.insert("target_modules".into(), json!(modules));
            object.insert("rank_pattern".into(), Value::Object(pattern.clone()));
            object.insert("alpha_pattern".into(), Value::Object(pattern));
            object.insert("use_rslora".into(), json!(false));
        }
        let path = staged.path().join(ADAPTER_CONFIG);
        std::fs::write(&path, json::to_text(&config)?).with_context(|| format!("writing {}", path.display()))?;
        record.write_to(&staged.path().join(RECORD_NAME))?;
        staged.commit()
    }
}

/// The elements of a product, summed in f64.
fn product_of(product: &svd::Product, rows: usize, columns: usize) -> Vec<f32> {
    let mut matrix = Vec::with_capacity(rows * columns);
    for row in 0..rows {
        let mut sums = vec![0f64; columns];
        for k in 0..product.rank {
            let factor = f64::from(product.left[row * product.rank + k]);
            let right = &product.right[k * columns..][..columns];
            sums.iter_mut().zip(right).for_each(|(sum, v)| *sum += factor * f64::from(*v));
        }
        matrix.extend(sums.into_iter().map(|v| v as f32));
    }
    matrix
}
