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

static NUMBER: LazyLock<Regex> = LazyLock::new(|| regex(r"\[\[\s*(\d+\.?\d*)\s*\]\]"));
static THINKING: LazyLock<Regex> = LazyLock::new(|| regex(r"<(/?)think(?:ing)?>"));

fn regex(pattern: &str) -> Regex {
    Regex::new(pattern).expect("a constant that parses")
}

/// The last `[[number]]` of `reply` outside of think blocks: a judge that weighs grades before it decides names the one it gives at the
/// end, where it is asked for.
pub fn parse(reply: &str) -> Rating {
    let said = without_thinking(reply);
    match NUMBER.captures_iter(&said).last().and_then(|groups| groups[1].parse().ok()) {
        Some(value) if (1.0..=10.0).contains(&value) => Rating::Rated(value),
        Some(value) => Rating::OutOfRange(value),
        None => Rating::Unrated,
    }
}

/// `reply` without its think blocks. A block may lack its beginning, which some templates write into the prompt, or its end, where the
/// reply was cut off.
fn without_thinking(reply: &str) -> String {
    let (mut said, mut depth, mut at) = (String::new(), 0_usize, 0);
    for mark in THINKING.captures_iter(reply) {
        let (whole, closes) = (mark.get(0).expect("the whole match"), !mark[1].is_empty());
        if depth == 0 {
            // An end without a beginning: what came before was thought.
            if closes { said.clear() } else { said.push_str(&reply[at..whole.start()]) }
        }
        depth = if closes { depth.saturating_sub(1) } else { depth + 1 };
        at = whole.end();
    }
    if depth == 0 {
        said.push_str(&reply[at..]);
    }
    said
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
    fn the_last_double_brackets_count() {
        assert_eq!(parse("As [2] says. Rating: [[7]], no: [[8]]"), Rating::Rated(8.0));
        assert_eq!(parse("[[7]] it was, [[seven]] and [5] are no grades"), Rating::Rated(7.0));
        for (reply, grade) in [("[[8.]]", 8.0), ("[[ 8 ]]", 8.0), ("[[8.5]]", 8.5), ("[[8]]/10", 8.0), ("[[\n9]]", 9.0)]
        {
            assert_eq!(parse(reply), Rating::Rated(grade), "{reply}");
        }
    }

    #[test]
    fn what_is_thought_is_not_said() {
        for reply in [
            "<think>[[9]] perhaps, or [[2]]</think>Rating: [[4]]",
            "Perhaps [[9]].</think>\n\nRating: [[4]]",
            "Rating: [[4]] <think>or [[9]]?</think>",
            "Rating: [[4]] <thinking>or [[9]]?",
            "[[1]]</think>[[4]]<think><think>[[2]]</think>[[3]]</think>",
        ] {
            assert_eq!(parse(reply), Rating::Rated(4.0), "{reply}");
        }
        for reply in [
            "<think>Rating: [[4]]",
            "Rating: [[4]]</think>",
            "<think>[[4]]</think>[4]",
            "[[9]]<think></think>[[2]]</think>",
        ] {
            assert_eq!(parse(reply), Rating::Unrated, "{reply}");
        }
    }

    #[test]
    fn what_is_no_grade_is_not_taken_for_one() {
        for reply in ["", "Rating: 7", "[[seven]]", "[[-3]]", "[[7/10]]", "[1]", "Rating: [6.5]", "[[]]", "[ [7] ]"] {
            assert_eq!(parse(reply), Rating::Unrated, "{reply}");
        }
        assert_eq!(parse("[[0]]"), Rating::OutOfRange(0.0));
        assert_eq!(parse("[[7]], or rather [[10.5]]"), Rating::OutOfRange(10.5));
        assert_eq!((parse("[[1]]"), parse("[[10]]")), (Rating::Rated(1.0), Rating::Rated(10.0)));
    }
}
