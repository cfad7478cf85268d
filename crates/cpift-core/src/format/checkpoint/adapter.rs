//! LoRA adapters: `MODEL+ADAPTER` is the model with the adapter merged into its weights while they
//! are read. Adapters are PEFT directories, or files in the key styles of PEFT, diffusers and
//! kohya.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::Result;
use rayon::prelude::*;
use serde_json::Value;

use super::adapter_files::{self, Key, Part, Unknown};
use super::derive::LowRank;
use super::diagnose;
use super::reader::{Checkpoint, Excluded, TensorView};
use crate::error::BadInput;
use crate::format::digest::Digest;
use crate::format::json;
use crate::format::safetensors::{Entry, MappedFile};
use crate::log_once;

/// Prefixes under which the weights of a component stand in one file with others.
const INSIDE: [&str; 4] =
    ["model.diffusion_model.", "cond_stage_model.transformer.", "conditioner.embedders.0.transformer.", "model."];

/// Hint for adapters that only PEFT can merge.
const MERGE_FIRST: &str =
    "merge it first: PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(dir)";

/// Splits `MODEL+ADAPTER`; `None` for the path of a file or directory, and if no part before a `+`
/// is a model.
pub(super) fn split(path: &Path) -> Option<(PathBuf, PathBuf)> {
    if path.symlink_metadata().is_ok() {
        return None;
    }
    let text = path.to_str()?;
    let at = text.rmatch_indices('+').map(|(at, _)| at);
    let pairs = at.map(|at| (PathBuf::from(&text[..at]), PathBuf::from(&text[at + 1..])));
    pairs.into_iter().find(|(model, _)| model.exists() || split(model).is_some())
}

/// Path of the model in `MODEL+ADAPTER`; `None` for any other path.
pub fn model_of(path: &Path) -> Option<PathBuf> {
    split(path).map(|(model, _)| model_of(&model).unwrap_or(model))
}

/// Settings in adapter_config.json, or in the metadata of diffusers.
#[derive(Debug, Default)]
struct Settings {
    alpha: Option<f64>,
    rank: Option<u64>,
    alphas: Vec<(String, f64)>,
    ranks: Vec<(String, u64)>,
    rank_stabilized: bool,
    transposed: bool,
}

/// A file of an adapter with its settings.
struct Adapter {
    /// Path as given.
    path: PathBuf,
    file: MappedFile,
    settings: BTreeMap<String, Settings>,
    digest: Digest,
}

impl Adapter {
    fn open(path: &Path) -> Result<Self> {
        if !path.is_dir() {
            if path.symlink_metadata().is_err() {
                return Err(BadInput::new(path, "no such adapter")
                    .expected("a PEFT directory or a .safetensors file after the +")
                    .into());
            }
            if diagnose::is_pickle(path) {
                return Err(diagnose::refuse_pickle(BadInput::new(path, "is not a safetensors file"), path).into());
            }
            let file = MappedFile::open(path)?;
            let settings = of_metadata(&file)?;
            return Ok(Self { path: path.to_owned(), file, settings, digest: Digest::of_file(path)? });
        }
        let place = |name: &str| Some(path.join(name)).filter(|file| file.is_file());
        let Some(weights) = place("adapter_model.safetensors").or_else(|| place("pytorch_lora_weights.safetensors"))
        else {
            let error = BadInput::new(path, "no adapter in this directory").expected("adapter_model.safetensors");
            return Err(match place("adapter_model.bin") {
                Some(pickle) => diagnose::refuse_pickle(error, &pickle).into(),
                None => error.into(),
            });
        };
        let file = MappedFile::open(&weights)?;
        let digest = Digest::of_file(&weights)?;
        let Some(config) = place("adapter_config.json") else {
            let settings = of_metadata(&file)?;
            return Ok(Self { path: path.to_owned(), file, settings, digest });
        };
        let value: Value = json::read(&config)?;
        let settings = BTreeMap::from([(String::new(), of_config(&config, &value)?)]);
        let digest = Digest::of_chunks([digest.to_string(), Digest::of_file(&config)?.to_string()]);
        Ok(Self { path: path.to_owned(), file, settings, digest })
    }

