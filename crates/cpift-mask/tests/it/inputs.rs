//! Kinds of checkpoints that `extract` reads: files, components of diffusers, 8-bit weights with
//! scales, and a model with an adapter.

use std::fs;
use std::path::Path;

use cpift_core::format::checkpoint::CheckpointWriter;
use cpift_core::{Dtype, Mask, TensorSpec};
use cpift_testkit::{Tensor, Tensors, expect_entries, read_checkpoint, run, write_checkpoint, write_safetensors};
use serde_json::{Value, json};

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
    // The adapter's change is what apply keeps.
    let at = |name: &str| dir.path().join(name).display().to_string();
    let line = ["apply", "--base", &at("base"), "--tuned", &format!("{}+{}", at("base"), at("lora"))];
    run(PROGRAM, line.iter().copied().chain([&at("lora.mask"), "--out", &at("kept")])).ok();
    let (kept, name) = (read_checkpoint(Path::new(&at("kept"))), "model.layers.0.up.weight");
    let set = |at: usize| expected[0].1[at / 8] >> (at % 8) & 1 == 1;
    let changed: Vec<f32> = (0..12).map(|at| if set(at) { tuned[at] } else { base[at] }).collect();
    assert_eq!((kept[name].values(), expected[0].0.as_str()), (changed, name));
    assert!(!Path::new(&at("kept")).join("adapter_config.json").exists());
    let sparse = [&at("lora.mask"), "--sparse", "--values", "tuned", "--out", &at("vector")];
    run(PROGRAM, line.iter().copied().chain(sparse)).ok();
    run(PROGRAM, ["restore", &at("vector"), "--base", &at("base"), "--out", &at("again")]).ok();
    assert_eq!(read_checkpoint(Path::new(&at("again")))[name].values(), kept[name].values());
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

/// Writes a checkpoint of one kind with the matrix of `weight`.
type Write = fn(&Path, &[f32]);

fn text(path: &Path, content: &Value) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content.to_string()).unwrap();
}

fn file(path: &Path, weight: &[f32]) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    write_safetensors(path, &model(weight));
}

#[test]
fn directories_of_every_kind_give_the_same_bits() {
    let kinds: [Write; 6] = [
        |folder, weight| {
            text(&folder.join("config.json"), &json!({"model_type": "llama"}));
            let tensors = model(weight);
            let spec = |(name, t): (&String, &Tensor)| TensorSpec {
                name: name.clone(),
                dtype: t.dtype,
                shape: t.shape.clone(),
            };
            let writer = CheckpointWriter::create(folder, &tensors.iter().map(spec).collect::<Vec<_>>(), 16).unwrap();
            tensors.iter().for_each(|(name, tensor)| writer.write(name, 0, &tensor.bytes).unwrap());
        },
        |folder, weight| file(&folder.join("consolidated.safetensors"), weight),
        |folder, weight| file(&folder.join("model.fp16.safetensors"), weight),
        |folder, weight| {
            let index = json!({"_class_name": "Pipeline", "unet": ["diffusers", "UNet"]});
            text(&folder.join("model_index.json"), &index);
            file(&folder.join("unet/diffusion_pytorch_model.safetensors"), weight);
        },
        |folder, weight| {
            text(&folder.join("modules.json"), &json!([{"idx": 0, "path": "0_Transformer"}, {"idx": 1, "path": "1"}]));
            file(&folder.join("0_Transformer/model.safetensors"), weight);
        },
        |folder, weight| {
            fs::create_dir_all(folder).unwrap();
            let mut eight = model(weight);
            let name = "model.layers.0.up.weight";
            eight.insert(name.into(), Tensor::floats(Dtype::F8E4M3, &[4, 3], weight));
            write_safetensors(&folder.join("model.safetensors"), &eight);
        },
    ];
    // Numbers of 8 bits, no two changes alike.
    let (base, tuned) = (vec![1.0; 12], (0..12u8).map(|i| 1.0 + f32::from(i) / 8.0).collect::<Vec<f32>>());
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(&dir.path().join("a"), &model(&base));
    write_checkpoint(&dir.path().join("b"), &model(&tuned));
    let expected: Vec<Vec<u8>> = bits(dir.path(), "a", "b", "m").into_iter().map(|(_, bits)| bits).collect();
    for write in kinds {
        let dir = tempfile::tempdir().unwrap();
        write(&dir.path().join("a"), &base);
        write(&dir.path().join("b"), &tuned);
        let found: Vec<Vec<u8>> = bits(dir.path(), "a", "b", "m").into_iter().map(|(_, bits)| bits).collect();
        assert_eq!(found, expected);
        // The change inside the mask is kept in the layout of the base.
        let at = |name: &str| dir.path().join(name).display().to_string();
        let line = ["apply", "--base", &at("a"), "--tuned", &at("b"), &at("m"), "--out", &at("kept")];
        run(PROGRAM, line).ok();
        let names = |folder: &str| read_checkpoint(&dir.path().join(folder)).into_keys().collect::<Vec<_>>();
        assert_eq!(names("kept"), names("a"));
    }
}

