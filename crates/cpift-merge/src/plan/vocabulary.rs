//! Models with different vocabularies: the output's tokens, and for every model the rows of its
//! embeddings in their order. Rules for single tokens are those of mergekit.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use anyhow::Result;
use cpift_core::BadInput;
use cpift_core::format::checkpoint::{Row, Rows};
use cpift_core::format::json;
use cpift_core::format::tokens::{Tokens, embeddings};
use serde_json::{Map, Value, json};

use super::inputs::Source;
use crate::request::{TokenRow, TokenizerRequest, TokenizerSource};

/// Largest number of tokens; today's vocabularies have up to a few hundred thousand.
const MOST_TOKENS: usize = 1 << 26;

/// Vocabulary of the output.
pub(crate) struct Vocabulary {
    /// Rows of the embeddings, with padding.
    pub rows: usize,
    /// Files of the tokenizer that differ from those of its source, by name.
    pub files: Vec<(String, String)>,
    /// Directory of the tokenizer.
    pub folder: PathBuf,
}

/// Number of rows of the embeddings of `source`.
fn rows_of(source: &Source) -> Option<usize> {
    let name = embeddings(&source.checkpoint).into_iter().next()?;
    Some(source.checkpoint.get(&name)?.shape[0])
}

/// Brings the embeddings of all `sources`, the first of which is the base, to one vocabulary.
/// `None` if they have the same already.
///
/// # Errors
/// [`BadInput`] for a tokenizer that cannot be read, or a rule for a token or model that is not
/// there.
pub(crate) fn unify(sources: &mut [&mut Source], request: &TokenizerRequest) -> Result<Option<Vocabulary>> {
    let base = sources[0].folder().map(Path::to_owned);
    let folder = match (&request.source, base) {
        (TokenizerSource::Path(path), _) => path.clone(),
        (_, Some(base)) => base,
        (_, None) => {
            return Err(BadInput::new(sources[0].path(), "a bare file has no tokenizer")
                .expected("a directory with tokenizer.json")
                .into());
        }
    };
    let rows: Vec<Option<usize>> = sources.iter().map(|source| rows_of(source)).collect();
    let base_rows = if matches!(request.source, TokenizerSource::Path(_)) { None } else { rows[0] };
    if same_sentencepiece(&folder, sources)
        && rows.iter().all(|n| *n == rows[0])
        && request.pad_to_multiple_of.is_none()
    {
        return Ok(None);
    }
    let Some(first) = Tokens::read(&folder, base_rows)? else {
        return Err(BadInput::new(&folder, "has no tokenizer.json")
            .expected("a tokenizer.json, or the same tokenizer.model in all models")
            .into());
    };
    let mut all: Vec<Option<Tokens>> = Vec::new();
    for (source, rows) in sources.iter().zip(&rows) {
        let read = source.folder().map(|folder| Tokens::read(folder, *rows)).transpose()?.flatten();
        if read.is_none() {
            log::warn!(
                "{}: no tokenizer.json, so its tokens are taken to be those of the output",
                source.path().display()
            );
        }
        all.push(read);
    }
    let same = |tokens: &Option<Tokens>| tokens.as_ref().is_none_or(|tokens| tokens.ids == first.ids);
    if all.iter().all(same)
        && rows.iter().all(|n| *n == rows[0])
        && request.tokens.is_empty()
        && request.pad_to_multiple_of.is_none()
    {
        return Ok(None);
    }
    let new = new_tokens(&first, &all, request);
    let mut output = first.ids.clone();
    let start = output.values().max().map_or(0, |id| id.saturating_add(1));
    if start > MOST_TOKENS {
        return Err(BadInput::new(folder.join("tokenizer.json"), "an id that is too large")
            .expected(format!("ids below {MOST_TOKENS}"))
            .found((start - 1).to_string())
            .into());
    }
    for (i, (token, _)) in new.iter().enumerate() {
        output.insert(token.clone(), start + i);
    }
    let size = start + new.len();
    let multiple = request.pad_to_multiple_of.unwrap_or(1).max(1);
    let padded = size.next_multiple_of(multiple);
    let places: Vec<&HashMap<String, usize>> =
        all.iter().map(|tokens| tokens.as_ref().map_or(&first.ids, |tokens| &tokens.ids)).collect();
    let chosen = Chosen { output: &output, places: &places, request, size, padded };
    let names: Vec<Vec<String>> = sources.iter().map(|source| embeddings(&source.checkpoint)).collect();
    let mut mapped: Vec<(usize, String, Rows)> = Vec::new();
    for name in names.iter().flatten().collect::<BTreeSet<_>>() {
        let having: Vec<usize> = (0..sources.len()).filter(|i| names[*i].contains(name)).collect();
        for (i, rows) in chosen.rows(sources, name, &having)? {
            mapped.push((i, name.clone(), rows));
        }
    }
    mapped.into_iter().for_each(|(i, name, rows)| sources[i].checkpoint.map_rows(&name, rows));
    log::info!("{size} tokens, {} of them new, in {padded} rows of the embeddings", new.len());
    Ok(Some(Vocabulary { rows: padded, files: files(&folder, &new, start)?, folder }))
}

