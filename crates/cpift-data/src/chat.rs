//! The text side of a checkpoint: its tokenizer, chat template and special tokens.

use std::collections::BTreeSet;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use cpift_core::format::json;
use cpift_core::{BadInput, log_once};
use serde_json::{Map, Value, json};
use tokenizers::Tokenizer;

use crate::conversation::Message;
use crate::template::{ChatTemplate, SpecialTokens, TemplateArgs};
use crate::tokenizer::FolderTokenizer;

const GENERATION_CONFIG: &str = "generation_config.json";

/// ChatML, for bases without a chat template (`template = "chatml"`).
const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + \
                      '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' \
                      }}{% endif %}";

/// A byte range of a text.
pub type Span = Range<usize>;

/// A checkpoint's tokenizer, chat template and special tokens.
pub struct ChatText {
    tokenizer: Tokenizer,
    template: ChatTemplate,
    /// True if the template came from tasks.toml rather than the checkpoint.
    added_template: bool,
    special: SpecialTokens,
    special_ids: BTreeSet<i64>,
    /// Every EOS of generation_config.json, config.json and the tokenizer.
    pub eos_ids: Vec<i64>,
    /// Special token that the template writes after an answer, even if no file names it as EOS.
    pub end_of_turn: Option<i64>,
    /// End of a prompt.
    pub generation_prompt: GenerationPrompt,
    /// Rows of the model's embedding, if known.
    embedding_rows: Option<i64>,
    /// Id for padding batches.
    pub pad_id: i64,
    folder: PathBuf,
}

impl ChatText {
    /// Loads the tokenizer of `folder`. The template `named` (`chatml`, or the path of a Jinja
    /// file) takes precedence over the checkpoint's own.
    ///
    /// # Errors
    /// [`BadInput`] if tokenizer.json is missing or cannot be read, or a template is missing or
    /// does not parse.
    pub fn open(folder: &Path, named: Option<&str>) -> Result<Self> {
        let FolderTokenizer { tokenizer, special, config, end_ids, .. } = FolderTokenizer::open(folder)?;
        let (source, origin) = match named {
            Some(name) => named_template(name)?,
            None => own_template(folder, &config)?,
        };
        let template = ChatTemplate::new(&source)
            .map_err(|e| BadInput::new(&origin, format!("the chat template does not parse: {e}")))?;
        let mut text = Self {
            tokenizer,
            template,
            added_template: named.is_some(),
            special,
            special_ids: BTreeSet::new(),
            eos_ids: end_ids,
            end_of_turn: None,
            generation_prompt: GenerationPrompt::Template(String::new()),
            embedding_rows: None,
            pad_id: 0,
            folder: folder.to_owned(),
        };
        text.special_ids = text
            .tokenizer
            .get_added_tokens_decoder()
            .into_iter()
            .filter(|(_, token)| token.special)
            .map(|(id, _)| i64::from(id))
            .collect();
        text.pad_id = text.special_id("pad_token").or(text.eos_ids.first().copied()).unwrap_or(0);
        text.probe_template();
        if text.eos_ids.is_empty() {
            let stop = match text.end_of_turn {
                Some(end) => format!("generation stops at the chat template's {} only", text.tokens(&[end])[0]),
                None => "generation stops at its maximum length only".to_owned(),
            };
            log_once::warn(format!(
                "{}: no EOS in tokenizer_config.json, generation_config.json or config.json: {stop}",
                folder.display()
            ));
        }
        Ok(text)
    }

    fn special_id(&self, key: &str) -> Option<i64> {
        self.special.get(key).and_then(|t| self.tokenizer.token_to_id(t)).map(i64::from)
    }

    /// Largest token id plus one.
    pub fn vocab_size(&self) -> usize {
        self.tokenizer.get_vocab(true).values().max().map_or(0, |id| *id as usize + 1)
    }

    /// Token ids of `text`, without added tokens.
    ///
    /// # Errors
    /// A token beyond the model's embedding.
    pub fn encode(&self, text: &str) -> Result<Vec<i64>> {
        Ok(self.encode_offsets(text)?.0)
    }