    fn settings(&self, component: &str) -> Option<&Settings> {
        self.settings.get(component).or_else(|| self.settings.get(""))
    }

    /// A tensor of the file.
    fn view<'a>(&'a self, name: &'a str) -> TensorView<'a> {
        let entry = &self.file.entries[name];
        let (bytes, file) = (self.file.bytes(entry), self.file.path.as_path());
        TensorView { name, dtype: entry.dtype, shape: &entry.shape, bytes, file, derived: None }
    }

    fn error(&self, message: impl Into<String>, tensor: &str) -> BadInput {
        BadInput::new(&self.file.path, message).tensor(tensor)
    }
}

/// Settings in adapter_config.json.
fn of_config(path: &Path, config: &Value) -> Result<Settings> {
    let text = |key: &str| config.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let kind = text("peft_type");
    if kind != "LORA" {
        return Err(BadInput::new(path, "an adapter of a kind that is not supported")
            .expected("peft_type LORA")
            .found(if kind.is_empty() { "none".to_owned() } else { kind })
            .hint(MERGE_FIRST)
            .into());
    }
    let start = text("init_lora_weights").to_lowercase();
    if ["pissa", "olora", "corda", "loftq"].iter().any(|name| start.starts_with(name)) {
        return Err(BadInput::new(path, "the adapter was trained on changed base weights")
            .found(format!("init_lora_weights {start}"))
            .hint("convert it to a plain LoRA in PEFT: save_pretrained(dir, path_initial_model_for_weight_conversion=...)")
            .into());
    }
    let on = |key: &str| config.get(key).and_then(Value::as_bool).unwrap_or(false);
    let given = |key: &str| config.get(key).is_some_and(|v| !v.is_null() && *v != Value::Bool(false));
    for key in ["layer_replication", "lora_bias", "use_qalora", "alora_invocation_tokens", "arrow_config"] {
        if given(key) {
            return Err(BadInput::new(path, format!("{key} is not supported"))
                .found(config[key].to_string())
                .hint(MERGE_FIRST)
                .into());
        }
    }
    let pattern = |key: &str| config.get(key).and_then(Value::as_object).into_iter().flatten();
    for key in ["alpha_pattern", "rank_pattern"] {
        check_patterns(path, key, pattern(key).map(|(pattern, _)| pattern))?;
    }
    Ok(Settings {
        alpha: config.get("lora_alpha").and_then(Value::as_f64),
        rank: config.get("r").and_then(Value::as_u64),
        alphas: pattern("alpha_pattern").filter_map(|(k, v)| Some((k.clone(), v.as_f64()?))).collect(),
        ranks: pattern("rank_pattern").filter_map(|(k, v)| Some((k.clone(), v.as_u64()?))).collect(),
        rank_stabilized: on("use_rslora"),
        transposed: on("fan_in_fan_out"),
    })
}

/// Settings that diffusers stores in the metadata of the file, by component.
fn of_metadata(file: &MappedFile) -> Result<BTreeMap<String, Settings>> {
    let Some(text) = file.metadata.get("lora_adapter_metadata") else { return Ok(BTreeMap::new()) };
    let value: Value = serde_json::from_str(text)
        .map_err(|e| BadInput::new(&file.path, format!("lora_adapter_metadata is not JSON: {e}")))?;
    let mut settings: BTreeMap<String, Settings> = BTreeMap::new();
    for (key, value) in value.as_object().into_iter().flatten() {
        let (component, key) = key.rsplit_once('.').unwrap_or(("", key));
        let of = settings.entry(component.to_owned()).or_default();
        match key {
            "lora_alpha" => of.alpha = value.as_f64(),
            "use_rslora" => of.rank_stabilized = value.as_bool().unwrap_or(false),
            "alpha_pattern" => {
                let pairs = value.as_object().into_iter().flatten();
                check_patterns(&file.path, key, pairs.clone().map(|(pattern, _)| pattern))?;
                of.alphas = pairs.filter_map(|(k, v)| Some((k.clone(), v.as_f64()?))).collect();
            }
            _ => {}
        }
    }
    Ok(settings)
}

