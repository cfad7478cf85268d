//! Provenance: `--skip-up-to-date` remakes only what a change affects, and inputs that were made
//! from other files than those they are used with are refused.

use std::fs;
use std::time::{Duration, Instant, SystemTime};

use cpift_testkit::chain::{Chain, Link, TASKS};
use cpift_testkit::model::{row, write_rows, write_tiny_model};

/// Runs all commands and returns the names of those that were not up to date.
fn made(chain: &Chain, links: &[Link]) -> Vec<String> {
    let ran = |link: &Link| !chain.run(link, [""; 0]).ok().stderr.contains("up to date");
    links.iter().filter(|link| ran(link)).map(|link| link.name.clone()).collect()
}

#[test]
fn only_what_a_change_affects_is_remade() {
    let (chain, links) = (Chain::default(), Chain::links(""));
    let all: Vec<String> = links.iter().map(|link| link.name.clone()).collect();
    assert_eq!(made(&chain, &links), all);
    let stamp = |name: &str| -> SystemTime { fs::metadata(chain.path(name)).unwrap().modified().unwrap() };
    let untouched = ["run/probes/count/cpift.json", "run/masks/pick.safetensors"];
    let before = untouched.map(stamp);
    assert!(made(&chain, &links).is_empty());
    // Training data of a task: its probe, its mask and everything made from all masks.
    write_rows(
        &chain.path("data/copy/train.jsonl"),
        &(0..9).map(|i| row(&format!("say v{i}"), &format!("v{i}"))).collect::<Vec<_>>(),
    );
    chain
        .run(&links[0], [""; 0])
        .ok()
        .says(&["run/probes/copy: must be made: input train has changed: ", "data/copy/train.jsonl"]);
    assert_eq!(made(&chain, &links), ["mask copy", "group", "merge", "train", "eval"]);
    // Rows that only the evaluation reads.
    write_rows(
        &chain.path("data/count/eval.jsonl"),
        &(0..3).map(|i| row(&format!("{i} + 1 ="), &format!("#### {}", i + 1))).collect::<Vec<_>>(),
    );
    assert_eq!(made(&chain, &links), ["eval"]);
    assert_eq!(untouched.map(stamp), before);
    // An argument that affects the output, and one that does not.
    let group = &links[6];
    let sweep = Link { args: group.args.iter().map(|a| a.replace("1.1", "1.2")).collect(), ..group.clone() };
    chain.run(&sweep, [""; 0]).ok().says(&["run/groups.json: must be made: argument: --tau 1.1, now --tau 1.2"]);
    chain.run(&sweep, ["--json", "--force"]).ok().says(&["up to date"]);
    chain.run(group, [""; 0]).ok();
    // Damaged and partly deleted outputs.
    fs::remove_file(chain.path("run/groups.svg")).unwrap();
    chain.run(group, [""; 0]).ok().says(&["run/groups.svg does not exist"]);
    let mut weights = fs::read(chain.path("run/fused/model.safetensors")).unwrap();
    *weights.last_mut().unwrap() ^= 1;
    fs::write(chain.path("run/fused/model.safetensors"), weights).unwrap();
    chain.run(&links[7], [""; 0]).ok().says(&["run/fused: must be made: it is not what", "cpift.json records"]);
    fs::remove_file(chain.path("run/masks/copy.safetensors.cpift.json")).unwrap();
    chain.run(&links[3], [""; 0]).ok().says(&["it has no record"]);
    assert!(made(&chain, &links).is_empty(), "remade outputs are unchanged");
}

#[test]
fn an_array_element_is_up_to_date_only_for_its_own_task() {
    let chain = Chain::default();
    let mut probe = Chain::link("probe copy");
    probe.args.retain(|arg| arg != "--task" && arg != "copy");
    let element = |index: &str| {
        let mut command = chain.command(&probe);
        command.env("SLURM_ARRAY_TASK_ID", index);
        cpift_testkit::run_command(command).ok()
    };
    element("0");
    element("0").says(&["up to date"]);
    element("1").says(&["must be made: its task is not count"]);
}

