//! What `cpift-eval run` will score: the rows and settings of every task, checked before any of them is scored.

use anyhow::Result;
use cpift_core::format::digest::Digest;
use cpift_core::format::tasks::{Task, Tasks};
use cpift_data::{self as data, ChatText, Layout, Row};
use cpift_torch::session::ModelInfo;

use crate::args::RunArgs;
use crate::metrics::{self, Settings};
use crate::prompt::{PromptBuilder, PromptStyle};

/// A task to score.
pub struct TaskPlan {
    /// The task.
    pub task: Task,
    /// The rows to score.
    pub rows: Vec<Row>,
    /// Of the file they came from.
    pub digest: Digest,
    /// Examples before every question.
    pub few_shot: usize,
    /// What its figures depend on.
    pub settings: Settings,
    /// How rows become prompts.
    pub style: PromptStyle,
    /// The training rows that examples are drawn from; none are read where there are to be none.
    train: Vec<Row>,
    seed: u64,
}

impl TaskPlan {
    /// Reads and checks the tasks to score, in the order of tasks.toml.
    ///
    /// # Errors
    /// [`cpift_core::BadInput`] and [`cpift_core::Usage`] as [`metrics::check`], and for what [`PromptBuilder::new`] refuses.
    pub fn read(args: &RunArgs, tasks: &Tasks, model: &ModelInfo) -> Result<Vec<Self>> {
        args.only.iter().try_for_each(|name| tasks.named(name).map(drop))?;
        let chosen = tasks.list.iter().filter(|task| args.only.is_empty() || args.only.contains(&task.name));
        let plans: Vec<Self> = chosen.map(|task| Self::of(args, task, model)).collect::<Result<_>>()?;
        let context = model.numbers.max_position_embeddings as usize;
        for plan in &plans {
            let prompter = plan.prompter(&model.text, context)?;
            metrics::check(&model.text, &prompter, &plan.task, &plan.rows, &plan.settings)?;
        }
        Ok(plans)
    }

    fn of(args: &RunArgs, task: &Task, model: &ModelInfo) -> Result<Self> {
        let digest = Digest::of_file(&task.eval)?;
        let layout = Layout::of(task)?;
        let mut rows = data::read_rows(&task.eval, &layout)?;
        rows.truncate(args.limit.unwrap_or(usize::MAX));
        let few_shot = args.few_shot.unwrap_or(task.few_shot);
        let train = if few_shot > 0 { data::read_rows(&task.train, &layout)? } else { Vec::new() };
        let settings = Settings {
            batch_size: args.batch_size,
            max_new_tokens: args.max_new_tokens.unwrap_or(task.max_new_tokens),
            max_length: model.context_of(task, None),
            sampling: args.sampling(),
        };
        Ok(Self { task: task.clone(), rows, digest, few_shot, settings, style: args.prompt, train, seed: args.seed })
    }

    /// Makes the prompts for a model with this tokenizer and `context`.
    ///
    /// # Errors
    /// As [`PromptBuilder::new`].
    pub fn prompter<'a>(&'a self, text: &'a ChatText, context: usize) -> Result<PromptBuilder<'a>> {
        PromptBuilder::new((text, context), &self.task, self.style, (&self.train, self.few_shot, self.seed))
    }
}
