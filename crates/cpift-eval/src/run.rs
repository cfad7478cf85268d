//! `cpift-eval run`: scores one checkpoint on every task, by a plan in which rows, settings and
//! prompts of all tasks are checked before any is scored; and `cpift-eval join`: joins the scores
//! from several runs into the directory that one run would have written.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cpift_core::error::usage;
use cpift_core::files::{self, StagedDir, check_not_input, check_output};
use cpift_core::format::digest::Digest;
use cpift_core::format::scores::{self, FORMAT_VERSION, OUTPUTS, Scores, TaskScore};
use cpift_core::format::tasks::{Task, Tasks};
use cpift_core::record::provenance::Recorder;
use cpift_core::record::up_to_date::Expected;
use cpift_core::run::cli::Common;
use cpift_core::{BadInput, Checkpoint};
use cpift_data::{self as data, ChatText, Encoded, Layout, Overlong, Row, encode_rows};
use cpift_judge::verdicts;
use cpift_torch::memory;
use cpift_torch::score::ExampleLoss;
use cpift_torch::session::{ModelInfo, Session};
use cpift_torch::workers::Workers;
use log::{info, warn};
use serde_json::{Map, Value, json};
use tch::Kind;

use crate::args::{JoinArgs, RunArgs};
use crate::metrics::{self, Loss, Prepared, Settings, TaskView};
use crate::prompt::{PromptBuilder, PromptStyle};

/// Name of the program in its records.
pub(crate) const STAGE: &str = env!("CARGO_PKG_NAME");

/// Scores every task and writes the output directory.
///
/// # Errors
/// [`cpift_core::Usage`] and [`cpift_core::BadInput`] before any task is scored; a figure that is
/// not finite. Nothing is written then.
pub(crate) fn run(args: &RunArgs, common: &Common) -> Result<()> {
    args.check()?;
    let recorder = Recorder::start(STAGE);
    args.inference.on_ranks(common, |workers| score(args, common, workers, recorder))
}

/// Scores every task; with several ranks each has the model, all share the rows, and rank 0 writes.
fn score(args: &RunArgs, common: &Common, workers: &Workers, mut recorder: Recorder) -> Result<()> {
    if workers.agree("the output is up to date", || up_to_date(common, &args.out))? {
        return Ok(());
    }
    check_output(&args.out, common.force())?;
    let list = Tasks::read(&args.tasks)?;
    let device = workers.placement.device;
    if !device.is_cuda() {
        let size = |file: &Path| fs::metadata(file).map_or(0, |file| file.len());
        let bytes: u64 = Checkpoint::open(&args.model)?.files().map(size).sum();
        // The weights are mapped and also copied into memory.
        memory::check_address_space(2 * bytes)?;
    }
    let plans = TaskPlan::read(args, &list, &ModelInfo::open(&args.model, list.template()?)?)?;
    let kind = args.inference.kind(device);
    let mut session = Session::for_inference(&args.model, list.template()?, device, kind)?;
    session.model.row_sharers = workers.placement.group.clone();
    workers.check_same(&describe(&session, &plans))?;
    recorder.input("model", &args.model, session.digest.clone());
    recorder.tasks(&list, plans.iter().map(|plan| plan.inputs.task.name.as_str()))?;
    [scores::FILE_NAME, OUTPUTS].iter().for_each(|name| recorder.also(&args.out.join(name)));
    let staged = workers.leads().then(|| StagedDir::create(&args.out, common.force())).transpose()?;
    let mut outputs: Box<dyn Write> = match &staged {
        Some(staged) => {
            let file = File::create(staged.path().join(OUTPUTS)).context("creating outputs.jsonl")?;
            Box::new(BufWriter::new(file))
        }
        None => Box::new(io::sink()),
    };
    let mut tasks = Vec::new();
    for plan in plans {
        let TaskInputs { task, digest, few_shot, .. } = &plan.inputs;
        recorder.input(format!("eval:{}", task.name), &task.eval, digest.clone());
        if *few_shot > 0 {
            recorder.input(format!("train:{}", task.name), &task.train, Digest::of_file(&task.train)?);
        }
        tasks.push(score_task(&session, kind, &plan, &mut outputs)?);
    }
    outputs.flush().context("writing outputs.jsonl")?;
    let Some(staged) = staged else { return Ok(()) };
    let scores = Scores {
        format_version: FORMAT_VERSION,
        model: args.model.display().to_string(),
        model_digest: session.digest.clone(),
        tasks,
    };
    scores.write(&staged.path().join(scores::FILE_NAME), false)?;
    keep_verdicts([args.out.as_path()], staged.path())?;
    recorder.write_into_for(staged.path(), scores::FILE_NAME)?;
    staged.commit()?;
    common.print_json(&json!(scores));
    Ok(())
}

