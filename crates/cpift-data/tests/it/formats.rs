//! Data files as people have them: every format and file kind, what stays of a row, and what is
//! refused with which words.

use std::fs;
use std::path::{Path, PathBuf};

use cpift_core::BadInput;
use cpift_core::error::exit_code;
use cpift_core::format::tasks::{Format, Tasks};
use cpift_data::{Layout, Row, read_rows};
use serde_json::{Value, json};

/// Reads a file called `name` that holds `content`.
fn read(name: &str, content: impl AsRef<[u8]>, format: Format) -> anyhow::Result<Vec<Row>> {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(name), content).unwrap();
    read_rows(&dir.path().join(name), &Layout::Format(format))
}

/// The error of a file with `rows` after a good first one.
fn refusal(row: &Value) -> String {
    let good = json!({"question": "q", "answer": "a"});
    let error = read("d.jsonl", format!("{good}\n\n{row}\n"), Format::Auto).unwrap_err();
    assert_eq!(exit_code(&error), 3, "{error}");
    error.downcast::<BadInput>().unwrap().to_string()
}

/// The turns as `role: content`.
fn turns(row: &Row) -> Vec<String> {
    row.messages.iter().map(|m| format!("{}: {}", m.role, m.content)).collect()
}

fn fields(row: &Row) -> Vec<&str> {
    row.fields.keys().map(String::as_str).collect()
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/golden/parquet").join(name)
}

