//! The tokenizer of a checkpoint folder by the rules of transformers: the file that names the
//! special tokens, and the tokens that other files add to those of tokenizer.json.
//!
//! | file | read |
//! | --- | --- |
//! | tokenizer.json | always; its padding names the pad token if no other file has the key |
//! | tokenizer_config.json | always: `bos_token` and so on, `extra_special_tokens` or the older `additional_special_tokens` |
//! | special_tokens_map.json | only without `added_tokens_decoder`; then its keys win, null included |
//! | added_tokens.json | only without `added_tokens_decoder` |

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow};
use cpift_core::BadInput;
use cpift_core::format::json;
use serde_json::{Map, Value};
use tokenizers::{AddedToken, Tokenizer};

use crate::template::SpecialTokens;

/// Keys that name a special token, in the order in which transformers adds those that
/// tokenizer.json lacks.
const NAMED: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
const EXTRA: &str = "extra_special_tokens";
const ADDITIONAL: &str = "additional_special_tokens";

/// A checkpoint folder's tokenizer with the tokens of all its files.
pub struct FolderTokenizer {
    /// Tokenizer without truncation and padding. Ids may exceed the model's embedding.
    pub tokenizer: Tokenizer,
    /// Named special tokens for chat templates: `bos_token` and so on, and names of the model's
    /// own.
    pub special: SpecialTokens,
    /// Content of tokenizer_config.json; null if the file is missing.
    pub config: Value,
    /// Ids that end generation, ascending: EOS of the tokenizer, generation_config.json and
    /// config.json.
    pub end_ids: Vec<i64>,
    /// Tokens that tokenizer.json lacks and another file declares, in the order of their ids.
    pub added: Vec<String>,
}

impl FolderTokenizer {
    /// Reads the tokenizer files of `folder`.
    ///
    /// # Errors
    /// [`BadInput`] if tokenizer.json is missing, or a file cannot be read or declares something
    /// that is not a token.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        if !path.is_file() {
            return Err(BadInput::new(&path, "no such file")
                .expected("a tokenizer in Hugging Face's tokenizer.json form")
                .hint("save it with AutoTokenizer.from_pretrained(dir).save_pretrained(dir)")
                .into());
        }
        let mut tokenizer = read_tokenizer(&path)?;
        let config = read_object(&folder.join("tokenizer_config.json"))?;
        let declared = Declared::read(folder, config.as_ref(), &tokenizer)?;
        let special = declared.named.iter().map(|(key, token)| (key.clone(), token.content.clone())).collect();
        let split =
            config.as_ref().and_then(|c| c.get("split_special_tokens")).and_then(Value::as_bool).unwrap_or(false);
        let first_new = tokenizer.get_vocab(true).values().max().map_or(0, |id| id + 1);
        // As in transformers, truncation and padding saved by an earlier training run are ignored.
        tokenizer.with_truncation(None).map_err(|e| BadInput::new(&path, format!("cannot be used: {e}")))?;
        tokenizer.with_padding(None);
        let tokens = declared.into_tokens(&tokenizer);
        let tokenizer = catch_unwind(AssertUnwindSafe(move || {
            tokenizer.add_tokens(&tokens);
            tokenizer.set_encode_special_tokens(split);
            tokenizer
        }));
        let tokenizer =
            tokenizer.map_err(|_| BadInput::new(&path, "cannot be read: its parts contradict one another"))?;
        let mut added: Vec<_> =
            tokenizer.get_added_tokens_decoder().into_iter().filter(|(id, _)| *id >= first_new).collect();
        added.sort_unstable_by_key(|(id, _)| *id);
        let added = added.into_iter().map(|(_, token)| token.content).collect();
        let config = config.map_or(Value::Null, Value::Object);
        let mut read = Self { tokenizer, special, config, end_ids: Vec::new(), added };
        read.end_ids = read.find_end_ids(folder)?;
        Ok(read)
    }

    /// Id of the special token called `key`, such as `pad_token`.
    pub fn special_id(&self, key: &str) -> Option<i64> {
        self.special.get(key).and_then(|token| self.tokenizer.token_to_id(token)).map(i64::from)
    }

    /// Largest token id plus one.
    pub fn vocab_size(&self) -> usize {
        self.tokenizer.get_vocab(true).values().max().map_or(0, |id| *id as usize + 1)
    }

    fn find_end_ids(&self, folder: &Path) -> Result<Vec<i64>> {
        let mut ids: BTreeSet<i64> = self.special_id("eos_token").into_iter().collect();
        for name in ["generation_config.json", "config.json"] {
            let Some(config) = read_object(&folder.join(name))? else { continue };
            let nested = config.get("text_config").and_then(|text| text.get("eos_token_id"));
            for value in config.get("eos_token_id").into_iter().chain(nested) {
                match value {
                    Value::Array(list) => ids.extend(list.iter().filter_map(Value::as_i64)),
                    value => ids.extend(value.as_i64()),
                }
            }
        }
        let vocabulary = self.vocab_size() as i64;
        ids.retain(|id| (0..vocabulary).contains(id));
        Ok(ids.into_iter().collect())
    }
}

