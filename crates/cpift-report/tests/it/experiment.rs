//! `experiment`: means over seeds, two-way intervals, forgetting, every format, and refusals.

use crate::support::{Folder, HOSTILE, common, read};
use clap::Parser;
use cpift_core::BadInput;
use cpift_report::{CompareArgs, ExperimentArgs, compare, experiment};
use serde_json::{Value, json};

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    args: ExperimentArgs,
}

#[derive(Parser)]
struct CompareLine {
    #[command(flatten)]
    args: CompareArgs,
}

fn try_show(f: &Folder, file: &std::path::Path, more: &[&str]) -> anyhow::Result<String> {
    let out = f.path("out");
    let _ = std::fs::remove_file(&out);
    let fixed = ["experiment", file.to_str().unwrap(), "--out", out.to_str().unwrap()];
    experiment(&Line::parse_from(fixed.iter().chain(more)).args, &common(false))?;
    Ok(read(&out))
}

fn show(f: &Folder, file: &std::path::Path, more: &[&str]) -> String {
    try_show(f, file, more).unwrap()
}

fn json_of(f: &Folder, file: &std::path::Path) -> Value {
    serde_json::from_str(&show(f, file, &["--format", "json"])).unwrap()
}

/// Writes scores of one task per seed as store/METHOD-SEED and returns the directories.
fn store(f: &Folder, method: &str, seeds: &[&[f64]]) -> Vec<String> {
    let folder = |i: usize| format!("store/{method}-{i}");
    seeds.iter().enumerate().for_each(|(i, rows)| drop(f.score_at(&folder(i), &[("copy", rows)])));
    (0..seeds.len()).map(folder).collect()
}

/// An experiment with a baseline `a` and a method `b`, by the rows of every seed.
fn two(f: &Folder, a: &[&[f64]], b: &[&[f64]]) -> std::path::PathBuf {
    let rows = [json!({"name": "a", "runs": store(f, "a", a)}), json!({"name": "b", "runs": store(f, "b", b)})];
    f.experiment("x", "scores", &json!({"baseline": "a", "rows": rows}))
}

/// The difference of method `b` in one figure.
fn delta<'a>(json: &'a Value, figure: &str) -> &'a Value {
    let figures = json["rows"][1]["figures"].as_array().unwrap();
    &figures.iter().find(|f| f["figure"] == figure).unwrap()["delta"]
}

/// The cells of the lines of a Markdown table that start with one of `names`.
fn cells<'a>(text: &'a str, names: &[&str]) -> Vec<Vec<&'a str>> {
    let lines = text.lines().filter_map(|line| line.strip_prefix("| ")?.strip_suffix(" |"));
    let lines = lines.map(|line| line.split(" | ").map(str::trim).collect::<Vec<_>>());
    lines.filter(|cells| names.contains(&cells[0].trim_matches('*'))).collect()
}

const TASKS: [(&str, [f64; 4]); 2] = [("copy", [0.0, 0.0, 0.0, 1.0]), ("pick", [1.0, 1.0, 0.0, 1.0])];