    /// Token ids of `text` with the tokens that the tokenizer adds, such as LLaMA-2's BOS.
    ///
    /// # Errors
    /// As [`ChatText::encode`].
    pub fn encode_with_special(&self, text: &str) -> Result<Vec<i64>> {
        let encoding = self.tokenizer.encode(text, true).map_err(|e| anyhow!("tokenizing: {e}"))?;
        let ids: Vec<i64> = encoding.get_ids().iter().map(|&id| i64::from(id)).collect();
        self.check_embedded(&ids).map(|()| ids)
    }

    /// Token ids and the bytes of `text` that each stands for.
    ///
    /// # Errors
    /// As [`ChatText::encode`].
    pub fn encode_offsets(&self, text: &str) -> Result<(Vec<i64>, Vec<Span>)> {
        let encoding = self.tokenizer.encode(text, false).map_err(|e| anyhow!("tokenizing: {e}"))?;
        let spans = encoding.get_offsets().iter().map(|&(start, end)| start..end).collect();
        let ids: Vec<i64> = encoding.get_ids().iter().map(|&id| i64::from(id)).collect();
        self.check_embedded(&ids).map(|()| (ids, spans))
    }

    /// Spelling of `ids` in the vocabulary (`Ġthe`, `▁the`); empty for an unknown id.
    pub fn tokens(&self, ids: &[i64]) -> Vec<String> {
        ids.iter().map(|&id| self.tokenizer.id_to_token(id as u32).unwrap_or_default()).collect()
    }

    /// Text of `ids` without special tokens.
    ///
    /// # Errors
    /// An error of the tokenizer's decoder.
    pub fn decode(&self, ids: &[i64]) -> Result<String> {
        let ids: Vec<u32> = ids.iter().map(|&id| id as u32).collect();
        self.tokenizer.decode(&ids, true).map_err(|e| anyhow!("decoding: {e}"))
    }

    /// Combines this text with a task's template arguments.
    pub fn with<'a>(&'a self, args: &'a TemplateArgs) -> Chat<'a> {
        Chat { text: self, args }
    }

    /// Ids that end a generated answer: every EOS of the files, and the template's end of turn.
    pub fn stop_ids(&self) -> Vec<i64> {
        let mut ids = self.eos_ids.clone();
        ids.extend(self.end_of_turn.filter(|id| !ids.contains(id)));
        ids
    }

    /// Returns an error for token ids without a row in the model's embedding.
    fn check_embedded(&self, ids: &[i64]) -> Result<()> {
        let Some(rows) = self.embedding_rows else { return Ok(()) };
        match ids.iter().find(|id| **id >= rows) {
            None => Ok(()),
            Some(&id) => bail!(
                "the token {:?} has id {id}, but the model's embedding has {rows} rows",
                self.tokenizer.id_to_token(id as u32).unwrap_or_default()
            ),
        }
    }

    /// Sets the number of rows of the model's embedding; encoding a token beyond them is an error.
    #[must_use]
    pub fn with_embedding_rows(mut self, rows: i64) -> Self {
        self.embedding_rows = Some(rows);
        self.eos_ids.retain(|id| *id < rows);
        self.end_of_turn = self.end_of_turn.filter(|id| *id < rows);
        self
    }

    /// True if `{% generation %}` blocks of the template define the targets.
    pub(crate) fn marks_answers(&self) -> bool {
        self.template.marks_answers
    }

    /// Text before an answer at the end of a prompt.
    pub(crate) fn header(&self) -> &str {
        match &self.generation_prompt {
            GenerationPrompt::Template(header) | GenerationPrompt::Missing(Some(header)) => header,
            GenerationPrompt::Missing(None) => "",
        }
    }

    /// True for tokens that the tokenizer declares special, and for every EOS.
    pub(crate) fn is_special(&self, id: i64) -> bool {
        self.special_ids.contains(&id) || self.eos_ids.contains(&id)
    }

