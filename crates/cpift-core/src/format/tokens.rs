//! Tokens of a tokenizer.json, and the matrices with one row per token.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use anyhow::Result;
use serde_json::Value;

use super::checkpoint::Checkpoint;
use super::json;
use crate::error::BadInput;

/// Parts of the names of matrices with one row per token.
const EMBEDDINGS: [&str; 5] = ["embed_tokens", "lm_head", "word_embeddings", ".wte.", "shared.weight"];

/// Tokens of one model.
pub struct Tokens {
    /// Ids by token.
    pub ids: HashMap<String, usize>,
    /// Description of the tokens that are added to the model's own, as in tokenizer.json.
    pub added: BTreeMap<String, Value>,
}

impl Tokens {
    /// The tokens in the tokenizer.json of `folder` with an id below `rows`, if it has one.
    ///
    /// # Errors
    /// [`BadInput`] for a file without a vocabulary, or with two tokens of one id.
    pub fn read(folder: &Path, rows: Option<usize>) -> Result<Option<Self>> {
        let path = folder.join("tokenizer.json");
        if !path.is_file() {
            return Ok(None);
        }
        let file: Value = json::read(&path)?;
        let mut ids: HashMap<String, usize> = HashMap::new();
        match file.pointer("/model/vocab") {
            Some(Value::Object(vocab)) => {
                let id = |(token, id): (&String, &Value)| Some((token.clone(), usize::try_from(id.as_u64()?).ok()?));
                ids.extend(vocab.iter().filter_map(id));
            }
            // A unigram model lists its tokens with their scores.
            Some(Value::Array(vocab)) => {
                let token = |(id, entry): (usize, &Value)| Some((entry.get(0)?.as_str()?.to_owned(), id));
                ids.extend(vocab.iter().enumerate().filter_map(token));
            }
            _ => {
                return Err(BadInput::new(&path, "has no vocabulary of tokens and ids")
                    .expected("model.vocab of a BPE, WordPiece, WordLevel or Unigram model")
                    .into());
            }
        }
        let mut added = BTreeMap::new();
        for token in file.get("added_tokens").and_then(Value::as_array).into_iter().flatten() {
            if let (Some(id), Some(content)) =
                (token.get("id").and_then(Value::as_u64), token.get("content").and_then(Value::as_str))
            {
                let Ok(id) = usize::try_from(id) else { continue };
                ids.insert(content.to_owned(), id);
                added.insert(content.to_owned(), token.clone());
            }
        }
        let before = ids.len();
        ids.retain(|_, id| rows.is_none_or(|rows| *id < rows));
        if ids.len() < before {
            log::warn!(
                "{}: {} tokens have no row in the embeddings and count as absent",
                path.display(),
                before - ids.len()
            );
        }
        if let Some(id) = repeated(&ids) {
            return Err(BadInput::new(&path, "two tokens have the same id").found(id.to_string()).into());
        }
        Ok(Some(Self { ids, added }))
    }

    /// Tokens in the order of their ids.
    pub fn in_order(&self) -> Vec<&str> {
        let mut tokens: Vec<(usize, &str)> = self.ids.iter().map(|(token, id)| (*id, token.as_str())).collect();
        tokens.sort_unstable();
        tokens.into_iter().map(|(_, token)| token).collect()
    }
}

/// The smallest id that two tokens have.
fn repeated(ids: &HashMap<String, usize>) -> Option<usize> {
    let mut seen = BTreeSet::new();
    ids.values().filter(|id| !seen.insert(**id)).min().copied()
}

/// Names of the matrices of `checkpoint` with one row per token.
pub fn embeddings(checkpoint: &Checkpoint) -> Vec<String> {
    let is_one = |name: &str| EMBEDDINGS.iter().any(|part| name.contains(part)) && !name.ends_with("bias");
    let views = checkpoint.parameters().filter(|view| view.shape.len() == 2 && is_one(view.name));
    views.map(|view| view.name.to_owned()).collect()
}
