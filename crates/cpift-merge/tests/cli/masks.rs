//! `--mask` and `--protect` in the plain methods: outside its mask a model is replaced by the
//! backbone, and protected elements keep its values.

use cpift_core::Dtype;
use cpift_testkit::masks::write_mask;
use cpift_testkit::{Numbers, Tensors};

use crate::world::{World, assert_close, cast, w};

fn world(models: &[(&str, &[f32])]) -> World {
    let world = World::new();
    for (name, values) in models {
        world.checkpoint(name, &w(values));
    }
    world
}

/// A mask for checkpoints like `like` with the elements of `w` that are listed.
fn mask(world: &World, name: &str, like: &str, set: &[usize]) {
    write_mask(&world.path(name), &world.path(like), |_, i| set.contains(&i));
}

#[test]
fn outside_its_mask_a_model_is_replaced_by_the_backbone() {
    let (base, a, b) = ([1.0, 1.0, 1.0, 1.0], [3.0, 3.0, 3.0, 3.0], [5.0, 7.0, 9.0, 1.0]);
    let world = world(&[("base", &base), ("a", &a), ("b", &b)]);
    mask(&world, "low", "base", &[0, 1]);
    mask(&world, "high", "base", &[1, 2]);
    let line = "task-arithmetic --base @base --model @a --model @b";
    world.run(&format!("{line} --mask a=@low --mask 2=@high --out @both")).ok();
    assert_eq!(world.read_w("both"), [3.0, 9.0, 9.0, 1.0]);
    // Without a base the first model is the backbone.
    world.run("linear --model @a --model @b --mask b=@low --out @linear").ok();
    assert_eq!(world.read_w("linear"), [4.0, 5.0, 3.0, 3.0]);
    // TIES trims the restricted task vector: half of four elements, of which one has moved.
    mask(&world, "one", "base", &[2]);
    world.run("ties --base @base --model @b --mask 1=@one --density 0.5 --out @ties").ok();
    assert_eq!(world.read_w("ties"), [1.0, 1.0, 9.0, 1.0]);
}

#[test]
fn protected_elements_equal_the_backbone_and_take_no_part_in_angles() {
    let world = world(&[("a", &[3.0, 0.0, -0.0, 100.0]), ("b", &[0.0, 3.0, 50.0, -70.0])]);
    mask(&world, "kept", "a", &[2, 3]);
    world.run("slerp --model @a --model @b --protect @kept --out @out").ok().says(&["median 90.0000"]);
    let found = world.read_w("out");
    let half = 3.0 * 0.5f64.sqrt();
    assert_close(&[found[0].into(), found[1].into()], &[half, half], "free");
    assert_eq!((found[2].to_bits(), found[3]), ((-0.0f32).to_bits(), 100.0));
}

#[test]
fn protected_elements_take_no_part_in_trims() {
    let base = [0.0; 6];
    let world = world(&[("base", &base), ("a", &[9.0, 1.0, 2.0, -3.0, 4.0, 8.0])]);
    mask(&world, "kept", "base", &[0, 5]);
    let line = "ties --base @base --model @a --density 0.5 --protect @kept --out @out";
    world.run(line).ok();
    assert_eq!(world.read_w("out"), [0.0, 0.0, 0.0, -3.0, 4.0, 0.0], "two of the four that are free");
    // Nor in the sums by which a drop is rescaled: with all elements but one protected, that one is
    // kept unchanged or dropped.
    mask(&world, "but-one", "base", &[0, 1, 2, 3, 5]);
    for seed in 0..4 {
        let line = "dare --base @base --model @a --density 0.5 --protect @but-one --force --out @dare";
        world.run(&format!("{line} --seed {seed}")).ok();
        let found = world.read_w("dare");
        assert!(found == [0.0; 6] || found == [0.0, 0.0, 0.0, 0.0, 4.0, 0.0], "{found:?}");
    }
}

