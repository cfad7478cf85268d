//! The keys `tokenizer` and `tokenizer_source` of a recipe, read and written, and its
//! `chat_template`, which can be one of the templates that mergekit has by name.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::Value;

use super::node::{Fields, Node};
use super::sources::folder;
use crate::request::{ChatTemplate, TokenRow, TokenRule, TokenizerRequest, TokenizerSource};

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

/// Reads the chat template of the output: one of [`TEMPLATES`], or Jinja.
///
/// # Errors
/// [`cpift_core::BadInput`] that names the key.
pub(super) fn chat_template(node: &Node<'_>) -> Result<ChatTemplate> {
    let text = node.text()?;
    if text == "auto" {
        return Ok(ChatTemplate::Auto);
    }
    if let Some(known) = template(text) {
        return Ok(ChatTemplate::Text(known.to_owned()));
    }
    if text.len() < 20 || !text.contains('{') {
        let expected = format!("auto, {}, or a Jinja template", TEMPLATES.join(", "));
        return Err(node.error("is not a chat template").expected(expected).found(node.shown()).into());
    }
    Ok(ChatTemplate::Text(text.to_owned()))
}

/// Chat templates that a recipe can name, as in mergekit.
const TEMPLATES: [&str; 5] = ["alpaca", "chatml", "exaone", "llama3", "mistral"];

/// The chat template `name`.
fn template(name: &str) -> Option<&'static str> {
    Some(match name {
        "alpaca" => ALPACA,
        "chatml" => CHATML,
        "exaone" => EXAONE,
        "llama3" => LLAMA3,
        "mistral" => MISTRAL,
        _ => return None,
    })
}

const ALPACA: &str = "{% for message in messages %}\
{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}\
{% elif message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n\n' }}\
{% elif message['role'] == 'assistant' %}{{ '### Response:\n' + message['content'] + eos_token + '\n\n' }}\
{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}";

const CHATML: &str = "{% for message in messages %}\
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

const EXAONE: &str = "{% for message in messages %}\
{% if loop.first and message['role'] != 'system' %}{{ '[|system|][|endofturn|]\n' }}{% endif %}\
{{ '[|' + message['role'] + '|]' + message['content'] }}\
{% if message['role'] == 'user' %}{{ '\n' }}{% else %}{{ '[|endofturn|]\n' }}{% endif %}\
{% endfor %}{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}";

const LLAMA3: &str = "{% for message in messages %}\
{% if loop.first %}{{ bos_token }}{% endif %}\
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}";

const MISTRAL: &str = "{{ bos_token }}{% for message in messages %}\
{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}\
{% else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}{% endfor %}";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_has_a_template_and_braces_are_closed() {
        for name in TEMPLATES {
            let text = template(name).unwrap();
            for (open, close) in [("{%", "%}"), ("{{", "}}")] {
                assert_eq!(text.matches(open).count(), text.matches(close).count(), "{name}");
            }
        }
        assert!(template("other").is_none());
    }
}
