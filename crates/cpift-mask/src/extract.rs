//! `extract`: from a base and a tuned checkpoint to the mask file of the core region.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use cpift_core::error::usage;
use cpift_core::files::{StagedFile, StagedPath, check_not_input, check_output};
use cpift_core::format::digest::Digest;
use cpift_core::format::mask::{FORMAT_VERSION, MaskHeader, MaskWriter, Metric, Scope, Ties};
use cpift_core::format::names::TensorKind;
use cpift_core::record::provenance::{Recorder, check_made_from};
use cpift_core::run::progress;
use cpift_core::stream::select::{Cut, Score, find_cut};
use cpift_core::{BadInput, Mask};

use crate::args::ExtractArgs;
use crate::bracket::{Guess, guess};
use crate::emit::emit;
use crate::inputs::{Digests, Inputs, each_once};
use crate::parts::{Part, Parts, cut};
use crate::percent::Percent;
use crate::scores::{Arithmetic, PartScores, extents};
use crate::stats;
use crate::summary::{Summary, not_parameters};
use crate::sweep::{LIMIT, Pass, sweep};

/// Ties of which no real count is longer in decimal digits.
const LONGEST: Ties = Ties { at_threshold: u64::MAX, chosen: u64::MAX, decided_by_position: u64::MAX };

/// A mask to extract, checked as far as headers and names go.
struct Plan {
    inputs: Inputs,
    percent: Percent,
    scope: Scope,
    metric: Metric,
    excluded: Vec<TensorKind>,
    out: PathBuf,
    /// JSON and picture of the density.
    stats: Option<[PathBuf; 2]>,
    force: bool,
}

/// Runs `extract`: nothing is written unless all of it succeeds.
///
/// # Errors
/// [`cpift_core::Usage`] when nothing would be chosen; [`BadInput`] for unusable checkpoints or an output that exists;
/// I/O errors.
pub fn extract(args: &ExtractArgs, force: bool) -> Result<Summary> {
    let recorder = Recorder::start(env!("CARGO_PKG_NAME"));
    let plan = Plan::new(args, force)?;
    // Scores in f32 unless an input is wider.
    if plan.inputs.wide() { plan.run::<f64>(recorder) } else { plan.run::<f32>(recorder) }
}

impl Plan {
    fn new(args: &ExtractArgs, force: bool) -> Result<Self> {
        let stats = args.stats_files();
        for path in stats.iter().flatten().chain([&args.out]) {
            check_output(path, force)?;
        }
        if stats.as_ref().is_some_and(|[json, svg]| json == svg || [json, svg].contains(&&args.out)) {
            return Err(usage("--stats names its own picture, or a file that --out names"));
        }
        let score = format!("{:?}", args.score).to_lowercase();
        match (matches!(args.score, Metric::Fisher | Metric::Blend), &args.fisher) {
            (true, None) => return Err(usage(format!("--score {score} needs --fisher with squared gradients"))),
            (false, Some(_)) => return Err(usage(format!("--fisher has no part in --score {score}"))),
            _ => {}
        }
        let inputs = Inputs::open(&args.base, &args.tuned, args.fisher.as_deref())?;
        check_not_input("--out", &args.out, inputs.files())?;
        stats.iter().flatten().try_for_each(|path| check_not_input("--stats", path, inputs.files()))?;
        Ok(Self {
            inputs,
            percent: args.percent,
            scope: args.scope,
            metric: args.score,
            excluded: each_once(&args.exclude),
            out: args.out.clone(),
            stats,
            force,
        })
    }

    fn run<T: Score + Arithmetic>(&self, recorder: Recorder) -> Result<Summary> {
        let clock = Instant::now();
        let mut parts = cut(&self.inputs, self.scope, &self.excluded);
        let counts = self.counts(&parts)?;
        if self.metric == Metric::Blend {
            for part in &mut parts.ranked {
                part.extents = extents::<T>(part)?;
            }
        }
        let bytes = parts.ranked.iter().map(Part::nbytes).sum::<u64>() + parts.excluded.nbytes();
        let bar = progress::bytes("mask", bytes);
        let staged = StagedPath::create(&self.out, self.force)?;
        let d = parts.ranked.iter().map(Part::numel).sum();
        let writer = MaskWriter::create(
            &staged.path(),
            &self.header(d, counts.iter().sum(), LONGEST, (Digest::blank(), Digest::blank(), None)),
        )?;
        let digests = self.inputs.digests();
        let hashers = digests.hashers();
        let done = |n| bar.inc(n);
        let pass = Pass { metric: self.metric, writer: &writer, hashers, limit: LIMIT, done: &done };
        sweep(&parts.excluded, Guess::<T>::nothing(), &pass)?;
        let mut cuts = Vec::with_capacity(counts.len());
        for (part, &k) in parts.ranked.iter().zip(&counts) {
            cuts.push(choose::<T>(part, k, &pass)?);
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
        self.record(recorder, &header, &digests).commit(staged, &also)?;
        summary.log(clock.elapsed().as_secs_f64());
        Ok(summary)
    }

    /// How many elements to choose in each part.
    fn counts(&self, parts: &Parts<'_>) -> Result<Vec<u64>> {
        let d: u64 = parts.ranked.iter().map(|p| p.numel()).sum();
        if d == 0 {
            return Err(BadInput::new(self.inputs.base.path(), "no parameter to choose from")
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

    fn header(&self, d: u64, selected: u64, ties: Ties, (base, tuned, _): Digests) -> MaskHeader {
        MaskHeader {
            format_version: FORMAT_VERSION,
            percent: self.percent.value(),
            scope: self.scope,
            metric: self.metric,
            seed: None,
            d,
            selected,
            ties,
            excluded: self.excluded.iter().map(ToString::to_string).collect(),
            base,
            tuned,
            numel: self.inputs.base.parameters().map(|v| (v.name.to_owned(), v.numel() as u64)).collect(),
        }
    }

    fn stage_stats(&self, mask: &Path) -> Result<Vec<StagedFile>> {
        let Some([json, svg]) = &self.stats else { return Ok(Vec::new()) };
        stats::stage(&cpift_core::format::density::stats(&Mask::open(mask)?), Some(json), Some(svg), self.force)
    }

    fn record(&self, mut recorder: Recorder, header: &MaskHeader, digests: &Digests) -> Recorder {
        self.inputs.record(&mut recorder, digests);
        recorder.fact("D", header.d);
        recorder.fact("selected", header.selected);
        recorder.fact("decided_by_position", header.ties.decided_by_position);
        recorder
    }

    fn summary<T: Score>(&self, parts: &Parts<'_>, counts: &[u64], cuts: &[Option<Cut<T>>]) -> Summary {
        let mut summary = Summary {
            out: self.out.clone(),
            percent: self.percent.value(),
            scope: self.scope,
            metric: self.metric,
            d: parts.ranked.iter().map(|p| p.numel()).sum(),
            selected: counts.iter().sum(),
            ties: Ties::default(),
            unmoved: 0,
            parts: parts.ranked.len(),
            empty_parts: counts.iter().filter(|k| **k == 0).count(),
            threshold: f64::INFINITY,
            excluded: self.excluded.iter().map(ToString::to_string).collect(),
            excluded_elements: parts.excluded.numel(),
            not_parameters: not_parameters(&self.inputs.base),
        };
        cuts.iter().flatten().for_each(|cut| summary.add(cut));
        summary
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
