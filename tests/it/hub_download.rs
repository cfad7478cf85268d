//! Models and data of the Hugging Face Hub that the local cache lacks: downloaded from a server
//! that speaks the Hub's routes, into the layout of huggingface_hub.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use cpift_testkit::chain::program;
use cpift_testkit::hub::{Fault, HubServer, Repo, SIGNATURE, TOKEN};
use cpift_testkit::model::{tiny_weights, write_tasks, write_tiny_model};
use cpift_testkit::{Run, expect_entries, read_checkpoint, run_command, write_sharded};
use serde_json::Value;

const OLD: &str = "0123456789abcdef0123456789abcdef01234567";
const NEW: &str = "89abcdef0123456789abcdef0123456789abcdef";
const BASE: &str = "models--org--base";
const WEIGHTS: &str = "model.safetensors";

/// A server with org/base, and a directory with an empty cache and the same model.
struct World {
    dir: tempfile::TempDir,
    server: HubServer,
}

impl World {
    fn new() -> Self {
        let world = Self { dir: tempfile::tempdir().unwrap(), server: HubServer::default() };
        write_tiny_model(&world.path("base"), 1);
        world.server.add_folder("org/base", OLD, &world.path("base"));
        world
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A path in the cache.
    fn cached(&self, name: &str) -> PathBuf {
        self.path("home/hub").join(name)
    }

    fn snapshot(&self, file: &str) -> PathBuf {
        self.cached(BASE).join("snapshots").join(OLD).join(file)
    }

    fn command(&self, name: &str, args: &str, env: &[(&str, &str)]) -> Command {
        let mut command = Command::new(program(name));
        command.args(args.split_whitespace()).current_dir(self.dir.path());
        for name in ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "HF_TOKEN", "HF_HUB_OFFLINE"] {
            command.env_remove(name);
        }
        command.env("HF_HOME", self.path("home")).env("HF_ENDPOINT", &self.server.url);
        command.envs(env.iter().copied());
        command
    }

    fn run(&self, name: &str, args: &str) -> Run {
        self.run_with(name, args, &[])
    }

    /// Runs a program with all log lines. Neither the token nor the signature of an address may
    /// appear.
    fn run_with(&self, name: &str, args: &str, env: &[(&str, &str)]) -> Run {
        let env: Vec<(&str, &str)> = [("CPIFT_LOG", "trace")].into_iter().chain(env.iter().copied()).collect();
        let run = run_command(self.command(name, args, &env));
        for secret in [TOKEN, SIGNATURE] {
            assert!(!run.stderr.contains(secret) && !run.stdout.contains(secret), "{}", run.stderr);
        }
        run
    }

    /// Checks org/base and its weights.
    fn verify(&self) -> Run {
        self.run("cpift-merge", "verify org/base")
    }

    fn assert_is_base(&self) {
        for file in ["config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS] {
            assert!(
                fs::read(self.snapshot(file)).unwrap() == fs::read(self.path("base").join(file)).unwrap(),
                "{file}"
            );
        }
    }

