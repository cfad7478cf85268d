//! Damaged saved states: `verify` finds every changed byte, and `--resume` refuses them.

#[path = "it/common/mod.rs"]
mod common;

use std::alloc::System;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cap::Cap;
use common::{Fixture, PROGRAM};
use cpift_testkit::run;
use cpift_testkit::spoil::{Spoiler, TIMES};
use cpift_torch::train::verify_states;

#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, usize::MAX);

const SPOILER: Spoiler = Spoiler { allocator: &ALLOCATOR, per_byte: 4, constant: 1 << 20 };

/// A run that was killed after it had saved a state: its arguments and the state.
fn killed(f: &Fixture) -> (Vec<String>, PathBuf) {
    let args = f.arguments("out", &["--only", "copy", "--steps", "1000", "--save-every", "2"]);
    let mut child = Command::new(PROGRAM).args(&args).stderr(Stdio::null()).spawn().unwrap();
    let (states, start) = (f.path("runs/out.checkpoints"), Instant::now());
    let newest = || {
        let names = fs::read_dir(&states).ok()?.map(|e| e.unwrap().path());
        names.filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with("step-")).max()
    };
    while newest().is_none() {
        assert!(start.elapsed() < Duration::from_secs(60), "no state is saved");
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    (args, newest().unwrap())
}

#[test]
fn every_spoilt_byte_of_a_state_is_found() {
    let f = Fixture::new();
    let (args, state) = killed(&f);
    let verify = |path: &PathBuf| run(PROGRAM, ["verify".as_ref(), path.as_os_str()]);
    verify(&state).ok().says(&["1 intact"]);
    verify(&state.parent().unwrap().to_owned()).ok().says(&["intact"]);
    for name in ["rank-0-of-1.safetensors", "metrics.jsonl"] {
        assert_eq!(SPOILER.each(&state.join(name), || verify_states(&state).is_ok()), 0, "{name}");
    }
    // White space, and last digits that change no number.
    let well = SPOILER.each(&state.join("state.json"), || verify_states(&state).is_ok());
    assert!(well < TIMES / 50, "{well} times state.json passed");
    // Only the values: the rest of the file is valid.
    let weights = state.join("rank-0-of-1.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&weights, bytes).unwrap();
    let parts = ["rank-0-of-1.safetensors", "does not have the digest that state.json records"];
    verify(&state).bad_input(&parts);
    let resume = args.iter().map(String::as_str).chain(["--resume"]);
    run(PROGRAM, resume).bad_input(&parts);
    verify(&f.base).bad_input(&["contains no training state"]);
}

#[test]
fn a_linked_folder_of_states_is_not_written_into() {
    let f = Fixture::new();
    let elsewhere = f.path("elsewhere");
    fs::create_dir_all(&elsewhere).unwrap();
    fs::create_dir_all(f.path("runs")).unwrap();
    std::os::unix::fs::symlink(&elsewhere, f.path("runs/out.checkpoints")).unwrap();
    f.train("out", &["--only", "copy", "--steps", "2"]).bad_input(&["out.checkpoints", "is a symbolic link"]);
    assert_eq!(fs::read_dir(elsewhere).unwrap().count(), 0);
}
