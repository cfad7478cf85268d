//! The tokenizer of a checkpoint folder with its chat template and special tokens.

use std::fs;
use std::ops::Range;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use cpift_core::{BadInput, json};
use serde_json::Value;
use tokenizers::Tokenizer;

use crate::rows::Message;
use crate::template::{ChatTemplate, SpecialTokens};

/// ChatML, for bases without a chat template (`template = "chatml"`).
const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + \
                      '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' \
                      }}{% endif %}";

/// A run of bytes of a text.
pub type Span = Range<usize>;

/// A checkpoint's tokenizer, chat template and special tokens.
pub struct ChatText {
    tokenizer: Tokenizer,
    template: ChatTemplate,
    /// Whether the template came from tasks.toml rather than the checkpoint.
    added_template: bool,
    special: SpecialTokens,
    /// Ids that end a turn, from generation_config.json, config.json and the tokenizer.
    pub eos_ids: Vec<i64>,
    /// The id that fills batches.
    pub pad_id: i64,
    folder: PathBuf,
}

impl ChatText {
    /// Loads the tokenizer of `folder`. A base without a chat template takes the one named `fallback`: `chatml`, or a path to a
    /// Jinja file.
    ///
    /// # Errors
    /// [`BadInput`] when tokenizer.json is missing or cannot be read, no template is to be had, or it does not parse.
    pub fn open(folder: &Path, fallback: Option<&str>) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        if !path.is_file() {
            return Err(BadInput::new(&path, "no such file")
                .expected("a tokenizer in Hugging Face's tokenizer.json form")
                .hint("save it with AutoTokenizer.from_pretrained(dir).save_pretrained(dir)")
                .into());
        }
        let mut tokenizer = read_tokenizer(&path)?;
        // As in transformers, truncation and padding left in the file by an earlier training run do not count.
        tokenizer.with_truncation(None).map_err(|e| BadInput::new(&path, format!("cannot be used: {e}")))?;
        tokenizer.with_padding(None);
        let config_path = folder.join("tokenizer_config.json");
        let config: Value = if config_path.is_file() { json::read(&config_path)? } else { Value::Null };
        let special = special_tokens(folder, &config)?;
        let own = own_template(folder, &config)?;
        let added_template = own.is_none();
        let (source, origin) = match own {
            Some(found) => found,
            None => fallback_template(folder, fallback)?,
        };
        let template = ChatTemplate::new(&source)
            .map_err(|e| BadInput::new(&origin, format!("the chat template does not parse: {e}")))?;
        let mut text = Self {
            tokenizer,
            template,
            added_template,
            special,
            eos_ids: Vec::new(),
            pad_id: 0,
            folder: folder.to_owned(),
        };
        text.eos_ids = text.find_eos()?;
        text.pad_id = text.special_id("pad_token").or(text.eos_ids.first().copied()).unwrap_or(0);
        Ok(text)
    }

    fn find_eos(&self) -> Result<Vec<i64>> {
        let mut ids: Vec<i64> = self.special_id("eos_token").into_iter().collect();
        for name in ["generation_config.json", "config.json"] {
            let path = self.folder.join(name);
            if !path.is_file() {
                continue;
            }
            let config: Value = json::read(&path)?;
            match config.get("eos_token_id") {
                Some(Value::Array(list)) => ids.extend(list.iter().filter_map(Value::as_i64)),
                Some(value) => ids.extend(value.as_i64()),
                None => {}
            }
        }
        let vocabulary = self.vocab_size() as i64;
        ids.retain(|id| (0..vocabulary).contains(id));
        ids.sort_unstable();
        ids.dedup();
        Ok(ids)
    }

    fn special_id(&self, key: &str) -> Option<i64> {
        self.special.get(key).and_then(|t| self.tokenizer.token_to_id(t)).map(i64::from)
    }

    /// Largest token id plus one.
    pub fn vocab_size(&self) -> usize {
        self.tokenizer.get_vocab(true).values().max().map_or(0, |id| *id as usize + 1)
    }

    /// Token ids of `text`, nothing added.
    ///
    /// # Errors
    /// What the tokenizer reports.
    pub fn encode(&self, text: &str) -> Result<Vec<i64>> {
        Ok(self.encode_offsets(text)?.0)
    }

    /// Token ids of `text` with what the tokenizer puts around a text by itself, such as LLaMA-2's BOS.
    ///
    /// # Errors
    /// What the tokenizer reports.
    pub fn encode_with_special(&self, text: &str) -> Result<Vec<i64>> {
        let encoding = self.tokenizer.encode(text, true).map_err(|e| anyhow!("tokenizing: {e}"))?;
        Ok(encoding.get_ids().iter().map(|&id| i64::from(id)).collect())
    }

    /// Token ids and the bytes of `text` each one stands for.
    ///
    /// # Errors
    /// What the tokenizer reports.
    pub fn encode_offsets(&self, text: &str) -> Result<(Vec<i64>, Vec<Span>)> {
        let encoding = self.tokenizer.encode(text, false).map_err(|e| anyhow!("tokenizing: {e}"))?;
        let spans = encoding.get_offsets().iter().map(|&(start, end)| start..end).collect();
        Ok((encoding.get_ids().iter().map(|&id| i64::from(id)).collect(), spans))
    }

    /// The tokens called `ids`, as the vocabulary spells them (`Ġthe`, `▁the`); an id that it lacks is empty.
    pub fn tokens(&self, ids: &[i64]) -> Vec<String> {
        ids.iter().map(|&id| self.tokenizer.id_to_token(id as u32).unwrap_or_default()).collect()
    }

    /// The text of `ids`, special tokens left out.
    ///
    /// # Errors
    /// What the tokenizer reports.
    pub fn decode(&self, ids: &[i64]) -> Result<String> {
        let ids: Vec<u32> = ids.iter().map(|&id| id as u32).collect();
        self.tokenizer.decode(&ids, true).map_err(|e| anyhow!("decoding: {e}"))
    }

    /// Renders `messages` by the chat template.
    ///
    /// # Errors
    /// What the template raised.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        self.template.render(messages, &self.special, add_generation_prompt)
    }

    /// Renders a conversation and finds the bytes that each assistant turn wrote: what rendering one turn more adds to the
    /// rendering so far with the generation prompt.
    ///
    /// # Errors
    /// When the template raises, or rewrites earlier turns so that spans cannot be told.
    pub fn render_with_spans(&self, messages: &[Message]) -> Result<(String, Vec<Span>)> {
        let whole = self.render(messages, false)?;
        let mut spans = Vec::new();
        for (i, message) in messages.iter().enumerate() {
            if message.role != "assistant" {
                continue;
            }
            let before = self.render(&messages[..i], true)?;
            let after = if i + 1 == messages.len() { whole.clone() } else { self.render(&messages[..=i], false)? };
            if !after.starts_with(&before) || !whole.starts_with(&after) {
                return Err(anyhow!(
                    "the chat template rewrites earlier turns, so the assistant's text cannot be told from the prompt"
                ));
            }
            spans.push(before.len()..after.len());
        }
        Ok((whole, spans))
    }

    /// Copies tokenizer and template files into a staged folder; a template that the checkpoint lacked is written too.
    ///
    /// # Errors
    /// I/O errors.
    pub fn save(&self, staged: &Path) -> Result<()> {
        cpift_core::checkpoint::copy_sidecars(&self.folder, staged)?;
        if self.added_template {
            let path = staged.join("chat_template.jinja");
            fs::write(&path, self.template.source()).with_context(|| format!("writing {}", path.display()))?;
        }
        Ok(())
    }
}