#[test]
fn every_format_is_told_from_its_fields() {
    let said = |speaker: &str, speech: &str, turns: [(&str, &str); 3]| -> Value {
        turns.iter().map(|(who, what)| json!({speaker: who, speech: what})).collect()
    };
    let (user, both) = (json!([{"role": "user", "content": "q"}]), ["user: q", "assistant: a"]);
    let three = ["system: s", "user: q", "assistant: a"];
    let messages = said("role", "content", [("system", "s"), ("user", "q"), ("assistant", "a")]);
    let three_turns = messages.as_array().unwrap();
    let sharegpt = said("from", "value", [("system", "s"), ("human", "q"), ("gpt", "a")]);
    let openai = said("from", "value", [("system", "s"), ("user", "q"), ("assistant", "a")]);
    let cases: Vec<(Value, &[&str], &[&str])> = vec![
        (json!({"id": 7, "messages": messages}), &three, &["id"]),
        (json!({"prompt": "q", "messages": messages, "prompt_id": "x"}), &three, &["prompt", "prompt_id"]),
        (json!({"conversations": sharegpt, "tools": "[]"}), &three, &["tools"]),
        (json!({"conversations": openai}), &three, &[]),
        (json!({"conversations": sharegpt.as_array().unwrap()[1..], "system": "s"}), &three, &[]),
        (json!({"conversations": sharegpt.as_array().unwrap()[1..], "system": ""}), &both, &[]),
        (json!({"instruction": "q", "input": "", "output": "a", "response": "a"}), &both, &["response"]),
        (json!({"instruction": "q", "output": "a", "messages": null}), &both, &["messages"]),
        (json!({"instruction": "add", "input": "1, 2", "output": "3"}), &["user: add\n1, 2", "assistant: 3"], &[]),
        (
            json!({"instruction": "q", "input": null, "output": "a", "system": "s", "history": [["q0", "a0"]]}),
            &["system: s", "user: q0", "assistant: a0", "user: q", "assistant: a"],
            &[],
        ),
        (json!({"prompt": "q", "completion": "a"}), &both, &[]),
        (json!({"prompt": user, "completion": [{"role": "assistant", "content": "a"}]}), &both, &[]),
        (json!({"question": "q", "answer": "a"}), &both, &["answer"]),
        (json!({"system": "s", "prompt": "q", "completion": "a"}), &three, &[]),
        (json!({"system": "s", "question": "q", "answer": "a"}), &three, &["answer"]),
        (json!({"system": "s", "data": ["q", "a"]}), &three, &[]),
        (json!({"system": "t", "prompt": three_turns[..2], "completion": three_turns[2..]}), &three, &[]),
        (json!({"system": " ", "prompt": "q", "completion": "a"}), &both, &[]),
        (json!({"system": 7, "prompt": "q", "completion": "a"}), &both, &["system"]),
        (
            json!({"id": "0", "data": ["q", "a", "q2", "a2"]}),
            &["user: q", "assistant: a", "user: q2", "assistant: a2"],
            &["id"],
        ),
        (json!({"messages": [user[0], {"role": "assistant", "content": "a", "tool_calls": []}]}), &both, &[]),
        // Lists of turns under either name, with either pair of keys.
        (json!({"conversations": messages}), &three, &[]),
        (json!({"messages": sharegpt}), &three, &[]),
        (json!({"conversation": messages, "model": "m"}), &three, &["model"]),
        (json!({"messages": said("role", "value", [("system", "s"), ("human", "q"), ("model", "a")])}), &three, &[]),
        (
            json!({"conversations": said("from", "content", [("system", "s"), ("user", "q"), ("chatgpt", "a")])}),
            &three,
            &[],
        ),
        (json!({"messages": [user[0], {"from": "bard", "value": "a", "role": null, "content": null}]}), &both, &[]),
        (
            json!({"messages": [user[0], {"from": "gpt", "role": "assistant", "content": "a", "value": "a"}]}),
            &both,
            &[],
        ),
        (json!({"prompt": [{"from": "human", "value": "q"}], "completion": "a"}), &both, &[]),
        // Parts of text.
        (
            json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}, {"text": "\n"}, "r"]},
                {"role": "assistant", "content": [{"type": "text", "text": "a", "image_url": null}]}]}),
            &["user: q\nr", "assistant: a"],
            &[],
        ),
        // System turns that say nothing.
        (
            json!({"messages": [{"role": "system", "content": null}, user[0], {"role": "assistant", "content": "a"}]}),
            &both,
            &[],
        ),
        (
            json!({"conversations": [{"from": "system", "value": null}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
            "system": "s"}),
            &three,
            &[],
        ),
        (json!({"messages": said("role", "content", [("system", ""), ("user", "q"), ("assistant", "a")])}), &both, &[]),
        (
            json!({"conversations": said("from", "value", [("system", " \n"), ("human", "q"), ("gpt", "a")])}),
            &both,
            &[],
        ),
        (
            json!({"conversations": said("from", "value", [("system", ""), ("human", "q"), ("gpt", "a")]), "system": "s"}),
            &three,
            &[],
        ),
        (json!({"messages": sharegpt.as_array().unwrap()[1..], "system": "s"}), &three, &[]),
        (json!({"messages": messages, "system": "other"}), &three, &[]),
        (json!({"messages": messages, "system": 7}), &three, &["system"]),
        (json!({"instruction": "q", "output": "a", "system": " "}), &both, &[]),
        // Alpaca joins what is there.
        (json!({"instruction": "", "input": "q", "output": "a"}), &both, &[]),
        (json!({"instruction": null, "input": "q", "output": "a"}), &both, &[]),
    ];
    for (row, expected, left) in cases {
        let rows = read("d.jsonl", row.to_string(), Format::Auto).unwrap_or_else(|e| panic!("{row}: {e}"));
        assert_eq!(turns(&rows[0]), expected, "{row}");
        assert_eq!(fields(&rows[0]), left, "{row}");
    }
}

