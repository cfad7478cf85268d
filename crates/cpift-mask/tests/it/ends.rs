//! `cpift-mask extract` killed, stopped and out of room: nothing under the final name, or the whole
//! mask.

use std::path::Path;

use cpift_core::Mask;
use cpift_testkit::ends::Interrupted;
use cpift_testkit::layout::memory_dir;
use cpift_testkit::{Numbers, Tensor, Tensors, write_checkpoint};
use tempfile::TempDir;

/// Inputs in memory, outputs on the disk, which takes its time to make them durable.
struct Setting {
    inputs: TempDir,
    outputs: TempDir,
}

impl Setting {
    fn new() -> Self {
        let (inputs, mut numbers) = (memory_dir(), Numbers(1));
        for name in ["base", "tuned"] {
            let tensors: Tensors =
                (0..8).map(|i| (format!("t{i}"), Tensor::f32(&[400_000], &numbers.units(400_000)))).collect();
            write_checkpoint(&inputs.path().join(name), &tensors);
        }
        Self { inputs, outputs: tempfile::tempdir().unwrap() }
    }

    fn extract(&self) -> Interrupted<'static> {
        let [base, tuned] = ["base", "tuned"].map(|name| self.inputs.path().join(name).into_os_string());
        Interrupted {
            program: env!("CARGO_BIN_EXE_cpift-mask"),
            args: vec!["extract".into(), "--base".into(), base, "--tuned".into(), tuned],
            folder: self.outputs.path().join("out"),
            names: &["m.safetensors", "m.safetensors.cpift.json"],
            other: &["--percent", "2"],
            same,
        }
    }
}

fn same(a: &Path, b: &Path) -> bool {
    [a, b].iter().all(|path| Mask::open(path).and_then(|mask| mask.verify()).is_ok())
        && std::fs::read(a).unwrap() == std::fs::read(b).unwrap()
}

#[test]
fn killed_at_any_moment() {
    let tally = Setting::new().extract().kill(50);
    assert!(tally.leftovers > 0, "no run was killed while it wrote: {tally:?}");
}

#[test]
fn killed_while_an_older_output_is_replaced() {
    Setting::new().extract().kill_replacing(20);
}

#[test]
fn stopped_at_any_moment() {
    let setting = Setting::new();
    setting.extract().stop("TERM", 143, 12);
    setting.extract().stop("INT", 130, 12);
}

#[test]
fn out_of_room() {
    Setting::new().extract().out_of_room(64);
}
