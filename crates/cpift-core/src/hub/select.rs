//! The files of a repository that the programs read: safetensors weights with their index, and the
//! configuration, tokenizer, templates and code beside them.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use super::client::Failure;

/// Stems of weight files that come before all others in a directory.
const USUAL: [&str; 3] = ["model", "diffusion_pytorch_model", "pytorch_model"];
/// Weights of adapters, which may stand beside those of a model.
const ADAPTERS: [&str; 2] = ["adapter_model.safetensors", "pytorch_lora_weights.safetensors"];
/// Ends of weights in other formats, for messages.
const OTHER_WEIGHTS: [&str; 9] = [".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".onnx", ".h5", ".msgpack"];
/// Indices of directories with components: of sentence-transformers and of diffusers.
const COMPONENT_LISTS: [&str; 2] = ["modules.json", "model_index.json"];
const INDEX: &str = ".safetensors.index.json";

/// Files of a model that are needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Weights and all files beside them.
    Model,
    /// The files beside the weights: configuration, tokenizer, templates.
    Tokenizer,
}

/// The files that are needed of those of a repository, the weights last.
///
/// # Errors
/// If weights are needed and there are none in safetensors, or several sets of them.
pub(super) fn wanted<'a>(files: &[&'a str], need: Need) -> Result<Vec<&'a str>, Failure> {
    let has_components = files.iter().any(|file| COMPONENT_LISTS.contains(file));
    let folder = |file: &'a str| file.rsplit_once('/').map_or("", |(folder, _)| folder);
    let mut wanted: Vec<&str> = files.iter().copied().filter(|file| is_beside(file, has_components)).collect();
    if need == Need::Tokenizer {
        return Ok(wanted);
    }
    let folders: BTreeSet<&str> = files.iter().map(|file| folder(file)).collect();
    let mut weights = Vec::new();
    for one in folders.into_iter().filter(|one| one.is_empty() || has_components) {
        let inside: Vec<&str> = files.iter().copied().filter(|file| folder(file) == one).collect();
        weights.extend(weights_of(&inside, files.contains(&"model_index.json"))?);
    }
    if weights.is_empty() {
        let other = files.iter().find(|file| OTHER_WEIGHTS.iter().any(|end| file.ends_with(end)));
        let failure = Failure::lasting("no safetensors weights in this repository")
            .expected("model.safetensors or model.safetensors.index.json");
        return Err(match other {
            Some(other) => failure.found(*other).hint(
                "pull requests of the Hub often have them (NAME@refs/pr/N); or load the model in transformers and call \
                 save_pretrained",
            ),
            None => failure,
        });
    }
    weights.sort_unstable();
    wanted.extend(weights);
    Ok(wanted)
}

fn is_beside(file: &str, has_components: bool) -> bool {
    let name = file.rsplit('/').next().unwrap_or_default();
    if file.contains('/') && !has_components && !(file.starts_with("additional_chat_templates/")) {
        return false;
    }
    if name.starts_with('.') || name.ends_with(".index.json") {
        return false;
    }
    [".json", ".jinja", ".txt", ".model", ".tiktoken", ".py"].iter().any(|end| name.ends_with(end))
}

/// Stem of a weight file or an index: its name without the end and the number of a shard.
fn stem(name: &str) -> Option<&str> {
    let stem = name.strip_suffix(INDEX).or_else(|| name.strip_suffix(".safetensors"))?;
    let number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let shard = stem.rsplit_once("-of-").filter(|(_, count)| number(count));
    let first = shard.and_then(|(first, _)| first.rsplit_once('-')).filter(|(_, i)| number(i));
    Some(first.map_or(stem, |(stem, _)| stem))
}

/// Weights in one directory: those with the usual name, else the only set of files.
fn weights_of<'a>(files: &[&'a str], of_diffusers: bool) -> Result<Vec<&'a str>, Failure> {
    let name = |file: &&'a str| file.rsplit('/').next().unwrap_or_default();
    let (adapters, weights): (Vec<&str>, Vec<&str>) = files
        .iter()
        .copied()
        .filter(|file| stem(name(file)).is_some_and(|stem| !stem.starts_with('.')))
        .partition(|file| ADAPTERS.contains(&name(file)));
    let of = |one: &str| weights.iter().copied().filter(|file| stem(name(file)) == Some(one)).collect::<Vec<_>>();
    let stems: BTreeSet<&str> = weights.iter().filter_map(|file| stem(name(file))).collect();
    let mut chosen = match (USUAL.into_iter().find(|usual| stems.contains(usual)), stems.len()) {
        (Some(usual), _) => of(usual),
        // A copy of all components in one file.
        (None, _) if of_diffusers => Vec::new(),
        (None, 0 | 1) => weights.clone(),
        (None, _) if !adapters.is_empty() => Vec::new(),
        (None, _) => {
            return Err(Failure::lasting("several sets of weights, none of them with the usual name")
                .expected("model.safetensors, or one set of files")
                .found(stems.into_iter().collect::<Vec<_>>().join(", ")));
        }
    };
    // A single file comes before shards, as in transformers.
    if let Some(single) =
        chosen.iter().copied().find(|file| USUAL.iter().any(|u| name(file) == format!("{u}.safetensors")))
    {
        chosen = vec![single];
    }
    chosen.extend(adapters);
    Ok(chosen)
}

