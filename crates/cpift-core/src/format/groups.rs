//! groups.json: the similarity of the tasks' core regions, the task groups, and their training
//! order.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::error::BadInput;
use crate::files::staging;
use crate::format::digest::Digest;
use crate::format::json;

/// Format version of groups.json that this program reads and writes.
pub const FORMAT_VERSION: u32 = 1;

/// Content of groups.json.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Groups {
    /// Format version of the file.
    pub format_version: u32,
    /// Similarity threshold τ.
    pub tau: f64,
    /// Method that made the groups; none if they follow from τ.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partition: Option<Parting>,
    /// Origin of τ: given (`fixed`) or chosen from the data (`auto`).
    pub tau_mode: TauMode,
    /// Task names, in the order of the rows and columns of the matrices.
    pub tasks: Vec<String>,
    /// Jaccard similarity of every pair of core regions, [tasks × tasks].
    pub jaccard: Vec<Vec<f64>>,
    /// Expected similarity of two independent random regions of the same sizes, [tasks × tasks].
    pub chance: Vec<Vec<f64>>,
    /// The similarities without ties; none if no region has any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub without_ties: Option<WithoutTies>,
    /// Kinds of tensors excluded from the comparison.
    pub excluded: Vec<String>,
    /// Task names per group, groups in training order.
    pub groups: Vec<Vec<String>>,
    /// Method and figures of the training order.
    pub order: Order,
    /// True if there is only one group or every task is a group of its own, so that grouping has no
    /// effect.
    pub trivial: bool,
    /// Digest of the base checkpoint of all masks.
    pub base: Digest,
    /// Digest of each task's mask file.
    pub masks: BTreeMap<String, Digest>,
}

/// Similarities of the regions without the elements that were chosen among equals, which a hash
/// decides.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WithoutTies {
    /// Share of the elements in two regions that at least one of them chose among equals; of the
    /// elements of a region on the diagonal; 0 if there are none. [tasks × tasks]
    pub tied: Vec<Vec<f64>>,
    /// Jaccard similarity of every pair, [tasks × tasks].
    pub jaccard: Vec<Vec<f64>>,
    /// Expected similarity of two independent random regions of these sizes, [tasks × tasks].
    pub chance: Vec<Vec<f64>>,
}

/// Method of a grouping that does not follow from the overlap of core regions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "method", rename_all = "lowercase", deny_unknown_fields)]
pub enum Parting {
    /// Tasks with the same `kind` in tasks.toml form a group.
    Kind {},
    /// The groups of another groups.json, in its order.
    Like {},
    /// Shuffled tasks, split into groups of nearly equal size.
    Random {
        /// Seed of the shuffle.
        seed: u64,
        /// Number of groups.
        groups: usize,
    },
}

/// Origin of τ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TauMode {
    /// Given on the command line.
    Fixed,
    /// Midpoint of the longest interval of τ with one and the same nontrivial partition.
    Auto,
}

/// Training order of the groups.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Order {
    /// `random`, `difficulty`, `dependency`, `overlap`, or `like` (taken from another groups.json).
    pub method: String,
    /// Seed of `random`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Figure by which each group was ordered, in training order; empty for `random`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub scores: Vec<f64>,
}

impl Groups {
    /// Reads and checks a groups.json.
    ///
    /// # Errors
    /// [`BadInput`] if it cannot be read, has another version, does not place every task in exactly
    /// one group, or has a matrix that is not tasks × tasks.
    pub fn read(path: &Path) -> Result<Self> {
        let value: serde_json::Value = json::read(path)?;
        json::check_version(path, "a groups file", json::version_of(&value), FORMAT_VERSION)?;
        let groups: Self =
            serde_json::from_value(value).map_err(|e| BadInput::new(path, format!("not a groups file: {e}")))?;
        let mut placed: Vec<&String> = groups.groups.iter().flatten().collect();
        placed.sort();
        let mut tasks: Vec<&String> = groups.tasks.iter().collect();
        tasks.sort();
        let repeated = tasks.windows(2).any(|pair| pair[0] == pair[1]);
        if tasks.is_empty() || repeated || placed != tasks || groups.groups.iter().any(Vec::is_empty) {
            return Err(BadInput::new(path, "the groups are not a partition of the tasks")
                .expected(format!("{tasks:?}"))
                .found(format!("{:?}", groups.groups))
                .into());
        }
        groups.check_square(path, "jaccard", &groups.jaccard)?;
        groups.check_square(path, "chance", &groups.chance)?;
        if let Some(WithoutTies { tied, jaccard, chance }) = &groups.without_ties {
            groups.check_square(path, "without_ties.tied", tied)?;
            groups.check_square(path, "without_ties.jaccard", jaccard)?;
            groups.check_square(path, "without_ties.chance", chance)?;
        }
        Ok(groups)
    }

