//! cpift-merge through the real binary: results against references, bad input, and linked
//! libraries.

mod adapters;
mod bad_input;
mod checks;
mod cpi;
mod golden;
mod hub;
mod inputs;
mod kinds;
mod layouts;
mod lora;
mod masks;
mod methods;
mod plain;
mod property;
mod verify;
mod vocabulary;
mod world;

use std::process::Command;

#[test]
fn the_binary_links_no_libtorch() {
    let output = Command::new("ldd").arg(world::PROGRAM).output().expect("ldd is part of the C library");
    let libraries = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && libraries.contains("libc.so"), "{libraries}");
    assert!(!libraries.contains("torch") && !libraries.contains("libc10"), "{libraries}");
}

#[test]
fn help_has_defaults_units_and_exit_codes() {
    let help = cpift_testkit::run(world::PROGRAM, ["cpi", "--help"]).ok().stdout;
    for part in ["[default: max-delta]", "[default: --base]", "[default: 5GB]", "radians", "[default: weights]"] {
        assert!(help.contains(part), "{part} is not in\n{help}");
    }
    assert!(cpift_testkit::run(world::PROGRAM, ["--help"]).ok().stdout.contains("3 bad input"));
}
