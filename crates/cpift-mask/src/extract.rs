//! `extract`: from a base and a tuned checkpoint to the mask file of the core region.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use cpift_core::checkpoint::{Digest, Excluded, PieceHasher, TensorKind, check_same_parameters};
use cpift_core::error::usage;
use cpift_core::files::{StagedFile, StagedPath, check_not_input, check_output};
use cpift_core::mask::{FORMAT_VERSION, MaskHeader, MaskWriter, Metric, Scope, Ties};
use cpift_core::provenance::{self, Recorder};
use cpift_core::select::{Cut, Score, find_cut};
use cpift_core::{BadInput, Checkpoint, Dtype, Mask, progress};
use serde::Serialize;

use crate::args::ExtractArgs;
use crate::bracket::{Guess, guess};
use crate::emit::emit;
use crate::parts::{CHUNK, Part, Parts, cut};
use crate::percent::Percent;
use crate::scores::{Arithmetic, PartScores};
use crate::stats;
use crate::sweep::{LIMIT, Pass, sweep};

/// Ties of which no real count is longer in decimal digits.
const LONGEST: Ties = Ties { at_threshold: u64::MAX, chosen: u64::MAX, decided_by_position: u64::MAX };

/// A mask to extract, checked as far as headers and names go.
struct Plan {
    base: Checkpoint,
    tuned: Checkpoint,
    percent: Percent,
    scope: Scope,
    metric: Metric,
    excluded: Vec<TensorKind>,
    out: PathBuf,
    /// JSON and picture of the density.
    stats: Option<[PathBuf; 2]>,
    force: bool,
}

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
    /// Chosen elements that did not move at all.
    pub unmoved: u64,
    /// Parts that elements competed in, and those too small to have one chosen.
    pub parts: usize,
    /// Parts too small for one element to be chosen.
    pub empty_parts: usize,
    /// The smallest distance that was chosen in any part.
    pub threshold: f64,
    /// Kinds of tensors left out of D.
    pub excluded: Vec<String>,
    /// Elements of those.
    pub excluded_elements: u64,
    /// Tensors of the base that are no parameters, with the reason.
    pub not_parameters: BTreeMap<String, &'static str>,
}

/// Runs `extract`: nothing is written unless all of it succeeds.
///
/// # Errors
/// [`cpift_core::Usage`] when nothing would be chosen; [`BadInput`] for unusable checkpoints or an output that exists;
/// I/O errors.
pub fn extract(args: &ExtractArgs, force: bool) -> Result<Summary> {
    let recorder = Recorder::start(env!("CARGO_PKG_NAME"));
    let plan = Plan::new(args, force)?;
    // Distances in f32 unless an input is wider.
    if [&plan.base, &plan.tuned].iter().any(|c| c.parameters().any(|v| v.dtype == Dtype::F64)) {
        plan.run::<f64>(recorder)
    } else {
        plan.run::<f32>(recorder)
    }
}

impl Plan {
    fn new(args: &ExtractArgs, force: bool) -> Result<Self> {
        let stats = args.stats.as_ref().map(|json| [json.clone(), json.with_extension("svg")]);
        for path in stats.iter().flatten().chain([&args.out]) {
            check_output(path, force)?;
        }
        if stats.as_ref().is_some_and(|[json, svg]| json == svg || [json, svg].contains(&&args.out)) {
            return Err(usage("--stats names its own picture, or a file that --out names"));
        }
        let (base, tuned) = (Checkpoint::open(&args.base)?, Checkpoint::open(&args.tuned)?);
        let inputs = || base.files().chain(tuned.files());
        check_not_input("--out", &args.out, inputs())?;
        stats.iter().flatten().try_for_each(|path| check_not_input("--stats", path, inputs()))?;
        check_same_parameters(&base, &tuned)?;
        let mut excluded = args.exclude.clone();
        excluded.sort_unstable();
        excluded.dedup();
        Ok(Self {
            base,
            tuned,
            percent: args.percent,
            scope: args.scope,
            metric: args.score,
            excluded,
            out: args.out.clone(),
            stats,
            force,
        })
    }

