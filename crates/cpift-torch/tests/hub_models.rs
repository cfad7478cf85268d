//! Published checkpoints: every spelling of rotary settings, embeddings tied in
//! config.json only, names with prefixes.

mod golden;

use std::fs;
use std::path::{Path, PathBuf};

use cpift_core::format::checkpoint::read_config;
use cpift_core::{Checkpoint, Dtype};
use cpift_testkit::model::{tiny_weights, write_json, write_tiny_model};
use cpift_testkit::{Tensors, read_checkpoint, write_safetensors};
use cpift_torch::model::{CausalLM, ModelConfig};
use cpift_torch::session::{Precision, Session};
use cpift_torch::weights;
use golden::{Golden, batch, max_abs};
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
