//! `rouge-l`: the F1 of the longest common subsequence of words, as Google's rouge_score 0.1.2 gives it without stemming.

use super::{Answer, Grade};

/// ROUGE-L of answer and reference, 0 to 1.
pub fn rouge_l(answer: &Answer<'_>) -> Grade {
    Grade::one("rouge_l", f1(&words(answer.reference), &words(answer.output)))
}

/// Lower case; runs of a–z and 0–9 are words, everything else separates.
fn words(text: &str) -> Vec<String> {
    let lower = text.to_lowercase();
    let words = lower.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    words.map(str::to_owned).collect()
}

fn f1(reference: &[String], candidate: &[String]) -> f64 {
    let common = common_subsequence(reference, candidate) as f64;
    // 2PR / (P + R) with P = common / candidate and R = common / reference.
    if common == 0.0 { 0.0 } else { 2.0 * common / (reference.len() + candidate.len()) as f64 }
}

/// Length of the longest common subsequence, one row of the table at a time.
fn common_subsequence(a: &[String], b: &[String]) -> usize {
    let mut row = vec![0; b.len() + 1];
    for x in a {
        let mut diagonal = 0;
        for (j, y) in b.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = if x == y { diagonal + 1 } else { above.max(row[j]) };
            diagonal = above;
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_those_of_rouge_score() {
        // rouge_scorer.RougeScorer(["rougeL"]).score(reference, candidate)["rougeL"].fmeasure
        for (reference, candidate, expected) in [
            ("The cat sat on the mat.", "the cat is on the mat", 0.8333333333333334),
            ("a b c d e f", "f e d c b a", 0.16666666666666666),
            ("It's 3.5 kg, naïve!", "it s 3 5 kg na ve", 1.0),
            ("alpha beta", "gamma", 0.0),
            ("", "x", 0.0),
            ("one two three", "one two three four five", 0.7499999999999999),
        ] {
            let found = f1(&words(reference), &words(candidate));
            assert!((found - expected).abs() < 1e-12, "{reference:?} {candidate:?}: {found}");
        }
    }
}
