//! Endpoints that fail, each in its way, through the real binary.

mod common;

use std::time::Duration;

use common::{Act, Evaluation, KEY, Server, says};
use serde_json::json;

fn respond(status: u16, body: &str) -> Act {
    Act::Respond(status, "", body.to_owned())
}

/// The first request for each question fails by `act`, the second is answered.
fn fails_once(act: fn() -> Act) -> Server {
    Server::start(move |_, before| if before == 0 { act() } else { says("[[6]]") })
}

#[test]
fn what_passes_is_asked_again() {
    type Failing = fn() -> Act;
    let cases: [(Failing, &str); 5] = [
        (|| respond(429, "{\"error\": \"slow down\"}"), "429"),
        (|| respond(500, "oops"), "500"),
        (|| respond(503, ""), "503"),
        (|| Act::Drop, "no reply"),
        (|| Act::Stall, "time-out"),
    ];
    for (act, named) in cases {
        let e = Evaluation::new(&["a"]);
        let server = fails_once(act);
        e.judge(&server, &["--timeout", "2", "--retries", "3"]).ok().says(&[named, "asked again", &server.url]);
        assert_eq!(server.requests().len(), 4, "{named}");
        assert_eq!(e.task(0)["metric"]["value"], 6.0, "{named}");
    }
}

#[test]
fn a_retry_waits_as_long_as_the_endpoint_asks_for() {
    let e = Evaluation::new(&["a"]);
    let server = fails_once(|| Act::Respond(429, "retry-after: 2\r\n", "{}".into()));
    e.judge(&server, &["--limit", "1", "--concurrency", "1"]).ok();
    let requests = server.requests();
    assert_eq!(requests[0].body, requests[1].body);
    // Without Retry-After the first wait is half a second at most.
    assert!(requests[1].at - requests[0].at >= Duration::from_secs(2));
}

#[test]
fn what_does_not_pass_is_counted_and_only_that_is_asked_again() {
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
fn bodies_that_are_no_completion_are_shown_by_their_beginning() {
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
        let run = run.says(&[&server.url, "no chat completion", "choices[0].message.content", shown]);
        assert!(run.stderr.len() < 3000, "{}", run.stderr);
        assert_eq!(server.requests().len(), 2, "asked again: {shown}");
        assert_eq!(
            (e.task(0)["metric"].is_null(), e.task(0)["settings"]["verdicts"]["failed"].clone()),
            (true, json!(1))
        );
        assert_eq!(e.read("verdicts.jsonl"), "");
    }
}

#[test]
fn a_reply_of_null_is_unrated_and_one_without_usage_has_no_tokens() {
    let e = Evaluation::new(&["a"]);
    let server = Server::start(|_, _| respond(200, "{\"choices\": [{\"message\": {\"content\": null}}]}"));
    e.judge(&server, &[]).ok();
    let counts = e.task(0)["settings"]["verdicts"].clone();
    assert_eq!((&counts["unrated"], &counts["prompt_tokens"]), (&json!(1), &json!(0)));
    assert!(e.task(0)["metric"].is_null(), "no grade is not a grade of zero");
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
        e.judge_env(&server, &[], &[("OPENAI_API_KEY", "")]).bad_input(&["a key is wanted"]);
    }
}

#[test]
fn the_key_is_taken_out_of_whatever_comes_back() {
    let cases: [fn() -> Act; 4] = [
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
    let cases: [fn() -> Act; 2] =
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
