//! Grading generated answers.

use std::fs;

use cpift_testkit::model::{row, write_rows};
use serde_json::{Value, json};

use crate::common::{Fixture, outputs, read_json, task};

#[test]
fn contains_and_rouge_l_grade_the_generated_answer() {
    let f = Fixture::new();
    fs::write(&f.tasks, task("copy", "metric = 'exact-match'\nmax_new_tokens = 8")).unwrap();
    f.eval("a", &[]).ok();
    let output = outputs(&f.out("a"))[0]["output"].as_str().unwrap().trim().to_owned();
    let mut rows = [row("say w100", "x"), row("say w100", "never this one")];
    // A part of the answer is contained in it but not equal to it.
    rows[0]["answer"] = json!(output.chars().skip(1).take(3).collect::<String>());
    rows[0]["messages"][0]["content"] = outputs_user(&f);
    rows[1]["messages"][0]["content"] = outputs_user(&f);
    write_rows(&f.dir.path().join("data/copy/eval.jsonl"), &rows);
    for (metric, name) in [("contains", "contains"), ("rouge-l", "rouge_l")] {
        fs::write(&f.tasks, task("copy", &format!("metric = '{metric}'\nmax_new_tokens = 8"))).unwrap();
        f.eval(metric, &[]).ok();
        let scores = read_json(&f.out(metric).join("scores.json"));
        assert_eq!(scores["tasks"][0]["metric"]["name"], name);
        let second = outputs(&f.out(metric))[1]["score"].as_f64().unwrap();
        assert!(second < 1.0);
        if metric == "contains" {
            assert_eq!(scores["tasks"][0]["metric"]["value"], 0.5);
        }
    }
}

/// The first user turn of the task `copy`.
fn outputs_user(f: &Fixture) -> Value {
    let text = fs::read_to_string(f.dir.path().join("data/copy/eval.jsonl")).unwrap();
    let first: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    first["messages"][0]["content"].clone()
}

#[test]
fn code_is_compared_in_its_language_and_other_languages_are_skipped() {
    let f = Fixture::new();
    let code = |language: Value, answer: &str| {
        let mut r = row("write it", "unused");
        (r["language"], r["answer"]) = (language, json!(answer));
        r
    };
    let file = f.dir.path().join("data/copy/eval.jsonl");
    let metric =
        |more: &str| fs::write(&f.tasks, task("copy", &format!("metric = 'codebleu'\nmax_new_tokens = 8\n{more}")));
    metric("").unwrap();
    let rows = |own: &str| {
        let fenced = format!("As asked:\n```js\n{own}\n```\nDone.");
        [
            code(json!("Python"), "x = 1\ny = x"),
            code(json!("bash"), "ls"),
            code(Value::Null, &fenced),
            code(Value::Null, "?"),
        ]
    };
    write_rows(&file, &rows("let a = 1;"));
    f.eval("a", &[]).ok();
    // The model gives the same answer again, which is now correct.
    let said = outputs(&f.out("a"))[2]["output"].as_str().unwrap().to_owned();
    write_rows(&file, &rows(&said));
    let run = f.eval("b", &[]).ok();
    assert!(run.stderr.contains("2 of 4 rows are in no language that codebleu supports"), "{}", run.stderr);
    let lines = outputs(&f.out("b"));
    assert_eq!((&lines[1]["skipped"], &lines[3]["skipped"]), (&json!("bash"), &json!("no language")));
    assert!(lines[1]["score"].is_null() && lines[1]["row"] == 2, "{}", lines[1]);
    assert_eq!((&lines[2]["language"], &lines[2]["syntax_match"]), (&json!("javascript"), &json!(1.0)));
    let of = |name: &str| lines[2][name].as_f64().unwrap();
    let others = of("ngram_match") + of("weighted_ngram_match") + of("syntax_match");
    assert_eq!(
        (of("dataflow_match"), of("codebleu_original")),
        (0.0, others / 4.0),
        "no data flow is 0 in one reading"
    );
    assert_eq!((of("codebleu"), of("score")), ((others + 1.0) / 4.0, of("codebleu")), "and 1 in the other");
    assert!(lines[0]["score"].as_f64().unwrap() < 1.0);
    let scores = read_json(&f.out("b").join("scores.json"))["tasks"][0].clone();
    assert_eq!(
        (&scores["metric"]["name"], &scores["metric"]["n"], &scores["settings"]["skipped"]),
        (&json!("codebleu"), &json!(2), &json!(2))
    );
    assert_eq!(scores["nll"]["n"], 4, "the loss is over all rows");
    for name in ["codebleu_original", "corpus_codebleu", "dataflow_match", "parses", "weighted_ngram_match"] {
        assert_eq!(scores["also"][name]["n"], 2, "{name}");
    }
    // The task's language takes precedence over the rows'.
    metric("language = 'c++'").unwrap();
    f.eval("c", &[]).ok();
    assert!(outputs(&f.out("c")).iter().all(|line| line["language"] == "cpp"));
    metric("language = 'cobol'").unwrap();
    f.eval("d", &[]).bad_input(&["tasks.toml", "javascript", "found: cobol"]);
    metric("").unwrap();
    write_rows(&file, &[code(json!(3), "x = 1")]);
    f.eval("d", &[]).bad_input(&["copy/eval.jsonl", "line 1", "language", "found: 3"]);
    write_rows(&file, &[code(json!("bash"), "ls")]);
    f.eval("d", &[]).ok();
    assert!(read_json(&f.out("d").join("scores.json"))["tasks"][0]["metric"].is_null(), "none is not zero");
}
