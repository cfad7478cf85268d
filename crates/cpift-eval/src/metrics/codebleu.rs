//! `codebleu`: CodeBLEU of the code in the answer. Rows in unsupported languages are skipped, not
//! scored as 0.

use anyhow::Result;
use cpift_codebleu::{Counts, Language, NoDataFlow, parses};
use cpift_core::BadInput;
use cpift_core::format::scores::MetricValue;
use cpift_core::format::tasks::Task;
use cpift_data::Row;
use cpift_torch::session::Session;
use log::warn;
use serde_json::{Map, Value, json};

use super::generated::{Prompts, prompt};
use super::metric::{FRACTION, Grade, Lines, Metric, Prepared, Scored, TaskView};
use crate::fields::{field_error, reference};

/// `codebleu`: the figures of the PyPI package, with the components and the corpus figure.
pub(crate) struct Codebleu;

impl Metric for Codebleu {
    fn key(&self) -> &'static str {
        "codebleu"
    }

    fn name(&self) -> &'static str {
        "codebleu"
    }

    fn unit(&self) -> &'static str {
        FRACTION
    }

    fn summary(&self) -> &'static str {
        "CodeBLEU of the code in the answer"
    }

    /// # Errors
    /// [`BadInput`] if no row names its language, or tasks.toml names an unsupported one.
    fn prepare(&self, view: &TaskView<'_>) -> Result<Box<dyn Prepared>> {
        let TaskView { task, rows, .. } = *view;
        let references: Vec<String> = rows.iter().map(|row| reference(task, row)).collect::<Result<_>>()?;
        let language = |name: Option<&str>| match name.and_then(Language::named) {
            Some(language) => Ok(language),
            None => Err(name.unwrap_or("no language").to_owned()),
        };
        let languages: Vec<_> = names(task, rows, &references)?.into_iter().map(language).collect();
        let known = rows.iter().zip(&languages).filter(|(_, language)| language.is_ok());
        let prompts: Prompts = known.map(|(row, _)| prompt(view, row)).collect::<Result<_>>()?;
        Ok(Box::new(Code { name: self.name(), references, languages, prompts }))
    }
}

/// The prompts of the rows in supported languages.
struct Code {
    name: &'static str,
    references: Vec<String>,
    /// Language of each row; the error is the name of an unsupported one.
    languages: Vec<Result<Language, String>>,
    prompts: Prompts,
}

impl Prepared for Code {
    fn score(&self, session: &Session, view: &TaskView<'_>) -> Result<Scored> {
        let TaskView { task, rows, .. } = *view;
        let mut answers = self.prompts.answers(session, view)?.into_iter();
        let (mut lines, mut counts) = (Lines::new(self.name), Vec::new());
        for ((row, language), reference) in rows.iter().zip(&self.languages).zip(&self.references) {
            match language {
                Ok(language) => {
                    let answer = answers.next().expect("an answer to each row in a supported language");
                    let (count, grade) = grade(*language, reference, &answer.output);
                    counts.push(count);
                    lines.add(row, grade, answer.line(reference));
                }
                Err(name) => lines.skip(row, json!({"reference": reference, "skipped": name})),
            }
        }
        let skipped = rows.len() - counts.len();
        if skipped > 0 {
            warn!(
                "{}: {skipped} of {} rows are in no language that codebleu supports ({})",
                task.name,
                rows.len(),
                all_languages()
            );
        }
        let mut scored = lines.scored(self.prompts.cut);
        scored.skipped = skipped;
        scored.also.extend(corpus(&counts));
        scored.settings.push(("language", json!(task.language)));
        Ok(scored)
    }
}

fn all_languages() -> String {
    Language::ALL.map(Language::name).join(", ")
}

/// Name of each row's language, supported or not.
fn names<'a>(task: &'a Task, rows: &'a [Row], references: &'a [String]) -> Result<Vec<Option<&'a str>>> {
    if let Some(name) = task.language.as_deref().filter(|name| Language::named(name).is_none()) {
        let message = format!("codebleu does not support the language of task {}", task.name);
        return Err(BadInput::new(&task.listed_in, message).expected(all_languages()).found(name).into());
    }
    let names: Vec<Option<&str>> = rows.iter().zip(references).map(|(row, r)| language_name(task, row, r)).collect();
    if names.iter().all(Option::is_none) {
        let found = rows[0].fields.get("language").unwrap_or(&Value::Null);
        let expected = "the name of a language in the rows, or language = \"python\" for the task in tasks.toml";
        return Err(field_error(task, &rows[0], "language", expected, found).into());
    }
    Ok(names)
}

