//! Published checkpoints: every spelling of rotary settings, embeddings tied in
//! config.json only, names with prefixes.

use std::fs;
use std::path::{Path, PathBuf};

use crate::golden::{Golden, batch, max_abs};
use cpift_core::format::checkpoint::read_config;
use cpift_core::{Checkpoint, Dtype};
use cpift_testkit::model::{tiny_weights, write_json, write_tiny_model};
use cpift_testkit::{Tensors, read_checkpoint, write_safetensors};
use cpift_torch::model::{CausalLM, ModelConfig};
use cpift_torch::session::{Precision, Session};
use cpift_torch::weights;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor, no_grad};

const HEAD: &str = "lm_head.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";

fn golden_folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/golden").join(name)
}

/// Logits of the golden model `name` under `config`, with the attention of the blocks `silent` left
/// out.
fn logits(name: &str, config: &Value, silent: &[usize]) -> Tensor {
    let folder = golden_folder(name);
    let config = ModelConfig::from_json(&folder, config).unwrap();
    let parameters = weights::load(&Checkpoint::open(&folder).unwrap(), Kind::Float, Device::Cpu).unwrap();
    for layer in silent {
        let mut weight = parameters[&format!("model.layers.{layer}.self_attn.o_proj.weight")].shallow_clone();
        let _ = no_grad(|| weight.zero_());
    }
    let model = CausalLM::new(config, &parameters, &folder, Kind::Float).unwrap();
    let all = batch(&Golden::named(name).documents());
    no_grad(|| model.logits(&model.hidden(&all.ids_bs, &model.documents(&all.lengths), None)).squeeze_dim(0))
}

/// `config` with other rotary fields.
fn respelt(config: &Value, fields: Value) -> Value {
    let mut config = config.clone();
    let map = config.as_object_mut().unwrap();
    map.retain(|key, _| !key.starts_with("rope_"));
    map.extend(fields.as_object().unwrap().clone());
    config
}

#[test]
fn every_spelling_of_rotary_settings_gives_the_logits_of_transformers() {
    for name in ["llama/rope_llama3", "llama/rope_linear", "llama/rope_yarn", "llama/rope_dynamic", "llama/gqa_untied"]
    {
        let config = read_config(&golden_folder(name)).unwrap();
        let nested = config.get("rope_parameters").or(config.get("rope_scaling")).unwrap().as_object().unwrap();
        let mut settings = nested.clone();
        let theta = settings.remove("rope_theta").unwrap_or_else(|| config["rope_theta"].clone());
        let kind = settings.remove("rope_type").or_else(|| settings.remove("type")).unwrap();
        let with = |more: &[(&str, &Value)]| {
            let mut map = settings.clone();
            map.extend(more.iter().map(|(key, value)| ((*key).to_owned(), (*value).clone())));
            Value::from(map)
        };
        let all = with(&[("rope_type", &kind), ("rope_theta", &theta)]);
        let expected = Golden::named(name).logits();
        for fields in [
            json!({"rope_theta": theta, "rope_scaling": with(&[("type", &kind)])}),
            json!({"rope_theta": theta, "rope_scaling": with(&[("rope_type", &kind)])}),
            json!({"rope_scaling": all}),
            json!({"rope_parameters": all}),
            json!({"rope_scaling": {}, "rope_theta": theta, "rope_parameters": with(&[("rope_type", &kind)])}),
            json!({"rope_parameters": {"full_attention": all}}),
            json!({"rope_theta": theta, "rope_parameters": {"full_attention": with(&[("type", &kind)])}}),
        ] {
            let off = max_abs(&(logits(name, &respelt(&config, fields.clone()), &[]) - &expected));
            assert!(off <= 1e-4, "{name} with {fields}: logits differ by {off}");
        }
    }
}

