//! A chat server for tests, and an evaluation's directory to judge.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Instant;

use cpift_testkit::{Run, run_with};
use serde_json::{Value, json};

/// The API key, which must not appear anywhere.
pub const KEY: &str = "sk-test-0123456789abcdef";

/// Reaction of the server to a request.
pub enum Act {
    /// Responds with a status, header lines and a body.
    Respond(u16, &'static str, String),
    /// Sends nothing until the client disconnects.
    Stall,
    /// Closes the connection.
    Drop,
}

/// A request as received.
#[derive(Clone)]
pub struct Request {
    pub head: String,
    pub body: Value,
    pub at: Instant,
}

impl Request {
    /// The answer to grade.
    pub fn answer(&self) -> String {
        let text = self.body["messages"][1]["content"].as_str().unwrap();
        let (_, rest) = text.split_once("(the answer to grade):\n").unwrap();
        rest.split("\n\n<|The End").next().unwrap().to_owned()
    }
}

/// A completion with 11 + 7 tokens.
pub fn says(text: &str) -> Act {
    let body = json!({"choices": [{"message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": 11, "completion_tokens": 7}});
    Act::Respond(200, "", body.to_string())
}

type Behaviour = Box<dyn Fn(&Request, usize) -> Act + Send + Sync>;

/// A server on loopback with one thread and one request per connection.
pub struct Server {
    pub url: String,
    seen: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    /// Serves with `behave`, called with each request and the number of earlier requests with the
    /// same body.
    pub fn start(behave: impl Fn(&Request, usize) -> Act + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/v1", listener.local_addr().unwrap());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (behave, shared): (Arc<Behaviour>, _) = (Arc::new(Box::new(behave)), Arc::clone(&seen));
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (behave, seen) = (Arc::clone(&behave), Arc::clone(&shared));
                thread::spawn(move || serve(stream, &behave, &seen));
            }
        });
        Self { url, seen }
    }

    pub fn requests(&self) -> Vec<Request> {
        self.seen.lock().unwrap().clone()
    }
}

fn serve(stream: TcpStream, behave: &Behaviour, seen: &Mutex<Vec<Request>>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let (mut head, mut length) = (String::new(), 0);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 {
            return;
        }
        if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
        if line == "\r\n" {
            break;
        }
        head.push_str(&line);
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    let request = Request { head, body: serde_json::from_slice(&body).unwrap(), at: Instant::now() };
    let before = {
        let mut seen = seen.lock().unwrap();
        seen.push(request.clone());
        seen.iter().filter(|r| r.body == request.body).count() - 1
    };
    match behave(&request, before) {
        Act::Respond(status, headers, body) => {
            let length = body.len();
            let text =
                format!("HTTP/1.1 {status} X\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n{body}");
            let _ = (&stream).write_all(text.as_bytes());
        }
        Act::Stall => drop(reader.read(&mut [0])),
        Act::Drop => {}
    }
}

/// The directory that `cpift-eval run` would write, without a model.
pub struct Evaluation {
    pub dir: tempfile::TempDir,
}

impl Evaluation {
    /// Two tasks to judge with `answers` each, and one that is not judged.
    pub fn new(answers: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let digest = "0".repeat(64);
        let nll = json!({"name": "nll", "value": 1.5, "stderr": 0.1, "n": answers.len()});
        let task = |name: &str, settings: Value| json!({"task": name, "eval_digest": digest, "metric": null, "nll": nll, "settings": settings});
        let scores = json!({"format_version": 1, "model": "m", "model_digest": digest, "tasks": [
            task("alpaca", json!({"judge": null})), task("plain", json!({})), task("ultrachat", json!({"judge": null}))]});
        let mut lines = vec![json!({"row": 1, "output": "18", "score": 1.0, "task": "plain"}).to_string()];
        for (row, answer) in answers.iter().enumerate() {
            let turn = |role: &str, content: &str| json!({"role": role, "content": content});
            let turns =
                json!([turn("user", "Hello"), turn("assistant", "Hi"), turn("user", &format!("Question {row}"))]);
            let more = [json!({"prompt": format!("Ask {row}")}), json!({"messages": turns, "prompt": "as rendered"})];
            for (task, mut line) in ["alpaca", "ultrachat"].into_iter().zip(more) {
                let rest = json!({"output": answer, "reference": "r", "row": row + 1, "task": task});
                line.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
                lines.push(line.to_string());
            }
        }
        fs::write(dir.path().join("scores.json"), serde_json::to_string_pretty(&scores).unwrap()).unwrap();
        fs::write(dir.path().join("outputs.jsonl"), lines.join("\n") + "\n").unwrap();
        Self { dir }
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Runs the judge with [`KEY`] in the environment, and searches all files and output for the
    /// key.
    pub fn judge(&self, server: &Server, more: &[&str]) -> Run {
        let run = self.judge_env(server, more, &[("OPENAI_API_KEY", KEY)]);
        let files = fs::read_dir(self.path()).unwrap().map(|entry| entry.unwrap().path());
        let texts = files.map(|path: PathBuf| (path.display().to_string(), fs::read_to_string(path).unwrap()));
        for (place, text) in texts.chain([("stdout".into(), run.stdout.clone()), ("stderr".into(), run.stderr.clone())])
        {
            assert!(!text.contains(KEY), "the key is in {place}:\n{text}");
            // A dump of the request may contain the key in another form.
            assert!(!text.to_lowercase().contains("authorization"), "a header is in {place}:\n{text}");
        }
        run
    }

    /// As [`Evaluation::judge`] with another environment.
    pub fn judge_env(&self, server: &Server, more: &[&str], env: &[(&str, &str)]) -> Run {
        self.run(server, "j", more, env)
    }

    /// As [`Evaluation::judge`] by another judge.
    pub fn judge_as(&self, model: &str, server: &Server) -> Run {
        self.run(server, model, &[], &[("OPENAI_API_KEY", KEY)])
    }

    /// As [`Evaluation::judge_as`] with more arguments.
    pub fn judge_more(&self, model: &str, server: &Server, more: &[&str]) -> Run {
        self.run(server, model, more, &[("OPENAI_API_KEY", KEY)])
    }

    fn run(&self, server: &Server, model: &str, more: &[&str], env: &[(&str, &str)]) -> Run {
        let fixed = ["judge", self.path().to_str().unwrap(), "--base-url", &server.url, "--judge-model", model];
        let args = fixed.into_iter().chain(more.iter().copied());
        let env: Vec<(&str, &str)> = [("CPIFT_LOG", "trace")].into_iter().chain(env.iter().copied()).collect();
        run_with(env!("CARGO_BIN_EXE_cpift-eval"), args, &env)
    }

    pub fn task(&self, index: usize) -> Value {
        let scores: Value = serde_json::from_str(&self.read("scores.json")).unwrap();
        scores["tasks"][index].clone()
    }

    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path().join(name)).unwrap()
    }
}
