//! `--dry-run`: what a merge would read, do to each tensor, and write.

use std::fmt::Write;

use anyhow::Result;
use cpift_core::format::checkpoint::TensorView;
use cpift_core::run::cli;
use cpift_core::{CheckpointWriter, TensorSpec, files};
use serde_json::{Map, Value, json};

use crate::engine::{self, TensorStats};
use crate::methods::Rule;
use crate::plan::{Plan, Source};
use crate::report::Summary;

/// Prints the plan on stdout, as JSON where that is asked for. Angles are measured, which reads the inputs; nothing is written.
///
/// # Errors
/// [`cpift_core::BadInput`] where a number that must be measured is not finite; I/O errors.
pub fn show(plan: &Plan, as_json: bool) -> Result<()> {
    let preview = Preview::of(plan)?;
    cli::print(&if as_json { format!("{}\n", preview.to_json()) } else { preview.to_text() });
    Ok(())
}

struct Preview<'a> {
    plan: &'a Plan,
    summary: Summary,
    specs: Vec<TensorSpec>,
    settled: Vec<TensorStats>,
    files: usize,
    memory: u64,
    available: u64,
}

impl<'a> Preview<'a> {
    fn of(plan: &'a Plan) -> Result<Self> {
        let job = plan.job();
        let settled = engine::survey(&job)?;
        let mut summary = Summary::of(plan, &settled);
        // Cut-offs are found when a tensor is merged.
        summary.trimmed = None;
        let copies = plan.copies();
        let all: Vec<TensorSpec> = plan.specs().into_iter().chain(copies.iter().map(TensorView::spec)).collect();
        Ok(Self {
            plan,
            summary,
            specs: plan.specs(),
            settled,
            files: CheckpointWriter::shards(&all, plan.output.shard_size),
            memory: engine::peak_memory(&job, plan.bytes_to_read()),
            available: files::available_bytes(&plan.output.dir)?,
        })
    }

    /// Name, shape, settings and branches of every tensor.
    fn rows(&self) -> impl Iterator<Item = (&TensorSpec, &Rule, &TensorStats)> {
        self.specs.iter().zip(&self.plan.rules).zip(&self.settled).map(|((spec, rule), settled)| (spec, rule, settled))
    }

    fn to_json(&self) -> Value {
        let steps = |settled: &TensorStats| -> Vec<Value> {
            let steps = settled.combination.steps.iter();
            steps.map(|s| json!({"branch": s.branch.name(), "angle_degrees": s.angle.map(f64::to_degrees)})).collect()
        };
        let tensor = |(spec, rule, settled): (&TensorSpec, &Rule, &TensorStats)| json!({"name": spec.name, "shape": spec.shape, "settings": rule.describe(), "steps": steps(settled)});
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
        line(format!("{:<12}{}", "side files", output.side_files.display()));
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
        if same && self.settled.iter().all(|s| s.combination.steps.is_empty()) {
            return text;
        }
        let width = self.specs.iter().map(|s| s.name.len()).max().unwrap_or(0);
        for ((spec, _, settled), settings) in self.rows().zip(settings) {
            let settings = if same { String::new() } else { settings + "  " };
            line(format!("{:<width$}  {settings}{}", spec.name, branches(settled)).trim_end().to_owned());
        }
        text
    }
}

/// The branches a tensor takes, each with its angle.
fn branches(settled: &TensorStats) -> String {
    let step = |s: &crate::methods::sphere::Step| match s.angle {
        Some(angle) => format!("{} {:.4}°", s.branch.name(), angle.to_degrees()),
        None => s.branch.name().to_owned(),
    };
    settled.combination.steps.iter().map(step).collect::<Vec<String>>().join(", ")
}

fn bytes_of(source: &Source) -> u64 {
    source.checkpoint.tensors().map(|view| view.bytes.len() as u64).sum()
}
