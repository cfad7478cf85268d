//! `extract`: from a base and a tuned checkpoint to the mask of the core region.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use cpift_core::error::usage;
use cpift_core::files::{StagedFile, StagedPath};
use cpift_core::format::digest::Digest;
use cpift_core::format::mask::{FORMAT_VERSION, MaskHeader, MaskWriter, Metric, Scope, Ties};
use cpift_core::format::names::TensorKind;
use cpift_core::record::provenance::{Recorder, check_made_from};
use cpift_core::run::progress;
use cpift_core::stream::cuts::Guess;
use cpift_core::stream::select::{Cut, Score};
use cpift_core::{BadInput, Checkpoint, Dtype, Mask};
use serde::Serialize;

use crate::inputs::{Digests, Inputs, Parts};
use crate::output::TieFlags;
use crate::part::{Arithmetic, Part, ranges};
use crate::rules::{Percent, Rule, Structure, Sum, refuse_empty, select};
use crate::stats;
use crate::sweep::{LIMIT, Pass, choose, sweep};

/// Placeholder while the header's final length is reserved: no real count has more digits.
const LONGEST: Ties = Ties { at_threshold: u64::MAX, chosen: u64::MAX, decided_by_hash: u64::MAX };

/// A checked request for a mask.
pub(crate) struct Plan {
    pub(crate) inputs: Inputs,
    pub(crate) percent: Percent,
    pub(crate) scope: Scope,
    pub(crate) metric: Metric,
    /// The selection, if it is not the top p % of single elements.
    pub(crate) special: Option<Special>,
    /// In order, each once.
    pub(crate) excluded: Vec<TensorKind>,
    pub(crate) out: PathBuf,
    /// JSON file and picture of the density.
    pub(crate) stats: Option<[PathBuf; 2]>,
    pub(crate) force: bool,
}

/// A selection other than the top p % of single elements.
pub(crate) enum Special {
    /// Rows, columns, or N of M.
    Structure(Structure),
    /// Scores above a number.
    Above(f64),
    /// TALL mask among these other models, with λ.
    Tall(Vec<Checkpoint>, f64),
}

impl Special {
    fn rule(&self, percent: Percent) -> Rule<'_> {
        match self {
            Self::Structure(structure) => Rule::Structure(*structure, percent),
            Self::Above(limit) => Rule::Above(*limit),
            Self::Tall(others, lambda) => Rule::Tall { others, lambda: *lambda },
        }
    }

    /// Text of the mask's metadata.
    fn text(&self) -> String {
        match self {
            Self::Structure(structure) => structure.to_string(),
            Self::Above(limit) => format!("above {limit:e}"),
            Self::Tall(others, lambda) => format!("TALL among {} models, λ = {lambda}", others.len() + 1),
        }
    }
}

impl Plan {
    /// Writes the mask, the statistics and the record, or nothing.
    ///
    /// # Errors
    /// [`cpift_core::Usage`] if nothing would be chosen; [`BadInput`] for a value that is not
    /// finite or an output that exists.
    pub(crate) fn run(&self, recorder: Recorder) -> Result<Summary> {
        // Scores are computed in f32 unless an input is wider.
        let others = match &self.special {
            Some(Special::Tall(others, _)) => &others[..],
            _ => &[],
        };
        let wide = others.iter().any(|c| c.parameters().any(|view| view.dtype == Dtype::F64));
        if wide || self.inputs.wide() { self.run_as::<f64>(recorder) } else { self.run_as::<f32>(recorder) }
    }

