//! `compare`: the best in bold, differences with intervals, every format, and refusals.

use crate::support::{Folder, common, read, task_score};
use clap::Parser;
use cpift_core::format::scores::MetricValue;
use cpift_core::{BadInput, Usage};
use cpift_report::{CompareArgs, compare};
use serde_json::{Value, json};

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    args: CompareArgs,
}

/// Compares runs of `f` by name, with more arguments.
fn try_compare(f: &Folder, runs: &[&str], more: &[&str], force: bool) -> anyhow::Result<String> {
    let paths: Vec<String> = runs.iter().map(|run| f.path(&format!("scores/{run}")).display().to_string()).collect();
    let out = f.path("out");
    let _ = std::fs::remove_file(&out);
    let fixed = ["compare", "--out", out.to_str().unwrap()];
    let line = Line::parse_from(fixed.into_iter().chain(paths.iter().map(String::as_str)).chain(more.iter().copied()));
    compare(&line.args, &common(force))?;
    Ok(read(&out))
}

fn compared(f: &Folder, runs: &[&str], more: &[&str]) -> String {
    try_compare(f, runs, more, false).unwrap()
}

fn two() -> Folder {
    let f = Folder::new();
    f.score("a", &[("copy", &[0.0, 0.0, 0.0, 1.0]), ("pick", &[1.0, 1.0, 0.0, 1.0])]);
    f.score("b", &[("copy", &[1.0, 1.0, 0.0, 1.0]), ("pick", &[1.0, 0.0, 0.0, 1.0])]);
    f
}

#[test]
fn the_best_of_each_column_is_bold_by_its_own_direction() {
    let f = two();
    f.edit("b", |scores| scores["tasks"][0]["nll"]["value"] = json!(1.0));
    let table = compared(&f, &["a", "b"], &["--format", "markdown"]);
    let rows: Vec<&str> = table.lines().filter(|l| l.starts_with("| a") || l.starts_with("| b")).collect();
    let cells: Vec<Vec<&str>> = rows.iter().map(|r| r.trim_matches('|').split('|').map(str::trim).collect()).collect();
    assert_eq!(cells[0], ["a", "25.0 ± 25.0", "**75.0 ± 25.0**", "5.00", "2.0000"]);
    // ANS: (0.75 + 0.5) / 2 x 10. The lower mean loss is the better one.
    assert_eq!(cells[1], ["b", "**75.0 ± 25.0**", "50.0 ± 28.9", "**6.25**", "**1.5000**"]);
    let widths: Vec<usize> = table.lines().take(4).map(|l| l.chars().count()).collect();
    assert!(widths.iter().all(|w| *w == widths[0]), "columns line up\n{table}");
    assert!(table.contains("Rows (n): 4 for each task") && table.contains("10 x metric"), "{table}");
}

#[test]
fn intervals_come_from_rows_matched_by_task_and_number() {
    let f = Folder::new();
    // Differences by row: 1, 1, ..., in another order of lines in one file; the mean difference is
    // 1 whatever is drawn.
    f.score("a", &[("copy", &[0.0, 0.5, 0.25, 0.75])]);
    f.score("b", &[("copy", &[0.125, 0.625, 0.375, 0.875])]);
    let path = f.path("scores/b/outputs.jsonl");
    let mut lines: Vec<String> = read(&path).lines().map(str::to_owned).collect();
    lines.reverse();
    std::fs::write(&path, lines.join("\n")).unwrap();
    let json: Value =
        serde_json::from_str(&compared(&f, &["a", "b"], &["--baseline", "a", "--format", "json"])).unwrap();
    let delta = &json["rows"][1]["deltas"][0];
    assert_eq!(
        (&delta["value"], &delta["interval"], &delta["paired_rows"]),
        (&json!(0.125), &json!([0.125, 0.125]), &json!(4))
    );
    assert_eq!(json["rows"][1]["deltas"][1]["interval"], json!([1.25, 1.25]), "ANS is ten times that");
    assert_eq!(json["rows"][0]["deltas"], json!([]), "the baseline has no difference to itself");
}

#[test]
fn the_seed_sets_the_interval() {
    let f = two();
    let of = |seed: &str| compared(&f, &["a", "b"], &["--baseline", "a", "--resamples", "25", "--seed", seed]);
    assert_eq!(of("0"), of("0"));
    assert!((1..20).any(|seed| of(&seed.to_string()) != of("0").replace("seed 0", &format!("seed {seed}"))));
    assert!(of("3").contains("25 resamples, seed 3"));
}

