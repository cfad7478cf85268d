//! `cpift-merge` killed, stopped and out of disk space: nothing under the final name, or the
//! complete merge.

use std::ffi::OsString;
use std::fs;
use std::path::Path;

use cpift_testkit::ends::Interrupted;
use cpift_testkit::layout::memory_dir;
use cpift_testkit::{Numbers, Tensor, Tensors, run, write_checkpoint};
use tempfile::TempDir;

const PROGRAM: &str = env!("CARGO_BIN_EXE_cpift-merge");

/// Inputs in memory, and outputs on the disk, so that an fsync takes some time.
struct Setting {
    inputs: TempDir,
    outputs: TempDir,
}

impl Setting {
    fn new() -> Self {
        let (inputs, mut numbers) = (memory_dir(), Numbers(1));
        for name in ["a", "b"] {
            let tensors: Tensors =
                (0..8).map(|i| (format!("t{i}"), Tensor::f32(&[200_000], &numbers.units(200_000)))).collect();
            write_checkpoint(&inputs.path().join(name), &tensors);
        }
        Self { inputs, outputs: tempfile::tempdir().unwrap() }
    }

    fn slerp(&self) -> Interrupted<'static> {
        let [a, b] = ["a", "b"].map(|name| self.inputs.path().join(name).into_os_string());
        Interrupted {
            program: PROGRAM,
            args: vec!["slerp".into(), "--model".into(), a, "--model".into(), b, "--shard-size".into(), "2MB".into()],
            folder: self.outputs.path().join("out"),
            names: &["merged"],
            other: &["--t", "0.25"],
            same,
        }
    }
}

/// Returns true if all files but the record of the run (which has timestamps) are the same, and the
/// content has the digest in the record.
fn same(a: &Path, b: &Path) -> bool {
    let names = |folder: &Path| {
        let mut names: Vec<_> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let alike = |name: &OsString| fs::read(a.join(name)).unwrap() == fs::read(b.join(name)).unwrap();
    names(a) == names(b)
        && names(a).iter().filter(|n| *n != "cpift.json" && *n != "README.md").all(alike)
        && run(PROGRAM, ["verify".as_ref(), b.as_os_str()]).code == 0
}

#[test]
fn killed_at_any_moment() {
    let tally = Setting::new().slerp().kill(50);
    assert!(tally.leftovers > 0, "no run was killed while it wrote: {tally:?}");
}

#[test]
fn killed_while_an_older_output_is_replaced() {
    Setting::new().slerp().kill_replacing(20);
}

#[test]
fn stopped_at_any_moment() {
    let setting = Setting::new();
    setting.slerp().stop("TERM", 143, 12);
    setting.slerp().stop("INT", 130, 12);
}

#[test]
fn out_of_room() {
    Setting::new().slerp().out_of_room(64);
}