/// Refuses patterns whose regular expressions are not understood here.
fn check_patterns<'a>(path: &Path, key: &str, patterns: impl Iterator<Item = &'a String>) -> Result<()> {
    for pattern in patterns {
        let plain = pattern.trim_start_matches('^').trim_end_matches('$').replace("\\.", "").replace(".*", "");
        if plain.contains(['\\', '[', ']', '(', ')', '{', '}', '|', '?', '+', '*', '^', '$']) {
            return Err(BadInput::new(path, format!("{key} has a regular expression that is not supported"))
                .expected(r"names of modules, with ^, $, \. and .*")
                .found(pattern.as_str())
                .hint(MERGE_FIRST)
                .into());
        }
    }
    Ok(())
}

/// Value of the first pattern that fits `module`, as PEFT matches: at the end of its name, after a
/// dot or as a whole. `.*` stands for any characters.
fn matching<T: Copy>(patterns: &[(String, T)], module: &str) -> Option<T> {
    patterns.iter().find(|(pattern, _)| fits(pattern, module)).map(|(_, value)| *value)
}

fn fits(pattern: &str, module: &str) -> bool {
    let from_start = pattern.starts_with('^');
    let pattern = pattern.trim_start_matches('^').trim_end_matches('$').replace("\\.", ".");
    let ends: Vec<&str> = if from_start {
        vec![module]
    } else {
        [module].into_iter().chain(module.match_indices('.').map(|(at, _)| &module[at + 1..])).collect()
    };
    let parts: Vec<&str> = pattern.split(".*").collect();
    ends.into_iter().any(|name| {
        let [first, middle @ .., last] = &parts[..] else { return name == pattern };
        let Some(mut rest) = name.strip_prefix(first) else { return false };
        for part in middle {
            let Some(at) = rest.find(part) else { return false };
            rest = &rest[at + part.len()..];
        }
        rest.ends_with(last)
    })
}

/// Names of the tensors of a model, as adapters spell them.
struct Names<'a> {
    checkpoint: &'a Checkpoint,
    /// Names with underscores for dots, and without the prefixes in [`INSIDE`].
    underscored: BTreeMap<String, BTreeSet<&'a str>>,
}

impl<'a> Names<'a> {
    fn of(checkpoint: &'a Checkpoint) -> Self {
        let mut underscored: BTreeMap<String, BTreeSet<&str>> = BTreeMap::new();
        for view in checkpoint.parameters() {
            let Some(module) = view.name.strip_suffix(".weight") else { continue };
            let inside = INSIDE.iter().filter_map(|prefix| module.strip_prefix(prefix));
            for spelling in [module].into_iter().chain(inside) {
                underscored.entry(spelling.replace('.', "_")).or_default().insert(view.name);
            }
        }
        Self { checkpoint, underscored }
    }

    /// Names of tensors that `key` can stand for, of which there must be one.
    fn find(&self, key: &Key) -> BTreeSet<String> {
        let end = if key.part == Part::Whole { "" } else { ".weight" };
        let in_component = format!("{}/{}", key.component, key.module);
        if key.underscored {
            let names = |spelling: &str| self.underscored.get(&spelling.replace('.', "_")).cloned().unwrap_or_default();
            let own = names(&in_component);
            let found = if own.is_empty() { names(&key.module) } else { own };
            return found.into_iter().map(str::to_owned).collect();
        }
        let has = |name: &String| self.checkpoint.get(name).is_some();
        let dotted = format!("{}.{}{end}", key.component, key.module);
        for exact in [format!("{in_component}{end}"), dotted, format!("{}{end}", key.module)] {
            if has(&exact) {
                return BTreeSet::from([exact]);
            }
        }
        let shorter = INSIDE.iter().filter_map(|prefix| key.module.strip_prefix(prefix).map(str::to_owned));
        let longer = INSIDE.iter().map(|prefix| format!("{prefix}{}", key.module));
        shorter.chain(longer).map(|module| format!("{module}{end}")).filter(has).collect()
    }
}

/// The parts of the product of one tensor: the names of the adapter's tensors.
type Parts = BTreeMap<Part, String>;

