//! `cpift-eval judge` through the real binary, against endpoints that fail.

use std::time::{Duration, SystemTime};

use crate::judge_server::{Act, Evaluation, KEY, Server, says};
use serde_json::json;

fn respond(status: u16, body: &str) -> Act {
    Act::Respond(status, "", body.to_owned())
}

/// A failing reply.
type Failing = fn() -> Act;

/// A server on which the first request for each question fails with `act` and the second succeeds.
fn fails_once(act: Failing) -> Server {
    Server::start(move |_, before| if before == 0 { act() } else { says("[[6]]") })
}

#[test]
fn transient_failures_are_retried() {
    let cases: [(Failing, &str); 5] = [
        (|| respond(429, "{\"error\": \"slow down\"}"), "429"),
        (|| respond(500, "oops"), "500"),
        (|| respond(503, ""), "503"),
        (|| Act::Drop, "no reply"),
        (|| Act::Stall, "timeout"),
    ];
    for (act, named) in cases {
        let e = Evaluation::new(&["a"]);
        let server = fails_once(act);
        e.judge(&server, &["--timeout", "2", "--retries", "3"]).ok().says(&[named, "retrying in", &server.url]);
        assert_eq!(server.requests().len(), 4, "{named}");
        assert_eq!(e.task(0)["metric"]["value"], 6.0, "{named}");
    }
}

#[test]
fn a_retry_waits_as_long_as_the_endpoint_asks_for() {
    // Without Retry-After the first wait is half a second at most.
    let date = || httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(4));
    let cases: [(&dyn Fn() -> String, f64); 3] = [(&|| "2".into(), 2.0), (&|| "1.5".into(), 1.5), (&date, 1.0)];
    for (value, least) in cases {
        let value = value();
        let e = Evaluation::new(&["a"]);
        let headers: &'static str = format!("retry-after: {value}\r\n").leak();
        let server =
            Server::start(move |_, n| if n == 0 { Act::Respond(429, headers, "{}".into()) } else { says("[[6]]") });
        e.judge(&server, &["--limit", "1", "--concurrency", "1"]).ok();
        let requests = server.requests();
        assert_eq!(requests[0].body, requests[1].body);
        let waited = (requests[1].at - requests[0].at).as_secs_f64();
        assert!(waited >= least, "{value}: {waited}");
    }
}

#[test]
fn lasting_failures_are_counted_and_only_their_questions_asked_again() {
    let e = Evaluation::new(&["good", "bad"]);
    let broken = Server::start(|r, _| if r.answer() == "bad" { respond(500, "oops") } else { says("[[6]]") });
    e.judge(&broken, &["--retries", "1"]).expect_code(1).says(&[
        "2 questions have no answer",
        "500",
        "oops",
        &broken.url,
    ]);
    assert_eq!(broken.requests().len(), 6, "each bad one twice");
    let task = e.task(0);
    assert_eq!((&task["metric"]["n"], &task["settings"]["verdicts"]["failed"]), (&json!(1), &json!(1)));
    let mended = Server::start(|_, _| says("[[8]]"));
    e.judge(&mended, &[]).ok();
    assert_eq!(mended.requests().len(), 2);
    let task = e.task(0);
    assert_eq!((&task["metric"]["value"], &task["settings"]["verdicts"]["failed"]), (&json!(7.0), &json!(0)));
}

#[test]
fn bodies_that_are_not_completions_are_quoted() {
    let long = "x".repeat(5000);
    let cases = [
        ("<html>\n<body>Sign in</body></html>".to_owned(), "found: \"<html>\\n<body>Sign in"),
        ("{\"choices\": [{\"mess".to_owned(), "found: \"{\\\"choices\\\": [{\\\"mess\""),
        ("{\"choices\": []}".to_owned(), "found: \"{\\\"choices\\\": []}\""),
        ("{\"error\": \"overloaded\"}".to_owned(), "overloaded"),
        (format!("\u{1b}[31m{long}"), "found: \"\\u{1b}[31mxxx"),
    ];
    for (body, shown) in cases {
        let e = Evaluation::new(&["a"]);
        let server = Server::start(move |_, _| respond(200, &body));
        let run = e.judge(&server, &[]).expect_code(1);
        let run = run.says(&[&server.url, "not a chat completion", "choices[0].message.content", shown]);
        assert!(run.stderr.len() < 3000, "{}", run.stderr);
        assert_eq!(server.requests().len(), 2, "asked again: {shown}");
        // No verdict: the task still waits for a judge.
        assert_eq!((e.task(0)["metric"].is_null(), &e.task(0)["settings"]), (true, &json!({"judge": null})));
        assert_eq!(e.read("verdicts.jsonl"), "");
    }
}