#[test]
fn where_rows_cannot_be_paired_the_reason_is_given() {
    let f = two();
    std::fs::remove_file(f.path("scores/b/outputs.jsonl")).unwrap();
    let table = compared(&f, &["a", "b"], &["--baseline", "a"]);
    assert!(
        table.contains("+50.0 |") && table.contains("b, copy: no paired interval: b has no outputs.jsonl"),
        "{table}"
    );
    let f = two();
    f.edit("b", |scores| scores["tasks"][0]["metric"]["value"] = json!(0.5));
    let table = compared(&f, &["a", "b"], &["--baseline", "a"]);
    assert!(table.contains("b, copy: no paired interval: the figure of b is not the mean"), "{table}");
    let f = two();
    f.score("b", &[("copy", &[1.0, 1.0]), ("pick", &[1.0, 0.0])]);
    let table = compared(&f, &["a", "b"], &["--baseline", "a"]);
    assert!(table.contains("b, copy: the difference is over the 2 rows both have"), "{table}");
}

#[test]
fn a_task_that_waits_for_a_judge_says_so() {
    let f = Folder::new();
    let rating = |value| Some(MetricValue { name: "judge".into(), value, stderr: Some(0.5), n: 4 });
    f.write_scores("a", vec![task_score("chat", rating(7.5)), task_score("plain", None)]);
    let mut unjudged = task_score("chat", None);
    unjudged.settings.insert("judge".into(), Value::Null);
    f.write_scores("b", vec![unjudged, task_score("plain", None)]);
    for runs in [&["a", "b"][..], &["b"]] {
        let table = compared(&f, runs, &[]);
        let row = table.lines().find(|l| l.starts_with("| b")).unwrap();
        assert!(row.contains("not judged") && row.contains("2.0000 ± 0.1000"), "{table}");
        assert!(table.contains("chat judge of 10") && table.contains("plain nll"), "{table}");
    }
    let mut ungraded = task_score("chat", None);
    ungraded.settings.insert("judge".into(), json!({"model": "j", "wording": 1}));
    f.write_scores("c", vec![ungraded]);
    let table = compared(&f, &["c"], &[]);
    assert!(table.contains("no grade") && table.contains("\n± is one"), "a judge has read it: {table}");
    let table = compared(&f, &["a", "b"], &[]);
    assert!(
        table.contains("7.50 ± 0.50") && table.contains("ANS of b is left out: it has no figure of chat."),
        "{table}"
    );
    assert_eq!(
        table.lines().find(|l| l.starts_with("| a")).unwrap().matches("7.50").count(),
        2,
        "a rating counts as given"
    );
}

#[test]
fn grades_of_one_judge_are_compared_whatever_was_counted_and_those_of_two_are_not() {
    let f = Folder::new();
    let judged = |judge: &str, tokens: u32| {
        let mut score =
            task_score("chat", Some(MetricValue { name: "judge".into(), value: 7.5, stderr: Some(0.5), n: 4 }));
        score.settings.insert("judge".into(), json!({"model": judge, "wording": 1}));
        score.settings.insert("verdicts".into(), json!({"rated": 4, "prompt_tokens": tokens}));
        vec![score]
    };
    f.write_scores("a", judged("j", 10));
    f.write_scores("b", judged("j", 20));
    compared(&f, &["a", "b"], &[]);
    f.write_scores("b", judged("k", 10));
    let error = try_compare(&f, &["a", "b"], &[], false).unwrap_err().to_string();
    assert!(error.contains("the setting judge of chat") && error.contains("\"k\""), "{error}");
}

#[test]
fn csv_has_every_figure_unrounded() {
    let f = two();
    let csv = compared(&f, &["a", "b"], &["--format", "csv", "--baseline", "a"]);
    let lines: Vec<Vec<&str>> = csv.lines().map(|l| l.split(',').collect()).collect();
    assert!(lines.iter().all(|l| l.len() == 11), "{csv}");
    let of = |run: &str, task: &str, figure: &str| {
        lines.iter().find(|l| l[..3] == [run, task, figure]).unwrap()[3..].to_vec()
    };
    assert_eq!(of("b", "copy", "acc")[..5], ["0.75", "0.25", "4", "true", "0.5"]);
    assert_eq!(of("a", "pick", "nll")[..4], ["2", "0.1", "4", "false"]);
    assert_eq!(of("b", "", "ANS")[0], "6.25");
    assert_eq!(lines.len(), 1 + 2 * (2 + 2 + 2));
}

