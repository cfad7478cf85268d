//! Recipes in mergekit's YAML: parsed, written, and refused.

mod reading;
mod refusals;

use std::path::Path;

use cpift_core::BadInput;
use cpift_merge::Request;
use cpift_merge::recipe::parse;

#[track_caller]
fn parsed(text: &str) -> Request {
    parse(text, Path::new("r.yml")).unwrap_or_else(|e| panic!("{e:#}\n{text}"))
}

fn paths(request: &Request) -> Vec<&str> {
    request.models.iter().map(|model| model.path.to_str().unwrap()).collect()
}

/// A typical TIES recipe, with `more` lines.
fn ties(more: &str) -> String {
    format!(
        "models:
  - model: base
  - model: org/math
    parameters: {{density: [1, 0.7, 0.1], weight: 1.0}}
  - model: code
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: base
{more}"
    )
}

/// A linear recipe of `a` and `b`, with `more` lines.
fn linear(more: &str) -> String {
    format!("merge_method: linear\nparameters: {{weight: 1}}\nmodels: [{{model: a}}, {{model: b}}]\n{more}")
}

const SLERP: &str = "
slices:
  - sources:
      - {model: a, layer_range: [0, 32]}
      - {model: b, layer_range: [0, 32]}
merge_method: slerp
base_model: a
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # all others
dtype: float16
";

/// Asserts that `text` is bad input and that the message contains all `parts`.
#[track_caller]
fn refused(text: &str, parts: &[&str]) {
    let error = parse(text, Path::new("r.yml")).expect_err(text);
    assert!(error.downcast_ref::<BadInput>().is_some(), "{error:?}");
    let message = error.to_string();
    for part in [&["r.yml"], parts].concat() {
        assert!(message.contains(part), "{part:?} is not in:\n{message}");
    }
}