/// A completion that ended for `reason`.
fn ends(content: &str, reason: &str) -> Act {
    respond(
        200,
        &format!("{{\"choices\": [{{\"message\": {{\"content\": {content}}}, \"finish_reason\": \"{reason}\"}}]}}"),
    )
}

#[test]
fn a_judge_that_fails_throughout_leaves_the_grades_that_were_there() {
    let e = Evaluation::new(&["a", "b"]);
    let good = Server::start(|_, _| says("[[6]]"));
    e.judge(&good, &[]).ok();
    let all = ["scores.json", "outputs.jsonl", "verdicts.jsonl", "judge.cpift.json"].map(|name| e.read(name));
    let down = Server::start(|_, _| respond(500, "oops"));
    e.judge_more("k", &down, &["--retries", "0"]).expect_code(1).says(&["4 questions have no answer"]);
    assert_eq!(down.requests().len(), 4);
    assert_eq!(all, ["scores.json", "outputs.jsonl", "verdicts.jsonl", "judge.cpift.json"].map(|name| e.read(name)));
}

#[test]
fn a_useless_reply_is_not_a_verdict_and_is_asked_again() {
    let cases: [(Failing, &str); 4] = [
        (|| ends("null", "stop"), "the reply is empty"),
        (|| ends("\" \\n\"", "stop"), "the reply is empty"),
        (|| ends("\"Let me think\"", "length"), "cut off at 64 tokens, before its rating: raise --max-tokens"),
        (|| ends("\"\"", "length"), "cut off at 64 tokens"),
    ];
    for (act, named) in cases {
        let e = Evaluation::new(&["a"]);
        let server = Server::start(move |_, before| if before == 0 { act() } else { says("[[6]]") });
        e.judge(&server, &["--max-tokens", "64"]).expect_code(1).says(&["2 questions have no answer", named]);
        assert_eq!((e.read("verdicts.jsonl"), &e.task(0)["settings"]), (String::new(), &json!({"judge": null})));
        assert_eq!((server.requests().len(), &server.requests()[0].body["max_tokens"]), (2, &json!(64)));
        e.judge(&server, &["--max-tokens", "64"]).ok();
        assert_eq!((server.requests().len(), &e.task(0)["metric"]["value"]), (4, &json!(6.0)), "{named}");
    }
    // A reply cut off after its rating counts.
    let e = Evaluation::new(&["a"]);
    let server = Server::start(|_, _| ends("\"[[7]] because\"", "length"));
    e.judge(&server, &[]).ok();
    assert_eq!((&e.task(0)["metric"]["value"], &server.requests()[0].body["max_tokens"]), (&json!(7.0), &json!(1024)));
}

#[test]
fn texts_in_parts_and_replies_without_counts_are_read() {
    let bodies = [
        r#"{"choices": [{"message": {"content": "[[7]]"}}]}"#,
        r#"{"choices": [{"message": {"content": [{"type": "text", "text": "[["}, {"type": "text", "text": "7]]"}]}}],
            "usage": {"prompt_tokens": null}, "error": null}"#,
        r#"{"choices": [{"message": {"content": "[[7]]"}}], "usage": null}"#,
    ];
    for body in bodies {
        let e = Evaluation::new(&["a"]);
        let server = Server::start(move |_, _| respond(200, body));
        e.judge(&server, &[]).ok();
        let task = e.task(0);
        assert_eq!(
            (&task["metric"]["value"], &task["settings"]["verdicts"]["prompt_tokens"]),
            (&json!(7.0), &json!(0))
        );
    }
}

