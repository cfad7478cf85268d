//! `cpift-train plan` through the real binary: against the memory of a run, and against the
//! README.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use cpift_testkit::model::{row, write_json, write_rows, write_tasks, write_tiny_model};
use cpift_testkit::{Run, Tensor, run, write_safetensors};
use cpift_torch::model::ModelConfig;
use serde_json::{Value, json};

const PROGRAM: &str = env!("CARGO_BIN_EXE_cpift-train");

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn llama(more: &str) -> Run {
    let config = root().join("scripts/paper/llama-2-7b.json");
    let args = ["plan", "--model-config", config.to_str().unwrap(), "--max-length", "4096", "--device", "cuda"];
    run(PROGRAM, args.into_iter().chain(more.split_whitespace()))
}

/// Tiny model and one task whose rows fill its 96 tokens.
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
        write_rows(&dir.path().join("data/copy/train.jsonl"), &[row("q", &"x".repeat(200))]);
        Self { dir, base, tasks }
    }

    fn args(&self, command: &str, more: &str) -> Vec<String> {
        let fixed = [command, "--model", self.base.to_str().unwrap(), "--tasks", self.tasks.to_str().unwrap()];
        let fixed = fixed.into_iter().chain(["--device", "cpu"]).chain(more.split_whitespace());
        fixed.map(str::to_owned).collect()
    }

    fn plan(&self, more: &str) -> Value {
        let run = run(PROGRAM, self.args("plan", &format!("--json {more}"))).ok();
        serde_json::from_str(&run.stdout).unwrap()
    }

    /// Peak resident memory of a run in bytes, as the kernel records it: the maximum of three runs,
    /// because a reading can come too early. Freed memory returns to the system at once, since
    /// tensors are counted and not what malloc keeps.
    fn measured(&self, more: &str) -> u64 {
        (0..3).map(|_| self.measured_once(more)).max().unwrap()
    }

    fn measured_once(&self, more: &str) -> u64 {
        let out = self.dir.path().join("out");
        let more = format!("--only copy --steps 1 --threads 1 --force --out {} {more}", out.display());
        let mut command = Command::new(PROGRAM);
        command.args(self.args("run", &more)).stderr(Stdio::null());
        let mut child = command.env("MALLOC_MMAP_THRESHOLD_", "65536").spawn().unwrap();
        let mut most = 0;
        while child.try_wait().unwrap().is_none() {
            let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
            let highest =
                status.lines().find_map(|l| l.strip_prefix("VmHWM:")?.split_whitespace().next()?.parse().ok());
            most = most.max(1024 * highest.unwrap_or(0u64));
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(child.wait().unwrap().success());
        most
    }
}

#[test]
fn what_is_computed_is_what_a_run_takes() {
    let f = Fixture::new();
    let computed = |more: &str| f.plan(more)["memory"]["peak"].as_u64().unwrap();
    // The program's own memory is in both and cancels out.
    let (small, none) = (computed("--batch-size 1"), f.measured("--batch-size 1"));
    for more in ["--batch-size 320", "--batch-size 320 --gradient-checkpointing"] {
        let (plan, taken) = (computed(more) - small, f.measured(more) - none);
        let ratio = plan as f64 / taken as f64;
        assert!(taken > 40 << 20 && (0.9..1.1).contains(&ratio), "{more}: computed {plan}, measured {taken}");
    }
}

/// A model of another family in place of the tiny one, with its sizes.
fn write_family(folder: &Path, architecture: &str, more: &Value) {
    let path = folder.join("config.json");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    config["architectures"][0] = architecture.into();
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    write_json(&path, &config);
    let shapes = ModelConfig::from_json(folder, &config).unwrap().parameter_shapes();
    let tensor = |(name, shape): (String, Vec<i64>)| {
        let shape: Vec<usize> = shape.iter().map(|&n| n as usize).collect();
        let values = vec![0.01; shape.iter().product()];
        (name, Tensor::f32(&shape, &values))
    };
    fs::remove_file(folder.join("model.safetensors")).unwrap();
    write_safetensors(&folder.join("model.safetensors"), &shapes.into_iter().map(tensor).collect());
}

