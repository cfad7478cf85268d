//! `verify`: a sound checkpoint passes; changed content and NaN are reported with their position.

use std::alloc::System;
use std::io::{Seek, SeekFrom, Write};

use cap::Cap;
use cpift_testkit::spoil::Spoiler;

use crate::world::{World, w};

#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, usize::MAX);

/// Memory limit with room for the buffers of all threads and for the other tests of this program.
const SPOILER: Spoiler = Spoiler { allocator: &ALLOCATOR, per_byte: 4, constant: 256 << 20 };

/// Overwrites the last four bytes of the weights.
fn overwrite_last(world: &World, value: f32) {
    let path = world.path("out/model.safetensors");
    let mut file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    file.seek(SeekFrom::End(-4)).unwrap();
    file.write_all(&value.to_le_bytes()).unwrap();
}

fn merged() -> World {
    let world = World::new();
    world.checkpoint("a", &w(&[1.0, 2.0, 3.0]));
    world.checkpoint("b", &w(&[3.0, 4.0, 5.0]));
    world.run("linear --model @a --model @b --out @out").ok();
    world
}

#[test]
fn a_merge_verifies_and_so_does_a_checkpoint_without_a_record() {
    let world = merged();
    let summary = world.run("verify @out --json").ok().stdout;
    assert!(summary.contains(r#""not_finite":0"#), "{summary}");
    world.run("verify @a").ok().says(&["has no digest recorded"]);
}

#[test]
fn digest_prints_the_digests_in_the_record() {
    let world = merged();
    let record = std::fs::read_to_string(world.path("out/cpift.json")).unwrap();
    let printed = world.run("digest @a @b @out").ok().stdout;
    assert_eq!(printed.lines().count(), 3, "{printed}");
    for line in printed.lines() {
        let (digest, path) = line.split_once("  ").unwrap();
        assert!(digest.len() == 64 && record.contains(&format!("\"{digest}\"")), "{path}: {digest}\n{record}");
    }
    let file = world.run("digest @a/config.json").ok().stdout;
    assert!(file.ends_with("/config.json\n") && !printed.contains(&file[..64]), "{file}");
    world.refused("digest @nowhere", &["@nowhere"]);
}

#[test]
fn one_changed_weight_is_found() {
    let world = merged();
    overwrite_last(&world, 4.5);
    world.refused(
        "verify @out",
        &["@out: the content differs from the digest in cpift.json", "expected", "found: digest"],
    );
}

#[test]
fn nan_is_counted_and_its_position_named() {
    let world = merged();
    overwrite_last(&world, f32::NAN);
    world.refused("verify @out", &["1 weights are not finite", "tensor: w", "element 2"]);
}

#[test]
fn a_broken_record_is_named() {
    let world = merged();
    std::fs::write(world.path("out/cpift.json"), "{").unwrap();
    world.refused("verify @out", &["@out/cpift.json", "cannot be read as JSON"]);
}

#[test]
fn bad_numbers_of_many_chunks_are_all_counted_and_the_first_is_named() {
    let mut values = vec![1.0; 300_000];
    for at in [299_999, 140_000, 140_001, 131_072] {
        values[at] = f32::INFINITY;
    }
    let world = World::new();
    world.checkpoint("a", &w(&values));
    world.refused("verify @a", &["4 weights are not finite", "tensor: w", "element 131072 of this tensor"]);
}

#[test]
fn every_changed_byte_is_found() {
    let world = merged();
    let out = world.path("out");
    for name in ["model.safetensors", "config.json"] {
        let well = SPOILER.each(&out.join(name), || cpift_merge::verify(&out).is_ok());
        assert_eq!(well, 0, "{name}");
    }
}
