//! `--config` and `--print-config`: a file, the command line and the record of a run give the same
//! arguments.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use cpift_testkit::chain::program;
use cpift_testkit::model::write_tiny_model;
use cpift_testkit::{Run, run};
use serde_json::Value;

/// Two checkpoints and a directory for outputs and files.
struct Setting {
    dir: tempfile::TempDir,
}

fn mask(args: &[&str]) -> Run {
    run(program("cpift-mask").to_str().unwrap(), args)
}

fn train(args: &[&str]) -> Run {
    run(program("cpift-train").to_str().unwrap(), args)
}

impl Setting {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        write_tiny_model(&dir.path().join("base"), 1);
        write_tiny_model(&dir.path().join("tuned"), 2);
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// Writes a file of arguments, in which `DIR` is this directory.
    fn file(&self, text: &str) -> String {
        fs::write(self.path("run.toml"), text.replace("DIR", &self.text(""))).unwrap();
        self.text("run.toml")
    }

    fn record(&self, out: &str) -> Vec<String> {
        let text = fs::read_to_string(self.path(&format!("{out}.cpift.json"))).unwrap();
        let record: Value = serde_json::from_str(&text).unwrap();
        record["arguments"].as_array().unwrap().iter().map(|word| word.as_str().unwrap().to_owned()).collect()
    }

    fn same(&self, a: &str, b: &str) {
        assert!(fs::read(self.path(a)).unwrap() == fs::read(self.path(b)).unwrap(), "{a} and {b} differ");
    }

    /// Runs `cpift-mask extract` with this file: exit code 3, its path and `parts` on stderr.
    #[track_caller]
    fn refused(&self, text: &str, parts: &[&str]) {
        let file = self.file(text);
        mask(&["extract", "--config", &file]).bad_input(&[&file]).says(parts);
    }
}

const MASK: &str =
    "base = \"DIR/base\"\ntuned = \"DIR/tuned\"\nout = \"DIR/file\"\npercent = 20\nexclude = [\"norms\"]\n";

#[test]
fn a_file_and_the_command_line_give_the_same_output_and_record() {
    let s = Setting::new();
    let file = s.file(MASK);
    let (base, tuned, typed) = (s.text("base"), s.text("tuned"), s.text("typed"));
    let paths = ["extract", "--base", &base, "--tuned", &tuned];
    mask(&[&paths[..], &["--out", &typed, "--percent", "20", "--exclude", "norms"]].concat()).ok();
    mask(&["extract", "--config", &file]).ok();
    s.same("typed", "file");
    let (of_file, of_typed) = (s.record("file"), s.record("typed"));
    assert_eq!(of_file.join(" ").replace("/file", "/typed").replace("//", "/"), of_typed.join(" "));
    let again = |more: &[&str]| mask(&[&["extract", "--config", &file, "--skip-up-to-date"], more].concat()).ok();
    again(&[]).says(&["up to date"]);
    s.file(&MASK.replace("20", "30"));
    again(&[]).says(&["must be made", "argument: --percent 20, now --percent 30"]);
}

#[test]
fn the_command_line_wins_over_the_file() {
    let s = Setting::new();
    let file = s.file(MASK);
    let with = |out: &str, more: &[&str]| {
        let out = s.text(out);
        mask(&[&["extract", "--config", &file, "--out", &out], more].concat()).ok()
    };
    let words = |out: &str| s.record(out).join(" ");
    with("five", &["--percent", "5"]);
    assert!(words("five").contains("--percent 5") && !words("five").contains("20"), "{}", words("five"));
    // It excludes --percent.
    with("above", &["--above=0.001"]);
    assert!(words("above").contains("--above=0.001") && !words("above").contains("percent"), "{}", words("above"));
    with("lists", &["--exclude", "embeddings"]);
    assert!(words("lists").contains("embeddings") && !words("lists").contains("norms"), "{}", words("lists"));
    with("all", &[]);
    // In front of the subcommand too.
    let out = s.text("front");
    mask(&["--config", &file, "extract", "--out", &out]).ok();
    s.same("front", "all");
}

