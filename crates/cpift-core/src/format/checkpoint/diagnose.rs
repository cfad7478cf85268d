//! Errors for files that are not a readable checkpoint, with a hint for each case: adapters, other
//! formats, incomplete downloads.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::BadInput;

/// Weights in other formats: end of the file name, description, hint.
const FORMATS: [(&str, &str, &str); 6] = [
    (".gguf", "GGUF weights of llama.cpp", "use the safetensors repository they were converted from"),
    (".ggml", "GGML weights of llama.cpp", "use the safetensors repository they were converted from"),
    (".onnx", "an ONNX export", "use the safetensors repository it was exported from"),
    (".h5", "TensorFlow weights", "load them in transformers 4 with from_tf=True and call save_pretrained"),
    (".msgpack", "Flax weights", "load them in transformers 4 with from_flax=True and call save_pretrained"),
    (".npz", "NumPy weights", "use the safetensors repository of the model"),
];

/// Error for a directory with neither model.safetensors nor an index.
pub(super) fn no_weights(folder: &Path) -> BadInput {
    if let Some(adapter) = adapter(folder) {
        return adapter;
    }
    let error = BadInput::new(folder, "no weights in this directory")
        .expected("model.safetensors or model.safetensors.index.json");
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path()).collect();
    paths.sort();
    let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let names: Vec<String> = paths.iter().map(|path| name(path)).collect();
    let first = |is: &dyn Fn(&str) -> bool| names.iter().find(|name| is(name));
    if let Some((shard, stem)) = names.iter().find_map(|name| Some((name, stem_of_shard(name)?))) {
        return error
            .found(format!("the shard {shard} without {stem}.safetensors.index.json"))
            .hint("download or copy the index and all shards of the checkpoint");
    }
    if let Some(own) = first(&|n| n.starts_with("consolidated") && (n.ends_with(".safetensors") || n.ends_with(".pth")))
    {
        return error.found(format!("{own}, weights under the names of the publisher's own code")).hint(
            "download the files in transformers format (model*.safetensors), or make them with the model's \
             convert_*_weights_to_hf.py script from transformers",
        );
    }
    let variant =
        |n: &str| n.starts_with("model.") && (n.ends_with(".safetensors") || n.contains(".safetensors.index."));
    if let Some(variant) = first(&variant) {
        return error.found(format!("the variant {variant}")).hint(
            "transformers loads only the plain name: rename it to model.safetensors (for shards, the index to \
             model.safetensors.index.json), or save the model without variant=",
        );
    }
    for (end, what, hint) in FORMATS {
        if let Some(other) = first(&|n| n.to_ascii_lowercase().ends_with(end)) {
            return error.found(format!("{what} ({other})")).hint(hint);
        }
    }
    if let Some(pickle) = paths.iter().find(|path| is_pickle(path)) {
        return refuse_pickle(error, pickle);
    }
    if let Some(other) = first(&|n| n.ends_with(".safetensors")) {
        return error.found(other.as_str()).hint("if it is the whole model, rename it to model.safetensors");
    }
    let has_weights = |path: &PathBuf| {
        path.join("config.json").exists()
            && (path.join("model.safetensors").exists() || path.join("model.safetensors.index.json").exists())
    };
    let below = paths.iter().flat_map(|path| [path.clone()].into_iter().chain(subfolders(path))).find(has_weights);
    match below {
        Some(model) => error.found("a directory of checkpoints").hint(format!("one of them is {}", model.display())),
        None => error,
    }
}

/// `model` of `model-00001-of-00002.safetensors`; `None` for other names.
fn stem_of_shard(name: &str) -> Option<&str> {
    let (first, _) = name.strip_suffix(".safetensors")?.rsplit_once("-of-")?;
    first.rsplit_once('-').map(|(stem, _)| stem).filter(|stem| !stem.contains('.'))
}

/// Subdirectories of `folder`, such as the snapshots of a Hub cache.
fn subfolders(folder: &Path) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path()).collect();
    all.retain(|path| path.is_dir());
    all.sort();
    all
}

/// Error for a directory that contains an adapter instead of a model; none if there is no adapter.
pub(super) fn adapter(folder: &Path) -> Option<BadInput> {
    const FILES: [&str; 3] = ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"];
    let file = FILES.into_iter().find(|name| folder.join(name).exists())?;
    let config = std::fs::read_to_string(folder.join(FILES[0])).ok();
    let config: Value = config.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default();
    let text = |key: &str| config.get(key).and_then(Value::as_str);
    let kind = text("peft_type").map_or("an adapter".to_owned(), |kind| format!("a {kind} adapter"));
    let base = text("base_model_name_or_path").unwrap_or("a base that adapter_config.json does not name");
    Some(
        BadInput::new(folder, format!("{kind}, not a model"))
            .expected("config.json with model.safetensors or model.safetensors.index.json")
            .found(format!("{file}: an adapter of {base}"))
            .hint(merge_hint(base)),
    )
}

fn merge_hint(base: &str) -> String {
    format!(
        "cpift-merge, cpift-mask and cpift-eval take MODEL+ADAPTER and merge it while it is read; other programs need it merged: \
         PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(dir), where model is {base}"
    )
}

