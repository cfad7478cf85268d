//! cpift-probe through the real binary.

use std::fs;
use std::path::{Path, PathBuf};

use cpift_core::Dtype;
use cpift_testkit::model::{row, tiny_weights, write_rows, write_tasks, write_tiny_model};
use cpift_testkit::ranks::Job;
use cpift_testkit::{Run, Tensor, Tensors, expect_entries, read_checkpoint, run, run_with, write_safetensors};
use serde_json::{Value, json};

struct Fixture {
    dir: tempfile::TempDir,
    base: PathBuf,
    tasks: PathBuf,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let base = write_tiny_model(&dir.path().join("base"), 1);
        let tasks = write_tasks(&dir.path().join("data"));
        Self { dir, base, tasks }
    }

    fn out(&self) -> PathBuf {
        self.dir.path().join("out").join("probe")
    }

    fn args(&self, more: &[&str]) -> Vec<String> {
        let fixed = ["--base", self.base.to_str().unwrap(), "--tasks", self.tasks.to_str().unwrap()];
        let out = self.out();
        let fixed = fixed.into_iter().chain(["--out", out.to_str().unwrap(), "--steps", "3", "--lr", "1e-3"]);
        fixed.chain(["--device", "cpu", "--threads", "1"]).chain(more.iter().copied()).map(str::to_owned).collect()
    }

    fn probe(&self, more: &[&str]) -> Run {
        run(env!("CARGO_BIN_EXE_cpift-probe"), self.args(more))
    }

    /// Runs the probe on `copy` with other training rows.
    fn probe_rows(&self, lines: &str) -> Run {
        fs::write(self.dir.path().join("data/copy/train.jsonl"), lines).unwrap();
        self.probe(&["--task", "copy"])
    }

    fn nothing_left(&self) {
        if self.out().parent().unwrap().exists() {
            expect_entries(self.out().parent().unwrap(), &[]);
        }
    }
}

