//! Supervised examples: a conversation's token ids and loss targets, by one rule for training,
//! losses, multiple choice and previews.
//!
//! The conversation is rendered and tokenised as a whole. Targets are the tokens that the model has
//! to generate: those of an answer's text and the special token that ends its turn. If the template
//! has `{% generation %}` blocks, the targets are those of transformers'
//! `return_assistant_tokens_mask`. Otherwise an answer is located by rendering the conversation
//! again with a sentinel in place of the answer: the text around the sentinel is the text around
//! the answer, whatever the template writes for other turns.
//!
//! Text that a template writes between the generation prompt and an answer (an empty think block,
//! the channel marks of gpt-oss) is no target, unless it is inside a `{% generation %}` block.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Result, bail};
use cpift_core::BadInput;
use cpift_core::format::digest::Digest;

use crate::chat::{Chat, Span};
use crate::conversation::Message;
use crate::files::Place;
use crate::rows::Row;
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

/// Sentinel for an answer, between noncharacters of Unicode, which no text contains.
const SENTINEL: &str = "\u{fdd0}answer\u{fdd1}";

/// A conversation as tokens, with their text and targets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokenised {
    /// Conversation as rendered by the chat template.
    pub text: String,
    /// Token ids.
    pub ids: Vec<i64>,
    /// Bytes of `text` per token.
    pub spans: Vec<Span>,
    /// True for tokens that are loss targets.
    pub target: Vec<bool>,
    /// Bytes of each assistant turn's text; `None` if the template omits the turn.
    pub answers: Vec<Option<Span>>,
    /// Index of the special token that ends the last answer's turn.
    pub end: Option<usize>,
}

impl Tokenised {
    /// Tokens of the last answer without its end of turn. The first may begin before the answer and
    /// end inside it.
    pub fn last_answer(&self) -> Option<std::ops::Range<usize>> {
        let answer = self.answers.last()?.as_ref()?;
        overlapping(&self.spans, answer)
    }

    /// Text before the last answer.
    pub fn before_last_answer(&self) -> &str {
        let start = self.answers.last().and_then(|answer| Some(answer.as_ref()?.start));
        &self.text[..start.unwrap_or(self.text.len())]
    }

    /// First turn of `messages` whose content is not in the text, ignoring white space.
    pub fn unwritten<'m>(&self, messages: &'m [Message]) -> Option<&'m Message> {
        let squeeze = |text: &str| text.split_whitespace().collect::<String>();
        let mut squeezed = None;
        messages.iter().find(|message| {
            let content = message.content.trim();
            !self.text.contains(content) && {
                let text = squeezed.get_or_insert_with(|| squeeze(&self.text));
                !text.contains(&squeeze(content))
            }
        })
    }
}

