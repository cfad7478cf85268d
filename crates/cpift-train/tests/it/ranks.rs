//! Several ranks over Gloo train what one process trains, byte for byte, save states that any
//! number of ranks loads, stop together, and end together when one of them fails.

use std::fs;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use crate::common::{Fixture, PROGRAM};
use cpift_core::Checkpoint;
use cpift_core::format::safetensors::MappedFile;
use cpift_testkit::Numbers;
use cpift_testkit::ranks::{Job, said};
use rustix::process::{Pid, Signal, kill_process};

/// Longest time after which all ranks of a failed job have ended.
const END: Duration = Duration::from_secs(30);

fn start(world: usize, of_rank: impl Fn(usize) -> Vec<String>) -> Job {
    Job::start(PROGRAM, world, of_rank)
}

fn pid(job: &Job, rank: usize) -> Pid {
    Pid::from_child(&job.0[rank])
}

/// Arguments of a run of `batch` rows per step into `out`.
fn arguments(f: &Fixture, out: &str, batch: usize, accumulate: usize, more: &[&str]) -> Vec<String> {
    let (batch, accumulate) = (batch.to_string(), accumulate.to_string());
    let sizes = ["--batch-size", batch.as_str(), "--grad-accum", accumulate.as_str()];
    f.arguments(out, &[&sizes, more].concat())
}

/// Trains in one process that accumulates, and on 2 and 4 ranks: the weights are the same bytes.
fn same_as_accumulated(f: &Fixture, more: &[&str]) {
    [2, 4].into_iter().for_each(|world| accumulated_by(world, f, more));
}

fn accumulated_by(world: usize, f: &Fixture, more: &[&str]) {
    let (alone, shared) = (format!("alone-{world}"), format!("shared-{world}"));
    let one = cpift_testkit::run(PROGRAM, arguments(f, &alone, 8 / world, world, more));
    assert!(one.code == 0, "{}", one.stderr);
    start(world, |_| arguments(f, &shared, 8, 1, more)).succeed();
    check_same(f, &alone, &shared, &format!("{world} ranks, {more:?}"));
}

fn check_same(f: &Fixture, a: &str, b: &str, what: &str) {
    let runs = f.path("runs");
    for name in ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"] {
        let read = |run: &str| fs::read(runs.join(run).join(name)).ok();
        assert!(read(a) == read(b), "{what}: {name} differs");
    }
    let lines = |run: &str| fs::read_to_string(runs.join(run).join("metrics.jsonl")).unwrap().lines().count();
    assert_eq!(lines(a), lines(b), "{what}: lines of metrics.jsonl");
    for run in [a, b] {
        fs::remove_dir_all(runs.join(run)).unwrap();
        assert!(!runs.join(format!("{run}.checkpoints")).exists());
    }
}

