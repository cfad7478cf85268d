//! A model and the adapter that cpift-train wrote, in the other programs.

use std::fs;
use std::path::Path;

use cpift_core::format::scores::Scores;
use cpift_testkit::chain::program;
use cpift_testkit::model::{write_tasks, write_tiny_model};
use cpift_testkit::{Run, read_checkpoint, run};

fn start(name: &str, args: &str) -> Run {
    run(program(name).to_str().unwrap(), args.split_whitespace()).ok()
}

#[test]
fn the_other_programs_read_the_sum_of_base_and_trained_adapter() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let (base, tasks) = (write_tiny_model(Path::new(&at("base")), 1), write_tasks(Path::new(&at("data"))));
    let (base, tasks) = (base.display(), tasks.display());
    let line = format!("run --model {base} --tasks {tasks} --lora-rank 2 --steps 4 --lr 1e-2 --device cpu --threads 1");
    start("cpift-train", &format!("{line} --out {}", at("merged")));
    start("cpift-train", &format!("{line} --lora-output adapter --out {}", at("lora")));
    let sum = format!("{base}+{}", at("lora"));
    start("cpift-merge", &format!("passthrough --model {sum} --out {}", at("sum")));
    let [trained, sum_of] = ["merged", "sum"].map(|name| read_checkpoint(Path::new(&at(name))));
    for (name, tensor) in &trained {
        let pairs = tensor.values().into_iter().zip(sum_of[name].values());
        assert!(pairs.into_iter().all(|(a, b)| (a - b).abs() < 1e-6), "{name}");
    }
    start("cpift-mask", &format!("extract --base {base} --tuned {sum} --percent 5 --out {}", at("mask")));
    assert!(fs::metadata(at("mask")).unwrap().len() > 0);
    let nll = |model: &str, out: &str| {
        let more = "--device cpu --threads 1";
        start("cpift-eval", &format!("run --model {model} --tasks {tasks} --out {} {more}", at(out)));
        let scores = Scores::read(&dir.path().join(out).join("scores.json")).unwrap();
        ["copy", "count", "pick"].map(|task| scores.nll(task).unwrap())
    };
    let (of_sum, of_merged, of_base) = (nll(&sum, "a"), nll(&at("merged"), "b"), nll(&base.to_string(), "c"));
    for task in 0..3 {
        assert!((of_sum[task] - of_merged[task]).abs() < 1e-5, "{of_sum:?} {of_merged:?}");
        assert!((of_sum[task] - of_base[task]).abs() > 1e-3, "{of_sum:?} {of_base:?}");
    }
}