#[test]
fn gsm8k_keeps_its_answer_for_the_metric() {
    let rows = read("d.jsonl", r##"{"question": "2 + 2?", "answer": "It is 4.\n#### 4"}"##, Format::Auto).unwrap();
    assert_eq!(rows[0].reference(), "It is 4.\n#### 4");
    assert_eq!(rows[0].fields["answer"], "It is 4.\n#### 4");
}

#[test]
fn a_format_that_is_named_is_the_one_taken() {
    let row = json!({"messages": [], "question": "q", "answer": "a"}).to_string();
    assert_eq!(turns(&read("d.jsonl", &row, Format::Gsm8k).unwrap()[0]), ["user: q", "assistant: a"]);
    let error = read("d.jsonl", &row, Format::Alpaca).unwrap_err().to_string();
    assert!(error.contains("line 1: no field instruction") && error.contains("question"), "{error}");
}

#[test]
fn rows_that_cannot_be_used_are_named_with_what_was_expected_and_found() {
    let turn = |role: &str, content: &str| json!({"role": role, "content": content});
    let (user, assistant) = (turn("user", "q"), turn("assistant", "a"));
    let calling = json!({"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "f"}}]});
    for (row, parts) in [
        (json!({"text": "x", "label": 1}), ["no conversation", "text, label", "tasks.toml"].as_slice()),
        (json!({"question": "q", "answer": 2, "options": []}), &["no conversation", "hint: build the conversation"]),
        (json!({}), &["no fields"]),
        (json!([1]), &["not a JSON object", "found: [1]"]),
        (json!({"messages": []}), &["the conversation is empty"]),
        (json!({"messages": "q"}), &["messages is not a list", "found: \"q\""]),
        (
            json!({"messages": "[{\"role\": \"user\"}]"}),
            &["messages is not a list", "hint: the list was saved as text"],
        ),
        (json!({"messages": [{"role": "system"}, user]}), &["turn 1, has no text as its content", "nothing"]),
        (json!({"messages": ["q"]}), &["messages, turn 1, is not an object", "role"]),
        (json!({"messages": [user, {"role": "assistant"}]}), &["turn 2, has no text as its content", "nothing"]),
        (json!({"messages": [user, {"role": "assistant", "content": [1]}]}), &["content", "found: [1]"]),
        (json!({"messages": [user]}), &["does not end with the assistant"]),
        (json!({"messages": [assistant]}), &["turn 1 has the role \"assistant\" where \"user\" is due"]),
        (json!({"messages": [user, turn("bot", "a")]}), &["role \"bot\""]),
        (json!({"messages": [user, turn("assistant", "")]}), &["turn 2, of the assistant, has empty content"]),
        (json!({"messages": [user, calling]}), &["turn 2, belongs to a tool", "found: tool_calls", "hint"]),
        (json!({"messages": [user, assistant, turn("tool", "4")]}), &["turn 3, belongs to a tool", "role: tool"]),
        (
            json!({"conversations": [{"from": "observation", "value": "4"}]}),
            &["belongs to a tool", "from: observation"],
        ),
        (json!({"conversations": [{"from": "function_call", "value": "4"}]}), &["belongs to a tool"]),
        (json!({"conversations": [{"from": "bing", "value": "4"}]}), &["turn 1, is from \"bing\"", "human or user"]),
        (json!({"conversations": [{"role": "user", "content": "4"}]}), &["does not end with the assistant"]),
        (json!({"conversations": [{"role": null, "value": "4"}]}), &["turn 1, has no text as its role", "found: null"]),
        (
            json!({"messages": [{"role": "user", "from": "gpt", "value": "4"}]}),
            &["the role user and is from the assistant"],
        ),
        (json!({"messages": [{"role": "user", "content": "3", "value": "4"}]}), &["a content and another value"]),
        (
            json!({"messages": [user, {"role": "assistant", "content": "a", "weight": 0.5}]}),
            &["turn 2, has a weight", "0 or 1", "found: 0.5"],
        ),
        (
            json!({"messages": [user, {"role": "assistant", "content": "a", "loss": "no"}]}),
            &["has a loss", "found: \"no\""],
        ),
        (
            json!({"messages": [user, {"role": "assistant", "content": "a", "weight": 0, "train": true}]}),
            &["weight and train", "agree"],
        ),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}),
            &["of the type \"image_url\"", "hint"],
        ),
        (json!({"prompt": "q", "completion": null}), &["no conversation", "prompt, completion (null)"]),
        (json!({"prompt": "q", "messages": null}), &["messages (null)"]),
        (json!({"instruction": null, "input": "", "output": "a"}), &["the field instruction is null"]),
        (json!({"instruction": "", "output": "a"}), &["turn 1, of the user, has empty content"]),
        (json!({"instruction": "q", "output": 5}), &["output is not text", "found: 5"]),
        (json!({"instruction": "q", "output": "a", "input": ["x"]}), &["input is not text"]),
        (json!({"instruction": "q", "output": "a", "history": [["q"]]}), &["history, pair 1, has 1 texts"]),
        (json!({"prompt": {"q": 1}, "completion": "a"}), &["prompt is not text"]),
        (json!({"data": ["q", "a", "q2"]}), &["does not end with the assistant"]),
        (json!({"data": ["q", null]}), &["data, turn 2, is not text", "found: null"]),
    ] {
        let error = refusal(&row);
        assert!(error.contains("d.jsonl: line 3: "), "{row}: {error}");
        for part in parts {
            assert!(error.contains(part), "{row}: no {part:?} in {error}");
        }
    }
}

