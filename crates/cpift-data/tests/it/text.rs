//! Chat templates against transformers (fixtures/golden/chat_templates.json, made by
//! scripts/oracle/golden_templates.py), and which tokens the loss counts.

use std::path::{Path, PathBuf};

use cpift_core::format::tasks::Format;

use cpift_data::{
    ChatTemplate, ChatText, GenerationPrompt, Layout, MaxLength, Message, Overlong, SpecialTokens, TemplateArgs,
    encode_rows, read_rows,
};
use cpift_testkit::model::{row, write_rows, write_tiny_model};
use serde_json::{Value, json};

#[test]
fn templates_render_as_transformers_renders_them() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/golden/chat_templates.json");
    let golden: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let special: SpecialTokens = serde_json::from_value(golden["special_tokens"].clone()).unwrap();
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() > 100);
    for case in cases {
        let name = case["template"].as_str().unwrap();
        let conversation = case["conversation"].as_str().unwrap();
        let template = ChatTemplate::new(golden["templates"][name].as_str().unwrap()).unwrap();
        let messages: Vec<Message> = serde_json::from_value(golden["conversations"][conversation].clone()).unwrap();
        let rendered = template.render(
            &messages,
            &special,
            &TemplateArgs::new(),
            case["add_generation_prompt"].as_bool().unwrap(),
        );
        match case.get("rendered").and_then(Value::as_str) {
            Some(expected) => assert_eq!(rendered.unwrap(), expected, "{name} {conversation}"),
            None => {
                let message = rendered.unwrap_err().to_string();
                let expected = case["error"].as_str().unwrap();
                assert!(message.contains(expected), "{name} {conversation}: {message}, expected {expected}");
            }
        }
    }
}

#[test]
fn a_template_that_never_ends_is_stopped() {
    let template = ChatTemplate::new("{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}");
    let error =
        template.unwrap().render(&[], &SpecialTokens::new(), &TemplateArgs::new(), false).unwrap_err().to_string();
    assert!(error.contains("fuel"), "{error}");
}

#[test]
fn a_template_opens_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let secret = dir.path().join("secret");
    std::fs::write(&secret, "precious").unwrap();
    for line in
        ["{% include 'PATH' %}", "{% import 'PATH' as x %}", "{% extends 'PATH' %}", "{{ open('PATH').read() }}"]
    {
        let template = ChatTemplate::new(&line.replace("PATH", secret.to_str().unwrap()));
        let rendered = template.and_then(|t| t.render(&[], &SpecialTokens::new(), &TemplateArgs::new(), false));
        assert!(!rendered.expect_err(line).to_string().contains("precious"));
    }
}

#[test]
fn templates_test_what_a_turn_or_the_call_lacks_as_in_jinja() {
    // Published templates of Nemotron 3 take the length of `tools` where it is iterable, and some
    // that of `tool_calls`.
    let source = "{% for m in messages %}{{ m.tool_calls | length }}{{ m.content }}{% endfor %}{% if tools is iterable and tools | \
                  length > 0 %}tools{% endif %}";
    let render = |args: Value| {
        let args: TemplateArgs = serde_json::from_value(args).unwrap();
        let turns = [Message::new("user", "q")];
        ChatTemplate::new(source).unwrap().render(&turns, &SpecialTokens::new(), &args, false).unwrap()
    };
    assert_eq!(render(json!({})), "0q");
    assert_eq!(render(json!({"tools": [{"name": "f"}]})), "0qtools");
}

struct Fixture {
    _dir: tempfile::TempDir,
    text: ChatText,
    file: PathBuf,
}

fn fixture(rows: &[Value]) -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let text = ChatText::open(&write_tiny_model(&dir.path().join("m"), 1), None).unwrap();
    let file = dir.path().join("rows.jsonl");
    write_rows(&file, rows);
    Fixture { text, file, _dir: dir }
}

/// The text of the target tokens, with a bar between runs.
fn targets(f: &Fixture, max_length: usize) -> Vec<String> {
    let encoded = encode_rows(
        &f.file,
        &read_rows(&f.file, &Layout::Format(Format::Auto)).unwrap(),
        f.text.with(&TemplateArgs::new()),
        MaxLength::new(max_length, 512),
        Overlong::Truncate,
    )
    .unwrap();
    let runs = encoded.examples.iter().map(|example| {
        let mut out = String::new();
        for (i, (&id, &target)) in example.ids.iter().zip(&example.target).enumerate() {
            if target {
                let piece = if id == 257 { "<|im_end|>".to_owned() } else { f.text.decode(&[id]).unwrap() };
                out.push_str(&piece);
            } else if i > 0 && example.target[i - 1] {
                out.push('|');
            }
        }
        out
    });
    runs.collect()
}