#[test]
fn protected_elements_are_not_counted_among_equals_at_the_cut_off() {
    let world = world(&[("base", &[0.0; 4]), ("a", &[2.0, 2.0, 2.0, 1.0])]);
    mask(&world, "kept", "base", &[0]);
    world.run("ties --base @base --model @a --density 0.34 --protect @kept --out @out").ok();
    let kept = world.tied_first("a", &[1, 2], 1)[0];
    let expected: Vec<f32> = (0..4).map(|i| if i == kept { 2.0 } else { 0.0 }).collect();
    assert_eq!(world.read_w("out"), expected, "one of the two that are free");
}

#[test]
fn protected_elements_of_many_chunks_equal_the_backbone_in_every_bit_after_the_cast() {
    let n = 300_001;
    let random = |seed: u64| -> Tensors { w(&Numbers(seed).units(n)) };
    let world = World::new();
    for (i, name) in ["base", "a", "b"].iter().enumerate() {
        world.checkpoint(name, &random(i as u64));
    }
    let protected = |i: usize| i % 37 < 9;
    write_mask(&world.path("kept"), &world.path("base"), |_, i| protected(i));
    let vectors = "--base @base --model @a --model @b";
    for (line, backbone) in [
        ("slerp --model @a --model @b".to_owned(), 1),
        ("linear --model @a --model @b".to_owned(), 1),
        ("spherical-mean --model @a --model @b".to_owned(), 1),
        (format!("slerp {vectors} --space delta"), 0),
        (format!("task-arithmetic {vectors}"), 0),
        (format!("ties {vectors} --density 0.2"), 0),
        (format!("dare {vectors} --density 0.2 --elect-sign"), 0),
    ] {
        world.run(&format!("{line} --protect @kept --dtype bf16 --force --out @out")).ok();
        let (found, kept) = (world.read("out"), cast(&random(backbone), Dtype::BF16));
        let pair = |i: usize| (&found["w"].bytes[2 * i..2 * i + 2], &kept["w"].bytes[2 * i..2 * i + 2]);
        assert!((0..n).filter(|i| protected(*i)).all(|i| pair(i).0 == pair(i).1), "{line}");
        let changed = (0..n).filter(|i| !protected(*i) && pair(*i).0 != pair(*i).1).count();
        assert!(changed > n / 4, "{line}: {changed}");
    }
}

#[test]
fn a_mask_without_a_name_restricts_every_method() {
    let n = 3 * 1031;
    let random = |seed: u64| -> Tensors {
        let tensor = cpift_testkit::Tensor::floats(Dtype::F32, &[3, n / 3], &Numbers(seed).units(n));
        [("w".to_owned(), tensor)].into()
    };
    let world = World::new();
    for (i, name) in ["base", "a", "b"].iter().enumerate() {
        world.checkpoint(name, &random(i as u64));
    }
    let merged = |i: usize| i % 37 < 9;
    write_mask(&world.path("region"), &world.path("base"), |_, i| merged(i));
    let vectors = "--base @base --model @a --model @b";
    for (line, backbone) in [
        ("slerp --model @a --model @b".to_owned(), 1),
        ("linear --model @a --model @b".to_owned(), 1),
        ("spherical-mean --model @a --model @b".to_owned(), 1),
        (format!("nuslerp {vectors} --along rows"), 0),
        ("nuslerp --model @a --model @b --along columns".to_owned(), 1),
        (format!("multislerp {vectors}"), 0),
        ("nearswap --base @base --model @a --t 0.5".to_owned(), 0),
        ("arcee-fusion --base @base --model @a".to_owned(), 0),
        (format!("task-arithmetic {vectors}"), 0),
        (format!("model-stock {vectors}"), 0),
        (format!("sce {vectors} --select-topk 0.9"), 0),
        (format!("ram {vectors}"), 0),
        (format!("ram {vectors} --plus"), 0),
        (format!("ties {vectors} --density 0.9"), 0),
        (format!("dare {vectors} --density 0.9 --elect-sign"), 0),
        (format!("della {vectors} --density 0.8"), 0),
        (format!("breadcrumbs {vectors} --density 0.9"), 0),
        (format!("tsv-m {vectors}"), 0),
        (format!("iso-c {vectors}"), 0),
    ] {
        world.run(&format!("{line} --mask @region --force --out @out")).ok();
        let (found, kept) = (world.read_w("out"), random(backbone)["w"].values());
        assert!((0..n).filter(|i| !merged(*i)).all(|i| found[i] == kept[i]), "{line}");
        let changed = (0..n).filter(|i| merged(*i) && found[*i] != kept[*i]).count();
        // Arcee Fusion takes outliers only, and of the elements outside the region none is one.
        assert!(
            changed * 2 > (0..n).filter(|i| merged(*i)).count() || line.starts_with("arcee") && changed > 0,
            "{line}"
        );
    }
    // A region is the complement of what is protected, for methods that count elements too.
    write_mask(&world.path("rest"), &world.path("base"), |_, i| !merged(i));
    for line in [format!("ties {vectors} --density 0.3"), format!("breadcrumbs {vectors} --density 0.3 --gamma 0.1")] {
        world.run(&format!("{line} --mask @region --force --out @one")).ok();
        world.run(&format!("{line} --protect @rest --force --out @two")).ok();
        assert_eq!(world.read_w("one"), world.read_w("two"), "{line}");
    }
}