    fn check_square(&self, path: &Path, name: &str, matrix: &[Vec<f64>]) -> Result<()> {
        let n = self.tasks.len();
        if matrix.len() == n && matrix.iter().all(|row| row.len() == n) {
            return Ok(());
        }
        let columns: Vec<usize> = matrix.iter().map(Vec::len).collect();
        Err(BadInput::new(path, format!("{name} does not have one row and one column per task"))
            .expected(format!("{n} rows of {n}"))
            .found(format!("{} rows of {columns:?}", matrix.len()))
            .hint("group the masks again")
            .into())
    }

    /// Writes the file atomically.
    ///
    /// # Errors
    /// As [`staging::write_text`].
    pub fn write(&self, path: &Path, force: bool) -> Result<()> {
        staging::write_text(path, &json::to_text(self)?, force)
    }

    /// Task names in training order: group by group, within a group as listed.
    pub fn task_order(&self) -> Vec<&str> {
        self.groups.iter().flatten().map(String::as_str).collect()
    }

    /// Checks that this grouping was made from the file `mask` for `task`, and returns its digest.
    ///
    /// # Errors
    /// [`BadInput`] with both digests.
    pub fn check_mask(&self, path: &Path, task: &str, mask: &Path) -> Result<Digest> {
        let found = Digest::of_file(mask)?;
        match self.masks.get(task) {
            Some(expected) if *expected == found => Ok(found),
            expected => {
                Err(BadInput::new(mask, format!("not the mask of {task} that {} was made from", path.display()))
                    .expected(expected.map_or("no digest is recorded".into(), |d| format!("digest {d}")))
                    .found(format!("digest {found}"))
                    .hint("group the masks again, or check that --mask names the right files")
                    .into())
            }
        }
    }

    /// Checks that `names` (of `--task` or `--mask` arguments) are exactly the tasks of this file.
    ///
    /// # Errors
    /// [`BadInput`] with the first difference.
    pub fn check_names<'a>(&self, path: &Path, flag: &str, names: impl Iterator<Item = &'a String>) -> Result<()> {
        let given: std::collections::BTreeSet<&str> = names.map(String::as_str).collect();
        if let Some(task) = self.tasks.iter().find(|t| !given.contains(t.as_str())) {
            return Err(BadInput::new(path, format!("the task {task} of this file has no {flag}"))
                .hint(format!("add {flag} {task}=PATH"))
                .into());
        }
        if let Some(extra) = given.iter().find(|g| !self.tasks.iter().any(|t| t == *g)) {
            return Err(BadInput::new(path, format!("has no task {extra}, which {flag} names"))
                .expected(self.tasks.join(", "))
                .into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn matrices_must_have_a_row_and_a_column_per_task() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("groups.json");
        let read = |jaccard: serde_json::Value, chance: serde_json::Value| {
            let file = json!({"format_version": 1, "tau": 0.5, "tau_mode": "fixed", "tasks": ["a", "b"], "jaccard": jaccard,
                "chance": chance, "excluded": [], "groups": [["a"], ["b"]], "order": {"method": "overlap"}, "trivial": true,
                "base": "0", "masks": {}});
            std::fs::write(&path, file.to_string()).unwrap();
            Groups::read(&path).map_err(|e| e.to_string())
        };
        let good = json!([[1.0, 0.5], [0.5, 1.0]]);
        read(good.clone(), good.clone()).unwrap();
        for bad in [json!([]), json!([[1.0, 0.5]]), json!([[1.0, 0.5], [0.5]]), json!([[1.0, 0.5], [0.5, 1.0, 0.0]])] {
            let error = read(bad.clone(), good.clone()).unwrap_err();
            assert!(error.contains("jaccard") && error.contains("expected: 2 rows of 2"), "{error}");
            assert!(read(good.clone(), bad).unwrap_err().contains("chance"));
        }
    }
}