impl Chat<'_> {
    /// Renders and tokenises a conversation that ends with an answer, and finds its targets.
    ///
    /// # Errors
    /// The message that the template raised; an answer that the template writes twice; a token
    /// beyond the model's embedding.
    pub fn tokenise(&self, messages: &[Message]) -> Result<Tokenised> {
        let (text, blocks) = self.render_marked(messages)?;
        let turns: Vec<usize> = (0..messages.len()).filter(|&i| messages[i].role == "assistant").collect();
        let mut answers = Vec::new();
        let mut from = 0;
        for &i in &turns {
            let answer = self.find_answer(messages, i, &text, from)?;
            from = answer.as_ref().map_or(from, |answer| answer.end);
            answers.push(answer);
        }
        let (ids, spans) = self.text.encode_offsets(&text)?;
        let after = |answer: &Span| self.special_after(&text, &ids, &spans, answer.end);
        let end = answers.last().cloned().flatten().and_then(|answer| after(&answer));
        let mut target = vec![false; ids.len()];
        let trained = turns.iter().map(|&i| messages[i].train);
        if self.text.marks_answers() {
            let muted = |k: usize, block: &Span| {
                let positional = blocks.len() == answers.len();
                trained.clone().zip(&answers).enumerate().any(|(j, (trained, answer))| {
                    let own = if positional { j == k } else { answer.as_ref().is_some_and(|a| overlap(a, block)) };
                    !trained && own
                })
            };
            for (k, block) in blocks.iter().enumerate().filter(|(_, block)| !block.is_empty()) {
                if let Some(tokens) = overlapping(&spans, block).filter(|_| !muted(k, block)) {
                    target[tokens].fill(true);
                }
            }
        } else {
            let stops = self.text.stop_ids();
            let ends_turn = |i: &usize| stops.contains(&ids[*i]) || end.is_some_and(|end| ids[end] == ids[*i]);
            for (answer, _) in answers.iter().zip(trained).filter(|(_, trained)| *trained) {
                let Some(answer) = answer else { continue };
                let tokens = overlapping(&spans, answer);
                let stop = after(answer).filter(ends_turn);
                let first = tokens.as_ref().map(|tokens| tokens.start).or(stop);
                let last = stop.or(tokens.map(|tokens| tokens.end - 1));
                if let (Some(first), Some(last)) = (first, last) {
                    target[first..=last].fill(true);
                }
            }
        }
        // The first token has no context to be predicted from.
        if let Some(first) = target.first_mut() {
            *first = false;
        }
        Ok(Tokenised { text, ids, spans, target, answers, end })
    }

    /// Bytes of `whole`, the rendering of `messages`, that come from turn `i`; not before `from`.
    fn find_answer(&self, messages: &[Message], i: usize, whole: &str, from: usize) -> Result<Option<Span>> {
        let mut altered = messages.to_vec();
        altered[i].content = SENTINEL.to_owned();
        let text = self.render(&altered, false)?;
        let Some(at) = text.find(SENTINEL) else { return Ok(None) };
        let (before, after) = (&text[..at], &text[at + SENTINEL.len()..]);
        if after.contains(SENTINEL) {
            bail!("the chat template writes turn {} twice, so its targets are ambiguous", i + 1);
        }
        let end =
            if whole.ends_with(after) { whole.len() - after.len() } else { whole.len() - common_suffix(whole, after) };
        let start = if whole.starts_with(before) {
            before.len()
        } else {
            // The content changes the text before it: the template rewrites reasoning. The model
            // generates that text too, from the turn's header on.
            let common = common_prefix(whole, before);
            let header = self.text.header();
            let found = whole[..common].rfind(header).filter(|_| !header.is_empty()).map(|at| at + header.len());
            found.unwrap_or(common)
        };
        let start = start.max(from);
        Ok(Some(start..end.max(start)))
    }

    /// Index of the special token after byte `at`, ignoring white space.
    fn special_after(&self, text: &str, ids: &[i64], spans: &[Span], at: usize) -> Option<usize> {
        let white = |span: &Span| text.get(span.clone()).is_none_or(|text| text.trim().is_empty());
        let next = (0..ids.len()).find(|&i| spans[i].start >= at && spans[i].end > at && !white(&spans[i]))?;
        Some(next).filter(|&i| self.text.is_special(ids[i]))
    }
}

fn overlap(a: &Span, b: &Span) -> bool {
    a.start < b.end && a.end > b.start
}

/// Tokens from the first to the last that share a byte with `range`. A tokenizer that trims offsets
/// gives white space tokens no bytes: such a token counts inside the range, but not at its start.
fn overlapping(spans: &[Span], range: &Span) -> Option<std::ops::Range<usize>> {
    let inside = |span: &Span| {
        if span.is_empty() { range.start < span.start && span.end < range.end } else { overlap(span, range) }
    };
    let first = spans.iter().position(inside)?;
    let last = spans.iter().rposition(inside)?;
    Some(first..last + 1)
}

fn common_prefix(a: &str, b: &str) -> usize {
    let bytes = a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count();
    a.floor_char_boundary(bytes)
}

fn common_suffix(a: &str, b: &str) -> usize {
    let bytes = a.bytes().rev().zip(b.bytes().rev()).take_while(|(a, b)| a == b).count();
    a.len() - a.ceil_char_boundary(a.len() - bytes)
}