#[test]
fn each_layer_type_rotates_by_its_own_settings() {
    // Blocks 0 and 2 slide, block 1 does not.
    let (name, config) = ("models/gemma2", read_config(&golden_folder("models/gemma2")).unwrap());
    let (local, global) = (
        json!({"rope_type": "default", "rope_theta": 100.0}),
        json!({"rope_type": "linear", "factor": 4.0, "rope_theta": 7e3}),
    );
    let both = json!({"rope_parameters": {"sliding_attention": local, "full_attention": global}});
    let run = |fields: &Value, silent: &[usize]| logits(name, &respelt(&config, fields.clone()), silent);
    let (only_local, only_global) = (json!({"rope_parameters": local}), json!({"rope_parameters": global}));
    assert_eq!(run(&both, &[1]), run(&only_local, &[1]));
    assert_eq!(run(&both, &[0, 2]), run(&only_global, &[0, 2]));
    assert!(max_abs(&(run(&both, &[]) - run(&only_local, &[]))) > 1e-3);
    assert!(max_abs(&(run(&both, &[]) - run(&only_global, &[]))) > 1e-3);
}

/// The golden Gemma 3 as the text model of a model with a vision tower: names and config.json as
/// Google publishes them, or as transformers 4.52 wrote them.
fn with_vision(folder: &Path, base: &str) -> PathBuf {
    let source = golden_folder("models/gemma3");
    fs::create_dir_all(folder).unwrap();
    let mut text = read_config(&source).unwrap();
    let object = text.as_object_mut().unwrap();
    object.retain(|key, _| !["architectures", "dtype", "tie_word_embeddings"].contains(&key.as_str()));
    // Absent as in the published file.
    assert_eq!(object.remove("max_position_embeddings"), Some(json!(64)));
    let vision = json!({"hidden_size": 8, "model_type": "siglip_vision_model"});
    let config = json!({"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text,
        "vision_config": vision, "boi_token_index": 98, "eoi_token_index": 99, "image_token_index": 100,
        "mm_tokens_per_image": 4, "torch_dtype": "float32", "initializer_range": 0.02});
    write_json(&folder.join("config.json"), &config);
    let mut tensors: Tensors =
        read_checkpoint(&source).into_iter().map(|(name, tensor)| (name.replacen("model.", base, 1), tensor)).collect();
    let vision = tiny_weights(3)[EMBEDDING].clone();
    tensors.insert("vision_tower.vision_model.head.weight".into(), vision.clone());
    tensors.insert("multi_modal_projector.mm_input_projection_weight".into(), vision);
    write_safetensors(&folder.join("model.safetensors"), &tensors);
    fs::write(folder.join("preprocessor_config.json"), "{}").unwrap();
    // Any tokenizer serves.
    let tokenizer = write_tiny_model(&folder.join("tokenizer"), 1);
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        if tokenizer.join(name).exists() {
            fs::rename(tokenizer.join(name), folder.join(name)).unwrap();
        }
    }
    fs::remove_dir_all(tokenizer).unwrap();
    folder.to_owned()
}

#[test]
fn the_text_model_of_a_model_with_a_vision_tower_is_trained_and_the_rest_is_copied() {
    let dir = tempfile::tempdir().unwrap();
    let expected = Golden::named("models/gemma3").logits();
    for base in ["language_model.model.", "model.language_model."] {
        let session = open(&with_vision(&dir.path().join(base), base));
        let all = batch(&Golden::named("models/gemma3").documents());
        let model = &session.model;
        let logits =
            no_grad(|| model.logits(&model.hidden(&all.ids_bs, &model.documents(&all.lengths), None)).squeeze_dim(0));
        let off = max_abs(&(logits - &expected));
        assert!(off <= 1e-4, "{base}: logits differ by {off}");
        assert!(session.parameters.keys().all(|name| name.starts_with(base)), "{base}");
        no_grad(|| session.parameters.values().for_each(|weight| drop(weight.shallow_clone().g_add_scalar_(0.5))));
        let saved = dir.path().join(format!("{base}saved"));
        fs::create_dir(&saved).unwrap();
        session.save(Some(&saved), Dtype::BF16).unwrap();
        let (before, after) = (read_checkpoint(&session.folder), read_checkpoint(&saved));
        assert!(before.keys().eq(after.keys()), "{base}: the names of the source");
        for (name, tensor) in &before {
            // Parts other than the text model keep their dtype too.
            let same = (tensor.dtype, &tensor.bytes) == (after[name].dtype, &after[name].bytes);
            assert_eq!(same, !name.starts_with(base), "{base}: {name}");
        }
        assert!(saved.join("preprocessor_config.json").exists(), "{base}");
    }
}

