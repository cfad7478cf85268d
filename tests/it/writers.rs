//! Two runs that write the same output at the same time, and runs with other time zones, locales,
//! directories and thread counts.

use std::fs;
use std::path::Path;
use std::process::{Child, Output, Stdio};

use cpift_testkit::chain::{Chain, Link};
use cpift_testkit::{expect_entries, run_command};
use serde_json::Value;

const ROUNDS: usize = 50;

/// Stages and the argument value that differs between the two runs, in the first and in the second.
const RIVALS: [(&str, &str, &str); 3] = [("mask copy", "5", "7"), ("group", "1.1", "0.01"), ("merge", "cpi", "cpi")];

fn start(chain: &Chain, link: &Link, more: &[&str]) -> Child {
    let mut command = chain.command(link);
    command.args(more).stdout(Stdio::null()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

/// Returns the two commands, without `--skip-up-to-date`, writing to a separate directory.
fn rivals((name, old, new): (&str, &str, &str)) -> [Link; 2] {
    let mut first = Chain::link(name);
    first.args.retain(|arg| arg != "--skip-up-to-date");
    let last = first.args.last_mut().unwrap();
    *last = last.replace("run/", "rivals/");
    first.out = last.clone();
    let mut second = first.clone();
    second.args.iter_mut().filter(|arg| *arg == old).for_each(|arg| new.clone_into(arg));
    if old == new {
        second.args.extend(["--omega".to_owned(), "0.25".to_owned()]);
    }
    [first, second]
}

/// Bytes of the output of a stage.
fn bytes(out: &Path) -> Vec<u8> {
    fs::read(if out.is_dir() { out.join("model.safetensors") } else { out.to_owned() }).unwrap()
}

fn record(out: &Path) -> Value {
    let beside = out.with_file_name(format!("{}.cpift.json", out.file_name().unwrap().to_str().unwrap()));
    let path = if out.is_dir() { out.join("cpift.json") } else { beside };
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn of_two_concurrent_writers_one_wins_and_the_other_reports_it() {
    let chain = Chain::default();
    Chain::links("").iter().take(7).for_each(|link| drop(chain.run(link, [""; 0]).ok()));
    let pairs = RIVALS.map(rivals);
    let folder = chain.path("rivals");
    let clear = || drop(fs::remove_dir_all(&folder));
    // Output of each command when it runs alone.
    let alone = |link: &Link| {
        chain.run(link, [""; 0]).ok();
        let found = bytes(&chain.path(&link.out));
        clear();
        found
    };
    let known = pairs.each_ref().map(|pair| pair.each_ref().map(alone));
    let mut refused = 0;
    for round in 0..ROUNDS {
        let (links, alone) = (&pairs[round % 3], &known[round % 3]);
        let force = round % 2 == 1;
        let more: &[&str] = if force { &["--force"] } else { &[] };
        let ended: Vec<Output> = links
            .each_ref()
            .map(|link| start(&chain, link, more))
            .into_iter()
            .map(|c| c.wait_with_output().unwrap())
            .collect();
        let out = chain.path(&links[0].out);
        let content = bytes(&out);
        let winner =
            alone.iter().position(|known| *known == content).expect("the output is that of one of the two runs");
        let arguments = record(&out)["arguments"].as_array().unwrap().clone();
        let mut own = links[winner].args.iter().zip(&arguments);
        assert!(own.all(|(own, recorded)| recorded == own), "the record is from the other run");
        assert_eq!(ended[winner].status.code(), Some(0));
        let said = String::from_utf8_lossy(&ended[1 - winner].stderr).into_owned();
        match ended[1 - winner].status.code() {
            // It finished first, and --force then replaced its output.
            Some(0) => assert!(force, "round {round}: {said}"),
            code => {
                assert_eq!(code, Some(3), "{said}");
                let known = ["another run", "exists already"];
                assert!(known.iter().any(|part| said.contains(part)), "{said}");
                refused += 1;
            }
        }
        let names: Vec<String> = fs::read_dir(out.parent().unwrap())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        assert!(!names.iter().any(|name| name.contains(".partial")), "{names:?}");
        clear();
    }
    assert!(refused >= ROUNDS / 2, "only {refused} runs reported the other");
    expect_entries(chain.root(), &["base", "data", "run"]);
}

#[test]
fn time_zone_locale_directory_and_threads_do_not_change_the_output() {
    let (plain, other) = (Chain::default(), Chain::default());
    plain.run_all();
    // The same relative paths in another directory, with other time zones, locales and thread
    // counts.
    for (i, link) in Chain::links("").iter().enumerate() {
        let libtorch = ["probe", "train", "eval"].iter().any(|name| link.name.starts_with(name));
        let threads = if libtorch || i % 2 == 1 { "3" } else { "1" };
        let mut link = link.clone();
        match link.args.iter().position(|arg| arg == "--threads") {
            Some(at) => link.args[at + 1] = threads.into(),
            None => link.args.extend(["--threads".into(), threads.into()]),
        }
        let mut command = other.command(&link);
        command
            .env("TZ", ["Pacific/Kiritimati", "America/St_Johns"][i % 2])
            .env("LC_ALL", "tr_TR.UTF-8")
            .env("LANG", "de_DE");
        run_command(command).ok();
    }
    plain.same_run("run", &other, "run");
    // From another working directory, by absolute paths.
    fs::rename(other.path("run"), other.path("first")).unwrap();
    let inputs = tempfile::tempdir().unwrap();
    for link in Chain::links(&format!("{}/", other.root().display())) {
        let mut command = other.command(&link);
        command.current_dir(inputs.path());
        run_command(command).ok();
    }
    for name in [
        "final/model.safetensors",
        "fused/model.safetensors",
        "groups.json",
        "masks/pick.safetensors",
        "scores/outputs.jsonl",
    ] {
        assert!(
            fs::read(other.path("run").join(name)).unwrap() == fs::read(plain.path("run").join(name)).unwrap(),
            "{name}"
        );
    }
    expect_entries(inputs.path(), &[]);
}
