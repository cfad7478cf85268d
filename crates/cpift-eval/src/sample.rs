//! `cpift-eval sample`: rows that a model writes itself, to be replayed while it learns something
//! new. It answers the prompts of given rows, or writes whole conversations from its chat template.

use std::path::{Path, PathBuf};

use anyhow::Result;
use cpift_core::BadInput;
use cpift_core::error::usage;
use cpift_core::files::{StagedFile, check_not_input, check_output};
use cpift_core::format::digest::Digest;
use cpift_core::format::tasks::{Task, Tasks};
use cpift_core::record::provenance::Recorder;
use cpift_core::record::up_to_date::Expected;
use cpift_core::run::cli::Common;
use cpift_core::run::progress;
use cpift_core::stream::random::{seed_for, splitmix64};
use cpift_data::{self as data, Chat, Layout, Message};
use cpift_torch::generate::{Generated, GenerationOptions, Sampling, generate};
use cpift_torch::session::{ModelInfo, Session};
use cpift_torch::workers::Workers;
use log::{info, warn};
use serde_json::{Map, Value, json};

use crate::args::SampleArgs;
use crate::run::STAGE;

/// Stands for the user's turn when the text that a template writes before it is asked for.
const MARK: &str = "cpift-user-turn";

/// Conversations whose missing turns the model writes: those of a task, or of none.
struct Source<'a> {
    /// Task of the prompts; `None` for whole conversations.
    name: Option<&'a str>,
    chat: Chat<'a>,
    /// Turns before each answer; the last user turn of whole conversations is still empty.
    turns: Vec<Vec<Message>>,
    max_new_tokens: usize,
}

/// Rows that were left out.
#[derive(Default)]
struct LeftOut {
    /// Generation reached its limit before the end of turn.
    unfinished: usize,
    /// A turn without text.
    empty: usize,
    /// The prompt leaves no room in the model's context.
    too_long: usize,
}

/// Generates the rows and writes them as JSON lines.
///
/// # Errors
/// [`cpift_core::Usage`] and [`BadInput`] before anything is generated; no row that can be used.
pub(crate) fn run(args: &SampleArgs, common: &Common) -> Result<()> {
    args.check()?;
    let recorder = Recorder::start(STAGE);
    args.inference.on_ranks(common, |workers| sample(args, common, workers, recorder))
}

fn sample(args: &SampleArgs, common: &Common, workers: &Workers, mut recorder: Recorder) -> Result<()> {
    if workers.agree("the output is up to date", || common.up_to_date(&Expected::new(STAGE, &args.out)))? {
        return Ok(());
    }
    check_output(&args.out, common.force())?;
    let list = args.tasks.as_deref().map(Tasks::read).transpose()?;
    let tasks = list.as_ref().map_or_else(|| Ok(Vec::new()), |list| list.selected(&args.only))?;
    let inputs = [&args.model].into_iter().chain(&args.tasks).chain(tasks.iter().map(|task| &task.train));
    check_not_input("--out", &args.out, inputs.map(PathBuf::as_path))?;
    let template = list.as_ref().map(Tasks::template).transpose()?.flatten();
    let device = workers.placement.device;
    let info = ModelInfo::open(&args.model, template)?;
    let none = Map::new();
    let sources: Vec<Source<'_>> = match &list {
        Some(_) => tasks.iter().map(|task| asked(args, task, &info)).collect::<Result<_>>()?,
        None => vec![whole(args, info.text.with(&none))],
    };
    let mut session = Session::for_inference(&args.model, template, device, args.inference.kind(device))?;
    session.model.row_sharers = workers.placement.group.clone();
    workers.check_same(&Map::from_iter([("model".to_owned(), json!(session.digest))]))?;
    let mut text = String::new();
    let mut counts = Map::new();
    for source in &sources {
        let (rows, left_out) = source.generate(args, &session)?;
        warn_of_left_out(source, &left_out);
        for messages in &rows {
            text += &format!("{}\n", json!({"messages": turns_of(messages)}));
        }
        let name = source.name.unwrap_or("conversations");
        info!("{name}: {} rows", rows.len());
        counts.insert(name.to_owned(), rows.len().into());
    }
    if text.is_empty() {
        return Err(BadInput::new(&args.model, "the model wrote no row that can be used")
            .hint("raise --max-new-tokens, so that answers reach their end, or --rows")
            .into());
    }
    if !workers.leads() {
        return Ok(());
    }
    recorder.seed(args.seed);
    recorder.input("model", &args.model, session.digest.clone());
    if let Some(list) = &list {
        recorder.tasks(list, tasks.iter().map(|task| task.name.as_str()))?;
    }
    for task in &tasks {
        recorder.input(format!("train:{}", task.name), &task.train, Digest::of_file(&task.train)?);
    }
    recorder.fact("rows", counts.clone());
    recorder.commit(StagedFile::of_text(&args.out, &text, common.force())?.into_path(), &[])?;
    common.print_json(&json!({"rows": counts, "out": args.out.display().to_string()}));
    Ok(())
}

/// The turns as columns of a row. Of the answers only the last, the model's own, is trained on.
fn turns_of(messages: &[Message]) -> Vec<Value> {
    let turn = |(i, message): (usize, &Message)| {
        let mut turn = json!({"role": message.role, "content": message.content});
        if message.role == "assistant" && i + 1 < messages.len() {
            turn["train"] = json!(false);
        }
        turn
    };
    messages.iter().enumerate().map(turn).collect()
}