#[test]
fn one_row_is_the_same_in_every_kind_of_file() {
    let row = json!({"question": "q\u{2028}?", "answer": "a"});
    for (name, content, position) in [
        ("d.jsonl", format!("\u{feff}\r\n{row}\r\n"), "line 2"),
        ("d.JSONL", format!("\n{row}"), "line 2"),
        ("d.json", format!("[{row}, {row}]"), "row 1"),
        ("d.json", format!(" \n[\n{row}]\n"), "row 1"),
    ] {
        let rows = read(name, content, Format::Auto).unwrap();
        assert_eq!(rows[0].place.position(), position, "{name}");
        assert_eq!(turns(&rows[0]), ["user: q\u{2028}?", "assistant: a"]);
    }
}

#[test]
fn parquet_holds_what_pyarrow_wrote() {
    let layout = Layout::Format(Format::Auto);
    let expected = read_rows(&golden("rows.jsonl"), &layout).unwrap();
    assert_eq!(expected.len(), 3);
    for name in ["snappy.parquet", "zstd.parquet"] {
        let rows = read_rows(&golden(name), &layout).unwrap();
        for (i, (row, expected)) in rows.iter().zip(&expected).enumerate() {
            assert_eq!((&row.messages, &row.fields), (&expected.messages, &expected.fields), "{name}");
            assert!(row.place.to_string().ends_with(&format!("{name} row {}", i + 1)), "{}", row.place);
        }
        assert_eq!(rows.len(), expected.len(), "{name}");
    }
}

#[test]
fn a_damaged_parquet_file_is_an_error_or_other_text_but_no_panic() {
    let whole = fs::read(golden("snappy.parquet")).unwrap();
    let mut refused = 0;
    for i in (0..whole.len()).step_by(7) {
        let mut damaged = whole.clone();
        damaged[i] ^= 0xFF;
        if let Err(error) = read("d.parquet", damaged, Format::Auto) {
            assert_eq!(exit_code(&error), 3, "byte {i}: {error}");
            refused += 1;
        }
    }
    // The file has no checksums: damage inside a text goes unnoticed.
    assert!(refused > whole.len() / 14, "{refused} of {}", whole.len() / 7);
}

#[test]
fn a_parquet_file_is_not_believed_to_be_larger_than_it_is() {
    let refused = |bytes: Vec<u8>, part: &str| {
        let error = read("d.parquet", bytes, Format::Auto).unwrap_err();
        assert!(exit_code(&error) == 3 && format!("{error:#}").contains(part), "{error:#}");
    };
    // Metadata of a version and, in a field that nobody knows, 2,147,483,647 booleans: the library
    // would count them.
    let metadata = [0x15, 2, 0xb9, 0xf1, 0xff, 0xff, 0xff, 0xff, 7, 0];
    let length = (metadata.len() as u32).to_le_bytes();
    refused([b"PAR1", &metadata[..], &length, b"PAR1"].concat(), "its metadata does not end");
    // The header of the first page, whose uncompressed size is its second field: then negative.
    let whole = fs::read(golden("zstd.parquet")).unwrap();
    assert_eq!(whole[4..11], [0x15, 4, 0x15, 0xdc, 1, 0x15, 0xee]);
    let mut bytes = whole.clone();
    bytes[8] = 0x7d;
    bytes[7] = 0xdd;
    refused(bytes, "a page without a size");
    // 1 GiB of some hundred bytes.
    let mut bytes = whole.clone();
    bytes.splice(7..9, [0x80, 0x80, 0x80, 0x80, 8]);
    refused(bytes, "claims to grow more than a thousandfold");
    // The third field of the metadata is the number of rows, 3, before the list of their groups:
    // then 2^40.
    let (length, mark) = (whole.len() - 8, whole.len() - 4);
    let start = length - u32::from_le_bytes(whole[length..mark].try_into().unwrap()) as usize;
    let at = start + whole[start..].windows(3).position(|part| part == [0x16, 6, 0x19]).unwrap() + 1;
    let metadata = [&whole[start..at], &[0x80, 0x80, 0x80, 0x80, 0x80, 0x40], &whole[at + 1..length]].concat();
    let length = (metadata.len() as u32).to_le_bytes();
    refused([&whole[..start], &metadata[..], &length, b"PAR1"].concat(), "claims to have more rows");
}

