//! Recipes: mergekit's YAML as we read it, and everything about one that is refused.

use std::path::Path;

use cpift_core::{BadInput, Dtype};
use cpift_merge::card;
use cpift_merge::recipe::{parse, read, write};
use cpift_merge::{Method, Request, Setting};

#[track_caller]
fn parsed(text: &str) -> Request {
    parse(text, Path::new("r.yml")).unwrap_or_else(|e| panic!("{e:#}\n{text}"))
}

/// Asserts that `text` is bad input and that the message says all `parts`.
#[track_caller]
fn refused(text: &str, parts: &[&str]) {
    let error = parse(text, Path::new("r.yml")).expect_err(text);
    assert!(error.downcast_ref::<BadInput>().is_some(), "{error:?}");
    let message = error.to_string();
    for part in [&["r.yml"], parts].concat() {
        assert!(message.contains(part), "{part:?} is not in:\n{message}");
    }
}

fn paths(request: &Request) -> Vec<&str> {
    request.models.iter().map(|model| model.path.to_str().unwrap()).collect()
}

/// A TIES recipe as people write them, with `more` lines.
fn ties(more: &str) -> String {
    format!(
        "models:
  - model: base
  - model: org/math
    parameters: {{density: [1, 0.7, 0.1], weight: 1.0}}
  - model: code
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: base
{more}"
    )
}

/// A linear recipe of `a` and `b`, with `more` lines.
fn linear(more: &str) -> String {
    format!("merge_method: linear\nparameters: {{weight: 1}}\nmodels: [{{model: a}}, {{model: b}}]\n{more}")
}

const SLERP: &str = "
slices:
  - sources:
      - {model: a, layer_range: [0, 32]}
      - {model: b, layer_range: [0, 32]}
merge_method: slerp
base_model: a
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # all others
dtype: float16
";

#[test]
fn slerp_with_filters_and_gradients() {
    let request = parsed(SLERP);
    assert_eq!((request.method, paths(&request), request.base.as_deref()), (Method::Slerp, vec!["a", "b"], None));
    assert_eq!(request.t.to_string(), "self_attn=0,0.5,0.3,0.7,1 mlp=1,0.5,0.7,0.3,0 0.5");
    assert_eq!(request.dtype, Some(Dtype::F16));
    assert_eq!(request.side_files.as_deref(), Some(Path::new("a")));
}

#[test]
fn the_base_of_slerp_is_t_0_wherever_it_stands() {
    let head = "merge_method: slerp\nbase_model: b\nparameters: {t: 0.3}\n";
    assert_eq!(paths(&parsed(&format!("{head}models: [{{model: a}}, {{model: b}}]"))), ["b", "a"]);
    assert_eq!(paths(&parsed(&format!("{head}models: [{{model: a}}]"))), ["b", "a"]);
    for models in ["[{model: a}, {model: c}]", "[{model: b}]", "[{model: a}, {model: b}, {model: c}]"] {
        refused(&format!("{head}models: {models}"), &["slerp merges base_model (t = 0) and one other model"]);
    }
}

#[test]
fn ties_with_settings_of_models() {
    let request = parsed(&ties("parameters: {normalize: false, lambda: 0.8, density: 0.2, int8_mask: true}\n"));
    assert_eq!((request.method, request.base.as_deref()), (Method::Ties, Some(Path::new("base"))));
    assert_eq!(paths(&request), ["org/math", "code"]);
    assert_eq!(request.models[0].density.to_string(), "1,0.7,0.1");
    assert_eq!(request.models[1].weight.to_string(), "mlp=0.5 0");
    assert_eq!((request.normalize, request.rescale, request.lambda.single()), (false, false, Some(0.8)));
}

