//! The figures of the PyPI package codebleu on our own pairs (fixtures/golden/codebleu.json, made
//! by scripts/oracle/golden_codebleu.py).

use std::collections::HashMap;

use cpift_codebleu::{Counts, Language, NoDataFlow, Score, score};
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    lang: String,
    name: String,
    reference: String,
    prediction: String,
    ngram: f64,
    weighted: f64,
    syntax: f64,
    dataflow: f64,
    codebleu: f64,
}

fn golden() -> Vec<Golden> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/golden/codebleu.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn close(ours: f64, theirs: f64) -> bool {
    (ours - theirs).abs() < 1e-6
}

fn score_of(pair: &Golden, no_data_flow: NoDataFlow) -> Score {
    score(Language::named(&pair.lang).unwrap(), &pair.reference, &pair.prediction, no_data_flow)
}

#[test]
fn every_component_is_the_packages() {
    let pairs = golden();
    let mut of_language: HashMap<&str, usize> = HashMap::new();
    for pair in &pairs {
        *of_language.entry(&pair.lang).or_default() += 1;
        let s = score_of(pair, NoDataFlow::CountsOne);
        let figures = [
            ("ngram", s.ngram, pair.ngram),
            ("weighted", s.weighted_ngram, pair.weighted),
            ("syntax", s.syntax, pair.syntax),
            ("dataflow", s.data_flow, pair.dataflow),
            ("codebleu", s.codebleu, pair.codebleu),
        ];
        for (figure, ours, theirs) in figures {
            assert!(close(ours, theirs), "{} {}: {figure} is {ours}, not {theirs}", pair.lang, pair.name);
        }
    }
    for language in Language::ALL {
        assert!(of_language[language.name()] >= 12, "{of_language:?}");
    }
}

/// The original code has the same components; its total is their plain mean.
#[test]
fn the_original_gives_nothing_for_no_data_flow() {
    let mut without = 0;
    for pair in golden() {
        let s = score_of(&pair, NoDataFlow::CountsZero);
        let mean = (pair.ngram + pair.weighted + pair.syntax + pair.dataflow) / 4.0;
        assert!(close(s.codebleu, mean), "{} {}: {} is not {mean}", pair.lang, pair.name, s.codebleu);
        without += usize::from(pair.dataflow == 0.0);
    }
    assert!(without > 20);
}

/// `calc_codebleu` of the package on the two pairs at once, in either order.
#[test]
fn counts_of_pairs_add_up_to_a_corpus() {
    let pairs = [
        ("def f(a):\n    b = a\n    return b\n", "def f(x):\n    y = x\n    return y\n"),
        ("for i in range(3):\n    print(i, i * i)\n", "for i in range(4):\n    print(i)\n"),
    ];
    let mut corpus = Counts::default();
    for (reference, candidate) in pairs {
        corpus += Counts::of(Language::Python, reference, candidate);
    }
    let s = corpus.score(NoDataFlow::CountsOne);
    let package = [0.09356557054505282, 0.10247740253429662, 0.5625, 0.8181818181818182, 0.39418119781529193];
    for (ours, theirs) in [s.ngram, s.weighted_ngram, s.syntax, s.data_flow, s.codebleu].into_iter().zip(package) {
        assert!(close(ours, theirs), "{s:?}");
    }
}
