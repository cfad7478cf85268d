//! Supervised examples: a conversation's token ids and loss targets.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use cpift_core::BadInput;
use cpift_core::format::digest::Digest;

use crate::chat::Chat;
use crate::files::raw::Place;
use crate::rows::Row;
use crate::targets::Tokenised;
use crate::template::Refusal;

/// One conversation as tokens.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Example {
    /// Token ids.
    pub ids: Vec<i64>,
    /// True for tokens that are loss targets: the assistant's, end of turn included.
    pub target: Vec<bool>,
    /// Row of the conversation.
    pub place: Place,
}

/// Treatment of an example longer than the context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overlong {
    /// Keep its first tokens, and count it.
    Truncate,
    /// Return an error (`--no-truncate`).
    Refuse,
}

/// Examples of a file, with counts of losses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// Usable examples, in file order.
    pub examples: Vec<Example>,
    /// Examples cut to the context.
    pub truncated: usize,
    /// Examples left out because they have no target within the context.
    pub dropped: usize,
    /// Number of examples whose last answer does not end in a token that stops generation, and the
    /// first of them.
    pub unended: Option<(usize, Place)>,
    /// By role, number of turns whose content is not in the text, and the first row with one.
    pub unwritten: BTreeMap<String, (usize, Place)>,
}

/// Digest of `examples` as training reads them, in order.
pub fn digest<'a>(examples: impl IntoIterator<Item = &'a Example>) -> Digest {
    Digest::of_chunks(examples.into_iter().map(|example| {
        let mut bytes = (example.ids.len() as u64).to_le_bytes().to_vec();
        bytes.extend(example.ids.iter().flat_map(|id| id.to_le_bytes()));
        bytes.extend(example.target.iter().map(|&target| u8::from(target)));
        bytes
    }))
}

/// Largest number of tokens per example, and its origin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MaxLength {
    /// Tokens.
    pub tokens: usize,
    /// True if the model's context sets the limit, not max_length.
    pub of_model: bool,
}

impl MaxLength {
    /// `asked` tokens within a model's `context`.
    pub fn new(asked: usize, context: usize) -> Self {
        Self { tokens: asked.min(context), of_model: context < asked }
    }

    fn hint(self) -> String {
        match self {
            Self { tokens, of_model: true } => {
                format!("the model's context is {tokens} tokens (max_position_embeddings): shorten the rows")
            }
            Self { tokens, .. } => format!("raise max_length (now {tokens}) in tasks.toml"),
        }
    }
}

/// Encodes `rows` of the file `path`, each cut to `max_length` tokens.
///
/// # Errors
/// [`BadInput`] naming the row if the template raises, or if an example is too long and `overlong`
/// is [`Overlong::Refuse`]; or if no example has a target.
pub fn encode_rows(
    path: &Path,
    rows: &[Row],
    chat: Chat<'_>,
    max_length: MaxLength,
    overlong: Overlong,
) -> Result<Encoded> {
    let mut out = Encoded { examples: Vec::new(), truncated: 0, dropped: 0, unended: None, unwritten: BTreeMap::new() };
    for row in rows {
        let tokens = tokenise(row, chat)?;
        out.note(row, &tokens);
        let mut example = Example { ids: tokens.ids, target: tokens.target, place: row.place.clone() };
        if example.ids.len() > max_length.tokens {
            if overlong == Overlong::Refuse {
                return Err(row
                    .place
                    .bad("longer than the context")
                    .expected(format!("at most {} tokens", max_length.tokens))
                    .found(format!("{} tokens", example.ids.len()))
                    .hint(format!("{}, or leave out --no-truncate to truncate them", max_length.hint()))
                    .into());
            }
            example.ids.truncate(max_length.tokens);
            example.target.truncate(max_length.tokens);
            out.truncated += 1;
        }
        if example.target.contains(&true) {
            out.examples.push(example);
        } else {
            out.dropped += 1;
        }
    }
    if out.examples.is_empty() {
        return Err(if out.truncated > 0 {
            BadInput::new(path, "no example has an assistant token within the context").hint(max_length.hint())
        } else {
            BadInput::new(path, "no example has an assistant token that is trained on")
                .hint("check the keys weight and train of the turns, and that the chat template writes the answers")
        }
        .into());
    }
    Ok(out)
}

impl Encoded {
    fn note(&mut self, row: &Row, tokens: &Tokenised) {
        let last_trained = row.messages.last().is_some_and(|message| message.train);
        if last_trained && !tokens.end.is_some_and(|end| tokens.target[end]) {
            self.unended.get_or_insert((0, row.place.clone())).0 += 1;
        }
        if let Some(message) = tokens.unwritten(&row.messages) {
            self.unwritten.entry(message.role.clone()).or_insert((0, row.place.clone())).0 += 1;
        }
    }

    /// Warns about turns that the chat template leaves out, and about answers without an end.
    pub fn warn_of_template(&self, task: &str) {
        if let Some((rows, first)) = &self.unended {
            log::warn!(
                "{task}: the chat template ends {rows} answers with no special token (first: {first}), so the model does not learn to \
                 stop\n  hint: name another template in tasks.toml: template = \"chatml\", or the path of a Jinja file"
            );
        }
        for (role, (rows, first)) in &self.unwritten {
            log::warn!(
                "{task}: in {rows} rows the chat template leaves out or rewrites text of a turn of the {role} (first: {first}); see \
                 cpift-train preview"
            );
        }
    }
}

/// Logs the number of examples and tokens of a task, and warns about losses.
pub fn report(task: &str, encoded: &Encoded, max_length: MaxLength) {
    let (tokens, max_length) = (encoded.examples.iter().map(|e| e.ids.len()).sum::<usize>(), max_length.tokens);
    log::info!("{task}: {} examples, {tokens} tokens", encoded.examples.len());
    if encoded.truncated > 0 {
        log::warn!("{task}: {} examples were cut to {max_length} tokens", encoded.truncated);
    }
    if encoded.dropped > 0 {
        log::warn!("{task}: {} examples were left out: no target within {max_length} tokens", encoded.dropped);
    }
    encoded.warn_of_template(task);
}

/// Encodes the conversation of `row`.
///
/// # Errors
/// [`BadInput`] naming the row, as [`Chat::tokenise`].
pub fn tokenise(row: &Row, chat: Chat<'_>) -> Result<Tokenised> {
    chat.tokenise(&row.messages).map_err(|e| unusable(&row.place, &e).into())
}

/// Adds the row at `place` to an error of rendering or tokenising.
pub fn unusable(place: &Place, error: &anyhow::Error) -> BadInput {
    let bad = place.bad(format!("{error:#}"));
    if error.is::<Refusal>() {
        bad.hint(
            "change the row (a system text can go into the first user turn), or name another template in tasks.toml: template = \
             \"chatml\", or the path of a Jinja file",
        )
    } else {
        bad
    }
}