#[test]
fn defaults_are_those_of_mergekit() {
    let request = parsed(&ties(""));
    assert_eq!((request.normalize, request.rescale, request.lambda.single()), (true, false, Some(1.0)));
    assert_eq!(request.models[1].density.to_string(), "0.33");
    assert_eq!((request.dtype, request.epsilon), (None, 0.9995f64.acos()));
    for (method, normalize, rescale) in
        [("task_arithmetic", false, false), ("dare_linear", false, true), ("dare_ties", false, true)]
    {
        let text = format!(
            "{{merge_method: {method}, base_model: z, parameters: {{weight: 0.5}}, models: [{{model: a}}, {{model: b}}]}}"
        );
        let request = parsed(&text);
        assert_eq!((request.normalize, request.rescale), (normalize, rescale), "{method}");
        assert_eq!(request.models[1].weight, Setting::constant(0.5));
    }
}

#[test]
fn the_narrowest_scope_comes_first() {
    let text = "
merge_method: linear
slices:
  - sources:
      - {model: a, layer_range: [0, 4], parameters: {weight: [{filter: mlp, value: 1}]}}
      - {model: b, layer_range: [0, 4]}
    parameters: {weight: [{filter: self_attn, value: 2}], normalize: false}
parameters: {weight: 3, normalize: true}
";
    let request = parsed(text);
    assert_eq!(request.models[0].weight.to_string(), "mlp=1 self_attn=2 3");
    assert_eq!(request.models[1].weight.to_string(), "self_attn=2 3");
    assert!(!request.normalize);
}

#[test]
fn a_base_that_is_merged_like_the_others_comes_first() {
    let listed = "merge_method: linear\nbase_model: b\nmodels:
  - {model: a, parameters: {weight: 1}}\n  - {model: b, parameters: {weight: 2}}\n";
    let request = parsed(listed);
    assert_eq!((paths(&request), request.models[0].weight.single()), (vec!["b", "a"], Some(2.0)));
    let request = parsed(&linear("base_model: c\n"));
    assert_eq!((paths(&request), request.models[0].weight.single()), (vec!["c", "a", "b"], Some(1.0)));
    refused(&listed.replace("base_model: b", "base_model: c"), &["no weight for the model c"]);
}

#[test]
fn karcher_is_the_mean_on_the_sphere_at_any_angle() {
    let recipe =
        |more: &str| format!("merge_method: karcher\nmodels: [{{model: a}}, {{model: b}}, {{model: c}}]\n{more}");
    let request = parsed(&recipe("parameters: {max_iter: 10, tol: 1e-5}"));
    assert_eq!((request.method, request.epsilon, request.models.len()), (Method::SphericalMean, 0.0, 3));
    parsed(&recipe("parameters: {max_iter: 100, tol: 0}"));
    refused(&recipe("parameters: {max_iter: 3}"), &["parameters.max_iter: is out of range", "10 to 1000000000"]);
    refused(&recipe("parameters: {tol: 0.1}"), &["parameters.tol: is out of range", "0 to 0.00001"]);
}

#[test]
fn numbers_in_quotes_and_flags_as_numbers_are_taken() {
    let request = parsed(&ties("parameters: {lambda: '1e-3', normalize: 0, rescale: yes}\n"));
    assert_eq!((request.lambda.at("w", None), request.normalize, request.rescale), (Some(0.001), false, true));
}

#[test]
fn out_dtype_is_the_dtype_of_the_output() {
    let dtype = |more: &str| parsed(&linear(more)).dtype;
    assert_eq!(dtype("dtype: float32\nout_dtype: bfloat16\n"), Some(Dtype::BF16));
    assert_eq!(dtype("dtype: torch.float32\n"), Some(Dtype::F32));
    assert_eq!(dtype("dtype: null\n"), None);
    for name in ["int64", "bf16", "float8_e4m3fn"] {
        refused(&linear(&format!("dtype: {name}\n")), &["dtype", "bfloat16, float16, float32, float64"]);
    }
}