/// A description of what a snapshot in the cache lacks; none if it is complete as far as its own
/// files tell.
pub(super) fn missing(snapshot: &Path, need: Need) -> Option<String> {
    let mut files = Vec::new();
    if let Some(broken) = list(snapshot, "", &mut files) {
        return Some(broken);
    }
    let has = |name: &str| files.iter().any(|file| file == name);
    if need == Need::Tokenizer {
        const TOKENIZERS: [&str; 8] = [
            "tokenizer.json",
            "tokenizer.model",
            "vocab.json",
            "vocab.txt",
            "spiece.model",
            "sentencepiece.bpe.model",
            "tokenizer_config.json",
            "tekken.json",
        ];
        return (!TOKENIZERS.into_iter().any(has)).then(|| "a tokenizer".to_owned());
    }
    for index in files.iter().filter(|file| file.ends_with(INDEX)) {
        let folder = index.rsplit_once('/').map_or(String::new(), |(folder, _)| format!("{folder}/"));
        // An index is not read if there is a single file of its name.
        if has(&index.replace(INDEX, ".safetensors")) {
            continue;
        }
        let text = fs::read_to_string(snapshot.join(index)).unwrap_or_default();
        let parsed: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
        let shards = parsed["weight_map"].as_object().into_iter().flatten().filter_map(|(_, file)| file.as_str());
        let absent = shards.collect::<BTreeSet<_>>().into_iter().find(|shard| !has(&format!("{folder}{shard}")));
        if let Some(shard) = absent {
            return Some(format!("the shard {folder}{shard}"));
        }
    }
    let weights = files.iter().any(|file| file.ends_with(".safetensors"));
    (!weights).then(|| "weights in safetensors".to_owned())
}

/// Adds the files below `folder`; returns the first link without its blob.
fn list(folder: &Path, below: &str, files: &mut Vec<String>) -> Option<String> {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        let (path, place) = (entry.path(), format!("{below}{name}"));
        if path.is_dir() {
            if let Some(broken) = list(&path, &format!("{place}/"), files) {
                return Some(broken);
            }
        } else if path.exists() {
            files.push(place);
        } else {
            return Some(place);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wants(files: &[&str]) -> Vec<String> {
        wanted(files, Need::Model)
            .unwrap_or_else(|e| panic!("{}", e.about("x")))
            .iter()
            .map(|f| f.to_string())
            .collect()
    }

    #[test]
    fn weights_come_with_their_index_and_the_files_beside_them() {
        let shards =
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"];
        let beside = ["config.json", "tokenizer.model", "modeling_x.py", "chat_template.jinja", "merges.txt"];
        let more = [
            "README.md",
            ".gitattributes",
            "consolidated.safetensors",
            "pytorch_model.bin",
            "pytorch_model.bin.index.json",
            "model.fp16.safetensors",
            "original/params.json",
            "onnx/model.onnx",
            "checkpoint-5/model.safetensors",
        ];
        let all: Vec<&str> = beside.iter().chain(&more).chain(&shards).copied().collect();
        assert_eq!(wants(&all), [&beside[..], &shards[..]].concat());
        assert_eq!(wanted(&all, Need::Tokenizer).ok().unwrap(), beside);
        let both = [&["model.safetensors"][..], &shards[..]].concat();
        assert_eq!(wants(&both), ["model.safetensors"]);
    }

    #[test]
    fn adapters_components_and_single_files_are_found() {
        let adapter = ["adapter_config.json", "adapter_model.safetensors"];
        assert_eq!(wants(&adapter), adapter);
        assert_eq!(wants(&["consolidated.safetensors"]), ["consolidated.safetensors"]);
        let pipeline = [
            "model_index.json",
            "sd.safetensors",
            "unet/config.json",
            "unet/diffusion_pytorch_model.safetensors",
            "unet/diffusion_pytorch_model.fp16.safetensors",
        ];
        let expected = ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"];
        assert_eq!(wants(&pipeline), expected);
        for refused in [&["a.safetensors", "b.safetensors"][..], &["config.json", "pytorch_model.bin"], &[]] {
            assert!(wanted(refused, Need::Model).is_err(), "{refused:?}");
        }
    }
}
