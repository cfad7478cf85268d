//! scripts/check-needs.sh names all that a machine lacks at once.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use cpift_testkit::{Run, run_command};

/// Runs the check on a machine that has only `programs`, at these paths.
fn check(programs: &[(&str, &str)], settings: &[(&str, &str)]) -> Run {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let bin = tempfile::tempdir().unwrap();
    let path = std::env::var_os("PATH").unwrap();
    for tool in ["awk", "bash", "df", "dirname", "grep", "sed"] {
        let found = std::env::split_paths(&path).map(|dir| dir.join(tool)).find(|file| file.exists()).unwrap();
        symlink(found, bin.path().join(tool)).unwrap();
    }
    for (name, script) in programs {
        let path = bin.path().join(name);
        fs::write(&path, format!("#!{}/bash\n{script}\n", bin.path().display())).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(&path, mode).unwrap();
    }
    let mut command = Command::new(bin.path().join("bash"));
    command.arg(root.join("scripts/check-needs.sh")).env_clear().env("PATH", bin.path()).envs(settings.iter().copied());
    run_command(command)
}

#[test]
fn everything_that_is_missing_is_named_with_what_installs_it() {
    check(&[], &[]).expect_code(1).says(&[
        "cargo, Rust 1.",
        "a C++ compiler",
        "  make",
        "python3 with pip",
        "sudo apt-get install g++ make python3 python3-pip",
        "https://sh.rustup.rs",
    ]);
    check(&[("dnf", "")], &[]).expect_code(1).says(&["sudo dnf install gcc-c++ make python3 python3-pip"]);
    let all = [("c++", ""), ("make", ""), ("python3", "")];
    let channel =
        include_str!("../../rust-toolchain.toml").lines().find_map(|l| l.strip_prefix("channel = \"")).unwrap();
    let channel = channel.trim_end_matches('"');
    let with = |rust: (&'static str, String), settings: &[(&str, &str)]| {
        let programs: Vec<(&str, &str)> = all.iter().copied().chain([(rust.0, rust.1.as_str())]).collect();
        check(&programs, settings)
    };
    let rustup = ("rustup", format!("echo {channel}-x86_64-unknown-linux-gnu"));
    with(rustup.clone(), &[]).ok();
    with(("cargo", format!("echo cargo {channel} 2026")), &[]).ok();
    with(("rustup", "echo stable".to_owned()), &[]).expect_code(1).says(&["rustup toolchain install 1."]);
    with(("cargo", "echo cargo 1.2.3 2020".to_owned()), &[]).expect_code(1).says(&["cargo 1.2.3"]);
    let poor = with(rustup, &[("NEED_MEMORY", "100000")]).expect_code(1).says(&["memory: this machine has"]);
    assert!(!poor.stderr.contains("to install"), "{}", poor.stderr);
}
