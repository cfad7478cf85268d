//! Metrics of generated answers: generation, grading against the reference, and `judge`, whose
//! answers are graded later.

use anyhow::Result;
use cpift_core::format::scores::JUDGE;
use cpift_core::format::tasks::Task;
use cpift_core::run::progress;
use cpift_data::Row;
use cpift_torch::generate::{Generated, GenerationOptions, generate};
use cpift_torch::session::Session;
use serde_json::{Value, json};

use super::metric::{Grade, Lines, Metric, Prepared, Scored, TaskView};
use crate::prompt::Prompt;

/// The prompts of a task.
#[derive(Default)]
pub(super) struct Prompts {
    texts: Vec<String>,
    ids: Vec<Vec<i64>>,
    /// Number of prompts whose beginning was cut to fit the model's context.
    pub(super) cut: usize,
}

impl FromIterator<Prompt> for Prompts {
    fn from_iter<I: IntoIterator<Item = Prompt>>(prompts: I) -> Self {
        let mut all = Self::default();
        for prompt in prompts {
            all.cut += usize::from(prompt.cut > 0);
            all.texts.push(prompt.text);
            all.ids.push(prompt.ids);
        }
        all
    }
}

/// A generated answer.
pub(super) struct Answer {
    /// The answer, cut before a stop text, without preceding reasoning.
    pub(super) output: String,
    /// Reasoning before the answer, with its closing mark.
    reasoning: Option<String>,
    /// Text of the prompt.
    prompt: String,
}

impl Answer {
    /// The row's line of outputs.jsonl, without a grade.
    pub(super) fn line(&self, reference: &str) -> Value {
        let mut line = json!({"prompt": self.prompt, "output": self.output, "reference": reference});
        if let Some(reasoning) = &self.reasoning {
            line["reasoning"] = json!(reasoning);
        }
        line
    }
}

impl Prompts {
    /// Generates an answer to each prompt.
    ///
    /// # Errors
    /// Failures of the tokenizer when it decodes.
    pub(super) fn answers(&self, session: &Session, task: &TaskView<'_>) -> Result<Vec<Answer>> {
        let TaskView { settings, prompter, .. } = task;
        let options = GenerationOptions {
            eos_ids: &session.text.stop_ids(),
            stop: &prompter.stop(),
            max_new_tokens: settings.max_new_tokens,
            batch_size: settings.batch_size,
            sampling: settings.sampling,
        };
        let bar = progress::items("answers", self.ids.len() as u64);
        let answers = generate(&session.model, &session.text, &self.ids, &options, || bar.inc(1))?;
        bar.finish_and_clear();
        let answer = |(prompt, answer): (&String, Generated)| {
            let (output, reasoning) = prompter.split_reasoning(answer)?;
            Ok(Answer { prompt: prompt.clone(), output, reasoning })
        };
        self.texts.iter().zip(answers).map(answer).collect()
    }
}

/// The prompt of a row, with room for the longest answer.
pub(super) fn prompt(task: &TaskView<'_>, row: &Row) -> Result<Prompt> {
    task.prompter.prompt(row, task.settings.max_new_tokens)
}

/// Grades an output against a reference.
pub(super) type Grader = fn(output: &str, reference: &str) -> Grade;

/// Prepares a metric that grades each answer on its own: `reference` reads the reference of a row,
/// `grade` computes figures of which the main one is `name`.
///
/// # Errors
/// As [`Metric::prepare`].
pub(super) fn graded(
    task: &TaskView<'_>,
    name: &'static str,
    reference: impl Fn(&Task, &Row) -> Result<String>,
    grade: Grader,
) -> Result<Box<dyn Prepared>> {
    let asked = |row: &Row| Ok((reference(task.task, row)?, prompt(task, row)?));
    let asked: Vec<(String, Prompt)> = task.rows.iter().map(asked).collect::<Result<_>>()?;
    let (references, prompts) = asked.into_iter().unzip::<_, _, _, Vec<Prompt>>();
    Ok(Box::new(Graded { name, references, prompts: prompts.into_iter().collect(), grade }))
}

struct Graded {
    name: &'static str,
    references: Vec<String>,
    prompts: Prompts,
    grade: Grader,
}

impl Prepared for Graded {
    fn score(&self, session: &Session, task: &TaskView<'_>) -> Result<Scored> {
        let answers = self.prompts.answers(session, task)?;
        let mut lines = Lines::new(self.name);
        for ((row, answer), reference) in task.rows.iter().zip(&answers).zip(&self.references) {
            lines.add(row, (self.grade)(&answer.output, reference), answer.line(reference));
        }
        Ok(lines.scored(self.prompts.cut))
    }
}

/// `judge`: generates answers for `cpift-eval judge`.
pub(crate) struct Judge;

impl Metric for Judge {
    fn key(&self) -> &'static str {
        "judge"
    }

    fn name(&self) -> &'static str {
        "judge"
    }

    fn unit(&self) -> &'static str {
        "1 to 10"
    }

    fn summary(&self) -> &'static str {
        "grade by another model; written by cpift-eval judge"
    }

    fn prepare(&self, task: &TaskView<'_>) -> Result<Box<dyn Prepared>> {
        let prompts: Prompts = task.rows.iter().map(|row| prompt(task, row)).collect::<Result<_>>()?;
        Ok(Box::new(ToJudge(prompts)))
    }
}

struct ToJudge(Prompts);

impl Prepared for ToJudge {
    /// Leaves the metric and the scores out: not judged is not a grade of zero.
    fn score(&self, session: &Session, task: &TaskView<'_>) -> Result<Scored> {
        let answers = self.0.answers(session, task)?;
        let line = |(row, answer): (&Row, &Answer)| {
            let turns: Vec<Value> =
                row.prompt().iter().map(|turn| json!({"role": turn.role, "content": turn.content})).collect();
            let mut line = answer.line(row.reference());
            (line["messages"], line["row"]) = (json!(turns), json!(row.place.row));
            line
        };
        let lines = task.rows.iter().zip(&answers).map(line).collect();
        Ok(Scored { prompts_cut: self.0.cut, lines, settings: vec![(JUDGE, Value::Null)], ..Scored::default() })
    }
}