/// Returns true if the tokenizers of `folder` and all `sources` are the same tokenizer.model,
/// without a tokenizer.json.
fn same_sentencepiece(folder: &Path, sources: &[&mut Source]) -> bool {
    let read = |folder: &Path| match folder.join("tokenizer.json").exists() {
        true => None,
        false => std::fs::read(folder.join("tokenizer.model")).ok(),
    };
    let first = read(folder);
    let mut others = sources.iter().filter_map(|source| source.folder());
    first.is_some() && others.all(|other| read(other) == first)
}

/// Tokens that the output has beyond those of its tokenizer, with their description.
fn new_tokens(first: &Tokens, all: &[Option<Tokens>], request: &TokenizerRequest) -> Vec<(String, Value)> {
    let mut seen: BTreeSet<&str> = first.ids.keys().map(String::as_str).collect();
    let mut new: Vec<(String, Value)> = Vec::new();
    let plain = |token: &str| {
        json!({"content": token, "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": true, "special": false})
    };
    if request.source == TokenizerSource::Union {
        // As mergekit: the models' own tokens first, then those added to them.
        for added in [false, true] {
            for tokens in all.iter().flatten() {
                for token in tokens.in_order().into_iter().filter(|token| tokens.added.contains_key(*token) == added) {
                    if seen.insert(token) {
                        new.push((token.to_owned(), tokens.added.get(token).cloned().unwrap_or_else(|| plain(token))));
                    }
                }
            }
        }
    }
    for token in request.tokens.keys() {
        if seen.insert(token) {
            new.push((token.clone(), plain(token)));
        }
    }
    new
}

/// The files of the tokenizer with the `new` tokens, whose ids begin at `start`.
fn files(folder: &Path, new: &[(String, Value)], start: usize) -> Result<Vec<(String, String)>> {
    if new.is_empty() {
        return Ok(Vec::new());
    }
    let mut tokenizer: Value = json::read(&folder.join("tokenizer.json"))?;
    if let Some(file) = tokenizer.as_object_mut() {
        file.entry("added_tokens").or_insert_with(|| json!([]));
    }
    for (i, (_, description)) in new.iter().enumerate() {
        let mut entry = Map::from_iter([("id".to_owned(), json!(start + i))]);
        entry.extend(
            description
                .as_object()
                .into_iter()
                .flatten()
                .filter(|(k, _)| *k != "id")
                .map(|(k, v)| (k.clone(), v.clone())),
        );
        if let Some(list) = tokenizer.get_mut("added_tokens").and_then(Value::as_array_mut) {
            list.push(Value::Object(entry));
        }
    }
    let mut files = vec![("tokenizer.json".to_owned(), json::to_text(&tokenizer)?)];
    let path = folder.join("tokenizer_config.json");
    if path.is_file() {
        let mut config: Value = json::read(&path)?;
        if let Some(decoder) = config.get_mut("added_tokens_decoder").and_then(Value::as_object_mut) {
            for (i, (_, description)) in new.iter().enumerate() {
                let mut entry = description.clone();
                if let Some(entry) = entry.as_object_mut() {
                    entry.remove("id");
                }
                decoder.insert((start + i).to_string(), entry);
            }
            files.push(("tokenizer_config.json".to_owned(), json::to_text(&config)?));
        }
    }
    Ok(files)
}

/// The vocabulary of the output, and the tokens of each source.
struct Chosen<'a> {
    output: &'a HashMap<String, usize>,
    places: &'a [&'a HashMap<String, usize>],
    request: &'a TokenizerRequest,
    size: usize,
    padded: usize,
}

