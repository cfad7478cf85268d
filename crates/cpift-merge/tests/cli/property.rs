//! Random merges by `cpi` against a reference that folds whole tensors one after another.

use cpift_testkit::{Numbers, Tensor, Tensors};

use crate::world::{Core, World, assert_close};

/// Sizes around the boundaries of bytes, blocks and chunks.
const SIZES: [usize; 10] = [1, 7, 8, 9, 1023, 1025, 65_535, 65_536, 65_537, 131_080];

struct Case {
    base: Tensors,
    backbone: Tensors,
    tasks: Vec<(Tensors, Core)>,
}

fn random_case(seed: u64) -> Case {
    let mut numbers = Numbers(seed);
    let sizes: Vec<usize> = (0..4).map(|_| SIZES[numbers.bits() as usize % SIZES.len()]).collect();
    let base = around(None, &sizes, &mut numbers);
    let backbone = around(Some(&base), &sizes, &mut numbers);
    let count = 2 + numbers.bits() as usize % 2;
    let tasks = (0..count)
        .map(|_| {
            let tensors = around(Some(&base), &sizes, &mut numbers);
            let chosen = sizes.iter().enumerate().map(|(i, n)| {
                (format!("t{i}"), (0..*n).filter(|_| numbers.bits().is_multiple_of(10)).collect::<Vec<usize>>())
            });
            let core = chosen.collect();
            (tensors, core)
        })
        .collect();
    Case { base, backbone, tasks }
}

/// Random tensors, or random steps away from `centre`.
fn around(centre: Option<&Tensors>, sizes: &[usize], numbers: &mut Numbers) -> Tensors {
    let mut out = Tensors::new();
    for (i, n) in sizes.iter().enumerate() {
        let name = format!("t{i}");
        let mut values = numbers.units(*n);
        if let Some(centre) = centre {
            let scale = [1e-3, 0.5][numbers.bits() as usize % 2];
            values.iter_mut().zip(centre[&name].values()).for_each(|(v, c)| *v = c + scale * *v);
        }
        out.insert(name, Tensor::f32(&[*n], &values));
    }
    out
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

/// SLERP of whole vectors, the angle over `free` elements only.
fn slerp(a: &[f64], b: &[f64], omega: f64, free: &[bool]) -> Vec<f64> {
    let pick = |v: &[f64]| -> Vec<f64> { v.iter().zip(free).filter(|(_, f)| **f).map(|(x, _)| *x).collect() };
    let (fa, fb) = (pick(a), pick(b));
    let lengths = dot(&fa, &fa).sqrt() * dot(&fb, &fb).sqrt();
    let cos = if lengths == 0.0 { 1.0 } else { (dot(&fa, &fb) / lengths).clamp(-1.0, 1.0) };
    let (p, q) = if cos.abs() > 0.9995 {
        (1.0 - omega, omega)
    } else {
        (((1.0 - omega) * cos.acos()).sin() / cos.acos().sin(), (omega * cos.acos()).sin() / cos.acos().sin())
    };
    a.iter().zip(b).map(|(x, y)| p * x + q * y).collect()
}

/// Task that each element belongs to: of those that claim it, the one that moved it most.
fn owners(case: &Case, name: &str) -> Vec<Option<usize>> {
    let base = case.base[name].values();
    let mut owner: Vec<Option<(usize, f32)>> = vec![None; base.len()];
    for (i, (tensors, core)) in case.tasks.iter().enumerate() {
        let values = tensors[name].values();
        for &j in &core[name] {
            let moved = (values[j] - base[j]).abs();
            if owner[j].is_none_or(|(_, most)| moved > most) {
                owner[j] = Some((i, moved));
            }
        }
    }
    owner.into_iter().map(|o| Some(o?.0)).collect()
}

/// The whole fused tensor.
fn reference(case: &Case, name: &str, delta: bool) -> Vec<f64> {
    let wide = |t: &Tensors| -> Vec<f64> { t[name].values().into_iter().map(f64::from).collect() };
    let base = wide(&case.base);
    let shifted =
        |t: &Tensors| -> Vec<f64> { wide(t).iter().zip(&base).map(|(x, b)| if delta { x - b } else { *x }).collect() };
    let owner = owners(case, name);
    let free: Vec<bool> = owner.iter().map(Option::is_none).collect();
    let mut fused = shifted(&case.backbone);
    for (i, (tensors, _)) in case.tasks.iter().enumerate() {
        fused = slerp(&fused, &shifted(tensors), 1.0 / (i as f64 + 2.0), &free);
    }
    let outside = fused.iter().zip(&base).map(|(x, b)| if delta { x + b } else { *x });
    let pick = |(j, x): (usize, f64)| owner[j].map_or(x, |i| f64::from(case.tasks[i].0[name].values()[j]));
    outside.enumerate().map(pick).collect()
}

#[test]
fn merges_of_random_shapes_agree_with_whole_tensor_arithmetic() {
    for seed in 0..6 {
        let (world, case) = (World::new(), random_case(seed));
        let names = ["a", "b", "c"];
        let tasks: Vec<(&str, &Tensors, Core)> =
            names.into_iter().zip(&case.tasks).map(|(name, (t, core))| (name, t, core.clone())).collect();
        let line = world.cpi(&case.base, &tasks);
        world.checkpoint("backbone", &case.backbone);
        for space in ["weights", "delta"] {
            world.run(&format!("{line} --backbone @backbone --space {space} --out @{space}")).ok();
            for (name, tensor) in world.read(space) {
                let found: Vec<f64> = tensor.values().into_iter().map(f64::from).collect();
                let what = format!("seed {seed}, {space}, {name}");
                assert_close(&found, &reference(&case, &name, space == "delta"), &what);
            }
        }
    }
}