/// Inputs that all ranks must have alike.
fn describe(session: &Session, plans: &[TaskPlan]) -> Map<String, Value> {
    let mut run = Map::from_iter([("model".to_owned(), json!(session.digest))]);
    for plan in plans {
        run.insert(format!("eval:{}", plan.inputs.task.name), json!(plan.inputs.digest));
    }
    run
}

/// Returns true if `--skip-up-to-date` is given and the directory of an evaluation is up to date.
pub(crate) fn up_to_date(common: &Common, out: &Path) -> bool {
    let made = [scores::FILE_NAME, OUTPUTS].map(|name| out.join(name));
    common.up_to_date(&Expected { also: made.iter().map(PathBuf::as_path).collect(), ..Expected::new(STAGE, out) })
}

/// Copies a judge's verdicts when a directory is scored again or joined: they are paid for, and
/// each is identified by the answer it grades.
///
/// # Errors
/// As [`verdicts::kept`]; a file that cannot be written.
pub(crate) fn keep_verdicts<'a>(old: impl IntoIterator<Item = &'a Path>, new: &Path) -> Result<()> {
    let kept = verdicts::kept(old)?;
    if kept.is_empty() { Ok(()) } else { files::write_text(&new.join(verdicts::FILE_NAME), &kept, false) }
}

/// Templates that turn rows into conversations, or null: other templates are another test on the
/// same file.
fn templates(task: &Task) -> Value {
    match &task.prompt {
        Some(prompt) => json!({"system": task.system, "prompt": prompt, "completion": task.completion}),
        None => Value::Null,
    }
}

/// Scores a task and appends its rows to `outputs`.
fn score_task(session: &Session, kind: Kind, plan: &TaskPlan, outputs: &mut impl Write) -> Result<TaskScore> {
    let TaskInputs { task, rows, digest, few_shot, seed, settings, style, .. } = &plan.inputs;
    let prompter = plan.inputs.prompter(&session.text, session.model.config.max_position_embeddings as usize)?;
    let loss = Loss::of(session, task, &plan.examples, settings.batch_size)?;
    warn_of_loss(task, &loss, settings.max_length.tokens);
    let scored = plan.metric.score(session, &plan.inputs.view(&prompter))?;
    if scored.prompts_cut > 0 {
        warn!("{}: the beginning of {} prompts was cut to fit the model's context", task.name, scored.prompts_cut);
    }
    write_lines(outputs, task, &loss, scored.lines)?;
    let (perplexity, Loss { nll, truncated, dropped, .. }) = (loss.perplexity(), loss);
    let main = scored.metric.as_ref().map_or(String::new(), |m| format!("{} {:.3}, ", m.name, m.value));
    info!("{}: {main}nll {} ({} rows)", task.name, nll.shown(|x| format!("{x:.4}")), nll.n);
    let sampling = settings.sampling;
    let sampling = sampling.map(|s| json!({"temperature": s.temperature, "top_p": s.top_p, "seed": s.seed}));
    let mut own = BTreeMap::from([
        ("rows", json!(rows.len())),
        ("prompt", json!(style.name())),
        ("few_shot", json!(few_shot)),
        ("compute_dtype", json!(if kind == Kind::Float { "f32" } else { "bf16" })),
        ("sampling", json!(sampling)),
        ("seed", json!((*few_shot > 0).then_some(seed))),
        ("max_new_tokens", json!(settings.max_new_tokens)),
        ("max_length", json!(settings.max_length.tokens)),
        ("truncated", json!(truncated)),
        ("dropped", json!(dropped)),
        ("templates", templates(task)),
        ("template_args", json!(task.template_args)),
        ("prompts_cut", json!(scored.prompts_cut)),
        ("skipped", json!(scored.skipped)),
    ]);
    own.extend((plan.inputs.skipped > 0).then(|| ("first_row", json!(plan.inputs.skipped + 1))));
    own.extend(scored.settings);
    Ok(TaskScore {
        task: task.name.clone(),
        eval_digest: digest.clone(),
        metric: scored.metric,
        also: scored.also.into_iter().chain(perplexity).map(|figure| (figure.name.clone(), figure)).collect(),
        nll,
        settings: own.into_iter().map(|(name, value)| (name.to_owned(), value)).collect(),
    })
}

