//! Every text gets a score, in bounded time and stack depth.

use std::time::{Duration, Instant};

use cpift_codebleu::{Language, NoDataFlow, Score, parses, score};
use proptest::prelude::*;
use serde_json::Value;

fn components(s: &Score) -> [f64; 5] {
    [s.ngram, s.weighted_ngram, s.syntax, s.data_flow, s.codebleu]
}

fn in_range(s: &Score) -> bool {
    // Rounding may put a perfect score one ulp above 1.
    components(s).iter().all(|value| (0.0..=1.0 + 1e-12).contains(value))
}

/// The references of the golden pairs.
fn snippets() -> Vec<(Language, String)> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/golden/codebleu.json");
    let rows: Vec<Value> = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let snippet = |row: &Value| {
        let language = Language::named(row["lang"].as_str().unwrap()).unwrap();
        (language, row["reference"].as_str().unwrap().to_owned())
    };
    rows.iter().map(snippet).collect()
}

/// Delimiters that the scanners look for.
const PIECES: [&str; 24] = [
    "'",
    "\"",
    "'''",
    "\"\"\"",
    "\\",
    "\\\n",
    "\r",
    "\r\n",
    "\n",
    "\t",
    "\u{c}",
    "\u{1c}",
    "/*",
    "*/",
    "//",
    "#",
    "(",
    ")",
    "{",
    "}",
    "0b'",
    "rb\"",
    "é漢🎉",
    "\0",
];

fn mutated() -> impl Strategy<Value = (Language, String, String)> {
    let edits = prop::collection::vec((any::<prop::sample::Index>(), 0..8usize, 0..PIECES.len() + 8), 0..6);
    (any::<prop::sample::Index>(), edits).prop_map(|(which, edits)| {
        let all = snippets();
        let (language, reference) = which.get(&all).clone();
        let mut characters: Vec<char> = reference.chars().collect();
        for (at, dropped, piece) in edits {
            let at = at.index(characters.len() + 1);
            let end = (at + dropped).min(characters.len());
            characters.splice(at..end, PIECES.get(piece).unwrap_or(&"").chars());
        }
        (language, reference, characters.into_iter().collect())
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn mutated_code_has_a_score((language, reference, candidate) in mutated()) {
        for (a, b) in [(&reference, &candidate), (&candidate, &reference)] {
            prop_assert!(in_range(&score(language, a, b, NoDataFlow::CountsOne)));
        }
        let same = score(language, &candidate, &candidate, NoDataFlow::CountsOne);
        prop_assert_eq!(same.syntax, 1.0);
        prop_assert!(same.data_flow == 1.0 || same.data_flow == 0.0);
    }

    #[test]
    fn random_text_has_a_score(reference in ".{0,60}", candidate in any::<String>()) {
        for language in Language::ALL {
            prop_assert!(in_range(&score(language, &reference, &candidate, NoDataFlow::CountsZero)));
            parses(language, &candidate);
        }
    }
}

/// Texts for which naive scanners or walks take quadratic or exponential time, or a deep stack.
#[test]
fn long_and_deep_texts_take_bounded_time() {
    let loops = |head: &str, tail: &str| format!("{}x = x + 1;{}", head.repeat(60), tail.repeat(60));
    let python_loops: String = (0..60).map(|depth| format!("{}while x:\n", " ".repeat(depth))).collect();
    let texts = [
        ("nesting", "(".repeat(10_000) + &")".repeat(10_000)),
        ("unclosed", "[".repeat(30_000)),
        ("unary", "-".repeat(50_000) + "x"),
        ("comments", "/*//\n".repeat(20_000)),
        ("escapes", format!("x = '{}", "\\'".repeat(20_000))),
        ("quotes", "'\"\"\"\"'".repeat(2_000)),
        ("sum", format!("x = {}1;", "a + ".repeat(10_000))),
        ("many", "x = x + 1;\n".repeat(3_000)),
        ("ifs", "if (a) { b = a; } else { c = b; }\n".repeat(700)),
        ("pairs", format!("x = [{}];", "y, ".repeat(5_000))),
        ("chain", format!("{}1;", "x = ".repeat(5_000))),
        ("loops", loops("while (x) { ", "}")),
        ("python loops", format!("{python_loops}{}x = x + 1\n", " ".repeat(60))),
        ("one word", "x".repeat(500_000)),
        ("one word, other letters", "é ".repeat(200_000)),
    ];
    for (name, text) in texts {
        for language in Language::ALL {
            let start = Instant::now();
            let s = score(language, &text, &text, NoDataFlow::CountsOne);
            assert!(in_range(&s) && s.syntax == 1.0, "{name} {language:?}: {s:?}");
            assert!(start.elapsed() < Duration::from_secs(30), "{name} {language:?}: {:?}", start.elapsed());
        }
    }
}

#[test]
fn code_parses_without_errors_or_missing_parts() {
    for (language, good, skipped, missing) in [
        (Language::Python, "x = (1 +\n 2)  # é\n", "x = = 1", "def f(:\n    pass"),
        (Language::Java, "class A { int x = 1; }", "class A { int int x; }", "class A { int x = 1 }"),
        (Language::JavaScript, "const x = `${1}`", "const const x = 1", "f(1"),
        (Language::C, "int main(void) { return 0; }", "int main(void) { return 0 0; }", "int main(void) { return 0 }"),
        (Language::Cpp, "auto f = [](auto x) { return x; };", "auto auto = 1;", "int main() { return 0 }"),
    ] {
        assert!(parses(language, good), "{good}");
        assert!(!parses(language, skipped), "{skipped}");
        assert!(!parses(language, missing), "{missing}");
        assert!(!parses(language, " \n"), "an empty answer is no code");
    }
}

#[test]
fn names_of_languages() {
    for language in Language::ALL {
        assert_eq!(Language::named(language.name()), Some(language));
    }
    for (name, language) in [("Py", Language::Python), (" C++ ", Language::Cpp), ("JS", Language::JavaScript)] {
        assert_eq!(Language::named(name), Some(language));
    }
    assert_eq!(Language::named("rust"), None);
}