/// Parses tokenizer.json.
fn read_tokenizer(path: &Path) -> Result<Tokenizer> {
    // Reports the place of a JSON error, and bounds length and depth.
    json::read::<serde::de::IgnoredAny>(path)?;
    // The library panics on some damaged files.
    let read = catch_unwind(|| Tokenizer::from_file(path));
    let read = read.unwrap_or_else(|_| Err("its parts contradict one another".into()));
    read.map_err(|e| BadInput::new(path, format!("cannot be read: {e}")).into())
}

/// The JSON object in the file at `path`; `None` if the file does not exist.
fn read_object(path: &Path) -> Result<Option<Map<String, Value>>> {
    if !path.is_file() {
        return Ok(None);
    }
    match json::read(path)? {
        Value::Object(object) => Ok(Some(object)),
        value => Err(BadInput::new(path, "not an object").expected("a JSON object").found(kind(&value)).into()),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// Tokens declared by the files beside tokenizer.json.
struct Declared {
    /// Named special tokens, in the order in which new ones get their ids.
    named: Vec<(String, AddedToken)>,
    /// Special tokens without a name.
    extra: Vec<AddedToken>,
    /// Tokens by the ids in a file. Only the order counts: a new token takes the next free id.
    decoder: BTreeMap<u64, AddedToken>,
}

impl Declared {
    fn read(folder: &Path, config: Option<&Map<String, Value>>, tokenizer: &Tokenizer) -> Result<Self> {
        let none = Map::new();
        let mut keys = Keys::of_config(config.unwrap_or(&none), folder.join("tokenizer_config.json"))?;
        let in_config = config.and_then(|c| c.get("added_tokens_decoder")).filter(|value| !value.is_null());
        let decoder = if let Some(value) = in_config {
            numbered(value, &keys.path)?
        } else {
            let path = folder.join("special_tokens_map.json");
            if let Some(map) = read_object(&path)? {
                keys.overlay(&map, path)?;
            }
            let mut decoder = keys.added_tokens_file(&folder.join("added_tokens.json"))?;
            let own = tokenizer.get_added_tokens_decoder();
            decoder.extend(own.into_iter().map(|(id, token)| (u64::from(id), token)));
            decoder
        };
        if let Some(padding) = tokenizer.get_padding() {
            keys.named.entry("pad_token".into()).or_insert_with(|| Some(AddedToken::from(&padding.pad_token, true)));
        }
        let mut named = Vec::new();
        for key in NAMED {
            if let Some(Some(token)) = keys.named.get(key) {
                named.push((key.to_owned(), token.clone()));
            }
        }
        named.extend(keys.models_own);
        let extra = keys.extra.unwrap_or(keys.additional);
        Ok(Self { named, extra, decoder })
    }

    /// Tokens for the library, which ignores known ones and gives new ones the next ids.
    fn into_tokens(self, tokenizer: &Tokenizer) -> Vec<AddedToken> {
        let mut known: BTreeSet<String> =
            tokenizer.get_added_tokens_decoder().into_values().map(|token| token.content).collect();
        known.extend(self.decoder.values().map(|token| token.content.clone()));
        let names: BTreeSet<String> = self.named.iter().map(|(_, token)| token.content.clone()).collect();
        let mut tokens: Vec<AddedToken> = self.decoder.into_values().collect();
        let others = self.named.into_iter().map(|(_, token)| token).chain(self.extra);
        tokens.extend(others.filter(|token| known.insert(token.content.clone())));
        for token in &mut tokens {
            token.special |= names.contains(&token.content);
        }
        tokens
    }
}

/// Parses a token in a file's notation.
type ReadToken = fn(&Value) -> Option<AddedToken>;

/// Token of a string, or of an object with `content`.
fn config_token(value: &Value) -> Option<AddedToken> {
    match value {
        Value::String(content) => Some(AddedToken::from(content, true)),
        Value::Object(object) => {
            let flag = |key: &str| object.get(key).and_then(Value::as_bool);
            let special = flag("special").unwrap_or(false);
            let token = AddedToken::from(object.get("content")?.as_str()?, special)
                .normalized(flag("normalized").unwrap_or(!special))
                .lstrip(flag("lstrip").unwrap_or(false))
                .rstrip(flag("rstrip").unwrap_or(false))
                .single_word(flag("single_word").unwrap_or(false));
            Some(token)
        }
        _ => None,
    }
}

/// Token in special_tokens_map.json, where an object is special even if it does not say so.
fn map_token(value: &Value) -> Option<AddedToken> {
    let token = config_token(value)?;
    let normalized = value.get("normalized").and_then(Value::as_bool).unwrap_or(false);
    Some(token.special(true).normalized(normalized))
}

/// Keys of tokenizer_config.json and special_tokens_map.json that declare tokens.
struct Keys {
    /// `None` is an explicit null.
    named: BTreeMap<String, Option<AddedToken>>,
    /// Other keys that end in `_token`, and names in an object of extra tokens.
    models_own: Vec<(String, AddedToken)>,
    extra: Option<Vec<AddedToken>>,
    /// `additional_special_tokens` of special_tokens_map.json; used if nothing declares
    /// `extra_special_tokens`.
    additional: Vec<AddedToken>,
    path: PathBuf,
}

impl Keys {
    fn of_config(config: &Map<String, Value>, path: PathBuf) -> Result<Self> {
        let mut keys =
            Self { named: BTreeMap::new(), models_own: Vec::new(), extra: None, additional: Vec::new(), path };
        for (key, value) in config {
            keys.take(key, value, config_token)?;
        }
        let empty = |value: &&Value| {
            value.is_null()
                || value.as_array().is_some_and(Vec::is_empty)
                || value.as_object().is_some_and(Map::is_empty)
        };
        let extra = config.get(EXTRA).map(|value| (EXTRA, value));
        let additional = config.get(ADDITIONAL).map(|value| (ADDITIONAL, value));
        let used = extra.filter(|(_, value)| !empty(value)).or(additional).or(extra);
        match used {
            Some((_, Value::Object(object))) => keys.extend_own(object, config_token)?,
            Some((key, value)) => keys.extra = Some(keys.list(key, value, config_token)?),
            None => {}
        }
        Ok(keys)
    }

    /// Applies special_tokens_map.json, whose keys win.
    fn overlay(&mut self, map: &Map<String, Value>, path: PathBuf) -> Result<()> {
        let of_config = std::mem::replace(&mut self.path, path);
        for (key, value) in map {
            self.take(key, value, map_token)?;
        }
        match map.get(EXTRA) {
            Some(Value::Object(object)) => {
                self.extra = None;
                self.extend_own(object, map_token)?;
            }
            Some(value) => {
                let more = self.list(EXTRA, value, map_token)?;
                self.extra.get_or_insert_default().extend(more);
            }
            None => {}
        }
        if let Some(value) = map.get(ADDITIONAL) {
            self.additional = self.list(ADDITIONAL, value, map_token)?;
        }
        self.path = of_config;
        Ok(())
    }

    /// Reads a key that names a token; others are ignored.
    fn take(&mut self, key: &str, value: &Value, read: ReadToken) -> Result<()> {
        if NAMED.contains(&key) {
            let token = if value.is_null() { None } else { Some(self.token(key, value, read)?) };
            self.named.insert(key.to_owned(), token);
        } else if key.ends_with("_token") {
            // add_bos_token and similar keys are settings, with a boolean.
            if let Some(token) = read(value) {
                self.set_own(key, token);
            }
        }
        Ok(())
    }

    fn extend_own(&mut self, object: &Map<String, Value>, read: ReadToken) -> Result<()> {
        for (key, value) in object {
            let token = self.token(&format!("{EXTRA}.{key}"), value, read)?;
            self.set_own(key, token);
        }
        Ok(())
    }

    fn set_own(&mut self, key: &str, token: AddedToken) {
        match self.models_own.iter_mut().find(|(known, _)| known == key) {
            Some((_, known)) => *known = token,
            None => self.models_own.push((key.to_owned(), token)),
        }
    }

    fn list(&self, key: &str, value: &Value, read: ReadToken) -> Result<Vec<AddedToken>> {
        match value {
            Value::Null => Ok(Vec::new()),
            Value::Array(list) => list.iter().map(|value| self.token(key, value, read)).collect(),
            value => Err(BadInput::new(&self.path, format!("{key} is not a list of tokens"))
                .expected("an array of strings or of objects with content")
                .found(kind(value))
                .into()),
        }
    }

    fn token(&self, key: &str, value: &Value, read: ReadToken) -> Result<AddedToken> {
        read(value).ok_or_else(|| no_token(&self.path, key, value))
    }

    /// Tokens of added_tokens.json, by id.
    fn added_tokens_file(&self, path: &Path) -> Result<BTreeMap<u64, AddedToken>> {
        let mut special: BTreeSet<&str> = self.named.values().flatten().map(|token| token.content.as_str()).collect();
        special.extend(self.extra.iter().flatten().map(|token| token.content.as_str()));
        let mut tokens = BTreeMap::new();
        for (content, id) in read_object(path)?.unwrap_or_default() {
            let id = id.as_u64().ok_or_else(|| {
                anyhow!(
                    BadInput::new(path, format!("token {content:?} has no id")).expected("a number").found(kind(&id))
                )
            })?;
            let special = special.contains(content.as_str());
            tokens.insert(id, AddedToken::from(content, special));
        }
        Ok(tokens)
    }
}

/// Tokens of `added_tokens_decoder`: an object by id.
fn numbered(value: &Value, path: &Path) -> Result<BTreeMap<u64, AddedToken>> {
    let object = value.as_object().ok_or_else(|| {
        BadInput::new(path, "added_tokens_decoder is not an object").expected("ids with tokens").found(kind(value))
    })?;
    let mut tokens = BTreeMap::new();
    for (id, value) in object {
        let number = id.parse().map_err(|_| {
            BadInput::new(path, "added_tokens_decoder has a key that is no id")
                .expected("a number")
                .found(format!("{id:?}"))
        })?;
        let token = Some(value).filter(|value| value.is_object()).and_then(config_token);
        let key = format!("added_tokens_decoder[{id}]");
        tokens.insert(number, token.ok_or_else(|| no_token(path, &key, value))?);
    }
    Ok(tokens)
}

fn no_token(path: &Path, key: &str, value: &Value) -> anyhow::Error {
    BadInput::new(path, format!("{key} is not a token"))
        .expected("a string, or an object with content")
        .found(kind(value))
        .into()
}
