//! The two n-gram components: BLEU-4 and the keyword-weighted recall.

use std::collections::HashMap;
use std::ops::AddAssign;

use crate::language::{Language, is_space};

/// Longest n-gram.
const ORDER: usize = 4;
/// Numerator of an order without a match (smoothing method 1 of Chen and Cherry 2014).
const SMOOTHED: f64 = 0.1;
/// Reference length in the brevity penalty of the weighted match. The public code takes the length
/// of the pair (tokens, weights), so only candidates of one token are penalised.
const WEIGHTED_REFERENCE_LENGTH: u64 = 2;
/// Weight of a unigram that is not a keyword.
const PLAIN_WEIGHT: f64 = 0.2;

/// Matched and total n-grams by order, and the lengths for the brevity penalty.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Counts {
    pairs: u64,
    reference_length: u64,
    candidate_length: u64,
    /// Share of the candidate's n-grams.
    precision: [Ratio; ORDER],
    /// Share of the reference's n-grams; unigrams are weighted.
    recall: [Ratio; ORDER],
}

#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Ratio {
    matched: f64,
    total: f64,
}

impl Counts {
    pub(crate) fn of(language: Language, reference: &str, candidate: &str) -> Self {
        let mut ids = HashMap::new();
        let reference = numbered(reference, &mut ids);
        let candidate = numbered(candidate, &mut ids);
        let mut weights = vec![PLAIN_WEIGHT; ids.len()];
        ids.iter().filter(|(token, _)| language.is_keyword(token)).for_each(|(_, &id)| weights[id as usize] = 1.0);
        let mut counts = Self {
            pairs: 1,
            reference_length: reference.len() as u64,
            candidate_length: candidate.len() as u64,
            ..Self::default()
        };
        for n in 1..=ORDER {
            let (of_reference, of_candidate) = (ngrams(&reference, n), ngrams(&candidate, n));
            let weight = |ngram: &[u32]| if n == 1 { weights[ngram[0] as usize] } else { 1.0 };
            counts.precision[n - 1] = ratio(&of_candidate, &of_reference, |_| 1.0);
            counts.recall[n - 1] = ratio(&of_reference, &of_candidate, weight);
        }
        counts
    }

    /// BLEU-4.
    pub(crate) fn precision(&self) -> f64 {
        self.brevity_penalty(self.reference_length) * geometric_mean(&self.precision)
    }

    /// The weighted n-gram match.
    pub(crate) fn weighted_recall(&self) -> f64 {
        self.brevity_penalty(WEIGHTED_REFERENCE_LENGTH * self.pairs) * geometric_mean(&self.recall)
    }

    fn brevity_penalty(&self, reference_length: u64) -> f64 {
        if self.candidate_length == 0 {
            0.0
        } else {
            (1.0 - reference_length as f64 / self.candidate_length as f64).exp().min(1.0)
        }
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.pairs += other.pairs;
        self.reference_length += other.reference_length;
        self.candidate_length += other.candidate_length;
        let ours = self.precision.iter_mut().chain(&mut self.recall);
        for (sum, ratio) in ours.zip(other.precision.iter().chain(&other.recall)) {
            sum.matched += ratio.matched;
            sum.total += ratio.total;
        }
    }
}

fn geometric_mean(ratios: &[Ratio; ORDER]) -> f64 {
    if ratios[0].matched == 0.0 {
        return 0.0;
    }
    let log = |r: &Ratio| ((if r.matched == 0.0 { SMOOTHED } else { r.matched }) / r.total).ln();
    (ratios.iter().map(log).sum::<f64>() / ORDER as f64).exp()
}

/// Numbers the tokens: equal tokens get equal numbers.
fn numbered<'a>(code: &'a str, ids: &mut HashMap<&'a str, u32>) -> Vec<u32> {
    let tokens = code.split(is_space).filter(|token| !token.is_empty());
    tokens
        .map(|token| {
            let next = ids.len() as u32;
            *ids.entry(token).or_insert(next)
        })
        .collect()
}

/// The distinct n-grams with their counts, sorted so that sums over them have a fixed order.
fn ngrams(tokens: &[u32], n: usize) -> Vec<(&[u32], u64)> {
    let mut all: Vec<&[u32]> = tokens.windows(n).collect();
    all.sort_unstable();
    all.chunk_by(|a, b| a == b).map(|same| (same[0], same.len() as u64)).collect()
}

/// Share of `these` that is in `those`, with clipped counts. The total is at least 1.
fn ratio(these: &[(&[u32], u64)], those: &[(&[u32], u64)], weight: impl Fn(&[u32]) -> f64) -> Ratio {
    let (mut matched, mut total) = (0.0, 0.0);
    for (ngram, count) in these {
        let there = those.binary_search_by_key(ngram, |(other, _)| other).map_or(0, |at| those[at].1);
        matched += weight(ngram) * *count.min(&there) as f64;
        total += weight(ngram) * *count as f64;
    }
    Ratio { matched, total: total.max(1.0) }
}
