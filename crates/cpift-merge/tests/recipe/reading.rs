//! Requests that recipes are parsed to, and recipes written from a request and read back.

use std::path::Path;

use cpift_core::Dtype;
use cpift_merge::recipe::write;
use cpift_merge::{ChatTemplate, Method, Request, Setting, TokenizerSource, card};

use crate::{SLERP, linear, parsed, paths, refused, ties};

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
fn the_innermost_scope_comes_first() {
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
fn karcher_is_the_spherical_mean_at_any_angle() {
    let recipe =
        |more: &str| format!("merge_method: karcher\nmodels: [{{model: a}}, {{model: b}}, {{model: c}}]\n{more}");
    let request = parsed(&recipe("parameters: {max_iter: 3, tol: 0.1}"));
    assert_eq!((request.method, request.epsilon, request.models.len()), (Method::SphericalMean, 0.0, 3));
    assert_eq!(request.values.get("max_iter"), Some(&Setting::constant(3.0)));
    assert!(parsed(&recipe("")).values.get("max_iter").is_none(), "mergekit's default");
    refused(&recipe("parameters: {max_iter: -1}"), &["parameters.max_iter: is out of range", "0 to 1000000000"]);
}

#[test]
fn parameters_of_a_method_are_read_where_mergekit_reads_them() {
    let text = "{merge_method: della, base_model: z, models: [{model: a, parameters: {epsilon: 0.2, weight: 1}},
        {model: b}], parameters: {epsilon: [0.1, 0.3], weight: 2, lambda: 3}}";
    let request = parsed(text);
    assert_eq!(request.models[0].values.get("epsilon").unwrap().to_string(), "0.2");
    assert_eq!(request.models[1].values.get("epsilon").unwrap().to_string(), "0.1,0.3");
    assert!(request.normalize && request.rescale, "defaults of della");
    let text = "{merge_method: nuslerp, base_model: z, models: [{model: a}, {model: z}, {model: b}],
        parameters: {weight: 1, nuslerp_flatten: false}}";
    let request = parsed(text);
    assert_eq!((paths(&request), request.base.as_deref()), (vec!["a", "b"], Some(Path::new("z"))));
    assert_eq!(request.values.get("nuslerp_flatten"), Some(&Setting::constant(0.0)));
    let flag = text.replace("nuslerp_flatten: false", "nuslerp_flatten: 2");
    refused(&flag, &["parameters.nuslerp_flatten", "true or false"]);
}

#[test]
fn references_may_be_in_the_form_that_mergekit_saves() {
    let text = linear("base_model: {model: {path: org/c, revision: null}, lora: null}\n")
        .replace("{model: a}", "{model: {model: {path: a}}}")
        .replace("{model: b}", "{model: {model: b, lora: {path: fine}}}");
    let request = parsed(&text);
    assert_eq!(paths(&request), ["org/c", "a", "b+fine"]);
    let other = linear("").replace("{model: a}", "{model: {model: {path: a}, override_architecture: X}}");
    refused(&other, &["models[0].model.override_architecture: is not supported"]);
    refused(&linear("").replace("model: b", "model: {modle: b}"), &["models[1].model.modle", "did you mean model?"]);
}

#[test]
fn slices_have_models_layers_and_settings_of_their_own() {
    let text = "
merge_method: slerp
base_model: a
slices:
  - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [4, 6]}]
    parameters: {t: [0, 1]}
  - sources: [{model: c, layer_range: [1, 4]}, {model: a, layer_range: [0, 3]}]
parameters: {t: 0.25}
";
    let request = parsed(text);
    assert_eq!(paths(&request), ["a", "b", "c"]);
    let [first, second] = &request.slices[..] else { panic!() };
    assert_eq!((&first.layers[..], &second.layers[..]), (&[0..2, 4..6][..], &[0..3, 1..4][..]));
    assert_eq!((first.request.t.to_string(), second.request.t.to_string()), ("0,1".to_owned(), "0.25".to_owned()));
    assert_eq!(paths(&second.request), ["a", "c"], "the base is t = 0 wherever it stands");
    let again = parsed(&write(&request, Dtype::F32));
    assert_eq!(again, Request { dtype: Some(Dtype::F32), ..request });
}

#[test]
fn a_module_is_read_as_the_model_and_modules_that_differ_are_refused() {
    let inner = "models: [{model: a}, {model: b}], parameters: {weight: 2}";
    let recipe = |modules: &str| format!("{{merge_method: linear, modules: {{{modules}}}, parameters: {{weight: 1}}}}");
    let request = parsed(&recipe(&format!("default: {{{inner}}}")));
    assert_eq!((paths(&request), request.models[0].weight.single()), (vec!["a", "b"], Some(2.0)));
    assert_eq!(parsed(&recipe(&format!("text: {{{inner}}}, vision: {{{inner}}}"))), request);
    let other = format!("text: {{{inner}}}, vision: {{models: [{{model: a}}, {{model: c}}]}}");
    refused(&recipe(&other), &["modules: modules that are merged differently", "text, vision"]);
    refused(&recipe(""), &["modules: has no module"]);
    refused(&linear(&format!("modules: {{x: {{{inner}}}}}\n")), &["modules cannot be given together"]);
}

