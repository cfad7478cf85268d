//! cpift-eval through the real binary.

use std::collections::HashSet;
use std::fs;

use cpift_testkit::model::{row, write_rows};
use cpift_testkit::{expect_entries, run};
use serde_json::{Value, json};

use crate::common::{Fixture, outputs, question, read_json, task};

#[test]
fn every_task_has_its_loss_and_its_metric() {
    let f = Fixture::new();
    f.eval("a", &[]).ok();
    expect_entries(&f.out("a"), &["cpift.json", "outputs.jsonl", "scores.json"]);
    let scores = read_json(&f.out("a").join("scores.json"));
    let tasks = scores["tasks"].as_array().unwrap();
    let names: Vec<&str> = tasks.iter().map(|t| t["metric"]["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["exact_match", "exact_match", "acc"]);
    for task in tasks {
        let nll = &task["nll"];
        // A random model over 259 tokens is near ln 259 = 5.56 nats.
        assert!((4.0..8.0).contains(&nll["value"].as_f64().unwrap()), "{nll}");
        assert_eq!((nll["n"].as_u64(), task["metric"]["n"].as_u64()), (Some(4), Some(4)));
    }
    assert!(tasks[1]["also"]["exact_match_flexible"].is_object());
    let outputs = fs::read_to_string(f.out("a").join("outputs.jsonl")).unwrap();
    assert_eq!(outputs.lines().count(), 12);
    // The score of `choice` follows from the log-likelihoods in outputs.jsonl.
    let choices: Vec<Value> =
        outputs.lines().map(|l| serde_json::from_str(l).unwrap()).filter(|v: &Value| v["task"] == "pick").collect();
    let mut right = 0.0;
    for row in &choices {
        let ll: Vec<f64> = row["log_likelihoods"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
        let likeliest = ["A", "B"][usize::from(ll[1] > ll[0])];
        assert_eq!(row["output"], likeliest, "{row}");
        right += f64::from(u8::from(row["reference"] == likeliest));
    }
    assert_eq!(tasks[2]["metric"]["value"].as_f64().unwrap(), right / 4.0);
    f.eval("b", &["--batch-size", "1"]).ok();
    let other = read_json(&f.out("b").join("scores.json"));
    for (a, b) in tasks.iter().zip(other["tasks"].as_array().unwrap()) {
        let difference = (a["nll"]["value"].as_f64().unwrap() - b["nll"]["value"].as_f64().unwrap()).abs();
        assert!(difference < 1e-5, "the batch size changes the loss by {difference}");
        assert_eq!(a["metric"], b["metric"]);
    }
}

#[test]
fn an_answer_equal_to_the_reference_scores_one() {
    let f = Fixture::new();
    f.eval("a", &["--only", "copy"]).ok();
    let outputs = fs::read_to_string(f.out("a").join("outputs.jsonl")).unwrap();
    let first: Value = serde_json::from_str(outputs.lines().next().unwrap()).unwrap();
    let mut same = row("say w100", "unused");
    same["answer"] = first["output"].clone();
    write_rows(&f.dir.path().join("data/copy/eval.jsonl"), &[same, row("say w100", "never this")]);
    f.eval("b", &["--only", "copy"]).ok();
    let metric = read_json(&f.out("b").join("scores.json"))["tasks"][0]["metric"].clone();
    assert_eq!(metric["value"], 0.5, "{metric}");
    assert_eq!(metric["stderr"], 0.5, "sample standard deviation over the root of n");
}

#[test]
fn the_table_has_every_run_and_the_score_with_its_formula() {
    let f = Fixture::new();
    f.eval("a", &[]).ok();
    f.eval("b", &[]).ok();
    let (a, b) = (f.out("a"), f.out("b"));
    let (a, b) = (a.to_str().unwrap(), b.to_str().unwrap());
    let table = f.compare(&[&format!("base={a}"), b]).ok().stdout;
    let rows: Vec<&str> = table.lines().filter(|l| l.starts_with('|')).collect();
    assert_eq!(rows.len(), 4);
    assert!(rows[0].contains("copy") && rows[0].contains("ANS"), "{table}");
    assert!(rows[2].contains("base") && rows[3].starts_with("| b "), "{table}");
    assert!(table.contains("Average Normalised Score") && table.contains("10 x metric"), "{table}");
    let json: Value = serde_json::from_str(&f.compare(&[a, "--json"]).ok().stdout).unwrap();
    let row = &json["rows"][0];
    let metrics = row["scores"]["tasks"].as_array().unwrap().iter().map(|t| t["metric"]["value"].as_f64().unwrap());
    assert!((row["ans"].as_f64().unwrap() - 10.0 * metrics.sum::<f64>() / 3.0).abs() < 1e-12);
}

#[test]
fn the_report_shows_what_was_scored_here() {
    let f = Fixture::new();
    for name in ["base", "tuned"] {
        f.eval(&format!("r/scores/{name}"), &[]).ok();
    }
    let folder = f.out("r");
    run(env!("CARGO_BIN_EXE_cpift-eval"), ["report", folder.to_str().unwrap(), "--resamples", "100"]).ok();
    let page = fs::read_to_string(folder.join("report.html")).unwrap();
    for part in ["copy", "pick", "100 resamples", "scores/tuned", "cpift-eval run --model", "No masks"] {
        assert!(page.contains(part), "{part}");
    }
    // The same model twice: rows are paired, and every interval has zero width.
    assert!(page.contains("0.0 [0.0, 0.0]") && !page.contains("no paired interval"), "{page}");
}

#[test]
fn runs_on_other_rows_are_not_compared() {
    let f = Fixture::new();
    f.eval("a", &[]).ok();
    f.eval("b", &["--limit", "2"]).ok();
    let (a, b) = (f.out("a"), f.out("b"));
    let args = [a.to_str().unwrap(), b.to_str().unwrap()];
    f.compare(&args).bad_input(&["other tasks or rows", "expected", "--force"]);
    f.compare(&[args[0], args[1], "--force"]).ok();
    let mut scores = read_json(&a.join("scores.json"));
    scores["format_version"] = json!(99);
    fs::write(a.join("scores.json"), scores.to_string()).unwrap();
    f.compare(&[args[0]]).bad_input(&["scores.json", "expected: 2", "found: 99"]);
}

#[test]
fn rows_without_the_fields_their_metric_needs_are_refused() {
    let f = Fixture::new();
    let file = f.dir.path().join("data/pick/eval.jsonl");
    let with = |choices: Value, answer: Value| {
        let mut r = row("pick 0", "A");
        (r["choices"], r["answer"]) = (choices, answer);
        r
    };
    let good = with(json!(["x", "y"]), json!(0));
    for (bad, part) in [
        (row("pick 0", "A"), "choices"),
        (with(json!(["x", "y"]), json!(2)), "index from 0 to 1"),
        (with(json!(["x", "y"]), json!("C")), "found: \"C\""),
    ] {
        write_rows(&file, &[good.clone(), bad]);
        f.eval("out", &[]).bad_input(&["pick/eval.jsonl", "line 2", part]);
        assert!(!f.out("out").exists());
    }
    let mut numeric = row("say x", "x");
    numeric["answer"] = json!([5]);
    write_rows(&f.dir.path().join("data/copy/eval.jsonl"), &[numeric]);
    f.eval("out", &[]).bad_input(&["copy/eval.jsonl", "line 1", "a text or a number"]);
}

/// Errors in the last task are reported before the first one is scored, which would log its loss.
#[test]
fn all_tasks_are_checked_before_any_is_scored() {
    let f = Fixture::new();
    let file = f.dir.path().join("data/pick/eval.jsonl");
    let good = question("pick 0", json!(["x", "y"]), 0);
    let mut empty = row("say x", "x");
    empty["answer"] = json!(" ");
    let mut truth = row("say x", "x");
    truth["answer"] = json!(true);
    let cases = [
        ("choice", "", [good.clone(), row("pick 0", "A")], 3, "line 2: the field choices"),
        ("choice", "split = '('", [good.clone(), good.clone()], 3, "split is not a regular expression"),
        ("choice", "few_shot = 12", [good.clone(), good.clone()], 3, "pick/train.jsonl"),
        ("codebleu", "language = 'cobol'", [row("q", "a"), row("q", "a")], 3, "found: cobol"),
        ("codebleu", "max_new_tokens = 4", [row("q", "a"), row("q", "a")], 3, "language"),
        ("contains", "max_new_tokens = 4", [row("q", "a"), empty], 3, "line 2: the field answer"),
        ("exact-match", "max_new_tokens = 4", [row("q", "a"), truth], 3, "line 2: the field answer"),
        ("judge", "max_new_tokens = 128", [row("q", "a"), row("q", "a")], 2, "leaves no room"),
        ("judge", "", [row("q", "a"), row("q", "a")], 2, "max_new_tokens of pick is 256"),
        ("nll", "max_length = 4", [row("q", "a"), row("q", "a")], 3, "no example has an assistant token"),
    ];
    let first = task("copy", "metric = 'exact-match'\nmax_new_tokens = 4");
    for (metric, more, rows, code, named) in cases {
        write_rows(&file, &rows);
        fs::write(&f.tasks, format!("{first}{}", task("pick", &format!("metric = '{metric}'\n{more}")))).unwrap();
        let run = f.eval("out", &["--prompt", "harness"]).expect_code(code).says(&[named]);
        assert!(!run.stderr.contains("copy: ") && !f.out("out").exists(), "{}", run.stderr);
    }
    f.eval("out", &["--only", "copy"]).ok().says(&["copy: exact_match"]);
}

#[test]
fn tasks_are_scored_once_and_in_their_order_however_they_are_named() {
    let f = Fixture::new();
    f.eval("a", &["--only", "pick,copy", "--only", "copy"]).ok();
    let scores = read_json(&f.out("a").join("scores.json"));
    let names: Vec<&str> = scores["tasks"].as_array().unwrap().iter().map(|t| t["task"].as_str().unwrap()).collect();
    assert_eq!(names, ["copy", "pick"]);
    assert_eq!(outputs(&f.out("a")).len(), 8);
}

#[test]
fn the_report_names_a_grouping_with_a_short_matrix() {
    let f = Fixture::new();
    f.eval("r/scores/base", &["--only", "copy"]).ok();
    let groups = json!({"format_version": 1, "tau": 0.5, "tau_mode": "fixed", "tasks": ["a", "b"],
        "jaccard": [[1.0, 0.5]], "chance": [[1.0, 0.5], [0.5, 1.0]], "excluded": [], "groups": [["a"], ["b"]],
        "order": {"method": "overlap"}, "trivial": true, "base": "0", "masks": {}});
    fs::write(f.out("r").join("groups.json"), groups.to_string()).unwrap();
    let folder = f.out("r");
    run(env!("CARGO_BIN_EXE_cpift-eval"), ["report", folder.to_str().unwrap()]).ok();
    let page = fs::read_to_string(folder.join("report.html")).unwrap();
    assert!(page.contains("jaccard does not have one row and one column per task"), "{page}");
}

#[test]
fn gsm8ks_own_rows_are_scored_by_the_number_in_their_answer() {
    let f = Fixture::new();
    let rows = [json!({"question": "2 + 2 =", "answer": "It is 4.\n#### 4"})];
    write_rows(&f.dir.path().join("data/count/eval.jsonl"), &rows);
    f.eval("a", &["--only", "count"]).ok();
    let outputs = fs::read_to_string(f.out("a").join("outputs.jsonl")).unwrap();
    let output: Value = serde_json::from_str(&outputs).unwrap();
    assert_eq!((&output["reference"], &output["row"]), (&json!("It is 4.\n#### 4"), &json!(1)));
    assert!(output["extracted"].is_string() && output["flexible_extract"].is_string());
}

#[test]
fn runs_by_other_templates_are_not_compared() {
    let f = Fixture::new();
    let rows = [json!({"word": "x", "answer": "x"})];
    write_rows(&f.dir.path().join("data/copy/eval.jsonl"), &rows);
    let task =
        "[[task]]\nname = 'copy'\ntrain = 'copy/train.jsonl'\neval = 'copy/eval.jsonl'\nmetric = 'exact-match'\n";
    for (out, prompt) in [("a", "say {{ word }}"), ("b", "repeat {{ word }}")] {
        let keys = format!("{task}max_new_tokens = 4\nprompt = '{prompt}'\ncompletion = '{{{{ answer }}}}'\n");
        fs::write(&f.tasks, keys).unwrap();
        f.eval(out, &[]).ok();
    }
    let (a, b) = (f.out("a"), f.out("b"));
    f.compare(&[a.to_str().unwrap(), b.to_str().unwrap()]).bad_input(&["other tasks or rows", "repeat {{ word }}"]);
}

#[test]
fn bad_arguments_and_outputs() {
    let f = Fixture::new();
    f.eval("out", &["--batch-size", "0"]).usage_error(&["--batch-size"]);
    f.eval("out", &["--only", "nope"]).bad_input(&["nope"]);
    fs::create_dir_all(f.out("out")).unwrap();
    f.eval("out", &[]).bad_input(&["exists", "--force"]);
    f.compare(&[f.dir.path().to_str().unwrap()]).bad_input(&["scores.json"]);
    fs::remove_file(f.model.join("config.json")).unwrap();
    f.eval("out2", &[]).bad_input(&["config.json"]);
}

#[test]
fn sampling_is_seeded_and_the_element_type_can_be_chosen() {
    let f = Fixture::new();
    let answers = |out: &str, more: &[&str]| -> Vec<Value> {
        f.eval(out, &[&["--only", "copy"], more].concat()).ok();
        outputs(&f.out(out)).into_iter().map(|o| o["output"].clone()).collect()
    };
    let first = answers("a", &["--temperature", "1", "--top-p", "0.9", "--seed", "3"]);
    assert_eq!(first, answers("b", &["--temperature", "1", "--top-p", "0.9", "--seed", "3", "--batch-size", "1"]));
    assert_ne!(first, answers("c", &["--temperature", "1", "--top-p", "0.9", "--seed", "4"]));
    answers("d", &["--compute-dtype", "bf16"]);
    assert_eq!(read_json(&f.out("d").join("scores.json"))["tasks"][0]["settings"]["compute_dtype"], "bf16");
    f.eval("e", &["--temperature=-1"]).usage_error(&["--temperature"]);
    f.eval("e", &["--top-p", "0.5"]).usage_error(&["--temperature"]);
    f.eval("e", &["--temperature", "1", "--top-p", "0"]).usage_error(&["--top-p"]);
    f.eval("e", &["--compute-dtype", "f16"]).usage_error(&["--compute-dtype"]);
}

/// Answers end where the model ends them or at the limit, however many rows are answered at a time.
#[test]
fn answers_do_not_depend_on_the_rows_beside_them() {
    let f = Fixture::new();
    let rows: Vec<Value> = (0..11).map(|i| row(&"word ".repeat(1 + 3 * i % 8), "x")).collect();
    write_rows(&f.dir.path().join("data/copy/eval.jsonl"), &rows);
    fs::write(&f.tasks, task("copy", "metric = 'exact-match'\nmax_new_tokens = 24")).unwrap();
    let answers = |out: &str, more: &[&str]| -> Vec<String> {
        f.eval(out, more).ok();
        outputs(&f.out(out)).iter().map(|o| o["output"].as_str().unwrap().to_owned()).collect()
    };
    let sampled = ["--temperature", "1", "--seed", "5"];
    for (name, sampling) in [("greedy", &[][..]), ("sampled", &sampled)] {
        fs::remove_file(f.model.join("generation_config.json")).ok();
        let free = answers(&format!("{name}-free"), &[sampling, &["--batch-size", "1"]].concat());
        // Every printable character but one in four ends an answer.
        let ends = |c: char| c.is_ascii_graphic() && !(c as u32).is_multiple_of(4);
        let ids: Vec<u32> = (33..127).filter(|id| ends(char::from_u32(*id).unwrap())).collect();
        fs::write(f.model.join("generation_config.json"), json!({"eos_token_id": ids}).to_string()).unwrap();
        let expected: Vec<&str> = free.iter().map(|text| text.split(ends).next().unwrap()).collect();
        let lengths: HashSet<usize> = expected.iter().map(|text| text.chars().count()).collect();
        assert!(lengths.len() > 2, "{expected:?}");
        for batch in ["1", "2", "3", "16"] {
            let found = answers(&format!("{name}-{batch}"), &[sampling, &["--batch-size", batch]].concat());
            assert_eq!(found, expected, "{name}, batch size {batch}");
        }
    }
}
