//! cpift-eval through the real binary.

use std::fs;
use std::path::{Path, PathBuf};

use cpift_testkit::model::{row, write_rows, write_tasks, write_tiny_model};
use cpift_testkit::{Run, expect_entries, run};
use serde_json::{Value, json};

struct Fixture {
    dir: tempfile::TempDir,
    model: PathBuf,
    tasks: PathBuf,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let model = write_tiny_model(&dir.path().join("model"), 1);
        let tasks = write_tasks(&dir.path().join("data"));
        Self { dir, model, tasks }
    }

    fn out(&self, name: &str) -> PathBuf {
        self.dir.path().join("runs").join(name)
    }

    fn eval(&self, out: &str, more: &[&str]) -> Run {
        let out = self.out(out);
        let fixed = ["run", "--model", self.model.to_str().unwrap(), "--tasks", self.tasks.to_str().unwrap()];
        let fixed = fixed.into_iter().chain(["--out", out.to_str().unwrap(), "--device", "cpu", "--threads", "1"]);
        run(env!("CARGO_BIN_EXE_cpift-eval"), fixed.chain(more.iter().copied()))
    }

    fn compare(&self, args: &[&str]) -> Run {
        run(env!("CARGO_BIN_EXE_cpift-eval"), ["compare"].iter().chain(args))
    }
}

fn read_json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

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
    // The choice's score follows from the log-likelihoods that are written down.
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
fn an_answer_equal_to_the_models_own_output_scores_one() {
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
    // One model twice: rows are paired, and no difference has any doubt.
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
    f.compare(&[args[0]]).bad_input(&["scores.json", "expected: 1", "found: 99"]);
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
        (with(json!(["x", "y"]), json!("A")), "found: \"A\""),
    ] {
        write_rows(&file, &[good.clone(), bad]);
        f.eval("out", &[]).bad_input(&["pick/eval.jsonl", "line 2", part]);
        assert!(!f.out("out").exists());
    }
    let mut numeric = row("say x", "x");
    numeric["answer"] = json!(5);
    write_rows(&f.dir.path().join("data/copy/eval.jsonl"), &[numeric]);
    f.eval("out", &[]).bad_input(&["copy/eval.jsonl", "line 1", "a string"]);
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

