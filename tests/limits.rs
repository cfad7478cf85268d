//! Programs that reach a limit of the system, of file handles or of memory: a message, an exit code, and nothing left of an output.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::Command;

use cpift_testkit::chain::{Chain, Link};
use cpift_testkit::{Run, Tensor, Tensors, expect_entries, run_command, write_checkpoint};

/// Runs a stage under `limit`, an argument of the shell's `ulimit`, into a folder `limited` that is empty before.
fn limited(chain: &Chain, link: &Link, limit: &str) -> Run {
    let _ = fs::remove_dir_all(chain.path("limited"));
    fs::create_dir(chain.path("limited")).unwrap();
    let inner = chain.command(link);
    let mut command = Command::new("bash");
    command
        .args(["-c", &format!("ulimit {limit} && exec \"$0\" \"$@\"")])
        .arg(inner.get_program())
        .args(inner.get_args());
    command.current_dir(chain.root());
    run_command(command)
}

/// The stage writing into the folder `limited`.
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
        // From one too few to start to one that is enough.
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
            // Training leaves its figures and states, for --resume.
            assert!(
                left.iter().all(|n| n.ends_with(".checkpoints")),
                "{name} with {handles}: {left:?}\n{}",
                ran.stderr
            );
            // A panic is none of ours, but what libtorch throws arrives as one.
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