#[test]
fn a_bare_file_is_applied_to_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    file(&dir.path().join("a.safetensors"), &[1.0; 12]);
    file(&dir.path().join("b.safetensors"), &(0..12u8).map(f32::from).collect::<Vec<_>>());
    bits(dir.path(), "a.safetensors", "b.safetensors", "m");
    let line = ["apply", "--base", &at("a.safetensors"), "--tuned", &at("b.safetensors"), &at("m"), "--out"];
    run(PROGRAM, line.into_iter().chain([at("out").as_str()])).ok();
    let values = read_checkpoint(Path::new(&at("out")))["model.layers.0.up.weight"].values();
    assert_eq!(values, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 8.0, 9.0, 10.0, 11.0]);
    let names = ["a.safetensors", "b.safetensors", "m", "m.cpift.json", "out", "out.cpift.json"];
    expect_entries(dir.path(), &names);
}

/// A language model with the rows `rows` of an embedding and a matrix, and a tokenizer with
/// `tokens`.
fn language_model(folder: &Path, rows: &[f32], matrix: f32, tokens: &[(&str, usize)]) {
    let values: Vec<f32> = rows.iter().flat_map(|v| [*v; 3]).collect();
    let tensors = Tensors::from([
        ("model.embed_tokens.weight".to_owned(), Tensor::f32(&[rows.len(), 3], &values)),
        ("model.layers.0.up.weight".to_owned(), Tensor::f32(&[2, 3], &[matrix; 6])),
    ]);
    let _ = fs::remove_dir_all(folder);
    write_checkpoint(folder, &tensors);
    let vocab: serde_json::Map<String, Value> =
        tokens.iter().map(|(token, id)| ((*token).to_owned(), json!(id))).collect();
    text(&folder.join("tokenizer.json"), &json!({"model": {"type": "BPE", "vocab": vocab, "merges": []}}));
}

/// Elements that the mask of `base` and `tuned` chooses in the embedding, and what `extract` says.
fn chosen(dir: &Path, percent: &str) -> (Vec<usize>, Value) {
    let at = |name: &str| dir.join(name).display().to_string();
    let line = ["extract", "--base", &at("base"), "--tuned", &at("tuned"), "--percent", percent, "--out", &at("m")];
    let said = run(PROGRAM, line.into_iter().chain(["--force", "--json"])).ok().stdout;
    let mask = Mask::open(&dir.join("m")).unwrap();
    let bits = mask.bits("model.embed_tokens.weight").unwrap();
    let n = mask.header.numel["model.embed_tokens.weight"] as usize;
    ((0..n).filter(|i| bits[i / 8] >> (i % 8) & 1 == 1).collect(), serde_json::from_str(&said).unwrap())
}