#[test]
fn html_is_a_whole_page() {
    let page = compared(&two(), &["a", "b"], &["--format", "html", "--baseline", "a"]);
    let html = scraper::Html::parse_document(&page);
    assert!(html.errors.is_empty(), "{:?}", html.errors);
    assert!(page.contains("Content-Security-Policy") && page.contains("<strong>75.0 ± 25.0</strong>"));
    assert_eq!(html.select(&scraper::Selector::parse("figure svg").unwrap()).count(), 2);
}

#[test]
fn runs_that_answered_other_questions_are_refused_by_both_names() {
    type Edit = fn(&mut Value);
    let cases: [(Edit, &str); 5] = [
        (|s| s["tasks"][1]["eval_digest"] = json!("ab".repeat(32)), "the evaluation file of pick"),
        (|s| s["tasks"][0]["settings"]["templates"] = json!({"prompt": "say {{ x }}"}), "say {{ x }}"),
        (|s| s["tasks"][0]["settings"]["rows"] = json!(2), "rows = 2"),
        (|s| s["tasks"][0]["metric"]["name"] = json!("exact_match"), "the metric of copy"),
        (|s| s["tasks"][0]["task"] = json!("other"), "the tasks"),
    ];
    for (edit, part) in cases {
        let f = two();
        f.edit("b", edit);
        let error = try_compare(&f, &["a", "b"], &[], false).unwrap_err();
        assert!(error.is::<BadInput>());
        let error = error.to_string();
        let paths = ["scores/a", "scores/b"].iter().all(|p| error.contains(p));
        assert!(paths && error.contains(part) && error.contains("--force"), "{part}: {error}");
        try_compare(&f, &["a", "b"], &[], true).unwrap();
    }
    // Counts made while scoring are not compared as settings.
    let f = two();
    f.edit("b", |s| s["tasks"][0]["settings"]["truncated"] = json!(3));
    compared(&f, &["a", "b"], &[]);
}

#[test]
fn another_version_is_refused_and_read_by_force() {
    let f = two();
    f.edit("b", |s| s["format_version"] = json!(99));
    let error = try_compare(&f, &["a", "b"], &[], false).unwrap_err().to_string();
    assert!(["scores/b", "expected: 2", "found: 99"].iter().all(|part| error.contains(part)), "{error}");
    try_compare(&f, &["a", "b"], &[], true).unwrap();
}

#[test]
fn the_first_version_compares_with_the_second_and_one_row_has_no_standard_error() {
    let f = two();
    f.edit("a", |s| s["format_version"] = json!(1));
    f.edit("b", |s| {
        s["format_version"] = json!(2);
        s["tasks"][0]["metric"]["stderr"] = Value::Null;
    });
    let table = compared(&f, &["a", "b"], &[]);
    let row = |name: &str| table.lines().find(|l| l.starts_with(&format!("| {name}"))).unwrap().to_owned();
    assert!(row("b").contains("± n/a") && !row("a").contains("n/a") && !table.contains("version"), "{table}");
    let csv = compared(&f, &["b"], &["--format", "csv"]);
    assert!(csv.lines().nth(1).unwrap().split(',').nth(4) == Some(""), "{csv}");
}

#[test]
fn two_runs_that_a_third_goes_with_may_still_differ() {
    let f = Folder::new();
    let judged = |judge: Value, value: Option<f64>| {
        let metric = value.map(|value| MetricValue { name: "judge".into(), value, stderr: Some(0.5), n: 4 });
        let mut score = task_score("chat", metric);
        score.settings.insert("judge".into(), judge);
        vec![score]
    };
    f.write_scores("a", judged(Value::Null, None));
    f.write_scores("b", judged(json!({"model": "j"}), Some(7.0)));
    f.write_scores("c", judged(json!({"model": "k"}), Some(8.0)));
    let error = try_compare(&f, &["a", "b", "c"], &[], false).unwrap_err().to_string();
    assert!(error.contains("scores/b") && error.contains("scores/c") && error.contains("the setting judge"), "{error}");
}

#[test]
fn arguments_that_make_no_sense_are_usage_errors() {
    let f = two();
    for (runs, more, part) in [
        (&["a", "a"][..], &[][..], "two runs are called a"),
        (&["a", "b"], &["--baseline", "c"], "not among the runs: a, b"),
        (&["a", "b"], &["--resamples", "0"], "--resamples"),
        (&["a"], &["b="], "is no [NAME=]RUN"),
    ] {
        let error = try_compare(&f, runs, more, false).unwrap_err();
        assert!(error.is::<Usage>() && error.to_string().contains(part), "{error}");
    }
}
