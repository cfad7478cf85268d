//! Methods beside CPI-FT's frozen cores: training of own cores only, a dynamic mask, replayed rows,
//! adapters.

use std::fs;

use crate::common::{Fixture, TASKS, assert_frozen, core, element};
use cpift_core::Dtype;
use cpift_testkit::{Tensor, read_checkpoint};
use serde_json::Value;

/// `more` with groups.json, without masks.
fn grouped(f: &Fixture, more: &[&str]) -> Vec<String> {
    let groups = f.path("groups.json").display().to_string();
    ["--groups", &groups].iter().chain(more).map(|arg| (*arg).to_owned()).collect()
}

fn texts(args: &[String]) -> Vec<&str> {
    args.iter().map(String::as_str).collect()
}

fn staged(f: &Fixture, out: &str, more: &[&str]) -> cpift_testkit::Run {
    f.train(out, &texts(&grouped(f, more)))
}

fn weights(f: &Fixture, out: &str) -> Vec<u8> {
    fs::read(f.path("runs").join(out).join("model.safetensors")).unwrap()
}

/// Lines of metrics.jsonl that have `key`.
fn figures(f: &Fixture, out: &str, key: &str) -> Vec<Value> {
    let text = fs::read_to_string(f.path("runs").join(out).join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter(|line| !line[key].is_null()).collect()
}

/// Resumes a run that was killed after `step` and compares its result with an uninterrupted run.
fn killed_and_resumed_ends_the_same(f: &Fixture, args: &[&str], step: usize) {
    f.train("quiet", &[args, &["--force"]].concat()).ok();
    let _ = fs::remove_dir_all(f.path("runs/killed"));
    let saving = [args, &["--save-every", "1", "--save-total-limit", "100"]].concat();
    f.killed_at("killed", &saving, step);
    f.train("killed", &[&saving[..], &["--resume"]].concat()).ok().says(&["resuming from", &format!("step-{step:07}")]);
    assert!(weights(f, "quiet") == weights(f, "killed"), "another end after {args:?}");
}

/// The rank of a matrix of `columns`, by elimination; values below a thousandth of the largest
/// count as zero.
fn rank(mut matrix: Vec<f64>, columns: usize) -> usize {
    let rows = matrix.len() / columns;
    let nothing = 1e-3 * matrix.iter().fold(0.0_f64, |most, v| most.max(v.abs()));
    for rank in 0..rows.min(columns) {
        let rest = (rank..rows).flat_map(|r| (rank..columns).map(move |c| (r, c)));
        let (r, c) = rest
            .max_by(|a, b| matrix[a.0 * columns + a.1].abs().total_cmp(&matrix[b.0 * columns + b.1].abs()))
            .unwrap();
        if matrix[r * columns + c].abs() <= nothing {
            return rank;
        }
        (0..columns).for_each(|k| matrix.swap(r * columns + k, rank * columns + k));
        (0..rows).for_each(|k| matrix.swap(k * columns + c, k * columns + rank));
        for below in rank + 1..rows {
            let factor = matrix[below * columns + rank] / matrix[rank * columns + rank];
            (rank..columns).for_each(|k| matrix[below * columns + k] -= factor * matrix[rank * columns + k]);
        }
    }
    rows.min(columns)
}

/// A mask over experts freezes their elements, in all ways of training them.
#[test]
fn frozen_elements_of_experts_keep_their_bits() {
    let f = Fixture::with_experts();
    let before = read_checkpoint(&f.base);
    let usual = ["--steps", "8", "--sample", "all", "--max-grad-norm", "0", "--router-aux-loss-coef", "0.1"];
    let files = f.path("files").display().to_string();
    fs::create_dir(&files).unwrap();
    let mut plain = None;
    for more in [
        &["--packing"][..],
        &["--packing", "--gradient-checkpointing", "--optimizer-in-backward"],
        &["--packing", "--offload", "all", "--offload-dir", &files],
    ] {
        f.staged("experts", &[&usual[..], more, &["--force"]].concat()).ok();
        assert_frozen(&before, &f.read("experts"));
        let bytes = weights(&f, "experts");
        assert!(*plain.get_or_insert_with(|| bytes.clone()) == bytes, "{more:?} is not the same");
    }
    let rounded = ["--master-dtype", "bf16", "--optim-state-dtype", "bf16", "--save-dtype", "bf16"];
    f.staged("rounded", &[&usual[..], &rounded].concat()).ok();
    let bf16 = |t: &Tensor| Tensor::floats(Dtype::BF16, &t.shape, &t.values());
    let rounded = before.iter().map(|(name, t)| (name.clone(), bf16(t))).collect();
    assert_frozen(&rounded, &f.read("rounded"));
    // Without the load-balancing loss, training ends elsewhere; a model without experts has none.
    f.staged("without", &usual[..6]).ok();
    assert!(weights(&f, "without") != plain.unwrap());
    let dense = Fixture::new().train("a", &["--router-aux-loss-coef", "0.1"]);
    dense.usage_error(&["--router-aux-loss-coef: the model has no experts"]);
}

#[test]
fn only_the_own_cores_move_and_of_those_not_the_earlier_ones() {
    let f = Fixture::new();
    // The cores of the first group's task and of one of the second overlap in every element of it.
    f.staged("a", &["--trainable", "cores", "--steps", "8", "--sample", "all"]).ok();
    let (before, after) = (cpift_testkit::read_checkpoint(&f.base), f.read("a"));
    let mut moved = 0;
    for (name, b) in &before {
        for i in 0..b.bytes.len() / b.dtype.size() {
            let same = element(&after[name], i) == element(b, i);
            let own = (0..TASKS.len()).any(|k| core(k, i));
            assert!(same || own, "{name}[{i}] is core to no task and moved");
            moved += usize::from(!same);
        }
    }
    let total: usize = before.values().map(|b| b.bytes.len() / b.dtype.size()).sum();
    // Three cores of an eleventh each.
    assert!(moved * 11 > total * 2, "{moved} of {total} moved");
    let facts = f.facts("a");
    let frozen: Vec<u64> =
        facts["stages"].as_array().unwrap().iter().map(|s| s["frozen_elements"].as_u64().unwrap()).collect();
    let free = |stage: usize| total as u64 - frozen[stage];
    assert!(free(0) < free(1) && free(1) < total as u64 / 5, "one core, then two: {frozen:?} of {total}");
}

#[test]
fn a_mask_that_moves_protects_from_the_second_stage_on_and_counts_its_tokens() {
    let f = Fixture::new();
    let more = ["--isolation", "dynamic", "--percent", "20", "--mask-interval", "3", "--steps", "14"];
    staged(&f, "a", &more).ok().says(&["elements protected, Jaccard with the stage's first mask"]);
    let masks = figures(&f, "a", "mask_jaccard");
    // Seven steps in the second stage: before the first, the fourth and the seventh.
    let steps: Vec<u64> = masks.iter().map(|line| line["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, [1, 4, 7]);
    assert!(masks.iter().all(|line| line["stage"].as_str().unwrap().starts_with("stage 2/2")));
    assert_eq!(masks[0]["mask_jaccard"], 1.0);
    assert!(masks[2]["mask_jaccard"].as_f64().unwrap() < 1.0);
    let facts = f.facts("a");
    let tokens =
        |key: &str| facts["stages"].as_array().unwrap().iter().map(|s| s[key].as_u64().unwrap()).collect::<Vec<_>>();
    let (trained, measured) = (tokens("tokens"), tokens("importance_tokens"));
    assert_eq!(measured[0], 0);
    assert!(measured[1] > 0);
    assert_eq!(facts["tokens"].as_u64().unwrap(), trained.iter().chain(&measured).sum::<u64>());
    assert_eq!(facts["stages"][1]["frozen_elements"], masks[2]["protected"]);
}

#[test]
fn a_run_with_a_moving_mask_resumes_exactly() {
    let f = Fixture::new();
    let more = ["--isolation", "dynamic", "--percent", "20", "--mask-interval", "3", "--steps", "16"];
    let args = grouped(&f, &more);
    // In the first stage; in the second before, and in the middle of, an interval.
    for step in [3, 11, 12] {
        killed_and_resumed_ends_the_same(&f, &texts(&args), step);
    }
}

#[test]
fn replayed_rows_are_a_share_of_the_earlier_tasks() {
    let f = Fixture::new();
    let examples = |out: &str, more: &[&str]| -> Vec<u64> {
        staged(&f, out, &[more, &["--no-freeze", "--steps", "2", "--sample", "all"]].concat()).ok();
        f.facts(out)["stages"].as_array().unwrap().iter().map(|s| s["examples"].as_u64().unwrap()).collect()
    };
    let (plain, half) = (examples("a", &[]), examples("b", &["--replay", "0.5"]));
    assert_eq!(half[0], plain[0], "no task is earlier than the first group's");
    assert_eq!(half[1], plain[1] + plain[0] / 2);
    assert_eq!(examples("c", &["--replay", "1"])[1], plain[1] + plain[0]);
    assert_ne!(weights(&f, "a"), weights(&f, "b"));
}

#[test]
fn adapters_move_linear_layers_by_their_rank_and_nothing_else() {
    let f = Fixture::new();
    f.train("a", &["--lora-rank", "2", "--steps", "5"]).ok();
    let (before, after) = (cpift_testkit::read_checkpoint(&f.base), f.read("a"));
    for (name, b) in &before {
        let linear = b.shape.len() == 2 && !name.contains("embed_tokens") && !name.contains("lm_head");
        assert_eq!(after[name].bytes != b.bytes, linear, "{name}");
        if linear {
            let difference: Vec<f64> =
                after[name].values().iter().zip(b.values()).map(|(a, b)| f64::from(*a) - f64::from(b)).collect();
            assert_eq!(rank(difference, b.shape[1]), 2, "{name}");
        }
    }
    killed_and_resumed_ends_the_same(&f, &["--lora-rank", "2", "--steps", "12"], 5);
}

#[test]
fn what_does_not_go_together_is_refused() {
    let f = Fixture::new();
    let with_groups = |more: &[&str]| grouped(&f, more);
    let without = |more: &[&str]| more.iter().map(|arg| (*arg).to_owned()).collect::<Vec<_>>();
    for (args, part) in [
        (with_groups(&["--trainable", "cores", "--no-freeze"]), "--trainable cores needs"),
        (with_groups(&["--isolation", "dynamic", "--no-freeze"]), "leave out --mask"),
        (with_groups(&["--isolation", "dynamic", "--percent", "0"]), "--percent"),
        (with_groups(&["--isolation", "dynamic", "--ema", "1"]), "--ema"),
        (with_groups(&["--no-freeze", "--replay", "1.5"]), "--replay"),
        (without(&["--replay", "0.5"]), "--groups"),
        (without(&["--isolation", "dynamic"]), "--groups"),
        (without(&["--lora-rank", "0"]), "--lora-rank"),
        (without(&["--lora-alpha", "4"]), "--lora-rank"),
        (with_groups(&["--lora-rank", "2", "--isolation", "dynamic"]), "--lora-rank"),
    ] {
        f.train("out", &texts(&args)).usage_error(&[part]);
        assert!(!f.path("runs/out").exists());
    }
}

#[test]
fn old_spellings_of_flags_are_accepted_and_describe_the_same_run() {
    let f = Fixture::new();
    // A run that was recorded with the old spelling is accepted as the run of the new one.
    let same = |out: &str, old: &[String], new: &[String]| {
        f.train(out, &texts(old)).ok();
        f.train(out, &texts(&[new, &["--resume".to_owned()]].concat()))
            .ok()
            .says(&[&format!("{out} is finished already")]);
    };
    let with = |stages: &[String], more: &str| -> Vec<String> {
        let more = format!("--steps 2 --sample 4 {more}");
        stages.iter().cloned().chain(more.split_whitespace().map(str::to_owned)).collect()
    };
    let stages = f.stages();
    same(
        "cores",
        &with(&stages, "--train only-cores --master bf16 --optim-state bf16 --strict --keep 2"),
        &with(
            &stages,
            "--trainable cores --master-dtype bf16 --optim-state-dtype bf16 --no-truncate --save-total-limit 2",
        ),
    );
    let groups = grouped(&f, &[]);
    same("epi", &with(&groups, "--isolation evolving"), &with(&groups, "--isolation dynamic"));
    let run = f.facts("cores")["run"].as_object().unwrap().clone();
    assert_eq!((&run["master"], &run["optim_state"], &run["only_cores"]), (&json("BF16"), &json("BF16"), &true.into()));
    let arguments = "steps tokens batch_size grad_accum lr lr_scheduler warmup_ratio warmup_steps \
                     num_decay_steps min_lr_ratio warmup_type decay_type weight_decay adam_beta1 adam_beta2 adam_epsilon \
                     max_grad_norm freeze_embeddings freeze_layers packing master optim_state loss_chunk max_length seed \
                     compute_dtype device model tasks train:count train:copy train:pick mask:count mask:copy mask:pick \
                     groups stages isolation only_cores lora examples save_dtype";
    let mut found: Vec<&str> = run.keys().map(String::as_str).collect();
    let mut expected: Vec<&str> = arguments.split_whitespace().collect();
    found.sort_unstable();
    expected.sort_unstable();
    assert_eq!(found, expected, "all that the weights depend on");
}

fn json(text: &str) -> serde_json::Value {
    text.into()
}