#[test]
fn a_chat_template_is_a_name_or_a_text() {
    let template = |text: &str| parsed(&linear(&format!("chat_template: {text}\n"))).chat_template.unwrap();
    assert_eq!(template("auto"), ChatTemplate::Auto);
    assert!(matches!(template("chatml"), ChatTemplate::Text(text) if text.contains("<|im_start|>")));
    let own = "{{ messages[0]['content'] }}";
    assert_eq!(template(&format!("\"{own}\"")), ChatTemplate::Text(own.to_owned()));
    refused(&linear("chat_template: vicuna\n"), &["chat_template: is not a chat template", "alpaca, chatml"]);
}

#[test]
fn numbers_in_quotes_and_flags_as_numbers_are_accepted() {
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
    let tokenizer = |more: &str| parsed(&ties(more)).tokenizer.unwrap();
    assert_eq!(tokenizer("tokenizer_source: union\n"), tokenizer("tokenizer: {}\n"));
    assert_eq!(tokenizer("tokenizer_source: base\n").source, TokenizerSource::Base);
    assert_eq!(tokenizer("tokenizer: {source: union, pad_to_multiple_of: 8}\n").pad_to_multiple_of, Some(8));
    refused(&linear("tokenizer_source: base\n"), &["tokenizer_source: there is no base_model"]);
    refused(
        &linear("tokenizer_source: a\ntokenizer: {source: a}\n"),
        &["tokenizer: cannot be given together with tokenizer_source"],
    );
}

#[test]
fn a_written_recipe_is_read_back_unchanged() {
    let karcher = "{merge_method: karcher, models: [{model: a, cpift: {weight: [0.5, 2]}}, {model: b}],
        cpift: {space: delta, base: z, epsilon: 0.25, protect: p.mask}}";
    let dare = "{merge_method: dare_ties, base_model: \"a \\\"b\\\" `c`: |\", tokenizer_source: t, dtype: bfloat16,
        models: [{model: 'x: y', parameters: {weight: [{filter: 'q: [', value: [1e-9, -2.5]}, {value: 1e30}]},
        cpift: {mask: m}}, {model: y}], parameters: {density: 0.5, weight: 1}, cpift: {seed: 7}}";
    let recipes = [
        SLERP.to_owned(),
        ties("tokenizer_source: code\n"),
        linear("base_model: b\n"),
        linear("dtype: float64\n"),
        ties(RULES),
    ];
    let others = [
        "{merge_method: passthrough, models: [{model: a, parameters: {scale: [{filter: mlp, value: 0}, {value: 2}]}}]}",
        "{merge_method: nuslerp, base_model: z, models: [{model: a}, {model: b}], tokenizer_source: base,
          parameters: {weight: [0, 1], nuslerp_row_wise: true}, chat_template: auto}",
        "{merge_method: breadcrumbs_ties, base_model: z, models: [{model: a, parameters: {gamma: 0.1}}],
          parameters: {weight: 1, density: 0.3}, chat_template: alpaca, cpift: {mask: m}}",
        "{merge_method: ramplus_tl, base_model: z, models: [{model: a}], parameters: {r: 1, alpha: [0, 2]}}",
        "{merge_method: tsv_m, base_model: z, models: [{model: a}, {model: b}], parameters: {lambda: 0.5}}",
    ];
    for text in recipes.iter().map(String::as_str).chain([karcher, dare]).chain(others) {
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
fn the_card_lists_method_models_and_weights() {
    let card = card::of_request(&parsed(&ties("")), Dtype::BF16);
    for part in [
        // Only a possible name on the hub: not the directories base and code.
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
fn keys_that_mergekit_does_not_have_stand_under_cpift() {
    refused(&ties("cpift: {seed: 1}\n"), &["cpift.seed: is not a known key", "protect"]);
    refused(&ties("cpift: {protct: 1}\n"), &["did you mean protect?"]);
    refused(&linear("").replace("{model: a}", "{model: a, cpift: {weight: 2}}"), &["models[0].cpift.weight", "mask"]);
    let karcher =
        |ours: &str| format!("{{merge_method: karcher, models: [{{model: a}}, {{model: b}}], cpift: {{{ours}}}}}");
    for ours in ["space: sphere", "space: 1", "epsilon: 2", "epsilon: -1", "base: {}"] {
        refused(&karcher(ours), &["cpift."]);
    }
}

/// A block `tokenizer` with every kind of rule.
const RULES: &str = "tokenizer: {source: union, pad_to_multiple_of: 8, tokens: {a: {source: code}, \"b: #\": {source: {kind: zero}, \
                     force: true}, c: {source: {kind: model_token, model: code, token: \"d \\\" e\"}}, f: {source: {kind: \
                     model_token, model: math, token_id: 3}}, g: {force: false}}}\n";