#[test]
fn the_loss_counts_assistant_tokens_and_the_end_of_their_turn_only() {
    let two_turns = json!({"messages": [
        {"role": "system", "content": "sys"}, {"role": "user", "content": "one"},
        {"role": "assistant", "content": "first\nanswer"}, {"role": "user", "content": "two"},
        {"role": "assistant", "content": "zwölf"}]});
    let f = fixture(&[row("what?", "that"), two_turns]);
    assert_eq!(targets(&f, 500), ["that<|im_end|>|", "first\nanswer<|im_end|>|zw\u{fffd}\u{fffd}lf<|im_end|>|"]);
}

#[test]
fn long_examples_are_cut_counted_or_refused() {
    let f = fixture(&[row("a", "short"), row("b", &"x".repeat(300)), row(&"y".repeat(300), "never reached")]);
    let rows = read_rows(&f.file, &Layout::Format(Format::Auto)).unwrap();
    let encoded =
        encode_rows(&f.file, &rows, f.text.with(&TemplateArgs::new()), MaxLength::new(100, 512), Overlong::Truncate)
            .unwrap();
    assert_eq!((encoded.examples.len(), encoded.truncated, encoded.dropped), (2, 2, 1));
    assert_eq!(encoded.examples[1].ids.len(), 100);
    let error =
        encode_rows(&f.file, &rows, f.text.with(&TemplateArgs::new()), MaxLength::new(100, 512), Overlong::Refuse)
            .unwrap_err()
            .to_string();
    assert!(error.contains("line 2") && error.contains("100 tokens"), "{error}");
}

#[test]
fn truncation_and_padding_left_in_the_tokenizer_do_not_count() {
    let dir = tempfile::tempdir().unwrap();
    let model = write_tiny_model(&dir.path().join("m"), 1);
    let long = "a text that is longer than eight tokens";
    let plain = ChatText::open(&model, None).unwrap().encode(long).unwrap();
    let path = model.join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    tokenizer["truncation"] = json!({"max_length": 8, "strategy": "LongestFirst", "stride": 0, "direction": "Right"});
    tokenizer["padding"] = json!({"strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": null,
        "pad_id": 258, "pad_type_id": 0, "pad_token": "<|pad|>"});
    std::fs::write(&path, tokenizer.to_string()).unwrap();
    assert_eq!(ChatText::open(&model, None).unwrap().encode(long).unwrap(), plain);
}

#[test]
fn a_model_without_a_template_takes_the_one_named_and_saves_it() {
    let dir = tempfile::tempdir().unwrap();
    let model = write_tiny_model(&dir.path().join("m"), 1);
    std::fs::write(model.join("tokenizer_config.json"), r#"{"eos_token": "<|im_end|>"}"#).unwrap();
    let error = ChatText::open(&model, None).err().unwrap().to_string();
    assert!(error.contains("no chat template") && error.contains("chatml"), "{error}");
    let text = ChatText::open(&model, Some("chatml")).unwrap();
    let message = Message::new("user", "hi");
    let none = TemplateArgs::new();
    assert_eq!(
        text.with(&none).render(std::slice::from_ref(&message), true).unwrap(),
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    );
    let out = dir.path().join("out");
    std::fs::create_dir(&out).unwrap();
    text.save(&out).unwrap();
    let again = ChatText::open(&out, None).unwrap();
    assert_eq!(again.with(&none).render(&[message], false).unwrap(), "<|im_start|>user\nhi<|im_end|>\n");
}

#[test]
fn a_tokenizer_that_the_library_would_panic_on_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let model = write_tiny_model(dir.path(), 1);
    let path = model.join("tokenizer.json");
    let whole = std::fs::read_to_string(&path).unwrap();
    let mut contradictory: Value = serde_json::from_str(&whole).unwrap();
    contradictory["normalizer"] = json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"});
    let no_json = whole.replacen("\"decoder\":{", "\"decoder\":z", 1);
    assert_ne!(no_json, whole);
    for text in [contradictory.to_string(), no_json] {
        std::fs::write(&path, text).unwrap();
        let message = ChatText::open(&model, None).map(drop).unwrap_err().to_string();
        assert!(message.contains("tokenizer.json: cannot be read"), "{message}");
    }
}

/// The tiny model with `template` and further keys of tokenizer_config.json.
fn with_template(dir: &Path, template: &Value, more: Value) -> PathBuf {
    let folder = dir.join("t");
    let model = if folder.exists() { folder } else { write_tiny_model(&folder, 1) };
    let mut config = json!({"eos_token": "<|im_end|>", "chat_template": template});
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    std::fs::write(model.join("tokenizer_config.json"), config.to_string()).unwrap();
    model
}