    fn blobs(&self) -> Vec<String> {
        let blobs = fs::read_dir(self.cached(BASE).join("blobs")).unwrap();
        blobs.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    /// Starts a run and kills it once the weights have `bytes` bytes.
    fn kill_at(&self, bytes: usize) {
        self.server.fail(WEIGHTS, Fault::Stall(bytes), 1);
        let mut command = self.command("cpift-merge", "verify org/base", &[]);
        let mut child = command.stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        let start = Instant::now();
        let begun = || {
            let blobs = fs::read_dir(self.cached(BASE).join("blobs")).into_iter().flatten().flatten();
            blobs
                .filter(|blob| blob.file_name().len() == 64 + ".incomplete".len())
                .any(|blob| blob.metadata().is_ok_and(|meta| meta.len() == bytes as u64))
        };
        while !begun() {
            assert!(start.elapsed() < Duration::from_secs(20), "the download does not begin");
            thread::sleep(Duration::from_millis(5));
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// First bytes asked for of large files since the last look.
    fn offsets(&self) -> Vec<usize> {
        self.server.requests().iter().filter(|request| request.to_cdn).map(|request| request.offset).collect()
    }
}

#[test]
fn a_model_is_downloaded_into_the_layout_of_huggingface_hub() {
    let w = World::new();
    write_tiny_model(&w.path("tuned"), 2);
    w.server.add_folder("org/tuned", NEW, &w.path("tuned"));
    w.server.change("models/org/tuned", |repo| repo.revisions.push("refs/pr/1".into()));
    w.server.change("models/org/base", |repo| {
        repo.is_private = true;
        for other in ["README.md", ".gitattributes", "pytorch_model.bin", "consolidated.safetensors", "x/config.json"] {
            repo.files.insert(other.into(), vec![1; 10]);
        }
        repo.files.insert("modeling_x.py".into(), b"pass".to_vec());
    });
    let extract = "extract --base org/base --tuned org/tuned@refs/pr/1 --percent 20 --out mask";
    w.run_with("cpift-mask", extract, &[("HF_TOKEN", TOKEN)]).ok().says(&["downloading 5 files"]);
    w.run("cpift-mask", "extract --base base --tuned tuned --percent 20 --out local").ok();
    assert!(fs::read(w.path("mask")).unwrap() == fs::read(w.path("local")).unwrap());
    let record: Value = serde_json::from_str(&fs::read_to_string(w.path("mask.cpift.json")).unwrap()).unwrap();
    assert_eq!(record["inputs"]["base"]["repository"], format!("org/base@{OLD}"));
    assert_eq!(record["arguments"][4], format!("org/tuned@{NEW}"));

    let files = ["config.json", "modeling_x.py", WEIGHTS, "tokenizer.json", "tokenizer_config.json"];
    expect_entries(&w.snapshot(""), &files);
    for file in files {
        let link = fs::read_link(w.snapshot(file)).unwrap();
        assert!(link.starts_with("../../blobs"), "{}", link.display());
        assert!(!w.snapshot(file).canonicalize().unwrap().is_symlink());
    }
    assert_eq!(w.blobs().len(), files.len(), "{:?}", w.blobs());
    assert_eq!(fs::read_to_string(w.cached(BASE).join("refs/main")).unwrap(), OLD);
    assert_eq!(fs::read_to_string(w.cached("models--org--tuned/refs/refs/pr/1")).unwrap(), NEW);
    let locks: Vec<_> = fs::read_dir(w.cached(".locks").join(BASE)).unwrap().flatten().collect();
    assert!(locks.iter().all(|lock| !lock.file_name().to_string_lossy().contains("cpift")), "{locks:?}");

    let requests = w.server.requests();
    assert!(requests.iter().any(|request| request.to_cdn));
    for request in &requests {
        assert_eq!(request.authorization.is_some(), !request.to_cdn, "{request:?}");
    }
    // From now on the network is not needed.
    w.run("cpift-mask", &format!("{extract} --skip-up-to-date")).ok().says(&["up to date"]);
    w.run_with("cpift-merge", "verify org/base", &[("HF_HUB_OFFLINE", "1")]).ok();
    assert!(w.server.requests().is_empty());
}

#[test]
fn a_broken_transfer_is_continued() {
    let w = World::new();
    w.server.fail(WEIGHTS, Fault::Cut(1000), 2);
    w.verify().ok().says(&["continuing"]);
    assert_eq!(w.offsets(), [0, 1000, 2000]);
    w.assert_is_base();
    let size = fs::metadata(w.snapshot(WEIGHTS)).unwrap().len() as usize;
    // A server that never gets further.
    let w = World::new();
    w.server.fail(WEIGHTS, Fault::Status(503), 100);
    w.verify().bad_input(&["org/base", "model.safetensors", "503", "run again"]);
    assert!(!w.snapshot(WEIGHTS).exists() && w.blobs().iter().any(|blob| blob.ends_with(".incomplete")));
    // A server that falls silent.
    w.server.fail(WEIGHTS, Fault::Stall(size - 1), 1);
    w.offsets();
    let start = Instant::now();
    w.run_with("cpift-merge", "verify org/base", &[("HF_HUB_DOWNLOAD_TIMEOUT", "1")]).ok();
    assert!(start.elapsed() < Duration::from_secs(15));
    assert_eq!(w.offsets(), [0, size - 1]);
    w.assert_is_base();
}

#[test]
fn a_killed_download_is_never_taken_for_a_file_and_is_continued() {
    for ignores_ranges in [false, true] {
        let w = World::new();
        w.kill_at(3000);
        assert!(!w.snapshot(WEIGHTS).exists());
        assert!(w.blobs().iter().filter(|blob| blob.len() == 64).count() == 0, "{:?}", w.blobs());
        if ignores_ranges {
            w.server.fail(WEIGHTS, Fault::NoRange, 1);
        }
        w.offsets();
        w.verify().ok();
        assert_eq!(w.offsets(), [3000]);
        w.assert_is_base();
        assert!(w.blobs().iter().all(|blob| !blob.ends_with("incomplete")), "{:?}", w.blobs());
    }
    // The rest of a changed beginning is noticed.
    let w = World::new();
    w.kill_at(3000);
    let begun = w.blobs().into_iter().find(|blob| blob.len() > 64).unwrap();
    fs::write(w.cached(BASE).join("blobs").join(begun), vec![7; 3000]).unwrap();
    w.verify().bad_input(&["org/base: model.safetensors was changed on its way", "SHA-256"]);
    w.verify().ok();
    w.assert_is_base();
}

#[test]
fn damaged_files_are_refused_and_not_kept() {
    let w = World::new();
    for (fault, text) in [(Fault::Changed, "was changed on its way"), (Fault::Shorter(10), "has a wrong size")] {
        w.server.fail(WEIGHTS, fault, 1);
        w.verify().bad_input(&["org/base", WEIGHTS, text, "expected", "found", "run again"]);
        assert!(!w.snapshot(WEIGHTS).exists());
        // The other files may be unfinished.
        assert!(w.blobs().iter().all(|blob| blob.len() < 64), "{:?}", w.blobs());
    }
    w.server.fail("config.json", Fault::Shorter(1), 1);
    fs::remove_dir_all(w.cached(BASE)).unwrap();
    w.verify().bad_input(&["org/base: config.json has a wrong size"]);
    w.verify().ok();
    w.assert_is_base();
}

#[test]
fn refusals_say_what_to_do() {
    let w = World::new();
    let url = &w.server.url;
    let verify = |name: &str, env: &[(&str, &str)]| w.run_with("cpift-merge", &format!("verify {name}"), env);
    let tokens = format!("set HF_TOKEN to a token of {url}/settings/tokens");
    w.server.change("models/org/base", |repo| repo.revisions.push("v1".into()));
    w.server
        .add("models/org/gated", Repo { commit: OLD.into(), is_gated: true, files: files("gated"), ..Repo::default() });
    let pickle = BTreeMap::from([("pytorch_model.bin".to_owned(), vec![1])]);
    w.server.add("models/org/pickle", Repo { commit: OLD.into(), files: pickle, ..Repo::default() });

    let page = format!("{url}/org/none");
    verify("org/none", &[]).bad_input(&["org/none: no such checkpoint", "401", "or it is private", &page, &tokens]);
    verify("org/none", &[("HF_TOKEN", TOKEN)]).bad_input(&[
        "no such checkpoint",
        "404",
        "rights of the token in HF_TOKEN",
    ]);
    verify("org/base@v2", &[]).bad_input(&["org/base@v2", "has no revision v2", "404", "/org/base/refs"]);
    let accept = format!("accept its licence at {url}/org/gated");
    verify("org/gated", &[]).bad_input(&["is gated", "401", &accept, &tokens]);
    verify("org/gated", &[("HF_TOKEN", TOKEN)]).bad_input(&["is gated", "403", "no access", &accept]);
    verify("org/base", &[("HF_TOKEN", "hf_wrong")]).bad_input(&["refuses the token in HF_TOKEN", "401", &tokens]);
    verify("org/base", &[("HF_TOKEN", "hf bad")]).bad_input(&["HF_TOKEN holds no token"]);
    verify("org/pickle", &[]).bad_input(&["no safetensors weights", "pytorch_model.bin", "save_pretrained"]);
    // A token that `hf auth login` has written.
    fs::create_dir_all(w.path("home")).unwrap();
    fs::write(w.path("home/token"), "hf_wrong\n").unwrap();
    verify("org/base", &[]).bad_input(&["refuses the token in", "home/token"]);
    verify("org/base", &[("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1"), ("HF_HUB_CACHE", "other")]).ok();
    fs::write(w.path("home/token"), TOKEN).unwrap();

    let closed = "http://127.0.0.1:9";
    verify("org/base", &[("HF_ENDPOINT", closed)]).bad_input(&[
        closed,
        "cannot be reached",
        "HF_ENDPOINT",
        "hf download",
    ]);
    verify("org/base", &[("HF_ENDPOINT", "x.y")]).bad_input(&["HF_ENDPOINT", "https://HOST"]);
    verify("org/base", &[("HF_ENDPOINT", &format!("{url}/x"))]).bad_input(&["404"]);
    verify("org/base", &[("HF_HUB_OFFLINE", "1")]).bad_input(&[
        "no such checkpoint",
        "HF_HUB_OFFLINE is set",
        "home/hub",
    ]);
    let file = w.path("home/token");
    let cache = file.to_str().unwrap();
    verify("org/base", &[("HF_HUB_CACHE", cache)]).bad_input(&["cannot be written", "HF_HUB_CACHE"]);
    w.server.change("models/org/base", |repo| repo.claimed = Some(1 << 60));
    verify("org/base", &[]).bad_input(&["no room for the download", "free", "HF_HUB_CACHE"]);
    assert!(w.blobs().is_empty());
    w.server.change("models/org/base", |repo| repo.claimed = None);
    // Mistakes of the command line and paths never reach the network.
    w.server.requests();
    w.run("cpift-merge", "linear --model org/base --model org/base --weight x --out o").usage_error(&["--weight"]);
    w.run("cpift-mask", "extract --base org/base --tuned org/base --percent 1 --out o --print-config").ok();
    fs::create_dir(w.path("org")).unwrap();
    verify("org/base", &[]).bad_input(&["no such checkpoint", "org is a directory", "org/base@main"]);
    assert!(w.server.requests().is_empty());
    verify("org/base@main", &[]).ok();
}

/// Files of a model that is never read.
fn files(text: &str) -> BTreeMap<String, Vec<u8>> {
    ["config.json", WEIGHTS].into_iter().map(|name| (name.to_owned(), text.as_bytes().to_vec())).collect()
}

#[test]
fn what_a_snapshot_lacks_is_fetched_from_its_own_commit() {
    let w = World::new();
    let shards = w.path("shards");
    write_sharded(&shards, &tiny_weights(1), 3);
    fs::copy(w.path("base/config.json"), shards.join("config.json")).unwrap();
    w.server.add_folder("org/base", OLD, &shards);
    w.verify().ok();
    let shard = "model-00002-of-00003.safetensors";
    let snapshot = w.snapshot(shard);
    // Once without the link, once without the blob.
    for lost in [snapshot.clone(), snapshot.canonicalize().unwrap()] {
        fs::remove_file(lost).unwrap();
        w.server.requests();
        w.run_with("cpift-merge", "verify org/base", &[("HF_HUB_OFFLINE", "1")]).bad_input(&[
            "lacks",
            shard,
            "HF_HUB_OFFLINE is set",
            "missing",
        ]);
        w.run_with("cpift-merge", "verify org/base", &[("HF_ENDPOINT", "http://127.0.0.1:9")])
            .bad_input(&["cannot be reached", "missing"]);
        assert!(w.server.requests().is_empty());
        w.verify().ok().says(&[shard]);
        let asked: Vec<String> = w.server.requests().into_iter().map(|request| request.line).collect();
        assert!(asked.iter().all(|line| line.contains(OLD) || line.contains("/blob/")), "{asked:?}");
        assert_eq!(asked.iter().filter(|line| line.starts_with("HEAD")).count(), 1, "{asked:?}");
        assert!(fs::read(&snapshot).unwrap() == fs::read(shards.join(shard)).unwrap());
    }
}

#[test]
fn two_processes_share_one_download() {
    let w = World::new();
    w.server.fail("", Fault::Slow(100), 1000);
    let start = |_| -> Child {
        let mut command = w.command("cpift-merge", "verify org/base", &[]);
        command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let children: Vec<Child> = (0..3).map(start).collect();
    let mut waited = 0;
    for child in children {
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{text}");
        waited += usize::from(text.contains("waiting for another process"));
    }
    assert_eq!(waited, 2);
    assert_eq!(w.offsets(), [0]);
    w.assert_is_base();
}

#[test]
fn recipes_take_names_of_the_hub() {
    let w = World::new();
    write_tiny_model(&w.path("math"), 2);
    w.server.add_folder("org/math", NEW, &w.path("math"));
    w.server.change("models/org/math", |repo| repo.revisions.push("v1".into()));
    w.server.rename("models/org/old-math", "models/org/math");
    w.server.add_folder("org/words", NEW, &w.path("base"));
    let recipe = |base: &str, math: &str, more: &str| {
        format!(
            "merge_method: task_arithmetic\nbase_model: {base}\nmodels:\n  - model: {math}\n    parameters: {{weight: 0.5}}\n{more}"
        )
    };
    let merged = |name: &str, text: &str| {
        fs::write(w.path(&format!("{name}.yaml")), text).unwrap();
        w.run("cpift-merge", &format!("recipe {name}.yaml --out {name}-out")).ok();
        read_checkpoint(&w.path(&format!("{name}-out"))).into_values().map(|t| t.bytes).collect::<Vec<_>>()
    };
    let local = merged("local", &recipe("base", "math", ""));
    let words = "tokenizer:\n  source: org/words\n";
    let math = "{model: {path: org/old-math, revision: v1}}";
    assert!(merged("hub", &recipe("org/base", math, words)) == local);
    let large =
        |request: &cpift_testkit::hub::Request| request.line.contains("org/words") && request.line.ends_with(WEIGHTS);
    assert!(!w.server.requests().iter().any(large), "a tokenizer needs no weights");
    // The card names them as the Hub does, and reproduces the merge.
    let card = fs::read_to_string(w.path("hub-out/README.md")).unwrap();
    assert!(card.contains("base_model:\n  - org/base\n  - org/old-math\n"), "{card}");
    assert!(card.contains(&format!("org/old-math@{NEW}")) && !card.contains("snapshots"), "{card}");
    let again = card.split("```").nth(1).unwrap().trim_start_matches("yaml\n").to_owned();
    assert!(merged("again", &again) == local);
    let record: Value = serde_json::from_str(&fs::read_to_string(w.path("hub-out/cpift.json")).unwrap()).unwrap();
    let inputs = record["inputs"].as_object().unwrap();
    let from: Vec<&str> = inputs.values().filter_map(|input| input["repository"].as_str()).collect();
    assert!(from.contains(&format!("org/base@{OLD}").as_str()), "{record}");
    let missing = recipe("org/base", "org/none", "");
    fs::write(w.path("none.yaml"), missing).unwrap();
    w.run("cpift-merge", "recipe none.yaml --out none").bad_input(&["none.yaml", "org/none", "or it is private"]);
}

#[test]
fn tasks_take_data_files_of_the_hub() {
    let w = World::new();
    write_tasks(&w.path("data"));
    let rows = |file: &str| fs::read(w.path("data/copy").join(file)).unwrap();
    let files = BTreeMap::from([
        ("copy/train.jsonl".to_owned(), rows("train.jsonl")),
        ("eval.jsonl".into(), rows("eval.jsonl")),
    ]);
    let repo = Repo { commit: OLD.into(), files, ..Repo::default() };
    w.server.add("datasets/org/rows", repo.clone());
    let place = "hf://datasets/org/rows";
    let toml = |train: &str, eval: &str| {
        let text = format!("[[task]]\nname = \"copy\"\ntrain = \"{train}\"\neval = \"{eval}\"\nmax_length = 96\n");
        fs::write(w.path("tasks.toml"), text).unwrap();
    };
    let train = "--batch-size 2 --steps 2 --device cpu --threads 1";
    let probe = |data: &str, out: &str| {
        w.run(
            "cpift-probe",
            &format!("--base org/base --tasks {data} --task copy {train} --out {out} --skip-up-to-date"),
        )
    };
    toml(&format!("{place}/copy/train.jsonl"), &format!("{place}@{OLD}/eval.jsonl"));
    probe("tasks.toml", "probe").ok();
    probe("data/tasks.toml", "local").ok();
    let weights = |out: &str| fs::read(w.path(out).join(WEIGHTS)).unwrap();
    assert!(weights("probe") == weights("local"));
    let record: Value = serde_json::from_str(&fs::read_to_string(w.path("probe/cpift.json")).unwrap()).unwrap();
    assert_eq!(record["inputs"]["train"]["repository"], format!("datasets/org/rows@{OLD}"), "{record}");
    let repo_folder = w.cached("datasets--org--rows");
    assert_eq!(fs::read_to_string(repo_folder.join("refs/main")).unwrap(), OLD);
    let cached = repo_folder.join("snapshots").join(OLD).join("copy/train.jsonl");
    assert_eq!(fs::read_link(&cached).unwrap().parent().unwrap(), Path::new("../../../blobs"));
    // Up to date, without the network, until the branch stands for another commit.
    w.server.requests();
    probe("tasks.toml", "probe").ok().says(&["up to date"]);
    assert!(w.server.requests().is_empty());
    w.server.add("datasets/org/rows", Repo { commit: NEW.into(), revisions: vec![OLD.into()], ..repo });
    fs::remove_file(repo_folder.join("refs/main")).unwrap();
    probe("tasks.toml", "probe").ok().says(&["must be made"]);
    assert!(repo_folder.join("snapshots").join(NEW).join("copy/train.jsonl").is_file());

    w.run("cpift-train", &format!("run --model org/base --tasks tasks.toml {train} --out trained")).ok();
    w.run("cpift-eval", "run --model org/base --tasks tasks.toml --device cpu --out scores").ok();
    for (train, parts) in [
        (format!("{place}/none.jsonl"), ["none.jsonl", "has no such file"]),
        ("hf://datasets/org/none/x.jsonl".to_owned(), ["hf://datasets/org/none/x.jsonl", "there is no dataset"]),
        ("hf://org/rows/x.jsonl".to_owned(), ["hf://org/rows/x.jsonl", "hf://datasets/ORG/NAME"]),
    ] {
        toml(&train, "data/copy/eval.jsonl");
        w.run("cpift-probe", "--tasks tasks.toml --list").bad_input(&parts);
    }
}
