//! The known word that a misspelled one means.

/// The entry of `known` of which `word` may be a misspelling: at most two edits away and mostly the
/// same.
pub fn closest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    let near = known.iter().map(|k| (distance(word, k), *k)).min()?;
    (near.0 <= 2 && near.0 * 2 < near.1.len()).then_some(near.1)
}

/// Number of letters to change, add, drop or swap with their neighbour to get from `a` to `b`; 3 if
/// the lengths differ by more than 2.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().take(64).collect(), b.chars().collect());
    if a.len().abs_diff(b.len()) > 2 {
        return 3;
    }
    let mut rows = vec![(0..=b.len()).collect::<Vec<usize>>()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let same = usize::from(a[i - 1] != b[j - 1]);
            let mut best = (rows[i - 1][j - 1] + same).min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn misspellings_are_recognised_and_other_words_are_not() {
        let known = ["weight", "density", "t", "normalize"];
        for (slip, word) in [("wieght", "weight"), ("densty", "density"), ("normalise", "normalize")] {
            assert_eq!(closest(slip, &known), Some(word));
        }
        for word in ["", "x", "gamma", "weight_by_layer", "epsilon"] {
            assert_eq!(closest(word, &known), None, "{word}");
        }
        assert_eq!((distance("ab", "ba"), distance("abc", "abd"), distance("", "ab")), (1, 1, 2));
    }
}
