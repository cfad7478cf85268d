//! Supervised examples: a conversation's token ids, and which of them the loss counts.

use std::path::Path;

use anyhow::Result;
use cpift_core::BadInput;
use cpift_core::checkpoint::Digest;

use super::place::Place;
use super::rows::Row;
use crate::chat::{ChatText, Span};

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

/// A conversation as tokens with the text they stand for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokenised {
    /// The whole conversation as the chat template writes it.
    pub text: String,
    /// Token ids.
    pub ids: Vec<i64>,
    /// The bytes of `text` that each token stands for.
    pub spans: Vec<Span>,
    /// Whether the loss counts each token.
    pub target: Vec<bool>,
}

/// What to do with an example longer than the context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overlong {
    /// Keep its first tokens and count it.
    Truncate,
    /// Refuse the file (`--strict`).
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

/// Encodes `rows` of the file `path`, each cut to `max_length` tokens.
///
/// # Errors
/// [`BadInput`] naming the row where the template raises, or where an example is too long and `overlong` refuses; or when no
/// example has an assistant token left.
pub fn encode_rows(
    path: &Path,
    rows: &[Row],
    text: &ChatText,
    max_length: usize,
    overlong: Overlong,
) -> Result<Encoded> {
    let mut out = Encoded { examples: Vec::new(), truncated: 0, dropped: 0 };
    for row in rows {
        let Tokenised { ids, target, .. } = tokenise(row, text)?;
        let mut example = Example { ids, target, place: row.place.clone() };
        if example.ids.len() > max_length {
            if overlong == Overlong::Refuse {
                return Err(row
                    .place
                    .bad("longer than the context")
                    .expected(format!("at most {max_length} tokens"))
                    .found(format!("{} tokens", example.ids.len()))
                    .hint("raise max_length in tasks.toml, or leave out --strict to cut it")
                    .into());
            }
            example.ids.truncate(max_length);
            example.target.truncate(max_length);
            out.truncated += 1;
        }
        if example.target.contains(&true) {
            out.examples.push(example);
        } else {
            out.dropped += 1;
        }
    }
    if out.examples.is_empty() {
        return Err(BadInput::new(path, "no example has an assistant token within the context")
            .hint(format!("raise max_length (now {max_length}) in tasks.toml"))
            .into());
    }
    Ok(out)
}

/// Logs what became of a task's rows.
pub fn report(task: &str, encoded: &Encoded, max_length: usize) {
    let tokens: usize = encoded.examples.iter().map(|e| e.ids.len()).sum();
    log::info!("{task}: {} examples, {tokens} tokens", encoded.examples.len());
    if encoded.truncated > 0 {
        log::warn!("{task}: {} examples were cut to {max_length} tokens", encoded.truncated);
    }
    if encoded.dropped > 0 {
        log::warn!("{task}: {} examples were left out: no assistant token within {max_length} tokens", encoded.dropped);
    }
}

/// Encodes the conversation of `row`. The whole text is tokenised at once; a token is a target when it starts inside an assistant turn
/// and does not come after the turn's last end-of-turn token (templates write a line break there that no model generates).
///
/// # Errors
/// [`BadInput`] naming the row where the chat template raises.
pub fn tokenise(row: &Row, text: &ChatText) -> Result<Tokenised> {
    let encoded = text.render_with_spans(&row.messages).and_then(|(rendered, turns)| {
        let (ids, spans) = text.encode_offsets(&rendered)?;
        let target = targets(&ids, &spans, &turns, &text.eos_ids);
        Ok(Tokenised { text: rendered, ids, spans, target })
    });
    encoded.map_err(|e| row.place.bad(format!("{e:#}")).into())
}

fn targets(ids: &[i64], spans: &[Span], turns: &[Span], eos_ids: &[i64]) -> Vec<bool> {
    let mut target = vec![false; ids.len()];
    for turn in turns {
        let inside = (0..ids.len()).filter(|&i| turn.contains(&spans[i].start) && spans[i].end <= turn.end);
        let inside: Vec<usize> = inside.collect();
        let last = inside.iter().rposition(|&i| eos_ids.contains(&ids[i])).unwrap_or(inside.len().wrapping_sub(1));
        inside.iter().take(last.wrapping_add(1)).for_each(|&i| target[i] = true);
    }
    // The first token has nothing before it to be predicted from.
    if let Some(first) = target.first_mut() {
        *first = false;
    }
    target
}