/// Returns true if `name` is a tensor of a PEFT adapter. Our own training states also contain
/// low-rank adapters, but name them after their weight (`q_proj.weight.lora_A`); those are read as
/// tensors.
pub(super) fn is_adapter_tensor(name: &str) -> bool {
    if name.contains(".weight.lora_") {
        return false;
    }
    const PARTS: [&str; 6] =
        ["lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "base_layer"];
    name.split('.').any(|part| PARTS.contains(&part))
}

/// Error for an adapter tensor in the checkpoint at `root`.
pub(super) fn adapter_tensor(root: &Path, file: &Path, name: &str) -> BadInput {
    let folder = if root.is_dir() { root } else { root.parent().unwrap_or(root) };
    let known = adapter(folder).is_some();
    let message = if known { "an adapter, not a model" } else { "a model with an adapter that is not merged" };
    BadInput::new(file, message).tensor(name).expected("the tensors of a model").hint(merge_hint("its base"))
}

/// Returns true if `name` is that of a file of weights, in any format, or of an index of shards.
pub(super) fn is_weights(name: &str) -> bool {
    const OTHERS: [&str; 8] = [".safetensors", ".ot", ".tflite", ".mlmodel", ".onnx_data", ".npy", ".engine", ".pte"];
    let lower = name.to_ascii_lowercase();
    is_pickle(Path::new(name))
        || lower.contains(".safetensors.index.")
        || OTHERS.iter().any(|end| lower.ends_with(end))
        || FORMATS.iter().any(|(end, ..)| lower.ends_with(end))
}

/// Returns true if `folder` directly contains a file of weights.
pub(super) fn has_weights(folder: &Path) -> bool {
    let mut names = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.file_name());
    names.any(|name| name.to_str().is_some_and(is_weights))
}

/// Returns true for names of PyTorch pickles, which can run code when they are loaded.
pub(super) fn is_pickle(path: &Path) -> bool {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    let index = path.to_string_lossy().ends_with(".bin.index.json");
    index || ["bin", "pt", "pth", "ckpt", "pkl"].iter().any(|known| extension.eq_ignore_ascii_case(known))
}

pub(super) fn refuse_pickle(error: BadInput, pickle: &Path) -> BadInput {
    let name = pickle.file_name().unwrap_or_default().display();
    error.found(format!("a pickled checkpoint ({name}), which is never opened: reading it could run code")).hint(
        "if you trust it, convert it: load it in transformers and call save_pretrained(dir, \
         safe_serialization=True), or torch.load(file, weights_only=True) and safetensors.torch.save_file",
    )
}

#[cfg(test)]
mod tests {
    use std::fs;

    /// Message for the directory of a transformers model with these files.
    fn message(files: &[(&str, &str)]) -> String {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), r#"{"model_type": "llama"}"#).unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        crate::Checkpoint::open(dir.path()).err().expect("it has no weights").to_string()
    }

    #[test]
    fn files_found_instead_of_weights_are_reported() {
        for (file, part) in [
            (
                "model-00001-of-00002.safetensors",
                "the shard model-00001-of-00002.safetensors without model.safetensors.index.json",
            ),
            (
                "diffusion_pytorch_model-00001-of-00002.safetensors",
                "without diffusion_pytorch_model.safetensors.index.json",
            ),
            ("consolidated.safetensors", "consolidated.safetensors, weights under the names"),
            ("consolidated.00.pth", "consolidated.00.pth, weights under the names"),
            ("model.fp16.safetensors", "the variant model.fp16.safetensors"),
            ("model.fp16-00001-of-00002.safetensors", "the variant model.fp16-00001-of-00002.safetensors"),
            ("model.safetensors.index.fp16.json", "the variant model.safetensors.index.fp16.json"),
            ("model-q8_0.gguf", "GGUF weights of llama.cpp (model-q8_0.gguf)"),
            ("tf_model.h5", "TensorFlow weights (tf_model.h5)"),
            ("flax_model.msgpack", "Flax weights (flax_model.msgpack)"),
            ("pytorch_model.bin", "a pickled checkpoint (pytorch_model.bin)"),
            ("pytorch_model.bin.index.json", "a pickled checkpoint"),
            ("diffusion.safetensors", "rename it to model.safetensors"),
        ] {
            let said = message(&[(file, "x")]);
            assert!(said.contains("no weights in this directory") && said.contains(part), "{file}: {said}");
            assert!(said.contains("hint: "), "{file}: {said}");
        }
        assert!(!message(&[]).contains("found"));
    }

    #[test]
    fn for_a_directory_of_checkpoints_the_hint_is_one_of_them() {
        for place in ["checkpoint-20", "snapshots/0123"] {
            let said =
                message(&[(&format!("{place}/config.json"), "{}"), (&format!("{place}/model.safetensors"), "x")]);
            assert!(said.contains("hint: one of them is ") && said.contains(place), "{said}");
        }
    }

    #[test]
    fn an_adapter_is_reported_with_its_base() {
        let config = r#"{"peft_type": "LORA", "base_model_name_or_path": "org/base"}"#;
        let said = message(&[("adapter_config.json", config), ("adapter_model.safetensors", "x")]);
        assert!(said.contains("a LORA adapter, not a model") && said.contains("an adapter of org/base"), "{said}");
        assert!(said.contains("merge_and_unload"), "{said}");
        assert!(message(&[("adapter_model.bin", "x")]).contains("an adapter, not a model"));
        assert!(message(&[("adapter_config.json", "not JSON")]).contains("an adapter, not a model"));
    }
}
