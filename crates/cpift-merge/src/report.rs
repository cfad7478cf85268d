//! Reports: the summary of a merge (counts, branches, angles) for the log, `--json` and provenance,
//! and the preview that `--dry-run` prints.

use std::fmt::Write;

use anyhow::Result;
use cpift_core::format::checkpoint::{OtherFiles, TensorView};
use cpift_core::run::cli;
use cpift_core::{CheckpointWriter, TensorSpec, files};
use serde_json::{Map, Value, json};

use crate::engine::{self, TensorStats};
use crate::methods::Rule;
use crate::methods::sphere::{Branch, Step};
use crate::plan::{Plan, Source};
use crate::request::{Method, Space};

/// Figures of a merge.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Summary {
    method: &'static str,
    out: String,
    dtype: String,
    space: Space,
    tensors: usize,
    /// Number of elements of all tensors.
    parameters: u64,
    /// Number of interpolations per branch, in the order of [`Branch::ALL`]; one interpolation per
    /// tensor and task.
    branches: [u64; 4],
    /// All angles in degrees, in ascending order.
    angles: Vec<f64>,
    /// Number of elements in at least one core region.
    core: u64,
    /// Number of elements in at least two core regions.
    conflicts: u64,
    /// Names of the tensors that are not parameters and are copied from the backbone.
    copied: Vec<String>,
    /// Files of the backbone that are copied, and weights beside them that are not.
    others: OtherFiles,
    /// True if the parameters have several dtypes.
    mixed: bool,
    /// Number of elements at the cut-offs of trims, and number of those kept by a hash alone; for
    /// methods that trim.
    trimmed: Option<[u64; 2]>,
}

impl Summary {
    pub fn of(plan: &Plan, stats: &[TensorStats]) -> Self {
        let steps = || stats.iter().flat_map(|s| &s.combination.steps);
        let mut angles: Vec<f64> = steps().filter_map(|s| s.angle).map(f64::to_degrees).collect();
        angles.sort_by(f64::total_cmp);
        let trims = stats.iter().map(|s| s.trimmed);
        let ties = trims.fold([0; 2], |[at, by], t| [at + t.at_threshold, by + t.decided_by_hash]);
        Self {
            method: plan.method,
            out: plan.output.dir.display().to_string(),
            dtype: plan.output.dtype.to_string(),
            space: plan.space,
            tensors: stats.len(),
            parameters: plan.specs().iter().map(|s| s.numel() as u64).sum(),
            branches: Branch::ALL.map(|branch| steps().filter(|s| s.branch == branch).count() as u64),
            angles,
            core: stats.iter().map(|s| s.core).sum(),
            conflicts: stats.iter().map(|s| s.conflicts).sum(),
            copied: plan.copies().iter().map(|view| view.name.to_owned()).collect(),
            others: plan.output.others.clone(),
            mixed: plan.output.dtypes.iter().any(|dtype| *dtype != plan.output.dtype),
            trimmed: (plan.method == Method::Ties.name()).then_some(ties),
        }
    }

    /// Returns true if tensors were interpolated at angles.
    fn has_angles(&self) -> bool {
        self.branches.iter().any(|n| *n > 0)
    }

    /// Figures by name, the same for the same inputs and arguments.
    pub fn facts(&self) -> Map<String, Value> {
        let mut facts = Map::new();
        facts.insert("method".into(), json!(self.method));
        facts.insert("dtype".into(), json!(self.dtype));
        facts.insert("tensors".into(), json!(self.tensors));
        facts.insert("parameters".into(), json!(self.parameters));
        facts.insert("copied".into(), json!(self.copied));
        facts.insert("files".into(), json!(self.others.files));
        if !self.others.weights.is_empty() {
            facts.insert("left_out".into(), json!(self.others.weights));
        }
        if self.has_angles() {
            facts.insert("space".into(), json!(self.space.name()));
            let named: Map<String, Value> =
                Branch::ALL.iter().zip(self.branches).map(|(b, n)| (b.name().to_owned(), json!(n))).collect();
            facts.insert("branches".into(), Value::Object(named));
            facts.insert(
                "angles_degrees".into(),
                self.angle_range()
                    .map_or(Value::Null, |[min, median, max]| json!({"min": min, "median": median, "max": max})),
            );
        }
        if self.method == "cpi" {
            facts.insert("core".into(), json!(self.core));
            facts.insert("conflicts".into(), json!(self.conflicts));
        }
        if let Some([at_cut, decided_by_hash]) = self.trimmed {
            facts.insert("trim".into(), json!({"at_cut": at_cut, "decided_by_hash": decided_by_hash}));
        }
        facts
    }

