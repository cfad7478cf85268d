//! `codebleu`: CodeBLEU of the code in the answer, for the rows whose language it is computed for; the others are skipped, not zero.

use anyhow::Result;
use cpift_codebleu::{Counts, Language, NoDataFlow, parses};
use cpift_core::BadInput;
use cpift_core::format::scores::MetricValue;
use cpift_core::format::tasks::Task;
use cpift_data::Row;
use cpift_torch::session::Session;
use log::warn;
use serde_json::{Map, Value, json};

use super::{Grade, Lines, Scored, Settings, field_error, reference};
use crate::answers::answers;
use crate::prompt::PromptBuilder;

/// Checks that languages are named and every row of a known one can be asked.
///
/// # Errors
/// [`cpift_core::BadInput`] when no row says which language it is in, or tasks.toml names one that is not known.
pub fn check(prompter: &PromptBuilder<'_>, task: &Task, rows: &[Row], settings: &Settings) -> Result<()> {
    let references: Vec<String> = rows.iter().map(|row| reference(task, row)).collect::<Result<_>>()?;
    let names = names(task, rows, &references)?;
    let known = rows.iter().zip(names).filter(|(_, name)| name.and_then(Language::named).is_some());
    known.into_iter().try_for_each(|(row, _)| prompter.prompt(row, settings.max_new_tokens).map(drop))
}

/// Generates an answer to each row of a known language and grades it. `skipped` counts the others.
///
/// # Errors
/// As [`check`].
pub fn score(
    session: &Session,
    prompter: &PromptBuilder<'_>,
    task: &Task,
    rows: &[Row],
    settings: &Settings,
) -> Result<Scored> {
    let references: Vec<String> = rows.iter().map(|row| reference(task, row)).collect::<Result<_>>()?;
    let names = names(task, rows, &references)?;
    let languages: Vec<Option<Language>> = names.iter().map(|name| name.and_then(Language::named)).collect();
    let known: Vec<Row> =
        rows.iter().zip(&languages).filter(|(_, l)| l.is_some()).map(|(row, _)| row.clone()).collect();
    let answers = answers(session, prompter, &known, settings)?;
    let mut answered = answers.list.iter();
    let (mut lines, mut counts) = (Lines::default(), Vec::new());
    for (i, row) in rows.iter().enumerate() {
        let Some(language) = languages[i] else {
            lines.skip(row, json!({"reference": references[i], "skipped": names[i].unwrap_or("no language")}));
            continue;
        };
        let answer = answered.next().expect("an answer to each row of a known language");
        let (count, grade) = grade(language, &references[i], &answer.output);
        counts.push(count);
        lines.add(row, grade, answer.line(&references[i]));
    }
    let skipped = rows.len() - known.len();
    if skipped > 0 {
        warn!("{}: {skipped} of {} rows are in no language of codebleu ({})", task.name, rows.len(), all_languages());
    }
    let mut scored = lines.scored(answers.prompts_cut);
    scored.skipped = skipped;
    scored.also.extend(corpus(&counts));
    Ok(scored)
}

fn all_languages() -> String {
    Language::ALL.map(Language::name).join(", ")
}

/// The name of each row's language, known or not.
fn names<'a>(task: &'a Task, rows: &'a [Row], references: &'a [String]) -> Result<Vec<Option<&'a str>>> {
    if let Some(name) = task.language.as_deref().filter(|name| Language::named(name).is_none()) {
        let message = format!("codebleu knows no such language, which task {} has", task.name);
        return Err(BadInput::new(&task.listed_in, message).expected(all_languages()).found(name).into());
    }
    let names: Vec<Option<&str>> = rows.iter().zip(references).map(|(row, r)| language_name(task, row, r)).collect();
    if names.iter().all(Option::is_none) {
        let found = rows[0].fields.get("language").unwrap_or(&Value::Null);
        let expected = "a language's name in the rows, or language = \"python\" for the task in tasks.toml";
        return Err(field_error(task, &rows[0], "language", expected, found).into());
    }
    Ok(names)
}

/// The task's language, else the row's field, else what the reference's fence is marked with.
fn language_name<'a>(task: &'a Task, row: &'a Row, reference: &'a str) -> Option<&'a str> {
    let field = || row.fields.get("language").and_then(Value::as_str);
    task.language.as_deref().or_else(field).or_else(|| fenced(reference)?.0)
}

/// Counts of the pair, for the corpus, and the row's own figures: the package's reading first.
fn grade(language: Language, reference: &str, output: &str) -> (Counts, Grade) {
    let code = |text| fenced(text).map_or(text, |(_, code)| code);
    let (reference, candidate) = (code(reference), code(output));
    let counts = Counts::of(language, reference, candidate);
    let score = counts.score(NoDataFlow::CountsOne);
    let scores = vec![
        ("codebleu", score.codebleu),
        ("codebleu_original", counts.score(NoDataFlow::CountsZero).codebleu),
        ("ngram_match", score.ngram),
        ("weighted_ngram_match", score.weighted_ngram),
        ("syntax_match", score.syntax),
        ("dataflow_match", score.data_flow),
        ("parses", f64::from(parses(language, candidate))),
    ];
    let extracted =
        Map::from_iter([("extracted".to_owned(), json!(candidate)), ("language".to_owned(), json!(language.name()))]);
    (counts, Grade { scores, extracted })
}

/// The first block between lines of three backticks, or up to the end, and the name after the first three.
fn fenced(text: &str) -> Option<(Option<&str>, &str)> {
    let open = if text.starts_with("```") { 0 } else { text.find("\n```")? + 1 };
    let (head, body) = text[open + 3..].split_once('\n')?;
    let name = head.split_whitespace().next();
    let end = if body.starts_with("```") { 0 } else { body.find("\n```").map_or(body.len(), |at| at + 1) };
    Some((name, &body[..end]))
}

/// CodeBLEU of all pairs as one text, as the package gives it for lists; the standard error is the jackknife's.
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
