//! Extraction and exact match of GSM8K answers against lm-evaluation-harness:
//! fixtures/golden/gsm8k_filters.json, made by scripts/oracle/golden_gsm8k.py. CPIFT_GSM8K_CASES
//! can name another file of the same format.

use std::path::PathBuf;

use cpift_eval::{flexible_extract, normalise, strict_match};
use serde_json::Value;

#[test]
fn answers_are_extracted_and_compared_as_the_harness_does() {
    let own = || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/golden/gsm8k_filters.json"));
    let file = std::env::var_os("CPIFT_GSM8K_CASES").map_or_else(own, PathBuf::from);
    let cases: Vec<Value> = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    assert!(!cases.is_empty());
    for case in cases {
        let text = |key: &str| case[key].as_str().unwrap();
        let (strict, flexible) = (strict_match(text("resp")), flexible_extract(text("resp")));
        assert_eq!((strict, flexible), (text("strict"), text("flex")), "{case}");
        for (extracted, key) in [(strict, "strict_em"), (flexible, "flex_em")] {
            let same = normalise(extracted) == normalise(text("gold"));
            assert_eq!(f64::from(u8::from(same)), case[key].as_f64().unwrap(), "{key} of {case}");
        }
    }
}
