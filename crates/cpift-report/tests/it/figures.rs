//! `compare`: figures beside the main one, losses row by row, and means over tasks.

use crate::support::{Folder, HOSTILE, common, read, task_score};
use clap::Parser;
use cpift_core::format::scores::MetricValue;
use cpift_report::{CompareArgs, compare};
use serde_json::{Value, json};

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    args: CompareArgs,
}

/// Compares runs of `f` by name with `a`.
fn compared(f: &Folder, runs: &[&str], format: &str, force: bool) -> String {
    let paths: Vec<String> = runs.iter().map(|run| f.path(&format!("scores/{run}")).display().to_string()).collect();
    let out = f.path("out");
    let _ = std::fs::remove_file(&out);
    let fixed = ["compare", "--baseline", "a", "--format", format, "--out", out.to_str().unwrap()];
    compare(&Line::parse_from(fixed.into_iter().chain(paths.iter().map(String::as_str))).args, &common(force)).unwrap();
    read(&out)
}

fn json_of(f: &Folder) -> Value {
    serde_json::from_str(&compared(f, &["a", "b"], "json", false)).unwrap()
}

fn delta<'a>(json: &'a Value, figure: &str) -> &'a Value {
    let deltas = json["rows"][1]["deltas"].as_array().unwrap();
    deltas.iter().find(|delta| delta["figure"] == figure).unwrap_or_else(|| panic!("{figure}: {json}"))
}

/// Two runs of one task, four rows of 1, 2, 4 and no tokens.
fn two(a: [f64; 3], b: [f64; 3]) -> Folder {
    let f = Folder::new();
    for (name, [x, y, z]) in [("a", a), ("b", b)] {
        f.score(name, &[("copy", &[0.0, 1.0, 0.0, 1.0])]);
        f.losses_at(&format!("scores/{name}"), "copy", &[(x, 1), (2.0 * y, 2), (4.0 * z, 4), (0.0, 0)]);
    }
    f
}

#[test]
fn losses_have_paired_intervals_over_rows() {
    // Every row is better by half a nat per token, whatever is drawn.
    let json = json_of(&two([1.0, 2.0, 3.0], [0.5, 1.5, 2.5]));
    for figure in ["nll", "mean nll"] {
        let ends = delta(&json, figure)["interval"].as_array().unwrap();
        assert!(ends.iter().all(|end| (end.as_f64().unwrap() + 0.5).abs() < 1e-12), "{figure}: {ends:?}");
    }
    assert_eq!(delta(&json, "nll")["paired_rows"], json!(3), "a row without a token is in no loss");
    // Losses of 1 and 2 nats per token: a perplexity of e^2 is e^2 - e more than one of e.
    let json = json_of(&two([1.0; 3], [2.0; 3]));
    let expected = 2f64.exp() - 1f64.exp();
    let ends = delta(&json, "perplexity")["interval"].as_array().unwrap();
    assert!(ends.iter().all(|end| (end.as_f64().unwrap() - expected).abs() < 1e-12), "{ends:?}");
    // Rows are weighted by their tokens: the mean is -1 nat on one token of seven, and resamples
    // range from no such row to several.
    let json = json_of(&two([1.0; 3], [0.0, 1.0, 1.0]));
    let (value, ends) = (delta(&json, "nll")["value"].as_f64().unwrap(), &delta(&json, "nll")["interval"]);
    assert!((value + 1.0 / 7.0).abs() < 1e-12 && ends[0].as_f64().unwrap() < -0.3 && ends[1] == json!(0.0), "{ends}");
}

#[test]
fn losses_that_are_not_those_of_the_rows_have_no_interval() {
    let f = two([1.0, 2.0, 3.0], [0.5, 1.5, 2.5]);
    f.edit("b", |scores| scores["tasks"][0]["nll"]["value"] = json!(9.0));
    let table = compared(&f, &["a", "b"], "markdown", false);
    assert!(table.contains("b, copy: no paired interval: the loss of b is not that of its rows"), "{table}");
    let f = Folder::new();
    ["a", "b"].iter().for_each(|name| drop(f.score(name, &[("copy", &[1.0])])));
    let table = compared(&f, &["a", "b"], "markdown", false);
    assert!(table.contains("b, copy: no paired interval: the runs have one row in common."), "{table}");
    ["a", "b"].iter().for_each(|name| drop(f.score(name, &[("copy", &[0.0, 1.0])])));
    let table = compared(&f, &["a", "b"], "markdown", false);
    assert_eq!(table.matches("outputs.jsonl of a has no losses of this task's rows").count(), 1, "{table}");
}

