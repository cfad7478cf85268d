//! Recipes that are refused, with messages that name the place in the file.

use std::path::Path;

use cpift_core::{BadInput, Dtype};
use cpift_merge::Request;
use cpift_merge::recipe::{parse, read, write};

use crate::{SLERP, linear, parsed, paths, refused, ties};

#[test]
fn unknown_keys_are_named() {
    let wrong = ties("").replace("weight: 1.0", "wieght: 1.0");
    refused(&wrong, &["models[1].parameters.wieght: is not a known key", "weight, density", "did you mean weight?"]);
    refused(&ties("merge_metod: ties\n"), &["merge_metod", "did you mean merge_method?"]);
    refused(&ties("parameters: {normalise: true}\n"), &["parameters.normalise", "did you mean normalize?"]);
    let filter = ties("").replace("- filter: mlp", "- fitler: mlp");
    refused(&filter, &["models[2].parameters.weight[0].fitler", "did you mean filter?"]);
}

#[test]
fn keys_written_twice_are_refused() {
    refused(&ties("base_model: other\n"), &["duplicate mapping key: base_model at line "]);
}

#[test]
fn values_out_of_range_are_refused() {
    let t = |t: &str| SLERP.replace("value: 0.5 #", &format!("value: {t} #"));
    for value in ["1.01", "-0.1", "[0, 2]"] {
        refused(&t(value), &["parameters.t[2].value", "is out of range", "0 to 1"]);
    }
    for value in [".nan", ".inf", "x", "true", "[]", "{}"] {
        refused(&t(value), &[]);
    }
    refused(&ties("").replace("0.33", "33"), &["models[2].parameters.density: is out of range"]);
    refused(&ties("parameters: {normalize: 2}\n"), &["parameters.normalize", "true or false"]);
    refused(&ties("parameters: {lambda: [1, {value: 2}]}\n"), &["parameters.lambda[0]", "filter, value"]);
}

#[test]
fn missing_keys_are_named() {
    refused("", &["r.yml"]);
    refused("merge_method: linear\n", &["expected: models or slices"]);
    refused("models: [{model: a}]\n", &["expected: merge_method"]);
    refused("merge_method: linear\nmodels: []\n", &["models", "a list with at least one entry"]);
    refused("merge_method: magic\nmodels: [{model: a}]\n", &["merge_method", "karcher", "\"magic\""]);
    refused(&ties("").replace("base_model: base", ""), &["ties needs a base_model"]);
    refused(&linear("").replace("weight: 1", "normalize: true"), &["no weight for the model a"]);
    refused("{merge_method: slerp, base_model: a, models: [{model: b}]}", &["slerp needs a parameter", "t: ..."]);
    refused("{merge_method: linear, parameters: {weight: 1}, models: [{model: a}]}", &["at least 2 models"]);
    refused("{merge_method: ties, base_model: a, models: [{model: a}]}", &["at least 1 models"]);
    refused(&linear("").replace("model: b", "model: a"), &["models[1]: is listed twice"]);
    refused("{merge_method: nearswap, base_model: a, models: [{model: b}]}", &["nearswap needs a parameter", "t: ..."]);
    refused("{merge_method: passthrough, models: [{model: a}, {model: b}]}", &["passthrough merges exactly 1 models"]);
    refused("{merge_method: model_stock, base_model: a, models: [{model: b}]}", &["at least 2 models besides"]);
    refused(&linear("slices: [{}]\n"), &["slices: cannot be given together with models"]);
}

/// A linear merge of `a` and `b` by these slices, each `[range of a, range of b]`.
fn slices(ranges: &[[&str; 2]], more: &str) -> String {
    let slice = |[a, b]: &[&str; 2]| {
        format!("  - sources: [{{model: a, layer_range: {a}}}, {{model: b, layer_range: {b}}}]\n{more}")
    };
    let slices: String = ranges.iter().map(slice).collect();
    format!("merge_method: linear\nparameters: {{weight: 1}}\nslices:\n{slices}")
}

#[test]
fn ranges_of_layers_are_checked() {
    let request = parsed(&slices(&[["[0, 3]"; 2], ["[3, 8]"; 2]], ""));
    assert_eq!((paths(&request), request.slices.len()), (vec!["a", "b"], 2));
    for range in ["[3, 3]", "[0]", "[0, 1, 2]", "[0, -1]", "[0, 1.5]", "3"] {
        refused(&slices(&[[range; 2]], ""), &["slices[0].sources[0].layer_range"]);
    }
    let unequal = slices(&[["[0, 3]", "[1, 5]"]], "");
    refused(&unequal, &["slices[0].sources[1]: takes another number of layers", "expected: 3", "found: 4"]);
    let bases = "{merge_method: ties, parameters: {weight: 1}, slices: [
        {base_model: a, sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [0, 1]}]},
        {base_model: b, sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [0, 1]}]}]}";
    refused(bases, &["slices with different bases are not supported"]);
    refused(&bases.replace("base_model: a", "base_model: z"), &["the base_model must be among the sources"]);
}