#[test]
fn ram_with_a_mask_per_model_is_localize_and_stitch() {
    let (base, a, b) = ([1.0; 4], [3.0, 3.0, 3.0, 3.0], [5.0, 7.0, 9.0, 2.0]);
    let world = world(&[("base", &base), ("a", &a), ("b", &b)]);
    mask(&world, "low", "base", &[0, 1]);
    mask(&world, "high", "base", &[1, 2]);
    world.run("ram --epsilon 0 --base @base --model @a --model @b --mask a=@low --mask b=@high --out @out").ok();
    // Regions of one model take its element, shared ones the mean, the rest the base.
    assert_eq!(world.read_w("out"), [3.0, 5.0, 9.0, 1.0]);
}

#[test]
fn masks_are_checked_and_named() {
    let world = world(&[("a", &[1.0, 2.0, 3.0]), ("b", &[2.0, 1.0, 0.0]), ("other", &[1.0, 2.0])]);
    mask(&world, "kept", "a", &[1]);
    mask(&world, "short", "other", &[1]);
    let line = "slerp --model @a --model @b --out @out";
    for flag in ["--protect @short", "--mask b=@short"] {
        world.refused(&format!("{line} {flag}"), &["@short", "tensor: w", "expected: 3 elements", "found: 2 elements"]);
    }
    world.refused(&format!("{line} --protect @a/model.safetensors"), &["model.safetensors: not a mask"]);
    world.misused(&format!("{line} --mask c=@kept"), &["--mask c", "expected 1 to 2 or the name of a directory"]);
    world.misused(&format!("{line} --mask 3=@kept"), &["--mask 3"]);
    world.misused(&format!("{line} --mask b=@kept --mask 2=@kept"), &["--mask 2", "has one already"]);
    world.misused(&format!("{line} --mask 1=@kept"), &["mask of the first model has no effect"]);
    world.checkpoint("1", &w(&[1.0, 2.0, 3.0]));
    world.misused(
        "slerp --model @a --model @1 --out @out --mask 1=@kept",
        &["fits several models, by number and by name"],
    );
    let line = "linear --model @a --model @b --model @b --out @out";
    world.misused(&format!("{line} --mask b=@kept"), &["fits several models"]);
}

#[test]
fn a_mask_made_for_another_base_is_warned_about_if_that_is_known() {
    let world = world(&[("a", &[1.0, 2.0]), ("b", &[2.0, 1.0])]);
    world.run("linear --model @a --model @b --out @c").ok();
    mask(&world, "for-a", "a", &[1]);
    mask(&world, "for-c", "c", &[1]);
    let line = "linear --quiet --model @c --model @b --out";
    world
        .run(&format!("{line} @o1 --protect @for-a"))
        .ok()
        .says(&["@for-a: made for another base".split('@').nth(1).unwrap()]);
    let run = world.run(&format!("{line} @o2 --protect @for-c")).ok();
    assert!(!run.stderr.contains("another base"), "{}", run.stderr);
}
