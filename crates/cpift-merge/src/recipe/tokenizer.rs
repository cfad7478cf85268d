//! The keys `tokenizer` and `tokenizer_source` of a recipe, read and written.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::Value;

use super::node::{Fields, Node};
use super::sources::folder;
use crate::request::{TokenRow, TokenRule, TokenizerRequest, TokenizerSource};

/// Reads the tokenizer of the output, if the recipe names one.
///
/// # Errors
/// [`cpift_core::BadInput`] that names the key.
pub(super) fn read(fields: &Fields<'_>, base: Option<&str>) -> Result<Option<TokenizerRequest>> {
    match (fields.get("tokenizer_source"), fields.get("tokenizer")) {
        (Some(_), Some(node)) => Err(node.error("cannot be given together with tokenizer_source").into()),
        (None, None) => Ok(None),
        (Some(node), None) => Ok(Some(TokenizerRequest::new(source(&node, base)?))),
        (None, Some(node)) => block(&node, base).map(Some),
    }
}

fn block(node: &Node<'_>, base: Option<&str>) -> Result<TokenizerRequest> {
    let fields = node.fields(&["source", "tokens", "pad_to_multiple_of"], |_| None)?;
    let source = fields.get("source").map_or(Ok(TokenizerSource::Union), |node| source(&node, base))?;
    let mut request = TokenizerRequest::new(source);
    if let Some(node) = fields.get("pad_to_multiple_of") {
        let multiple = node.count()?;
        if multiple == 0 || multiple > 1 << 20 {
            return Err(node.error("is out of range").expected("1 to 1048576").found(multiple.to_string()).into());
        }
        request.pad_to_multiple_of = Some(multiple);
    }
    for (token, node) in fields.get("tokens").map(|node| node.children()).transpose()?.into_iter().flatten() {
        request.tokens.insert(token, rule(&node)?);
    }
    Ok(request)
}

fn source(node: &Node<'_>, base: Option<&str>) -> Result<TokenizerSource> {
    match (folder(node)?.as_str(), base) {
        ("union", _) => Ok(TokenizerSource::Union),
        ("base", None) => Err(node.error("there is no base_model").found("base").into()),
        ("base", _) => Ok(TokenizerSource::Base),
        (path, _) => Ok(TokenizerSource::Path(PathBuf::from(path))),
    }
}

fn rule(node: &Node<'_>) -> Result<TokenRule> {
    let fields = node.fields(&["source", "force"], |_| None)?;
    let force = fields.get("force").map_or(Ok(false), |node| node.flag())?;
    let source = fields.get("source").map(|node| row(&node)).transpose()?;
    Ok(TokenRule { source, force })
}

fn row(node: &Node<'_>) -> Result<TokenRow> {
    if !node.is_mapping() {
        return Ok(TokenRow::Model(PathBuf::from(node.text()?)));
    }
    let fields = node.fields(&["kind", "model", "token", "token_id"], |_| None)?;
    let kind = fields.require("kind")?;
    match kind.text()? {
        "zero" => Ok(TokenRow::Zero),
        "model_token" => {
            let path = PathBuf::from(fields.require("model")?.text()?);
            match (fields.get("token"), fields.get("token_id")) {
                (Some(token), None) => Ok(TokenRow::Token(path, token.text()?.to_owned())),
                (None, Some(id)) => Ok(TokenRow::Id(path, id.count()?)),
                _ => Err(node.error("needs one of token and token_id").found(node.shown()).into()),
            }
        }
        _ => Err(kind.error("is not a known kind").expected("zero, model_token").found(kind.shown()).into()),
    }
}

/// The block `tokenizer` of a recipe.
pub(super) fn write(request: &TokenizerRequest) -> String {
    let quoted = |text: &str| Value::from(text).to_string();
    let path = |path: &Path| quoted(&path.to_string_lossy());
    let source = match &request.source {
        TokenizerSource::Base => "base".to_owned(),
        TokenizerSource::Union => "union".to_owned(),
        TokenizerSource::Path(folder) => path(folder),
    };
    let mut text = format!("tokenizer:\n  source: {source}\n");
    if let Some(multiple) = request.pad_to_multiple_of {
        let _ = writeln!(text, "  pad_to_multiple_of: {multiple}");
    }
    let rules: &BTreeMap<String, TokenRule> = &request.tokens;
    if !rules.is_empty() {
        text += "  tokens:\n";
    }
    for (token, rule) in rules {
        let row = rule.source.as_ref().map(|row| match row {
            TokenRow::Zero => "{kind: zero}".to_owned(),
            TokenRow::Model(model) => path(model),
            TokenRow::Token(model, other) => {
                format!("{{kind: model_token, model: {}, token: {}}}", path(model), quoted(other))
            }
            TokenRow::Id(model, id) => format!("{{kind: model_token, model: {}, token_id: {id}}}", path(model)),
        });
        let _ = writeln!(text, "    {}:\n      force: {}", quoted(token), rule.force);
        if let Some(row) = row {
            let _ = writeln!(text, "      source: {row}");
        }
    }
    text
}
