//! AdamW with 8-bit moments against its definition: fixtures/golden/adamw_8bit.safetensors, made by
//! scripts/oracle/golden_adamw_8bit.py, which compares it with bitsandbytes.

use std::path::Path;

use cpift_core::Checkpoint;
use cpift_torch::optim::{AdamW, AdamWConfig, Guard, StateKind, Update};
use cpift_torch::pieces::{Piece, Pieces};
use cpift_torch::placement::Placement;
use tch::{Device, Kind, Tensor};

/// Whole blocks; a last block of one element; too small for 8 bits.
const SHAPES: [[i64; 2]; 3] = [[18, 256], [17, 241], [40, 100]];
const STEPS: usize = 10;

fn tensor(shape: [i64; 2], value: impl Fn(f64) -> f64) -> Tensor {
    let values: Vec<f32> = (0..shape[0] * shape[1]).map(|i| value(i as f64) as f32).collect();
    Tensor::from_slice(&values).view(shape)
}

/// Gradients of step `step`, counted from 1.
fn gradients(step: usize) -> Vec<Tensor> {
    let of = |(n, shape): (usize, &[i64; 2])| {
        tensor(*shape, |i| (i * 0.11 + (1.7 * step as f64 + n as f64)).sin() * 10f64.powf(-(i % 5.0)))
    };
    SHAPES.iter().enumerate().map(of).collect()
}

fn config() -> AdamWConfig {
    AdamWConfig { betas: (0.9, 0.995), eps: 1e-8, weight_decay: 0.1, state: StateKind::Blockwise }
}

/// Weights after each of the steps `kept`, and moments.
fn trained(kept: &[usize]) -> Vec<(Vec<Tensor>, Pieces)> {
    let start = |(n, shape): (usize, &[i64; 2])| tensor(*shape, |i| (i * 0.37 + n as f64).sin());
    let params: Vec<Tensor> = SHAPES.iter().enumerate().map(start).collect();
    let named: Vec<(String, Piece)> =
        params.iter().enumerate().map(|(i, param)| (i.to_string(), Piece::whole(param))).collect();
    let pieces = named.iter().map(|(name, piece)| (name, piece));
    let mut optimizer = AdamW::new(pieces, config(), &Placement::on(Device::Cpu)).unwrap();
    let guard = Guard::new(Device::Cpu);
    let mut found = Vec::new();
    for step in 1..=STEPS {
        optimizer.step(&[0, 1, 2], &gradients(step), Update { lr: 2e-3, seed: 0, guard: &guard }).unwrap();
        if kept.contains(&step) {
            let copied = |p: &Piece| p.with(p.tensor.copy());
            let moments = optimizer.moments().iter().map(|(name, p)| (name.clone(), copied(p))).collect();
            found.push((params.iter().map(Tensor::copy).collect(), moments));
        }
    }
    found
}

#[test]
fn ten_steps_equal_the_definition() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/golden/adamw_8bit.safetensors");
    let golden = Checkpoint::open(&path).unwrap();
    let expected = |name: &str| {
        let view = golden.get(name).unwrap_or_else(|| panic!("{name} is in the golden file"));
        let kind = if view.dtype.is_float() { Kind::Float } else { Kind::Uint8 };
        Tensor::from_data_size(view.bytes, &[view.numel() as i64], kind)
    };
    for (step, (params, moments)) in [1, STEPS].into_iter().zip(trained(&[1, STEPS])) {
        for (i, param) in params.iter().enumerate() {
            let off = (param.view([-1]) - expected(&format!("{step}.{i}"))).abs().max().double_value(&[]);
            assert!(off < 1e-6, "step {step}, tensor {i}: off by {off}");
            for moment in ["exp_avg", "exp_avg_sq"] {
                let found = &moments[&format!("{i}.{moment}")].tensor;
                let largest = moments.get(&format!("{i}.{moment}_absmax"));
                if i == 2 {
                    assert!(largest.is_none() && found.kind() == Kind::Float);
                    continue;
                }
                let name = format!("{step}.{i}.{moment}");
                let codes = expected(&name).to_kind(Kind::Int);
                let off = (found.view([-1]).to_kind(Kind::Int) - codes).abs();
                // Another rounding of a sum can move a value across the middle between two codes.
                let others = off.gt(0).sum(Kind::Int64).int64_value(&[]);
                assert!(off.max().int64_value(&[]) <= 1 && others <= 4, "{name}: {others} other codes");
                let expected = expected(&format!("{name}_absmax"));
                let off = ((&largest.unwrap().tensor - &expected) / &expected).abs().max().double_value(&[]);
                assert!(off < 1e-6, "{name}: largest values off by {off}");
            }
        }
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bytes() {
    let bytes = |threads: i32| {
        tch::set_num_threads(threads);
        let (params, moments) = trained(&[STEPS]).remove(0);
        (params, moments.into_iter().map(|(name, piece)| (name, piece.tensor)).collect::<Vec<_>>())
    };
    let before = tch::get_num_threads();
    let (one, three) = (bytes(1), bytes(3));
    tch::set_num_threads(before);
    assert!(one == three);
}
