//! Prompts: a row through the chat template, or as the plain text of lm-evaluation-harness 0.4.13.

use anyhow::Result;
use clap::ValueEnum;
use cpift_core::BadInput;
use cpift_core::error::usage;
use cpift_core::format::tasks::{Task, TaskMetric};
use cpift_data::{self as data, Chat, ChatText, Message, Row, unusable};
use cpift_torch::generate::Generated;
use rand::SeedableRng;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;
use regex::Regex;
use serde_json::Value;

use crate::fields::choices;

/// Style of the prompts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PromptStyle {
    /// The checkpoint's chat template with the generation prompt
    Chat,
    /// The plain text of lm-evaluation-harness: `Question: …` and `Answer:`; for multiple choice
    /// also `Passage: …` and `Choices:`
    Harness,
}

impl PromptStyle {
    /// Value on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::Harness => "harness",
        }
    }
}

/// Stop texts of harness prompts: those of its task `gsm8k`.
const HARNESS_STOP: [&str; 3] = ["Question:", "</s>", "<|im_end|>"];

/// The prompt of a row.
pub(crate) struct Prompt {
    pub(crate) text: String,
    /// Token ids, cut to fit the model's context.
    pub(crate) ids: Vec<i64>,
    /// Number of tokens cut from the beginning; the answer continues the end.
    pub(crate) cut: usize,
}

/// Builds the prompts of a task.
pub(crate) struct PromptBuilder<'a> {
    chat: Chat<'a>,
    /// Context of the model in tokens.
    context: usize,
    task: &'a Task,
    pub(crate) style: PromptStyle,
    split: Option<Regex>,
    /// Training rows, the number of examples to draw from them per prompt, and the seed.
    examples: (&'a [Row], usize, u64),
}