#[test]
fn files_that_cannot_be_read_are_refused() {
    let whole = fs::read(golden("zstd.parquet")).unwrap();
    let mut wrong_codec = whole.clone();
    wrong_codec[4..400].fill(0xAA);
    for (name, content, parts) in [
        ("d.jsonl", b"\n \n".as_slice(), ["no rows"].as_slice()),
        ("d.json", b"[]", &["no rows"]),
        (
            "d.jsonl",
            b"{\"question\": \"q\", \"answer\": \"a\"}\n{\"question\"",
            &["line 2", "not a JSON object", "EOF"],
        ),
        ("d.json", b"[{\"question\": \"q\", \"answer\": \"a\"}, 3]", &["row 2", "not a JSON object", "found: 3"]),
        ("d.json", b"[{\"question\": \"q\"", &["not a list of JSON objects", "EOF"]),
        ("d.json", b"{\"question\": \"q\"}\n{\"question\": \"q\"}", &["not a list", "hint", "named .jsonl"]),
        ("d.json", b"{\"version\": 1, \"data\": [{}]}", &["not a list", "fields version, data", "hint: a list inside"]),
        ("d.jsonl", b"[\n{\"question\": \"q\"}\n]", &["line 1", "not a JSON object", "hint", "named .json"]),
        ("d.jsonl", b"\xff\xfe", &["UTF-8", "UTF-16"]),
        ("d.jsonl", b"{}\n\n{\"question\": \"caf\xe9\"}", &["line 3", "UTF-8", "0xE9", "character 18", "ISO-8859-1"]),
        ("d.json", b"[\n1, nan]", &["line 2", "expected ident"]),
        ("d.csv", b"question,answer\n", &["unknown kind", ".jsonl, .json or .parquet", "hint"]),
        ("data", b"", &["unknown kind"]),
        ("d.parquet", b"PAR1 is how it begins", &["Parquet", "expected: a complete Parquet file"]),
        ("d.parquet", &whole[..whole.len() - 1], &["Parquet"]),
        ("d.parquet", &wrong_codec, &["Parquet"]),
    ] {
        let error = read(name, content, Format::Auto).unwrap_err();
        assert_eq!(exit_code(&error), 3, "{error}");
        let error = error.to_string();
        assert!(parts.iter().chain([&name]).all(|part| error.contains(part)), "{name}: {parts:?}: {error}");
    }
}