#[test]
fn each_row_has_its_mean_and_standard_deviation_over_seeds() {
    let f = Folder::new();
    // copy: 25, 75 and 50 %: mean 50, sample standard deviation 25. pick: 75, 75 and 0: 50 and
    // 43.3.
    let copies = [[0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 0.0]];
    let picks = [TASKS[1].1, TASKS[1].1, [0.0; 4]];
    for i in 0..3 {
        f.score_at(&format!("store/m-{i}"), &[("copy", &copies[i]), ("pick", &picks[i])]);
        f.score_at(&format!("store/base-{i}"), &[("copy", &TASKS[0].1), ("pick", &TASKS[1].1)]);
    }
    let runs = |name: &str| [0, 1, 2].map(|i| format!("store/{name}-{i}"));
    let rows = [
        json!({"name": "base", "runs": runs("base")}),
        json!({"name": "m", "tokens": 801514, "runs": runs("m"), "note": "One epoch."}),
    ];
    let text = show(&f, &f.experiment("x", "scores", &json!({"rows": rows})), &["--format", "markdown"]);
    let lines = cells(&text, &["base", "m"]);
    // Means by seed: 50, 75 and 25.
    assert_eq!(lines[0], ["base", "-", "25.0 ± 0.0", "**75.0 ± 0.0**", "50.0 ± 0.0", "5.00 ± 0.00", "2.0000 ± 0.0000"]);
    let m = ["m", "801514", "**50.0 ± 25.0**", "50.0 ± 43.3", "50.0 ± 25.0", "5.00 ± 2.50", "2.0000 ± 0.0000"];
    assert_eq!(lines[1], m);
    assert_eq!(lines.len(), 2, "no baseline, no differences: {text}");
    for part in ["## The x experiment\n", "Does it hold?", "3 seeds", "4 for each task", "10 x metric", "m: One epoch."]
    {
        assert!(text.contains(part), "{part}: {text}");
    }
    let one = f.experiment("one", "scores", &json!({"rows": [{"name": "base", "runs": ["store/base-0"]}]}));
    let text = show(&f, &one, &[]);
    assert_eq!(cells(&text, &["base"])[0], ["base", "25.0", "75.0", "50.0", "5.00", "2.0000"]);
    assert!(text.contains("One seed."), "{text}");
}

#[test]
fn differences_have_the_sign_of_method_less_baseline() {
    let f = Folder::new();
    // Every row of every seed gains 0.25, whatever is drawn.
    let (low, high): (&[f64], &[f64]) = (&[0.0, 0.5, 0.25, 0.75], &[0.25, 0.75, 0.5, 1.0]);
    let json = json_of(&f, &two(&f, &[low, high], &[high, &[0.5, 1.0, 0.75, 1.25]]));
    assert_eq!(delta(&json, "acc"), &json!({"value": 0.25, "interval": [0.25, 0.25], "paired_rows": 4}));
    assert_eq!(delta(&json, "mean")["interval"], json!([0.25, 0.25]));
    assert_eq!(delta(&json, "ANS")["interval"], json!([2.5, 2.5]));
    assert_eq!(delta(&json, "mean nll"), &json!({"value": 0.0, "interval": null, "paired_rows": 0}));
    let text = show(&f, &two(&f, &[high, high], &[low, low]), &[]);
    assert_eq!(cells(&text, &["b"])[1][..2], ["b", "−25.0 [−25.0, −25.0]"]);
    assert!(cells(&text, &["a"]).len() == 1, "the baseline has no difference to itself: {text}");
}

#[test]
fn methods_alike_seed_by_seed_leave_no_doubt() {
    let f = Folder::new();
    // The seeds differ, the methods do not: both are drawn with the same seeds and rows.
    let seeds: [&[f64]; 2] = [&[0.0, 1.0, 0.0, 0.0], &[1.0, 1.0, 1.0, 0.0]];
    let json = json_of(&f, &two(&f, &seeds, &seeds));
    assert_eq!(
        (&delta(&json, "acc")["interval"], &delta(&json, "ANS")["interval"]),
        (&json!([0.0, 0.0]), &json!([0.0, 0.0]))
    );
}

#[test]
fn seeds_are_drawn_too() {
    let f = Folder::new();
    // No gain in one seed, one in the other: a quarter of the draws holds either alone.
    let json = json_of(&f, &two(&f, &[&[0.0; 4], &[0.0; 4]], &[&[0.0; 4], &[1.0; 4]]));
    assert_eq!(delta(&json, "acc"), &json!({"value": 0.5, "interval": [0.0, 1.0], "paired_rows": 4}));
}