#[test]
fn inputs_that_do_not_belong_together_are_refused() {
    let chain = Chain::default();
    chain.run_all();
    write_tiny_model(&chain.path("other"), 2);
    let instead = |name: &str, pairs: &[(&str, &str)]| {
        let mut link = Chain::link(name);
        for (old, new) in pairs {
            let part = old.contains(['/', '.']);
            let change = |arg: &String| if part { arg.replace(old, new) } else { (*new).to_owned() };
            link.args.iter_mut().filter(|arg| part || *arg == old).for_each(|arg| *arg = change(arg));
        }
        link
    };
    let refused = |name: &str, pairs: &[(&str, &str)], parts: &[&str]| {
        drop(chain.run(&instead(name, pairs), [""; 0]).bad_input(parts));
    };
    // A mask of another base than the probe's.
    let of_other = [("base", "other"), ("run/masks/copy", "run/other/copy")];
    refused(
        "mask copy",
        &of_other,
        &["run/probes/copy: made from another base than other", "expected: digest", "found: digest"],
    );
    assert!(!chain.path("run/other").exists());
    // A probe of another base, and a mask with the wrong probe.
    let probe = [("base", "other"), ("run/probes/copy", "run/others/copy")];
    chain.run(&instead("probe copy", &probe), [""; 0]).ok();
    let parts = ["run/others/copy: made from another base than base", "expected: digest", "(other when it was made)"];
    refused("merge", &[("copy=run/probes/copy", "copy=run/others/copy")], &parts);
    let parts = ["run/masks/copy.safetensors: extracted from another checkpoint than run/probes/pick"];
    refused("merge", &[("copy=run/probes/copy", "copy=run/probes/pick")], &parts);
    // A mask of another base among the others, and groups of other masks.
    chain
        .run(
            &instead("mask copy", &[("base", "other"), ("run/probes", "run/others"), ("run/masks", "run/other")]),
            [""; 0],
        )
        .ok();
    let parts = ["made for another base than run/other/copy.safetensors", "expected: base digest"];
    refused("group", &[("copy=run/masks", "copy=run/other")], &parts);
    for task in TASKS {
        chain.run(&instead(&format!("mask {task}"), &[("5", "6"), ("run/masks", "run/six")]), [""; 0]).ok();
    }
    let parts = ["run/six/", ".safetensors: not the mask of ", "that run/groups.json was made from"];
    refused("merge", &[("run/masks", "run/six")], &parts);
    refused("train", &[("run/masks", "run/six")], &parts);
    // A fused model made with other masks.
    chain.run(&instead("group", &[("run/masks", "run/six"), ("groups.json", "six.json")]), [""; 0]).ok();
    let parts = ["run/fused: made from another mask of copy than run/six/copy.safetensors"];
    refused("train", &[("run/masks", "run/six"), ("groups.json", "six.json")], &parts);
}

#[test]
fn a_state_of_another_base_is_refused() {
    let chain = Chain::default();
    write_tiny_model(&chain.path("other"), 2);
    let mut probe = Chain::link("probe copy");
    probe.args.retain(|arg| arg != "--skip-up-to-date");
    probe.args.iter_mut().filter(|arg| *arg == "8").for_each(|arg| "100000".clone_into(arg));
    let mut child = chain.command(&probe).spawn().unwrap();
    let start = Instant::now();
    while !chain.path("run/probes/copy.checkpoints/step-0000002").exists() {
        assert!(start.elapsed() < Duration::from_secs(60), "no state is saved");
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    probe.args.iter_mut().filter(|arg| *arg == "base").for_each(|arg| "other".clone_into(arg));
    chain.run(&probe, [""; 0]).bad_input(&["state.json: of a run with another base", "expected: ", "found: "]);
}