#[test]
fn the_tokenizer_comes_from_where_the_recipe_says() {
    let side_files = |more: &str| parsed(&ties(more)).side_files.unwrap();
    assert_eq!(side_files("tokenizer_source: base\n"), Path::new("base"));
    assert_eq!(side_files("tokenizer_source: code\n"), Path::new("code"));
    assert_eq!(side_files("tokenizer: {source: code}\n"), Path::new("code"));
    refused(&ties("tokenizer_source: union\n"), &["tokenizer_source: a union of vocabularies is not supported"]);
    refused(&ties("tokenizer: {source: union}\n"), &["tokenizer.source: a union"]);
    refused(&ties("tokenizer: {pad_to_multiple_of: 8}\n"), &["tokenizer.pad_to_multiple_of: is not supported here"]);
    refused(&ties("tokenizer: {}\n"), &["tokenizer: a key is missing", "source"]);
    refused(&linear("tokenizer_source: base\n"), &["tokenizer_source: there is no base_model"]);
    refused(&linear("tokenizer_source: a\ntokenizer: {source: a}\n"), &["tokenizer: stands beside tokenizer_source"]);
}

#[test]
fn keys_that_are_not_known_are_named() {
    let wrong = ties("").replace("weight: 1.0", "wieght: 1.0");
    refused(&wrong, &["models[1].parameters.wieght: is not a known key", "weight, density", "did you mean weight?"]);
    refused(&ties("merge_metod: ties\n"), &["merge_metod", "did you mean merge_method?"]);
    refused(&ties("name: my-model\n"), &["name: is not a known key", "tokenizer_source"]);
    refused(&ties("chat_template: auto\n"), &["chat_template: is not supported here", "tokenizer_source"]);
    refused(&ties("modules: {}\n"), &["modules: is not supported here"]);
    refused(&ties("parameters: {gamma: 0.1}\n"), &["parameters.gamma", "normalize"]);
    refused(&linear("").replace("weight: 1", "weight: 1, t: 0.5"), &["parameters.t", "t is a parameter of slerp"]);
    let density = linear("").replace("{model: a}", "{model: a, parameters: {density: 0.5}}");
    refused(&density, &["models[0].parameters.density", "ties, dare_linear, dare_ties"]);
    let shared = ties("").replace("weight: 1.0", "weight: 1.0, normalize: true");
    refused(&shared, &["models[1].parameters.normalize", "under the recipe's own parameters"]);
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
fn a_recipe_written_is_read_back_as_it_was() {
    let karcher = "{merge_method: karcher, models: [{model: a, cpift: {weight: [0.5, 2]}}, {model: b}],
        cpift: {space: delta, base: z, epsilon: 0.25, protect: p.mask}}";
    let dare = "{merge_method: dare_ties, base_model: \"a \\\"b\\\" `c`: |\", tokenizer_source: t, dtype: bfloat16,
        models: [{model: 'x: y', parameters: {weight: [{filter: 'q: [', value: [1e-9, -2.5]}, {value: 1e30}]},
        cpift: {mask: m}}, {model: y}], parameters: {density: 0.5, weight: 1}, cpift: {seed: 7}}";
    let recipes =
        [SLERP.to_owned(), ties("tokenizer_source: code\n"), linear("base_model: b\n"), linear("dtype: float64\n")];
    for text in recipes.iter().map(String::as_str).chain([karcher, dare]) {
        let request = Request { dtype: None, ..parsed(text) };
        for dtype in [Dtype::BF16, Dtype::F64] {
            let written = write(&request, dtype);
            assert_eq!(parsed(&written), Request { dtype: Some(dtype), ..request.clone() }, "{written}");
            let card = card::of_request(&request, dtype);
            let (_, block) = card.split_once("```yaml\n").unwrap();
            assert_eq!(block.split_once("```\n").unwrap().0, written);
            let front = card.strip_prefix("---\n").unwrap().split_once("\n---\n").unwrap().0;
            assert!(front.ends_with("library_name: transformers\ntags:\n  - merge\n  - cpift"), "{card}");
        }
    }
}

#[test]
fn the_card_tells_method_models_and_weights() {
    let card = card::of_request(&parsed(&ties("")), Dtype::BF16);
    for part in [
        // Only what can be a name on the hub: not the folders base and code.
        "---\nbase_model:\n  - org/math\nlibrary_name: transformers\n",
        "# Merge by TIES\n",
        "arXiv:2306.01708",
        "| model | weight | density |",
        "| code | mlp=0.5 0 | 0.33 |",
        "Base: base",
        "out_dtype: bfloat16",
    ] {
        assert!(card.contains(part), "{part:?} is not in\n{card}");
    }
    assert!(card::of_request(&parsed(SLERP), Dtype::F16).contains("| b | t = 1, at self_attn=0,0.5,0.3,0.7,1 mlp="));
}