#[test]
fn a_turn_that_is_not_trained_is_no_target() {
    let dir = tempfile::tempdir().unwrap();
    let text = ChatText::open(&write_tiny_model(dir.path(), 1), None).unwrap();
    let mut turns = ["q", "bad", "again", "good"].map(|content| Message::new("user", content));
    (turns[1].role, turns[3].role) = ("assistant".into(), "assistant".into());
    turns[1].train = false;
    let tokens = text.with(&TemplateArgs::new()).tokenise(&turns).unwrap();
    let trained: Vec<i64> = tokens.ids.iter().zip(&tokens.target).filter(|(_, t)| **t).map(|(id, _)| *id).collect();
    assert_eq!((text.decode(&trained).unwrap().as_str(), trained.last()), ("good", Some(&257)));
}

#[test]
fn turns_that_a_template_leaves_out_and_answers_that_it_does_not_end_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let turn = |role: &str, content: &str| json!({"role": role, "content": content});
    let thinking = json!({"messages": [turn("user", "q"), turn("assistant", "<think>so</think>a")]});
    let system = json!({"messages": [turn("system", "Be\tbrief."), turn("user", "q"), turn("assistant", "a")]});
    let file = dir.path().join("rows.jsonl");
    write_rows(&file, &[row("q", "a"), thinking, system.clone(), system]);
    let rows = read_rows(&file, &Layout::Format(Format::Auto)).unwrap();
    let counts = |body: &str| {
        let template = json!(format!("{{% for m in messages %}}{body}{{% endfor %}}"));
        let text = ChatText::open(&with_template(dir.path(), &template, json!({})), None).unwrap();
        let none = TemplateArgs::new();
        let encoded =
            encode_rows(&file, &rows, text.with(&none), MaxLength::new(100, 512), Overlong::Truncate).unwrap();
        let unwritten = encoded.unwritten.into_iter().map(|(role, (count, first))| (role, count, first.row));
        (encoded.unended.map(|(count, first)| (count, first.row)), unwritten.collect::<Vec<_>>())
    };
    let (system, assistant) = (("system".to_owned(), 2, 3), ("assistant".to_owned(), 1, 2));
    assert_eq!(counts("{{ m.content }}<|im_end|>\n"), (None, vec![]));
    assert_eq!(counts("{{ m.content | replace('\t', ' ') }}<|im_end|>"), (None, vec![]), "other white space");
    assert_eq!(counts("{% if m.role != 'system' %}{{ m.content }}<|im_end|>{% endif %}"), (None, vec![system.clone()]));
    assert_eq!(
        counts("{% if m.role != 'system' %}{{ m.content.split('</think>')[-1] }}<|im_end|>{% endif %}"),
        (None, vec![assistant, system])
    );
    assert_eq!(counts("{{ m.content }}\n"), (Some((4, 1)), vec![]));
    assert_eq!(counts("{{ m.content }}{% if m.role == 'user' %}<|im_end|>{% endif %}"), (Some((4, 1)), vec![]));
}

#[test]
fn a_template_without_a_generation_prompt_is_noticed_and_its_header_inferred() {
    let dir = tempfile::tempdir().unwrap();
    let found = |template: &str| {
        let text = ChatText::open(&with_template(dir.path(), &json!(template), json!({})), None).unwrap();
        let prompt = text.with(&TemplateArgs::new()).prompt(&[Message::new("user", "q")]).unwrap();
        (text.generation_prompt, prompt)
    };
    let turns = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}";
    let header = "<|im_start|>assistant\n";
    let asked = "<|im_start|>user\nq<|im_end|><|im_start|>assistant\n".to_owned();
    assert_eq!(found(turns), (GenerationPrompt::Missing(Some(header.into())), asked.clone()));
    let with_prompt = format!("{turns}{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}");
    assert_eq!(found(&with_prompt), (GenerationPrompt::Template(header.into()), asked));
    // An answer that follows the user's turn directly needs no header.
    let none = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}";
    assert_eq!(found(none), (GenerationPrompt::Template(String::new()), "q<|im_end|>".into()));
    // The text before an answer is not that of the prompt.
    let rewritten = "{% for m in messages %}<|im_start|>{{ m.role }} {{ messages | length }}\n{{ m.content }}<|im_end|>{% endfor %}";
    assert_eq!(found(rewritten), (GenerationPrompt::Missing(None), "<|im_start|>user 1\nq<|im_end|>".into()));
}