#[test]
fn one_seed_has_the_intervals_of_compare() {
    let f = Folder::new();
    let tasks = |i: usize| [("copy", &TASKS[i].1[..]), ("pick", &TASKS[1 - i].1[..])];
    let paths: Vec<String> = [("a", 0), ("b", 1)].map(|(n, i)| f.score(n, &tasks(i)).display().to_string()).into();
    let rows = ["a", "b"].map(|name| json!({"name": name, "runs": [format!("scores/{name}")]}));
    let ours = json_of(&f, &f.experiment("x", "scores", &json!({"baseline": "a", "rows": rows})));
    let out = f.path("out");
    std::fs::remove_file(&out).unwrap();
    let fixed = ["compare", "--baseline", "a", "--format", "json", "--out", out.to_str().unwrap()];
    let line = CompareLine::parse_from(fixed.into_iter().chain(paths.iter().map(String::as_str)));
    compare(&line.args, &common(false)).unwrap();
    let theirs: Value = serde_json::from_str(&read(&out)).unwrap();
    for theirs in theirs["rows"][1]["deltas"].as_array().unwrap() {
        let figures = ours["rows"][1]["figures"].as_array().unwrap();
        let same = |f: &&Value| f["task"] == theirs["task"] && f["figure"] == theirs["figure"];
        let ours = &figures.iter().find(same).unwrap()["delta"];
        assert_eq!((&ours["value"], &ours["interval"]), (&theirs["value"], &theirs["interval"]), "{theirs}");
    }
}

#[test]
fn the_seed_sets_the_interval() {
    let f = Folder::new();
    let file = two(&f, &[&[0.0, 1.0, 0.0, 1.0], &[0.0; 4]], &[&[1.0, 1.0, 0.0, 0.0], &[1.0, 0.0, 1.0, 1.0]]);
    let of = |seed: &str| show(&f, &file, &["--resamples", "25", "--seed", seed]);
    assert_eq!(of("0"), of("0"));
    assert!((1..20).any(|seed| of(&seed.to_string()) != of("0").replace("seed 0", &format!("seed {seed}"))));
    assert!(of("3").contains("two-way bootstrap: the 2 seeds") && of("3").contains("25 resamples, seed 3"));
}

#[test]
fn rows_that_cannot_be_paired_are_said() {
    let f = Folder::new();
    let rows: [&[f64]; 2] = [&[0.0, 1.0, 0.0, 1.0], &[1.0; 4]];
    let file = two(&f, &rows, &rows);
    std::fs::remove_file(f.path("store/b-1/outputs.jsonl")).unwrap();
    let text = show(&f, &file, &[]);
    assert!(text.contains("b, copy: no paired interval: b, seed 2 has no outputs.jsonl."), "{text}");
    assert_eq!(cells(&text, &["b"])[1][1], "0.0");
}

#[test]
fn losses_have_intervals_too() {
    let f = Folder::new();
    let file = two(&f, &[&[1.0; 2], &[1.0; 2]], &[&[1.0; 2], &[1.0; 2]]);
    for seed in 0..2 {
        f.losses_at(&format!("store/a-{seed}"), "copy", &[(1.0, 1), (4.0, 2)]);
        // The second seed gains half a nat per token on every row, the first none.
        let gain = 0.5 * f64::from(seed);
        f.losses_at(&format!("store/b-{seed}"), "copy", &[(1.0 - gain, 1), (4.0 - 2.0 * gain, 2)]);
    }
    let json = json_of(&f, &file);
    for figure in ["nll", "mean nll"] {
        let [low, high] = [0, 1].map(|end| delta(&json, figure)["interval"][end].as_f64().unwrap());
        assert!((low + 0.5).abs() < 1e-12 && high == 0.0, "{figure}: {low} {high}");
    }
    assert!(delta(&json, "perplexity")["interval"].is_array(), "{json}");
}