/// Parses tokenizer.json.
fn read_tokenizer(path: &Path) -> Result<Tokenizer> {
    // Says where the text is no JSON, and bounds its length and depth.
    json::read::<serde::de::IgnoredAny>(path)?;
    // On some damaged files the library panics where it could return an error.
    let read = catch_unwind(|| Tokenizer::from_file(path));
    let read = read.unwrap_or_else(|_| Err("its parts contradict one another".into()));
    read.map_err(|e| BadInput::new(path, format!("cannot be read: {e}")).into())
}

/// `bos_token` and the like; each a string or an object with `content`.
fn special_tokens(folder: &Path, config: &Value) -> Result<SpecialTokens> {
    let map_path = folder.join("special_tokens_map.json");
    let map: Value = if map_path.is_file() { json::read(&map_path)? } else { Value::Null };
    let mut tokens = SpecialTokens::new();
    for key in ["bos_token", "eos_token", "unk_token", "pad_token"] {
        let value = config.get(key).filter(|v| !v.is_null()).or_else(|| map.get(key));
        let text = value.and_then(|v| v.as_str().or_else(|| v.get("content").and_then(Value::as_str)));
        tokens.extend(text.map(|t| (key.to_owned(), t.to_owned())));
    }
    Ok(tokens)
}

/// chat_template.jinja, or `chat_template` of tokenizer_config.json: a string, or a list with one named `default`.
fn own_template(folder: &Path, config: &Value) -> Result<Option<(String, PathBuf)>> {
    let file = folder.join("chat_template.jinja");
    if file.is_file() {
        return Ok(Some((cpift_core::files::read_text(&file)?, file)));
    }
    let found = match config.get("chat_template") {
        Some(Value::String(text)) => Some(text.as_str()),
        Some(Value::Array(list)) => list
            .iter()
            .find(|entry| entry.get("name").and_then(Value::as_str) == Some("default"))
            .and_then(|entry| entry.get("template"))
            .and_then(Value::as_str),
        _ => None,
    };
    Ok(found.map(|text| (text.to_owned(), folder.join("tokenizer_config.json"))))
}

fn fallback_template(folder: &Path, name: Option<&str>) -> Result<(String, PathBuf)> {
    match name {
        Some("chatml") => Ok((CHATML.to_owned(), PathBuf::from("chatml"))),
        Some(path) => Ok((cpift_core::files::read_text(Path::new(path))?, PathBuf::from(path))),
        None => Err(BadInput::new(folder, "the checkpoint has no chat template")
            .expected("chat_template.jinja, or chat_template in tokenizer_config.json")
            .hint("name one in tasks.toml: template = \"chatml\", or a path to a Jinja file")
            .into()),
    }
}
