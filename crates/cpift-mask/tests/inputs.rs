//! Kinds of checkpoints that `extract` reads: files, components of diffusers, 8-bit weights with
//! scales, and a model with an adapter.

use std::fs;
use std::path::Path;

use cpift_core::{Dtype, Mask};
use cpift_testkit::{Tensor, Tensors, run, write_checkpoint, write_safetensors};

const PROGRAM: &str = env!("CARGO_BIN_EXE_cpift-mask");

/// Bits of each tensor of the mask of the two checkpoints at 25 %.
fn bits(dir: &Path, base: &str, tuned: &str, out: &str) -> Vec<(String, Vec<u8>)> {
    let [base, tuned, out] = [base, tuned, out].map(|name| dir.join(name).display().to_string());
    let tuned = tuned.replace("+@", &format!("+{}/", dir.display()));
    run(PROGRAM, ["extract", "--base", &base, "--tuned", &tuned, "--percent", "25", "--out", &out]).ok();
    let mask = Mask::open(Path::new(&out)).unwrap();
    mask.verify().unwrap();
    mask.tensors().map(|(name, bits)| (name.to_owned(), bits.to_vec())).collect()
}

fn model(weight: &[f32]) -> Tensors {
    Tensors::from([
        ("model.layers.0.up.weight".to_owned(), Tensor::f32(&[4, 3], weight)),
        ("model.norm.weight".to_owned(), Tensor::f32(&[4], &[1.0; 4])),
    ])
}

#[test]
fn an_adapter_is_the_tuned_model_that_it_makes() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = ([1.0, 2.0, 4.0], [1.0, -3.0, 0.5, 0.0]);
    let base: Vec<f32> = (0..12u8).map(f32::from).collect();
    let tuned: Vec<f32> = (0..12).map(|at| base[at] + 2.0 * b[at / 3] * a[at % 3]).collect();
    write_checkpoint(&dir.path().join("base"), &model(&base));
    write_checkpoint(&dir.path().join("tuned"), &model(&tuned));
    fs::create_dir(dir.path().join("lora")).unwrap();
    fs::write(dir.path().join("lora/adapter_config.json"), r#"{"peft_type": "LORA", "r": 1, "lora_alpha": 2}"#)
        .unwrap();
    let name = |part: &str| format!("base_model.model.model.layers.0.up.lora_{part}.weight");
    let adapter = Tensors::from([(name("A"), Tensor::f32(&[1, 3], &a)), (name("B"), Tensor::f32(&[4, 1], &b))]);
    write_safetensors(&dir.path().join("lora/adapter_model.safetensors"), &adapter);
    let expected = bits(dir.path(), "base", "tuned", "full.mask");
    assert_eq!(bits(dir.path(), "base", "base+@lora", "lora.mask"), expected);
    // The digest is not that of the base.
    let header = Mask::open(&dir.path().join("lora.mask")).unwrap().header.clone();
    assert_ne!(header.base, header.tuned);
}

#[test]
fn files_components_and_eight_bits_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let (base, tuned) = (vec![1.0; 12], (0..12u8).map(|i| 1.0 + f32::from(i) / 8.0).collect::<Vec<f32>>());
    write_checkpoint(&dir.path().join("a"), &model(&base));
    write_checkpoint(&dir.path().join("b"), &model(&tuned));
    let expected = bits(dir.path(), "a", "b", "folders.mask");
    write_safetensors(&dir.path().join("a.safetensors"), &model(&base));
    write_safetensors(&dir.path().join("b.safetensors"), &model(&tuned));
    assert_eq!(bits(dir.path(), "a.safetensors", "b.safetensors", "files.mask"), expected);
    for name in ["a", "b"] {
        fs::create_dir(dir.path().join(format!("unet-{name}"))).unwrap();
        let file = dir.path().join(format!("unet-{name}/diffusion_pytorch_model.safetensors"));
        fs::copy(dir.path().join(format!("{name}.safetensors")), file).unwrap();
    }
    assert_eq!(bits(dir.path(), "unet-a", "unet-b", "unets.mask"), expected);
    // Half the weights and a scale of 2; 1 + i/8 is a number of 8 bits.
    let mut eight = model(&tuned);
    let halves: Vec<f32> = tuned.iter().map(|v| v / 2.0).collect();
    eight.insert("model.layers.0.up.weight".into(), Tensor::floats(Dtype::F8E4M3, &[4, 3], &halves));
    eight.insert("model.layers.0.up.weight_scale".into(), Tensor::f32(&[1], &[2.0]));
    write_safetensors(&dir.path().join("eight.safetensors"), &eight);
    assert_eq!(bits(dir.path(), "a.safetensors", "eight.safetensors", "eight.mask"), expected);
}
