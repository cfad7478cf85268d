//! Programs that run out of file handles or memory: they print a message, return an exit code and
//! leave no partial output.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::Command;

use cpift_testkit::chain::{Chain, Link};
use cpift_testkit::{Run, Tensor, Tensors, expect_entries, run_command, write_checkpoint};

/// Empties the directory `limited` and runs a stage under `limit`, arguments of the shell's
/// `ulimit`.
fn limited(chain: &Chain, link: &Link, limit: &str) -> Run {
    let _ = fs::remove_dir_all(chain.path("limited"));
    fs::create_dir(chain.path("limited")).unwrap();
    let inner = chain.command(link);
    let mut command = Command::new("bash");
    command
        // Without exec, so that the shell turns a signal into an exit code.
        .args(["-c", &format!("ulimit -c 0 {limit} && \"$0\" \"$@\"; exit $?")])
        .arg(inner.get_program())
        .args(inner.get_args());
    command.current_dir(chain.root());
    run_command(command)
}

/// Returns the stage `name` with its output in the directory `limited`.
fn into_limited(name: &str) -> Link {
    let mut link = Chain::link(name);
    let last = link.args.iter().rposition(|arg| arg.starts_with("run/")).unwrap();
    let file = Path::new(&link.args[last]).file_name().and_then(OsStr::to_str).unwrap().to_owned();
    link.args[last] = format!("limited/{file}");
    link
}

#[test]
fn out_of_file_handles() {
    let chain = Chain::default();
    chain.run_all();
    for name in ["probe copy", "mask copy", "group", "merge", "train", "eval"] {
        let (link, mut failed) = (into_limited(name), 0);
        // From too few to start to enough.
        for handles in 4..64 {
            let ran = limited(&chain, &link, &format!("-n {handles}"));
            let left: Vec<String> = fs::read_dir(chain.path("limited"))
                .unwrap()
                .map(|e| e.unwrap().file_name().into_string().unwrap())
                .collect();
            if ran.code == 0 {
                break;
            }
            failed += 1;
            // Training leaves its metrics and states for --resume.
            assert!(
                left.iter().all(|n| n.ends_with(".checkpoints")),
                "{name} with {handles}: {left:?}\n{}",
                ran.stderr
            );
            // Exceptions of libtorch arrive as panics.
            let known =
                ["Too many open files", "out of file handles", "os error 24", "error while loading shared libraries"];
            assert!(known.iter().any(|part| ran.stderr.contains(part)), "{name} with {handles}: {}", ran.stderr);
            assert!([1, 127].contains(&ran.code), "{name} with {handles}: exit code {}\n{}", ran.code, ran.stderr);
        }
        assert!(failed > 0 && chain.path("limited").read_dir().unwrap().count() > 0, "{name}: {failed} failed");
    }
}

#[test]
fn out_of_memory() {
    let chain = Chain::default();
    let tensors: Tensors = [("w".to_owned(), Tensor::f32(&[1 << 24], &vec![1.0; 1 << 24]))].into();
    for name in ["base", "tuned"] {
        let _ = fs::remove_dir_all(chain.path(name));
        write_checkpoint(&chain.path(name), &tensors);
    }
    let line = |program: &'static str, text: &str| Link {
        name: program.to_owned(),
        program,
        args: text.split(' ').map(str::to_owned).collect(),
        out: String::new(),
    };
    let mask = line("cpift-mask", "extract --base base --tuned tuned --out limited/mask --threads 2");
    let slerp = line("cpift-merge", "slerp --model base --model tuned --out limited/out --threads 2");
    for link in [mask, slerp] {
        // Two mappings of 64 MiB do not fit.
        let ran = limited(&chain, &link, "-v 120000").expect_code(1);
        ran.says(&["error: out of memory", "model.safetensors: cannot be mapped", "hint: a memory limit is reached"]);
        expect_entries(&chain.path("limited"), &[]);
        limited(&chain, &link, "-v 2000000").ok();
    }
}

#[test]
fn out_of_memory_in_libtorch() {
    let chain = Chain::default();
    chain.run_all();
    for name in ["probe copy", "train", "eval"] {
        let (link, mut failed, mut succeeded) = (into_limited(name), 0, 0);
        let version = Link { args: vec!["--version".into()], ..link.clone() };
        // Increase the limit until three runs have succeeded, because the memory a run needs
        // varies.
        for kib in (300_000..4_000_000).step_by(30_000) {
            let limit = format!("-v {kib}");
            // Skip limits that are too low to load libtorch.
            if limited(&chain, &version, &limit).code != 0 {
                continue;
            }
            let ran = limited(&chain, &link, &limit);
            if ran.code == 0 {
                succeeded += 1;
                if succeeded == 3 {
                    break;
                }
                continue;
            }
            assert!(
                ran.code == 1 && ran.stderr.contains("error: "),
                "{name} with {kib} KiB: {}\n{}",
                ran.code,
                ran.stderr
            );
            let known = ["error: out of memory", "os error 12", "os error 11"];
            assert!(known.iter().any(|part| ran.stderr.contains(part)), "{name} with {kib} KiB: {}", ran.stderr);
            let left = chain.path("limited").read_dir().unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
            let left: Vec<String> = left.filter(|name| !name.ends_with(".checkpoints")).collect();
            assert!(left.is_empty(), "{name} with {kib} KiB: {left:?}");
            failed += 1;
        }
        assert!(failed > 0 && succeeded == 3, "{name}: {failed} runs failed, {succeeded} succeeded");
    }
}
