//! Set operations on masks of one base: union, intersection, difference, complement, consensus, and
//! the overlap of every pair.

use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::Result;
use cpift_core::format::digest::Digest;
use cpift_core::format::mask::{MaskHeader, Ties, count_ones};
use cpift_core::format::names::TensorKind;
use cpift_core::record::provenance::Recorder;
use cpift_core::{BadInput, Mask};
use rayon::prelude::*;
use serde::Serialize;
use serde_json::{Value, json};

use crate::output::{clear_padding, write_mask};

/// Elements of the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    /// In any mask.
    Union,
    /// In every mask.
    Intersect,
    /// In the first mask and in none of the others.
    Subtract,
    /// In D and not in the mask.
    Complement,
    /// In at least this many masks.
    Consensus(usize),
}

/// A checked request for a set operation.
pub(crate) struct Plan {
    pub(crate) operation: Operation,
    /// Masks of one base; at least one.
    pub(crate) masks: Vec<Mask>,
    pub(crate) out: PathBuf,
    pub(crate) force: bool,
}

impl Plan {
    /// Writes the mask and its record, or nothing; returns the summary for `--json`.
    ///
    /// # Errors
    /// [`BadInput`] for masks that are not sound or do not belong together.
    pub(crate) fn run(&self, mut recorder: Recorder) -> Result<Value> {
        check_alike(&self.masks)?;
        let first = &self.masks[0].header;
        let names: Vec<&str> = first.numel.keys().map(String::as_str).collect();
        let selected: u64 = names.par_iter().map(|name| count_ones(&self.bits(name))).sum();
        let header = MaskHeader {
            percent: if first.d == 0 { 0.0 } else { 100.0 * selected as f64 / first.d as f64 },
            seed: None,
            rule: Some(self.rule()),
            selected,
            ties: Ties::default(),
            ..first.clone()
        };
        for (i, mask) in self.masks.iter().enumerate() {
            recorder.input(format!("mask:{i}"), mask.path(), Digest::of_file(mask.path())?);
        }
        let bits = names.iter().map(|name| (*name, self.bits(name)));
        write_mask(&self.out, self.force, &header, bits, recorder)?;
        log::info!(
            "{}: {selected} of D = {} elements ({:.4} %), {}",
            self.out.display(),
            header.d,
            header.percent,
            self.rule()
        );
        Ok(json!({
            "out": self.out,
            "rule": header.rule,
            "D": header.d,
            "selected": selected,
            "percent": header.percent,
            "excluded": header.excluded,
        }))
    }

    fn rule(&self) -> String {
        let n = self.masks.len();
        match self.operation {
            Operation::Union => format!("union of {n} masks"),
            Operation::Intersect => format!("intersection of {n} masks"),
            Operation::Subtract => format!("first of {n} masks without the others"),
            Operation::Complement => "complement of a mask".to_owned(),
            Operation::Consensus(k) => format!("at least {k} of {n} masks"),
        }
    }

    /// Bits of the result in the tensor `name`.
    fn bits(&self, name: &str) -> Vec<u8> {
        let bits: Vec<&[u8]> =
            self.masks.iter().map(|mask| mask.bits(name).expect("the masks have one layout")).collect();
        let (first, others) = bits.split_first().expect("there is a mask");
        match self.operation {
            Operation::Union => at_least(1, &bits),
            Operation::Intersect => at_least(bits.len(), &bits),
            Operation::Consensus(k) => at_least(k, &bits),
            Operation::Subtract => {
                let mut left = first.to_vec();
                others.iter().for_each(|other| left.iter_mut().zip(*other).for_each(|(l, o)| *l &= !o));
                left
            }
            Operation::Complement if is_excluded(&self.masks[0].header, name) => vec![0; first.len()],
            Operation::Complement => {
                let mut left: Vec<u8> = first.iter().map(|byte| !byte).collect();
                clear_padding(&mut left, self.masks[0].header.numel[name]);
                left
            }
        }
    }
}

fn is_excluded(header: &MaskHeader, name: &str) -> bool {
    header.excluded.iter().filter_map(|kind| kind.parse::<TensorKind>().ok()).any(|kind| kind.matches(name))
}

/// Elements that are in at least `k` of the regions, 1 ≤ k.
fn at_least(k: usize, regions: &[&[u8]]) -> Vec<u8> {
    // levels[j] has the elements that are in more than j of the regions seen so far.
    let mut levels = vec![vec![0u8; regions[0].len()]; k];
    for region in regions {
        for j in (0..k).rev() {
            let (lower, upper) = levels.split_at_mut(j);
            match lower.last() {
                Some(below) => {
                    upper[0].iter_mut().zip(below).zip(*region).for_each(|((level, b), r)| *level |= b & r);
                }
                None => upper[0].iter_mut().zip(*region).for_each(|(level, r)| *level |= r),
            }
        }
    }
    levels.pop().expect("k is at least 1")
}