#[test]
fn ranks_train_what_one_process_accumulates() {
    let f = Fixture::new();
    let stages = f.stages();
    let stages: Vec<&str> = stages.iter().map(String::as_str).collect();
    let with = |more: &[&'static str]| [&stages[..], &["--steps", "6"], more].concat();
    // Clipping, decay, static masks.
    same_as_accumulated(&f, &with(&[]));
    same_as_accumulated(
        &f,
        &with(&[
            "--gradient-checkpointing",
            "--packing",
            "--max-grad-norm",
            "0.05",
            "--reshard-after-forward",
            "false",
        ]),
    );
    same_as_accumulated(&f, &with(&["--trainable", "cores", "--compute-dtype", "bf16"]));
    let narrow = ["--master-dtype", "bf16", "--optim-state-dtype", "bf16", "--compute-dtype", "bf16"];
    same_as_accumulated(&f, &with(&narrow));
    same_as_accumulated(&f, &with(&["--optim", "adamw_8bit", "--save-every", "2"]));
    same_as_accumulated(&f, &with(&["--freeze-embeddings", "--eval-every", "3", "--reshard-after-forward", "false"]));
}

/// Experts, with masks over them and a load-balancing loss of each micro-batch.
#[test]
fn ranks_train_the_experts_that_one_process_trains() {
    let f = Fixture::with_experts();
    let stages = f.stages();
    let more = ["--steps", "4", "--router-aux-loss-coef", "0.1", "--gradient-checkpointing"];
    let more: Vec<&str> = stages.iter().map(String::as_str).chain(more).collect();
    accumulated_by(2, &f, &more);
}

/// Adapters: the base is shared, every rank has all adapters, and rank 0 saves them.
#[test]
fn ranks_train_the_adapters_that_one_process_trains() {
    let f = Fixture::new();
    let stages = f.path("groups.json");
    let lora = ["--lora-rank", "3", "--steps", "6"];
    let merged =
        [&lora[..], &["--max-grad-norm", "0.05", "--groups", stages.to_str().unwrap(), "--no-freeze"]].concat();
    same_as_accumulated(&f, &merged);
    let more = ["--gradient-checkpointing", "--packing", "--reshard-after-forward", "false", "--eval-every", "3"];
    accumulated_by(2, &f, &[&lora[..], &more, &["--lora-target", "q_proj,mlp.down_proj"]].concat());
}

/// Trains in one process, and on two ranks that are stopped and resumed: `weights` has the same
/// bytes. Returns the number of tensors that each rank saved, and checks that one process resumes
/// too.
fn stopped_and_resumed(f: &Fixture, more: &[&str], weights: &str) -> [usize; 2] {
    let saving = [more, &["--steps", "40", "--save-every", "3", "--save-total-limit", "99"]].concat();
    let bytes = |out: &str| fs::read(f.path("runs").join(out).join(weights)).unwrap();
    let one = cpift_testkit::run(PROGRAM, arguments(f, "alone", 4, 2, &saving));
    assert!(one.code == 0, "{}", one.stderr);
    let job = start(2, |_| arguments(f, "shared", 8, 1, &saving));
    let states = f.path("runs").join("shared.checkpoints");
    let clock = Instant::now();
    while !states.join("step-0000003").exists() && clock.elapsed() < END {
        std::thread::sleep(Duration::from_millis(2));
    }
    kill_process(pid(&job, 0), Signal::TERM).unwrap();
    job.wait().iter().for_each(|output| assert_eq!(output.status.code(), Some(75), "{}", said(output)));
    let saved = [0, 1].map(|rank| {
        let file = states.join(format!("step-0000003/rank-{rank}-of-2.safetensors"));
        MappedFile::open(&file).unwrap().entries.len()
    });
    let resumed = [&saving[..], &["--resume"]].concat();
    copy_folder(&states, &f.path("runs").join("again.checkpoints"));
    let again = cpift_testkit::run(PROGRAM, arguments(f, "again", 8, 1, &resumed));
    assert!(again.code == 0 && again.stderr.contains("resuming from"), "{}", again.stderr);
    start(2, |_| arguments(f, "shared", 8, 1, &resumed)).succeed();
    assert!(bytes("alone") == bytes("shared"), "{more:?}: a resumed run of two ranks");
    saved
}

#[test]
fn states_of_adapters_continue_on_any_number_of_ranks() {
    let f = Fixture::new();
    let adapters = ["--lora-rank", "3", "--lora-output", "adapter", "--compute-dtype", "bf16"];
    let saved = stopped_and_resumed(&f, &adapters, "adapter_model.safetensors");
    assert!(saved[0] > 0 && saved[1] == 0, "rank 0 saves the adapters of all: {saved:?}");
}

#[test]
fn states_of_8_bit_moments_continue_on_any_number_of_ranks() {
    let f = Fixture::new();
    let saved = stopped_and_resumed(&f, &["--optim", "adamw_8bit"], "model.safetensors");
    assert!(saved[0] == saved[1] && saved[0] > 0, "{saved:?}");
}

/// Updates of adapters in the backward pass.
#[test]
fn adapters_of_ranks_updated_in_the_backward_pass_give_the_same_bytes() {
    let f = Fixture::new();
    let plain = ["--lora-rank", "2", "--steps", "6", "--max-grad-norm", "0"];
    for (out, more) in [("after", vec![]), ("during", vec!["--optimizer-in-backward"])] {
        let all = [&plain[..], &more].concat();
        start(2, |_| arguments(&f, out, 4, 1, &all)).succeed();
    }
    check_same(&f, "after", "during", "adapters updated in the backward pass");
}

/// The dynamic mask: importance, thresholds and ties are those of all ranks together.
#[test]
fn ranks_protect_what_one_process_protects() {
    let f = Fixture::new();
    let groups = f.path("groups.json");
    let dynamic = ["--groups", groups.to_str().unwrap(), "--isolation", "dynamic", "--percent", "5"];
    same_as_accumulated(
        &f,
        &[&dynamic[..], &["--mask-interval", "2", "--steps", "8", "--stage-data", "group"]].concat(),
    );
}

/// Updates in the backward pass: no gradient of the whole model exists, and none is clipped.
#[test]
fn updates_in_the_backward_pass_give_the_same_bytes() {
    let f = Fixture::new();
    let stages = f.stages();
    let plain: Vec<&str> = stages.iter().map(String::as_str).chain(["--steps", "6", "--max-grad-norm", "0"]).collect();
    for more in [&[][..], &["--gradient-checkpointing"]] {
        let run = |out: &str, own: &[&str]| {
            let all = [&plain[..], more, own].concat();
            start(2, |_| arguments(&f, out, 4, 1, &all)).succeed();
        };
        run("after", &[]);
        run("during", &["--optimizer-in-backward"]);
        check_same(&f, "after", "during", "updates in the backward pass");
    }
}

/// The backend's own reduce-scatter of two ranks adds the same two numbers.
#[test]
fn the_native_sum_of_two_ranks_is_the_ordered_one() {
    let f = Fixture::new();
    for (out, reduce) in [("ordered", "ordered"), ("native", "native")] {
        start(2, |_| arguments(&f, out, 4, 1, &["--steps", "5", "--reduce", reduce])).succeed();
    }
    check_same(&f, "ordered", "native", "reduce");
}

/// Weights, moments and extra tensors of a state, whole, by name.
fn whole(state: &Path) -> std::collections::BTreeMap<String, Vec<u8>> {
    let mut all = std::collections::BTreeMap::<String, Vec<(i64, Vec<u8>)>>::new();
    for entry in fs::read_dir(state).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            let file = MappedFile::open(&path).unwrap();
            let places: serde_json::Value = serde_json::from_str(&file.metadata["cpift"]).unwrap();
            for (name, entry) in &file.entries {
                let start = places[name]["start"].as_i64().unwrap();
                all.entry(name.clone()).or_default().push((start, file.bytes(entry).to_vec()));
            }
        }
    }
    let joined = |mut pieces: Vec<(i64, Vec<u8>)>| {
        pieces.retain(|(_, bytes)| !bytes.is_empty());
        pieces.sort();
        pieces.into_iter().flat_map(|(_, bytes)| bytes).collect()
    };
    all.into_iter().map(|(name, pieces)| (name, joined(pieces))).collect()
}