#[test]
fn keys_say_which_answers_are_trained() {
    let trained = |row: &Value| -> Vec<bool> {
        let row = read("d.jsonl", row.to_string(), Format::Auto).unwrap_or_else(|e| panic!("{row}: {e}")).remove(0);
        row.messages.iter().filter(|turn| turn.role == "assistant").map(|turn| turn.train).collect()
    };
    let row = |key: &str, off: Value, on: Value| {
        json!({"messages": [{"role": "system", "content": "s", key: off}, {"role": "user", "content": "q", key: off},
            {"role": "assistant", "content": "bad", key: off}, {"role": "user", "content": "again"},
            {"role": "assistant", "content": "good", key: on}]})
    };
    for key in ["weight", "train", "trainable", "training", "loss", "loss_mask"] {
        for (off, on) in
            [(json!(0), json!(1)), (json!(0.0), json!(1.0)), (json!(false), json!(true)), (json!(false), Value::Null)]
        {
            let row = row(key, off, on);
            assert_eq!(trained(&row), [false, true], "{row}");
            let mut pairs = row;
            pairs["conversations"] = pairs.as_object_mut().unwrap().shift_remove("messages").unwrap();
            assert_eq!(trained(&pairs), [false, true], "{pairs}");
        }
    }
    assert_eq!(trained(&row("id", json!(0), json!(1))), [true, true]);
    let mut both = row("weight", json!(0), json!(1));
    both["messages"][2]["train"] = json!(false);
    assert_eq!(trained(&both), [false, true]);
    // Answers within a prompt are not trained, unless they say so.
    let both = both["messages"].as_array().unwrap();
    let mut prompt = both[..4].to_vec();
    ["weight", "train"].iter().for_each(|key| drop(prompt[2].as_object_mut().unwrap().shift_remove(*key)));
    let answer = json!([{"role": "assistant", "content": "a"}]);
    assert_eq!(trained(&json!({"prompt": prompt, "completion": answer})), [false, true]);
    prompt[2]["train"] = json!(true);
    assert_eq!(trained(&json!({"prompt": prompt, "completion": answer})), [true, true]);
    let error = read("d.jsonl", row("weight", json!(0), json!(0)).to_string(), Format::Auto).unwrap_err().to_string();
    assert!(error.contains("no row has an answer to train") && error.contains("weight"), "{error}");
    // Chat templates see the two keys they know.
    let row = read("d.jsonl", row("weight", json!(0), json!(1)).to_string(), Format::Auto).unwrap().remove(0);
    assert_eq!(serde_json::to_value(&row.messages[2]).unwrap(), json!({"role": "assistant", "content": "bad"}));
}

#[test]
fn numbers_that_json_lacks_are_no_error_in_columns_that_nobody_reads() {
    let rows = "{\"question\": \"q\", \"answer\": \"a\"}\n\
        {\"question\": \"NaN\", \"answer\": \"a\", \"score\": NaN, \"more\": {\"x\": [-Infinity, 1e999]}}";
    let list = format!("[{}]", rows.replace('\n', ",\n"));
    for (name, text) in [("d.jsonl", rows), ("d.json", &list)] {
        let rows = read(name, text, Format::Auto).unwrap();
        assert_eq!(turns(&rows[1]), ["user: NaN", "assistant: a"], "{name}");
        assert_eq!(cpift_data::shown(&rows[1].fields["more"]), "{\"x\":[-Infinity,1e999]}");
    }
    let good = "{\"question\": \"q\", \"answer\": \"a\"}\n\n";
    for (row, parts) in [
        ("{\"prompt\": \"q\", \"completion\": NaN}", ["line 3", "completion is not text", "found: NaN"]),
        ("{\"messages\": -Infinity}", ["line 3", "messages is not a list", "found: -Infinity"]),
        (
            "{\"prompt\": \"q\", \"completion\": 18446744073709551616}",
            ["line 3", "not text", "found: 18446744073709551616"],
        ),
        ("{\"text\": NaN}", ["line 3", "no conversation", "text (NaN)"]),
        ("{\"messages\": [{\"role\": \"user\", \"content\": NaN}]}", ["line 3", "as its content", "found: NaN"]),
        ("{\"a\": NaN, \"b\": NaN \"c\": 1}", ["line 3", "expected `,` or `}`", "column 21: \"a\": NaN, \"b\": NaN"]),
    ] {
        let error = read("d.jsonl", format!("{good}{row}"), Format::Auto).unwrap_err().to_string();
        assert!(parts.iter().all(|part| error.contains(part)) && !error.contains("unusable"), "{row}: {error}");
        assert!(!error.contains("line 1"), "{error}");
    }
    // In joined data sets NaN stands in the columns of the others.
    let joined = "{\"messages\": NaN, \"instruction\": \"q\", \"output\": \"a\"}";
    assert_eq!(turns(&read("d.jsonl", joined, Format::Auto).unwrap()[0]), ["user: q", "assistant: a"]);
}