#[test]
fn hostile_text_is_refused_quickly() {
    let bomb: String =
        (1..12).map(|i| format!("k{i}: &k{i} [{}]\n", vec![format!("*k{}", i - 1); 10].join(","))).collect();
    refused(&format!("k0: &k0 x\n{bomb}"), &[]);
    refused(&"[".repeat(100_000), &[]);
    refused(&"- ".repeat(100_000), &[]);
    refused(&format!("a: {}", "x".repeat(1 << 20)), &["too long"]);
    refused(&format!("{}: 1", "k".repeat(1000)), &["a key is missing"]);
    refused("a: 1\n---\nb: 2\n", &[]);
    refused("merges: []\n", &[]);
    refused("merges: 3\n", &[]);
    refused("\u{0}\u{1}", &[]);
    refused("? [a, b]\n: 1\n", &[]);
}

#[test]
fn mutilated_recipes_are_read_or_refused() {
    let own = "    base_model: b\n    parameters: {weight: [{filter: mlp, value: [1, 2]}, {value: 3}]}\n";
    let whole = [
        SLERP.to_owned(),
        ties("tokenizer: {source: base}\ncpift: {protect: p}\n"),
        slices(&[["[0, 3]"; 2]; 2], own),
        SLERP.to_owned() + "chat_template: llama3\ncpift: {epsilon: 0.1, mask: m}\n",
        ties("chat_template: auto\n").replace("ties", "della").replace("density: 0.33", "epsilon: 0.2"),
        ties("").replace("ties", "nuslerp").replace("filter: mlp", "filter: '*'"),
    ];
    let mut state = 1u64;
    let mut next = |bound: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % bound
    };
    let mut read = 0;
    for round in 0..6000 {
        let mut text: Vec<char> = whole[round % whole.len()].chars().collect();
        for _ in 0..=next(3) {
            let (at, other) = (next(text.len()), next(text.len()));
            match next(4) {
                0 => drop(text.drain(at..(at + next(20)).min(text.len()))),
                1 => text.swap(at, other),
                2 => text[at] = [':', '-', '[', '{', '\'', '"', '&', '*', '!', '\n', ' ', '9', '\u{0}', 'é'][next(14)],
                _ => text.splice(at..at, text[other..].to_vec()).for_each(drop),
            }
            text.push('\n');
        }
        let text: String = text.into_iter().collect();
        match parse(&text, Path::new("r.yml")) {
            Ok(request) => {
                let dtype = request.dtype.unwrap_or(Dtype::BF16);
                let again = write(&request, dtype);
                assert_eq!(parsed(&again), Request { dtype: Some(dtype), ..request }, "{text}\n{again}");
                read += 1;
            }
            Err(error) => assert!(error.downcast_ref::<BadInput>().is_some(), "{error:?}"),
        }
    }
    assert!(read > 100, "{read} of the recipes were still readable");
}

#[test]
fn files_that_are_not_recipes_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("r.yml");
    let error = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        let error = read(&path).unwrap_err();
        assert!(error.downcast_ref::<BadInput>().is_some());
        error.to_string()
    };
    assert!(error(b"\xff\xfe").contains("is not UTF-8 text"));
    assert!(error(&vec![b' '; (1 << 20) + 1]).contains("too long"));
    std::fs::remove_file(&path).unwrap();
    assert!(read(&path).unwrap_err().downcast_ref::<BadInput>().is_some());
}

/// Reads the recipe `text` in a directory with the models `a` and `b`, which have `layers` layers.
fn on_disk(text: &str, layers: usize) -> Result<Request, String> {
    let dir = tempfile::tempdir().unwrap();
    for model in ["a", "b"] {
        std::fs::create_dir(dir.path().join(model)).unwrap();
        std::fs::write(dir.path().join(model).join("config.json"), format!("{{\"num_hidden_layers\": {layers}}}"))
            .unwrap();
    }
    let recipe = dir.path().join("r.yml");
    std::fs::write(&recipe, text.replace("model: ", &format!("model: {}/", dir.path().display()))).unwrap();
    read(&recipe).map_err(|e| e.to_string())
}

#[test]
fn directories_and_layers_are_checked_on_disk() {
    assert!(on_disk(SLERP, 32).unwrap().slices.is_empty(), "one slice of all layers is a merge of models");
    assert_eq!(on_disk(SLERP, 40).unwrap().slices.len(), 1);
    let error = on_disk(&linear("").replace("{model: b}", "{model: c}"), 1).unwrap_err();
    assert!(error.contains("names a model that does not exist"), "{error}");
}

#[test]
fn missing_models_come_with_a_hint() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("r.yml");
    let hint = |model: &str| {
        std::fs::write(&path, linear("").replace("{model: a}", &format!("{{model: {model}}}"))).unwrap();
        read(&path).unwrap_err().to_string()
    };
    assert!(hint("./org/name+./org/lora").contains("MODEL+ADAPTER"));
    assert!(hint("./org/name").contains("relative to the directory"));
}
