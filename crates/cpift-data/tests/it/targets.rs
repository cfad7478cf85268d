//! Text, token ids and targets of conversations in the templates of published models, against
//! transformers (fixtures/golden/chat_targets.json, made by scripts/oracle/golden_targets.py).

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use cpift_data::{ChatText, Message, TemplateArgs, Tokenised};
use serde_json::{Value, json};

struct Goldens {
    dir: tempfile::TempDir,
    golden: Value,
    opened: BTreeMap<(String, String), ChatText>,
}

impl Goldens {
    fn read() -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/golden/chat_targets.json");
        let golden = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
        Self { dir: tempfile::tempdir().unwrap(), golden, opened: BTreeMap::new() }
    }

    /// A folder with the template and the tokenizer of a case.
    fn folder(&self, template: &str, tokenizer: &str) -> PathBuf {
        let folder = self.dir.path().join(format!("{template}-{tokenizer}"));
        fs::create_dir_all(&folder).unwrap();
        let from = &self.golden["templates"][template];
        let config =
            json!({"chat_template": from["plain"], "bos_token": from["bos_token"], "eos_token": from["eos_token"]});
        fs::write(folder.join("tokenizer.json"), self.golden["tokenizers"][tokenizer].to_string()).unwrap();
        fs::write(folder.join("tokenizer_config.json"), config.to_string()).unwrap();
        folder
    }

    fn text(&mut self, template: &str, tokenizer: &str) -> &ChatText {
        let folder = self.folder(template, tokenizer);
        let key = (template.to_owned(), tokenizer.to_owned());
        self.opened.entry(key).or_insert_with(|| ChatText::open(&folder, None).unwrap())
    }

    fn conversation(&self, name: &str) -> Vec<Message> {
        serde_json::from_value(self.golden["conversations"][name].clone()).unwrap()
    }
}

fn args_of(value: &Value) -> TemplateArgs {
    value.as_object().cloned().unwrap_or_default()
}

/// The tokens of `mask` as text, a bar where a run ends.
fn shown(tokens: &Tokenised, mask: &[bool]) -> String {
    let mut out = String::new();
    for (i, span) in tokens.spans.iter().enumerate() {
        if mask[i] {
            out += tokens.text.get(span.clone()).unwrap_or("\u{fffd}");
        } else if i > 0 && mask[i - 1] {
            out.push('|');
        }
    }
    out
}

#[test]
fn text_ids_and_targets_are_those_of_transformers() {
    let mut goldens = Goldens::read();
    let cases = goldens.golden["cases"].as_array().unwrap().clone();
    assert!(goldens.golden["templates"].as_object().unwrap().len() >= 20);
    let mut wrong = Vec::new();
    for case in &cases {
        let part = |key: &str| case[key].as_str().unwrap_or_default().to_owned();
        let (template, conversation) = (part("template"), part("conversation"));
        let messages = goldens.conversation(&conversation);
        let args = args_of(&case["args"]);
        if let Some(error) = case.get("error") {
            let tokenizer = goldens.golden["templates"][&template]["tokenizers"][0].as_str().unwrap().to_owned();
            let found = goldens.text(&template, &tokenizer).with(&args).tokenise(&messages).map(drop);
            let found = found.map_or_else(|e| e.to_string(), |()| "no error".into());
            if !found.contains(error.as_str().unwrap()) {
                wrong.push(format!("{template} {conversation}: {found}, expected {error}"));
            }
            continue;
        }
        let tokenizer = part("tokenizer");
        let name = format!("{template} {tokenizer} {conversation} {}", case["args"]);
        let found = match goldens.text(&template, &tokenizer).with(&args).tokenise(&messages) {
            Ok(found) => found,
            Err(e) => {
                wrong.push(format!("{name}: {e}"));
                continue;
            }
        };
        let mask: Vec<bool> = part("mask").bytes().map(|bit| bit == b'1').collect();
        if found.text != part("text") {
            wrong.push(format!("{name}: text {:?}, expected {:?}", found.text, part("text")));
        } else if json!(found.ids) != case["ids"] {
            wrong.push(format!("{name}: ids"));
        } else if found.target != mask {
            wrong.push(format!("{name}: {:?}, expected {:?}", shown(&found, &found.target), shown(&found, &mask)));
        }
    }
    assert!(wrong.is_empty(), "{} of {} cases\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

#[test]
fn prompts_are_those_of_transformers_where_a_template_has_a_generation_prompt() {
    let mut goldens = Goldens::read();
    let templates = goldens.golden["templates"].as_object().unwrap().clone();
    for (name, template) in &templates {
        let tokenizer = template["tokenizers"][0].as_str().unwrap();
        for prompt in template["prompts"].as_array().unwrap() {
            let args = args_of(&prompt["args"]);
            let found = goldens.text(name, tokenizer).with(&args).prompt(&[Message::new("user", "Hello there")]);
            let expected = match name.as_str() {
                // It has none: the header of an answer is inferred.
                "chatml_no_prompt" => format!("{}<|im_start|>assistant\n", prompt["with"].as_str().unwrap()),
                _ => prompt["with"].as_str().unwrap().to_owned(),
            };
            assert_eq!(found.unwrap(), expected, "{name} {args:?}");
        }
    }
}