#[test]
fn blocks_of_every_family_take_what_is_computed() {
    let mut off = Vec::new();
    for (architecture, more) in [
        ("Qwen3ForCausalLM", json!({})),
        ("Gemma3ForCausalLM", json!({"sliding_window": 512})),
        ("Phi3ForCausalLM", json!({"partial_rotary_factor": 0.5})),
        ("Olmo2ForCausalLM", json!({})),
        ("GraniteForCausalLM", json!({"residual_multiplier": 0.5, "logits_scaling": 2.0})),
        ("SmolLM3ForCausalLM", json!({"no_rope_layers": [1, 0]})),
        ("Qwen3MoeForCausalLM", json!({"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16})),
        ("Qwen3MoeForCausalLM", json!({"num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 8})),
    ] {
        let f = Fixture::new();
        write_family(&f.base, architecture, &more);
        let computed = |more: &str| f.plan(more)["memory"]["peak"].as_u64().unwrap();
        let taken = |more: &str| (computed(more), f.measured_once(more));
        let ((small, none), (plan, most)) = (taken("--batch-size 1"), taken("--batch-size 320"));
        let ratio = (plan - small) as f64 / (most - none) as f64;
        if !(0.9..1.1).contains(&ratio) {
            off.push(format!("{architecture}: computed {}, measured {}", plan - small, most - none));
        }
    }
    assert!(off.is_empty(), "{off:#?}");
}

#[test]
fn adapters_take_what_is_computed() {
    let f = Fixture::new();
    let computed = |more: &str| f.plan(more)["memory"]["peak"].as_u64().unwrap();
    let full = computed("--batch-size 320");
    for lora in ["--lora-rank 4", "--lora-rank 4 --lora-target q_proj,v_proj"] {
        let small = format!("--batch-size 1 {lora}");
        let (small, none) = (computed(&small), f.measured(&small));
        for more in ["--batch-size 320", "--batch-size 320 --gradient-checkpointing"] {
            let more = format!("{more} {lora}");
            let (plan, taken) = (computed(&more) - small, f.measured(&more) - none);
            let ratio = plan as f64 / taken as f64;
            assert!(taken > 40 << 20 && (0.9..1.1).contains(&ratio), "{more}: computed {plan}, measured {taken}");
            assert!(computed(&more) < full);
        }
    }
}

#[test]
fn masks_of_windows_are_in_the_sum() {
    let f = Fixture::new();
    let path = f.base.join("config.json");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    config["architectures"][0] = "MistralForCausalLM".into();
    config["model_type"] = "mistral".into();
    let mut peaks = Vec::new();
    for window in [None, Some(8)] {
        config["sliding_window"] = window.into();
        write_json(&path, &config);
        let computed = |more: &str| f.plan(more)["memory"]["peak"].as_u64().unwrap();
        let (small, none) = (computed("--batch-size 1"), f.measured("--batch-size 1"));
        for more in ["--batch-size 256", "--batch-size 256 --gradient-checkpointing"] {
            let (plan, taken) = (computed(more) - small, f.measured(more) - none);
            let ratio = plan as f64 / taken as f64;
            // Masks this small come from pools in which malloc keeps freed memory.
            assert!((0.85..1.15).contains(&ratio), "window {window:?}, {more}: computed {plan}, measured {taken}");
            peaks.push(plan);
        }
    }
    // 256 documents of 96 tokens less one: one byte per pair for the batch, and four in each of the
    // two blocks, or in one.
    let pair = 96 * 96;
    assert_eq!((peaks[2] - peaks[0], peaks[3] - peaks[1]), ((256 - 1) * pair * 9, (256 * 5 - 9) * pair));
}

#[test]
fn the_readme_shows_what_the_program_prints() {
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    let shown = readme.split_once("## A 7 B model on one GPU").expect("the section is there").1;
    let mut commands = 0;
    for block in shown.split("    $ cpift-train plan ").skip(1) {
        let lines: Vec<&str> =
            block.lines().enumerate().take_while(|(i, l)| *i == 0 || l.starts_with("    ")).map(|(_, l)| l).collect();
        let split = lines.iter().position(|l| !l.ends_with('\\')).unwrap();
        let typed = lines[..=split].join(" ").replace(['\\', '\n'], " ");
        let typed = typed.replace("scripts/paper", root().join("scripts/paper").to_str().unwrap());
        let printed = run(PROGRAM, std::iter::once("plan").chain(typed.split_whitespace())).ok().stdout;
        let expected: String =
            lines[split + 1..].iter().map(|l| format!("{}\n", l.trim_end().get(4..).unwrap_or(""))).collect();
        assert!(
            expected.lines().count() > 8 && printed.starts_with(expected.trim_end()),
            "printed:\n{printed}\nREADME:\n{expected}"
        );
        commands += 1;
    }
    assert_eq!(commands, 3);
}

/// The paper recipe's arguments of training are arguments, and fit where the recipe says.
#[test]
fn the_paper_recipe_fits_where_it_says() {
    let recipe = fs::read_to_string(root().join("scripts/paper/README.md")).unwrap();
    let joined = recipe.replace("\\\n", " ");
    let flags: Vec<&str> = joined.split("TRAIN_FLAGS='").skip(1).map(|rest| rest.split_once('\'').unwrap().0).collect();
    let torchrun = joined.split_once("--tokens 24000000").unwrap().1.lines().next().unwrap();
    let cases = [(flags[0], 1, 131.0), (flags[1], 4, 74.5), (torchrun, 4, 74.5), (flags[2], 1, 22.3)];
    assert_eq!(flags.len(), 3);
    for (typed, world, memory) in cases {
        let all = format!("{typed} --world {world} --device-memory {memory} --json");
        let config = root().join("scripts/paper/llama-2-7b.json");
        let args = ["plan", "--model-config", config.to_str().unwrap()].into_iter().chain(all.split_whitespace());
        let printed: Value = serde_json::from_str(&run(PROGRAM, args).ok().stdout).unwrap();
        assert_eq!(printed["fits"], Value::Bool(true), "{all}");
    }
}

#[test]
fn a_job_that_does_not_fit_is_told_what_would() {
    let run = llama("--batch-size 8 --device-memory 131").ok();
    for part in [
        "does not fit: ",
        " of 131.00 GiB",
        "  with --gradient-checkpointing: ",
        "hint: --gradient-checkpointing fits: ",
    ] {
        assert!(run.stdout.contains(part), "{part}\n{}", run.stdout);
    }
    let json: Value = serde_json::from_str(&llama("--batch-size 8 --device-memory 131 --json").ok().stdout).unwrap();
    assert_eq!((&json["fits"], &json["advice"][0]), (&Value::Bool(false), &"--gradient-checkpointing".into()));
    let moments = json["memory"]["moments"].as_array().unwrap();
    let highest = moments.iter().map(|m| m["total"].as_u64().unwrap()).max();
    assert_eq!(json["memory"]["peak"].as_u64(), highest);
    let sum: u64 = moments[0]["parts"].as_object().unwrap().values().map(|b| b.as_u64().unwrap()).sum();
    assert_eq!(moments[0]["total"].as_u64(), Some(sum));
}

/// Weights that stay are in each rank's memory and move once instead of twice.
#[test]
fn weights_that_stay_lent_take_memory_and_save_traffic() {
    // 32 blocks in bf16, of which each of two ranks receives half.
    const BLOCKS: u64 = 32 * 202_383_360 * 2;
    let figures = |more: &str| {
        let args = format!("--world 2 --batch-size 2 --device-memory 131 --json --compute-dtype bf16 {more}");
        let json: Value = serde_json::from_str(&llama(&args).ok().stdout).unwrap();
        let of = |value: &Value| value.as_u64().unwrap();
        (of(&json["memory"]["moments"][0]["parts"]["lent"]), of(&json["traffic"]["ranks"]))
    };
    let ((lent, received), (stay, fewer)) = (figures(""), figures("--reshard-after-forward false"));
    assert_eq!((stay - lent, received - fewer), (BLOCKS, BLOCKS / 2));
}

#[test]
fn the_disk_of_a_pipeline_is_its_checkpoints_masks_and_states() {
    let disk = |more: &str| -> Value {
        let json: Value =
            serde_json::from_str(&llama(&format!("--device-memory 80 --json {more}")).ok().stdout).unwrap();
        json["disk"]["parts"].clone()
    };
    const D: u64 = 6_738_415_616;
    let five = disk("");
    assert_eq!((five["probes, 5 x f32"].as_u64(), five["masks, 5 x 1 bit"].as_u64()), (Some(20 * D), Some(5 * D / 8)));
    assert_eq!(disk("--probes 3 --save-dtype bf16")["probes, 3 x bf16"].as_u64(), Some(6 * D));
    // Weights and two moments in f32; one state more than are kept exists while one is saved.
    assert_eq!(disk("--save-every 10 --keep 2")["states, 3 at a time"].as_u64(), Some(3 * 12 * D));
    let text = llama("--device-memory 80").ok().stdout;
    assert!(text.contains("make clean-probes RUN=DIR frees 134.8 GB") && text.contains("--save-dtype bf16"), "{text}");
}

#[test]
fn the_time_is_that_of_the_tokens_at_the_rate_that_is_given() {
    const D: f64 = 6_738_415_616.0;
    let time = |more: &str| -> Value {
        let text = llama(&format!("--device-memory 131 --json --tflops 400 {more}")).ok().stdout;
        serde_json::from_str::<Value>(&text).unwrap()["time"].clone()
    };
    let ten_million = time("--tokens 10000000");
    assert_eq!(ten_million["flops"].as_f64(), Some(6.0 * D * 1e7));
    assert_eq!(ten_million["hours"].as_f64(), Some(6.0 * D * 1e7 / 4e14 / 3600.0));
    assert_eq!(time("--tokens 10000000 --gradient-checkpointing")["flops"].as_f64(), Some(8.0 * D * 1e7));
    assert_eq!(time("--steps 100 --batch-size 2 --grad-accum 4")["tokens"].as_u64(), Some(100 * 4 * 2 * 4096));
    let text = llama("--device-memory 131 --tflops 400 --tokens 10000000").ok().stdout;
    assert!(text.contains("time: 0.28 hours for 10000000 tokens, 4.043e17 FLOPs\n"), "{text}");
    llama("--device-memory 131 --tflops -1").usage_error(&["--tflops"]);
}

#[test]
fn tasks_give_lengths_and_probes_and_weights_must_be_those_of_the_config() {
    let f = Fixture::new();
    let json = f.plan("--batch-size 3 --frozen-percent 10");
    assert_eq!(json["memory"]["tokens"], 3 * 96);
    assert_eq!(
        json["memory"]["moments"][0]["parts"]["frozen"].as_u64(),
        Some(12 * (json["memory"]["parameters"].as_u64().unwrap() / 10))
    );
    assert!(json["disk"]["parts"]["probes, 3 x f32"].is_u64() && json["device_memory"].is_u64());
    assert_eq!(f.plan("--batch-tokens 7")["memory"]["tokens"], 7);
    let config = f.base.join("config.json");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replace("\"num_hidden_layers\":2", "\"num_hidden_layers\":3")).unwrap();
    run(PROGRAM, f.args("plan", "")).bad_input(&["base", "expected: 11168 parameters", "found: 8832 parameters"]);
    fs::remove_file(f.base.join("model.safetensors")).unwrap();
    run(PROGRAM, f.args("plan", "")).ok();
    run(PROGRAM, f.args("plan", "--frozen-percent 101")).usage_error(&["--frozen-percent"]);
    run(PROGRAM, ["plan"]).usage_error(&["--model"]);
}