    fn run_as<T: Score + Arithmetic + Sum>(&self, recorder: Recorder) -> Result<Summary> {
        let clock = Instant::now();
        let mut parts = self.inputs.parts(self.scope, &self.excluded);
        let mut counts = self.counts(&parts)?;
        if self.metric == Metric::Blend {
            for part in &mut parts.ranked {
                part.ranges = ranges::<T>(part)?;
            }
        }
        let bytes = parts.ranked.iter().map(Part::nbytes).sum::<u64>() + parts.excluded.nbytes();
        let bar = progress::bytes("mask", bytes);
        let staged = StagedPath::create(&self.out, self.force)?;
        let d = parts.ranked.iter().map(Part::numel).sum();
        let longest = match self.special {
            None => self.header(d, counts.iter().sum(), LONGEST, (Digest::blank(), Digest::blank(), None)),
            Some(_) => MaskHeader {
                percent: f64::MIN_POSITIVE,
                ..self.header(d, u64::MAX, Ties::default(), (Digest::blank(), Digest::blank(), None))
            },
        };
        let writer = MaskWriter::create(&staged.path(), &longest)?;
        let digests = self.inputs.digests();
        let done = |n| bar.inc(n);
        let pass = Pass { metric: self.metric, writer: &writer, digests: &digests, limit: LIMIT, done: &done };
        sweep(&parts.excluded, Guess::<T>::nothing(), &pass)?;
        let (mut cuts, mut flags) = (Vec::with_capacity(counts.len()), TieFlags::default());
        for (part, k) in parts.ranked.iter().zip(&mut counts) {
            if let Some(special) = &self.special {
                let salt = || digests.tie_salt();
                *k = select::<T>(part, self.metric, &special.rule(self.percent), &salt, &writer)?;
                bar.inc(part.nbytes());
                continue;
            }
            let k = *k;
            let choice = choose::<T>(part, k, &pass)?;
            cuts.push(choice.map(|choice| {
                flags.add(part, choice.flags);
                choice.cut
            }));
        }
        flags.write(&self.inputs.numel(), &writer)?;
        if let Some(special) = &self.special {
            refuse_empty(&special.rule(self.percent), counts.iter().sum())?;
        }
        let summary = self.summary(&parts, &counts, &cuts);
        let digests = digests.finish()?;
        check_made_from(self.inputs.tuned.path(), "base", (self.inputs.base.path(), &digests.0))?;
        let header = self.header(d, summary.selected, summary.ties, digests.clone());
        if header.base == header.tuned {
            let [base, tuned] = [&self.inputs.base, &self.inputs.tuned].map(|c| c.path().display());
            log::warn!("{base} and {tuned} are the same checkpoint");
        }
        writer.finish(&header)?;
        let also = self.stage_stats(&staged.path())?;
        bar.finish_and_clear();
        self.record(recorder, &header, &digests)?.commit(staged, &also)?;
        summary.log(clock.elapsed().as_secs_f64());
        Ok(summary)
    }

    /// Number of elements to choose in each part.
    fn counts(&self, parts: &Parts<'_>) -> Result<Vec<u64>> {
        let d: u64 = parts.ranked.iter().map(|p| p.numel()).sum();
        if d == 0 {
            return Err(BadInput::new(self.inputs.base.path(), "no parameter to choose from")
                .expected("at least one floating-point tensor that --exclude leaves in")
                .into());
        }
        let counts: Vec<u64> = parts.ranked.iter().map(|p| self.percent.of(p.numel())).collect();
        let counted = matches!(self.special, None | Some(Special::Structure(Structure::Row | Structure::Column)));
        if counted && counts.iter().all(|k| *k == 0) {
            let (p, largest) = (self.percent.value(), parts.ranked.iter().map(|p| p.numel()).max().unwrap_or(0));
            return Err(usage(format!(
                "--percent {p} chooses nothing: {p} % of {largest} elements is less than one\n  hint: give a larger \
                 --percent, or --scope global"
            )));
        }
        Ok(counts)
    }

    fn header(&self, d: u64, selected: u64, ties: Ties, (base, tuned, _): Digests) -> MaskHeader {
        MaskHeader {
            format_version: FORMAT_VERSION,
            percent: match self.special {
                None => self.percent.value(),
                Some(_) => 100.0 * selected as f64 / d.max(1) as f64,
            },
            scope: self.scope,
            metric: self.metric,
            seed: None,
            rule: self.special.as_ref().map(Special::text),
            d,
            selected,
            ties,
            excluded: self.excluded.iter().map(ToString::to_string).collect(),
            base,
            tuned,
            numel: self.inputs.numel(),
        }
    }

    fn stage_stats(&self, mask: &Path) -> Result<Vec<StagedFile>> {
        let Some([json, svg]) = &self.stats else { return Ok(Vec::new()) };
        stats::stage(&cpift_core::format::names::stats(&Mask::open(mask)?), Some(json), Some(svg), self.force)
    }

    fn record(&self, mut recorder: Recorder, header: &MaskHeader, digests: &Digests) -> Result<Recorder> {
        self.inputs.record(&mut recorder, digests);
        if let Some(Special::Tall(others, _)) = &self.special {
            for (i, other) in others.iter().enumerate() {
                recorder.input(format!("model:{i}"), other.path(), other.digest()?);
            }
        }
        recorder.fact("D", header.d);
        recorder.fact("selected", header.selected);
        if self.inputs.extra > 0 {
            recorder.fact("extra_elements", self.inputs.extra);
        }
        recorder.fact("decided_by_hash", header.ties.decided_by_hash);
        Ok(recorder)
    }