#[test]
fn a_sweep_is_compared_at_the_same_place() {
    let f = Folder::new();
    let at = |name: &str, x: f64, value: f64| json!({"name": name, "series": name, "x": x, "runs": store(&f, &format!("{name}{x}"), &[&[value; 4]])});
    let rows = [at("a", 1.0, 0.0), at("a", 10.0, 0.5), at("b", 1.0, 0.25), at("b", 10.0, 0.25)];
    let axis = json!({"label": "p (%)", "log": true});
    let more = json!({"baseline": "a", "axis": axis, "rows": rows});
    let text = show(&f, &f.experiment("x", "scores", &more), &[]);
    let lines = cells(&text, &["b"]);
    assert_eq!(lines[2][..3], ["b", "1", "+25.0 [+25.0, +25.0]"], "{text}");
    assert_eq!(lines[3][..3], ["b", "10", "−25.0 [−25.0, −25.0]"], "{text}");
    assert!(text.contains("Difference to a at the same p (%):"), "{text}");
}

/// Two methods over three pairs of tasks, one of them with two seeds.
fn forgetting(f: &Folder) -> std::path::PathBuf {
    // Scores of (copy, pick) of ten rows each, in tenths.
    let folder = |name: &str, copy: usize, pick: usize| {
        let rows = |ones: usize| -> Vec<f64> { (0..10).map(|i| f64::from(u8::from(i < ones))).collect() };
        f.score_at(&format!("store/{name}"), &[("copy", &rows(copy)), ("pick", &rows(pick))]);
        format!("store/{name}")
    };
    let pair = |first: &str, second: &str, before: &str, after: &str| json!({"first": first, "second": second, "after_first": before, "after_second": after});
    let (copied, picked) = (folder("copied", 8, 2), folder("picked", 1, 9));
    let full = [
        pair("copy", "pick", &copied, &folder("f1", 4, 8)),
        pair("copy", "pick", &copied, &folder("f2", 2, 6)),
        pair("pick", "copy", &picked, &folder("f3", 7, 7)),
    ];
    let cpi = [
        pair("copy", "pick", &copied, &folder("c1", 7, 7)),
        pair("copy", "pick", &copied, &folder("c2", 6, 7)),
        pair("pick", "copy", &picked, &folder("c3", 6, 9)),
    ];
    let rows = [json!({"name": "full-sft", "pairs": full}), json!({"name": "cpi-ft", "pairs": cpi})];
    f.experiment("x", "forgetting", &json!({"baseline": "full-sft", "rows": rows}))
}

#[test]
fn forgetting_is_what_the_second_task_did() {
    let f = Folder::new();
    let text = show(&f, &forgetting(&f), &["--format", "markdown"]);
    let lines = cells(&text, &["full-sft", "cpi-ft"]);
    // ΔA of full-sft: -40, -60 and -20; ΔB +60, +40 and +60. Of cpi-ft: -10, -20 and 0; +50, +50
    // and +50.
    assert_eq!(lines[0], ["full-sft", "−40.0 ± 20.0", "**+53.3 ± 11.5**", "2", "3", "-"]);
    assert_eq!(lines[1][..5], ["cpi-ft", "**−10.0 ± 10.0**", "+50.0 ± 0.0", "2", "3"]);
    // 1 - 10/40. Resamples of one pair alone give 1 - 30/100 and 1 - 0/20.
    assert_eq!(lines[1][5], "75.0 [70.0, 100.0]", "{text}");
    let pairs = cells(&text, &["copy", "pick"]);
    assert_eq!(pairs[0], ["copy", "pick", "−50.0 ± 14.1", "**−15.0 ± 7.1**"]);
    assert_eq!(pairs[1], ["pick", "copy", "−20.0", "**0.0**"]);
    let csv = show(&f, &forgetting(&f), &["--format", "csv"]);
    let lines: Vec<Vec<&str>> = csv.lines().map(|line| line.split(',').collect()).collect();
    assert!(lines.iter().all(|line| line.len() == 11) && lines.len() == 1 + 2 * 3, "{csv}");
    assert!(lines[4][..4] == ["cpi-ft", "", "", "3"] && lines[5][..4] == ["cpi-ft", "copy", "pick", "2"], "{csv}");
    let json = json_of(&f, &forgetting(&f));
    let cut = &json["rows"][1]["cut"];
    assert!((cut["value"].as_f64().unwrap() - 0.75).abs() < 1e-12 && json["rows"][0]["cut"].is_null(), "{cut}");
    assert_eq!(json["rows"][1]["pairs"].as_array().unwrap().len(), 3);
}

