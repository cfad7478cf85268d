//! Plan of `cpift-eval run`: rows, settings and prompts of every task, checked before any is
//! scored.

use anyhow::Result;
use cpift_core::BadInput;
use cpift_core::format::digest::Digest;
use cpift_core::format::tasks::{Task, Tasks};
use cpift_data::{self as data, ChatText, Encoded, Layout, Overlong, Row, encode_rows};
use cpift_torch::session::ModelInfo;

use crate::args::RunArgs;
use crate::metrics::{self, Prepared, Settings, TaskView};
use crate::prompt::{PromptBuilder, PromptStyle};

/// A task to score.
pub(crate) struct TaskPlan {
    pub(crate) inputs: TaskInputs,
    /// Reference answers as tokens, for the loss.
    pub(crate) examples: Encoded,
    /// The task's own metric with its prompts.
    pub(crate) metric: Box<dyn Prepared>,
}

/// Rows and settings of a task.
pub(crate) struct TaskInputs {
    pub(crate) task: Task,
    /// Rows to score.
    pub(crate) rows: Vec<Row>,
    /// Rows before them that are left out.
    pub(crate) skipped: usize,
    /// Digest of the evaluation file.
    pub(crate) digest: Digest,
    /// Number of examples before every question.
    pub(crate) few_shot: usize,
    /// Seed of the choice of examples.
    pub(crate) seed: u64,
    pub(crate) settings: Settings,
    pub(crate) style: PromptStyle,
    /// Training rows to draw examples from; empty without examples.
    train: Vec<Row>,
}

impl TaskPlan {
    /// Reads the tasks to score in the order of tasks.toml, checks all rows, and tokenises them.
    ///
    /// # Errors
    /// [`cpift_core::BadInput`] and [`cpift_core::Usage`] for rows that cannot be encoded or that a
    /// metric or [`PromptBuilder::new`] refuses.
    pub(crate) fn read(args: &RunArgs, tasks: &Tasks, model: &ModelInfo) -> Result<Vec<Self>> {
        let chosen = tasks.selected(&args.only)?.into_iter();
        let inputs: Vec<TaskInputs> = chosen.map(|task| TaskInputs::read(args, task, model)).collect::<Result<_>>()?;
        inputs.into_iter().map(|inputs| Self::prepare(inputs, model)).collect()
    }

    fn prepare(inputs: TaskInputs, model: &ModelInfo) -> Result<Self> {
        let prompter = inputs.prompter(&model.text, model.numbers.max_position_embeddings as usize)?;
        let TaskInputs { task, rows, settings, .. } = &inputs;
        let chat = model.text.with(&task.template_args);
        let examples = encode_rows(&task.eval, rows, chat, settings.max_length, Overlong::Truncate)?;
        examples.warn_of_template(&task.name);
        let metric = metrics::of(task.metric).prepare(&inputs.view(&prompter))?;
        Ok(Self { inputs, examples, metric })
    }
}

impl TaskInputs {
    fn read(args: &RunArgs, task: &Task, model: &ModelInfo) -> Result<Self> {
        let digest = Digest::of_file(&task.eval)?;
        let layout = Layout::of(task)?;
        let mut rows = data::read_rows(&task.eval, &layout)?;
        if args.skip >= rows.len() {
            return Err(BadInput::new(&task.eval, "no row left to score after those of --skip")
                .expected(format!("more than {} rows", args.skip))
                .found(rows.len().to_string())
                .into());
        }
        rows.drain(..args.skip);
        rows.truncate(args.limit.unwrap_or(usize::MAX));
        let few_shot = args.few_shot.unwrap_or(task.few_shot);
        let train = if few_shot > 0 { data::read_rows(&task.train, &layout)? } else { Vec::new() };
        let settings = Settings {
            batch_size: args.inference.batch_size,
            max_new_tokens: args.max_new_tokens.unwrap_or(task.max_new_tokens),
            max_length: model.context_of(task, None),
            sampling: args.sampling(),
        };
        Ok(Self {
            task: task.clone(),
            rows,
            skipped: args.skip,
            digest,
            few_shot,
            seed: args.seed,
            settings,
            style: args.prompt,
            train,
        })
    }

    /// The prompt builder for a model with this tokenizer and `context`.
    ///
    /// # Errors
    /// As [`PromptBuilder::new`].
    pub(crate) fn prompter<'a>(&'a self, text: &'a ChatText, context: usize) -> Result<PromptBuilder<'a>> {
        PromptBuilder::new((text, context), &self.task, self.style, (&self.train, self.few_shot, self.seed))
    }

    /// The task as its metric sees it.
    pub(crate) fn view<'a>(&'a self, prompter: &'a PromptBuilder<'a>) -> TaskView<'a> {
        TaskView { task: &self.task, rows: &self.rows, settings: &self.settings, prompter }
    }
}