#[test]
fn reasoning_before_an_answer_is_known_by_the_templates_own_mark() {
    let dir = tempfile::tempdir().unwrap();
    let thinks = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}";
    let none = TemplateArgs::new();
    for (template, output, answer, reasoning) in [
        (thinks, "<think>\n1 + 1</think>\n\n 2", "2", Some("<think>\n1 + 1</think>")),
        (thinks, "so</think>no</think>2", "2", Some("so</think>no</think>")),
        (thinks, "2", "2", None),
        ("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}", "a</think>2", "a</think>2", None),
    ] {
        let text = ChatText::open(&with_template(dir.path(), &json!(template), json!({})), None).unwrap();
        let found = text.with(&none).split_reasoning(&text.encode(output).unwrap(), output).unwrap();
        assert_eq!((found.0.as_str(), found.1.as_deref()), (answer, reasoning), "{output}");
    }
    // A mark that is a special token, which the decoded text does not show.
    let model = with_template(dir.path(), &json!(thinks), json!({}));
    let path = model.join("tokenizer.json");
    std::fs::write(&path, std::fs::read_to_string(&path).unwrap().replace("<|pad|>", "</think>")).unwrap();
    let text = ChatText::open(&model, None).unwrap();
    let ids = text.encode("so</think>\n\n2").unwrap();
    assert!(ids.contains(&258));
    let found = text.with(&none).split_reasoning(&ids, &text.decode(&ids).unwrap()).unwrap();
    assert_eq!((found.0.as_str(), found.1.as_deref()), ("2", Some("so")));
}

#[test]
fn template_arguments_reach_the_template() {
    let dir = tempfile::tempdir().unwrap();
    let template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}A{% if \
                    enable_thinking is defined and enable_thinking is false %}!{% endif %}{% endif %}";
    let text = ChatText::open(&with_template(dir.path(), &json!(template), json!({})), None).unwrap();
    let question = [Message::new("user", "q")];
    let off: TemplateArgs = serde_json::from_value(json!({"enable_thinking": false})).unwrap();
    assert_eq!(text.with(&TemplateArgs::new()).prompt(&question).unwrap(), "q<|im_end|>A");
    assert_eq!(text.with(&off).prompt(&question).unwrap(), "q<|im_end|>A!");
}

#[test]
fn a_named_template_wins_and_line_ends_are_those_of_jinja() {
    let dir = tempfile::tempdir().unwrap();
    let own = json!("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}");
    let model = with_template(dir.path(), &own, json!({}));
    let named = dir.path().join("named.jinja");
    std::fs::write(&named, "{% for m in messages %}[{{ m.content }}]\r\n<|im_end|>\r{% endfor %}").unwrap();
    let text = ChatText::open(&model, named.to_str()).unwrap();
    let none = TemplateArgs::new();
    assert_eq!(text.with(&none).render(&[Message::new("user", "q")], false).unwrap(), "[q]\n<|im_end|>\n");
    let listed = json!([{"name": "tool_use", "template": "x"}, {"name": "rag", "template": "y"}]);
    let message = ChatText::open(&with_template(dir.path(), &listed, json!({})), None).err().unwrap().to_string();
    assert!(message.contains("found: rag, tool_use") && message.contains("hint: "), "{message}");
    std::fs::create_dir(model.join("additional_chat_templates")).unwrap();
    std::fs::write(model.join("additional_chat_templates/cite.jinja"), "z").unwrap();
    let message = ChatText::open(&model, None).err().unwrap().to_string();
    assert!(message.contains("found: cite, rag, tool_use"), "{message}");
}

#[test]
fn the_end_of_turn_stops_generation_whatever_the_eos() {
    let dir = tempfile::tempdir().unwrap();
    let template = json!("{% for m in messages %}{{ m.content }}<|im_end|>\n{% endfor %}");
    let model = with_template(dir.path(), &template, json!({"eos_token": "<|pad|>"}));
    std::fs::write(model.join("generation_config.json"), r#"{"eos_token_id": 258, "top_p": 0.5}"#).unwrap();
    let text = ChatText::open(&model, None).unwrap();
    assert_eq!((text.eos_ids.as_slice(), text.end_of_turn, text.stop_ids()), (&[258][..], Some(257), vec![258, 257]));
    let out = dir.path().join("out");
    std::fs::create_dir(&out).unwrap();
    text.save(&out).unwrap();
    let saved: Value =
        serde_json::from_str(&std::fs::read_to_string(out.join("generation_config.json")).unwrap()).unwrap();
    assert_eq!(saved, json!({"eos_token_id": [258, 257], "top_p": 0.5}));
}