#[test]
fn keys_of_ours_stand_under_cpift() {
    refused(&ties("cpift: {seed: 1}\n"), &["cpift.seed: is not a known key", "protect"]);
    refused(&ties("cpift: {protct: 1}\n"), &["did you mean protect?"]);
    refused(&linear("").replace("{model: a}", "{model: a, cpift: {weight: 2}}"), &["models[0].cpift.weight", "mask"]);
    let karcher =
        |ours: &str| format!("{{merge_method: karcher, models: [{{model: a}}, {{model: b}}], cpift: {{{ours}}}}}");
    for ours in ["space: sphere", "space: 1", "epsilon: 2", "epsilon: -1", "base: {}"] {
        refused(&karcher(ours), &["cpift."]);
    }
}

#[test]
fn what_is_missing_is_named() {
    refused("", &["r.yml"]);
    refused("merge_method: linear\n", &["expected: models or slices"]);
    refused("models: [{model: a}]\n", &["expected: merge_method"]);
    refused("merge_method: linear\nmodels: []\n", &["models", "a list with at least one entry"]);
    refused("merge_method: passthrough\nmodels: [{model: a}]\n", &["merge_method", "karcher", "\"passthrough\""]);
    refused(&ties("").replace("base_model: base", ""), &["ties needs a base_model"]);
    refused(&linear("").replace("weight: 1", "normalize: true"), &["no weight for the model a"]);
    refused("{merge_method: slerp, base_model: a, models: [{model: b}]}", &["slerp needs a parameter", "t: ..."]);
    refused("{merge_method: linear, parameters: {weight: 1}, models: [{model: a}]}", &["at least 2 models"]);
    refused("{merge_method: ties, base_model: a, models: [{model: a}]}", &["at least 1 models"]);
    refused(&linear("").replace("model: b", "model: a"), &["models[1]: is listed twice"]);
    refused(&linear("").replace("model: b", "model: {model: b}"), &["models[1].model: is a mapping"]);
    refused(&linear("slices: [{}]\n"), &["slices: stands beside models"]);
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
fn slices_must_be_every_layer_in_order() {
    let request = parsed(&slices(&[["[0, 3]"; 2], ["[3, 8]"; 2]], ""));
    assert_eq!(paths(&request), ["a", "b"]);
    for ranges in [
        &[["[1, 3]"; 2]][..],
        &[["[0, 3]", "[1, 4]"]],
        &[["[0, 3]", "[0, 4]"]],
        &[["[0, 3]"; 2], ["[4, 8]"; 2]],
        &[["[0, 3]"; 2], ["[2, 8]"; 2]],
    ] {
        refused(&slices(ranges, ""), &["layer_range", "frankenmerge", "every layer once, in order"]);
    }
    for range in ["[3, 3]", "[0]", "[0, 1, 2]", "[0, -1]", "[0, 1.5]", "3"] {
        refused(&slices(&[[range; 2]], ""), &["slices[0].sources[0].layer_range"]);
    }
    let other = slices(&[["[0, 3]"; 2], ["[3, 8]"; 2]], "").replacen("model: b", "model: c", 1);
    refused(&other, &["slices[1]: has other models", "a, c", "a, b"]);
    refused(&slices(&[["[0, 3]"; 2]], "    residual_weight: 0.1\n"), &["slices[0].residual_weight: is not supported"]);
}

#[test]
fn settings_of_one_of_several_slices_are_refused() {
    let several = [["[0, 3]"; 2], ["[3, 8]"; 2]];
    refused(&slices(&several, "    parameters: {weight: 2}\n"), &["slices[0].parameters", "one slice with all layers"]);
    refused(&slices(&several, "").replace("weight: 1", "weight: [0, 1]"), &["a gradient over 2 slices"]);
    parsed(&slices(&several[..1], "    parameters: {weight: [2, 3]}\n"));
}

#[test]
fn hostile_text_is_refused_quickly() {
    let bomb: String =
        (1..12).map(|i| format!("k{i}: &k{i} [{}]\n", vec![format!("*k{}", i - 1); 10].join(","))).collect();
    refused(&format!("k0: &k0 x\n{bomb}"), &[]);
    refused(&"[".repeat(100_000), &[]);
    refused(&"- ".repeat(100_000), &[]);
    refused(&format!("a: {}", "x".repeat(1 << 20)), &["too long"]);
    refused(&format!("{}: 1", "k".repeat(1000)), &["is not a known key"]);
    refused("a: 1\n---\nb: 2\n", &[]);
    refused("\u{0}\u{1}", &[]);
    refused("? [a, b]\n: 1\n", &[]);
}

#[test]
fn mutilated_recipes_are_read_or_refused() {
    let whole =
        [SLERP.to_owned(), ties("tokenizer: {source: base}\ncpift: {protect: p}\n"), slices(&[["[0, 3]"; 2]; 2], "")];
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
            Ok(_) => read += 1,
            Err(error) => assert!(error.downcast_ref::<BadInput>().is_some(), "{error:?}"),
        }
    }
    assert!(read > 100, "{read} of the recipes were still readable");
}