/// Rows of outputs.jsonl.
fn outputs(folder: &Path) -> Vec<Value> {
    let text = fs::read_to_string(folder.join("outputs.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn task(name: &str, more: &str) -> String {
    format!("[[task]]\nname = '{name}'\ntrain = '{name}/train.jsonl'\neval = '{name}/eval.jsonl'\n{more}\n")
}

fn question(user: &str, choices: Value, answer: usize) -> Value {
    let mut r = row(user, ["A", "B"][answer]);
    (r["choices"], r["answer"]) = (choices, json!(answer));
    r
}

const SPLIT: &str = r"split = '(?s)^(?P<passage>.*)\n\n(?P<question>.*)\n\nA\. '";

#[test]
fn the_harness_prompt_of_multiple_choice_scores_the_options_text() {
    let f = Fixture::new();
    let user = "All birds fly.\nSo they say.\n\nWho flies?\n\nA. birds\nB. é";
    let rows = [question(user, json!(["birds", "é"]), 0), question(user, json!(["é", "birds"]), 0)];
    write_rows(&f.dir.path().join("data/pick/eval.jsonl"), &rows);
    fs::write(&f.tasks, task("pick", &format!("metric = 'choice'\n{SPLIT}"))).unwrap();
    f.eval("a", &["--prompt", "harness"]).ok();
    let outputs = outputs(&f.out("a"));
    let prompt = "Passage: All birds fly.\nSo they say.\nQuestion: Who flies?\nChoices:\nA. birds\nB. é\nAnswer:";
    assert_eq!(outputs[0]["prompt"], prompt);
    for output in &outputs {
        let ll: Vec<f64> = output["log_likelihoods"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
        let lengths = if output["row"] == 1 { [5.0, 1.0] } else { [1.0, 5.0] };
        let score = |first: bool| json!(f64::from(u8::from(first)));
        assert_eq!(output["acc"], score(ll[0] >= ll[1]), "{output}");
        assert_eq!(output["acc_norm"], score(ll[0] / lengths[0] >= ll[1] / lengths[1]), "code points: {output}");
    }
    let scores = read_json(&f.out("a").join("scores.json"));
    assert_eq!(scores["tasks"][0]["settings"]["prompt"], "harness");
    assert_eq!(scores["tasks"][0]["also"]["acc_norm"]["n"], 2);
    write_rows(
        &f.dir.path().join("data/pick/eval.jsonl"),
        &[rows[0].clone(), question("no parts", json!(["x", "y"]), 0)],
    );
    f.eval("b", &["--prompt", "harness"]).bad_input(&["pick/eval.jsonl", "line 2", "split", "no parts"]);
    fs::write(&f.tasks, task("pick", "metric = 'choice'\nsplit = '('")).unwrap();
    f.eval("b", &[]).bad_input(&["tasks.toml", "split", "regular expression"]);
}

#[test]
fn equal_options_tie_and_the_first_is_taken() {
    let f = Fixture::new();
    write_rows(&f.dir.path().join("data/pick/eval.jsonl"), &[question("q", json!(["same", "same"]), 1)]);
    fs::write(&f.tasks, task("pick", "metric = 'choice'")).unwrap();
    f.eval("a", &["--prompt", "harness"]).ok();
    let output = &outputs(&f.out("a"))[0];
    assert_eq!((&output["extracted"], &output["acc"], &output["acc_norm"]), (&json!("A"), &json!(0.0), &json!(0.0)));
    assert_eq!(output["prompt"], "Question: q\nChoices:\nA. same\nB. same\nAnswer:", "no passage, no such line");
}

#[test]
fn examples_come_from_the_training_file_by_the_seed() {
    let f = Fixture::new();
    let train: Vec<Value> =
        (0..9).map(|i| json!({"question": format!("q{i}"), "answer": format!("#### {i}")})).collect();
    write_rows(&f.dir.path().join("data/count/train.jsonl"), &train);
    // The first question is one of the training file's too.
    let eval: Vec<Value> =
        (3..5).map(|i| json!({"question": format!("q{i}"), "answer": format!("#### {i}")})).collect();
    write_rows(&f.dir.path().join("data/count/eval.jsonl"), &eval);
    fs::write(&f.tasks, task("count", "metric = 'gsm8k'\nmax_new_tokens = 4")).unwrap();
    let prompts = |out: &str, more: &[&str]| -> Vec<String> {
        f.eval(out, &[&["--few-shot", "2"], more].concat()).ok();
        outputs(&f.out(out)).iter().map(|o| o["prompt"].as_str().unwrap().to_owned()).collect()
    };
    let harness = prompts("a", &["--prompt", "harness"]);
    for (prompt, own) in harness.iter().zip(["q3", "q4"]) {
        let parts: Vec<&str> = prompt.split("\n\n").collect();
        assert_eq!((parts.len(), parts[2]), (3, format!("Question: {own}\nAnswer:").as_str()), "{prompt}");
        for example in &parts[..2] {
            let number = example.strip_prefix("Question: q").unwrap().chars().next().unwrap();
            assert_eq!(*example, format!("Question: q{number}\nAnswer: #### {number}"));
            assert_ne!(format!("q{number}"), own, "the row's own question");
        }
    }
    assert_eq!(harness, prompts("b", &["--prompt", "harness", "--batch-size", "1"]));
    assert_ne!(harness, prompts("c", &["--prompt", "harness", "--seed", "5"]));
    assert_eq!(prompts("d", &[])[0].matches("<|im_start|>assistant").count(), 3, "turns of a chat prompt");
    f.eval("e", &["--few-shot", "9"]).bad_input(&["count/train.jsonl", "more than 9", "found: 9"]);
}

#[test]
fn contains_and_rouge_l_grade_the_generated_answer() {
    let f = Fixture::new();
    fs::write(&f.tasks, task("copy", "metric = 'exact-match'\nmax_new_tokens = 8")).unwrap();
    f.eval("a", &[]).ok();
    let output = outputs(&f.out("a"))[0]["output"].as_str().unwrap().trim().to_owned();
    let mut rows = [row("say w100", "x"), row("say w100", "never this one")];
    // A part of the answer is contained, and is not the answer.
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
