//! CodeBLEU (Ren et al. 2020, [arXiv 2009.10297](https://arxiv.org/abs/2009.10297)): how near a piece of code is to a reference, by its
//! words, its syntax and its data flow.
//!
//! ```text
//! CodeBLEU = ¼ · BLEU + ¼ · BLEU_weighted + ¼ · Match_ast + ¼ · Match_df
//!
//! BLEU          = BP · exp(¼ Σₙ₌₁..₄ ln pₙ)     pₙ: n-grams of the candidate that the reference has, clipped, of the candidate's
//! BLEU_weighted = BP · exp(¼ Σₙ₌₁..₄ ln rₙ)     rₙ: n-grams of the reference that the candidate has, clipped, of the reference's;
//!                                               in r₁ the language's keywords weigh 1 and all else 0.2
//! BP            = min(1, exp(1 − |reference| / |candidate|)), where BLEU_weighted takes 2 for |reference|, as the public code does
//! Match_ast     = subtrees of the reference that occur in the candidate / subtrees of the reference
//! Match_df      = data-flow edges of the reference that occur in the candidate / data-flow edges of the reference
//! ```
//!
//! Tokens of the n-grams are what white space separates. A pₙ or rₙ of no match counts 0.1 in its numerator; without a common token both
//! are 0. Subtrees are compared by their node kinds alone, without the leaves' text; comments and docstrings are out of syntax and data
//! flow. Every figure equals that of the PyPI package codebleu 0.7.0, whose readings of the paper (the weighted match as a recall, say)
//! are kept; [`NoDataFlow`] has the one on which the package and the original part.
//!
//! Counts of several pairs add up, which gives the figure of a corpus.

mod flow;
mod language;
mod ngram;
mod strip;
mod syntax;

pub use language::Language;

use std::ops::AddAssign;

/// What no data-flow match does to the total. The component itself is 0 in both.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum NoDataFlow {
    /// It counts as 1, as in the PyPI package codebleu. This is for references without any data flow, but the package does not tell them
    /// from candidates that match none of it, and so neither does this.
    #[default]
    CountsOne,
    /// It counts as 0, as in the original code of CodeXGLUE.
    CountsZero,
}

/// What is counted on a pair of reference and candidate, or on several together.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Counts {
    words: ngram::Counts,
    syntax: Share,
    data_flow: Share,
}

/// So many of so many.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Share {
    matched: u64,
    total: u64,
}

/// CodeBLEU and its components, each from 0 to 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Score {
    /// BLEU-4 on white-space tokens.
    pub ngram: f64,
    /// The n-gram recall in which keywords weigh more.
    pub weighted_ngram: f64,
    /// The share of the reference's subtrees that occur in the candidate.
    pub syntax: f64,
    /// The share of the reference's data-flow edges that occur in the candidate; 0 where it has none.
    pub data_flow: f64,
    /// CodeBLEU: the mean of the four.
    pub codebleu: f64,
}

impl Counts {
    /// Compares `candidate` with `reference`. Any text will do: what does not parse gives trees with errors in them.
    pub fn of(language: Language, reference: &str, candidate: &str) -> Self {
        let (reference, candidate) = (strip::trim(reference), strip::trim(candidate));
        let words = ngram::Counts::of(language, reference, candidate);
        let (reference, candidate) = (strip::comments(language, reference), strip::comments(language, candidate));
        let (reference_tree, candidate_tree) = (language.tree(&reference), language.tree(&candidate));
        let (matched, total) = syntax::matches(reference_tree.root_node(), candidate_tree.root_node());
        let syntax = Share { matched, total };
        let flow = |tree: &tree_sitter::Tree, code: &str| flow::normalised(language, tree.root_node(), code);
        let (matched, total) = flow::matches(&flow(&reference_tree, &reference), &flow(&candidate_tree, &candidate));
        Self { words, syntax, data_flow: Share { matched, total } }
    }

    /// The score of all that was counted.
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

/// Whether `code` is more than white space and parses without an error: no node stands for skipped text or for something missing.
pub fn parses(language: Language, code: &str) -> bool {
    !strip::trim(code).is_empty() && language.parse(code).is_some_and(|tree| !tree.root_node().has_error())
}