#[test]
fn further_figures_and_counts_are_in_every_form() {
    let f = two([1.0; 3], [2.0; 3]);
    f.edit("b", |scores| {
        scores["tasks"][0]["also"]["flexible"] = json!({"name": "flexible", "value": 0.75, "stderr": 0.25, "n": 4});
        scores["tasks"][0]["settings"]["skipped"] = json!(3);
    });
    let csv = compared(&f, &["a", "b"], "csv", false);
    for line in ["b,copy,flexible,0.75,0.25,4,false,,,,", "a,copy,flexible,,,,,,,,", "b,copy,skipped,3,,4,,,,,"] {
        assert!(csv.lines().any(|l| l == line), "{line}: {csv}");
    }
    assert!(csv.contains("a,copy,perplexity,2.718281828459045,0.1,3,true,,,,"), "{csv}");
    assert!(!csv.contains("truncated"), "what is 0 everywhere is left out: {csv}");
    assert!(csv.lines().all(|line| line.split(',').count() == 11), "{csv}");
    let page = compared(&f, &["a", "b"], "html", false);
    let html = scraper::Html::parse_document(&page);
    let rows = scraper::Selector::parse("details table tr").unwrap();
    let rows: Vec<String> = html.select(&rows).map(|row| row.text().collect()).collect();
    for row in
        ["copyflexible %-75.0 ± 25.0", "copyskipped rows-3", "copyperplexity2.72 ± 0.107.39 ± 0.10+4.67 [+4.67, +4.67]"]
    {
        assert!(rows.iter().any(|r| r == row), "{row}: {rows:?}");
    }
}

#[test]
fn a_mean_over_fewer_tasks_is_not_held_against_one_over_all() {
    let f = Folder::new();
    let figure = |value| Some(MetricValue { name: "acc".into(), value, stderr: Some(0.1), n: 4 });
    f.write_scores("a", vec![task_score("copy", figure(0.5)), task_score("pick", figure(0.25))]);
    f.write_scores("b", vec![task_score("copy", figure(0.75))]);
    f.write_scores("c", vec![task_score("copy", figure(0.25)), task_score("pick", figure(0.25))]);
    let table = compared(&f, &["a", "b", "c"], "markdown", true);
    let rows: Vec<Vec<&str>> = table.lines().map(|l| l.split('|').map(str::trim).collect()).collect();
    let of = |name: &str| rows.iter().filter(|cells| cells.get(1) == Some(&name)).collect::<Vec<_>>();
    assert_eq!(of("a")[0][4..6], ["**3.75**", "2.0000"], "{table}");
    assert_eq!(of("b")[0][4..6], ["-", "-"], "{table}");
    assert_eq!(of("b")[1][4..6], ["-", "-"], "{table}");
    assert_eq!(of("c")[1][4..6], ["−1.25", "0.0000"], "{table}");
    assert!(table.contains("ANS of b is left out: it has no figure of pick."), "{table}");
}

#[test]
fn what_force_compares_is_said_and_not_paired() {
    let f = Folder::new();
    let tasks: [(&str, &[f64]); 2] = [("copy", &[0.0, 1.0]), ("pick", &[0.0, 1.0])];
    ["a", "b"].iter().for_each(|name| drop(f.score(name, &tasks)));
    let other = "ab".repeat(32);
    f.edit("b", |scores| {
        scores["format_version"] = json!(7);
        scores["tasks"][0]["eval_digest"] = json!(other);
        scores["tasks"][1]["settings"]["rows"] = json!(2);
    });
    let json: Value = serde_json::from_str(&compared(&f, &["a", "b"], "json", true)).unwrap();
    let notes = json["notes"].to_string();
    for part in [
        &format!("b differs from a in the evaluation file of copy: {other} against "),
        "b differs from a in the setting rows of pick: rows = 2 against rows = 4.",
        "b: its scores.json is of version 7, read as version 2.",
        "b, copy: no paired interval: their evaluation files differ.",
    ] {
        assert!(notes.contains(part), "{part}: {notes}");
    }
    let deltas = json["rows"][1]["deltas"].as_array().unwrap();
    let of = |task: &str| &deltas.iter().find(|d| d["task"] == task && d["figure"] == "acc").unwrap()["interval"];
    assert_eq!((of("copy"), of("pick")), (&json!(null), &json!([0.0, 0.0])));
    let name = |scores: &mut Value| {
        scores["tasks"][0]["metric"] = json!({"name": "judge", "value": 7.0, "stderr": 0.1, "n": 2})
    };
    f.edit("b", |scores| scores["tasks"][1]["metric"]["name"] = json!("exact_match"));
    assert!(compared(&f, &["a", "b"], "markdown", true).contains("b, pick: no paired interval: their metrics differ."));
    f.edit("b", name);
    let table = compared(&f, &["a", "b"], "markdown", true);
    assert!(!table.contains("700.0"), "a rating is no percentage: {table}");
}

#[test]
fn names_move_no_cursor_and_end_no_cell() {
    let f = Folder::new();
    let name = format!("{HOSTILE}|\n| x\u{9b}2J");
    let rating = |value| Some(MetricValue { name: "acc".into(), value, stderr: Some(0.1), n: 4 });
    f.write_scores("a", vec![task_score(&name, rating(0.5)), task_score("pick", None)]);
    f.write_scores("b", vec![task_score("pick", None), task_score(&name, rating(0.25))]);
    for format in ["markdown", "terminal"] {
        let text = compared(&f, &["a", "b"], format, true);
        assert!(!text.chars().any(|c| c.is_control() && c != '\n') && !text.contains('\u{202e}'), "{text:?}");
        assert!(text.contains("differs from a in the tasks") && text.contains("no paired interval"), "{text}");
        let rows: Vec<&str> = text.lines().filter(|line| line.starts_with('|')).collect();
        let cells = |row: &str| row.replace("\\|", "").matches('|').count();
        assert!(rows.len() == 4 + 3 && rows.iter().all(|row| cells(row) == cells(rows[0])), "{text}");
    }
}