#[test]
fn mistakes_in_a_file_are_named() {
    let s = Setting::new();
    s.refused("persent = 20", &["persent is not an argument of cpift-mask extract", "did you mean percent?"]);
    s.refused("learning_rate_of_all = 20", &["is not an argument", "cpift-mask extract --help"]);
    s.refused("base = 5", &["base has a wrong type", "expected: a string", "found: 5 (integer)"]);
    s.refused("force = \"yes\"", &["force has a wrong type", "true or false", "\"yes\" (string)"]);
    s.refused("threads = 1.5", &["threads has a wrong type", "a whole number", "1.5 (float)"]);
    s.refused("above = \"much\"", &["above has a wrong type", "a number"]);
    s.refused("base = [\"a\", \"b\"]", &["base has a wrong type", "array"]);
    s.refused("exclude = [true]", &["exclude has a wrong type", "a list of such", "true (boolean)"]);
    s.refused("skip-up-to-date = true\nif_stale = true", &["are the same argument"]);
    s.refused("config = \"x\"", &["config is not an argument"]);
    s.refused("base = ", &["not TOML"]);
    s.refused("command = \"extrakt\"", &["command is not a command of cpift-mask", "extract, tensors"]);
    let file = s.file("percent = 20");
    mask(&["extract", "--config", &file]).usage_error(&["--base", "Some arguments come from", &file]);
    mask(&["stats", "--config", &s.file("command = \"extract\"")]).usage_error(&["extract, not stats"]);
    fs::write(s.path("config.json"), "{\"model_type\": \"llama\"}").unwrap();
    train(&["plan", "--config", &s.text("config.json")]).bad_input(&["not a cpift.json", "--model-config"]);
    for name in ["cpift-probe", "cpift-mask", "cpift-group", "cpift-merge", "cpift-train", "cpift-eval"] {
        run(program(name).to_str().unwrap(), ["--config", "missing.toml"]).bad_input(&["missing.toml"]);
    }
}

#[test]
fn what_is_printed_is_a_file_for_the_same_run() {
    let s = Setting::new();
    let (base, tuned, out) = (s.text("base"), s.text("tuned"), s.text("typed"));
    let typed = ["extract", "--base", &base, "--tuned", &tuned, "--out", &out, "--above", "0.001"];
    let printed = mask(&[&typed[..], &["--print-config"]].concat()).ok().stdout;
    assert!(!s.path("typed").exists());
    for line in ["command = \"extract\"", "above = 0.001", "score = \"magnitude\"", "force = false", "# Method"] {
        assert!(printed.lines().any(|found| found == line), "{line}: {printed}");
    }
    // The default of percent, which --above excludes, is no argument.
    let file = s.file(&printed);
    assert_eq!(mask(&["--config", &file, "--print-config"]).ok().stdout, printed);
    mask(&typed).ok();
    fs::rename(s.path("typed"), s.path("first")).unwrap();
    fs::rename(s.path("typed.cpift.json"), s.path("first.cpift.json")).unwrap();
    mask(&["--config", &file]).ok();
    s.same("typed", "first");
    assert_eq!(s.record("typed"), s.record("first"));
}

#[test]
fn training_arguments_keep_their_values_and_give_way() {
    let s = Setting::new();
    let file = s.file(
        "command = \"run\"\nmodel = \"DIR/base\"\ntasks = \"tasks.toml\"\noutput_dir = \"DIR/out\"\n\
         learning_rate = 1e-5\nmax_steps = 200\nstage-lr = [1e-5, 2e-5]\ngroups = \"groups.json\"\n\
         lr_scheduler_type = \"linear\"\nwarmup_ratio = 0.03\nwarmup_steps = 7\n\
         [mask]\na = \"a.safetensors\"\nb = \"b.safetensors\"\n",
    );
    let printed = |more: &[&str]| train(&[&["--config", &file, "--print-config"], more].concat()).ok().stdout;
    let has = |text: &str, lines: &[&str]| {
        for line in lines {
            assert!(text.lines().any(|found| found == *line), "{line}: {text}");
        }
    };
    let of_file = printed(&[]);
    has(&of_file, &["lr = 1e-5", "steps = 200", "stage-lr = [1e-5, 2e-5]", "lr-scheduler = \"linear\""]);
    has(&of_file, &["warmup-steps = 7", "mask = [\"a=a.safetensors\", \"b=b.safetensors\"]", "weight-decay = 0"]);
    assert!(!of_file.contains("tokens ="), "{of_file}");
    let typed = printed(&["--tokens", "5000", "--lr", "3e-4"]);
    has(&typed, &["tokens = 5000", "lr = 0.0003"]);
    assert!(!typed.contains("\nsteps ="), "{typed}");
}

#[test]
fn a_run_is_repeated_from_its_record() {
    let s = Setting::new();
    let file = s.file(MASK);
    mask(&["extract", "--config", &file]).ok();
    let record = s.text("file.cpift.json");
    mask(&["--config", &record]).bad_input(&["file", "--force"]);
    let again = s.text("again");
    mask(&["--config", &record, "--out", &again]).ok();
    s.same("file", "again");
    assert_eq!(s.record("file").len(), s.record("again").len());
    mask(&["--config", &record, "--force"]).ok();
    s.same("file", "again");
    train(&["run", "--config", &record]).usage_error(&["a run of cpift-mask, not of cpift-train"]);
    mask(&["stats", "--config", &record]).usage_error(&["extract, not stats"]);
    // A list of commands names arguments, not files of them.
    let mut list = Command::new(program("cpift-mask"));
    list.arg("up-to-date").stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut child = list.spawn().unwrap();
    let text = format!("m\tcpift-mask extract --config {file} --out {}\n", Path::new(&again).display());
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), text.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("--config is not read here"));
    assert_eq!(output.status.code(), Some(3));
}
