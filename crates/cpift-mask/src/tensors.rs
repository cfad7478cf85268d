//! `tensors`: the most important tensors, each chosen whole (the selection of TRACE).

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use cpift_core::format::mask::{FORMAT_VERSION, MaskHeader, Metric, Scope, Ties};
use cpift_core::format::names::TensorKind;
use cpift_core::record::provenance::Recorder;
use cpift_core::run::progress;
use cpift_core::stream::hashing::PieceHasher;
use cpift_core::{BadInput, dispatch};
use rayon::prelude::*;
use serde::Serialize;
use serde_json::{Value, json};

use crate::inputs::{Digests, Inputs};
use crate::output::{all_set, write_mask};
use crate::part::{Block, Chunk, MinMax, Part, refuse_not_finite};
use crate::rules::Percent;
use crate::sweep::hash;

/// A checked request for a mask of whole tensors.
pub(crate) struct Plan {
    pub(crate) inputs: Inputs,
    /// Percent of the number of tensors, rounded up.
    pub(crate) percent: Percent,
    /// In order, each once.
    pub(crate) excluded: Vec<TensorKind>,
    pub(crate) out: PathBuf,
    pub(crate) force: bool,
}

/// A tensor with its importance and the figures behind it.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Ranked {
    name: String,
    elements: u64,
    /// Root mean square of its update.
    rms: f64,
    /// Mean of its squared gradients, if given.
    #[serde(skip_serializing_if = "Option::is_none")]
    fisher: Option<f64>,
    importance: f64,
}

impl Plan {
    /// Writes the mask and its record, or nothing; returns the summary for `--json`.
    ///
    /// # Errors
    /// [`BadInput`] for a value that is not finite or an output that exists.
    pub(crate) fn run(&self, mut recorder: Recorder) -> Result<Value> {
        let clock = Instant::now();
        let (ranked, digests) = self.rank()?;
        let chosen = self.percent.up_of(ranked.len() as u64) as usize;
        let header = self.header(&ranked, chosen, &digests);
        self.inputs.record(&mut recorder, &digests);
        recorder.fact("tensors", ranked.len());
        recorder.fact("tensors_chosen", chosen);
        let bits = ranked[..chosen].iter().map(|tensor| (tensor.name.as_str(), all_set(tensor.elements)));
        write_mask(&self.out, self.force, &header, bits, recorder)?;
        self.log(&header, &ranked, chosen, clock.elapsed().as_secs_f64());
        Ok(json!({
            "out": self.out,
            "percent": header.percent,
            "scope": header.scope,
            "metric": header.metric,
            "D": header.d,
            "selected": header.selected,
            "excluded": header.excluded,
            "chosen": ranked[..chosen],
            "others": ranked[chosen..],
            "not_parameters": self.inputs.not_parameters(),
        }))
    }

    /// All tensors of D, the most important first, equally important ones in bytewise name order.
    fn rank(&self) -> Result<(Vec<Ranked>, Digests)> {
        let mut parts = self.inputs.parts(Scope::Whole, &self.excluded);
        let Some(part) = parts.ranked.pop() else {
            return Err(BadInput::new(self.inputs.base.path(), "no tensor to choose from")
                .expected("at least one floating-point tensor that --exclude leaves in")
                .into());
        };
        let bar = progress::bytes("tensors", part.nbytes() + parts.excluded.nbytes());
        let digests = self.inputs.digests();
        let done = |n| bar.inc(n);
        sums(&parts.excluded, digests.hashers(), &done)?;
        let sums = sums(&part, digests.hashers(), &done)?;
        bar.finish_and_clear();
        let mut ranked: Vec<Ranked> = part
            .pairs
            .iter()
            .zip(sums)
            .map(|(pair, sums)| {
                let (name, elements) = (pair.base.name.to_owned(), pair.base.numel() as u64);
                // A tensor without elements has no update.
                let mean = |sum: f64| sum / elements.max(1) as f64;
                let fisher = pair.fisher.map(|_| mean(sums[1]));
                Ranked { name, elements, rms: mean(sums[0]).sqrt(), fisher, importance: 0.0 }
            })
            .collect();
        weigh(&mut ranked);
        Ok((ranked, digests.finish()?))
    }