/// Merges the adapter at `path` into `checkpoint`.
///
/// # Errors
/// [`BadInput`] that names the first tensor that does not fit the model.
pub(super) fn apply(checkpoint: &mut Checkpoint, path: &Path) -> Result<()> {
    let adapter = Adapter::open(path)?;
    let (products, whole) = assign(checkpoint, &adapter)?;
    let tied = |(view, why): (TensorView<'_>, Excluded)| (why == Excluded::Tied).then(|| view.name.to_owned());
    let tied: BTreeSet<String> = checkpoint.not_parameters().filter_map(tied).collect();
    if let Some(target) = products.keys().chain(whole.keys()).find(|target| tied.contains(*target)) {
        return Err(BadInput::new(
            &adapter.path,
            "changes the output embedding, which the model ties to its input embedding",
        )
        .tensor(target)
        .expected("products for untied weights")
        .hint(MERGE_FIRST)
        .into());
    }
    let mut replaced: Vec<(String, Entry)> = Vec::new();
    for (target, name) in whole {
        let (view, model) = (adapter.view(&name), checkpoint.get(&target).expect("it was found"));
        if view.shape != model.shape || !view.dtype.is_float() {
            return Err(adapter
                .error(format!("does not have the shape of {target} in {}", checkpoint.path().display()), &name)
                .expected(format!("{:?}", model.shape))
                .found(format!("{:?}", view.shape))
                .hint("for an adapter with added tokens, merge it in PEFT after resize_token_embeddings, and save the model")
                .into());
        }
        replaced.push((target, adapter.file.entries[&name].clone()));
    }
    let mut low_rank = Vec::new();
    for (target, (module, component, parts)) in &products {
        let model = checkpoint.get(target).expect("it was found");
        low_rank.push((target.clone(), product(&adapter, &model, module, component, parts)?));
    }
    log_once::info(format!(
        "{}: {} weights with a product of the adapter, {} replaced",
        checkpoint.path().display(),
        low_rank.len(),
        replaced.len()
    ));
    let Adapter { path, digest, file, .. } = adapter;
    checkpoint.adapt(path, digest, file, replaced, low_rank);
    Ok(())
}

/// Products by the tensor of the model, with module, component and parts; and the tensors that are
/// replaced.
type Assigned = (BTreeMap<String, (String, String, Parts)>, BTreeMap<String, String>);

fn assign(checkpoint: &Checkpoint, adapter: &Adapter) -> Result<Assigned> {
    let names = Names::of(checkpoint);
    let mut products: BTreeMap<String, (String, String, Parts)> = BTreeMap::new();
    let mut whole = BTreeMap::new();
    // The first tensor without a place, and the number of those with one, by component.
    let mut groups: BTreeMap<String, (Option<String>, usize)> = BTreeMap::new();
    for name in adapter.file.entries.keys() {
        let key = adapter_files::parse(name).map_err(|Unknown(kind)| {
            adapter
                .error(format!("{kind} is not supported"), name)
                .expected("LoRA in the style of PEFT (lora_A, lora_B), diffusers or kohya (lora_down, lora_up, alpha)")
        })?;
        let found = names.find(&key);
        if found.len() > 1 {
            let all: Vec<&str> = found.iter().map(String::as_str).collect();
            return Err(adapter.error("fits several tensors of the model", name).found(all.join(", ")).into());
        }
        let group = groups.entry(key.component.clone()).or_default();
        let Some(target) = found.into_iter().next() else {
            group.0.get_or_insert_with(|| name.clone());
            continue;
        };
        group.1 += 1;
        if key.part == Part::Whole {
            whole.insert(target, name.clone());
            continue;
        }
        let (_, _, parts) = products.entry(target).or_insert_with(|| (key.module, key.component, Parts::new()));
        if let Some(other) = parts.insert(key.part, name.clone()) {
            return Err(adapter.error("a second part of one product", name).found(format!("also {other}")).into());
        }
    }
    let fits = groups.values().any(|(missing, found)| missing.is_none() && *found > 0);
    for (component, (missing, found)) in &groups {
        let Some(name) = missing else { continue };
        if fits && *found == 0 && !component.is_empty() {
            log_once::warn(format!(
                "{}: the part of the adapter for the {component} is left out: the model has none",
                adapter.path.display()
            ));
            continue;
        }
        return Err(adapter
            .error(format!("no tensor of {} belongs to this one", checkpoint.path().display()), name)
            .expected("an adapter of this model")
            .hint("check that the adapter was trained on this model: base_model_name_or_path names its own")
            .into());
    }
    Ok((products, whole))
}

/// The product that is added to `model`.
fn product(adapter: &Adapter, model: &TensorView<'_>, module: &str, component: &str, parts: &Parts) -> Result<LowRank> {
    let embedding = parts.contains_key(&Part::EmbeddingDown) || parts.contains_key(&Part::EmbeddingUp);
    let (down, up) = if embedding { (Part::EmbeddingDown, Part::EmbeddingUp) } else { (Part::Down, Part::Up) };
    let any = parts.values().next().expect("a product has a part");
    let part = |part: Part, name: &str| {
        let missing =
            || anyhow::Error::from(adapter.error(format!("the adapter has no {name} for {}", model.name), any));
        parts.get(&part).map(|tensor| adapter.view(tensor)).ok_or_else(missing)
    };
    let (down, up) = (part(down, "lora_A (lora_down)")?, part(up, "lora_B (lora_up)")?);
    for view in [&down, &up] {
        check_factor(adapter, view)?;
    }
    let settings = adapter.settings(component);
    let transposed = embedding || settings.is_some_and(|s| s.transposed) && model.shape.len() == 2;
    let rank = check_ranks(adapter, &down, &up, settings, module)?;
    let (rows, columns) = match model.shape {
        [rows, ..] => (*rows, model.numel() / (*rows).max(1)),
        [] => (1, 1),
    };
    let (outer, inner) = if transposed { (columns, rows) } else { (rows, columns) };
    for (view, expected) in [(&down, [rank, inner]), (&up, [outer, rank])] {
        if view.shape[0] != expected[0] || Some(view.numel()) != expected[0].checked_mul(expected[1]) {
            return Err(adapter
                .error(format!("does not fit the shape {:?} of {} in the model", model.shape, model.name), view.name)
                .expected(format!("{expected:?}"))
                .found(format!("{:?}", view.shape))
                .hint("the adapter was trained on another model, or (for GPT-2) without fan_in_fan_out")
                .into());
        }
    }
    let scaling = scaling(adapter, parts, settings, module, rank)?;
    let (a, b) = (numbers(adapter, &down)?, numbers(adapter, &up)?);
    let (mut left, right) = match transposed {
        true => (transpose(&a, rank, inner), transpose(&b, outer, rank)),
        false => (b, a),
    };
    left.iter_mut().for_each(|v| *v = (f64::from(*v) * scaling) as f32);
    let mut product = LowRank { columns, rank, left, right, magnitude: None };
    if let Some(name) = parts.get(&Part::Magnitude) {
        let view = adapter.view(name);
        if transposed || model.shape.len() != 2 || view.numel() != rows {
            return Err(adapter
                .error("DoRA is supported for matrices of linear layers only", name)
                .expected(format!("{rows} numbers"))
                .found(format!("{:?}", view.shape))
                .hint(MERGE_FIRST)
                .into());
        }
        product.magnitude = Some(factors(&numbers(adapter, &view)?, model, &product));
    }
    Ok(product)
}

fn check_factor(adapter: &Adapter, view: &TensorView<'_>) -> Result<()> {
    if view.dtype.is_float() && view.shape.len() >= 2 && view.numel() > 0 {
        return Ok(());
    }
    Err(adapter
        .error("is not a matrix of floating-point numbers", view.name)
        .found(format!("{} {:?}", view.dtype, view.shape))
        .into())
}

/// The rank of a product, the same in both factors and in the settings.
fn check_ranks(
    adapter: &Adapter,
    down: &TensorView<'_>,
    up: &TensorView<'_>,
    settings: Option<&Settings>,
    module: &str,
) -> Result<usize> {
    let rank = down.shape[0];
    if up.shape[1] != rank || rank == 0 {
        return Err(adapter
            .error(format!("its rank differs from that of {}", down.name), up.name)
            .expected(format!("rank {rank}"))
            .found(format!("rank {}", up.shape[1]))
            .into());
    }
    let asked = settings.and_then(|s| matching(&s.ranks, module).or(s.rank));
    if let Some(asked) = asked.filter(|asked| *asked != rank as u64) {
        return Err(adapter
            .error("its rank differs from that in adapter_config.json", down.name)
            .expected(format!("rank {asked}"))
            .found(format!("rank {rank}"))
            .into());
    }
    Ok(rank)
}

/// Factor of a product: alpha over the rank or its root, or 1 without an alpha.
fn scaling(adapter: &Adapter, parts: &Parts, settings: Option<&Settings>, module: &str, rank: usize) -> Result<f64> {
    let mut alpha = settings.and_then(|s| matching(&s.alphas, module).or(s.alpha));
    if let Some(name) = parts.get(&Part::Alpha) {
        let view = adapter.view(name);
        if view.numel() != 1 || !view.dtype.is_float() {
            return Err(adapter.error("alpha is not one number", name).found(format!("{:?}", view.shape)).into());
        }
        let mut value = [0f64];
        view.read(0, &mut value);
        alpha = Some(value[0]);
    }
    let stabilized = settings.is_some_and(|s| s.rank_stabilized);
    let divisor = if stabilized { (rank as f64).sqrt() } else { rank as f64 };
    Ok(alpha.map_or(1.0, |alpha| alpha / divisor))
}

/// A LoRA adapter by itself, without its model.
pub struct LoraFile {
    /// Path as given.
    pub path: PathBuf,
    /// Content of adapter_config.json, for a PEFT directory.
    pub config: Option<Value>,
    /// String metadata of the file.
    pub metadata: BTreeMap<String, String>,
    /// Digest of its files.
    pub digest: Digest,
    /// True for the key style of kohya, with underscores for dots.
    pub underscored: bool,
    /// True if the products are those of transposed weights (`fan_in_fan_out`).
    pub transposed: bool,
    /// Products by the name of their module in the file.
    pub pairs: BTreeMap<String, LoraPair>,
}

/// The product of one module, as an adapter stores it.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraPair {
    /// Names of A (down) and B (up) in the file, and of alpha if it has one.
    pub names: (String, String, Option<String>),
    /// Shapes of A and B.
    pub shapes: (Vec<usize>, Vec<usize>),
    /// B times the scaling, row-major: one row per row of the weight.
    pub left: Vec<f32>,
    /// A, row-major.
    pub right: Vec<f32>,
    /// Rank.
    pub rank: usize,
}