fn warn_of_loss(task: &Task, loss: &Loss, max_length: usize) {
    let Loss { nll, truncated, dropped, .. } = loss;
    if *truncated > 0 {
        warn!(
            "{}: {truncated} rows are longer than {max_length} tokens: their loss covers the first tokens only, and {dropped} rows have none",
            task.name
        );
    }
    if loss.perplexity().is_none() {
        warn!(
            "{}: a loss of {:.1} nats has no perplexity within the range of f64: it is omitted",
            task.name, nll.value
        );
    }
}

/// Writes the rows' lines with loss and task.
fn write_lines(outputs: &mut impl Write, task: &Task, loss: &Loss, lines: Vec<Value>) -> Result<()> {
    for mut line in lines {
        let row = line["row"].as_u64().and_then(|row| loss.rows.get(&(row as usize)));
        let ExampleLoss { nll, targets } = row.copied().unwrap_or(ExampleLoss { nll: 0.0, targets: 0 });
        (line["nll"], line["targets"], line["task"]) = (json!(nll), json!(targets), json!(task.name));
        writeln!(outputs, "{line}").context("writing outputs.jsonl")?;
    }
    Ok(())
}

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

/// A directory to join.
struct Part {
    folder: PathBuf,
    scores: Scores,
    outputs: String,
}

impl Part {
    /// # Errors
    /// [`BadInput`] if scores.json or outputs.jsonl is missing or malformed.
    fn read(folder: &Path, recorder: &mut Recorder) -> Result<Self> {
        let scores = Scores::read(folder)?;
        let mut outputs = files::read_text(&folder.join(OUTPUTS))?;
        if !outputs.is_empty() && !outputs.ends_with('\n') {
            outputs.push('\n');
        }
        let tasks = scores.tasks.iter().map(|task| task.task.as_str()).collect::<Vec<_>>().join(",");
        for name in [scores::FILE_NAME, OUTPUTS] {
            let path = folder.join(name);
            recorder.input(format!("{name}:{tasks}"), &path, Digest::of_file(&path)?);
        }
        Ok(Self { folder: folder.to_owned(), scores, outputs })
    }
}

/// Joins the directories and writes the output directory.
///
/// # Errors
/// [`cpift_core::Usage`], and [`BadInput`] for scores of different checkpoints or a task scored
/// twice. Nothing is written then.
pub(crate) fn join(args: &JoinArgs, common: &Common) -> Result<()> {
    let mut recorder = Recorder::start(STAGE);
    if up_to_date(common, &args.out) {
        return Ok(());
    }
    check_output(&args.out, common.force())?;
    check_not_input("--out", &args.out, args.parts.iter().map(PathBuf::as_path))?;
    [scores::FILE_NAME, OUTPUTS].iter().for_each(|name| recorder.also(&args.out.join(name)));
    let parts: Vec<Part> = args.parts.iter().map(|folder| Part::read(folder, &mut recorder)).collect::<Result<_>>()?;
    let first = parts.first().ok_or_else(|| usage("no directories to join"))?;
    for part in &parts {
        if part.scores.model_digest != first.scores.model_digest {
            return Err(BadInput::new(
                &part.folder,
                format!("scores of another checkpoint than {}", first.folder.display()),
            )
            .expected(format!("{} ({})", first.scores.model_digest, first.scores.model))
            .found(format!("{} ({})", part.scores.model_digest, part.scores.model))
            .into());
        }
    }
    let joined = Scores {
        format_version: FORMAT_VERSION,
        model: first.scores.model.clone(),
        model_digest: first.scores.model_digest.clone(),
        tasks: tasks(&parts)?,
    };
    let staged = StagedDir::create(&args.out, common.force())?;
    let outputs: String = parts.iter().map(|part| part.outputs.as_str()).collect();
    files::write_text(&staged.path().join(OUTPUTS), &outputs, false)?;
    joined.write(&staged.path().join(scores::FILE_NAME), false)?;
    keep_verdicts(
        [args.out.as_path()].into_iter().chain(parts.iter().map(|part| part.folder.as_path())),
        staged.path(),
    )?;
    recorder.write_into_for(staged.path(), scores::FILE_NAME)?;
    staged.commit()?;
    common.print_json(&json!(joined));
    Ok(())
}

/// Scores of all tasks in the order of the directories.
fn tasks(parts: &[Part]) -> Result<Vec<TaskScore>> {
    let (mut owner, mut all) = (BTreeMap::new(), Vec::new());
    for part in parts {
        for score in &part.scores.tasks {
            if let Some(other) = owner.insert(&score.task, &part.folder) {
                return Err(BadInput::new(&part.folder, format!("task {} is scored twice", score.task))
                    .hint(format!("{} scores it as well: omit one of the two", other.display()))
                    .into());
            }
            all.push(score.clone());
        }
    }
    Ok(all)
}