/// A stopped run is saved by every rank after the same step, and continues on any number of ranks.
#[test]
fn states_continue_on_any_number_of_ranks() {
    let f = Fixture::new();
    let stages = f.stages();
    let more: Vec<&str> = stages
        .iter()
        .map(String::as_str)
        .chain(["--steps", "40", "--save-every", "3", "--save-total-limit", "99"])
        .collect();
    let resumed = [&more[..], &["--resume"]].concat();
    start(2, |_| arguments(&f, "quiet", 8, 1, &more)).succeed();
    // Stopped by a signal to one rank.
    let job = start(2, |_| arguments(&f, "stopped", 8, 1, &more));
    let states = f.path("runs").join("stopped.checkpoints");
    let clock = Instant::now();
    while !states.join("step-0000003").exists() && clock.elapsed() < END {
        std::thread::sleep(Duration::from_millis(2));
    }
    kill_process(pid(&job, 1), Signal::TERM).unwrap();
    for (rank, output) in job.wait().iter().enumerate() {
        assert_eq!(output.status.code(), Some(75), "rank {rank}: {}", said(output));
    }
    let mut saved: Vec<String> = fs::read_dir(&states)
        .unwrap()
        .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
        .filter(|n| n.starts_with("step-"))
        .collect();
    saved.sort();
    let last = states.join(saved.last().unwrap());
    let mut files: Vec<String> =
        fs::read_dir(&last).unwrap().map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
    files.sort();
    assert_eq!(files, ["metrics.jsonl", "rank-0-of-2.safetensors", "rank-1-of-2.safetensors", "state.json"]);
    // Pieces of all ranks together are whole tensors.
    let all = whole(&last);
    assert!(all.keys().any(|n| n.starts_with("moments/")) && all.keys().any(|n| n.starts_with("weights/")));
    for view in Checkpoint::open(&f.base).unwrap().parameters() {
        for name in ["weights/", "moments/"].map(|part| format!("{part}{}", view.name)) {
            let name = if name.starts_with("moments") { format!("{name}.exp_avg") } else { name };
            assert_eq!(all[&name].len(), 4 * view.numel(), "{name}");
        }
    }
    // Each rank keeps half of the weights and of both moments, but for the alignment of each unit's
    // vectors to 256 elements.
    let total: usize = Checkpoint::open(&f.base).unwrap().parameters().map(|view| view.numel()).sum();
    for rank in 0..2 {
        let file = MappedFile::open(&last.join(format!("rank-{rank}-of-2.safetensors"))).unwrap();
        for part in ["weights/", ".exp_avg", ".exp_avg_sq"] {
            let of_part = file.entries.iter().filter(|(name, _)| name.starts_with(part) || name.ends_with(part));
            let kept: usize = of_part.map(|(_, entry)| entry.shape.iter().product::<usize>()).sum();
            assert!(kept.abs_diff(total / 2) <= 4 * 256, "{part}: rank {rank} keeps {kept} of {total} elements");
        }
    }
    // One and four ranks add the rows of a step in other orders: their weights are near.
    let near = |a: &str, b: &str| {
        let runs = f.path("runs");
        let (a, b) = (Checkpoint::open(&runs.join(a)).unwrap(), Checkpoint::open(&runs.join(b)).unwrap());
        let floats =
            |bytes: &[u8]| -> Vec<f32> { bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect() };
        let (mut off, mut size, mut count) = (0.0, 0.0, 0.0);
        for view in a.parameters() {
            let other = b.get(view.name).unwrap();
            for (x, y) in floats(view.bytes).into_iter().zip(floats(other.bytes)) {
                off += f64::from((x - y).abs());
                size += f64::from(x.abs());
                count += 1.0;
            }
        }
        (off / count, size / count)
    };
    for world in [1, 4] {
        let out = format!("again-{world}");
        copy_folder(&states, &f.path("runs").join(format!("{out}.checkpoints")));
        if world == 1 {
            let one = cpift_testkit::run(PROGRAM, arguments(&f, &out, 8, 1, &resumed));
            assert_eq!(one.code, 0, "{}", one.stderr);
        } else {
            start(world, |_| arguments(&f, &out, 8, 1, &resumed)).succeed();
        }
        let (off, size) = near("quiet", &out);
        assert!(off < 0.02 * size, "{world} ranks: {off} off, of weights of {size}");
    }
    start(2, |_| arguments(&f, "stopped", 8, 1, &resumed)).succeed();
    check_same(&f, "quiet", "stopped", "a resumed run");
}

