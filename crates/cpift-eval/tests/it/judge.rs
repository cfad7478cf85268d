//! `cpift-eval judge` through the real binary, against a server in the test: grades and kept
//! verdicts.

use crate::judge_server;
use std::fs;
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::judge_server::{Act, Evaluation, KEY, Server, says};
use serde_json::{Value, json};

/// A reply whose grade is the answer itself.
fn by_digits(server_answer: &str) -> Act {
    says(&format!("So so. Rating: [[{server_answer}]]"))
}

#[test]
fn grades_become_the_metric_and_other_verdicts_are_counted() {
    let e = Evaluation::new(&["4", "7", "99", "none", "8"]);
    let server = Server::start(|r, _| match r.answer().as_str() {
        "none" => says("I would rather not say."),
        answer => by_digits(answer),
    });
    let run = e.judge(&server, &["--json"]).ok();
    for index in [0, 2] {
        let task = e.task(index);
        // Of 4, 7 and 8: mean 19/3; sample deviation sqrt(13/3), over sqrt(3).
        let metric = &task["metric"];
        assert_eq!((&metric["name"], &metric["n"]), (&json!("judge"), &json!(3)));
        assert!((metric["value"].as_f64().unwrap() - 19.0 / 3.0).abs() < 1e-12, "{metric}");
        assert!((metric["stderr"].as_f64().unwrap() - (13.0f64 / 9.0).sqrt()).abs() < 1e-12, "{metric}");
        let counts = json!({"rated": 3, "unrated": 1, "out_of_range": 1, "failed": 0, "prompt_tokens": 55,
            "completion_tokens": 35});
        assert_eq!(task["settings"], json!({"judge": {"model": "j", "wording": 1}, "verdicts": counts}));
    }
    assert_eq!((e.task(1)["metric"].clone(), e.task(1)["settings"].clone()), (Value::Null, json!({})));
    let printed: Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!(printed["tasks"][0], e.task(0));
    let scores: Vec<Value> = e
        .read("outputs.jsonl")
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .filter(|row| row["task"] == "alpaca")
        .map(|row| row["score"].clone())
        .collect();
    assert_eq!(scores, [json!(4.0), json!(7.0), Value::Null, Value::Null, json!(8.0)]);
    // The judge's reply and the grade read from it.
    let rows: Vec<Value> = e.read("outputs.jsonl").lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((&rows[1]["verdict"], &rows[1]["extracted"]), (&json!("So so. Rating: [[4]]"), &json!(4.0)));
    assert_eq!((&rows[7]["verdict"], &rows[7]["extracted"]), (&json!("I would rather not say."), &Value::Null));
    let mut places: Vec<(String, u64)> = e
        .read("verdicts.jsonl")
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .map(|verdict| (verdict["task"].as_str().unwrap().to_owned(), verdict["row"].as_u64().unwrap()))
        .collect();
    places.sort();
    let expected: Vec<(String, u64)> =
        ["alpaca", "ultrachat"].iter().flat_map(|task| (1..=5).map(|row| ((*task).to_owned(), row))).collect();
    assert_eq!(places, expected);
    assert!(e.read("outputs.jsonl").starts_with("{\"row\":1,\"output\":\"18\",\"score\":1.0,\"task\":\"plain\"}\n"));
}

#[test]
fn the_judge_sees_the_conversation_the_answer_and_the_key() {
    let e = Evaluation::new(&["It is blue."]);
    let server = Server::start(|_, _| says("[[5]]"));
    e.judge(&server, &[]).ok();
    let requests = server.requests();
    assert_eq!(requests.len(), 2);
    for request in &requests {
        assert!(request.head.starts_with("POST /v1/chat/completions HTTP/1.1"), "{}", request.head);
        assert!(request.head.contains(&format!("authorization: Bearer {KEY}")), "{}", request.head);
        assert_eq!((&request.body["model"], &request.body["temperature"]), (&json!("j"), &json!(0)));
        assert_eq!(request.answer(), "It is blue.");
    }
    let text = |r: &judge_server::Request| r.body["messages"][1]["content"].as_str().unwrap().to_owned();
    let chat = requests.iter().map(text).find(|text| text.contains("Question 0")).unwrap();
    assert!(chat.contains("### user:\nHello\n\n### assistant:\nHi\n\n### user:\nQuestion 0\n"), "{chat}");
    // Without a variable no key is sent.
    let other = Evaluation::new(&["It is red."]);
    other.judge_env(&server, &[], &[("OPENAI_API_KEY", "")]).ok();
    assert!(!server.requests()[2].head.to_lowercase().contains("authorization"));
}