    fn run<T: Score + Arithmetic>(&self, recorder: Recorder) -> Result<Summary> {
        let clock = Instant::now();
        let parts = cut(&self.base, &self.tuned, self.scope, &self.excluded);
        let counts = self.counts(&parts)?;
        let bytes = parts.ranked.iter().map(Part::nbytes).sum::<u64>() + parts.excluded.nbytes();
        let bar = progress::bytes("mask", bytes);
        let staged = StagedPath::create(&self.out, self.force)?;
        let d = parts.ranked.iter().map(Part::numel).sum();
        let writer = MaskWriter::create(
            &staged.path(),
            &self.header(d, counts.iter().sum(), LONGEST, [Digest::blank(), Digest::blank()]),
        )?;
        let digests = [&self.base, &self.tuned].map(InputDigest::new);
        let hashers = [&digests[0], &digests[1]].map(InputDigest::hasher);
        let done = |n| bar.inc(n);
        let pass = Pass { metric: self.metric, writer: &writer, hashers, limit: LIMIT, done: &done };
        sweep(&parts.excluded, Guess::<T>::nothing(), &pass)?;
        let mut cuts = Vec::with_capacity(counts.len());
        for (part, &k) in parts.ranked.iter().zip(&counts) {
            cuts.push(choose::<T>(part, k, &pass)?);
        }
        let summary = self.summary(&parts, &counts, &cuts);
        let [base, tuned] = digests.map(InputDigest::finish);
        let header = self.header(d, summary.selected, summary.ties, [base?, tuned?]);
        if header.base == header.tuned {
            log::warn!("{} and {} are the same checkpoint", self.base.path().display(), self.tuned.path().display());
        }
        writer.finish(&header)?;
        let more = self.stage_stats(&staged.path())?;
        provenance::forget(&self.out)?;
        staged.commit()?;
        more.into_iter().try_for_each(StagedFile::commit)?;
        bar.finish_and_clear();
        self.record(recorder, &header)?;
        summary.log(clock.elapsed().as_secs_f64());
        Ok(summary)
    }

    /// How many elements to choose in each part.
    fn counts(&self, parts: &Parts<'_>) -> Result<Vec<u64>> {
        let d: u64 = parts.ranked.iter().map(|p| p.numel()).sum();
        if d == 0 {
            return Err(BadInput::new(self.base.path(), "no parameter to choose from")
                .expected("at least one floating-point tensor that --exclude leaves in")
                .into());
        }
        let counts: Vec<u64> = parts.ranked.iter().map(|p| self.percent.of(p.numel())).collect();
        if counts.iter().all(|k| *k == 0) {
            let (p, largest) = (self.percent.value(), parts.ranked.iter().map(|p| p.numel()).max().unwrap_or(0));
            return Err(usage(format!(
                "--percent {p} chooses nothing: {p} % of {largest} elements is less than one\n  hint: give a larger \
                 --percent, or --scope global"
            )));
        }
        Ok(counts)
    }

    fn header(&self, d: u64, selected: u64, ties: Ties, [base, tuned]: [Digest; 2]) -> MaskHeader {
        MaskHeader {
            format_version: FORMAT_VERSION,
            percent: self.percent.value(),
            scope: self.scope,
            metric: self.metric,
            d,
            selected,
            ties,
            excluded: self.excluded.iter().map(ToString::to_string).collect(),
            base,
            tuned,
            numel: self.base.parameters().map(|v| (v.name.to_owned(), v.numel() as u64)).collect(),
        }
    }

    fn stage_stats(&self, mask: &Path) -> Result<Vec<StagedFile>> {
        let Some([json, svg]) = &self.stats else { return Ok(Vec::new()) };
        stats::stage(&cpift_core::density::stats(&Mask::open(mask)?), Some(json), Some(svg), self.force)
    }

    fn record(&self, mut recorder: Recorder, header: &MaskHeader) -> Result<()> {
        recorder.input("base", self.base.path(), header.base.clone());
        recorder.input("tuned", self.tuned.path(), header.tuned.clone());
        recorder.fact("D", header.d);
        recorder.fact("selected", header.selected);
        recorder.fact("decided_by_position", header.ties.decided_by_position);
        recorder.write_beside(&self.out)
    }

