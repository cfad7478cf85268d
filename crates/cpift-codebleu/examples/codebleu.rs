//! CodeBLEU of pairs: JSON lines of `lang`, `reference` and `prediction` on standard input, lines
//! of scores on standard output.
//!
//!     codebleu [--no-data-flow-counts-zero] < pairs.jsonl

use std::error::Error;
use std::io::{BufRead, Write, stdin, stdout};

use cpift_codebleu::{Language, NoDataFlow, parses, score};
use serde::Deserialize;
use serde_json::json;

#[derive(Deserialize)]
struct Pair {
    lang: String,
    reference: String,
    prediction: String,
}

fn main() -> Result<(), Box<dyn Error>> {
    let no_data_flow = match std::env::args().nth(1).as_deref() {
        None => NoDataFlow::CountsOne,
        Some("--no-data-flow-counts-zero") => NoDataFlow::CountsZero,
        Some(other) => return Err(format!("unknown argument {other}").into()),
    };
    let mut out = stdout().lock();
    for line in stdin().lock().lines() {
        let pair: Pair = serde_json::from_str(&line?)?;
        let language = Language::named(&pair.lang).ok_or_else(|| format!("no language {}", pair.lang))?;
        let s = score(language, &pair.reference, &pair.prediction, no_data_flow);
        let parses = parses(language, &pair.prediction);
        let score = json!({"ngram": s.ngram, "weighted": s.weighted_ngram, "syntax": s.syntax, "dataflow": s.data_flow,
            "codebleu": s.codebleu, "parses": parses});
        writeln!(out, "{score}")?;
    }
    Ok(())
}