    fn summary<T: Score>(&self, parts: &Parts<'_>, counts: &[u64], cuts: &[Option<Cut<T>>]) -> Summary {
        let mut summary = Summary {
            out: self.out.clone(),
            percent: self.percent.value(),
            scope: self.scope,
            metric: self.metric,
            rule: self.special.as_ref().map(Special::text),
            d: parts.ranked.iter().map(|p| p.numel()).sum(),
            selected: counts.iter().sum(),
            ties: Ties::default(),
            unmoved: 0,
            parts: parts.ranked.len(),
            empty_parts: counts.iter().filter(|k| **k == 0).count(),
            threshold: if self.special.is_some() { 0.0 } else { f64::INFINITY },
            excluded: self.excluded.iter().map(ToString::to_string).collect(),
            excluded_elements: parts.excluded.numel(),
            extra_elements: self.inputs.extra,
            not_parameters: self.inputs.not_parameters(),
        };
        cuts.iter().flatten().for_each(|cut| summary.add(cut));
        summary
    }
}

/// Summary of a run: the JSON object of `--json` and the log lines.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Summary {
    pub(crate) out: PathBuf,
    pub(crate) percent: f64,
    pub(crate) scope: Scope,
    pub(crate) metric: Metric,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) rule: Option<String>,
    /// Elements that were ranked.
    #[serde(rename = "D")]
    pub(crate) d: u64,
    pub(crate) selected: u64,
    /// Sums over all parts.
    pub(crate) ties: Ties,
    /// Chosen elements whose score is 0: for magnitude, elements that did not change.
    pub(crate) unmoved: u64,
    pub(crate) parts: usize,
    /// Parts too small for a single element to be chosen.
    pub(crate) empty_parts: usize,
    /// Smallest chosen score of all parts.
    pub(crate) threshold: f64,
    pub(crate) excluded: Vec<String>,
    /// Elements of the excluded tensors.
    pub(crate) excluded_elements: u64,
    /// Elements of the tuned checkpoint in rows of tokens that the base does not have.
    pub(crate) extra_elements: u64,
    /// Tensors of the base that are not parameters, with the reason.
    pub(crate) not_parameters: BTreeMap<String, &'static str>,
}

impl Summary {
    /// Adds the choice in one part.
    fn add<T: Score>(&mut self, cut: &Cut<T>) {
        self.ties.at_threshold += cut.ties.at_threshold;
        self.ties.chosen += cut.ties.chosen;
        self.ties.decided_by_hash += cut.ties.decided_by_hash;
        self.threshold = self.threshold.min(cut.threshold.to_f64());
        self.unmoved += if cut.threshold.to_f64() == 0.0 { cut.ties.chosen } else { 0 };
    }

    fn log(&self, seconds: f64) {
        for (name, why) in &self.not_parameters {
            log::info!("not a parameter: {name} ({why})");
        }
        if self.excluded_elements > 0 {
            log::info!("left out of D: {} elements of {}", self.excluded_elements, self.excluded.join(" and "));
        }
        let (selected, ties) = (self.selected, self.ties);
        if let Some(rule) = &self.rule {
            let (out, d, share) = (self.out.display(), self.d, 100.0 * selected as f64 / self.d.max(1) as f64);
            log::info!("{out}: {selected} of D = {d} elements ({share:.4} %), {rule}, in {seconds:.2} s");
            return;
        }
        log::info!(
            "{}: {selected} of D = {} elements (p = {} %), threshold {:e}, in {seconds:.2} s",
            self.out.display(),
            self.d,
            self.percent,
            self.threshold
        );
        log::info!(
            "ties: {} elements equal the threshold, {} of them chosen, {} by a hash alone",
            ties.at_threshold,
            ties.chosen,
            ties.decided_by_hash
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
        let (selected, decided) = (self.selected, self.ties.decided_by_hash);
        let (none, unmoved, hint) = match self.metric {
            Metric::Fisher => ("no parameter has a gradient", "have no gradient", NO_GRADIENT),
            Metric::Blend => {
                ("all scores are equal", "have the smallest update and the smallest gradient", NO_GRADIENT)
            }
            _ => ("no parameter changed", "did not change", LOSSY),
        };
        if self.unmoved == selected {
            let which = if self.metric == Metric::Fisher { "--fisher" } else { "--tuned" };
            log::warn!(
                "{none}: all {selected} elements were chosen at random, by a hash alone\n  hint: check that {which} comes \
                 from fine-tuning on this task"
            );
        } else if decided as u128 * 100 > u128::from(selected) {
            log::warn!(
                "{decided} of the {selected} chosen elements ({:.1} %) were chosen among equals by a hash alone, so the core \
                 region is partly random\n  hint: {hint}",
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
const NO_GRADIENT: &str = "many elements have the same squared gradient, usually 0, such as embedding rows of tokens that the \
                           task does not use: use a smaller --percent, or --exclude embeddings";