impl<'a> PromptBuilder<'a> {
    /// For `task` and a model with this tokenizer and `context`, with `few_shot` examples from
    /// `train` before every question, drawn with `seed`.
    ///
    /// # Errors
    /// [`BadInput`] for a `split` that is not a regular expression, or too few training rows.
    pub(crate) fn new(
        (text, context): (&'a ChatText, usize),
        task: &'a Task,
        style: PromptStyle,
        (train, few_shot, seed): (&'a [Row], usize, u64),
    ) -> Result<Self> {
        let split = task.split.as_deref().map(Regex::new).transpose().map_err(|e| {
            BadInput::new(&task.listed_in, format!("task {}: split is not a regular expression: {e}", task.name))
        })?;
        // One more than needed, in case the question itself is among them.
        if few_shot > 0 && train.len() <= few_shot {
            return Err(BadInput::new(&task.train, "too few rows for the examples of a prompt")
                .expected(format!("more than {few_shot}"))
                .found(train.len().to_string())
                .into());
        }
        let chat = text.with(&task.template_args);
        Ok(Self { chat, context, task, style, split, examples: (train, few_shot, seed) })
    }

    /// Texts that end an answer in addition to the model's EOS.
    pub(crate) fn stop(&self) -> Vec<String> {
        match self.style {
            PromptStyle::Chat => Vec::new(),
            PromptStyle::Harness => HARNESS_STOP.map(str::to_owned).to_vec(),
        }
    }

    /// The prompt of `row`, with room for `answer` tokens in the model's context.
    ///
    /// # Errors
    /// [`BadInput`] if the chat template raises or the row lacks a field; [`cpift_core::Usage`] if
    /// the context has no room for a prompt.
    pub(crate) fn prompt(&self, row: &Row, answer: usize) -> Result<Prompt> {
        let text = match self.style {
            PromptStyle::Chat => self.chat.prompt(&self.turns(row)).map_err(|e| unusable(&row.place, &e))?,
            PromptStyle::Harness => self.harness(row)?,
        };
        let ids = self.encode(&text).map_err(|e| unusable(&row.place, &e))?;
        self.within_context(text, ids, answer)
    }

    /// Cuts the beginning of the prompt so that `answer` tokens fit in the model's context.
    fn within_context(&self, text: String, mut ids: Vec<i64>, answer: usize) -> Result<Prompt> {
        let context = self.context;
        if answer >= context {
            let task = &self.task.name;
            return Err(usage(match self.task.metric {
                TaskMetric::Choice => {
                    format!(
                        "an option of {task} ({answer} tokens) leaves no room for a prompt in the model's context of {context} tokens"
                    )
                }
                _ => format!(
                    "max_new_tokens of {task} is {answer} (default: 256), which leaves no room for a prompt in the model's \
                     context of {context} tokens\n  hint: set max_new_tokens in tasks.toml, or --max-new-tokens, below {context}"
                ),
            }));
        }
        let cut = ids.len().saturating_sub(context - answer);
        ids.drain(..cut);
        Ok(Prompt { text, ids, cut })
    }

    /// The text before the last answer of `row` in the example that the loss is computed on: the
    /// chat template, without few-shot examples.
    ///
    /// # Errors
    /// [`BadInput`] if the chat template raises.
    pub(crate) fn before_the_answer(&self, row: &Row) -> Result<String> {
        Ok(data::tokenise(row, self.chat)?.before_last_answer().to_owned())
    }

    /// Splits a generated answer into the answer and the reasoning before it. Answers to harness
    /// prompts have none.
    ///
    /// # Errors
    /// As [`ChatText::decode`].
    pub(crate) fn split_reasoning(&self, answer: Generated) -> Result<(String, Option<String>)> {
        match self.style {
            PromptStyle::Chat => self.chat.split_reasoning(&answer.ids, &answer.text),
            PromptStyle::Harness => Ok((answer.text, None)),
        }
    }

    /// Returns true if a harness prompt of the multiple choice `row` contains the options twice: in
    /// the user's turn, which is the question if there is neither `split` nor a field `question`,
    /// and under `Choices:`.
    pub(crate) fn doubles_options(&self, row: &Row) -> bool {
        let apart = self.split.is_some() || row.fields.get("question").is_some_and(Value::is_string);
        let turn = row.prompt().last().map_or("", |message| message.content.as_str());
        let listed =
            || choices(self.task, row).is_ok_and(|c| c.letters().zip(&c.options).all(|(l, o)| lists(turn, l, o)));
        self.style == PromptStyle::Harness && !apart && listed()
    }

    /// The prompt of `row` and the tokens of each of `answers` after it. Leading tokens shared by
    /// all answers, such as a space that the template writes, belong to the prompt.
    ///
    /// # Errors
    /// As [`PromptBuilder::prompt`], and [`BadInput`] if an answer has no token of its own.
    pub(crate) fn alternatives(&self, row: &Row, answers: &[String]) -> Result<(Prompt, Vec<Vec<i64>>)> {
        let whole = match self.style {
            PromptStyle::Chat => answers.iter().map(|answer| self.answered(row, answer)).collect::<Result<Vec<_>>>()?,
            PromptStyle::Harness => self.harness_answered(row, answers)?,
        };
        let limit = whole.iter().map(|(_, _, start)| *start).min().unwrap_or(0);
        let same = |i: &usize| whole.iter().all(|(_, ids, _)| ids[*i] == whole[0].1[*i]);
        let shared = (0..limit).take_while(same).count();
        let rest: Vec<Vec<i64>> = whole.iter().map(|(_, ids, _)| ids[shared..].to_vec()).collect();
        if rest.iter().any(Vec::is_empty) || shared == 0 {
            return Err(row.place.bad("an option has no token of its own after the prompt").into());
        }
        let longest = rest.iter().map(Vec::len).max().unwrap_or(1);
        let (text, ids, _) = whole.into_iter().next().expect("at least one option");
        Ok((self.within_context(text, ids[..shared].to_vec(), longest)?, rest))
    }

    /// The text before `answer`, the tokens up to its end, and the index of its first token. Prompt
    /// and answer are tokenised together.
    fn answered(&self, row: &Row, answer: &str) -> Result<(String, Vec<i64>, usize)> {
        let mut messages = self.turns(row);
        messages.push(Message::new("assistant", answer));
        let tokens = self.chat.tokenise(&messages).map_err(|e| unusable(&row.place, &e))?;
        let range = tokens.last_answer().ok_or_else(|| {
            row.place.bad(format!("the chat template does not write the answer {answer:?} of the last turn"))
        })?;
        Ok((tokens.before_last_answer().to_owned(), tokens.ids[..range.end].to_vec(), range.start))
    }

    /// The same for each of `answers` to a harness prompt. As in the harness, an answer starts at
    /// the length of the prompt tokenised alone.
    fn harness_answered(&self, row: &Row, answers: &[String]) -> Result<Vec<(String, Vec<i64>, usize)>> {
        let text = self.harness(row)?;
        let encode = |text: &str| self.encode(text).map_err(|e| anyhow::Error::from(unusable(&row.place, &e)));
        let start = encode(&text)?.len();
        answers.iter().map(|answer| Ok((text.clone(), encode(&format!("{text}{answer}"))?, start))).collect()
    }

    /// Chat templates write special tokens themselves; plain text gets those that the tokenizer
    /// adds.
    fn encode(&self, text: &str) -> Result<Vec<i64>> {
        match self.style {
            PromptStyle::Chat => self.chat.text().encode(text),
            PromptStyle::Harness => self.chat.text().encode_with_special(text),
        }
    }

    /// The row's turns, with the examples as turns after its system turn.
    fn turns(&self, row: &Row) -> Vec<Message> {
        let own = row.prompt();
        let (system, turns) = own.split_at(own.iter().take_while(|m| m.role == "system").count());
        let not_system = |m: &&Message| m.role != "system";
        let examples = self.examples_for(row);
        let shown = examples.iter().flat_map(|example| example.messages.iter().filter(not_system));
        system.iter().chain(shown).chain(turns).cloned().collect()
    }

    /// Question and answer of each example, separated by blank lines, then the row's question.
    fn harness(&self, row: &Row) -> Result<String> {
        let mut text = String::new();
        for example in self.examples_for(row) {
            let answer = match self.task.metric {
                TaskMetric::Choice => choices(self.task, example)?.right().to_owned(),
                _ => example.reference().to_owned(),
            };
            text += &format!("{} {answer}\n\n", self.harness_question(example)?);
        }
        Ok(text + &self.harness_question(row)?)
    }

    fn harness_question(&self, row: &Row) -> Result<String> {
        let (passage, question) = self.parts(row)?;
        if self.task.metric != TaskMetric::Choice {
            return Ok(format!("Question: {question}\nAnswer:"));
        }
        let passage = passage.map_or(String::new(), |passage| format!("Passage: {passage}\n"));
        let choices = choices(self.task, row)?;
        let options: String = choices.letters().zip(&choices.options).map(|(l, o)| format!("{l}. {o}\n")).collect();
        Ok(format!("{passage}Question: {question}\nChoices:\n{options}Answer:"))
    }

    /// Passage and question of a row: the groups of `split` in the last user turn, or the fields of
    /// these names. Without either the question is the whole turn.
    fn parts<'r>(&self, row: &'r Row) -> Result<(Option<&'r str>, &'r str)> {
        let turn = row.prompt().last().map_or("", |message| message.content.as_str());
        let field = |name: &str| row.fields.get(name).and_then(Value::as_str);
        let Some(split) = &self.split else {
            return Ok((field("passage"), field("question").unwrap_or(turn)));
        };
        let found = split.captures(turn).ok_or_else(|| {
            row.place
                .bad(format!("the split of task {} does not match the user's turn", self.task.name))
                .expected(split.as_str().to_owned())
                .found(format!("{turn:?}"))
        })?;
        let group = |name: &str| found.name(name).map(|m| m.as_str());
        let question = group("question").ok_or_else(|| {
            row.place.bad(format!("the split of task {} has no group (?P<question>…) that matches", self.task.name))
        })?;
        Ok((group("passage"), question))
    }

    /// Training rows drawn with the row number as random stream, so that --limit and --only do not
    /// change them; excludes the row's own question.
    fn examples_for(&self, row: &Row) -> Vec<&'a Row> {
        let (train, count, seed) = self.examples;
        if count == 0 {
            return Vec::new();
        }
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(row.place.row as u64);
        let drawn = train.choose_multiple(&mut rng, count + 1);
        drawn.filter(|example| example.prompt() != row.prompt()).take(count).collect()
    }
}

/// Returns true if a line of `turn` is `option` alone, or `option` after its letter or a bullet.
fn lists(turn: &str, letter: char, option: &str) -> bool {
    let letter = letter.to_string();
    let marked = |line: &str, at: usize| {
        let before = line[..at].split_whitespace().last().unwrap_or_default();
        let mark = before.trim_matches(|c: char| !c.is_alphanumeric());
        mark.is_empty() || mark.eq_ignore_ascii_case(&letter)
    };
    turn.lines().any(|line| line.match_indices(option.trim()).any(|(at, _)| marked(line, at)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listed_options_are_told_from_words_of_the_question() {
        for turn in ["Who?\n\nA. x\nB. some birds", "Who? (A) x (B) some birds", "- x\n- some birds", "x\nsome birds"] {
            assert!(lists(turn, 'B', "some birds"), "{turn}");
        }
        for turn in ["Do some birds fly?", "", "C. some birds"] {
            assert!(!lists(turn, 'B', "some birds"), "{turn}");
        }
    }
}
