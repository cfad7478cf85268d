//! `cpift-train preview` through the real binary, and its errors for data that training would
//! refuse.

use std::fs;
use std::path::{Path, PathBuf};

use cpift_testkit::model::{row, write_json, write_rows, write_tasks, write_tiny_model};
use cpift_testkit::{Run, run_with};
use serde_json::{Value, json};

struct Fixture {
    dir: tempfile::TempDir,
    model: PathBuf,
    tasks: PathBuf,
}

impl Fixture {
    /// A model without weights: a preview needs none.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let model = write_tiny_model(&dir.path().join("model"), 1);
        fs::remove_file(model.join("model.safetensors")).unwrap();
        let tasks = write_tasks(&dir.path().join("data"));
        Self { dir, model, tasks }
    }

    /// With one task over the rows of a file called `name`, and further `keys` of tasks.toml.
    fn of(name: &str, content: &str, keys: &str) -> Self {
        let f = Self::new();
        fs::write(f.dir.path().join("data").join(name), content).unwrap();
        fs::write(&f.tasks, format!("[[task]]\nname = 'a'\ntrain = '{name}'\neval = '{name}'\n{keys}")).unwrap();
        f
    }

    fn preview(&self, more: &[&str]) -> Run {
        self.preview_with(more, &[])
    }

    fn preview_with(&self, more: &[&str], env: &[(&str, &str)]) -> Run {
        let fixed = ["preview", "--model", self.model.to_str().unwrap(), "--tasks", self.tasks.to_str().unwrap()];
        run_with(env!("CARGO_BIN_EXE_cpift-train"), fixed.iter().chain(more), env)
    }
}

fn edit_json(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    edit(&mut value);
    write_json(path, &value);
}

#[test]
fn the_first_examples_of_each_task_are_shown_with_their_targets_marked() {
    let f = Fixture::new();
    let shown = f.preview(&["--rows", "2"]).ok().stdout;
    let headers: Vec<&str> = shown.lines().filter(|l| l.starts_with("---")).collect();
    assert_eq!(headers.len(), 6, "{shown}");
    let file = f.dir.path().join("data/copy/train.jsonl");
    let first = format!(
        "--- copy, {} line 1: 29 tokens, 3 targets\n<|im_start|>user↵\nsay w0<|im_end|>↵\n\
         <|im_start|>assistant↵\n«w0<|im_end|>»↵\n\n\n",
        file.display()
    );
    // One token per byte, and one each for the four marks of ChatML.
    assert_eq!(29, "user\nsay w0\nassistant\nw0\n".len() + 4);
    assert!(shown.starts_with(&first), "{shown}");
    let one = f.preview(&["--task", "pick,count", "--rows", "1"]).ok();
    let headers: Vec<&str> = one.stdout.lines().filter(|l| l.starts_with("---")).map(|l| &l[4..8]).collect();
    assert_eq!(headers, ["pick", "coun"]);
    one.says(&["pick: 12 examples", "12 rows by messages; columns kept: answer, choices"]);
}

#[test]
fn an_example_that_is_cut_or_left_out_says_so() {
    let f = Fixture::new();
    let rows = [row("a", "short"), row("b", &"x".repeat(90)), row(&"y".repeat(90), "never reached")];
    write_rows(&f.dir.path().join("data/copy/train.jsonl"), &rows);
    let run = f.preview(&["--task", "copy", "--max-length", "60"]).ok();
    let headers: Vec<&str> = run.stdout.lines().filter(|l| l.starts_with("---")).collect();
    assert!(headers[0].ends_with("line 1: 27 tokens, 6 targets"), "{headers:?}");
    assert!(headers[1].contains("line 2: 60 tokens, cut from 112, 40 targets"), "{headers:?}");
    assert!(headers[2].ends_with("line 3: 60 tokens, cut from 124, 0 targets: left out of training"), "{headers:?}");
    assert!(run.stdout.contains(&format!("«{}»\n", "x".repeat(40))), "{}", run.stdout);
    run.says(&["copy: 2 examples were cut to 60 tokens", "1 examples were left out"]);
}

#[test]
fn colours_come_when_asked_for_and_not_into_a_file() {
    let f = Fixture::new();
    let args = ["--task", "copy", "--rows", "1"];
    let always = f.preview_with(&[&args[..], &["--color", "always"]].concat(), &[("NO_COLOR", "1")]).ok().stdout;
    assert!(always.contains("\x1b[30;42mw0<|im_end|>\x1b[0m") && !always.contains('«'), "{always}");
    for color in ["auto", "never"] {
        let plain = f.preview(&[&args[..], &["--color", color]].concat()).ok().stdout;
        assert!(plain.contains("«w0<|im_end|>»") && !plain.contains('\x1b'), "{plain}");
    }
}