/// Checks that the masks are sound and belong to one base with one D.
///
/// # Errors
/// [`BadInput`] with the first difference.
pub(crate) fn check_alike(masks: &[Mask]) -> Result<()> {
    masks.iter().try_for_each(Mask::verify)?;
    let first = &masks[0];
    for mask in &masks[1..] {
        let bad = |what: &str| BadInput::new(mask.path(), format!("{what} than {}", first.path().display()));
        if mask.header.numel != first.header.numel {
            let other = mask.header.numel.iter().find(|(name, n)| first.header.numel.get(*name) != Some(n));
            let missing = first.header.numel.iter().find(|(name, _)| !mask.header.numel.contains_key(*name));
            let (name, n) = other.or(missing).expect("the layouts differ");
            let elements = |n: Option<&u64>| n.map_or("no such tensor".to_owned(), |n| format!("{n} elements"));
            let found = if other.is_some() { Some(n) } else { None };
            return Err(bad("a mask of another model")
                .tensor(name)
                .expected(elements(first.header.numel.get(name)))
                .found(elements(found))
                .into());
        }
        if mask.header.base != first.header.base {
            return Err(bad("a mask of another base")
                .expected(format!("base digest {}", first.header.base))
                .found(format!("base digest {}", mask.header.base))
                .into());
        }
        if mask.header.excluded != first.header.excluded {
            let list = |header: &MaskHeader| match header.excluded.as_slice() {
                [] => "nothing excluded from D".to_owned(),
                kinds => format!("{} excluded from D", kinds.join(" and ")),
            };
            return Err(bad("a mask with another D")
                .expected(list(&first.header))
                .found(list(&mask.header))
                .hint("extract both with the same --exclude")
                .into());
        }
    }
    Ok(())
}

/// Overlap of every pair of masks.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Overlap {
    /// Paths of the masks.
    pub(crate) masks: Vec<PathBuf>,
    #[serde(rename = "D")]
    pub(crate) d: u64,
    /// Elements in both masks; the size of a mask on the diagonal.
    pub(crate) shared: Vec<Vec<u64>>,
    /// |a ∩ b| / |a ∪ b|.
    pub(crate) jaccard: Vec<Vec<f64>>,
    /// Jaccard similarity of independent random masks of these sizes.
    pub(crate) chance: Vec<Vec<f64>>,
    /// Share of the row's mask that the column's mask covers.
    pub(crate) covered: Vec<Vec<f64>>,
}

/// Counts the overlap of every pair of `masks`.
///
/// # Errors
/// As [`check_alike`].
pub(crate) fn overlap(masks: &[Mask]) -> Result<Overlap> {
    check_alike(masks)?;
    let (n, d) = (masks.len(), masks[0].header.d);
    let names: Vec<&String> = masks[0].header.numel.keys().collect();
    let pair = |a: usize, b: usize| -> u64 {
        let both = |name: &&String| {
            let [a, b] = [a, b].map(|i| masks[i].bits(name).expect("the masks have one layout"));
            count_ones(&a.iter().zip(b).map(|(x, y)| x & y).collect::<Vec<u8>>())
        };
        names.par_iter().map(both).sum()
    };
    let mut shared = vec![vec![0; n]; n];
    for (a, b) in (0..n).flat_map(|a| (0..=a).map(move |b| (a, b))) {
        let both = pair(a, b);
        (shared[a][b], shared[b][a]) = (both, both);
    }
    let over = |part: f64, whole: f64| if whole > 0.0 { part / whole } else { 0.0 };
    let each = |value: &dyn Fn(f64, f64, f64) -> f64| -> Vec<Vec<f64>> {
        let cell = |a: usize, b: usize| value(shared[a][b] as f64, shared[a][a] as f64, shared[b][b] as f64);
        (0..n).map(|a| (0..n).map(|b| cell(a, b)).collect()).collect()
    };
    let chance = |_: f64, a: f64, b: f64| {
        let both = a * b / d.max(1) as f64;
        over(both, a + b - both)
    };
    Ok(Overlap {
        masks: masks.iter().map(|mask| mask.path().to_owned()).collect(),
        d,
        jaccard: each(&|both, a, b| over(both, a + b - both)),
        chance: each(&chance),
        covered: each(&|both, a, _| over(both, a)),
        shared,
    })
}

/// One line per pair of masks.
pub(crate) fn table(overlap: &Overlap) -> String {
    let mut out = String::new();
    for (i, path) in overlap.masks.iter().enumerate() {
        let _ = writeln!(out, "{}. {}: {} of D = {} elements", i + 1, path.display(), overlap.shared[i][i], overlap.d);
    }
    let _ = writeln!(
        out,
        "\n{:<9} {:>14} {:>9} {:>9} {:>11} {:>11}",
        "pair", "shared", "Jaccard", "chance", "of first", "of second"
    );
    for b in 0..overlap.masks.len() {
        for a in 0..b {
            let _ = writeln!(
                out,
                "{:<9} {:>14} {:>9.4} {:>9.4} {:>9.3} % {:>9.3} %",
                format!("{} and {}", a + 1, b + 1),
                overlap.shared[a][b],
                overlap.jaccard[a][b],
                overlap.chance[a][b],
                100.0 * overlap.covered[a][b],
                100.0 * overlap.covered[b][a]
            );
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn at_least_counts_the_regions_of_each_element() {
        let regions = [[0b1110u8], [0b1100], [0b1000]];
        let list: Vec<&[u8]> = regions.iter().map(|r| r.as_slice()).collect();
        assert_eq!([1, 2, 3].map(|k| at_least(k, &list)[0]), [0b1110, 0b1100, 0b1000]);
    }
}
