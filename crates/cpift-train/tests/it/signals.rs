//! Signals while a state or the output is being written, the metrics of a running job, and two runs
//! at once. The model is large enough for its states to take a while to write.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::common::{Fixture, PROGRAM, read_json};
use cpift_core::Dtype;
use cpift_testkit::model::{tiny_weights, write_json};
use cpift_testkit::{Tensor, expect_entries, write_safetensors};
use rustix::process::{Pid, Signal, kill_process};

/// A model of 19 million parameters, nearly all of them in its MLPs.
fn large() -> Fixture {
    const WIDTH: usize = 200_000;
    let f = Fixture::new();
    let mut weights = tiny_weights(1);
    for (name, tensor) in weights.iter_mut().filter(|(name, _)| name.contains("mlp")) {
        let shape = if name.contains("down") { [16, WIDTH] } else { [WIDTH, 16] };
        *tensor = Tensor::floats(Dtype::F32, &shape, &vec![1e-3; 16 * WIDTH]);
    }
    fs::remove_file(f.base.join("model.safetensors")).unwrap();
    write_safetensors(&f.base.join("model.safetensors"), &weights);
    let mut config = read_json(&f.base.join("config.json"));
    config["intermediate_size"] = WIDTH.into();
    write_json(&f.base.join("config.json"), &config);
    f
}

fn start(f: &Fixture, out: &str, more: &[&str]) -> Child {
    let args = f.arguments(out, &[&["--only", "copy", "--batch-size", "1"], more].concat());
    Command::new(PROGRAM).args(args).stderr(Stdio::piped()).spawn().unwrap()
}

/// Waits until `find` returns something.
fn wait_for<T>(find: impl Fn() -> Option<T>) -> T {
    let clock = Instant::now();
    loop {
        if let Some(found) = find() {
            return found;
        }
        assert!(clock.elapsed() < Duration::from_secs(120), "it does not come");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The staging directory in `folder` of the output `name…`, once it contains `file`.
fn staged(folder: PathBuf, name: &str, file: &str) -> impl Fn() -> Option<PathBuf> {
    let (start, file) = (format!(".{name}"), file.to_owned());
    move || {
        let entries = fs::read_dir(&folder).ok()?.flatten();
        let ours = |path: &PathBuf| path.file_name().unwrap().to_string_lossy().starts_with(&start);
        entries.map(|e| e.path()).find(|path| ours(path) && path.join("new").join(&file).exists())
    }
}

fn end(child: Child, signals: &[Signal]) -> (ExitStatus, String) {
    for signal in signals {
        kill_process(Pid::from_child(&child), *signal).unwrap();
    }
    let output = child.wait_with_output().unwrap();
    (output.status, String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn the_output_is_written_whatever_warns_meanwhile() {
    let f = large();
    for (i, signals) in [&[Signal::TERM][..], &[Signal::USR1, Signal::TERM], &[Signal::INT]].into_iter().enumerate() {
        let child = start(&f, &format!("out-{i}"), &["--steps", "1"]);
        wait_for(staged(f.path("runs"), "out", "model.safetensors"));
        let (status, said) = end(child, signals);
        assert!(status.success() && said.contains("the output is being written first"), "{signals:?}: {said}");
        assert!(f.path(&format!("runs/out-{i}/cpift.json")).exists());
    }
    expect_entries(&f.path("runs"), &["out-0", "out-1", "out-2"]);
    // A person who insists.
    let child = start(&f, "not", &["--steps", "1"]);
    wait_for(staged(f.path("runs"), "not", "model.safetensors"));
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    std::thread::sleep(Duration::from_millis(10));
    let (status, said) = end(child, &[Signal::INT]);
    assert_eq!(status.code(), Some(128 + Signal::INT.as_raw()), "{said}");
    assert!(!f.path("runs/not").exists());
}

#[test]
fn a_second_warning_lets_a_state_be_saved() {
    let f = large();
    let child = start(&f, "out", &["--steps", "100", "--save-every", "2"]);
    wait_for(staged(f.path("runs/out.checkpoints"), "step-0000002", "rank-0-of-1.safetensors"));
    let (status, said) = end(child, &[Signal::TERM, Signal::USR1]);
    assert_eq!(status.code(), Some(75), "{said}");
    assert!(said.contains("stopping when the state is saved"), "{said}");
    expect_entries(&f.path("runs/out.checkpoints"), &["metrics.jsonl", "step-0000002"]);
}

/// A cluster signals all processes of a job, and the script around the stage forwards its own
/// signal.
#[test]
fn one_warning_that_comes_from_several_sides_is_one() {
    let f = Fixture::new();
    let metrics = f.path("runs/out.checkpoints/metrics.jsonl");
    let child = start(&f, "out", &["--steps", "100000"]);
    wait_for(|| fs::read_to_string(&metrics).ok().filter(|text| text.lines().count() > 3));
    // One thread receives it; those that compute are not interrupted.
    let threads = fs::read_dir(format!("/proc/{}/task", child.id())).unwrap();
    let hears = threads.flatten().filter(|thread| {
        let status = fs::read_to_string(thread.path().join("status")).unwrap();
        let blocked = status.lines().find_map(|line| line.strip_prefix("SigBlk:")).unwrap();
        u64::from_str_radix(blocked.trim(), 16).unwrap() & (1 << (Signal::TERM.as_raw() - 1)) == 0
    });
    assert_eq!(hears.count(), 1);
    let (status, said) = end(child, &[Signal::TERM; 3]);
    assert_eq!(status.code(), Some(75), "{said}");
    assert_eq!(said.matches("saving and stopping after this step").count(), 1, "{said}");
}

#[test]
fn the_figures_of_a_run_show_while_it_is_at_work() {
    let f = Fixture::new();
    let metrics = f.path("runs/out.checkpoints/metrics.jsonl");
    let mut child = start(&f, "out", &["--steps", "100000"]);
    wait_for(|| fs::read_to_string(&metrics).ok().filter(|text| text.lines().count() > 3));
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(metrics.exists(), "a killed run leaves them");
    // The next run's metrics replace them, and go into the output.
    let (status, said) = end(start(&f, "out", &["--steps", "2"]), &[]);
    assert!(status.success(), "{said}");
    assert_eq!(fs::read_to_string(f.path("runs/out/metrics.jsonl")).unwrap().lines().count(), 2);
    expect_entries(&f.path("runs"), &["out"]);
    // A failed run leaves them too.
    let (status, said) = end(start(&f, "bad", &["--steps", "60", "--lr", "1e30", "--warmup-ratio", "0"]), &[]);
    assert_eq!(status.code(), Some(1), "{said}");
    expect_entries(&f.path("runs"), &["bad.checkpoints", "out"]);
    expect_entries(&f.path("runs/bad.checkpoints"), &["metrics.jsonl"]);
}

#[test]
fn two_runs_do_not_share_their_states() {
    let f = Fixture::new();
    let child = start(&f, "out", &["--steps", "3000", "--save-every", "1"]);
    wait_for(|| f.path("runs/out.checkpoints/step-0000001").exists().then_some(()));
    for more in [&["--resume"][..], &["--force"], &["--resume", "--force"]] {
        let (status, said) = end(start(&f, "out", &[&["--steps", "3000", "--save-every", "1"], more].concat()), &[]);
        assert!(status.code() == Some(3) && said.contains("another run is writing here"), "{more:?}: {said}");
    }
    let (status, said) = end(child, &[Signal::TERM]);
    assert_eq!(status.code(), Some(75), "{said}");
}
