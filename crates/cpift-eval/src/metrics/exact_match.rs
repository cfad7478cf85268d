//! `exact-match`: the answer is the reference, outer white space aside.

use super::{Answer, Grade};

/// 1 where answer and reference are the same text.
pub fn grade(answer: &Answer<'_>) -> Grade {
    Grade::one("exact_match", f64::from(answer.output.trim() == answer.reference.trim()))
}
