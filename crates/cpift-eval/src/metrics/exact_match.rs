//! `exact-match` and `contains`: the answer is the reference, or holds it; outer white space aside.

use super::{Answer, Grade};

/// 1 where answer and reference are the same text.
pub fn exact_match(answer: &Answer<'_>) -> Grade {
    Grade::one("exact_match", f64::from(answer.output.trim() == answer.reference.trim()))
}

/// 1 where the answer holds the reference; case matters.
pub fn contains(answer: &Answer<'_>) -> Grade {
    Grade::one("contains", f64::from(answer.output.contains(answer.reference.trim())))
}