#[test]
fn where_the_baseline_forgets_nothing_there_is_no_loss_to_avoid() {
    let f = Folder::new();
    let [low, high] = [[0.0; 4], [1.0; 4]].map(|rows| {
        f.score_at(&format!("store/{}", rows[0]), &[("copy", &rows), ("pick", &rows)]);
        format!("store/{}", rows[0])
    });
    let row = |name: &str, before: &str, after: &str| {
        let pair = json!({"first": "copy", "second": "pick", "after_first": before, "after_second": after});
        json!({"name": name, "pairs": [pair]})
    };
    let show =
        |rows: [Value; 2]| show(&f, &f.experiment("x", "forgetting", &json!({"baseline": "a", "rows": rows})), &[]);
    let text = show([row("a", &low, &high), row("b", &high, &low)]);
    assert!(
        text.contains("a forgets nothing: there is no loss to avoid.") && !text.contains("loss avoided %"),
        "{text}"
    );
    let text = show([row("a", &high, &low), row("b", &high, &high)]);
    assert_eq!(cells(&text, &["b"])[0][4], "100.0");
    assert!(text.contains("b: no interval of the loss avoided: it is over one pair of tasks."), "{text}");
}

#[test]
fn csv_has_every_figure_unrounded() {
    let f = Folder::new();
    let csv = show(&f, &two(&f, &[&[0.0; 4], &[0.5; 4]], &[&[0.25; 4], &[1.0; 4]]), &["--format", "csv"]);
    let lines: Vec<Vec<&str>> = csv.lines().map(|line| line.split(',').collect()).collect();
    assert!(lines.iter().all(|line| line.len() == lines[0].len()), "{csv}");
    let of =
        |method: &str, figure: &str| lines.iter().find(|l| l[0] == method && l[5] == figure).unwrap()[6..].to_vec();
    assert_eq!(of("b", "acc"), ["0.625", "0.5303300858899106", "2", "true", "0.375", "0.25", "0.5", "4"]);
    assert_eq!(of("a", "acc")[3..], ["false", "", "", "", ""]);
    assert_eq!(of("b", "nll")[..3], ["2", "0", "2"]);
}

#[test]
fn hostile_names_are_text_in_every_form() {
    let f = Folder::new();
    let name = format!("{HOSTILE} | \n| x |");
    let runs = store(&f, "a", &[&[1.0; 4]]);
    let rows = [json!({"name": name, "runs": runs, "note": name}), json!({"name": "b", "runs": runs})];
    let more = json!({"title": name, "question": name, "baseline": "b", "rows": rows});
    let file = f.experiment("x", "scores", &more);
    let text = show(&f, &file, &["--format", "markdown"]);
    assert!(!text.chars().any(|c| c.is_control() && c != '\n') && !text.contains('\u{202e}'), "{text:?}");
    assert_eq!(text.lines().filter(|line| line.starts_with('|')).count(), 4 + 3, "{text}");
    let page = show(&f, &file, &["--format", "html"]);
    let html = scraper::Html::parse_document(&page);
    let count = |css: &str| html.select(&scraper::Selector::parse(css).unwrap()).count();
    assert!(html.errors.is_empty(), "{:?}", html.errors);
    assert_eq!((count("script, img"), count("h1"), count("table"), count("figure svg")), (0, 1, 3, 2));
    assert_eq!(json_of(&f, &file)["rows"][0]["name"], json!(name), "JSON has it as it is");
}