    /// Object that `--json` prints.
    pub fn to_json(&self) -> Value {
        let mut object = Map::from_iter([("out".to_owned(), json!(self.out))]);
        object.extend(self.facts());
        Value::Object(object)
    }

    /// Smallest, median (the lower of two) and largest angle in degrees.
    fn angle_range(&self) -> Option<[f64; 3]> {
        let n = self.angles.len();
        (n > 0).then(|| [self.angles[0], self.angles[(n - 1) / 2], self.angles[n - 1]])
    }

    /// Logs the figures.
    pub fn log(&self) {
        let mixed = if self.mixed { " and others" } else { "" };
        log::info!("{}: {} tensors, {} parameters, {}{mixed}", self.out, self.tensors, self.parameters, self.dtype);
        self.lines().iter().for_each(|line| log::info!("{line}"));
    }

    /// Lines of text with the figures other than the numbers of tensors and parameters.
    fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        if !self.copied.is_empty() {
            lines.push(format!("copied unchanged, not parameters: {}", self.copied.join(", ")));
        }
        if !self.others.files.is_empty() {
            lines.push(format!("files of the base beside its weights: {}", some(&self.others.files)));
        }
        if !self.others.weights.is_empty() {
            lines.push(format!("left out, other weights of the base: {}", some(&self.others.weights)));
        }
        if self.method == "cpi" {
            let percent = 100.0 * self.core as f64 / self.parameters.max(1) as f64;
            let (core, conflicts) = (self.core, self.conflicts);
            lines.push(format!("core: {core} elements ({percent:.3} %), {conflicts} of them claimed twice or more"));
        }
        if let Some([at_cut, by_hash]) = self.trimmed {
            lines.push(format!("trimmed: {at_cut} elements at the cut-offs, {by_hash} of them kept by a hash alone"));
        }
        if let Some([min, median, max]) = self.angle_range() {
            lines.push(format!("angles: min {min:.4}°, median {median:.4}°, max {max:.4}°"));
        }
        if self.has_angles() {
            let [slerp, collinear, opposite, zero] = self.branches;
            lines.push(format!(
                "interpolations: {slerp} on the sphere; linear: {collinear} collinear, {opposite} opposite, {zero} zero"
            ));
            if self.space == Space::Weights && slerp == 0 && collinear > 0 {
                lines.push(
                    "every angle is below ε, so SLERP was linear throughout; --space delta compares the updates".into(),
                );
            }
        }
        lines
    }
}

/// The first names of a list, and the number of the rest.
fn some(names: &[String]) -> String {
    const SHOWN: usize = 12;
    let rest = names.len().saturating_sub(SHOWN);
    let more = if rest > 0 { format!(", and {rest} more") } else { String::new() };
    names[..names.len() - rest].join(", ") + &more
}

/// Prints the plan on stdout, as text or JSON. Angles are measured, which reads the inputs; nothing
/// is written.
///
/// # Errors
/// [`cpift_core::BadInput`] if a number that must be measured is not finite.
pub(crate) fn preview(plan: &Plan, as_json: bool) -> Result<()> {
    let preview = Preview::of(plan)?;
    cli::print(&if as_json { format!("{}\n", preview.to_json()) } else { preview.to_text() });
    Ok(())
}

/// A plan with the figures that can be known before it runs.
struct Preview<'a> {
    plan: &'a Plan,
    summary: Summary,
    specs: Vec<TensorSpec>,
    stats: Vec<TensorStats>,
    /// Number of files of tensors.
    files: usize,
    /// Estimate of the memory in bytes.
    memory: u64,
    /// Free disk space in bytes.
    available: u64,
}

impl<'a> Preview<'a> {
    fn of(plan: &'a Plan) -> Result<Self> {
        let stats = engine::survey(plan)?;
        let mut summary = Summary::of(plan, &stats);
        // Cut-offs are computed when a tensor is merged.
        summary.trimmed = None;
        let copies = plan.copies();
        let all: Vec<TensorSpec> = plan.specs().into_iter().chain(copies.iter().map(TensorView::spec)).collect();
        Ok(Self {
            plan,
            summary,
            specs: plan.specs(),
            stats,
            files: CheckpointWriter::shards(&plan.output.layout, &all, plan.output.shard_size),
            memory: engine::peak_memory(plan),
            available: files::available_bytes(&plan.output.dir)?,
        })
    }

