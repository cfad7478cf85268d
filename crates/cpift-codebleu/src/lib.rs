//! CodeBLEU (Ren et al. 2020, [arXiv 2009.10297](https://arxiv.org/abs/2009.10297)): similarity of
//! code to a reference by tokens, syntax and data flow.
//!
//! ```text
//! CodeBLEU = ¼ · BLEU + ¼ · BLEU_weighted + ¼ · Match_ast + ¼ · Match_df
//!
//! BLEU          = BP · exp(¼ Σₙ₌₁..₄ ln pₙ)
//! BLEU_weighted = BP · exp(¼ Σₙ₌₁..₄ ln rₙ)
//! BP            = min(1, exp(1 − |reference| / |candidate|)); |reference| is 2 in BLEU_weighted
//! Match_ast     = subtrees of the reference that occur in the candidate / its subtrees
//! Match_df      = edges of the reference that occur in the candidate / its edges
//!
//! pₙ  share of the candidate's n-grams that are in the reference, clipped
//! rₙ  share of the reference's n-grams that are in the candidate, clipped;
//!     in r₁ keywords of the language weigh 1 and other tokens 0.2
//! ```
//!
//! N-gram tokens are separated by white space. An order n without a match has 0.1 as its numerator;
//! without any common token both scores are 0. Subtrees are compared by node kinds, without the
//! text of the leaves; comments and docstrings are removed before the syntax and data-flow matches.
//! Every figure equals that of the PyPI package codebleu 0.7.0, including its readings of the paper
//! (the weighted match is a recall, for example). [`NoDataFlow`] selects between the package and
//! the original where they differ.
//!
//! [`Counts`] of several pairs add up to the figure of a corpus.

mod flow;
mod language;
mod ngram;
mod syntax;

pub use language::Language;

use std::ops::AddAssign;

/// Contribution of the data-flow component to the total if no edge matches. The component itself is
/// 0 in both cases.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum NoDataFlow {
    /// It counts as 1, as in the PyPI package codebleu. The 1 is meant for references without data
    /// flow, but the package also applies it to candidates that match none of the reference's
    /// edges.
    #[default]
    CountsOne,
    /// It counts as 0, as in the original CodeXGLUE code.
    CountsZero,
}

/// Match counts of one pair of reference and candidate, or summed over several pairs.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Counts {
    words: ngram::Counts,
    syntax: Share,
    data_flow: Share,
}

/// Matched and total items.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Share {
    matched: u64,
    total: u64,
}

/// CodeBLEU and its components, each from 0 to 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Score {
    /// BLEU-4 over tokens separated by white space.
    pub ngram: f64,
    /// N-gram recall with a higher weight for keywords.
    pub weighted_ngram: f64,
    /// Share of the reference's subtrees that occur in the candidate.
    pub syntax: f64,
    /// Share of the reference's data-flow edges that occur in the candidate; 0 if it has none.
    pub data_flow: f64,
    /// CodeBLEU: the mean of the four components.
    pub codebleu: f64,
}

impl Counts {
    /// Compares `candidate` with `reference`. Text that does not parse is compared by a tree with
    /// error nodes.
    pub fn of(language: Language, reference: &str, candidate: &str) -> Self {
        let (reference, candidate) = (language::trim(reference), language::trim(candidate));
        let words = ngram::Counts::of(language, reference, candidate);
        let (reference, candidate) =
            (language::without_comments(language, reference), language::without_comments(language, candidate));
        let (reference_tree, candidate_tree) = (language.tree(&reference), language.tree(&candidate));
        let (matched, total) = syntax::matches(reference_tree.root_node(), candidate_tree.root_node());
        let syntax = Share { matched, total };
        let flow = |tree: &tree_sitter::Tree, code: &str| flow::normalised(language, tree.root_node(), code);
        let (matched, total) = flow::matches(&flow(&reference_tree, &reference), &flow(&candidate_tree, &candidate));
        Self { words, syntax, data_flow: Share { matched, total } }
    }

    /// The score of these counts.
    pub fn score(&self, no_data_flow: NoDataFlow) -> Score {
        let (ngram, weighted_ngram) = (self.words.precision(), self.words.weighted_recall());
        let (syntax, data_flow) = (self.syntax.value(), self.data_flow.value());
        let counted = match no_data_flow {
            NoDataFlow::CountsOne if data_flow == 0.0 => 1.0,
            _ => data_flow,
        };
        Score { ngram, weighted_ngram, syntax, data_flow, codebleu: (ngram + weighted_ngram + syntax + counted) / 4.0 }
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.words += other.words;
        self.syntax += other.syntax;
        self.data_flow += other.data_flow;
    }
}

impl Share {
    fn value(self) -> f64 {
        if self.total == 0 { 0.0 } else { self.matched as f64 / self.total as f64 }
    }
}

impl AddAssign for Share {
    fn add_assign(&mut self, other: Self) {
        self.matched += other.matched;
        self.total += other.total;
    }
}

/// The score of one pair.
pub fn score(language: Language, reference: &str, candidate: &str, no_data_flow: NoDataFlow) -> Score {
    Counts::of(language, reference, candidate).score(no_data_flow)
}

/// Returns true if `code` is not blank and parses without an error or a missing node.
pub fn parses(language: Language, code: &str) -> bool {
    !language::trim(code).is_empty() && language.parse(code).is_some_and(|tree| !tree.root_node().has_error())
}