/// Killed at 20 random moments, the saving of a state included.
#[test]
fn killed_ranks_resume_to_the_same_bytes() {
    let f = Fixture::new();
    let stages = f.stages();
    let more: Vec<&str> =
        stages.iter().map(String::as_str).chain(["--steps", "60", "--save-every", "2", "--resume"]).collect();
    let clock = Instant::now();
    start(2, |_| arguments(&f, "quiet", 4, 1, &more)).succeed();
    let (took, mut numbers, mut kills) = (clock.elapsed(), Numbers(7), 0);
    let states = f.path("runs").join("killed.checkpoints");
    let newest = || {
        let names = fs::read_dir(&states).into_iter().flatten().flatten();
        names.map(|e| e.file_name()).filter(|n| n.to_string_lossy().starts_with("step-")).max()
    };
    while kills < 20 {
        let mut job = start(2, |_| arguments(&f, "killed", 4, 1, &more));
        let before = newest();
        while newest() == before && job.0[0].try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(took.mul_f64(0.03 * f64::from(numbers.unit().abs())));
        job.0.iter_mut().for_each(|child| child.kill().unwrap());
        let ended = job.wait();
        kills += usize::from(ended.iter().any(|output| !output.status.success()));
        if f.path("runs/killed").exists() {
            start(2, |_| arguments(&f, "killed", 4, 1, &more)).succeed();
            let weights = |run: &str| fs::read(f.path("runs").join(run).join("model.safetensors")).unwrap();
            assert!(weights("killed") == weights("quiet"));
            fs::remove_dir_all(f.path("runs/killed")).unwrap();
        }
    }
    start(2, |_| arguments(&f, "killed", 4, 1, &more)).succeed();
    check_same(&f, "quiet", "killed", "a run that was killed 20 times");
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let dest = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_folder(&entry.path(), &dest)
        } else {
            let _ = fs::copy(entry.path(), dest).unwrap();
        }
    }
}