    /// Renders a short conversation to find how the template begins and ends an answer. Warns if
    /// training or generation would lack one.
    fn probe_template(&mut self) {
        let none = TemplateArgs::new();
        let turn = |role: &str, content: &str| Message::new(role, content);
        let question = [vec![turn("user", "1 + 1?")], vec![turn("system", "Add."), turn("user", "1 + 1?")]];
        // Some templates refuse a system turn, others require one.
        let found = question.iter().find_map(|question| {
            let chat = self.with(&none);
            let plain = chat.render(question, false).ok()?;
            let prompt = chat.render(question, true).ok()?;
            let answered = [question.as_slice(), &[turn("assistant", "2")]].concat();
            let tokens = chat.tokenise(&answered).ok()?;
            let end = tokens.end.map(|i| tokens.ids[i]);
            let start = tokens.answers.last()?.clone()?.start;
            let inferred = tokens.text[..start].strip_prefix(plain.as_str()).map(|header| header.trim_end_matches(' '));
            let header = match prompt.strip_prefix(plain.as_str()) {
                Some("") => GenerationPrompt::Missing(inferred.map(str::to_owned)),
                Some(header) => GenerationPrompt::Template(header.to_owned()),
                None => GenerationPrompt::Template(String::new()),
            };
            Some((end, header))
        });
        let Some((end, header)) = found else { return };
        self.end_of_turn = end;
        self.generation_prompt = match header {
            // White space before an answer belongs to the answer's first token, as in Mistral's
            // templates.
            GenerationPrompt::Missing(Some(header)) if header.trim().is_empty() => {
                GenerationPrompt::Template(String::new())
            }
            other => other,
        };
        let at = self.folder.display();
        match &self.generation_prompt {
            GenerationPrompt::Template(_) => {}
            GenerationPrompt::Missing(Some(header)) => log_once::warn(format!(
                "{at}: the chat template has no generation prompt; prompts end with {header:?}, which it writes before an answer"
            )),
            GenerationPrompt::Missing(None) => log_once::warn(format!(
                "{at}: the chat template has no generation prompt, and the header of an answer could not be inferred; prompts \
                 end with the user's turn"
            )),
        }
    }

    /// Copies tokenizer and template files into a staged folder, with a template that tasks.toml
    /// names. Adds the template's end of turn to the EOS ids of generation_config.json.
    pub fn save(&self, staged: &Path) -> Result<()> {
        cpift_core::format::checkpoint::copy_sidecars(&self.folder, staged)?;
        if self.added_template {
            let path = staged.join("chat_template.jinja");
            fs::write(&path, self.template.source()).with_context(|| format!("writing {}", path.display()))?;
        }
        self.save_end_of_turn(staged)
    }

    fn save_end_of_turn(&self, staged: &Path) -> Result<()> {
        let Some(end) = self.end_of_turn else { return Ok(()) };
        let config = read_object(&self.folder.join("config.json"))?;
        let path = self.folder.join(GENERATION_CONFIG);
        let mut generation = read_object(&path)?;
        if !path.is_file() {
            // Without this file transformers takes these ids from config.json.
            let ids = ["bos_token_id", "eos_token_id", "pad_token_id"];
            generation.extend(ids.iter().filter_map(|key| Some(((*key).to_owned(), config.get(*key)?.clone()))));
        }
        let mut stops: Vec<i64> = generation.get("eos_token_id").map(ids_of).unwrap_or_default();
        if stops.contains(&end) {
            return Ok(());
        }
        stops.push(end);
        generation.insert("eos_token_id".into(), json!(stops));
        let path = staged.join(GENERATION_CONFIG);
        fs::write(&path, json::to_text(&generation)?).with_context(|| format!("writing {}", path.display()))
    }
}

/// End of a prompt, after which the model answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GenerationPrompt {
    /// Text that the template adds for `add_generation_prompt`; empty if an answer follows the
    /// user's turn directly.
    Template(String),
    /// The template adds none; holds the header that it writes before an answer, if it could be
    /// inferred.
    Missing(Option<String>),
}

/// A checkpoint's text with the template arguments of a task.
#[derive(Clone, Copy)]
pub struct Chat<'a> {
    pub(crate) text: &'a ChatText,
    pub(crate) args: &'a TemplateArgs,
}

