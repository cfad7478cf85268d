//! Corrupted files of the formats that need no libtorch: readers do no harm, and verification finds
//! changes in files with a digest.

use std::alloc::System;
use std::fs;
use std::path::PathBuf;

use cap::Cap;
use cpift_core::format::checkpoint::read_config;
use cpift_core::format::digest::Digest;
use cpift_core::format::groups::Groups;
use cpift_core::format::names::stats;
use cpift_core::format::scores::Scores;
use cpift_core::format::tasks::Tasks;
use cpift_core::record::provenance::Provenance;
use cpift_core::{Checkpoint, Mask};
use cpift_testkit::chain::Chain;
use cpift_testkit::model::tiny_weights;
use cpift_testkit::spoil::Spoiler;
use cpift_testkit::write_sharded;

#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, usize::MAX);

/// Bounds for mapped files, whose headers are parsed into tables.
const MAPPED: Spoiler = Spoiler { allocator: &ALLOCATOR, per_byte: 4, constant: 1 << 20 };
/// Bounds for small text files.
const JSON: Spoiler = Spoiler { allocator: &ALLOCATOR, per_byte: 4, constant: 512 << 10 };

struct Files {
    chain: Chain,
}

impl Files {
    fn path(&self, name: &str) -> PathBuf {
        self.chain.path(name)
    }
}

/// Runs the whole chain, so that the files come from the programs themselves.
fn files() -> Files {
    let chain = Chain::default();
    chain.run_all();
    Files { chain }
}

#[test]
fn corrupted_files_do_no_harm() {
    let files = files();
    let mask = files.path("run/masks/copy.safetensors");
    let well = MAPPED.each(&mask, || {
        let sound = Mask::open(&mask).and_then(|mask| mask.verify().map(|()| drop(stats(&mask)))).is_ok();
        sound && Provenance::verify_file(&mask).unwrap_or(false)
    });
    assert_eq!(well, 0, "the record detects every change of a mask");

    let weights = files.path("run/fused/model.safetensors");
    let opened = |folder: &str| Checkpoint::open(&files.path(folder)).and_then(|c| Digest::of_checkpoint(&c));
    MAPPED.each(&weights, || opened("run/fused").is_ok());

    let sharded = write_sharded(&files.path("sharded"), &tiny_weights(1), 3);
    JSON.each(&sharded.join("model.safetensors.index.json"), || opened("sharded").is_ok());
    JSON.each(&sharded.join("config.json"), || opened("sharded").is_ok() && read_config(&sharded).is_ok());

    let groups = files.path("run/groups.json");
    let well =
        JSON.each(&groups, || Groups::read(&groups).is_ok() && Provenance::verify_file(&groups).unwrap_or(false));
    assert_eq!(well, 0, "the record detects every change of groups.json");

    let record = files.path("run/fused/cpift.json");
    JSON.each(&record, || Provenance::of(&files.path("run/fused")).is_some());
    let tasks = files.path("data/tasks.toml");
    JSON.each(&tasks, || Tasks::read(&tasks).is_ok());
    let scores = files.path("run/scores/scores.json");
    JSON.each(&scores, || Scores::read(&scores).is_ok());
}

#[test]
fn deep_nesting_and_endless_files_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("groups.json");
    for deep in ["[".repeat(1 << 20), "{\"a\":".repeat(1 << 20)] {
        fs::write(&path, deep).unwrap();
        let error = Groups::read(&path).unwrap_err().to_string();
        assert!(error.contains("recursion limit"), "{error}");
    }
    for deep in [format!("a = {}", "[".repeat(1 << 20)), format!("[{}", "a.".repeat(1 << 17))] {
        fs::write(&path, deep).unwrap();
        assert!(Tasks::read(&path).is_err());
    }
    fs::File::create(&path).unwrap().set_len((256 << 20) + 1).unwrap();
    let error = Groups::read(&path).unwrap_err().to_string();
    assert!(error.contains("is too long") && error.contains("at most 268435456 bytes"), "{error}");
    fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
    assert!(Groups::read(&path).unwrap_err().to_string().contains("is too long"));
}

#[test]
fn an_index_does_not_leave_its_folder_and_pickles_are_not_opened() {
    let dir = tempfile::tempdir().unwrap();
    let folder = write_sharded(&dir.path().join("m"), &tiny_weights(1), 2);
    let index = folder.join("model.safetensors.index.json");
    let text = fs::read_to_string(&index).unwrap();
    let shard = "model-00001-of-00002.safetensors";
    fs::copy(folder.join(shard), dir.path().join(shard)).unwrap();
    let absolute = dir.path().join(shard).display().to_string();
    for outside in [&format!("../{shard}"), &absolute, &format!("./../{shard}"), &format!("..\\\\{shard}"), ".."] {
        fs::write(&index, text.replace(shard, outside)).unwrap();
        let error = Checkpoint::open(&folder).err().expect("it is refused").to_string();
        assert!(error.contains("names a shard outside its directory"), "{outside}: {error}");
    }
    let pickled = dir.path().join("p");
    fs::create_dir(&pickled).unwrap();
    for name in ["pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "model.pt", "last.ckpt"] {
        let path = pickled.join(name);
        fs::write(&path, "").unwrap();
        let refused = |path: &std::path::Path| Checkpoint::open(path).err().expect("it is refused").to_string();
        let mut errors = vec![refused(&path)];
        if name == "consolidated.00.pth" {
            let error = refused(&pickled);
            assert!(error.contains(&format!("{name}, weights under the names of the publisher's own code")), "{error}");
            assert!(error.contains("hint: download the files in transformers format"), "{error}");
        } else {
            errors.push(refused(&pickled));
        }
        for error in errors {
            assert!(error.contains(&format!("a pickled checkpoint ({name})")) && error.contains("hint: "), "{error}");
            assert!(error.contains("safe_serialization=True") && error.contains("weights_only=True"), "{error}");
        }
        fs::remove_file(path).unwrap();
    }
}
