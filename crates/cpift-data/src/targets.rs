//! From a conversation to tokens and loss targets, by one rule for training, losses, multiple
//! choice and previews.
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

use anyhow::{Result, bail};

use crate::chat::{Chat, Span};
use crate::conversation::Message;

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
