//! Models of the Hugging Face Hub in the local cache, laid out as by huggingface_hub.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use cpift_testkit::chain::program;
use cpift_testkit::model::write_tiny_model;
use cpift_testkit::{Run, read_checkpoint, run_command};
use serde_json::Value;

const OLD: &str = "0123456789abcdef0123456789abcdef01234567";
const NEW: &str = "89abcdef0123456789abcdef0123456789abcdef";

/// A cache in HF_HOME with org/base (main is OLD) and org/tuned (the tag v1 is NEW).
struct Cache {
    dir: tempfile::TempDir,
}

impl Cache {
    fn new() -> Self {
        let cache = Self { dir: tempfile::tempdir().unwrap() };
        cache.add("org/base", "main", OLD, 1);
        cache.add("org/tuned", "v1", NEW, 2);
        cache
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Adds a commit, in which every file is a link to a blob, and lets `revision` name it.
    fn add(&self, repo: &str, revision: &str, commit: &str, seed: u64) {
        let files = tempfile::tempdir().unwrap();
        write_tiny_model(&files.path().join("m"), seed);
        self.add_files(repo, revision, commit, &files.path().join("m"));
    }

    /// Adds a commit with the files of `source`.
    fn add_files(&self, repo: &str, revision: &str, commit: &str, source: &Path) {
        let folder = self.path("home/hub").join(format!("models--{}", repo.replace('/', "--")));
        let snapshot = folder.join("snapshots").join(commit);
        for folder in [&snapshot, &folder.join("refs"), &folder.join("blobs")] {
            fs::create_dir_all(folder).unwrap();
        }
        for (i, file) in fs::read_dir(source).unwrap().map(|entry| entry.unwrap()).enumerate() {
            let blob = format!("{commit}-{i}");
            fs::copy(file.path(), folder.join("blobs").join(&blob)).unwrap();
            symlink(Path::new("../../blobs").join(blob), snapshot.join(file.file_name())).unwrap();
        }
        fs::write(folder.join("refs").join(revision), commit).unwrap();
    }

    fn command(&self, name: &str, args: &[&str]) -> Command {
        let mut command = Command::new(program(name));
        command.args(args).current_dir(self.dir.path());
        for name in ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"] {
            command.env_remove(name);
        }
        command.env("HF_HOME", self.path("home")).env("HF_HUB_OFFLINE", "1");
        command
    }

    fn run(&self, name: &str, args: &str) -> Run {
        run_command(self.command(name, &args.split_whitespace().collect::<Vec<_>>()))
    }

    fn record(&self, out: &str) -> Value {
        serde_json::from_str(&fs::read_to_string(self.path(out)).unwrap()).unwrap()
    }
}

#[test]
fn a_snapshot_is_used_as_a_directory_and_recorded_by_its_commit() {
    let c = Cache::new();
    let extract = "extract --base org/base --tuned org/tuned@v1 --percent 20 --out mask";
    c.run("cpift-mask", extract).ok();
    write_tiny_model(&c.path("a"), 1);
    write_tiny_model(&c.path("b"), 2);
    c.run("cpift-mask", "extract --base a --tuned b --percent 20 --out local").ok();
    assert!(fs::read(c.path("mask")).unwrap() == fs::read(c.path("local")).unwrap());
    let record = c.record("mask.cpift.json");
    assert_eq!(record["inputs"]["base"]["repository"], format!("org/base@{OLD}"));
    assert_eq!(record["inputs"]["tuned"]["repository"], format!("org/tuned@{NEW}"));
    assert_eq!(record["arguments"][2], format!("org/base@{OLD}"));
    assert!(c.record("local.cpift.json")["inputs"]["base"].get("repository").is_none());
    // Up to date until the branch moves; the record repeats the run of the old commit.
    let again = format!("{extract} --skip-up-to-date");
    c.run("cpift-mask", &again).ok().says(&["up to date"]);
    fs::copy(c.path("mask"), c.path("old")).unwrap();
    c.add("org/base", "main", NEW, 3);
    c.run("cpift-mask", "--config mask.cpift.json --out repeated").ok();
    assert!(fs::read(c.path("repeated")).unwrap() == fs::read(c.path("old")).unwrap());
    c.run("cpift-mask", &again).ok().says(&["must be made", &format!("org/base@{NEW}")]);
    assert!(fs::read(c.path("mask")).unwrap() != fs::read(c.path("old")).unwrap());
}

