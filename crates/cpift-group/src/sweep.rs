//! The groups for every τ where they change.

use std::fmt::Write as _;

use cpift_core::format::groups::TauMode;
use serde::Serialize;

use crate::partition::{Interval, holding, most_stable};

/// What `--sweep` shows.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Sweep {
    /// τ of this run.
    pub tau: f64,
    /// Whether it was given or chosen.
    pub tau_mode: TauMode,
    /// Task names; rows and columns of the matrices.
    pub tasks: Vec<String>,
    /// Jaccard similarity of every pair of core regions, [tasks × tasks].
    pub jaccard: Vec<Vec<f64>>,
    /// What chance would give, [tasks × tasks].
    pub chance: Vec<Vec<f64>>,
    /// From one group to every task alone.
    pub sweep: Vec<Row>,
}

/// The groups for all τ above `from` and up to `to`; those of the first row hold from 0 on.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// The τ the row begins after.
    pub from: f64,
    /// The last τ of the row; none in the last row.
    pub to: Option<f64>,
    /// Task names by group, by their first task.
    pub groups: Vec<Vec<String>>,
    /// Whether `--tau auto` takes the middle of this row.
    pub auto: bool,
    /// Whether this row holds the τ of this run.
    pub chosen: bool,
}

/// The rows of `intervals` under the names of `tasks`, those of `--tau auto` and of `tau` marked.
pub fn rows(intervals: &[Interval], tasks: &[String], tau: f64) -> Vec<Row> {
    let (auto, chosen) = (most_stable(intervals), holding(intervals, tau));
    let row = |(i, interval): (usize, &Interval)| Row {
        from: interval.from,
        to: interval.to.is_finite().then_some(interval.to),
        groups: interval.groups.iter().map(|g| g.iter().map(|t| tasks[*t].clone()).collect()).collect(),
        auto: auto == Some(i),
        chosen: chosen == i,
    };
    intervals.iter().enumerate().map(row).collect()
}

impl Sweep {
    /// The rows as a table.
    pub fn table(&self) -> String {
        let mut out = format!("{:>10}  {:>10}  {:>6}\n", "τ above", "up to", "groups");
        for row in &self.sweep {
            let to = row.to.map_or("any".to_owned(), |to| format!("{to:.6}"));
            let groups: Vec<String> = row.groups.iter().map(|g| format!("{{{}}}", g.join(", "))).collect();
            let _ = write!(out, "{:>10.6}  {to:>10}  {:>6}  {}", row.from, row.groups.len(), groups.join(" "));
            if row.auto {
                let _ = write!(out, "  <- --tau auto ({:.6})", f64::midpoint(row.from, row.to.unwrap_or(row.from)));
            }
            if row.chosen && self.tau_mode == TauMode::Fixed {
                let _ = write!(out, "  <- --tau {}", self.tau);
            }
            out.push('\n');
        }
        out
    }
}