/// A rank that dies, hangs or has other arguments ends all others in bounded time, with its name.
#[test]
fn a_failed_rank_ends_the_others() {
    let f = Fixture::new();
    let long = ["--steps", "100000"];
    for (signal, name) in [(Signal::KILL, "killed"), (Signal::STOP, "hung")] {
        let job = start(3, |_| arguments(&f, name, 6, 1, &long));
        let pid = pid(&job, 1);
        wait_for_steps(&f, name);
        kill_process(pid, signal).unwrap();
        let clock = Instant::now();
        let mut others: Vec<Child> = job.0;
        let mut gone = others.remove(1);
        for (rank, child) in [0, 2].into_iter().zip(others) {
            let output = child.wait_with_output().unwrap();
            assert!(clock.elapsed() < END, "rank {rank} took {:?}", clock.elapsed());
            assert_eq!(output.status.code(), Some(1), "rank {rank} of a {name} job: {}", said(&output));
            assert!(said(&output).contains("rank 1"), "rank {rank} of a {name} job: {}", said(&output));
        }
        let _ = gone.kill();
        let _ = gone.wait();
        assert!(!f.path("runs").join(name).exists());
    }
}

fn wait_for_steps(f: &Fixture, out: &str) {
    let metrics = f.path("runs").join(format!("{out}.checkpoints")).join("metrics.jsonl");
    let clock = Instant::now();
    while fs::metadata(&metrics).map_or(0, |m| m.len()) == 0 {
        assert!(clock.elapsed() < Duration::from_secs(120), "no step of {out}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn ranks_with_other_arguments_are_refused() {
    let f = Fixture::new();
    let job =
        start(2, |rank| arguments(&f, "out", 4, 1, &["--steps", "5", "--seed", if rank == 0 { "1" } else { "2" }]));
    for (rank, output) in job.wait().iter().enumerate() {
        assert_eq!(output.status.code(), Some(2), "rank {rank}: {}", said(output));
        assert!(said(output).contains("another seed: "), "rank {rank}: {}", said(output));
    }
    let job = start(2, |_| arguments(&f, "out", 1, 1, &["--steps", "5"]));
    for output in job.wait() {
        assert_eq!(output.status.code(), Some(2));
        assert!(said(&output).contains("must be at least 2"), "{}", said(&output));
    }
    assert!(!f.path("runs/out").exists());
}

/// Weights and moments in files: the same bytes, and no file is left.
#[test]
fn offloaded_runs_write_the_same_bytes() {
    let f = Fixture::new();
    let folder = f.path("offload");
    fs::create_dir(&folder).unwrap();
    let away = folder.to_str().unwrap();
    let plain = ["--steps", "5"];
    for what in ["optimizer", "all"] {
        for world in [1, 2] {
            let run = |out: &str, more: &[&str]| {
                let more = [&plain[..], more].concat();
                if world == 1 {
                    let one = cpift_testkit::run(PROGRAM, arguments(&f, out, 4, 1, &more));
                    assert!(one.code == 0, "{}", one.stderr);
                } else {
                    start(world, |_| arguments(&f, out, 4, 1, &more)).succeed();
                }
            };
            run("here", &[]);
            run("away", &["--offload", what, "--offload-dir", away]);
            check_same(&f, "here", "away", &format!("--offload {what}, {world} ranks"));
            assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
        }
    }
    let refused = cpift_testkit::run(PROGRAM, arguments(&f, "away", 4, 1, &["--offload", "all"]));
    assert_eq!(refused.code, 2, "{}", refused.stderr);
    assert!(refused.stderr.contains("--offload-dir"), "{}", refused.stderr);
}