    fn summary<T: Score>(&self, parts: &Parts<'_>, counts: &[u64], cuts: &[Option<Cut<T>>]) -> Summary {
        let mut ties = Ties::default();
        let (mut unmoved, mut threshold) = (0, f64::INFINITY);
        for cut in cuts.iter().flatten() {
            ties.at_threshold += cut.ties.at_threshold;
            ties.chosen += cut.ties.chosen;
            ties.decided_by_position += cut.ties.decided_by_position;
            threshold = threshold.min(cut.threshold.to_f64());
            unmoved += if cut.threshold.to_f64() == 0.0 { cut.ties.chosen } else { 0 };
        }
        Summary {
            out: self.out.clone(),
            percent: self.percent.value(),
            scope: self.scope,
            metric: self.metric,
            d: parts.ranked.iter().map(|p| p.numel()).sum(),
            selected: counts.iter().sum(),
            ties,
            unmoved,
            parts: parts.ranked.len(),
            empty_parts: counts.iter().filter(|k| **k == 0).count(),
            threshold,
            excluded: self.excluded.iter().map(ToString::to_string).collect(),
            excluded_elements: parts.excluded.numel(),
            not_parameters: self.base.not_parameters().map(|(view, why)| (view.name.to_owned(), reason(why))).collect(),
        }
    }
}

/// Chooses the `k` largest scores of a part and writes their bits: by a guess from a sample and one pass, or, where the guess
/// was wrong, by an exact search and another pass.
fn choose<T: Score + Arithmetic>(part: &Part<'_>, k: u64, pass: &Pass<'_>) -> Result<Option<Cut<T>>> {
    if k == 0 {
        sweep(part, Guess::<T>::nothing(), pass)?;
        return Ok(None);
    }
    let guess = guess(part, pass.metric, k, pass.limit);
    if let Some(cut) = sweep(part, guess, pass)?.settle(part, k, pass)? {
        return Ok(Some(cut));
    }
    log::info!("{}: the sample did not settle the threshold; searching all scores", part.label);
    let cut = find_cut(&PartScores { part, metric: pass.metric }, k);
    emit(part, &cut, k, pass)?;
    Ok(Some(cut))
}

/// The digest of an input: recorded, or computed while the input is read.
enum InputDigest<'a> {
    Recorded(Digest),
    Computed(&'a Checkpoint, PieceHasher),
}

impl<'a> InputDigest<'a> {
    fn new(checkpoint: &'a Checkpoint) -> Self {
        checkpoint.recorded_digest().map_or_else(
            || {
                let specs: Vec<_> = checkpoint.tensors().map(|view| view.spec()).collect();
                Self::Computed(checkpoint, PieceHasher::new(&specs, CHUNK))
            },
            Self::Recorded,
        )
    }

    fn hasher(&self) -> Option<&PieceHasher> {
        match self {
            Self::Recorded(_) => None,
            Self::Computed(_, hasher) => Some(hasher),
        }
    }

    fn finish(self) -> Result<Digest> {
        match self {
            Self::Recorded(digest) => Ok(digest),
            Self::Computed(checkpoint, hasher) => {
                hasher.add_missing(checkpoint);
                hasher.finish(checkpoint.folder())
            }
        }
    }
}

fn reason(why: Excluded) -> &'static str {
    match why {
        Excluded::Buffer => "a buffer",
        Excluded::NotFloat => "not floating-point",
        Excluded::Tied => "tied to the input embedding",
    }
}

impl Summary {
    fn log(&self, seconds: f64) {
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
        if self.unmoved == selected {
            log::warn!(
                "no parameter moved: all {selected} elements were chosen by their position alone\n  hint: is --tuned \
                 really the fine-tuned checkpoint?"
            );
        } else if decided as u128 * 100 > u128::from(selected) {
            log::warn!(
                "{decided} of the {selected} chosen elements ({:.1} %) were decided by their position alone: the core \
                 region is partly arbitrary\n  hint: a probe saved in bf16 or f16 loses small updates; save it in f32 \
                 (cpift-probe --save-dtype f32) and extract again",
                decided as f64 * 100.0 / selected as f64
            );
        }
        if self.unmoved > 0 && self.unmoved < selected {
            log::warn!("{} of the chosen elements did not move at all", self.unmoved);
        }
    }
}
