//! What `extract` did: as JSON and in words.

use std::collections::BTreeMap;
use std::path::PathBuf;

use cpift_core::Checkpoint;
use cpift_core::format::checkpoint::Excluded;
use cpift_core::format::mask::{Metric, Scope, Ties};
use cpift_core::stream::select::{Cut, Score};
use serde::Serialize;

/// What `extract` did, for `--json`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// The mask file.
    pub out: PathBuf,
    /// p in percent.
    pub percent: f64,
    /// Over what the top p % was taken.
    pub scope: Scope,
    /// The quantity ranked.
    pub metric: Metric,
    /// Parameters ranked.
    #[serde(rename = "D")]
    pub d: u64,
    /// Elements chosen.
    pub selected: u64,
    /// How the ties at the threshold fell, over all parts.
    pub ties: Ties,
    /// Chosen elements whose score is zero: for magnitude, those that did not move at all.
    pub unmoved: u64,
    /// Parts that elements competed in, and those too small to have one chosen.
    pub parts: usize,
    /// Parts too small for one element to be chosen.
    pub empty_parts: usize,
    /// The smallest score that was chosen in any part.
    pub threshold: f64,
    /// Kinds of tensors left out of D.
    pub excluded: Vec<String>,
    /// Elements of those.
    pub excluded_elements: u64,
    /// Tensors of the base that are no parameters, with the reason.
    pub not_parameters: BTreeMap<String, &'static str>,
}

/// The tensors of `base` that are no parameters, with the reason.
pub fn not_parameters(base: &Checkpoint) -> BTreeMap<String, &'static str> {
    base.not_parameters().map(|(view, why)| (view.name.to_owned(), reason(why))).collect()
}

fn reason(why: Excluded) -> &'static str {
    match why {
        Excluded::Buffer => "a buffer",
        Excluded::NotFloat => "not floating-point",
        Excluded::Tied => "tied to the input embedding",
    }
}

impl Summary {
    /// Adds what was chosen in one part.
    pub fn add<T: Score>(&mut self, cut: &Cut<T>) {
        self.ties.at_threshold += cut.ties.at_threshold;
        self.ties.chosen += cut.ties.chosen;
        self.ties.decided_by_position += cut.ties.decided_by_position;
        self.threshold = self.threshold.min(cut.threshold.to_f64());
        self.unmoved += if cut.threshold.to_f64() == 0.0 { cut.ties.chosen } else { 0 };
    }

    /// Tells all of it.
    pub fn log(&self, seconds: f64) {
        for (name, why) in &self.not_parameters {
            log::info!("not a parameter: {name} ({why})");
        }
        if self.excluded_elements > 0 {
            log::info!("left out of D: {} elements of {}", self.excluded_elements, self.excluded.join(" and "));
        }
        let (selected, ties) = (self.selected, self.ties);
        log::info!(
            "{}: {selected} of D = {} elements (p = {} %), threshold {:e}, in {seconds:.2} s",
            self.out.display(),
            self.d,
            self.percent,
            self.threshold
        );
        log::info!(
            "ties: {} elements equal the threshold, {} of them chosen, {} decided by position alone",
            ties.at_threshold,
            ties.chosen,
            ties.decided_by_position
        );
        if self.empty_parts > 0 {
            log::warn!(
                "{} of {} parts are too small for {} %: nothing is chosen in them",
                self.empty_parts,
                self.parts,
                self.percent
            );
        }
        self.warn_of_ties();
    }

    fn warn_of_ties(&self) {
        let (selected, decided) = (self.selected, self.ties.decided_by_position);
        let (none, unmoved, hint) = match self.metric {
            Metric::Fisher => ("no parameter has a gradient", "have no gradient at all", NO_GRADIENT),
            Metric::Blend => ("no parameter stands out", "have the least update and the least gradient", NO_GRADIENT),
            _ => ("no parameter moved", "did not move at all", LOSSY),
        };
        if self.unmoved == selected {
            let which = if self.metric == Metric::Fisher { "--fisher" } else { "--tuned" };
            log::warn!(
                "{none}: all {selected} elements were chosen by their position alone\n  hint: is {which} really what \
                 the fine-tuning on this task gave?"
            );
        } else if decided as u128 * 100 > u128::from(selected) {
            log::warn!(
                "{decided} of the {selected} chosen elements ({:.1} %) were decided by their position alone: the core \
                 region is partly arbitrary\n  hint: {hint}",
                decided as f64 * 100.0 / selected as f64
            );
        }
        if self.unmoved > 0 && self.unmoved < selected {
            log::warn!("{} of the chosen elements {unmoved}", self.unmoved);
        }
    }
}

const LOSSY: &str = "a probe saved in bf16 or f16 loses small updates; save it in f32 (cpift-probe --save-dtype f32) and \
                     extract again";
const NO_GRADIENT: &str = "many elements have one squared gradient, most likely 0, as rows of the embedding have whose \
                           tokens the task does not use: give a smaller --percent, or --exclude embeddings";