/// A tiny model whose config ties the embeddings, with these weights.
fn tied(folder: &Path, weights: &Tensors) -> PathBuf {
    write_tiny_model(folder, 1);
    fs::remove_file(folder.join("model.safetensors")).unwrap();
    write_safetensors(&folder.join("model.safetensors"), weights);
    folder.to_owned()
}

fn open(folder: &Path) -> Session {
    Session::open(folder, None, Device::Cpu, Precision::F32).unwrap()
}

fn first_logits(session: &Session) -> Tensor {
    let ids = Tensor::from_slice(&[72i64, 105, 33]).unsqueeze(0);
    no_grad(|| session.model.logits(&session.model.hidden(&ids, &session.model.documents(&[3]), None)))
}

/// The tiny weights with another output embedding.
fn with_head() -> Tensors {
    let mut weights = tiny_weights(1);
    weights.insert(HEAD.into(), tiny_weights(2)[EMBEDDING].clone());
    weights
}

#[test]
fn a_head_of_its_own_under_a_tied_config_is_a_parameter_and_is_saved_as_one() {
    let dir = tempfile::tempdir().unwrap();
    let session = open(&tied(&dir.path().join("own"), &with_head()));
    assert!(session.parameters.contains_key(HEAD) && !session.model.config.tie_word_embeddings);
    // The same as a config that says so.
    let untied = tied(&dir.path().join("untied"), &with_head());
    let mut config = read_config(&untied).unwrap();
    config["tie_word_embeddings"] = json!(false);
    write_json(&untied.join("config.json"), &config);
    assert_eq!(first_logits(&session), first_logits(&open(&untied)));
    let saved = dir.path().join("saved");
    fs::create_dir(&saved).unwrap();
    session.save(Some(&saved), Dtype::F32).unwrap();
    assert_eq!(read_config(&saved).unwrap()["tie_word_embeddings"], json!(false));
    assert_eq!(read_checkpoint(&saved)[HEAD].values(), with_head()[HEAD].values());
    assert_eq!(first_logits(&open(&saved)), first_logits(&session));
}

#[test]
fn a_tied_head_is_the_embedding_under_either_name_or_both() {
    let dir = tempfile::tempdir().unwrap();
    let expected = first_logits(&open(&tied(&dir.path().join("plain"), &tiny_weights(1))));
    let mut both = tiny_weights(1);
    both.insert(HEAD.into(), both[EMBEDDING].clone());
    let mut head_only = tiny_weights(1);
    let embedding = head_only.remove(EMBEDDING).unwrap();
    head_only.insert(HEAD.into(), embedding);
    for (name, weights) in [("both", both), ("head_only", head_only)] {
        let session = open(&tied(&dir.path().join(name), &weights));
        assert!(session.model.config.tie_word_embeddings && !session.parameters.contains_key(HEAD), "{name}");
        assert_eq!(first_logits(&session), expected, "{name}");
        let saved = dir.path().join(format!("{name}.saved"));
        fs::create_dir(&saved).unwrap();
        session.save(Some(&saved), Dtype::F32).unwrap();
        assert!(
            read_checkpoint(&saved).contains_key(EMBEDDING) && !read_checkpoint(&saved).contains_key(HEAD),
            "{name}"
        );
        assert_eq!(read_config(&saved).unwrap()["tie_word_embeddings"], json!(true), "{name}");
    }
}

#[test]
fn prefixes_of_wrappers_are_left_out_and_not_saved() {
    let dir = tempfile::tempdir().unwrap();
    let expected = first_logits(&open(&tied(&dir.path().join("plain"), &tiny_weights(1))));
    for prefix in ["_orig_mod.", "module._orig_mod.", "base_model.model."] {
        let weights = tiny_weights(1).into_iter().map(|(name, t)| (format!("{prefix}{name}"), t)).collect();
        let session = open(&tied(&dir.path().join(prefix), &weights));
        assert_eq!(first_logits(&session), expected, "{prefix}");
        let saved = dir.path().join(format!("{prefix}saved"));
        fs::create_dir(&saved).unwrap();
        session.save(Some(&saved), Dtype::F32).unwrap();
        assert_eq!(read_checkpoint(&saved).keys().collect::<Vec<_>>(), tiny_weights(1).keys().collect::<Vec<_>>());
    }
}