/// Reads the adapter at `path`.
///
/// # Errors
/// [`BadInput`] for an adapter that holds more than products of two matrices.
pub fn read_lora(path: &Path) -> Result<LoraFile> {
    let adapter = Adapter::open(path)?;
    let mut parts: BTreeMap<String, (Key, Parts)> = BTreeMap::new();
    let mut underscored = None;
    for name in adapter.file.entries.keys() {
        let key = adapter_files::parse(name)
            .map_err(|Unknown(kind)| adapter.error(format!("{kind} is not supported"), name).expected("plain LoRA"))?;
        if !matches!(key.part, Part::Down | Part::Up | Part::Alpha) {
            return Err(adapter
                .error("cannot be combined with other adapters", name)
                .expected("adapters of lora_A and lora_B (lora_down, lora_up, alpha) only")
                .hint("merge the adapter into its model, and merge the models")
                .into());
        }
        let module = format!("{}/{}", key.component, key.module);
        let (part, style) = (key.part, key.underscored);
        if *underscored.get_or_insert(style) != style {
            return Err(adapter.error("keys of two styles in one adapter", name).hint(MERGE_FIRST).into());
        }
        let places = &mut parts.entry(module).or_insert_with(|| (key, Parts::new())).1;
        if let Some(other) = places.insert(part, name.clone()) {
            return Err(adapter.error("the same factor of the same module twice", name).found(other).into());
        }
    }
    let mut pairs = BTreeMap::new();
    for (module, (key, names)) in parts {
        let any = names.values().next().expect("a module has a part");
        let view = |part: Part| {
            let missing = || anyhow::Error::from(adapter.error("the other factor of this product is missing", any));
            names.get(&part).map(|name| adapter.view(name)).ok_or_else(missing)
        };
        let (down, up) = (view(Part::Down)?, view(Part::Up)?);
        for view in [&down, &up] {
            check_factor(&adapter, view)?;
        }
        let rank = check_ranks(&adapter, &down, &up, adapter.settings(&key.component), &key.module)?;
        let scaling = scaling(&adapter, &names, adapter.settings(&key.component), &key.module, rank)?;
        let mut left = numbers(&adapter, &up)?;
        left.iter_mut().for_each(|v| *v = (f64::from(*v) * scaling) as f32);
        let pair = LoraPair {
            names: (down.name.to_owned(), up.name.to_owned(), names.get(&Part::Alpha).cloned()),
            shapes: (down.shape.to_vec(), up.shape.to_vec()),
            left,
            right: numbers(&adapter, &down)?,
            rank,
        };
        pairs.insert(module, pair);
    }
    let config = path.join("adapter_config.json");
    let config = config.is_file().then(|| json::read(&config)).transpose()?;
    let metadata = adapter.file.metadata.clone();
    let transposed = adapter.settings("").is_some_and(|settings| settings.transposed);
    let underscored = underscored.unwrap_or(false);
    Ok(LoraFile { path: adapter.path, config, metadata, digest: adapter.digest, underscored, transposed, pairs })
}

