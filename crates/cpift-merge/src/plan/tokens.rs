//! Tokens of the inputs: a merge mixes rows of the embeddings, so that equal ids must mean equal tokens.

use std::collections::BTreeMap;
use std::path::Path;

use cpift_core::format::json;
use serde_json::Value;

/// Warns where two folders have different tokens at the same id, naming the first.
pub fn warn_of_differences(first: &Path, other: &Path) {
    let (Some(ours), Some(theirs)) = (tokens(first), tokens(other)) else { return };
    let ids = ours.keys().chain(theirs.keys().filter(|id| !ours.contains_key(id)));
    let mut different: Vec<u64> = ids.filter(|id| ours.get(id) != theirs.get(id)).copied().collect();
    different.sort_unstable();
    let Some(id) = different.first() else { return };
    let shown = |tokens: &BTreeMap<u64, String>| tokens.get(id).map_or("no token".to_owned(), |t| format!("{t:?}"));
    log::warn!(
        "{}: {} ids stand for other tokens than in {}: id {id} is {}, and {} there; their rows of the embeddings are merged all the same",
        other.display(),
        different.len(),
        first.display(),
        shown(&theirs),
        shown(&ours)
    );
}

/// Tokens by id: those of tokenizer.json, then what tokenizer_config.json adds. None where there is no tokenizer that can be read.
fn tokens(folder: &Path) -> Option<BTreeMap<u64, String>> {
    let file: Value = json::read(&folder.join("tokenizer.json")).ok()?;
    let mut tokens = BTreeMap::new();
    match file.pointer("/model/vocab")? {
        Value::Object(vocab) => {
            tokens.extend(vocab.iter().filter_map(|(token, id)| Some((id.as_u64()?, token.clone()))));
        }
        // A unigram model has a list of tokens and scores.
        Value::Array(vocab) => {
            let token = |entry: &Value| Some(entry.get(0)?.as_str()?.to_owned());
            tokens.extend((0..).zip(vocab).filter_map(|(id, entry)| Some((id, token(entry)?))));
        }
        _ => return None,
    }
    for token in file.get("added_tokens").and_then(Value::as_array).into_iter().flatten() {
        if let (Some(id), Some(content)) =
            (token.get("id").and_then(Value::as_u64), token.get("content").and_then(Value::as_str))
        {
            tokens.insert(id, content.to_owned());
        }
    }
    let config: Option<Value> = json::read(&folder.join("tokenizer_config.json")).ok();
    let decoder = config.as_ref().and_then(|config| config.get("added_tokens_decoder")?.as_object());
    for (id, token) in decoder.into_iter().flatten() {
        if let (Ok(id), Some(content)) = (id.parse(), token.get("content").and_then(Value::as_str)) {
            tokens.insert(id, content.to_owned());
        }
    }
    Some(tokens)
}