#[test]
fn files_that_are_no_recipe_are_refused() {
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

/// A folder with the models `a` and `b`, of which config.json says `layers`, and the recipe made of `text`.
fn on_disk(text: &str, layers: usize, tokenizers: [&str; 2]) -> Result<Request, String> {
    let dir = tempfile::tempdir().unwrap();
    for (model, tokenizer) in ["a", "b"].into_iter().zip(tokenizers) {
        std::fs::create_dir(dir.path().join(model)).unwrap();
        std::fs::write(dir.path().join(model).join("config.json"), format!("{{\"num_hidden_layers\": {layers}}}"))
            .unwrap();
        if !tokenizer.is_empty() {
            let text = format!("{{\"model\": {{\"vocab\": {tokenizer}}}}}");
            std::fs::write(dir.path().join(model).join("tokenizer.json"), text).unwrap();
        }
    }
    let recipe = dir.path().join("r.yml");
    std::fs::write(&recipe, text.replace("model: ", &format!("model: {}/", dir.path().display()))).unwrap();
    read(&recipe).map_err(|e| e.to_string())
}

#[test]
fn folders_layers_and_vocabularies_are_checked_on_disk() {
    on_disk(SLERP, 32, [""; 2]).unwrap();
    let error = on_disk(SLERP, 24, [""; 2]).unwrap_err();
    assert!(error.contains("models with 32 layers") && error.contains("24 layers in "), "{error}");
    let error = on_disk(&linear("").replace("{model: b}", "{model: c}"), 1, [""; 2]).unwrap_err();
    assert!(error.contains("names a model that is not a folder"), "{error}");

    let tokenizer = SLERP.to_owned() + "tokenizer_source: base\n";
    let (one, two) = (r#"{"x": 0}"#, r#"{"x": 1}"#);
    on_disk(&tokenizer, 32, [one, one]).unwrap();
    on_disk(&tokenizer, 32, [one, ""]).unwrap();
    on_disk(SLERP, 32, [one, two]).unwrap();
    assert!(on_disk(&tokenizer, 32, [one, two]).unwrap_err().contains("vocabularies differ"));
    assert!(on_disk(&tokenizer, 32, ["", one]).unwrap_err().contains("has no tokenizer"));
}

#[test]
fn a_model_of_the_hub_is_to_be_downloaded_first() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("r.yml");
    let hint = |model: &str| {
        std::fs::write(&path, linear("").replace("{model: a}", &format!("{{model: {model}}}"))).unwrap();
        read(&path).unwrap_err().to_string()
    };
    assert!(hint("org/name").contains("huggingface-cli download org/name"));
    assert!(hint("org/name+org/lora").contains("an adapter is merged"));
    assert!(hint("./org/name").contains("relative to the folder"));
}
