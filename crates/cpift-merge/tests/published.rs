//! Recipes in the styles of published model cards (fixtures/recipes), each run through the real
//! binary.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use cpift_merge::verify;
use cpift_testkit::read_checkpoint;
use serde_json::Value;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures")
}

/// A directory with the models that the recipes name.
fn models() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, source) in [("base", "base"), ("math", "a"), ("code", "b"), ("chat", "c")] {
        let folder = dir.path().join(name);
        std::fs::create_dir(&folder).unwrap();
        let from = [fixtures().join("golden/merge").join(source), fixtures().join("recipes/tokenizer")];
        for file in from.iter().flat_map(|folder| std::fs::read_dir(folder).unwrap()).map(Result::unwrap) {
            std::fs::copy(file.path(), folder.join(file.file_name())).unwrap();
        }
    }
    dir
}

fn run(recipe: &Path, models: &Path, out: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_cpift-merge"))
        .current_dir(models)
        .args(["recipe".as_ref(), recipe.as_os_str(), "--out".as_ref(), out.as_ref()])
        .output()
        .unwrap()
}

fn recipes() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(fixtures().join("recipes")).unwrap().map(|entry| entry.unwrap().path());
    let mut recipes: Vec<PathBuf> = entries.filter(|path| path.extension().is_some_and(|e| e == "yml")).collect();
    recipes.sort();
    recipes
}

#[test]
fn every_recipe_runs_and_gives_a_whole_checkpoint() {
    let models = models();
    let recipes = recipes();
    assert_eq!(recipes.len(), 25);
    for recipe in recipes {
        let name = recipe.file_stem().unwrap().to_str().unwrap();
        let done = run(&recipe, models.path(), name);
        assert!(done.status.success(), "{name}: {}", String::from_utf8_lossy(&done.stderr));
        let out = models.path().join(name);
        verify(&out).unwrap();
        let config: Value = serde_json::from_slice(&std::fs::read(out.join("config.json")).unwrap()).unwrap();
        let norms = read_checkpoint(&out).keys().filter(|name| name.ends_with("input_layernorm.weight")).count();
        assert_eq!(config["num_hidden_layers"], norms, "{name}");
        for file in ["README.md", "cpift.json", "tokenizer.json", "tokenizer_config.json"] {
            assert!(out.join(file).is_file(), "{name} has no {file}");
        }
    }
    let left =
        |entry: std::io::Result<std::fs::DirEntry>| entry.unwrap().file_name().to_string_lossy().contains("merges");
    assert!(!std::fs::read_dir(models.path()).unwrap().any(left), "merges of several documents are removed");
}

#[test]
fn the_recipe_in_every_card_reproduces_the_merge() {
    let models = models();
    for recipe in recipes() {
        let name = recipe.file_stem().unwrap().to_str().unwrap();
        // Its merges of other merges are gone.
        if name == "several_documents" {
            continue;
        }
        assert!(run(&recipe, models.path(), name).status.success(), "{name}");
        let card = std::fs::read_to_string(models.path().join(name).join("README.md")).unwrap();
        let block = card.split_once("```yaml\n").unwrap().1.split_once("```\n").unwrap().0;
        let written = models.path().join(format!("{name}.yml"));
        std::fs::write(&written, block).unwrap();
        let again = format!("{name}-again");
        let done = run(&written, models.path(), &again);
        assert!(done.status.success(), "{name}: {}\n{block}", String::from_utf8_lossy(&done.stderr));
        for file in ["model.safetensors", "config.json", "tokenizer_config.json"] {
            let [first, second] = [name, &again].map(|out| std::fs::read(models.path().join(out).join(file)).unwrap());
            assert!(first == second, "{name}: {file}\n{block}");
        }
    }
}

#[test]
fn keys_that_mergekit_ignores_are_warned_about() {
    let models = models();
    let done = run(&fixtures().join("recipes/stray_keys.yml"), models.path(), "out");
    let stderr = String::from_utf8_lossy(&done.stderr);
    for part in [
        "description: has no effect",
        "models[0].parameters.weight: has no effect: weight is a parameter of linear",
        "models[1].weight: has no effect: weight is read under parameters",
        "normalize: has no effect: normalize is read under parameters",
        "parameters.int8_mask: has no effect: int8_mask is a parameter of task_arithmetic",
    ] {
        assert!(stderr.contains(part), "{part:?} is not in\n{stderr}");
    }
}