#[test]
fn other_rows_and_missing_folders_are_refused_by_both_names() {
    let rows: [&[f64]; 2] = [&[0.0; 4], &[1.0; 4]];
    let f = Folder::new();
    let file = two(&f, &rows, &rows);
    f.edit_at("store/b-1", |s| s["tasks"][0]["eval_digest"] = json!("ab".repeat(32)));
    let error = try_show(&f, &file, &[]).unwrap_err();
    assert!(error.is::<BadInput>());
    let error = error.to_string();
    for part in ["store/b-1", "store/a-0", "b, seed 2", "a, seed 1", "the evaluation file of copy"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    std::fs::remove_dir_all(f.path("store/b-1")).unwrap();
    let error = try_show(&f, &file, &[]).unwrap_err().to_string();
    assert!(["store/b-1", "b, seed 2", "experiments/x.json"].iter().all(|part| error.contains(part)), "{error}");

    let file = forgetting(&f);
    f.edit_at("store/c2", |s| s["tasks"][1]["settings"]["rows"] = json!(9));
    let error = try_show(&f, &file, &[]).unwrap_err().to_string();
    assert!(["store/c2", "store/copied", "rows = 9"].iter().all(|part| error.contains(part)), "{error}");
    let out = f.path("forced");
    let line = Line::parse_from(["experiment", file.to_str().unwrap(), "--out", out.to_str().unwrap()]);
    experiment(&line.args, &common(true)).unwrap();
    let words = "cpi-ft after copy and pick differs from full-sft after copy in the setting rows of pick: rows = 9 against rows = 4.";
    assert!(read(&out).contains(words), "{}", read(&out));
    f.edit_at("store/c2", |s| s["tasks"].as_array_mut().unwrap().truncate(1));
    let error = try_show(&f, &file, &[]).unwrap_err().to_string();
    assert!(["store/c2", "no metric of pick", "experiments/x.json"].iter().all(|part| error.contains(part)), "{error}");
}

#[test]
fn files_that_make_no_sense_are_refused() {
    let f = Folder::new();
    let runs = store(&f, "a", &[&[1.0; 4], &[0.0; 4]]);
    let row = |runs: Value| json!({"name": "a", "runs": runs});
    let good = || row(json!(runs));
    let at = |x: f64| json!({"name": "a", "x": x, "runs": runs});
    let log = json!({"label": "p", "log": true});
    for (more, part) in [
        (json!({"rows": [row(json!(["../a"]))]}), "`../a` is no path under"),
        (json!({"rows": [row(json!(["/store/a-0"]))]}), "`/store/a-0` is no path under"),
        (json!({"format_version": 2, "rows": [good()]}), "found: 2"),
        (json!({"rows": [good()], "extra": 1}), "`extra`"),
        (json!({"rows": [{"name": "a", "runs": runs, "extra": 1}]}), "row 1: unknown field `extra`"),
        (json!({"rows": []}), "no rows"),
        (json!({"rows": [row(json!([]))]}), "a has no runs"),
        (json!({"rows": [good(), good()]}), "a occurs twice"),
        (json!({"rows": [good(), {"name": "b", "runs": runs[..1]}]}), "a has 2 runs and b has 1"),
        (json!({"rows": [good()], "baseline": "b"}), "the baseline b is not among the rows: a"),
        (json!({"rows": [good()], "axis": log}), "a has no x on the axis p"),
        (json!({"rows": [at(1.0)]}), "a has an x, but the experiment has no axis"),
        (json!({"rows": [at(0.0)], "axis": log}), "a is at 0 on a log axis"),
        (json!({"rows": [at(1.0), at(1.0)], "axis": log}), "a occurs twice at 1"),
        (json!({"kind": "other", "rows": [good()]}), "unknown variant `other`"),
    ] {
        let error = try_show(&f, &f.experiment("x", "scores", &more), &[]).unwrap_err();
        assert!(error.is::<BadInput>());
        let error = error.to_string();
        assert!(error.contains(part) && error.contains("experiments/x.json"), "{part}: {error}");
    }
    let same = json!({"first": "copy", "second": "copy", "after_first": runs[0], "after_second": runs[1]});
    let more = json!({"rows": [{"name": "a", "pairs": [same]}]});
    let error = try_show(&f, &f.experiment("x", "forgetting", &more), &[]).unwrap_err().to_string();
    assert!(error.contains("a: first and second are both copy"), "{error}");
}