fn read_json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn a_probe_is_a_hugging_face_folder_that_moved_and_the_same_on_a_rerun() {
    let f = Fixture::new();
    f.probe(&["--task", "copy"]).ok();
    let names = [
        "config.json",
        "cpift.json",
        "generation_config.json",
        "metrics.jsonl",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    expect_entries(&f.out(), &names);
    // No file of the base has an eos_token_id; the template ends a turn with <|im_end|>.
    assert_eq!(read_json(&f.out().join("generation_config.json")), json!({"eos_token_id": [257]}));
    let first = fs::read(f.out().join("model.safetensors")).unwrap();
    let (base, probe) = (read_checkpoint(&f.base), read_checkpoint(&f.out()));
    assert_eq!(base.keys().collect::<Vec<_>>(), probe.keys().collect::<Vec<_>>());
    assert!(
        base.iter()
            .all(|(n, t)| probe[n].shape == t.shape && probe[n].dtype == Dtype::F32 && probe[n].bytes != t.bytes)
    );
    let metrics = fs::read_to_string(f.out().join("metrics.jsonl")).unwrap();
    assert_eq!(metrics.lines().count(), 3);
    f.probe(&["--task", "copy", "--force"]).ok();
    assert_eq!(fs::read(f.out().join("model.safetensors")).unwrap(), first, "a rerun gives the same bytes");
    f.probe(&["--task", "copy", "--force", "--seed", "5"]).ok();
    assert_ne!(fs::read(f.out().join("model.safetensors")).unwrap(), first, "another seed gives others");
}

#[test]
fn the_saved_dtype_and_config_agree() {
    let f = Fixture::new();
    f.probe(&["--task", "copy", "--save-dtype", "bf16"]).ok().says(&["BF16"]);
    assert!(read_checkpoint(&f.out()).values().all(|t| t.dtype == Dtype::BF16));
    assert_eq!(read_json(&f.out().join("config.json"))["torch_dtype"], "bfloat16");
}

#[test]
fn the_task_is_named_indexed_or_taken_from_the_job_array() {
    let f = Fixture::new();
    let task = |f: &Fixture| read_json(&f.out().join("cpift.json"))["facts"]["task"].clone();
    f.probe(&["--task-index", "2"]).ok();
    assert_eq!(task(&f), "pick");
    let binary = env!("CARGO_BIN_EXE_cpift-probe");
    run_with(binary, f.args(&["--force"]), &[("SLURM_ARRAY_TASK_ID", "1")]).ok();
    assert_eq!(task(&f), "count");
    run_with(binary, f.args(&["--force", "--task", "copy"]), &[("SLURM_ARRAY_TASK_ID", "1")]).ok();
    assert_eq!(task(&f), "copy");
    f.probe(&["--force", "--task-index", "3"]).usage_error(&["out of range", "0 to 2"]);
    f.probe(&["--force"]).usage_error(&["--task NAME", "SLURM_ARRAY_TASK_ID"]);
    f.probe(&["--force", "--task", "nope"]).bad_input(&["nope", "copy, count, pick"]);
}

#[test]
fn a_token_budget_ends_within_one_batch() {
    let f = Fixture::new();
    let args: Vec<String> = f.args(&["--task", "copy"]).into_iter().filter(|a| a != "--steps" && a != "3").collect();
    let tokens = ["--tokens", "2000", "--batch-size", "2"].map(str::to_owned);
    run(env!("CARGO_BIN_EXE_cpift-probe"), args.into_iter().chain(tokens)).ok();
    let facts = &read_json(&f.out().join("cpift.json"))["facts"];
    let seen = facts["tokens"].as_u64().unwrap();
    assert!((2000..2000 + 2 * 96).contains(&seen), "{seen}");
}

#[test]
fn bad_rows_are_refused_with_their_line() {
    let f = Fixture::new();
    let good = row("q", "a").to_string();
    let conversation = |roles: &[&str]| {
        let turns: Vec<Value> = roles.iter().map(|r| json!({"role": r, "content": "x"})).collect();
        format!("{good}\n{}\n", json!({"messages": turns}))
    };
    for (lines, parts) in [
        (format!("{good}\n{{\"messages\": ["), ["line 2", "not a JSON object"]),
        (format!("{good}\n\n{}\n", json!({"messages": []})), ["line 3", "empty"]),
        (format!("{good}\n{}\n", json!({"text": "x"})), ["line 2", "no conversation"]),
        (format!("{good}\n{}\n", row("q", "")), ["line 2", "empty content"]),
        (conversation(&["assistant", "user"]), ["line 2", "\"assistant\" where \"user\""]),
        (conversation(&["user", "user"]), ["line 2", "\"user\" where \"assistant\""]),
        (conversation(&["user", "assistant", "user"]), ["line 2", "does not end with the assistant"]),
        (conversation(&["user", "tool"]), ["line 2", "tool"]),
        (String::new(), ["train.jsonl", "no rows"]),
    ] {
        f.probe_rows(&lines).bad_input(&["copy/train.jsonl", parts[0], parts[1]]);
        f.nothing_left();
    }
}

#[test]
fn the_same_conversations_train_the_same_whatever_their_format() {
    let f = Fixture::new();
    let texts = [("say one", "one"), ("say two", "two"), ("say three", "three")];
    let messages: Vec<Value> = texts.iter().map(|(q, a)| row(q, a)).collect();
    let alpaca: Value = texts.iter().map(|(q, a)| json!({"instruction": q, "input": "", "output": a})).collect();
    let columns: Vec<Value> = texts.iter().map(|(_, a)| json!({"word": a})).collect();
    let data = f.dir.path().join("data");
    write_rows(&data.join("messages.jsonl"), &messages);
    fs::write(data.join("alpaca.json"), alpaca.to_string()).unwrap();
    write_rows(&data.join("columns.jsonl"), &columns);
    let probes = [
        ("messages.jsonl", ""),
        ("alpaca.json", ""),
        ("columns.jsonl", "prompt = 'say {{ word }}'\ncompletion = '{{ word }}'"),
    ];
    let trained = probes.map(|(file, keys)| {
        let toml = format!("[[task]]\nname = 'copy'\ntrain = '{file}'\neval = '{file}'\n{keys}");
        fs::write(&f.tasks, toml).unwrap();
        f.probe(&["--task", "copy", "--force"]).ok();
        fs::read(f.out().join("model.safetensors")).unwrap()
    });
    assert!(trained.iter().all(|weights| *weights == trained[0]));
}

#[test]
fn long_examples_are_cut_and_counted_or_refused() {
    let f = Fixture::new();
    let lines = format!("{}\n{}\n", row("q", "a"), row("long", &"x".repeat(200)));
    f.probe_rows(&lines).ok().says(&["1 examples were cut to 96 tokens"]);
    assert_eq!(read_json(&f.out().join("cpift.json"))["facts"]["truncated"], 1);
    f.probe(&["--task", "copy", "--force", "--no-truncate"]).bad_input(&[
        "line 2",
        "at most 96 tokens",
        "--no-truncate",
    ]);
    write_rows(&f.dir.path().join("data/copy/train.jsonl"), &[row(&"x".repeat(200), "a")]);
    f.probe(&["--task", "copy", "--force"]).bad_input(&["train.jsonl", "no example has an assistant token"]);
}

#[test]
fn an_existing_output_needs_force() {
    let f = Fixture::new();
    fs::create_dir_all(f.out()).unwrap();
    fs::write(f.out().join("mine"), "").unwrap();
    f.probe(&["--task", "copy"]).bad_input(&["exists", "--force"]);
    expect_entries(&f.out(), &["mine"]);
}

#[test]
fn an_output_never_replaces_an_input() {
    let f = Fixture::new();
    f.probe(&["--task", "copy"]).ok();
    let weights = fs::read(f.out().join("model.safetensors")).unwrap();
    let again = |base: PathBuf, more: &[&str]| {
        let g = Fixture { base, dir: tempfile::tempdir().unwrap(), tasks: f.tasks.clone() };
        let mut args = g.args(&[&["--task", "copy", "--force"], more].concat());
        let at = args.iter().position(|a| a == "--out").unwrap() + 1;
        args[at] = f.out().to_str().unwrap().to_owned();
        run(env!("CARGO_BIN_EXE_cpift-probe"), args)
    };
    again(f.out(), &[]).usage_error(&["--out", "would replace the input"]);
    again(f.out(), &["--resume"]).usage_error(&["--out", "would replace the input"]);
    // The states that --force removes as well.
    let states = f.out().with_file_name("probe.checkpoints");
    let state = states.join("step-0000001/weights");
    fs::create_dir_all(state.parent().unwrap()).unwrap();
    write_tiny_model(&state, 1);
    again(state.clone(), &[]).usage_error(&["--out's states", "probe.checkpoints", "would replace the input"]);
    assert!(state.join("model.safetensors").exists());
    assert_eq!(fs::read(f.out().join("model.safetensors")).unwrap(), weights);
}

#[test]
fn dtypes_that_round_the_base_are_warned_of() {
    const ROUNDS: &str = "--master-dtype BF16 rounds the base's";
    let f = Fixture::new();
    let bf16 = ["--task", "copy", "--master-dtype", "bf16", "--force"];
    f.probe(&bf16).ok().says(&[ROUNDS, "F32", "cpift-mask"]);
    let stored = |dtype: Dtype| {
        let mut weights = tiny_weights(1);
        weights.values_mut().for_each(|t| *t = Tensor::floats(dtype, &t.shape, &t.values()));
        fs::remove_file(f.base.join("model.safetensors")).unwrap();
        write_safetensors(&f.base.join("model.safetensors"), &weights);
    };
    stored(Dtype::F16);
    f.probe(&bf16).ok().says(&[ROUNDS, "F16"]);
    assert!(!f.probe(&["--task", "copy", "--force"]).ok().stderr.contains("rounds"));
    stored(Dtype::BF16);
    assert!(!f.probe(&bf16).ok().stderr.contains("rounds"));
}

#[test]
fn a_weight_that_the_saved_dtype_cannot_hold_is_named() {
    let f = Fixture::new();
    let norm = "model.layers.1.input_layernorm.weight";
    let mut weights = tiny_weights(1);
    weights.insert(norm.into(), Tensor::f32(&[16], &[7e4; 16]));
    for name in ["q", "k", "v"].map(|n| format!("model.layers.1.self_attn.{n}_proj.weight")) {
        let t = &weights[&name];
        let small = Tensor::f32(&t.shape, &t.values().iter().map(|v| v / 7e4).collect::<Vec<_>>());
        weights.insert(name, small);
    }
    fs::remove_file(f.base.join("model.safetensors")).unwrap();
    write_safetensors(&f.base.join("model.safetensors"), &weights);
    let failed = f.probe(&["--task", "copy", "--save-dtype", "f16"]).expect_code(1);
    failed.says(&[norm, "element 0", "7e4", "becomes inf in F16", "--save-dtype f32 or bf16"]);
    assert!(!f.out().exists());
    f.probe(&["--task", "copy", "--save-dtype", "bf16", "--force"]).ok();
}

#[test]
fn names_of_transformers_options_are_taken() {
    let f = Fixture::new();
    let weights = || fs::read(f.out().join("model.safetensors")).unwrap();
    let without = |more: &[&str]| -> Vec<String> {
        let args = f.args(&[&["--task", "copy", "--force"], more].concat());
        let cut = |flag: &str| args.iter().position(|a| a == flag).unwrap();
        let gone = [cut("--steps"), cut("--lr")];
        args.iter()
            .enumerate()
            .filter(|(i, _)| !gone.iter().any(|g| i == g || *i == g + 1))
            .map(|(_, a)| a.clone())
            .collect()
    };
    let binary = env!("CARGO_BIN_EXE_cpift-probe");
    let ours = "--steps 4 --lr 1e-3 --batch-size 2 --grad-accum 2 --max-grad-norm 0.5 --weight-decay 0.1 --save-every 2 --save-total-limit 2 \
                --eval-every 2 --log-every 1";
    let theirs = "--max_steps 4 --learning_rate 1e-3 --per_device_train_batch_size 2 --gradient_accumulation_steps 2 \
                  --max_grad_norm 0.5 --weight_decay 0.1 --save_steps 2 --save_total_limit 2 --eval_steps 2 --logging-steps 1";
    run(binary, without(&ours.split_whitespace().collect::<Vec<_>>())).ok();
    let expected = weights();
    run(binary, without(&theirs.split_whitespace().collect::<Vec<_>>())).ok();
    assert!(weights() == expected);
    let help = run(binary, ["--help"]).ok().stdout;
    assert!(!help.contains("max_steps"));
    let headings: Vec<&str> = help.lines().filter(|l| l.ends_with(':') && !l.starts_with(' ')).collect();
    let ordered = [
        "Input and output:",
        "Method:",
        "Budget and schedule:",
        "Optimizer:",
        "Data:",
        "Memory and speed:",
        "Resume:",
        "Logging:",
        "Run:",
    ];
    let found: Vec<&str> =
        headings.into_iter().filter(|heading| !["Options:", "Commands:"].contains(heading)).collect();
    assert_eq!(found, ordered);
}

#[test]
fn unusable_models_are_refused() {
    let f = Fixture::new();
    let config = read_json(&f.base.join("config.json"));
    let with_config = |key: &str, value: Value| {
        let mut changed = config.clone();
        changed[key] = value;
        fs::write(f.base.join("config.json"), changed.to_string()).unwrap();
        let result = f.probe(&["--task", "copy"]);
        fs::write(f.base.join("config.json"), config.to_string()).unwrap();
        f.nothing_left();
        result
    };
    with_config("architectures", json!(["GPT2LMHeadModel"])).bad_input(&[
        "config.json",
        "GPT2LMHeadModel",
        "LlamaForCausalLM",
    ]);
    with_config("hidden_act", json!("relu2")).bad_input(&["config.json", "hidden_act"]);
    with_config("hidden_size", json!(32)).bad_input(
        &["model.safetensors", "shape", "[259, 32]", "[259, 16]"]
            .map(|p| if p == "model.safetensors" { "base" } else { p }),
    );
    with_config("vocab_size", json!(100)).bad_input(&["train.jsonl", "line 1", "has id 256", "embedding has 100 rows"]);

    let with_tensors = |change: &dyn Fn(&mut Tensors)| {
        let mut tensors = tiny_weights(1);
        change(&mut tensors);
        fs::remove_file(f.base.join("model.safetensors")).unwrap();
        write_safetensors(&f.base.join("model.safetensors"), &tensors);
        let result = f.probe(&["--task", "copy"]);
        f.nothing_left();
        result
    };
    let norm = "model.norm.weight";
    with_tensors(&|t| drop(t.remove(norm))).bad_input(&[norm, "missing"]);
    with_tensors(&|t| drop(t.insert("model.extra.weight".into(), Tensor::f32(&[1], &[1.0]))))
        .bad_input(&["model.extra.weight"]);
    for value in [f32::NAN, f32::INFINITY] {
        let mut bad = vec![1.0; 16];
        bad[5] = value;
        with_tensors(&|t| drop(t.insert(norm.into(), Tensor::f32(&[16], &bad)))).bad_input(&[
            norm,
            "not finite",
            "index 5",
        ]);
    }
    let ints = Tensor { dtype: Dtype::I32, shape: vec![16], bytes: vec![0; 64] };
    with_tensors(&|t| drop(t.insert(norm.into(), ints.clone()))).bad_input(&[norm, "I32", "floating-point"]);

    fs::remove_file(f.base.join("tokenizer.json")).unwrap();
    f.probe(&["--task", "copy"]).bad_input(&["tokenizer.json", "hint"]);
    fs::remove_dir_all(&f.base).unwrap();
    f.probe(&["--task", "copy"]).bad_input(&["base", "no such checkpoint"]);
    f.nothing_left();
}

#[test]
fn arguments_out_of_range_are_usage_errors() {
    let f = Fixture::new();
    for (more, part) in [
        (["--lr", "-1"], "--lr"),
        (["--batch-size", "0"], "--batch-size"),
        (["--warmup-ratio", "1.5"], "--warmup-ratio"),
        (["--weight-decay", "-0.1"], "--weight-decay"),
        (["--weight-decay", "inf"], "--weight-decay"),
        (["--adam-epsilon", "inf"], "--adam-epsilon"),
        (["--adam-epsilon", "NaN"], "--adam-epsilon"),
        (["--max-grad-norm", "inf"], "--max-grad-norm"),
        (["--eval-rows", "3"], "--eval-every"),
        (["--device", "tpu"], "tpu"),
        (["--save-dtype", "int8"], "int8"),
        (["--tokens", "9"], "--tokens"),
    ] {
        let mut args: Vec<String> = f.args(&["--task", "copy"]);
        if let Some(at) = args.iter().position(|a| a == more[0]) {
            args.drain(at..at + 2);
        }
        args.extend(more.map(str::to_owned));
        run(env!("CARGO_BIN_EXE_cpift-probe"), args).usage_error(&[part]);
        f.nothing_left();
    }
}

#[test]
fn the_tasks_are_listed_in_array_order() {
    let f = Fixture::new();
    let listed = run(env!("CARGO_BIN_EXE_cpift-probe"), ["--tasks", f.tasks.to_str().unwrap(), "--list"]).ok().stdout;
    let names: Vec<&str> = listed.lines().map(|l| l.split('\t').nth(1).unwrap()).collect();
    assert_eq!(names, ["copy", "count", "pick"]);
}

#[test]
fn squared_gradients_lie_in_the_probe_and_leave_it_as_it_is() {
    let f = Fixture::new();
    f.probe(&["--task", "copy"]).ok();
    let plain = fs::read(f.out().join("model.safetensors")).unwrap();
    let more = ["--task", "copy", "--save-fisher", "--fisher-batches", "2", "--force"];
    f.probe(&more).ok();
    assert!(fs::read(f.out().join("model.safetensors")).unwrap() == plain, "the probe itself is another");
    let (probe, fisher) = (read_checkpoint(&f.out()), read_checkpoint(&f.out().join("fisher")));
    assert_eq!(probe.keys().collect::<Vec<_>>(), fisher.keys().collect::<Vec<_>>());
    for (name, sums) in &fisher {
        assert_eq!((sums.dtype, &sums.shape), (Dtype::F32, &probe[name].shape), "{name}");
        let values = sums.values();
        assert!(values.iter().all(|v| *v >= 0.0 && v.is_finite()), "{name}");
        assert!(values.iter().any(|v| *v > 0.0), "{name}: nothing but zeros");
    }
    let facts = read_json(&f.out().join("cpift.json"))["facts"].clone();
    assert!(facts["fisher_tokens"].as_u64().unwrap() > 0, "{facts}");
    let first = fs::read(f.out().join("fisher/model.safetensors")).unwrap();
    f.probe(&more).ok();
    assert!(fs::read(f.out().join("fisher/model.safetensors")).unwrap() == first, "a rerun gives other sums");
    f.probe(&["--task", "copy", "--force", "--fisher-batches", "2"]).expect_code(2).says(&["--save-fisher"]);
}

/// Squared gradients too are those of one process that accumulates.
#[test]
fn ranks_write_the_probe_of_one_process() {
    let f = Fixture::new();
    let more = ["--task", "copy", "--save-fisher", "--fisher-batches", "3"];
    f.probe(&[&more[..], &["--batch-size", "2", "--grad-accum", "2"]].concat()).ok();
    let read = |name: &str| fs::read(f.out().join(name)).unwrap();
    let (weights, fisher) = (read("model.safetensors"), read_checkpoint(&f.out().join("fisher")));
    let shared = [&more[..], &["--batch-size", "4", "--grad-accum", "1", "--force"]].concat();
    Job::start(env!("CARGO_BIN_EXE_cpift-probe"), 2, |_| f.args(&shared)).succeed();
    assert!(read("model.safetensors") == weights);
    for (name, tensor) in read_checkpoint(&f.out().join("fisher")) {
        let before = &fisher[&name];
        assert_eq!(tensor.shape, before.shape);
        // The sum of a batch's gradients in another order.
        for (x, y) in tensor.values().iter().zip(before.values()) {
            assert!((x - y).abs() <= 1e-4 * y.abs() + 1e-12, "{name}: {x} and {y}");
        }
    }
}
