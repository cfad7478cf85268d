//! `gsm8k`: exact match of the final number, as in lm-evaluation-harness (task `gsm8k`, version 3),
//! including its quirks.

use std::sync::LazyLock;

use anyhow::Result;
use regex::Regex;
use serde_json::{Map, Value};

use super::generated::graded;
use super::metric::{FRACTION, Grade, Metric, Prepared, TaskView};
use crate::fields::reference;

/// Extracted text of an answer without a number.
const INVALID: &str = "[invalid]";

fn constant(pattern: &str) -> Regex {
    Regex::new(pattern).expect("a constant that parses")
}

static STRICT: LazyLock<Regex> = LazyLock::new(|| constant(r"#### (\-?[0-9\.\,]+)"));
static FLEXIBLE: LazyLock<Regex> = LazyLock::new(|| constant(r"(-?[$0-9.,]{2,})|(-?[0-9]+)"));
/// The last pattern is `\.$` in Python, whose `$` also matches before a final line break.
static IGNORED: LazyLock<[Regex; 4]> =
    LazyLock::new(|| [constant(","), constant(r"\$"), constant(r"(?s).*#### "), constant(r"\.(\n?)\z")]);

/// The number after the first `####`, or `[invalid]`.
pub fn strict_match(answer: &str) -> &str {
    STRICT.captures(answer).and_then(|c| c.get(1)).map_or(INVALID, |m| m.as_str())
}

/// The last match that looks like a number, or `[invalid]`.
pub fn flexible_extract(answer: &str) -> &str {
    FLEXIBLE.captures_iter(answer).last().and_then(|c| c.get(1).or(c.get(2))).map_or(INVALID, |m| m.as_str())
}

/// Normalises both sides of the comparison: removes commas, dollar signs, everything up to `#### `
/// and a final full stop, and converts to lower case.
pub fn normalise(text: &str) -> String {
    let mut out = text.to_owned();
    for pattern in IGNORED.iter() {
        out = pattern.replace_all(&out, "$1").into_owned();
    }
    out.to_lowercase()
}

/// `gsm8k`: strict match; `exact_match_flexible` uses flexible extraction.
pub(crate) struct Gsm8k;

impl Metric for Gsm8k {
    fn key(&self) -> &'static str {
        "gsm8k"
    }

    fn name(&self) -> &'static str {
        "exact_match"
    }

    fn unit(&self) -> &'static str {
        FRACTION
    }

    fn summary(&self) -> &'static str {
        "answers whose number after #### is that of the reference"
    }

    fn prepare(&self, task: &TaskView<'_>) -> Result<Box<dyn Prepared>> {
        graded(task, self.name(), reference, grade)
    }
}

fn grade(output: &str, reference: &str) -> Grade {
    let (strict, flexible) = (strict_match(output), flexible_extract(output));
    let expected = normalise(reference);
    let same = |extracted: &str| f64::from(normalise(extracted) == expected);
    let extracted = [("extracted", strict), ("flexible_extract", flexible)];
    Grade {
        score: same(strict),
        also: vec![("exact_match_flexible", same(flexible))],
        extracted: Map::from_iter(extracted.map(|(key, text)| (key.to_owned(), Value::from(text)))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strict_takes_the_first_marked_number_and_flexible_the_last_of_any() {
        let answer = "She has 12 apples.\n#### 1,234\nThat is 7 more. #### 9";
        assert_eq!(strict_match(answer), "1,234");
        assert_eq!(flexible_extract(answer), "9");
        assert_eq!(strict_match("about 5"), INVALID);
        assert_eq!(flexible_extract("none"), INVALID);
    }

    #[test]
    fn the_quirks_of_the_harness_are_kept() {
        assert_eq!(normalise("$1,234."), "1234");
        assert_eq!(normalise("work\n#### 18"), "18");
        // Dots alone look like a number to the flexible pattern, and 12.0 is not 12.
        assert_eq!(flexible_extract("It is 5. Hope this helps..."), "...");
        assert_ne!(normalise("12.0"), normalise("12"));
        assert_eq!(flexible_extract("I paid $18.50."), "$18.50.");
    }
}
