//! `slerp` and `linear`: dtypes, shards, threads, weights, and the limits t = 0 and t = 1.

use cpift_core::Dtype;
use cpift_testkit::{Numbers, Tensor, Tensors, expect_entries, write_sharded};

use crate::world::{World, bytes, cast, json, w};

/// Rounds to the nearest bf16, ties to even, by arithmetic on the bits.
fn bf16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16) as u16
}

fn bits_of(tensor: &Tensor) -> Vec<u16> {
    tensor.bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect()
}

fn random_bf16(seed: u64, n: usize) -> Tensors {
    cast(&w(&Numbers(seed).units(n)), Dtype::BF16)
}

fn wide(tensors: &Tensors) -> Vec<f64> {
    tensors["w"].values().into_iter().map(f64::from).collect()
}

#[test]
fn linear_of_bf16_models_is_their_weighted_mean_rounded_to_bf16() {
    let world = World::new();
    let models: Vec<Tensors> = (0..3).map(|i| random_bf16(i, 1000)).collect();
    for (i, model) in models.iter().enumerate() {
        world.checkpoint(&format!("m{i}"), model);
    }
    let line = "linear --model @m0 --model @m1 --model @m2";
    for (out, flags, weights) in [
        ("equal", "", [1.0 / 3.0, 1.0 / 3.0, 1.0 / 3.0]),
        ("weighted", "--weight 1 --weight 2 --weight 5", [0.125, 0.25, 0.625]),
        ("negative", "--weight 3 --weight -1 --weight 2", [0.75, -0.25, 0.5]),
    ] {
        world.run(&format!("{line} {flags} --out @{out}")).ok();
        let values: Vec<Vec<f64>> = models.iter().map(wide).collect();
        let expected: Vec<u16> =
            (0..1000).map(|j| bf16_bits((0..3).map(|i| weights[i] * values[i][j]).sum::<f64>() as f32)).collect();
        let found = &world.read(out)["w"];
        assert_eq!(found.dtype, Dtype::BF16);
        assert_eq!(bits_of(found), expected, "{out}");
    }
    assert_eq!(json(&world.path("equal/config.json"))["torch_dtype"], "bfloat16");
}

#[test]
fn slerp_of_bf16_models_is_the_great_circle_rounded_to_bf16() {
    let world = World::new();
    let (a, b) = (random_bf16(1, 3000), random_bf16(2, 3000));
    world.checkpoint("a", &a);
    world.checkpoint("b", &b);
    world.run("slerp --model @a --model @b --t 0.3 --out @out").ok();
    let (a, b) = (wide(&a), wide(&b));
    let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
    let angle = (dot(&a, &b) / (dot(&a, &a) * dot(&b, &b)).sqrt()).acos();
    let (p, q) = ((0.7 * angle).sin() / angle.sin(), (0.3 * angle).sin() / angle.sin());
    let expected: Vec<u16> = a.iter().zip(&b).map(|(x, y)| bf16_bits((p * x + q * y) as f32)).collect();
    assert_eq!(bits_of(&world.read("out")["w"]), expected);
}

#[test]
fn t_of_0_and_1_give_back_the_models_in_every_bit() {
    let world = World::new();
    let mut a = Numbers(3).units(100);
    let mut b = Numbers(4).units(100);
    (a[5], b[6]) = (-0.0, -0.0);
    world.checkpoint("a", &w(&a));
    world.checkpoint("b", &w(&b));
    for (t, model) in [("0", "a"), ("1", "b")] {
        world.run(&format!("slerp --model @a --model @b --t {t} --out @out{t}")).ok();
        assert_eq!(world.read(&format!("out{t}"))["w"].bytes, world.read(model)["w"].bytes, "t = {t}");
    }
}

#[test]
fn f64_models_are_merged_in_f64() {
    let world = World::new();
    let tensor = |x: f64| {
        Tensors::from([("w".into(), Tensor { dtype: Dtype::F64, shape: vec![1], bytes: x.to_le_bytes().to_vec() })])
    };
    world.checkpoint("a", &tensor(1.0));
    world.checkpoint("b", &tensor(1.0 + f64::EPSILON * 4.0));
    world.run("linear --model @a --model @b --out @out").ok();
    assert_eq!(world.read("out")["w"].bytes, (1.0 + f64::EPSILON * 2.0).to_le_bytes());
    assert_eq!(json(&world.path("out/config.json"))["torch_dtype"], "float64");
}

