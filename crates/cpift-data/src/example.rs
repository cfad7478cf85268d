//! Supervised examples: a conversation's token ids, and which of them the loss counts.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use cpift_core::BadInput;
use cpift_core::format::digest::Digest;

use crate::chat::Chat;
use crate::place::Place;
use crate::rows::Row;
use crate::targets::Tokenised;
use crate::template::Refusal;

/// One conversation as tokens.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Example {
    /// Token ids.
    pub ids: Vec<i64>,
    /// Whether the loss counts the prediction of each token: the assistant's tokens, the end of turn included.
    pub target: Vec<bool>,
    /// The row it comes from.
    pub place: Place,
}

/// What to do with an example longer than the context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overlong {
    /// Keep its first tokens and count it.
    Truncate,
    /// Refuse the file (`--no-truncate`).
    Refuse,
}

/// A file's examples with what was lost on the way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// The usable examples, in file order.
    pub examples: Vec<Example>,
    /// Examples cut to the context.
    pub truncated: usize,
    /// Examples left out because no assistant token remained.
    pub dropped: usize,
    /// Examples whose last answer ends in no token that generation stops at, and the first of them.
    pub unended: Option<(usize, Place)>,
    /// By role, turns whose content does not reach the text, and the first row with one.
    pub unwritten: BTreeMap<String, (usize, Place)>,
}

/// The digest of all that training takes from `examples`, in their order.
pub fn digest<'a>(examples: impl IntoIterator<Item = &'a Example>) -> Digest {
    Digest::of_chunks(examples.into_iter().map(|example| {
        let mut bytes = (example.ids.len() as u64).to_le_bytes().to_vec();
        bytes.extend(example.ids.iter().flat_map(|id| id.to_le_bytes()));
        bytes.extend(example.target.iter().map(|&target| u8::from(target)));
        bytes
    }))
}

/// Longest example in tokens, and the setting that says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MaxLength {
    /// Tokens.
    pub tokens: usize,
    /// True if it is the model's context rather than max_length.
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
/// [`BadInput`] naming the row where the template raises, or where an example is too long and `overlong` refuses; or when no
/// example has an assistant token left.
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
                .hint("see the turns' keys weight and train, and whether the chat template writes the answers")
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

    /// Warns of what the chat template leaves out, and of answers without an end.
    pub fn warn_of_template(&self, task: &str) {
        if let Some((rows, first)) = &self.unended {
            log::warn!(
                "{task}: the chat template ends {rows} answers with no special token (first: {first}), so the model does not learn to \
                 stop\n  hint: name another template in tasks.toml: template = \"chatml\", or a path to a Jinja file"
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

/// Logs what became of a task's rows.
pub fn report(task: &str, encoded: &Encoded, max_length: MaxLength) {
    let (tokens, max_length) = (encoded.examples.iter().map(|e| e.ids.len()).sum::<usize>(), max_length.tokens);
    log::info!("{task}: {} examples, {tokens} tokens", encoded.examples.len());
    if encoded.truncated > 0 {
        log::warn!("{task}: {} examples were cut to {max_length} tokens", encoded.truncated);
    }
    if encoded.dropped > 0 {
        log::warn!("{task}: {} examples were left out: no assistant token within {max_length} tokens", encoded.dropped);
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

/// An error of rendering or tokenising the row at `place`.
pub fn unusable(place: &Place, error: &anyhow::Error) -> BadInput {
    let bad = place.bad(format!("{error:#}"));
    if error.is::<Refusal>() {
        bad.hint(
            "change the row (a system text can go into the first user turn), or name another template in tasks.toml: template = \"chatml\", \
             or a path to a Jinja file",
        )
    } else {
        bad
    }
}