/// The elements of a tensor, which must be finite.
fn numbers(adapter: &Adapter, view: &TensorView<'_>) -> Result<Vec<f32>> {
    let mut values = vec![0f32; view.numel()];
    view.read(0, &mut values);
    match values.iter().position(|v| !v.is_finite()) {
        None => Ok(values),
        Some(at) => Err(adapter
            .error("a weight that is not a finite number", view.name)
            .found(format!("{} at element {at}", values[at]))
            .into()),
    }
}

fn transpose(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|column| (0..rows).map(move |row| values[row * columns + column])).collect()
}

/// Factor of each row of DoRA: its magnitude over the norm of the row with the product.
fn factors(magnitude: &[f32], model: &TensorView<'_>, product: &LowRank) -> Vec<f32> {
    let factor = |(row, magnitude): (usize, &f32)| {
        let mut values = vec![0f32; product.columns];
        model.read(row * product.columns, &mut values);
        product.product(row, 0, &mut values);
        let norm = values.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt();
        (f64::from(*magnitude) / norm) as f32
    };
    magnitude.par_iter().enumerate().map(factor).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_fit_the_end_of_a_name_as_in_peft() {
        for (pattern, module, expected) in [
            ("q_proj", "model.layers.0.self_attn.q_proj", true),
            ("q_proj", "model.layers.0.self_attn.my_q_proj", false),
            ("layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj", true),
            ("layers.0.self_attn.q_proj", "model.layers.10.self_attn.q_proj", false),
            ("layers.1.*q_proj", "model.layers.1.self_attn.q_proj", true),
            (r"layers\.1\..*proj", "model.layers.1.self_attn.q_proj", true),
            ("layers.1.*q_proj", "model.layers.1.self_attn.k_proj", false),
            ("^layers.0.q", "model.layers.0.q", false),
        ] {
            assert_eq!(fits(pattern, module), expected, "{pattern} {module}");
        }
    }

    #[test]
    fn a_path_is_split_at_the_plus_after_a_model() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["a", "a+b", "c"] {
            std::fs::create_dir(at(name)).unwrap();
        }
        assert_eq!(split(&at("a+b")), None);
        assert_eq!(split(&at("nothing+c")), None);
        assert_eq!(split(&at("a+c/x")), Some((at("a"), PathBuf::from("c/x"))));
        assert_eq!(split(&at("a+b+c")), Some((at("a+b"), PathBuf::from("c"))));
    }
}