#[test]
fn a_rerun_asks_nothing_and_an_interrupted_one_only_what_is_missing() {
    let e = Evaluation::new(&["4", "7", "8"]);
    let server = Server::start(|r, _| by_digits(&r.answer()));
    e.judge(&server, &[]).ok();
    assert_eq!(server.requests().len(), 6);
    let (scores, outputs) = (e.read("scores.json"), e.read("outputs.jsonl"));
    e.judge(&server, &[]).ok();
    assert_eq!(server.requests().len(), 6, "asked twice");
    // An interrupted run leaves an incomplete last line.
    let verdicts = e.read("verdicts.jsonl");
    fs::write(e.path().join("verdicts.jsonl"), &verdicts[..verdicts.len() - 9]).unwrap();
    e.judge(&server, &[]).ok();
    assert_eq!(server.requests().len(), 7);
    assert_eq!((e.read("scores.json"), e.read("outputs.jsonl"), e.read("verdicts.jsonl")), (scores, outputs, verdicts));
    // Another judge is asked everything.
    e.judge_as("k", &server).ok();
    assert_eq!((server.requests().len(), &e.task(0)["settings"]["judge"]["model"]), (13, &json!("k")));
}

#[test]
fn equal_questions_are_asked_once_and_a_limit_chooses_the_first() {
    let e = Evaluation::new(&["4", "7", "8"]);
    let outputs = e.read("outputs.jsonl");
    fs::write(e.path().join("outputs.jsonl"), outputs.replace("Ask 1", "Ask 0").replace("\"7\"", "\"4\"")).unwrap();
    let server = Server::start(|r, _| by_digits(&r.answer()));
    e.judge(&server, &["--limit", "2"]).ok();
    assert_eq!(server.requests().len(), 3, "one of alpaca, two of ultrachat");
    assert_eq!(e.task(0)["metric"]["n"], 2);
    e.judge(&server, &[]).ok();
    assert_eq!(server.requests().len(), 5);
    assert_eq!(e.task(0)["metric"]["n"], 3);
    // Known verdicts count whatever the limit.
    let (scores, outputs) = (e.read("scores.json"), e.read("outputs.jsonl"));
    e.judge(&server, &["--limit", "1"]).ok();
    assert_eq!((server.requests().len(), e.read("scores.json"), e.read("outputs.jsonl")), (5, scores, outputs));
    assert!(e.read("outputs.jsonl").lines().last().unwrap().contains("\"score\":8.0"));
}

#[test]
fn a_limit_by_another_judge_shows_its_grades_alone() {
    let e = Evaluation::new(&["4", "7"]);
    let server = Server::start(|r, _| by_digits(&r.answer()));
    e.judge(&server, &[]).ok();
    e.judge_more("k", &server, &["--limit", "1"])
        .ok()
        .says(&["the grades by {\"model\":\"k\"", "replace those by {\"model\":\"j\""]);
    let task = e.task(0);
    assert_eq!((&task["metric"]["n"], &task["settings"]["verdicts"]["failed"]), (&json!(1), &json!(0)));
    let last: Value = serde_json::from_str(e.read("outputs.jsonl").lines().last().unwrap()).unwrap();
    assert!(last["score"].is_null() && last.get("verdict").is_none() && last.get("extracted").is_none(), "{last}");
}

#[test]
fn the_judging_leaves_a_record_that_a_rerun_without_questions_keeps() {
    let e = Evaluation::new(&["4", "7"]);
    let before = cpift_core::format::digest::Digest::of_file(&e.path().join("scores.json")).unwrap().to_string();
    let server = Server::start(|r, _| by_digits(&r.answer()));
    e.judge(&server, &["--max-tokens", "300"]).ok();
    let text = e.read("judge.cpift.json");
    let record: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((&record["stage"], &record["inputs"]["scores"]["digest"]), (&json!("cpift-eval"), &json!(before)));
    let arguments = record["arguments"].as_array().unwrap();
    assert!(arguments.contains(&json!("--judge-model")) && arguments.contains(&json!(server.url)), "{record}");
    let facts = &record["facts"];
    let named = ["judge", "base_url", "wording", "max_tokens", "temperature", "asked", "failed"].map(|n| &facts[n]);
    assert_eq!(named, [&json!("j"), &json!(server.url), &json!(1), &json!(300), &json!(0), &json!(4), &json!(0)]);
    let questions = facts["questions"].as_str().unwrap().to_owned();
    e.judge(&server, &[]).ok();
    assert_eq!(e.read("judge.cpift.json"), text);
    // Other questions have another digest.
    std::fs::write(e.path().join("outputs.jsonl"), e.read("outputs.jsonl").replace("Ask 1", "Ask 9")).unwrap();
    e.judge(&server, &[]).ok();
    let facts = serde_json::from_str::<Value>(&e.read("judge.cpift.json")).unwrap()["facts"].clone();
    assert!(facts["asked"] == 1 && facts["questions"] != json!(questions), "{facts}");
}