#[test]
fn binary_columns_are_text_where_they_are_utf8() {
    // scripts/oracle/golden_parquet.py: question and answer as bytes, id as bytes that are no text,
    // score with NaN.
    let rows = read_rows(&golden("binary.parquet"), &Layout::Format(Format::Auto)).unwrap();
    assert_eq!(turns(&rows[0]), ["user: où ?", "assistant: là"]);
    assert_eq!(turns(&rows[1]), ["user: q", "assistant: a"]);
    assert_eq!(cpift_data::shown(&rows[0].fields["id"]), "bytes that are not UTF-8 text");
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("d.parquet");
    fs::copy(golden("binary.parquet"), &file).unwrap();
    for (column, found) in
        [("id", "bytes that are not UTF-8 text"), ("score", "NaN"), ("tags[1]", "bytes that are not UTF-8 text")]
    {
        let toml = dir.path().join("tasks.toml");
        let task = format!(
            "[[task]]\nname = 'a'\ntrain = 'd.parquet'\neval = 'd.parquet'\nprompt = '{{{{ {column} }}}}'\ncompletion = 'x'"
        );
        fs::write(&toml, task).unwrap();
        let task = Tasks::read(&toml).unwrap().list.remove(0);
        let error = read_rows(&file, &Layout::of(&task).unwrap()).unwrap_err().to_string();
        let name = column.split('[').next().unwrap();
        assert!(error.contains("row 1") && error.contains(&format!("the column {name} holds {found}")), "{error}");
    }
}

/// Reads `row` as the task with the further `keys` of tasks.toml.
fn by_templates(keys: &str, row: &Value) -> anyhow::Result<Row> {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("d.jsonl"), row.to_string()).unwrap();
    let toml = dir.path().join("tasks.toml");
    fs::write(&toml, format!("[[task]]\nname = 'a'\ntrain = 'd.jsonl'\neval = 'd.jsonl'\n{keys}")).unwrap();
    let task = Tasks::read(&toml)?.list.remove(0);
    Ok(read_rows(&task.train, &Layout::of(&task)?)?.remove(0))
}

#[test]
fn templates_make_the_conversation_and_leave_the_columns() {
    let row = json!({"passage": "P", "question": "Q?", "options": ["x", "y"], "answer": 1});
    let keys = r#"
        system = "{% if hint is defined %}{{ hint }}{% endif %}"
        prompt = "{{ passage }}\n{{ question }}{% for o in options %}\n{{ 'AB'[loop.index0] }}. {{ o }}{% endfor %}"
        completion = "{{ 'AB'[answer] }}""#;
    let made = by_templates(keys, &row).unwrap();
    assert_eq!(turns(&made), ["user: P\nQ?\nA. x\nB. y", "assistant: B"]);
    assert_eq!(Value::Object(made.fields), row);
    let with_hint = json!({"passage": "P", "question": "Q?", "options": [], "answer": 0, "hint": "Think."});
    assert_eq!(turns(&by_templates(keys, &with_hint).unwrap())[0], "system: Think.");
}

#[test]
fn templates_that_fail_name_file_row_and_column() {
    let row = json!({"question": "q", "answer": "a", "empty": ""});
    for (keys, parts) in [
        (
            "prompt = '{{ passage }}'\ncompletion = '{{ answer }}'",
            ["line 1", "prompt", "passage", "question, answer"].as_slice(),
        ),
        (
            "prompt = '{{ question }}'\ncompletion = '{{ raise_exception(answer + \"!\") }}'",
            &["line 1", "completion fails: a!"],
        ),
        ("prompt = '{{ empty }}'\ncompletion = '{{ answer }}'", &["line 1", "of the user, has empty content"]),
        ("prompt = '{{ question'\ncompletion = '{{ answer }}'", &["tasks.toml", "task a", "prompt does not parse"]),
    ] {
        let error = by_templates(keys, &row).unwrap_err();
        assert_eq!(exit_code(&error), 3, "{error}");
        let error = error.to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{keys}: {parts:?}: {error}");
    }
}