    /// Name and shape, rule and statistics of every tensor.
    fn rows(&self) -> impl Iterator<Item = (&TensorSpec, &Rule, &TensorStats)> {
        self.specs.iter().zip(&self.plan.rules).zip(&self.stats).map(|((spec, rule), stats)| (spec, rule, stats))
    }

    fn to_json(&self) -> Value {
        let steps = |stats: &TensorStats| -> Vec<Value> {
            let steps = stats.combination.steps.iter();
            steps.map(|s| json!({"branch": s.branch.name(), "angle_degrees": s.angle.map(f64::to_degrees)})).collect()
        };
        let tensor = |(spec, rule, stats): (&TensorSpec, &Rule, &TensorStats)| json!({"name": spec.name, "shape": spec.shape, "settings": rule.describe(), "steps": steps(stats)});
        let input = |source: &Source| json!({"role": source.role, "path": source.path(), "bytes": bytes_of(source)});
        let mut object =
            Map::from_iter([("dry_run".to_owned(), json!(true)), ("out".to_owned(), json!(self.plan.output.dir))]);
        object.extend(self.summary.facts());
        let figures = json!({
            "inputs": self.plan.sources().map(input).collect::<Vec<Value>>(),
            "side_files": self.plan.output.side_files,
            "bytes_to_read": self.plan.bytes_to_read(),
            "bytes_to_write": self.plan.bytes_to_write(),
            "bytes_available": self.available,
            "files": self.files,
            "peak_memory": self.memory,
            "plan": self.rows().map(tensor).collect::<Vec<Value>>(),
        });
        object.extend(figures.as_object().expect("written as an object").clone());
        Value::Object(object)
    }

    fn to_text(&self) -> String {
        let (plan, mut text) = (self.plan, String::new());
        let mut line = |content: String| writeln!(text, "{content}").expect("writing to a string");
        line(format!("{} of {} tensors, {} parameters", plan.method, self.summary.tensors, self.summary.parameters));
        for source in plan.sources() {
            line(format!("{:<12}{} ({} bytes)", source.role, source.path().display(), bytes_of(source)));
        }
        for (role, (path, _)) in &plan.files {
            line(format!("{role:<12}{}", path.display()));
        }
        let output = &plan.output;
        line(format!("{:<12}{} ({}, {} files of tensors)", "output", output.dir.display(), output.dtype, self.files));
        if let Some(folder) = &output.side_files {
            line(format!("{:<12}{}", "side files", folder.display()));
        }
        line(format!("{:<12}{} bytes", "to read", plan.bytes_to_read()));
        line(format!("{:<12}{} bytes, of {} free", "to write", plan.bytes_to_write(), self.available));
        line(format!("{:<12}about {} MiB", "memory", self.memory.div_ceil(1 << 20)));
        for fact in self.summary.lines() {
            line(fact);
        }
        let settings: Vec<String> = plan.rules.iter().map(Rule::describe).collect();
        let same = settings.windows(2).all(|pair| pair[0] == pair[1]);
        if let (true, Some(first)) = (same, settings.first()) {
            line(format!("{:<12}{first}", "settings"));
        }
        if same && self.stats.iter().all(|s| s.combination.steps.is_empty()) {
            return text;
        }
        let width = self.specs.iter().map(|s| s.name.len()).max().unwrap_or(0);
        for ((spec, _, stats), settings) in self.rows().zip(settings) {
            let settings = if same { String::new() } else { settings + "  " };
            line(format!("{:<width$}  {settings}{}", spec.name, branches(stats)).trim_end().to_owned());
        }
        text
    }
}

/// Branches that a tensor takes, each with its angle.
fn branches(stats: &TensorStats) -> String {
    let step = |s: &Step| match s.angle {
        Some(angle) => format!("{} {:.4}°", s.branch.name(), angle.to_degrees()),
        None => s.branch.name().to_owned(),
    };
    stats.combination.steps.iter().map(step).collect::<Vec<String>>().join(", ")
}

fn bytes_of(source: &Source) -> u64 {
    source.checkpoint.tensors().map(|view| view.bytes.len() as u64).sum()
}