#[test]
fn json_has_ids_tokens_and_targets_of_equal_length() {
    let f = Fixture::new();
    let run = f.preview(&["--task", "copy", "--rows", "3", "--json"]).ok();
    let list: Vec<Value> = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!(list.len(), 3);
    let first = &list[0];
    let part = |key: &str| first[key].as_array().unwrap();
    assert_eq!((part("ids").len(), part("tokens").len()), (part("target").len(), part("ids").len()));
    assert_eq!((&first["row"], &first["truncated"], &first["task"]), (&json!(1), &json!(false), &json!("copy")));
    let targets: Vec<&Value> =
        part("tokens").iter().zip(part("target")).filter(|(_, t)| **t == json!(true)).map(|(token, _)| token).collect();
    assert_eq!(targets, ["w", "0", "<|im_end|>"]);
    assert_eq!(part("ids")[0], 256);
}

#[test]
fn other_formats_and_templates_reach_the_model() {
    let alpaca = json!([{"instruction": "add", "input": "1 2", "output": "3"}]).to_string();
    let shown = Fixture::of("d.json", &alpaca, "").preview(&[]).ok().stdout;
    assert!(shown.contains("d.json row 1") && shown.contains("user↵\nadd↵\n1 2<|im_end|>"), "{shown}");
    let keys = "prompt = '{{ passage }}?'\ncompletion = '{{ label }}'\nsystem = 'Be brief.'\n";
    let shown = Fixture::of("d.jsonl", r#"{"passage": "P", "label": 1}"#, keys).preview(&[]).ok().stdout;
    assert!(shown.contains("system↵\nBe brief.") && shown.contains("user↵\nP?<") && shown.contains("«1<"), "{shown}");
}

#[test]
fn what_training_would_refuse_is_refused_with_the_file_and_the_row() {
    let good = row("q", "a");
    for (name, content, keys, parts) in [
        ("d.jsonl", String::new(), "", ["d.jsonl", "no rows"].as_slice()),
        ("d.jsonl", format!("{good}\n{}", row("q", "")), "", &["d.jsonl: line 2", "empty content"]),
        ("d.jsonl", format!("{good}\n{{\"text\": \"x\"}}"), "", &["d.jsonl: line 2", "no conversation", "hint"]),
        ("d.csv", "q,a".into(), "", &["d.csv", "unknown kind", ".parquet"]),
        ("d.json", "[{]".into(), "", &["d.json", "not a list of JSON objects"]),
        ("d.parquet", "PAR1".into(), "", &["d.parquet", "Parquet"]),
        (
            "d.jsonl",
            good.to_string(),
            "prompt = '{{ x }}'\ncompletion = 'y'",
            &["d.jsonl: line 1", "uses x, which this row does not have"],
        ),
        ("d.jsonl", good.to_string(), "prompt = '{{ x'\ncompletion = 'y'", &["tasks.toml", "prompt does not parse"]),
        ("d.jsonl", good.to_string(), "max_length = 5", &["no example has an assistant token", "max_length"]),
    ] {
        Fixture::of(name, &content, keys).preview(&[]).bad_input(parts);
    }
}

#[test]
fn a_chat_template_that_raises_is_told_with_the_row_and_its_message() {
    let system = json!({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"}]});
    let f = Fixture::of("d.jsonl", &format!("{}\n{system}", row("q", "a")), "");
    edit_json(&f.model.join("tokenizer_config.json"), |config| {
        let template = config["chat_template"].as_str().unwrap();
        let guard = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns here') }}{% endif %}";
        config["chat_template"] = json!(format!("{guard}{template}"));
    });
    f.preview(&[]).bad_input(&["d.jsonl: line 2", "no system turns here"]);
}

#[test]
fn a_token_beyond_the_embedding_is_refused_where_a_row_uses_it() {
    let f = Fixture::new();
    // Without a row for <|pad|>, which no conversation has.
    edit_json(&f.model.join("config.json"), |config| config["vocab_size"] = json!(258));
    f.preview(&[]).ok();
    edit_json(&f.model.join("config.json"), |config| config["vocab_size"] = json!(257));
    f.preview(&[]).bad_input(&["train.jsonl: line 1", "<|im_end|>", "has id 257", "embedding has 257 rows"]);
}

#[test]
fn arguments_out_of_range_are_usage_errors() {
    let f = Fixture::new();
    f.preview(&["--rows", "0"]).usage_error(&["--rows"]);
    f.preview(&["--max-length", "1"]).usage_error(&["--max-length"]);
    f.preview(&["--color", "green"]).usage_error(&["green"]);
    f.preview(&["--task", "nope"]).bad_input(&["nope", "copy, count, pick"]);
}

#[test]
fn unknown_fields_of_config_json_are_warned_of_once_and_refused_where_that_is_asked_for() {
    let f = Fixture::new();
    let path = f.model.join("config.json");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    config["our_lab_note"] = json!("v2");
    write_json(&path, &config);
    let run = f.preview(&[]).ok();
    assert_eq!(run.stderr.matches("our_lab_note").count(), 1, "{}", run.stderr);
    f.preview(&["--strict-config"])
        .bad_input(&["config.json: fields that this program does not know", "our_lab_note = \"v2\""]);
    let plan = |more: &[&str]| {
        run_with(
            env!("CARGO_BIN_EXE_cpift-train"),
            ["plan", "--model", f.model.to_str().unwrap()].iter().chain(more),
            &[],
        )
    };
    plan(&[]).ok().says(&["our_lab_note"]);
    plan(&["--strict-config"]).bad_input(&["our_lab_note"]);
    let out = f.dir.path().join("out");
    let run = [
        "run",
        "--model",
        f.model.to_str().unwrap(),
        "--tasks",
        f.tasks.to_str().unwrap(),
        "--out",
        out.to_str().unwrap(),
    ];
    run_with(env!("CARGO_BIN_EXE_cpift-train"), run.iter().chain(&["--strict-config"]), &[])
        .bad_input(&["our_lab_note"]);
}

#[test]
fn a_template_that_loses_text_or_ends_no_answer_is_warned_of_in_preview_and_run() {
    let turn = |role: &str, content: &str| json!({"role": role, "content": content});
    let thinking = json!({"messages": [turn("user", "q"), turn("assistant", "<think>so</think>a")]});
    let system = json!({"messages": [turn("system", "s"), turn("user", "q"), turn("assistant", "a")]});
    let f = Fixture::of("d.jsonl", &[row("q", "a"), thinking, system].map(|row| row.to_string()).join("\n"), "");
    write_tiny_model(&f.model, 1);
    let said = |body: &str, eos: Option<&str>| {
        let template =
            format!("{{% for m in messages %}}{body}{{% endfor %}}{{% if add_generation_prompt %}}A:{{% endif %}}");
        edit_json(&f.model.join("config.json"), |config| drop(config.as_object_mut().unwrap().remove("eos_token_id")));
        write_json(&f.model.join("tokenizer_config.json"), &json!({"eos_token": eos, "chat_template": template}));
        let preview = f.preview(&[]).ok().stderr;
        let paths = [&f.model, &f.tasks, &f.dir.path().join("out")].map(|path| path.to_str().unwrap().to_owned());
        let run = ["run", "--model", &paths[0], "--tasks", &paths[1], "--out", &paths[2], "--steps", "1", "--force"];
        let run = run_with(env!("CARGO_BIN_EXE_cpift-train"), run, &[]).ok().stderr;
        let parts = [
            "leaves out or rewrites text of a turn of the system (first: ",
            "leaves out or rewrites text of a turn of the assistant (first: ",
            "ends 3 answers with no special token (first: ",
            "no EOS in tokenizer_config.json, generation_config.json or config.json",
        ];
        let found = |text: &str| parts.map(|part| text.contains(part));
        assert_eq!(found(&preview), found(&run), "{body}: {preview}{run}");
        found(&run)
    };
    let eos = Some("<|im_end|>");
    assert_eq!(said("{{ m.content }}<|im_end|>", eos), [false, false, false, false]);
    let both = "{% if m.role != 'system' %}{{ m.content.split('</think>')[-1] }}<|im_end|>{% endif %}";
    assert_eq!(said(both, eos), [true, true, false, false]);
    assert_eq!(said("{{ m.content }}\n", eos), [false, false, true, false]);
    assert_eq!(said("{{ m.content }}<|im_end|>", None), [false, false, false, true]);
}

#[test]
fn a_template_without_a_generation_prompt_is_warned_of() {
    let f = Fixture::new();
    let said = |template: &str| {
        let config = json!({"eos_token": "<|im_end|>", "chat_template": template});
        write_json(&f.model.join("tokenizer_config.json"), &config);
        f.preview(&[]).ok().stderr
    };
    let turns = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}";
    assert!(said(turns).contains("no generation prompt; prompts end with \"<|im_start|>assistant\\n\""));
    let asking = format!("{turns}{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}");
    assert!(!said(&asking).contains("generation prompt"));
}

#[test]
fn template_arguments_reach_preview_and_training() {
    let argument = "{% if think is defined %}({{ think }}){% endif %}";
    let weights = |argument: &str, keys: &str, expected: &str| {
        let f = Fixture::of("d.jsonl", &row("q", "a").to_string(), keys);
        write_tiny_model(&f.model, 1);
        let turns = format!("{{% for m in messages %}}{argument}{{{{ m.content }}}}<|im_end|>{{% endfor %}}");
        let config = json!({"eos_token": "<|im_end|>", "chat_template": turns});
        write_json(&f.model.join("tokenizer_config.json"), &config);
        let shown = f.preview(&[]).ok().stdout;
        assert!(shown.contains(expected), "{shown}");
        let paths = [&f.model, &f.tasks, &f.dir.path().join("out")].map(|path| path.to_str().unwrap().to_owned());
        let run = ["run", "--model", &paths[0], "--tasks", &paths[1], "--out", &paths[2], "--steps", "2"];
        run_with(env!("CARGO_BIN_EXE_cpift-train"), run, &[]).ok();
        fs::read(f.dir.path().join("out/model.safetensors")).unwrap()
    };
    let given = weights(argument, "template_args = { think = false }", "\n(False)q<|im_end|>(False)«a<|im_end|>»");
    // The same as a template that has the text itself.
    assert!(given == weights("(False)", "", "\n(False)q<|im_end|>(False)«a<|im_end|>»"));
    assert!(given != weights(argument, "", "\nq<|im_end|>«a<|im_end|>»"));
}
