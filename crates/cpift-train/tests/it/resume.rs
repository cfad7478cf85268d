//! Runs that are killed or stopped, and resumed: the result is the same, byte for byte.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::common::{Fixture, PROGRAM, read_json};
use cpift_testkit::model::write_json;
use cpift_testkit::{Numbers, expect_entries};
use rustix::process::{Pid, Signal, kill_process};

/// A run whose result is known.
struct Known {
    fixture: Fixture,
    more: Vec<String>,
    weights: Vec<u8>,
    took: Duration,
}

impl Known {
    /// Runs `more` to the end once.
    fn run(fixture: Fixture, more: &[&str]) -> Self {
        let more: Vec<String> = fixture.stages().into_iter().chain(more.iter().map(|a| (*a).to_owned())).collect();
        let mut known = Self { fixture, more, weights: Vec::new(), took: Duration::ZERO };
        let clock = Instant::now();
        known.end("quiet", &[]);
        known.took = clock.elapsed();
        known.weights = known.weights_of("quiet");
        known
    }

    fn start(&self, out: &str, more: &[&str]) -> Child {
        let own: Vec<&str> = self.more.iter().map(String::as_str).chain(more.iter().copied()).collect();
        let args = self.fixture.arguments(out, &own);
        Command::new(PROGRAM).args(args).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Runs to the end.
    fn end(&self, out: &str, more: &[&str]) {
        let output = self.start(out, more).wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// Resumes and runs to the end; the result must be that of the uninterrupted run.
    fn finish(&self, out: &str) {
        self.end(out, &["--resume"]);
        self.check_end(out);
    }

    fn weights_of(&self, out: &str) -> Vec<u8> {
        fs::read(self.fixture.path("runs").join(out).join("model.safetensors")).unwrap()
    }

    fn states(&self, out: &str) -> PathBuf {
        self.fixture.path("runs").join(format!("{out}.checkpoints"))
    }

    /// Names of the saved states.
    fn saved(&self, out: &str) -> Vec<String> {
        let entries = fs::read_dir(self.states(out)).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
        names.retain(|n| n.starts_with("step-"));
        names.sort();
        names
    }

    /// The result is that of the uninterrupted run, and no states are left.
    fn check_end(&self, out: &str) {
        assert!(self.weights_of(out) == self.weights, "the weights of {out} differ from those of the quiet run");
        assert!(!self.states(out).exists(), "states of a finished run are removed");
        let steps = |out: &str| -> Vec<String> {
            let text = fs::read_to_string(self.fixture.path("runs").join(out).join("metrics.jsonl")).unwrap();
            let lines = text.lines().map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap());
            let key = |v: serde_json::Value| {
                format!("{} {} {} {} {}", v["stage"], v["step"], v["loss"], v["lr"], v["eval_loss"])
            };
            lines.map(key).collect()
        };
        assert_eq!(steps(out), steps("quiet"), "every step is in metrics.jsonl once");
        let facts = |out: &str| read_json(&self.fixture.path("runs").join(out).join("cpift.json"))["facts"].clone();
        assert_eq!(facts(out), facts("quiet"));
    }
}

/// Kills runs at random moments after one more state is saved, `kills` times, then runs to the end.
fn killed_at_random(known: &Known, kills: usize, seed: u64) {
    let mut numbers = Numbers(seed);
    let mut done = 0;
    while done < kills {
        let mut child = known.start("killed", &["--resume"]);
        let before = known.saved("killed");
        while known.saved("killed") == before && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(known.took.mul_f64(0.1 * f64::from(numbers.unit().abs())));
        child.kill().unwrap();
        done += usize::from(!child.wait().unwrap().success());
        if known.fixture.path("runs/killed").exists() {
            known.finish("killed");
            fs::remove_dir_all(known.fixture.path("runs/killed")).unwrap();
        }
    }
    known.finish("killed");
    expect_entries(&known.fixture.path("runs"), &["killed", "quiet"]);
}

#[test]
fn killed_at_20_random_moments() {
    let known = Known::run(
        Fixture::new(),
        &[
            "--steps",
            "60",
            "--save-every",
            "4",
            "--save-total-limit",
            "2",
            "--packing",
            "--grad-accum",
            "2",
            "--max-length",
            "64",
        ],
    );
    killed_at_random(&known, 20, 1);
}

#[test]
fn killed_with_bf16_weights_and_moments_and_a_weighted_mixture() {
    let fixture = Fixture::new();
    fixture.weigh("pick", "3.0");
    let known = Known::run(
        fixture,
        &[
            "--steps",
            "40",
            "--save-every",
            "3",
            "--master-dtype",
            "bf16",
            "--optim-state-dtype",
            "bf16",
            "--gradient-checkpointing",
            "--optimizer-in-backward",
            "--max-grad-norm",
            "0",
        ],
    );
    killed_at_random(&known, 6, 2);
}

/// Waits until the run is training, sends the signals and waits for the end.
fn stopped(known: &Known, out: &str, signals: &[Signal]) -> (ExitStatus, String) {
    let child = known.start(out, &["--resume", "--save-every", "1"]);
    let before = known.saved(out);
    let clock = Instant::now();
    while known.saved(out) == before {
        assert!(clock.elapsed() < Duration::from_secs(60), "no state was saved");
        std::thread::sleep(Duration::from_millis(2));
    }
    // A second signal must not arrive while a state is still being written.
    std::thread::sleep(Duration::from_millis(if signals.len() > 1 { 100 } else { 0 }));
    for signal in signals {
        kill_process(Pid::from_child(&child), *signal).unwrap();
        // Signals that arrive together are delivered in the order of their numbers.
        std::thread::sleep(Duration::from_millis(10));
    }
    let output = child.wait_with_output().unwrap();
    (output.status, String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn a_signal_saves_and_stops() {
    let known = Known::run(Fixture::new(), &["--steps", "300"]);
    for signal in [Signal::TERM, Signal::USR1] {
        let (status, said) = stopped(&known, "stopped", &[signal]);
        assert_eq!(status.code(), Some(75), "{said}");
        assert!(said.contains("--resume") && said.contains("stopped.checkpoints/step-"), "{said}");
        assert!(!said.contains("error:"), "{said}");
        assert!(!known.fixture.path("runs/stopped").exists());
    }
    known.finish("stopped");
}

#[test]
fn a_second_signal_stops_at_once() {
    // Steps long enough for both signals to arrive within one, once the awaited state is
    // complete.
    let known = Known::run(Fixture::new(), &["--steps", "10", "--batch-size", "800"]);
    let (status, said) = stopped(&known, "stopped", &[Signal::USR1, Signal::TERM]);
    assert_eq!(status.code(), Some(128 + Signal::TERM.as_raw()), "{said}");
    known.finish("stopped");
}

#[test]
fn a_state_is_for_the_run_that_saved_it() {
    let f = Fixture::new();
    let known = Known::run(f, &["--steps", "200"]);
    let (status, _) = stopped(&known, "half", &[Signal::TERM]);
    assert_eq!(status.code(), Some(75));
    let again_in = |out: &str, more: &[&str]| {
        let own: Vec<&str> = known.more.iter().map(String::as_str).chain(more.iter().copied()).collect();
        known.fixture.train(out, &own)
    };
    let again = |more: &[&str]| again_in("half", more);
    again(&[]).bad_input(&["half.checkpoints", "--resume", "--force"]);
    again(&["--resume", "--seed", "5"]).bad_input(&["state.json", "another seed", "expected: 5", "found: 0"]);
    // The data of a task has changed since.
    let rows = known.fixture.path("data/pick/train.jsonl");
    let text = fs::read_to_string(&rows).unwrap();
    fs::write(&rows, text.lines().skip(1).map(|l| format!("{l}\n")).collect::<String>()).unwrap();
    again(&["--resume"]).bad_input(&["state.json", "another train:pick"]);
    fs::write(&rows, text).unwrap();
    // Options that only report on a run may change.
    again(&["--resume", "--log-every", "7", "--save-total-limit", "3"]).ok();
    known.check_end("half");
    // A job that is requeued after it has finished; defaults may be given explicitly.
    again(&["--resume"]).ok().says(&["half is finished already"]);
    again(&["--resume", "--compute-dtype", "f32"]).ok().says(&["half is finished already"]);
    again(&["--resume", "--save-dtype", "bf16"]).bad_input(&[
        "cpift.json",
        "another save_dtype",
        "\"BF16\"",
        "\"F32\"",
    ]);
    again(&["--resume", "--seed", "5"]).bad_input(&["cpift.json", "another seed"]);
    known.check_end("half");
    // Start over with the states of an unfinished run.
    let (status, _) = stopped(&known, "other", &[Signal::TERM]);
    assert_eq!(status.code(), Some(75));
    again_in("other", &["--force"]).ok();
    known.check_end("other");
    // The same with --resume, as the pipeline does it, with a state of another run.
    let (status, _) = stopped(&known, "third", &[Signal::TERM]);
    assert_eq!(status.code(), Some(75));
    again_in("third", &["--resume", "--seed", "5"]).bad_input(&["another seed"]);
    again_in("third", &["--resume", "--seed", "5", "--force"]).ok();
    assert!(known.weights_of("third") != known.weights);
    again_in("third", &["--resume", "--force"]).ok();
    known.check_end("third");
}

#[test]
fn only_the_newest_states_are_kept() {
    let known = Known::run(Fixture::new(), &["--steps", "200"]);
    let (status, _) = stopped(&known, "kept", &[Signal::TERM]);
    assert_eq!((status.code(), known.saved("kept").len()), (Some(75), 1));
    let child = known.start("kept", &["--resume", "--save-every", "2", "--save-total-limit", "3"]);
    let clock = Instant::now();
    while known.saved("kept").len() < 3 {
        assert!(clock.elapsed() < Duration::from_secs(60), "{:?}", known.saved("kept"));
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(child.wait_with_output().unwrap().status.success());
    known.check_end("kept");
}

#[test]
fn killed_with_losses_on_held_out_rows() {
    let known =
        Known::run(Fixture::new(), &["--steps", "40", "--save-every", "3", "--eval-every", "4", "--eval-rows", "3"]);
    killed_at_random(&known, 6, 3);
}

#[test]
fn killed_with_f32_weights_and_bf16_moments() {
    let known = Known::run(Fixture::new(), &["--steps", "40", "--save-every", "3", "--optim-state-dtype", "bf16"]);
    killed_at_random(&known, 6, 4);
}

#[test]
fn killed_with_moments_of_8_bits() {
    let known = Known::run(Fixture::new(), &["--steps", "40", "--save-every", "3", "--optim", "adamw_8bit"]);
    killed_at_random(&known, 6, 5);
}

#[test]
fn a_state_is_for_the_tokens_it_was_trained_on() {
    let f = Fixture::new();
    // A template that prints the year.
    let path = f.base.join("tokenizer_config.json");
    let mut config = read_json(&path);
    let template = config["chat_template"].as_str().unwrap().to_owned();
    config["chat_template"] = format!("{{{{ strftime_now('%Y') }}}}{template}").into();
    write_json(&path, &config);
    let known = |seconds: &str, more: &[&str]| {
        let args = f.arguments("out", &[&["--steps", "300", "--resume", "--save-every", "1"], more].concat());
        let mut command = Command::new(PROGRAM);
        command.args(args).env("SOURCE_DATE_EPOCH", seconds).stderr(Stdio::piped());
        command.spawn().unwrap()
    };
    let mut child = known("1700000000", &[]);
    let clock = Instant::now();
    let saved = |e: fs::DirEntry| e.file_name().to_string_lossy().starts_with("step-");
    while !fs::read_dir(f.path("runs/out.checkpoints")).into_iter().flatten().flatten().any(saved) {
        assert!(child.try_wait().unwrap().is_none() && clock.elapsed() < Duration::from_secs(60), "no state was saved");
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let said = |child: Child| {
        let output = child.wait_with_output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, text) = said(known("1800000000", &[]));
    assert!(code == Some(3) && text.contains("another examples"), "{text}");
    let (code, text) = said(known("1700000000", &[]));
    assert_eq!(code, Some(0), "{text}");
}

/// The name in the message, and the damage to the state.
type Spoil = (&'static str, fn(&Path));

#[test]
fn force_passes_over_states_that_cannot_be_used() {
    let known = Known::run(Fixture::new(), &["--steps", "30"]);
    let again = |more: &[&str]| {
        let own: Vec<&str> = known.more.iter().map(String::as_str).chain(more.iter().copied()).collect();
        known.fixture.train("bad", &own)
    };
    let spoil: [Spoil; 4] = [
        ("another format version", |state| {
            let text = fs::read_to_string(state.join("state.json")).unwrap();
            fs::write(state.join("state.json"), text.replace("\"format_version\": 4", "\"format_version\": 3"))
                .unwrap();
        }),
        ("state.json", |state| fs::write(state.join("state.json"), "{").unwrap()),
        ("rank-0-of-1.safetensors", |state| {
            let path = state.join("rank-0-of-1.safetensors");
            let bytes = fs::read(&path).unwrap();
            fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        }),
        ("metrics.jsonl", |state| fs::remove_file(state.join("metrics.jsonl")).unwrap()),
    ];
    for (part, spoil) in spoil {
        let (status, said) = stopped(&known, "bad", &[Signal::TERM]);
        assert_eq!(status.code(), Some(75), "{said}");
        let newest = known.states("bad").join(known.saved("bad").pop().unwrap());
        spoil(&newest);
        again(&["--resume"]).bad_input(&[part, newest.file_name().unwrap().to_str().unwrap(), "--resume --force"]);
        again(&["--resume", "--force"]).ok().says(&["skipping a saved state", part]);
        known.check_end("bad");
        fs::remove_dir_all(known.fixture.path("runs/bad")).unwrap();
    }
}

#[test]
fn an_older_state_is_used_if_the_newest_is_damaged() {
    let known = Known::run(Fixture::new(), &["--steps", "30"]);
    let child = known.start("two", &["--save-every", "3", "--save-total-limit", "2"]);
    let clock = Instant::now();
    while known.saved("two").len() < 2 {
        assert!(clock.elapsed() < Duration::from_secs(60), "{:?}", known.saved("two"));
        std::thread::sleep(Duration::from_millis(1));
    }
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(75));
    let saved = known.saved("two");
    fs::write(known.states("two").join(&saved[1]).join("state.json"), "").unwrap();
    let output = known.start("two", &["--resume", "--force"]).wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success()
            && said.contains(&format!("resuming from {}", known.states("two").join(&saved[0]).display())),
        "{said}"
    );
    known.check_end("two");
}
