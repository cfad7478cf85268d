//! A file that one rank or all ranks cannot use ends every rank in bounded time, with the exit code
//! of bad input and the name of the file, and leaves nothing half-written.

use std::fs;
use std::path::Path;
use std::process::Output;
use std::time::{Duration, Instant};

use crate::common::{Fixture, PROGRAM};
use cpift_testkit::ranks::{Job, said};

/// Longest time from the start to the end of the last rank.
const END: Duration = Duration::from_secs(30);
const BAD_INPUT: i32 = 3;

/// Arguments of a rank that trains into `out`, with `(flag, value)` instead of the usual one.
fn arguments(f: &Fixture, out: &str, own: &[&str], instead: Option<(&str, &Path)>) -> Vec<String> {
    let mut all = f.arguments(out, &[&["--steps", "4"], own].concat());
    if let Some((flag, value)) = instead {
        let at = all.iter().position(|a| a == flag).unwrap();
        value.to_str().unwrap().clone_into(&mut all[at + 1]);
    }
    all
}

/// Starts two ranks and expects bad input of both, with all of `words`; `left` is what there is
/// beside the output afterwards.
fn refused(f: &Fixture, what: &str, words: &[&str], left: &[&str], of_rank: impl Fn(usize) -> Vec<String>) {
    let clock = Instant::now();
    let outputs: Vec<Output> = Job::start(PROGRAM, 2, of_rank).wait();
    let took = clock.elapsed();
    assert!(took < END, "{what} took {took:?}");
    for (rank, output) in outputs.iter().enumerate() {
        let text = said(output);
        assert_eq!(output.status.code(), Some(BAD_INPUT), "{what}, rank {rank}: {text}");
        assert_eq!(text.matches("error: ").count(), 1, "{what}, rank {rank}: {text}");
        for word in words {
            assert!(text.contains(word), "{what}, rank {rank} does not say {word}: {text}");
        }
    }
    let entries = fs::read_dir(f.path("runs")).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    assert_eq!(names, left, "{what} leaves");
}

#[test]
fn files_that_no_rank_can_use() {
    let f = Fixture::new();
    let both = |what: &str, words: &[&str]| refused(&f, what, words, &[], |_| arguments(&f, "out", &[], None));

    let rows = f.path("data/count/train.jsonl");
    let text = fs::read_to_string(&rows).unwrap();
    fs::remove_file(&rows).unwrap();
    both("a missing row file", &["count/train.jsonl"]);
    let mut lines: Vec<&str> = text.lines().collect();
    lines[2] = "{\"messages\": [";
    fs::write(&rows, lines.join("\n")).unwrap();
    both("a broken row", &["count/train.jsonl", "line 3"]);
    fs::write(&rows, &text).unwrap();

    let weights = f.base.join("model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    both("truncated weights", &["model.safetensors"]);
    fs::remove_file(&weights).unwrap();
    both("missing weights", &["base"]);
    fs::remove_dir_all(&f.base).unwrap();
    both("a missing model", &["base: no such checkpoint"]);
}

/// As on a node whose disk has other files: the others end with its error and its exit code.
#[test]
fn files_that_one_rank_cannot_use() {
    let f = Fixture::new();
    let gone = f.path("gone");
    for broken in [0, 1] {
        for flag in ["--model", "--tasks"] {
            let what = format!("{flag} missing on rank {broken}");
            refused(&f, &what, &["gone"], &[], |rank| {
                arguments(&f, "out", &[], (rank == broken).then_some((flag, &gone)))
            });
        }
    }
}

#[test]
fn directories_that_cannot_have_the_state() {
    let f = Fixture::new();
    let good = f.path("offload");
    fs::create_dir(&good).unwrap();
    // No file can be made in /proc, not even by root.
    for folder in [&f.path("gone"), Path::new("/proc")] {
        for broken in [&[0, 1][..], &[0], &[1]] {
            let what = format!("--offload-dir {} of ranks {broken:?}", folder.display());
            refused(&f, &what, &["--offload-dir", folder.to_str().unwrap()], &[], |rank| {
                let own = if broken.contains(&rank) { folder } else { good.as_path() };
                arguments(&f, "out", &["--offload", "all", "--offload-dir", own.to_str().unwrap()], None)
            });
        }
    }
    assert_eq!(fs::read_dir(&good).unwrap().count(), 0);
}

/// The saved states of a job of two ranks stay as they are.
#[test]
fn damaged_states() {
    let f = Fixture::new();
    let saved = f.path("runs/out.checkpoints");
    let more = ["--steps", "60", "--save-every", "2"];
    let job = Job::start(PROGRAM, 2, |_| f.arguments("out", &more));
    let clock = Instant::now();
    while !saved.join("step-0000002").exists() && clock.elapsed() < END {
        std::thread::sleep(Duration::from_millis(2));
    }
    rustix::process::kill_process(rustix::process::Pid::from_child(&job.0[1]), rustix::process::Signal::TERM).unwrap();
    assert!(job.wait().iter().all(|o| o.status.code() == Some(75)));
    let newest = fs::read_dir(&saved).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_dir()).max().unwrap();
    let states = fs::read_dir(&saved).unwrap().count();

    let resumed = [&more[..], &["--resume"]].concat();
    for name in ["rank-1-of-2.safetensors", "rank-0-of-2.safetensors", "state.json"] {
        let path = newest.join(name);
        let bytes = fs::read(&path).unwrap();
        let damages: [(&str, Option<&[u8]>); 3] =
            [("truncated", Some(&bytes[..bytes.len() - 7])), ("empty", Some(&[])), ("missing", None)];
        for (how, damaged) in damages {
            match damaged {
                Some(bytes) => fs::write(&path, bytes).unwrap(),
                None => fs::remove_file(&path).unwrap(),
            }
            let what = format!("{name}, {how}");
            refused(&f, &what, &[name, "--force"], &["out.checkpoints"], |_| f.arguments("out", &resumed));
            assert_eq!(fs::read_dir(&saved).unwrap().count(), states, "{what}");
            fs::write(&path, &bytes).unwrap();
        }
    }
    Job::start(PROGRAM, 2, |_| f.arguments("out", &resumed)).succeed();
}