impl Chosen<'_> {
    /// Refuses a matrix that lacks a row for one of the source's tokens in the output.
    fn check_rows(&self, i: usize, source: &Source, name: &str) -> Result<()> {
        let rows = source.checkpoint.get(name).expect("it was found").shape[0];
        let without = self.places[i].iter().filter(|(token, id)| **id >= rows && self.output.contains_key(*token));
        match without.min() {
            None => Ok(()),
            Some((token, id)) => Err(BadInput::new(source.path(), format!("the token {token:?} has no row"))
                .tensor(name)
                .expected(format!("ids below {rows}, its number of rows"))
                .found(id.to_string())
                .hint("give the tokenizer of this model: a tokenizer.json beside its weights")
                .into()),
        }
    }

    /// Rows of the matrix `name` in each source that has it.
    fn rows(&self, sources: &[&mut Source], name: &str, having: &[usize]) -> Result<Vec<(usize, Rows)>> {
        let width = sources[having[0]].checkpoint.get(name).expect("it was found").shape[1];
        for i in having {
            let found = sources[*i].checkpoint.get(name).expect("it was found");
            if found.shape[1] != width {
                return Err(BadInput::new(found.file, "the width of the embeddings differs between the models")
                    .tensor(name)
                    .expected(width.to_string())
                    .found(found.shape[1].to_string())
                    .into());
            }
        }
        for i in having {
            self.check_rows(*i, sources[*i], name)?;
        }
        let read = |i: usize, row: usize| -> Vec<f32> {
            let mut values = vec![0f32; width];
            sources[i].checkpoint.get(name).expect("it was found").read(row * width, &mut values);
            values
        };
        // The row for sources without the token, or for all if its rule is forced.
        let mut defaults: Vec<(usize, Option<Vec<f32>>, bool)> = Vec::new();
        for (token, id) in self.output {
            let rule = self.request.tokens.get(token);
            let force = rule.is_some_and(|rule| rule.force);
            if !force && having.iter().all(|i| self.places[*i].contains_key(token)) {
                continue;
            }
            let with: Vec<usize> = having.iter().copied().filter(|i| self.places[*i].contains_key(token)).collect();
            let row = match rule.and_then(|rule| rule.source.as_ref()) {
                Some(TokenRow::Zero) => None,
                Some(TokenRow::Model(model)) => {
                    let i = self.source(sources, having, model, token)?;
                    let row = self.places[i].get(token).ok_or_else(|| absent(sources[i], token))?;
                    Some(read(i, *row))
                }
                Some(TokenRow::Token(model, other)) => {
                    let i = self.source(sources, having, model, token)?;
                    let row = self.places[i].get(other).ok_or_else(|| absent(sources[i], other))?;
                    Some(read(i, *row))
                }
                Some(TokenRow::Id(model, id)) => {
                    let i = self.source(sources, having, model, token)?;
                    let rows = sources[i].checkpoint.get(name).expect("it was found").shape[0];
                    if *id >= rows {
                        return Err(BadInput::new(sources[i].path(), format!("no row for the token {token:?}"))
                            .tensor(name)
                            .expected(format!("an id below {rows}"))
                            .found(id.to_string())
                            .into());
                    }
                    Some(read(i, *id))
                }
                None if with.is_empty() => {
                    log::warn!("the token {token:?} is in no model: its row in {name} is zero");
                    None
                }
                None if with.contains(&0) => Some(read(0, self.places[0][token])),
                None => {
                    let mut sum = vec![0f32; width];
                    for i in &with {
                        sum.iter_mut().zip(read(*i, self.places[*i][token])).for_each(|(sum, v)| *sum += v);
                    }
                    sum.iter_mut().for_each(|v| *v /= with.len() as f32);
                    Some(sum)
                }
            };
            defaults.push((*id, row, force));
        }
        defaults.sort_by_key(|(id, ..)| *id);
        Ok(having.iter().map(|i| (*i, self.rows_of_one(*i, width, &defaults, &|row| read(*i, row)))).collect())
    }

    /// Rows of one source.
    fn rows_of_one(
        &self,
        i: usize,
        width: usize,
        defaults: &[(usize, Option<Vec<f32>>, bool)],
        read: &dyn Fn(usize) -> Vec<f32>,
    ) -> Rows {
        let mut sources = vec![Row::Zero; self.padded];
        for (token, id) in self.output {
            if let Some(row) = self.places[i].get(token) {
                sources[*id] = Row::Stored(*row as u32);
            }
        }
        let mut given: Vec<Vec<f64>> = Vec::new();
        for (id, row, force) in defaults {
            if *force || sources[*id] == Row::Zero {
                sources[*id] = match row {
                    None => Row::Zero,
                    Some(row) => {
                        given.push(row.iter().copied().map(f64::from).collect());
                        Row::Given(given.len() as u32 - 1)
                    }
                };
            }
        }
        if self.padded > self.size {
            // Padding is the mean of all tokens.
            let mut mean = vec![0f64; width];
            for source in &sources[..self.size] {
                let row: Vec<f64> = match source {
                    Row::Stored(row) => read(*row as usize).into_iter().map(f64::from).collect(),
                    Row::Given(index) => given[*index as usize].clone(),
                    Row::Zero => continue,
                };
                mean.iter_mut().zip(row).for_each(|(sum, v)| *sum += v);
            }
            given.push(mean.into_iter().map(|sum| f64::from((sum / self.size as f64) as f32)).collect());
            sources[self.size..].fill(Row::Given(given.len() as u32 - 1));
        }
        Rows { shape: vec![self.padded, width], sources, given }
    }

    /// Index of the source that the rule of a token names.
    fn source(&self, sources: &[&mut Source], having: &[usize], model: &Path, token: &str) -> Result<usize> {
        let found = having.iter().copied().find(|i| sources[*i].path() == model);
        found.ok_or_else(|| {
            let known: Vec<String> = sources.iter().map(|source| source.path().display().to_string()).collect();
            BadInput::new(model, format!("the rule of the token {token:?} names a model that is not merged"))
                .expected(known.join(", "))
                .into()
        })
    }
}

fn absent(source: &Source, token: &str) -> BadInput {
    BadInput::new(source.path(), format!("its tokenizer does not have the token {token:?}"))
        .hint("name another model or token as its source, or {kind: zero}")
}