#[test]
fn chat_templates_are_written_beside_the_tokenizer() {
    let models = models();
    let template = |recipe: &str| {
        let out = recipe.to_owned();
        let done = run(&fixtures().join(format!("recipes/{recipe}.yml")), models.path(), &out);
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        let config: Value =
            serde_json::from_slice(&std::fs::read(models.path().join(&out).join("tokenizer_config.json")).unwrap())
                .unwrap();
        assert!(config.get("chat_template").is_none(), "one of two templates would win");
        std::fs::read_to_string(models.path().join(out).join("chat_template.jinja")).unwrap()
    };
    assert!(template("stray_keys").contains("<|im_start|>"));
    let auto = template("model_stock");
    assert!(auto.starts_with("{% for message in messages %}") && auto.contains("': '"), "{auto}");
}

#[test]
fn several_documents_build_on_one_another_in_any_order() {
    let models = models();
    let done = run(&fixtures().join("recipes/several_documents.yml"), models.path(), "out");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    // The same by hand.
    let step = |name: &str, text: &str| {
        let path = models.path().join(format!("{name}.yml"));
        std::fs::write(&path, text).unwrap();
        let done = run(&path, models.path(), name);
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    };
    let text = std::fs::read_to_string(fixtures().join("recipes/several_documents.yml")).unwrap();
    let documents: Vec<&str> = text.split("---\n").collect();
    for (name, i) in [("reasoning", 0), ("stretched", 1), ("stretched_chat", 3), ("by-hand", 2)] {
        step(name, documents[i]);
    }
    let weights = |name: &str| std::fs::read(models.path().join(name).join("model.safetensors")).unwrap();
    assert!(weights("out") == weights("by-hand"));
    // As entries of `merges`.
    let entry = |document: &str| document.lines().map(|line| format!("    {line}\n")).collect::<String>();
    let list: String = [0, 1, 3].iter().map(|i| entry(documents[*i]).replacen("    ", "  - ", 1)).collect();
    step("as-list", &format!("merges:\n{list}{}", documents[2]));
    assert!(weights("out") == weights("as-list"));
}

#[test]
fn recipes_of_several_merges_that_cannot_be_ordered_are_refused() {
    let models = models();
    let linear = |name: &str, a: &str| {
        format!("{name}merge_method: linear\nparameters: {{weight: 1}}\nmodels: [{{model: {a}}}, {{model: math}}]\n")
    };
    for (text, part) in [
        (
            [linear("name: x\n", "y"), linear("name: y\n", "x"), linear("", "x")].join("---\n"),
            "merges that wait for one another",
        ),
        ([linear("", "math2"), linear("", "code")].join("---\n"), "two merges have no name"),
        ([linear("name: x\n", "code"), linear("name: x\n", "code")].join("---\n"), "two merges have the same name"),
        ([linear("name: ../x\n", "code"), linear("", "code")].join("---\n"), "is not the name of a folder"),
        ([linear("name: x\n", "z"), linear("", "x")].join("---\n"), "names a model that does not exist"),
    ] {
        let path = models.path().join("r.yml");
        std::fs::write(&path, &text).unwrap();
        let done = run(&path, models.path(), "out");
        let stderr = String::from_utf8_lossy(&done.stderr).into_owned();
        assert_eq!(done.status.code(), Some(3), "{text}\n{stderr}");
        assert!(stderr.contains(part), "{text}\n{stderr}");
        assert!(!models.path().join("out").exists());
    }
}

#[test]
fn slices_beyond_the_model_or_of_unequal_tensors_are_refused() {
    let models = models();
    let passthrough = |slices: &str| format!("merge_method: passthrough\nslices:\n{slices}");
    let slice = |model: &str, range: &str| format!("  - sources: [{{model: {model}, layer_range: {range}}}]\n");
    let two = "merge_method: linear\nparameters: {weight: 1}\nslices:\n  - sources:\n";
    for (text, parts) in [
        (passthrough(&slice("math", "[1, 4]")), vec!["a layer range goes beyond the model", "at most [0, 3]", "[1, 4]"]),
        (
            format!(
                "{two}      - {{model: math, layer_range: [0, 2]}}\n      - {{model: code, layer_range: [0, 3]}}\n"
            ),
            vec!["slices[0].sources[1]: takes another number of layers"],
        ),
        (
            "merge_method: ties\nbase_model: base\nparameters: {weight: 1}\nslices:\n  - sources: [{model: math, layer_range: [0, 2]}]\n"
                .to_owned(),
            vec!["the base_model must be among the sources"],
        ),
    ] {
        let path = models.path().join("r.yml");
        std::fs::write(&path, &text).unwrap();
        let done = run(&path, models.path(), "out");
        let stderr = String::from_utf8_lossy(&done.stderr).into_owned();
        assert_eq!(done.status.code(), Some(3), "{text}\n{stderr}");
        for part in parts {
            assert!(stderr.contains(part), "{part:?} is not in\n{stderr}");
        }
        assert!(!models.path().join("out").exists());
    }
}