/// The prompts of the first rows of a task's training file.
fn asked<'a>(args: &SampleArgs, task: &'a Task, model: &'a ModelInfo) -> Result<Source<'a>> {
    let mut rows = data::read_rows(&task.train, &Layout::of(task)?)?;
    rows.truncate(args.rows);
    Ok(Source {
        name: Some(&task.name),
        chat: model.text.with(&task.template_args),
        turns: rows.iter().map(|row| row.prompt().to_vec()).collect(),
        max_new_tokens: args.max_new_tokens.unwrap_or(task.max_new_tokens),
    })
}

/// Conversations of which nothing is given.
fn whole<'a>(args: &SampleArgs, chat: Chat<'a>) -> Source<'a> {
    let turns = vec![vec![Message::new("user", String::new())]; args.rows];
    Source { name: None, chat, turns, max_new_tokens: args.max_new_tokens.unwrap_or(256) }
}

impl Source<'_> {
    /// Generates the missing turns. Returns the usable conversations.
    fn generate(&self, args: &SampleArgs, session: &Session) -> Result<(Vec<Vec<Message>>, LeftOut)> {
        let mut left_out = LeftOut::default();
        let mut turns = self.turns.clone();
        let seed = seed_for(args.seed, self.name.unwrap_or_default());
        if self.name.is_none() {
            let (opening, end) = self.around_the_user(&args.model)?;
            let openings = vec![opening; turns.len()];
            let users = self.complete(args, session, openings, &[end], splitmix64(seed, 1), &mut left_out)?;
            turns = users.into_iter().flatten().map(|text| vec![Message::new("user", text)]).collect();
        }
        let prompts: Vec<String> = turns.iter().map(|turns| self.chat.prompt(turns)).collect::<Result<_>>()?;
        let answers = self.complete(args, session, prompts, &[], seed, &mut left_out)?;
        let answered = |(mut turns, answer): (Vec<Message>, Option<String>)| {
            turns.push(Message::new("assistant", answer?));
            Some(turns)
        };
        Ok((turns.into_iter().zip(answers).filter_map(answered).collect(), left_out))
    }

    /// The texts that the chat template writes before and after the user's turn.
    fn around_the_user(&self, model: &Path) -> Result<(String, String)> {
        let text = self.chat.render(&[Message::new("user", MARK)], false)?;
        let at = text.find(MARK).ok_or_else(|| {
            BadInput::new(model, "the chat template does not write the user's turn")
                .hint("give rows to answer instead: --tasks FILE")
        })?;
        if self.chat.text().encode(&text[..at])?.is_empty() {
            return Err(BadInput::new(
                model,
                "the chat template writes nothing before the user's turn to continue from",
            )
            .hint("give rows to answer instead: --tasks FILE")
            .into());
        }
        Ok((text[..at].to_owned(), text[at + MARK.len()..].trim().to_owned()))
    }

    /// Samples the text after each of `prompts`, up to the end of turn or the first of `stop`;
    /// `None` for what cannot be used.
    fn complete(
        &self,
        args: &SampleArgs,
        session: &Session,
        prompts: Vec<String>,
        stop: &[String],
        seed: u64,
        left_out: &mut LeftOut,
    ) -> Result<Vec<Option<String>>> {
        let context = session.model.config.max_position_embeddings as usize;
        let ids = prompts.iter().map(|text| self.chat.text().encode(text)).collect::<Result<Vec<_>>>()?;
        let fits: Vec<bool> = ids.iter().map(|ids| ids.len() + self.max_new_tokens < context).collect();
        left_out.too_long += fits.iter().filter(|fits| !**fits).count();
        let fitting: Vec<Vec<i64>> =
            ids.into_iter().zip(&fits).filter(|(_, fits)| **fits).map(|(ids, _)| ids).collect();
        let options = GenerationOptions {
            eos_ids: &session.text.stop_ids(),
            stop,
            max_new_tokens: self.max_new_tokens,
            batch_size: args.inference.batch_size,
            sampling: Some(Sampling { temperature: args.temperature, top_p: args.top_p, seed }),
        };
        let bar = progress::items("samples", fitting.len() as u64);
        let mut texts = generate(&session.model, &session.text, &fitting, &options, || bar.inc(1))?.into_iter();
        bar.finish_and_clear();
        let usable = |generated: Generated, left_out: &mut LeftOut| {
            if generated.ids.len() >= self.max_new_tokens {
                left_out.unfinished += 1;
            } else if generated.text.trim().is_empty() {
                left_out.empty += 1;
            } else {
                return Some(generated.text);
            }
            None
        };
        Ok(fits.iter().map(|fits| if *fits { usable(texts.next()?, left_out) } else { None }).collect())
    }
}

fn warn_of_left_out(source: &Source<'_>, left_out: &LeftOut) {
    let name = source.name.unwrap_or("conversations");
    for (count, why) in [
        (left_out.unfinished, "did not end within --max-new-tokens"),
        (left_out.empty, "were empty"),
        (left_out.too_long, "had prompts that leave no room in the model's context"),
    ] {
        if count > 0 {
            warn!("{name}: {count} samples {why}: left out");
        }
    }
}

impl SampleArgs {
    /// Checks the ranges of the values.
    fn check(&self) -> Result<()> {
        let problem = if self.rows == 0 || self.max_new_tokens == Some(0) {
            "--rows and --max-new-tokens must be at least 1"
        } else if !(self.temperature > 0.0 && self.temperature.is_finite()) {
            "--temperature must be above 0"
        } else if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            "--top-p must be above 0 and at most 1"
        } else {
            return Ok(());
        };
        Err(usage(problem))
    }
}