/// Newer OpenAI models refuse two fields that all others accept.
#[test]
fn refused_fields_are_replaced_for_all_further_requests() {
    let e = Evaluation::new(&["a", "b", "c"]);
    let server = Server::start(|r, _| {
        let refuse = |what: &str| respond(400, &format!("{{\"error\": {{\"message\": \"{what}\"}}}}"));
        if r.body.get("max_tokens").is_some() {
            refuse("Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        } else if r.body.get("temperature").is_some() {
            refuse("Unsupported value: 'temperature' does not support 0 with this model.")
        } else {
            says("[[6]]")
        }
    });
    e.judge(&server, &["--concurrency", "1"]).ok().says(&["max_completion_tokens", "refuses temperature 0"]);
    let requests = server.requests();
    assert_eq!(requests.len(), 8, "two refusals, six answers");
    for request in &requests[2..] {
        assert_eq!(request.body["max_completion_tokens"], json!(1024), "{}", request.body);
    }
    let record: serde_json::Value = serde_json::from_str(&e.read("judge.cpift.json")).unwrap();
    assert!(record["facts"]["temperature"].is_null());
    // A persistent refusal is reported after at most three requests per question.
    let e = Evaluation::new(&["a"]);
    let server = Server::start(|_, _| respond(400, "max_tokens and temperature are bad"));
    e.judge(&server, &["--limit", "1", "--concurrency", "1"]).expect_code(1).says(&["the question is refused"]);
    assert_eq!(server.requests().len(), 6);
    // Another status does not change the form of the request.
    let e = Evaluation::new(&["a"]);
    let server = Server::start(|_, _| respond(422, "max_tokens"));
    e.judge(&server, &[]).expect_code(1);
    assert_eq!(server.requests().len(), 2);
}

#[test]
fn an_error_under_a_status_of_success_is_treated_by_its_code() {
    let e = Evaluation::new(&["a"]);
    let server = fails_once(|| respond(200, "{\"error\": {\"code\": 429, \"message\": \"slow down\"}}"));
    e.judge(&server, &[]).ok().says(&["error 429", "slow down", "retrying in"]);
    assert_eq!((server.requests().len(), &e.task(0)["metric"]["value"]), (4, &json!(6.0)));
    let e = Evaluation::new(&["a"]);
    let server =
        Server::start(|_, _| respond(200, &format!("{{\"error\": {{\"code\": 400, \"message\": \"bad {KEY}\"}}}}")));
    e.judge(&server, &[]).expect_code(1).says(&["error 400", "found: \"bad (key)\"", "2 questions have no answer"]);
    assert_eq!(server.requests().len(), 2, "asked again");
}

#[test]
fn a_reply_that_is_too_long_is_not_read_to_its_end() {
    let e = Evaluation::new(&["a"]);
    let server = Server::start(|_, _| respond(200, &"x".repeat(5 << 20)));
    e.judge(&server, &["--limit", "1"]).expect_code(1).says(&["longer than"]);
}

#[test]
fn a_refused_key_stops_everything_at_once_and_is_not_repeated() {
    for status in [401, 403] {
        let e = Evaluation::new(&["a", "b", "c", "d"]);
        let before = (e.read("scores.json"), e.read("outputs.jsonl"));
        let server =
            Server::start(move |_, _| respond(status, &format!("{{\"error\": \"Incorrect API key: {KEY}\"}}")));
        let run = e.judge(&server, &["--concurrency", "1"]);
        run.bad_input(&[&server.url, "the key is refused", "Incorrect API key: (key)", "OPENAI_API_KEY"]);
        assert!(server.requests().len() <= 2, "the next request may be on its way when the first is refused");
        assert_eq!(before, (e.read("scores.json"), e.read("outputs.jsonl")));
        e.judge_env(&server, &[], &[("OPENAI_API_KEY", "")]).bad_input(&["the endpoint requires a key"]);
    }
}

#[test]
fn the_key_is_taken_out_of_whatever_comes_back() {
    let cases: [Failing; 4] = [
        || says(&format!("You sent {KEY}. [[6]]")),
        || respond(200, &format!("<html>{KEY}</html>")),
        || respond(500, KEY),
        || respond(400, &format!("{{\"echo\": \"Bearer {KEY}\"}}")),
    ];
    for act in cases {
        let e = Evaluation::new(&["a"]);
        let server = Server::start(move |_, _| act());
        let run = e.judge(&server, &["--retries", "1", "--json"]);
        let seen = run.stderr + &e.read("verdicts.jsonl");
        assert!(seen.contains("(key)"), "{seen}");
    }
}

#[test]
fn a_wrong_address_stops_everything_at_once() {
    let cases: [Failing; 2] =
        [|| respond(404, "no such page"), || Act::Respond(307, "location: http://127.0.0.1:9/\r\n", "moved".into())];
    for act in cases {
        let e = Evaluation::new(&["a", "b"]);
        let server = Server::start(move |_, _| act());
        e.judge(&server, &["--concurrency", "1"]).bad_input(&[&server.url, "no such endpoint or model", "/v1"]);
        assert!(server.requests().len() <= 2);
    }
}

#[test]
fn an_endpoint_that_is_down_is_given_up_and_what_was_answered_is_kept() {
    let answers: Vec<String> = (0..20).map(|i| i.to_string()).collect();
    let answers: Vec<&str> = answers.iter().map(String::as_str).collect();
    let e = Evaluation::new(&answers);
    let server = Server::start(|r, _| if r.answer() == "0" { says("[[6]]") } else { Act::Drop });
    let run = e.judge(&server, &["--concurrency", "1", "--retries", "0"]);
    run.expect_code(1).says(&["10 questions in a row", &server.url]);
    assert!((12..=13).contains(&server.requests().len()), "{}", server.requests().len());
    assert_eq!(e.read("verdicts.jsonl").lines().count(), 2);
}
