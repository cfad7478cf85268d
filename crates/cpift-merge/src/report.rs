//! What a merge tells of itself: counts, branches and angles, for the log, `--json` and provenance.

use serde_json::{Map, Value, json};

use crate::cli::Space;
use crate::engine::TensorStats;
use crate::methods::sphere::Branch;
use crate::plan::Plan;

/// The figures of a finished merge.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    method: &'static str,
    out: String,
    dtype: String,
    space: Space,
    /// Numbers of tensors and of elements in them.
    pub tensors: usize,
    /// D.
    pub parameters: u64,
    /// Interpolations by branch, in the order of [`Branch::ALL`]; one for each tensor and task.
    pub branches: [u64; 4],
    /// All angles in degrees, in ascending order.
    pub angles: Vec<f64>,
    /// Elements in at least one core region.
    pub core: u64,
    /// Elements in at least two.
    pub conflicts: u64,
    /// Tensors that are not parameters and were copied from the backbone, base or first model.
    pub copied: Vec<String>,
    /// Elements at the cut-offs of trims, and those of them that only their position kept; for methods that trim.
    pub trimmed: Option<[u64; 2]>,
}

impl Summary {
    pub(crate) fn of(plan: &Plan, settled: &[TensorStats]) -> Self {
        let steps = || settled.iter().flat_map(|s| &s.combination.steps);
        let mut angles: Vec<f64> = steps().filter_map(|s| s.angle).map(f64::to_degrees).collect();
        angles.sort_by(f64::total_cmp);
        let trims = settled.iter().map(|s| s.trimmed);
        let ties = trims.fold([0; 2], |[at, by], t| [at + t.at_threshold, by + t.decided_by_position]);
        Self {
            method: plan.method,
            out: plan.output.dir.display().to_string(),
            dtype: plan.output.dtype.to_string(),
            space: plan.space,
            tensors: settled.len(),
            parameters: plan.specs().iter().map(|s| s.numel() as u64).sum(),
            branches: Branch::ALL.map(|branch| steps().filter(|s| s.branch == branch).count() as u64),
            angles,
            core: settled.iter().map(|s| s.core).sum(),
            conflicts: settled.iter().map(|s| s.conflicts).sum(),
            copied: plan.copies().iter().map(|view| view.name.to_owned()).collect(),
            trimmed: (plan.method == "ties").then_some(ties),
        }
    }

    /// Whether tensors were interpolated at angles.
    fn has_angles(&self) -> bool {
        self.branches.iter().any(|n| *n > 0)
    }

    /// The figures by name, the same for the same inputs and arguments.
    pub fn facts(&self) -> Map<String, Value> {
        let mut facts = Map::new();
        facts.insert("method".into(), json!(self.method));
        facts.insert("dtype".into(), json!(self.dtype));
        facts.insert("tensors".into(), json!(self.tensors));
        facts.insert("parameters".into(), json!(self.parameters));
        facts.insert("copied".into(), json!(self.copied));
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
        if let Some([at_cut, decided_by_position]) = self.trimmed {
            facts.insert("trim".into(), json!({"at_cut": at_cut, "decided_by_position": decided_by_position}));
        }
        facts
    }

    /// The object that `--json` prints.
    pub fn to_json(&self) -> Value {
        let mut object = Map::from_iter([("out".to_owned(), json!(self.out))]);
        object.extend(self.facts());
        Value::Object(object)
    }

    /// Smallest, median (the lower of two) and largest angle in degrees.
    pub fn angle_range(&self) -> Option<[f64; 3]> {
        let n = self.angles.len();
        (n > 0).then(|| [self.angles[0], self.angles[(n - 1) / 2], self.angles[n - 1]])
    }

    /// Logs the figures, a few lines.
    pub fn log(&self) {
        log::info!("{}: {} tensors, {} parameters, {}", self.out, self.tensors, self.parameters, self.dtype);
        self.lines().iter().for_each(|line| log::info!("{line}"));
    }

    /// The figures beyond the numbers of tensors and parameters, for people.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        if !self.copied.is_empty() {
            lines.push(format!("copied unchanged, not parameters: {}", self.copied.join(", ")));
        }
        if self.method == "cpi" {
            let percent = 100.0 * self.core as f64 / self.parameters.max(1) as f64;
            let (core, conflicts) = (self.core, self.conflicts);
            lines.push(format!("core: {core} elements ({percent:.3} %), {conflicts} of them claimed twice or more"));
        }
        if let Some([at_cut, by_position]) = self.trimmed {
            lines.push(format!(
                "trimmed: {at_cut} elements at the cut-offs, {by_position} kept for their position alone"
            ));
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