#[test]
fn rows_of_added_tokens_are_outside_d_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    let [base, tuned] = ["base", "tuned"].map(|name| dir.path().join(name));
    language_model(&base, &[1.0, 2.0, 3.0], 0.0, &[("x", 0), ("y", 1), ("z", 2)]);
    // The added rows are far from anything, and count in no way.
    let added = [("x", 0), ("y", 1), ("z", 2), ("new", 3), ("newer", 4)];
    language_model(&tuned, &[1.0, 2.5, 3.0, 90.0, 91.0], 0.25, &added);
    let (elements, said) = chosen(dir.path(), "20");
    assert_eq!((elements, &said["D"], &said["selected"]), (vec![3, 4, 5], &json!(15), &json!(3)));
    assert_eq!(said["extra_elements"], 6);
    // Other ids: rows are matched by token.
    let moved = [("new", 0), ("z", 1), ("x", 2), ("y", 3)];
    language_model(&tuned, &[90.0, 3.0, 1.0, 2.5], 0.25, &moved);
    assert_eq!(chosen(dir.path(), "20").0, [3, 4, 5]);
    language_model(&tuned, &[3.0, 1.0, 2.5], 0.25, &[("z", 0), ("x", 1), ("y", 2)]);
    assert_eq!(chosen(dir.path(), "20").0, [3, 4, 5]);
    // Padding of the base that is trimmed counts as unchanged.
    language_model(&base, &[1.0, 2.0, 3.0, 7.0], 0.0, &[("x", 0), ("y", 1), ("z", 2)]);
    language_model(&tuned, &[1.0, 2.5, 3.0], 0.25, &[("x", 0), ("y", 1), ("z", 2)]);
    let (elements, said) = chosen(dir.path(), "17");
    assert_eq!((elements, &said["D"], &said["extra_elements"]), (vec![3, 4, 5], &json!(18), &json!(0)));
    // The output of apply has the rows and the tokens of the base.
    let at = |name: &str| dir.path().join(name).display().to_string();
    language_model(&base, &[1.0, 2.0, 3.0], 0.0, &[("x", 0), ("y", 1), ("z", 2)]);
    language_model(&tuned, &[90.0, 3.0, 1.0, 2.5], 0.25, &moved);
    chosen(dir.path(), "20");
    run(PROGRAM, ["apply", "--base", &at("base"), "--tuned", &at("tuned"), &at("m"), "--out", &at("kept")]).ok();
    let kept = read_checkpoint(Path::new(&at("kept")));
    assert_eq!(kept["model.embed_tokens.weight"].values(), [1.0, 1.0, 1.0, 2.5, 2.5, 2.5, 3.0, 3.0, 3.0]);
    assert_eq!(fs::read(at("kept/tokenizer.json")).unwrap(), fs::read(at("base/tokenizer.json")).unwrap());
}

#[test]
fn other_tokens_are_refused_or_warned_about() {
    let dir = tempfile::tempdir().unwrap();
    let [base, tuned] = ["base", "tuned"].map(|name| dir.path().join(name));
    let at = |name: &str| dir.path().join(name).display().to_string();
    let extract = || run(PROGRAM, ["extract", "--base", &at("base"), "--tuned", &at("tuned"), "--out", &at("m")]);
    language_model(&base, &[1.0, 2.0], 0.0, &[("x", 0), ("y", 1)]);
    language_model(&tuned, &[1.0, 2.0, 3.0], 1.0, &[("x", 0), ("other", 1), ("new", 2)]);
    let parts = [&at("tuned")[..], "the token \"y\"", "has no row", "tensor: model.embed_tokens.weight", "hint: "];
    extract().bad_input(&parts);
    expect_entries(dir.path(), &["base", "tuned"]);
    // Without a tokenizer rows cannot be matched.
    fs::remove_file(tuned.join("tokenizer.json")).unwrap();
    let parts = ["the vocabulary differs", "tensor: model.embed_tokens.weight", "found: [3, 3]", "tokenizer.json"];
    extract().bad_input(&parts);
    expect_entries(dir.path(), &["base", "tuned"]);
    // A renamed token at the same place is a warning.
    language_model(&tuned, &[1.0, 2.5], 1.0, &[("x", 0), ("other", 1)]);
    let line = ["extract", "--base", &at("base"), "--tuned", &at("tuned"), "--percent", "50", "--out", &at("m")];
    run(PROGRAM, line).ok().says(&["other tokens", "\"y\"", "by position"]);
}