    fn header(&self, ranked: &[Ranked], chosen: usize, (base, tuned, fisher): &Digests) -> MaskHeader {
        let elements = |tensors: &[Ranked]| tensors.iter().map(|t| t.elements).sum();
        MaskHeader {
            format_version: FORMAT_VERSION,
            percent: self.percent.value(),
            scope: Scope::Whole,
            metric: if fisher.is_some() { Metric::Trace } else { Metric::Rms },
            seed: None,
            rule: None,
            d: elements(ranked),
            selected: elements(&ranked[..chosen]),
            ties: Ties::default(),
            excluded: self.excluded.iter().map(ToString::to_string).collect(),
            base: base.clone(),
            tuned: tuned.clone(),
            numel: self.inputs.numel(),
        }
    }

    fn log(&self, header: &MaskHeader, ranked: &[Ranked], chosen: usize, seconds: f64) {
        log::info!(
            "{}: {chosen} of {} tensors (p = {} % of their number), {} of D = {} elements ({:.2} %), in {seconds:.2} s",
            self.out.display(),
            ranked.len(),
            header.percent,
            header.selected,
            header.d,
            header.selected as f64 * 100.0 / header.d.max(1) as f64
        );
        for tensor in ranked[..chosen].iter().take(10) {
            log::info!("  {:<48} {:>12} elements, importance {:.4e}", tensor.name, tensor.elements, tensor.importance);
        }
        if chosen > 10 {
            log::info!("  and {} more (--json lists all)", chosen - 10);
        }
        if ranked.iter().all(|t| t.rms == 0.0) {
            log::warn!("no parameter changed\n  hint: check that --tuned is the fine-tuned checkpoint");
        }
        let last = ranked[chosen - 1].importance;
        if ranked.get(chosen).is_some_and(|next| next.importance == last) {
            log::warn!("tensors of equal importance {last:e} were chosen by their names alone");
        }
    }
}

/// Fills in the importance of each tensor and sorts, the most important first.
fn weigh(ranked: &mut [Ranked]) {
    let range = |figure: &dyn Fn(&Ranked) -> f64| {
        let figures = || ranked.iter().map(figure);
        MinMax::new(figures().fold(f64::INFINITY, f64::min), figures().fold(f64::NEG_INFINITY, f64::max))
    };
    let (rms, mean) = (range(&|t| t.rms), range(&|t| t.fisher.unwrap_or(0.0)));
    for tensor in ranked.iter_mut() {
        tensor.importance = match tensor.fisher {
            Some(fisher) => 0.5 * rms.scale(tensor.rms) + 0.5 * mean.scale(fisher),
            None => tensor.rms,
        };
    }
    // The sort is stable and the tensors come in bytewise name order.
    ranked.sort_by(|a, b| b.importance.total_cmp(&a.importance));
}

/// Sums of Δ² and of F over each tensor of `part`, in f64. Chunks are added in order, so that the
/// sums do not depend on the number of threads.
fn sums(part: &Part<'_>, hashers: [Option<&PieceHasher>; 3], done: &(dyn Fn(u64) + Sync)) -> Result<Vec<[f64; 2]>> {
    let work = |block: &mut Block<f64>, chunk: &Chunk| {
        hash(hashers, &part.pairs[chunk.pair], *chunk);
        done(part.chunk_bytes(*chunk));
        dispatch!(chunk_sums(block, part, *chunk))
    };
    let found: Vec<[f64; 2]> = part.chunks.par_iter().map_init(Block::new, work).collect();
    let mut sums = vec![[0.0; 2]; part.pairs.len()];
    for (chunk, found) in part.chunks.iter().zip(found) {
        let pair = &part.pairs[chunk.pair];
        if !found.iter().all(|sum| sum.is_finite()) {
            refuse_not_finite::<f64>(pair, *chunk)?;
            return Err(BadInput::new(pair.tuned.file, "a mean square overflows").tensor(pair.base.name).into());
        }
        sums[chunk.pair].iter_mut().zip(found).for_each(|(sum, found)| *sum += found);
    }
    Ok(sums)
}

#[inline(always)]
fn chunk_sums(block: &mut Block<f64>, part: &Part<'_>, chunk: Chunk) -> [f64; 2] {
    let mut sums = [0.0; 2];
    for (start, len) in chunk.blocks() {
        sums[0] += block.scores(part, chunk.pair, Metric::Magnitude, start, len).iter().map(|d| d * d).sum::<f64>();
        if part.pairs[chunk.pair].fisher.is_some() {
            sums[1] += block.scores(part, chunk.pair, Metric::Fisher, start, len).iter().sum::<f64>();
        }
    }
    sums
}
