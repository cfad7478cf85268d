//! `cpift-pipeline stage` through the real binary: logs, states, signals, and the lines it prints;
//! and what is refused.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const PROGRAM: &str = env!("CARGO_BIN_EXE_cpift-pipeline");

fn stage(dir: &Path, script: &str) -> Command {
    let mut command = Command::new(PROGRAM);
    command.arg("stage").arg(dir.join("logs/x")).args(["sh", "-c", script]);
    command.env("DUE", "x y").env("STARTED", "7").env_remove("LAUNCH");
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn read(dir: &Path, name: &str) -> String {
    fs::read_to_string(dir.join("logs").join(name)).unwrap_or_default()
}

fn texts(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

/// Waits until the log has `line` and the state is running.
fn wait_for(dir: &Path, line: &str, child: &mut Child) {
    let begun = Instant::now();
    while !read(dir, "x.log").contains(line) || !read(dir, "x.state").starts_with("running ") {
        assert!(begun.elapsed() < Duration::from_secs(60) && child.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn output_goes_to_the_log_and_the_line_counts_what_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let run = |script: &str| texts(&stage(dir.path(), script).output().unwrap());
    let (code, out, _) = run("echo made; echo noted >&2");
    assert!(code == Some(0) && out.starts_with("[1/2] x ") && out.ends_with(" s\n"), "{out}");
    assert_eq!(read(dir.path(), "x.log"), "made\nnoted\n");
    assert!(read(dir.path(), "x.state").starts_with("exit 0 "));
    // A command that finds its output up to date keeps the log of the one that made it.
    assert!(run("echo out: up to date").1.starts_with("[2/2] x "));
    assert_eq!(read(dir.path(), "x.log"), "made\nnoted\n");
    let (code, out, errors) = run("echo 'error: no such row'; exit 3");
    assert_eq!((code, errors.as_str()), (Some(3), "error: no such row\n"));
    assert!(out.starts_with("x: exit code 3 after "), "{out}");
    assert!(read(dir.path(), "x.state").starts_with("exit 3 ") && read(dir.path(), "x.before.log").contains("made"));
    assert_eq!(run("kill -9 $$").0, Some(137));
}

#[test]
fn signals_are_passed_on_and_the_exit_code_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let code = dir.path().join("code");
    let script = "trap 'echo saved; exit 75' TERM; echo begun; while :; do sleep 0.01; done";
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut child = stage(dir.path(), script).env("STAGE_CODE", &code).spawn().unwrap();
        wait_for(dir.path(), "begun", &mut child);
        let state = read(dir.path(), "x.state");
        let words: Vec<&str> = state.split_whitespace().collect();
        assert!(words[0] == "running" && Path::new("/proc").join(words[2]).exists(), "{state}");
        kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
        let (status, _, errors) = texts(&child.wait_with_output().unwrap());
        assert!(status == Some(75) && errors.contains("saved"), "{status:?} {errors}");
        assert!(read(dir.path(), "x.state").starts_with("exit 75 "));
        assert_eq!(fs::read_to_string(&code).unwrap(), "75");
    }
}

#[test]
fn a_command_whose_state_cannot_be_written_is_ended() {
    let dir = tempfile::tempdir().unwrap();
    // A directory that is not empty cannot be replaced by the file of the state.
    fs::create_dir_all(dir.path().join("logs/x.state/in-the-way")).unwrap();
    let (code, out, errors) = texts(&stage(dir.path(), "echo $$; exec sleep 600").output().unwrap());
    assert!(code == Some(1) && out.is_empty() && errors.contains("x.state"), "{code:?} {errors}");
    let names = fs::read_dir(dir.path().join("logs")).unwrap().map(|entry| entry.unwrap().file_name());
    assert_eq!(names.filter(|name| name.to_string_lossy().starts_with("x.state")).count(), 1);
    let process = read(dir.path(), "x.log");
    assert!(process.is_empty() || !Path::new("/proc").join(process.trim()).exists(), "{process}");
}

/// A launcher (srun) gets SIGUSR1, and only for programs that share their work.
#[test]
fn a_launcher_starts_programs_that_share_their_work() {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("cpift-train");
    let script = "#!/bin/sh\ntrap 'echo usr1; exit 75' USR1\necho \"$LAUNCHED $*\"\nwhile :; do sleep 0.01; done\n";
    fs::write(&program, script).unwrap();
    let mut command = Command::new(PROGRAM);
    command.arg("stage").arg(dir.path().join("logs/x")).args(["sh", program.to_str().unwrap(), "run"]);
    command.env("LAUNCH", "env LAUNCHED=yes").stdout(Stdio::piped()).stderr(Stdio::piped());
    // `sh` shares nothing: it is started without the launcher.
    let mut child = command.spawn().unwrap();
    wait_for(dir.path(), "run\n", &mut child);
    assert!(!read(dir.path(), "x.log").contains("yes"));
    child.kill().unwrap();
    let words = read(dir.path(), "x.state");
    let left = words.split_whitespace().nth(2).unwrap().parse().unwrap();
    kill(Pid::from_raw(left), Signal::SIGKILL).unwrap();
    child.wait().unwrap();
    fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mut command = Command::new(PROGRAM);
    command.arg("stage").arg(dir.path().join("logs/x")).arg(&program).arg("run");
    command.env("LAUNCH", "env LAUNCHED=yes").stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    wait_for(dir.path(), "yes run\n", &mut child);
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM).unwrap();
    let (code, _, errors) = texts(&child.wait_with_output().unwrap());
    assert!(code == Some(75) && errors.contains("usr1"), "{code:?} {errors}");
}

/// Lines about running training come at growing intervals.
#[test]
fn the_step_of_running_training_is_shown() {
    let dir = tempfile::tempdir().unwrap();
    let script = "echo 'stage 1/2 (a, b) step 3/9 loss 1.5 lr 1'; sleep 2.5";
    let (_, out, _) = texts(&stage(dir.path(), script).env("PROGRESS", "0.1").output().unwrap());
    let shown: Vec<&str> = out.lines().filter(|line| line.contains("step 3/9 loss 1.5")).collect();
    assert!(shown.len() == 1 && shown[0].starts_with("        x "), "{out}");
    let (_, out, _) = texts(&stage(dir.path(), script).env("PROGRESS", "0").output().unwrap());
    assert!(!out.contains("step 3/9"), "{out}");
}

#[test]
fn settings_that_cannot_be_used_are_refused() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let dir = tempfile::tempdir().unwrap();
    let run = |folder: &Path, args: &[&str]| {
        let mut command = Command::new(PROGRAM);
        command.current_dir(folder).args(args);
        ["RUN", "BASE", "TASKS", "CONFIG", "CLUSTER"].iter().for_each(|name| {
            command.env_remove(name);
        });
        texts(&command.output().unwrap())
    };
    let missing = dir.path().join("none");
    let of_missing = format!("RUN={}", missing.display());
    let config = dir.path().join("run.toml");
    fs::write(&config, "final_token = 3\n").unwrap();
    let of_config = format!("CONFIG={}", config.display());
    for (folder, args, part) in [
        (root.as_path(), &["status"][..], "name the run: make status RUN=DIR"),
        (&root, &["status", of_missing.as_str()], "no such directory (hint: make status RUN=DIR)"),
        (&root, &["slurm", of_missing.as_str()], "name the inputs: make slurm"),
        (&root, &["run", of_config.as_str()], "unknown setting final_token (hint: final_tokens?)"),
        (&root, &["status", "RUN"], "expected NAME=VALUE"),
        (&root, &["stage", "/"], "PROGRAM"),
        (dir.path(), &["status", of_missing.as_str()], "run this in the directory of the project"),
    ] {
        let (code, _, errors) = run(folder, args);
        assert!(code == Some(2) && errors.contains(part), "{args:?}: {code:?} {errors}");
    }
    assert!(!missing.exists());
}
