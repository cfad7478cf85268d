//! The commands of cpift-eval that `make add-task` calls: `sample`, `divergence`, and `run` on a
//! part of the rows.

use std::fs;
use std::path::Path;

use crate::common::{Fixture, continue_by, outputs, read_json, task};
use cpift_testkit::model::{row, write_rows, write_tiny_model};
use cpift_testkit::{Run, run};
use serde_json::{Value, json};

fn eval(args: &[&str]) -> Run {
    run(env!("CARGO_BIN_EXE_cpift-eval"), args.iter().copied().chain(["--device", "cpu", "--threads", "1"]))
}

fn ids(text: &str) -> Vec<usize> {
    text.bytes().map(usize::from).collect()
}

fn lines(path: &Path) -> Vec<Value> {
    fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn conversation(user: &str, assistant: &str) -> Value {
    json!({"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]})
}

#[test]
fn a_model_answers_the_prompts_of_training_rows() {
    let f = Fixture::new();
    // After the line break of the prompt it answers `ok` and ends its turn.
    continue_by(&f, &[ids("\nok"), vec![257]].concat());
    let rows: Vec<Value> = (0..5).map(|i| row(&format!("q{i}"), "never used")).collect();
    write_rows(&f.dir.path().join("data/copy/train.jsonl"), &rows);
    let (model, tasks, out) = (f.model.to_str().unwrap(), f.tasks.to_str().unwrap(), f.out("own.jsonl"));
    let fixed = ["sample", "--model", model, "--tasks", tasks, "--only", "copy", "--out", out.to_str().unwrap()];
    let cold = ["--temperature", "0.01", "--max-new-tokens", "8"];
    eval(&[&fixed[..], &cold, &["--rows", "3"]].concat()).ok();
    assert_eq!(lines(&out), ["q0", "q1", "q2"].map(|q| conversation(q, "ok")));
    let record = read_json(&out.with_file_name("own.jsonl.cpift.json"));
    assert_eq!((&record["facts"]["rows"]["copy"], &record["seed"]), (&json!(3), &json!(0)));
    // An up-to-date file is left alone; another is replaced only if asked for.
    eval(&[&fixed[..], &cold, &["--rows", "3", "--skip-up-to-date"]].concat()).ok().says(&["up to date"]);
    eval(&[&fixed[..], &cold].concat()).bad_input(&["own.jsonl", "--force"]);
    // Answers before the last are no targets. Training rows are never replaced.
    let turn = |role: &str, content: &str| json!({"role": role, "content": content});
    let long =
        json!({"messages": [turn("user", "q"), turn("assistant", "a"), turn("user", "r"), turn("assistant", "b")]});
    let train = f.dir.path().join("data/copy/train.jsonl");
    write_rows(&train, &[long]);
    eval(&[&fixed[..], &cold, &["--force"]].concat()).ok();
    let mut first = turn("assistant", "a");
    first["train"] = json!(false);
    assert_eq!(
        lines(&out),
        [json!({"messages": [turn("user", "q"), first, turn("user", "r"), turn("assistant", "ok")]})]
    );
    let over = ["sample", "--model", model, "--tasks", tasks, "--out", train.to_str().unwrap(), "--force"];
    eval(&[&over[..], &cold].concat()).expect_code(2).says(&["train.jsonl"]);
    write_rows(&train, &rows);
    // An answer that does not end in time is no row.
    let cut = ["--temperature", "0.01", "--max-new-tokens", "2", "--force"];
    eval(&[&fixed[..], &cut].concat())
        .bad_input(&["no row that can be used", "--max-new-tokens"])
        .says(&["copy: 5 samples did not end within --max-new-tokens"]);
    assert_eq!(lines(&out).len(), 1, "the file of the last run is still there");
}

#[test]
fn samples_depend_on_the_seed_and_not_on_the_batch() {
    let f = Fixture::new();
    let (model, tasks) = (f.model.to_str().unwrap(), f.tasks.to_str().unwrap());
    let rows: Vec<Value> = (0..40).map(|i| row(&format!("q{i}"), "a")).collect();
    write_rows(&f.dir.path().join("data/copy/train.jsonl"), &rows);
    let sample = |name: &str, more: &[&str]| {
        let out = f.out(name);
        let fixed = ["sample", "--model", model, "--tasks", tasks, "--only", "copy", "--out", out.to_str().unwrap()];
        eval(&[&fixed[..], &["--max-new-tokens", "100"], more].concat()).ok();
        fs::read(out).unwrap()
    };
    let first = sample("a.jsonl", &["--batch-size", "16"]);
    assert!(first == sample("b.jsonl", &["--batch-size", "3"]));
    assert!(first != sample("c.jsonl", &["--seed", "1"]));
}

#[test]
fn a_model_writes_conversations_from_its_template_alone() {
    let f = Fixture::new();
    // The user asks `hi`; the answer to the line break after it is the same text.
    continue_by(&f, &[ids("\nhi"), vec![257]].concat());
    let out = f.out("own.jsonl");
    let args = ["sample", "--model", f.model.to_str().unwrap(), "--out", out.to_str().unwrap(), "--rows", "2"];
    eval(&[&args[..], &["--temperature", "0.01", "--max-new-tokens", "8"]].concat()).ok();
    assert_eq!(lines(&out), [conversation("hi", "hi"), conversation("hi", "hi")]);
    // A user's turn that plain text ends.
    continue_by(&f, &[ids("\nhi[X]"), vec![257]].concat());
    let turns = "{% for m in messages %}{% if m.role == 'user' %}{{ '\\n' + m.content }}[X]{% else %}\
                 {{ m.content }}<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '\\n' }}{% endif %}";
    let config = json!({"eos_token": "<|im_end|>", "chat_template": turns});
    fs::write(f.model.join("tokenizer_config.json"), config.to_string()).unwrap();
    eval(&[&args[..], &["--temperature", "0.01", "--max-new-tokens", "8", "--force"]].concat()).ok();
    assert_eq!(lines(&out)[0], conversation("hi", "hi[X]"));
    // A template without the user's turn, or with nothing before it, has nothing to continue.
    for (template, problem) in [
        ("{% for m in messages %}x{% endfor %}", "does not write the user's turn"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "writes nothing before the user's turn"),
    ] {
        let config = json!({"eos_token": "<|im_end|>", "chat_template": template});
        fs::write(f.model.join("tokenizer_config.json"), config.to_string()).unwrap();
        eval(&[&args[..], &["--force"]].concat()).bad_input(&[problem, "--tasks"]);
    }
}

#[test]
fn the_divergence_of_a_model_from_itself_is_zero_and_from_another_is_not() {
    let f = Fixture::new();
    let other = write_tiny_model(&f.dir.path().join("other"), 2);
    let tasks = f.tasks.to_str().unwrap();
    let of = |name: &str, reference: &Path, more: &[&str]| {
        let out = f.out(name);
        let (model, reference) = (f.model.to_str().unwrap(), reference.to_str().unwrap());
        let fixed = ["divergence", "--model", model, "--reference", reference, "--tasks", tasks];
        eval(&[&fixed[..], &["--out", out.to_str().unwrap()], more].concat()).ok();
        read_json(&out)["tasks"].clone()
    };
    let same = of("same.json", &f.model, &[]);
    for figure in same.as_array().unwrap() {
        assert_eq!(figure["kl"]["value"], 0.0, "{same}");
    }
    let all = of("all.json", &other, &["--batch-size", "3"]);
    let value = |figures: &Value, task: usize| figures[task]["kl"]["value"].as_f64().unwrap();
    assert!((0..3).all(|task| value(&all, task) > 0.01), "{all}");
    let two = of("two.json", &other, &["--only", "count", "--limit", "2"]);
    assert_eq!((two.as_array().unwrap().len(), &two[0]["task"], &two[0]["kl"]["n"]), (1, &json!("count"), &json!(2)));
    let whole = of("whole.json", &other, &["--batch-size", "16"]);
    assert!((value(&all, 1) - value(&whole, 1)).abs() < 1e-6);
    // Another architecture is refused.
    let mut config = read_json(&other.join("config.json"));
    config["num_hidden_layers"] = json!(1);
    fs::write(other.join("config.json"), config.to_string()).unwrap();
    let args = ["--tasks", tasks, "--out", "x.json"];
    let models = ["divergence", "--model", f.model.to_str().unwrap(), "--reference", other.to_str().unwrap()];
    eval(&[&models[..], &args].concat()).expect_code(3);
}

#[test]
fn rows_are_scored_from_one_on() {
    let f = Fixture::new();
    fs::write(&f.tasks, task("copy", "metric = 'exact-match'\nmax_new_tokens = 4")).unwrap();
    let rows: Vec<Value> = (0..6).map(|i| row(&format!("q{i}"), "a")).collect();
    write_rows(&f.dir.path().join("data/copy/eval.jsonl"), &rows);
    f.eval("all", &[]).ok();
    f.eval("part", &["--skip", "2", "--limit", "3"]).ok();
    let (all, part) = (outputs(&f.out("all")), outputs(&f.out("part")));
    assert_eq!(part[..], all[2..5]);
    let settings = read_json(&f.out("part").join("scores.json"))["tasks"][0]["settings"].clone();
    assert_eq!((&settings["rows"], &settings["first_row"]), (&json!(3), &json!(3)));
    f.eval("none", &["--skip", "6"]).bad_input(&["copy/eval.jsonl", "more than 6 rows", "6"]);
}
