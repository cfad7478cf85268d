//! Running out of memory, through the real binary under `ulimit -v`.

use std::path::{Path, PathBuf};

use cpift_testkit::model::{row, write_rows, write_tasks, write_tiny_model};
use cpift_testkit::{Run, expect_entries, run};

/// Address space in KiB: the program itself takes about 780 MiB of it.
const LIMIT: &str = "1200000";

struct Fixture {
    dir: tempfile::TempDir,
    base: PathBuf,
    tasks: PathBuf,
}

impl Fixture {
    /// Rows that fill the tasks' 96 tokens.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let base = write_tiny_model(&dir.path().join("base"), 1);
        let tasks = write_tasks(&dir.path().join("data"));
        write_rows(&dir.path().join("data/copy/train.jsonl"), &[row("q", &"x".repeat(200))]);
        Self { dir, base, tasks }
    }

    fn out(&self) -> PathBuf {
        self.dir.path().join("runs/probe")
    }

    fn limited(&self, more: &[&str]) -> Run {
        let out = self.out();
        let path = |p: &Path| p.to_str().unwrap().to_owned();
        let script = format!("ulimit -v {LIMIT}; exec \"$0\" \"$@\"");
        let fixed = ["-c", &script, env!("CARGO_BIN_EXE_cpift-probe"), "--base", &path(&self.base), "--tasks"];
        let rest = ["--task", "copy", "--out", &path(&out), "--steps", "1", "--device", "cpu", "--threads", "1"];
        run("sh", fixed.into_iter().chain([path(&self.tasks).as_str()]).chain(rest).chain(more.iter().copied()))
    }
}

#[test]
fn running_out_of_memory_says_what_takes_it_and_what_would_fit_and_that_fits() {
    let f = Fixture::new();
    let failed = f.limited(&["--batch-size", "2048"]).expect_code(1);
    let failed = failed.says(&["error: out of memory: ", "ulimit -v leaves ", "196,608 tokens a batch"]);
    let failed = failed.says(&["\nactivations ", "\n  with --gradient-checkpointing: ", "\n  hint: --batch-size "]);
    for noise in ["panicked", "RUST_BACKTRACE", "enforce fail", "frame #"] {
        assert!(!failed.stderr.contains(noise), "{}", failed.stderr);
    }
    assert!(!f.dir.path().join("runs").exists());
    let hint = failed.stderr.lines().find_map(|l| l.trim().strip_prefix("hint: ")).unwrap();
    let (options, _) = hint.split_once(" fits: ").unwrap();
    f.limited(&options.split(' ').collect::<Vec<_>>()).ok();
    expect_entries(&f.dir.path().join("runs"), &["probe"]);
}
