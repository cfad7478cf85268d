//! `make demo` from its first command to its last, under two instruction sets: the order of methods
//! that scripts/check_demo.py requires, and that the README reads from the table, holds under each.

use std::path::Path;
use std::process::Command;

use cpift_testkit::chain::programs;

fn run_demo(settings: &[(&str, &str)]) {
    let run = tempfile::tempdir().unwrap();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let output = Command::new(root.join("scripts/demo.sh"))
        .env("BIN", programs())
        .env("RUN", run.path().join("run"))
        // The two tests run side by side.
        .env("JOBS", "1")
        .envs(settings.iter().copied())
        .env_remove("MAKEFLAGS")
        .output()
        .unwrap();
    let printed = String::from_utf8_lossy(&output.stdout);
    println!("{settings:?}:\n{printed}");
    assert!(output.status.success(), "{printed}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(printed.contains("Trained on first: arithmetic."), "{printed}");
}

#[test]
fn the_order_of_methods_holds_with_the_instructions_of_this_machine() {
    run_demo(&[]);
}

#[test]
fn the_order_of_methods_holds_with_avx2() {
    run_demo(&[("ATEN_CPU_CAPABILITY", "avx2"), ("ONEDNN_MAX_CPU_ISA", "AVX2")]);
}