#[test]
fn a_model_and_its_adapter_may_both_be_in_the_cache() {
    let c = Cache::new();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("fixtures/golden/adapters");
    let [model, adapter] = ["llama", "plain"].map(|name| golden.join(name));
    c.add_files("org/llama", "main", OLD, &model);
    c.add_files("org/lora", "v1", NEW, &adapter);
    let merged = |text: &str, out: &str| {
        c.run("cpift-merge", &format!("passthrough --model {text} --out {out}")).ok();
        read_checkpoint(&c.path(out)).into_iter().map(|(name, t)| (name, t.bytes)).collect::<Vec<_>>()
    };
    let local = merged(&format!("{}+{}", model.display(), adapter.display()), "local");
    assert!(local == merged("org/llama+org/lora@v1", "hub"));
    assert!(local == merged(&format!("{}+org/lora@v1", model.display()), "mixed"));
    assert!(local != merged("org/llama", "without"));
    assert_eq!(c.record("hub/cpift.json")["arguments"][2], format!("org/llama@{OLD}+org/lora@{NEW}"));
}

#[test]
fn the_cache_is_found_as_by_huggingface_hub() {
    let c = Cache::new();
    let digest = "verify org/base".split(' ').collect::<Vec<_>>();
    let with = |name: &str, value: PathBuf| {
        let mut command = c.command("cpift-merge", &digest);
        command.env_remove("HF_HOME").env("HOME", c.path("nobody")).env(name, value);
        run_command(command)
    };
    fs::create_dir_all(c.path("nobody")).unwrap();
    with("HF_HOME", c.path("home")).ok();
    with("HF_HUB_CACHE", c.path("home/hub")).ok();
    with("HF_HOME", "~/../home".into()).ok();
    with("UNUSED", "x".into()).bad_input(&["org/base: no such checkpoint", "nobody/.cache/huggingface/hub"]);
    fs::create_dir_all(c.path("xdg")).unwrap();
    fs::rename(c.path("home"), c.path("xdg/huggingface")).unwrap();
    with("XDG_CACHE_HOME", c.path("xdg")).ok();
}

#[test]
fn a_local_directory_of_that_name_comes_first_and_what_is_missing_is_named() {
    let c = Cache::new();
    let merge =
        |more: &str, out: &str| c.run("cpift-merge", &format!("linear {more} --out {out} --weight 1 --weight 0"));
    merge("--model org/base --model org/tuned@v1", "hub").ok();
    write_tiny_model(&c.path("org/base"), 2);
    merge("--model org/base --model org/tuned@v1", "local").ok();
    let bytes = |out: &str| read_checkpoint(&c.path(out)).into_values().map(|t| t.bytes).collect::<Vec<_>>();
    assert!(bytes("hub") != bytes("local"));
    for (missing, hint) in [
        ("org/none", "org is a directory here, so this is a path; the model of the Hugging Face Hub is org/none@main"),
        ("other/none", "HF_HUB_OFFLINE is set"),
        ("org/tuned@v2", "HF_HUB_OFFLINE is set"),
        ("org/tuned@../v1", "org/tuned@../v1: no such checkpoint"),
    ] {
        merge(&format!("--model {missing} --model org/base"), "out").bad_input(&["no such checkpoint", hint]);
    }
    // A link without its blob, as an interrupted download leaves it.
    let blobs = c.path("home/hub/models--org--tuned/blobs");
    let snapshot = c.path("home/hub/models--org--tuned/snapshots").join(NEW);
    let blob = snapshot.join("model.safetensors").canonicalize().unwrap();
    assert!(blob.starts_with(blobs.canonicalize().unwrap()));
    fs::remove_file(blob).unwrap();
    merge("--model org/tuned@v1 --model org/base", "out").bad_input(&["models--org--tuned"]);
}
