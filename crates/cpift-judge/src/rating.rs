//! The grade in a judge's reply.

use std::sync::LazyLock;

use regex::Regex;

/// What a reply says.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rating {
    /// A grade of 1 to 10.
    Rated(f64),
    /// A number that is no grade.
    OutOfRange(f64),
    /// No number where one was asked for.
    Unrated,
}

static PATTERNS: LazyLock<[Regex; 2]> = LazyLock::new(|| {
    [r"\[\[(\d+\.?\d*)\]\]", r"\[(\d+\.?\d*)\]"].map(|pattern| Regex::new(pattern).expect("a constant that parses"))
});

/// The first `[[number]]` of `reply`, else its first `[number]`, as MT-Bench reads it.
pub fn parse(reply: &str) -> Rating {
    let found = PATTERNS.iter().find_map(|pattern| pattern.captures(reply));
    match found.and_then(|groups| groups[1].parse().ok()) {
        Some(value) if (1.0..=10.0).contains(&value) => Rating::Rated(value),
        Some(value) => Rating::OutOfRange(value),
        None => Rating::Unrated,
    }
}

impl Rating {
    /// The grade, where there is one.
    pub fn value(self) -> Option<f64> {
        match self {
            Self::Rated(value) => Some(value),
            Self::OutOfRange(_) | Self::Unrated => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn double_brackets_come_before_single_ones_and_the_first_of_each_counts() {
        assert_eq!(parse("As [2] says. Rating: [[7]], not [[8]]"), Rating::Rated(7.0));
        assert_eq!(parse("Rating: [6.5] or [9]"), Rating::Rated(6.5));
        assert_eq!(parse("[[8.]]"), Rating::Rated(8.0));
    }

    #[test]
    fn what_is_no_grade_is_not_taken_for_one() {
        for reply in ["", "Rating: 7", "[[seven]]", "[[-3]]", "[[7/10]]", "[[ 7 ]]"] {
            assert_eq!(parse(reply), Rating::Unrated, "{reply}");
        }
        assert_eq!(parse("[[0]]"), Rating::OutOfRange(0.0));
        assert_eq!(parse("[[10.5]]"), Rating::OutOfRange(10.5));
        assert_eq!((parse("[[1]]"), parse("[[10]]")), (Rating::Rated(1.0), Rating::Rated(10.0)));
    }
}