/// The language of the task, else of the row, else of the reference's code fence.
fn language_name<'a>(task: &'a Task, row: &'a Row, reference: &'a str) -> Option<&'a str> {
    let field = || row.fields.get("language").and_then(Value::as_str);
    task.language.as_deref().or_else(field).or_else(|| fenced(reference)?.0)
}

/// Counts of the pair for the corpus figure, and the row's own figures.
fn grade(language: Language, reference: &str, output: &str) -> (Counts, Grade) {
    let code = |text| fenced(text).map_or(text, |(_, code)| code);
    let (reference, candidate) = (code(reference), code(output));
    let counts = Counts::of(language, reference, candidate);
    let score = counts.score(NoDataFlow::CountsOne);
    let also = vec![
        ("codebleu_original", counts.score(NoDataFlow::CountsZero).codebleu),
        ("ngram_match", score.ngram),
        ("weighted_ngram_match", score.weighted_ngram),
        ("syntax_match", score.syntax),
        ("dataflow_match", score.data_flow),
        ("parses", f64::from(parses(language, candidate))),
    ];
    let extracted =
        Map::from_iter([("extracted".to_owned(), json!(candidate)), ("language".to_owned(), json!(language.name()))]);
    (counts, Grade { score: score.codebleu, also, extracted })
}

/// The first block fenced by three backticks (up to the end if unclosed), and the name after the
/// opening fence.
fn fenced(text: &str) -> Option<(Option<&str>, &str)> {
    let open = if text.starts_with("```") { 0 } else { text.find("\n```")? + 1 };
    let (head, body) = text[open + 3..].split_once('\n')?;
    let name = head.split_whitespace().next();
    let end = if body.starts_with("```") { 0 } else { body.find("\n```").map_or(body.len(), |at| at + 1) };
    Some((name, &body[..end]))
}

/// CodeBLEU of all pairs as one corpus, as computed by the package for lists, with the jackknife
/// standard error.
fn corpus(counts: &[Counts]) -> Option<MetricValue> {
    let n = counts.len();
    let sums = |list: &mut dyn Iterator<Item = &Counts>| -> Vec<Counts> {
        let mut sum = Counts::default();
        let after = list.map(|c| {
            sum += *c;
            sum
        });
        [Counts::default()].into_iter().chain(after).collect()
    };
    let (before, after) = (sums(&mut counts.iter()), sums(&mut counts.iter().rev()));
    let value = |counts: Counts| counts.score(NoDataFlow::CountsOne).codebleu;
    let without = |i: usize| {
        let mut rest = before[i];
        rest += after[n - 1 - i];
        value(rest)
    };
    let left_out: Vec<f64> = (0..n).map(without).collect();
    let mean = left_out.iter().sum::<f64>() / n as f64;
    let squares: f64 = left_out.iter().map(|v| (v - mean).powi(2)).sum();
    let stderr = (n > 1).then(|| (squares * (n - 1) as f64 / n as f64).sqrt());
    let figure = |total| MetricValue { name: "corpus_codebleu".to_owned(), value: value(total), stderr, n: n as u64 };
    before.last().filter(|_| n > 0).copied().map(figure)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_is_what_stands_in_the_first_fence() {
        assert_eq!(fenced("Here:\n```python\nx = 1\n```\nand\n```\ny\n```"), Some((Some("python"), "x = 1\n")));
        assert_eq!(fenced("```\nx"), Some((None, "x")));
        assert_eq!(fenced("```c\n```"), Some((Some("c"), "")));
        assert_eq!(fenced("x = `1`"), None);
    }

    #[test]
    fn the_corpus_is_the_sum_of_its_pairs() {
        let pair = |a, b| Counts::of(Language::Python, a, b);
        let pairs = [pair("x = 1\ny = x", "x = 1\ny = x"), pair("for i in a:\n    print(i)", "return 1")];
        let figure = corpus(&pairs).unwrap();
        let mut both = pairs[0];
        both += pairs[1];
        assert_eq!((figure.value, figure.n), (both.score(NoDataFlow::CountsOne).codebleu, 2));
        // Of two, each left out in turn: half the distance of the two values.
        let [a, b] = pairs.map(|p| p.score(NoDataFlow::CountsOne).codebleu);
        assert!((figure.stderr.unwrap() - (a - b).abs() / 2.0).abs() < 1e-12, "{figure:?}");
        assert_eq!(corpus(&pairs[..1]).unwrap().stderr, None);
        assert_eq!(corpus(&[]), None);
    }
}