#[test]
fn squared_gradients_follow_the_rows_of_the_tuned_model() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    language_model(&dir.path().join("base"), &[1.0, 2.0], 0.0, &[("x", 0), ("y", 1)]);
    language_model(&dir.path().join("tuned"), &[5.0, 1.0, 2.0], 1.0, &[("new", 0), ("x", 1), ("y", 2)]);
    let fisher = Tensors::from([
        ("model.embed_tokens.weight".to_owned(), Tensor::f32(&[3, 3], &[9.0, 9.0, 9.0, 0.0, 0.0, 0.0, 4.0, 4.0, 4.0])),
        ("model.layers.0.up.weight".to_owned(), Tensor::f32(&[2, 3], &[1.0; 6])),
    ]);
    write_safetensors(&dir.path().join("fisher.safetensors"), &fisher);
    let line = ["extract", "--base", &at("base"), "--tuned", &at("tuned"), "--fisher", &at("fisher.safetensors")];
    let more = ["--score", "fisher", "--percent", "25", "--out", &at("m")];
    run(PROGRAM, line.into_iter().chain(more)).ok();
    let mask = Mask::open(&dir.path().join("m")).unwrap();
    // A quarter of 12: the row of y.
    assert_eq!(mask.bits("model.embed_tokens.weight").unwrap(), [0b0011_1000]);
}

#[test]
fn names_that_differ_by_one_prefix_are_mapped() {
    let dir = tempfile::tempdir().unwrap();
    let (base, tuned) = (vec![1.0; 12], (0..12u8).map(f32::from).collect::<Vec<f32>>());
    write_checkpoint(&dir.path().join("a"), &model(&base));
    write_checkpoint(&dir.path().join("b"), &model(&tuned));
    let prefixed = model(&tuned).into_iter().map(|(name, tensor)| (format!("inner.{name}"), tensor)).collect();
    write_checkpoint(&dir.path().join("c"), &prefixed);
    assert_eq!(bits(dir.path(), "a", "c", "prefixed"), bits(dir.path(), "a", "b", "plain"));
}

#[test]
fn weights_that_are_no_numbers_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    write_checkpoint(&dir.path().join("base"), &model(&[1.0; 12]));
    write_checkpoint(&dir.path().join("tuned"), &model(&[2.0; 12]));
    let refused = |parts: &[&str]| {
        run(PROGRAM, ["extract", "--base", &at("base"), "--tuned", &at("tuned"), "--out", &at("m")]).bad_input(parts);
        expect_entries(dir.path(), &["base", "tuned"]);
    };
    for (method, hint) in
        [("gptq", "the model that was quantised"), ("awq", "quantised"), ("bitsandbytes", "dequantize()")]
    {
        let config = json!({"model_type": "llama", "quantization_config": {"quant_method": method, "bits": 4}});
        text(&dir.path().join("tuned/config.json"), &config);
        refused(&[&at("tuned"), "is quantised", method, hint]);
    }
    fs::rename(dir.path().join("tuned/model.safetensors"), dir.path().join("tuned/model.gguf")).unwrap();
    text(&dir.path().join("tuned/config.json"), &json!({"model_type": "llama"}));
    refused(&[&at("tuned"), "GGUF", "hint: "]);
    fs::rename(dir.path().join("tuned/model.gguf"), dir.path().join("tuned/pytorch_model.bin")).unwrap();
    refused(&[&at("tuned"), "pickled checkpoint", "hint: "]);
    // A parameter that is missing, and a scale.
    fs::remove_file(dir.path().join("tuned/pytorch_model.bin")).unwrap();
    let mut fewer = model(&[2.0; 12]);
    fewer.remove("model.norm.weight");
    write_safetensors(&dir.path().join("tuned/model.safetensors"), &fewer);
    refused(&[&at("tuned"), "tensor: model.norm.weight", "hint: "]);
    fs::remove_file(dir.path().join("tuned/model.safetensors")).unwrap();
    let mut eight = model(&[2.0; 12]);
    eight.insert("model.layers.0.up.weight".into(), Tensor::floats(Dtype::F8E4M3, &[4, 3], &[1.0; 12]));
    write_safetensors(&dir.path().join("tuned/model.safetensors"), &eight);
    text(&dir.path().join("tuned/config.json"), &json!({"quantization_config": {"quant_method": "fp8"}}));
    refused(&["tensor: model.layers.0.up.weight", "the scale of a weight in 8 bits is missing", "hint: "]);
}