/// Tensors with sizes around that of a chunk; the angle between different seeds is about 45°.
fn several(seed: u64) -> Tensors {
    let (mut common, mut own) = (Numbers(0), Numbers(seed));
    let mut tensor = |n: usize| Tensor::f32(&[n], &(0..n).map(|_| common.unit() + own.unit()).collect::<Vec<_>>());
    let sizes = [3, 65_535, 65_536, 65_537, 200_003, 1024];
    sizes.into_iter().enumerate().map(|(i, n)| (format!("t{i}"), tensor(n))).collect()
}

/// The tensors in F64, in which the order of a sum shows in the last bits.
fn in_f64(tensors: &Tensors) -> Tensors {
    let widen = |t: &Tensor| t.values().iter().flat_map(|v| f64::from(*v).to_le_bytes()).collect();
    let tensor = |t: &Tensor| Tensor { dtype: Dtype::F64, shape: t.shape.clone(), bytes: widen(t) };
    tensors.iter().map(|(name, t)| (name.clone(), tensor(t))).collect()
}

#[test]
fn the_bytes_are_the_same_at_any_number_of_threads_and_on_a_rerun() {
    for convert in [Tensors::clone, in_f64] {
        let world = World::new();
        world.checkpoint("a", &convert(&several(1)));
        world.checkpoint("b", &convert(&several(2)));
        let merged = |threads: u32, out: &str| {
            world.run(&format!("slerp --model @a --model @b --t 0.3 --threads {threads} --out @{out}")).ok();
            let facts = json(&world.path(out).join("cpift.json"))["facts"].clone();
            (bytes(&world.path(out).join("model.safetensors")), facts)
        };
        let one = merged(1, "one");
        assert!(one == merged(2, "two") && one == merged(8, "eight") && one == merged(1, "again"));
    }
}

#[test]
fn sharding_of_inputs_and_output_does_not_change_the_tensors() {
    let world = World::new();
    world.checkpoint("a", &several(1));
    world.checkpoint("b", &several(2));
    write_sharded(&world.path("a-sharded"), &several(1), 3);
    write_sharded(&world.path("b-sharded"), &several(2), 2);
    world.run("slerp --model @a --model @b --out @single").ok();
    world.run("slerp --model @a-sharded --model @b-sharded --shard-size 300KB --out @sharded").ok();
    let shards = 5;
    let mut names: Vec<String> = (1..=shards).map(|i| format!("model-{i:05}-of-{shards:05}.safetensors")).collect();
    names.extend(["model.safetensors.index.json", "config.json", "cpift.json", "README.md"].map(String::from));
    expect_entries(&world.path("sharded"), &names.iter().map(String::as_str).collect::<Vec<_>>());
    let (single, sharded) = (world.read("single"), world.read("sharded"));
    assert!(single.len() == 6 && single.keys().eq(sharded.keys()));
    assert!(single.values().zip(sharded.values()).all(|(a, b)| a.bytes == b.bytes && a.shape == b.shape));
    world.run("verify @sharded").ok();
}

#[test]
fn an_existing_output_is_replaced_with_force_and_its_stale_files_go() {
    let world = World::new();
    world.checkpoint("a", &w(&[1.0, 2.0]));
    world.checkpoint("b", &w(&[3.0, 4.0]));
    std::fs::create_dir(world.path("out")).unwrap();
    std::fs::write(world.path("out/model-00001-of-00009.safetensors"), "stale").unwrap();
    let line = "linear --model @a --model @b --out @out --force";
    world.refused(line, &["@out: is a directory that CPI-FT did not write", "hint: remove it yourself"]);
    std::fs::write(world.path("out/cpift.json"), "{}").unwrap();
    world.run(line).ok();
    assert_eq!(world.read_w("out"), [2.0, 3.0]);
    expect_entries(&world.path("out"), &["README.md", "config.json", "cpift.json", "model.safetensors"]);
    world.misused("linear --model @out --model @b --out @out --force", &["would replace the input"]);
    std::fs::write(world.path("out/recipe.yml"), "merge_method: linear").unwrap();
    world.misused("recipe @out/recipe.yml --out @out --force", &["would replace the input"]);
}