/// Three requests wait for each other: fewer in flight would time out, more would be counted.
#[test]
fn concurrency_is_reached_and_not_exceeded() {
    static NOW: AtomicUsize = AtomicUsize::new(0);
    static MOST: AtomicUsize = AtomicUsize::new(0);
    let e = Evaluation::new(&["1", "2", "3", "4", "5", "6", "7", "8", "9"]);
    let meeting = Barrier::new(3);
    let server = Server::start(move |r, _| {
        MOST.fetch_max(NOW.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        meeting.wait();
        NOW.fetch_sub(1, Ordering::SeqCst);
        by_digits(&r.answer())
    });
    e.judge(&server, &["--concurrency", "3", "--timeout", "60", "--retries", "0"]).ok();
    assert_eq!((server.requests().len(), MOST.load(Ordering::SeqCst)), (18, 3));
}

#[test]
fn outputs_do_not_depend_on_the_concurrency() {
    let answers = ["1", "2", "3", "x", "5", "66", "7"];
    let judged = |concurrency: &str| {
        let e = Evaluation::new(&answers);
        let server = Server::start(|r, _| by_digits(&r.answer()));
        e.judge(&server, &["--concurrency", concurrency]).ok();
        let mut verdicts: Vec<String> = e.read("verdicts.jsonl").lines().map(str::to_owned).collect();
        verdicts.sort();
        (e.read("scores.json"), e.read("outputs.jsonl"), verdicts)
    };
    assert_eq!(judged("1"), judged("8"));
}

#[test]
fn folders_and_arguments_that_cannot_be_judged() {
    let server = Server::start(|_, _| says("[[5]]"));
    let e = Evaluation::new(&["a"]);
    e.judge(&server, &["--concurrency", "0"]).usage_error(&["--concurrency"]);
    e.judge(&server, &["--max-tokens", "0"]).usage_error(&["--max-tokens"]);
    e.judge_as(&format!("x{KEY}"), &server).usage_error(&["an argument contains the key and would be recorded"]);
    e.judge(&server, &["--key-env", KEY]).usage_error(&["NAME of an environment variable"]);
    e.judge(&server, &["--key-env", "CPIFT_NOT_SET"]).usage_error(&["NAME of an environment variable"]);
    let fixed = ["judge", e.path().to_str().unwrap(), "--judge-model", "j"];
    let none = cpift_testkit::run_with(env!("CARGO_BIN_EXE_cpift-eval"), fixed, &[("OPENAI_BASE_URL", "")]);
    none.usage_error(&["no endpoint", "--base-url", "OPENAI_BASE_URL"]);
    fs::write(e.path().join("outputs.jsonl"), "{\"task\": \"alpaca\", \"output\": \"x\"}\n").unwrap();
    e.judge(&server, &[]).bad_input(&["outputs.jsonl", "line 1", "expected: output, and messages"]);
    fs::write(e.path().join("scores.json"), e.read("scores.json").replace("\"judge\": null", "")).unwrap();
    e.judge(&server, &[]).bad_input(&["contains no answers to grade", "metric = \"judge\""]);
    fs::remove_file(e.path().join("scores.json")).unwrap();
    e.judge(&server, &[]).bad_input(&["scores.json"]);
    assert!(server.requests().is_empty());
}

#[test]
fn the_address_may_come_from_the_environment_and_the_key_from_any_variable() {
    let server = Server::start(|_, _| says("[[5]]"));
    let e = Evaluation::new(&["a"]);
    let fixed = ["judge", e.path().to_str().unwrap(), "--judge-model", "j", "--key-env", "MY_KEY"];
    let env = [("OPENAI_BASE_URL", server.url.as_str()), ("MY_KEY", KEY)];
    cpift_testkit::run_with(env!("CARGO_BIN_EXE_cpift-eval"), fixed, &env).ok();
    assert!(server.requests()[0].head.contains(KEY));
}