impl<'a> Chat<'a> {
    /// Tokenizer and template.
    pub fn text(&self) -> &'a ChatText {
        self.text
    }

    /// Renders `messages` with the chat template.
    ///
    /// # Errors
    /// The message that the template raised.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        self.text.template.render(messages, &self.text.special, self.args, add_generation_prompt)
    }

    /// As [`Chat::render`], with the bytes written by the template's `{% generation %}` blocks.
    pub(crate) fn render_marked(&self, messages: &[Message]) -> Result<(String, Vec<Span>)> {
        self.text.template.render_marked(messages, &self.text.special, self.args, false)
    }

    /// Prompt for the model: `messages` and the generation prompt.
    ///
    /// # Errors
    /// As [`Chat::render`].
    pub fn prompt(&self, messages: &[Message]) -> Result<String> {
        let mut text = self.render(messages, true)?;
        if let GenerationPrompt::Missing(Some(header)) = &self.text.generation_prompt {
            text.push_str(header);
        }
        Ok(text)
    }

    /// Splits a generated answer from the reasoning before it, closing mark included. The closing
    /// mark is the one in the chat template; the answer follows its last occurrence, as in
    /// lm-evaluation-harness.
    ///
    /// # Errors
    /// As [`ChatText::decode`].
    pub fn split_reasoning(&self, ids: &[i64], text: &str) -> Result<(String, Option<String>)> {
        let Some(mark) = &self.text.template.reasoning_end else { return Ok((text.to_owned(), None)) };
        // A special token is not in the decoded text.
        let mark_id = self.text.tokenizer.token_to_id(mark).map(i64::from);
        if let Some(at) = mark_id.and_then(|mark| ids.iter().rposition(|id| *id == mark)) {
            let (reasoning, answer) = (self.text.decode(&ids[..=at])?, self.text.decode(&ids[at + 1..])?);
            return Ok((answer.trim_start().to_owned(), Some(reasoning)));
        }
        Ok(match text.rfind(mark.as_str()) {
            Some(at) => {
                let (reasoning, answer) = text.split_at(at + mark.len());
                (answer.trim_start().to_owned(), Some(reasoning.to_owned()))
            }
            None => (text.to_owned(), None),
        })
    }
}

fn read_object(path: &Path) -> Result<Map<String, Value>> {
    let value: Value = if path.is_file() { json::read(path)? } else { Value::Null };
    Ok(value.as_object().cloned().unwrap_or_default())
}

/// Ids of an `eos_token_id`: a number or a list.
fn ids_of(value: &Value) -> Vec<i64> {
    match value {
        Value::Array(list) => list.iter().filter_map(Value::as_i64).collect(),
        value => value.as_i64().into_iter().collect(),
    }
}

/// Template in chat_template.jinja, or `chat_template` in tokenizer_config.json or
/// chat_template.json (a string, or a list with one named `default`).
fn own_template(folder: &Path, config: &Value) -> Result<(String, PathBuf)> {
    let file = folder.join("chat_template.jinja");
    if file.is_file() {
        return Ok((cpift_core::files::read_text(&file)?, file));
    }
    let mut names = Vec::new();
    for name in ["tokenizer_config.json", "chat_template.json"] {
        let path = folder.join(name);
        let read = if name == "chat_template.json" && path.is_file() { Some(json::read(&path)?) } else { None };
        match read.as_ref().unwrap_or(config).get("chat_template") {
            Some(Value::String(text)) => return Ok((text.clone(), path)),
            Some(Value::Array(list)) => {
                let field = |entry: &Value, key: &str| entry.get(key).and_then(Value::as_str).map(str::to_owned);
                let default = list.iter().find(|entry| field(entry, "name").as_deref() == Some("default"));
                if let Some(text) = default.and_then(|entry| field(entry, "template")) {
                    return Ok((text, path));
                }
                names.extend(list.iter().filter_map(|entry| field(entry, "name")));
            }
            _ => {}
        }
    }
    let more = fs::read_dir(folder.join("additional_chat_templates")).into_iter().flatten().flatten();
    names.extend(more.filter_map(|entry| Some(entry.file_name().to_str()?.strip_suffix(".jinja")?.to_owned())));
    names.sort_unstable();
    names.dedup();
    let error = if names.is_empty() {
        BadInput::new(folder, "the checkpoint has no chat template")
    } else {
        BadInput::new(folder, "no chat template of the checkpoint is named default").found(names.join(", "))
    };
    Err(error
        .expected("chat_template.jinja, or chat_template in tokenizer_config.json")
        .hint("name one in tasks.toml: template = \"chatml\", or the path of a Jinja file")
        .into())
}

fn named_template(name: &str) -> Result<(String, PathBuf)> {
    match name {
        "chatml" => Ok((CHATML.to_owned(), PathBuf::from("chatml"))),
        path => Ok((cpift_core::files::read_text(Path::new(path))?, PathBuf::from(path))),
    }
}
