//! A server that speaks the routes of the Hugging Face Hub, with a second one that serves large
//! files, as the Hub's content delivery network does.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use serde_json::json;
use sha2::{Digest, Sha256};

/// A token that opens every repository.
pub const TOKEN: &str = "hf_testtokenABCDEFGHIJKLMNOP";
/// Query of the addresses of large files, which no message may contain.
pub const SIGNATURE: &str = "Signature=SECRETSIGNATURE";

/// Something that goes wrong with one file, or with all requests for an empty name.
#[derive(Debug, Clone, Copy)]
pub enum Fault {
    /// The connection ends after this many bytes of the body.
    Cut(usize),
    /// The bytes are others.
    Changed,
    /// The body has this many bytes less than the Hub says.
    Shorter(usize),
    /// Ranges are ignored.
    NoRange,
    /// This status, without a body.
    Status(u16),
    /// Nothing is sent after this many bytes.
    Stall(usize),
    /// Every answer takes this many milliseconds.
    Slow(u64),
}

/// A repository.
#[derive(Debug, Clone, Default)]
pub struct Repo {
    /// Current commit.
    pub commit: String,
    /// Branches and tags, by their commit; `main` is `commit`.
    pub revisions: Vec<String>,
    /// Files by name.
    pub files: BTreeMap<String, Vec<u8>>,
    /// Requires a token.
    pub is_private: bool,
    /// Size that the list of files names for all of them.
    pub claimed: Option<u64>,
    /// Requires a token of an account that has accepted the licence: none has.
    pub is_gated: bool,
}

/// A request as received.
#[derive(Debug, Clone)]
pub struct Request {
    /// `HEAD /path` or `GET /path`.
    pub line: String,
    /// True if it went to the server of large files.
    pub to_cdn: bool,
    /// Header `authorization`.
    pub authorization: Option<String>,
    /// First byte that is asked for.
    pub offset: usize,
}

#[derive(Default)]
struct State {
    repos: BTreeMap<String, Repo>,
    moved: BTreeMap<String, String>,
    faults: BTreeMap<String, (Fault, usize)>,
    requests: Vec<Request>,
    cdn: String,
}

/// The server.
pub struct HubServer {
    /// Address for HF_ENDPOINT.
    pub url: String,
    state: Arc<Mutex<State>>,
}

impl Default for HubServer {
    fn default() -> Self {
        let state = Arc::new(Mutex::new(State::default()));
        let url = listen(&state, false);
        let cdn = listen(&state, true);
        locked(&state).cdn = cdn;
        Self { url, state }
    }
}

fn locked(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn listen(state: &Arc<Mutex<State>>, is_cdn: bool) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let state = Arc::clone(state);
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let state = Arc::clone(&state);
            thread::spawn(move || serve(&stream, &state, is_cdn));
        }
    });
    url
}

impl HubServer {
    /// Adds a repository: `models/org/name` or `datasets/org/name`.
    pub fn add(&self, name: &str, repo: Repo) {
        locked(&self.state).repos.insert(name.to_owned(), repo);
    }

    /// Adds the files of `folder` as a model at `commit`.
    pub fn add_folder(&self, id: &str, commit: &str, folder: &Path) {
        let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
        let files =
            files.map(|file| (file.file_name().into_string().unwrap(), fs::read(file.path()).unwrap())).collect();
        self.add(&format!("models/{id}"), Repo { commit: commit.to_owned(), files, ..Repo::default() });
    }

    /// Changes a repository.
    pub fn change(&self, name: &str, change: impl FnOnce(&mut Repo)) {
        change(locked(&self.state).repos.get_mut(name).unwrap());
    }

    /// Lets a name redirect to that of another repository.
    pub fn rename(&self, old: &str, new: &str) {
        locked(&self.state).moved.insert(old.to_owned(), new.to_owned());
    }

    /// Lets the next `times` requests for the content of `file` fail; of all answers, if `file` is
    /// empty.
    pub fn fail(&self, file: &str, fault: Fault, times: usize) {
        locked(&self.state).faults.insert(file.to_owned(), (fault, times));
    }

    /// Requests since the last call.
    pub fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut locked(&self.state).requests)
    }
}

/// A response.
struct Answer {
    status: u16,
    headers: Vec<String>,
    body: Vec<u8>,
}

impl Answer {
    fn of(status: u16, headers: &[String]) -> Self {
        Self { status, headers: headers.to_vec(), body: Vec::new() }
    }

    fn refusal(status: u16, code: &str, message: &str) -> Self {
        let mut headers = vec![format!("X-Error-Message: {message}")];
        if !code.is_empty() {
            headers.push(format!("X-Error-Code: {code}"));
        }
        Self { status, headers, body: json!({"error": message}).to_string().into_bytes() }
    }
}

fn serve(stream: &TcpStream, state: &Mutex<State>, is_cdn: bool) {
    let mut reader = BufReader::new(stream);
    let (mut first, mut authorization, mut offset) = (String::new(), None, 0);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 {
            return;
        }
        let lower = line.to_lowercase();
        if first.is_empty() {
            first = line.trim().trim_end_matches(" HTTP/1.1").to_owned();
        } else if lower.starts_with("authorization:") {
            authorization = Some(line["authorization:".len()..].trim().to_owned());
        } else if let Some(range) = lower.strip_prefix("range: bytes=") {
            offset = range.trim().trim_end_matches('-').parse().unwrap();
        } else if line == "\r\n" {
            break;
        }
    }
    let (method, path) = first.split_once(' ').unwrap();
    let request = Request { line: first.clone(), to_cdn: is_cdn, authorization, offset };
    locked(state).requests.push(request.clone());
    if let Some(Fault::Slow(ms)) = fault(state, "") {
        thread::sleep(Duration::from_millis(ms));
    }
    let (answer, file) = if is_cdn { content_of_cdn(path, state) } else { answer(path, &request, state) };
    let is_content = !answer.body.is_empty() && !file.is_empty();
    let fault = if is_content && method == "GET" { fault(state, &file) } else { None };
    send(stream, method, answer, request.offset, fault.filter(|_| is_content));
}

/// The fault of `file`, if there is one left.
fn fault(state: &Mutex<State>, file: &str) -> Option<Fault> {
    let mut state = locked(state);
    let (fault, times) = state.faults.get_mut(file).filter(|(_, times)| *times > 0)?;
    *times -= 1;
    Some(*fault)
}

fn send(mut stream: &TcpStream, method: &str, answer: Answer, offset: usize, fault: Option<Fault>) {
    let Answer { mut status, mut headers, mut body } = answer;
    match fault {
        Some(Fault::Status(other)) => (status, body) = (other, Vec::new()),
        Some(Fault::Changed) => body.iter_mut().for_each(|byte| *byte ^= 1),
        Some(Fault::Shorter(by)) => body.truncate(body.len() - by),
        _ => {}
    }
    if offset > 0 && status == 200 && !matches!(fault, Some(Fault::NoRange)) {
        headers.push(format!("Content-Range: bytes {offset}-{}/{}", body.len() - 1, body.len()));
        body = body.split_off(offset);
        status = 206;
    }
    let length = body.len();
    let head = format!("HTTP/1.1 {status} X\r\nConnection: close\r\nContent-Length: {length}\r\n");
    let head = head + &headers.iter().map(|header| format!("{header}\r\n")).collect::<String>() + "\r\n";
    let _ = stream.write_all(head.as_bytes());
    if method == "HEAD" {
        return;
    }
    match fault {
        Some(Fault::Cut(count)) => drop(stream.write_all(&body[..count.min(length)])),
        Some(Fault::Stall(count)) => {
            let _ = stream.write_all(&body[..count.min(length)]);
            thread::sleep(Duration::from_secs(20));
        }
        _ => drop(stream.write_all(&body)),
    }
}

/// Hash of a file, as the Hub names it.
fn etag(file: &str, bytes: &[u8]) -> String {
    let hash: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    if is_large(file) { hash } else { hash[..40].to_owned() }
}

fn is_large(file: &str) -> bool {
    file.ends_with(".safetensors") || file.ends_with(".parquet")
}

fn content_of_cdn(path: &str, state: &Mutex<State>) -> (Answer, String) {
    let hash = path.trim_start_matches("/blob/").trim_end_matches(&format!("?{SIGNATURE}"));
    let state = locked(state);
    let mut files = state.repos.values().flat_map(|repo| &repo.files);
    match files.find(|(name, bytes)| is_large(name) && etag(name, bytes) == hash) {
        Some((name, bytes)) => (Answer { status: 200, headers: vec![], body: bytes.clone() }, name.clone()),
        None => (Answer::of(404, &[]), String::new()),
    }
}

/// The answer of the Hub itself, and the file if it is the content of one.
fn answer(path: &str, request: &Request, state: &Mutex<State>) -> (Answer, String) {
    let none = String::new;
    let path = path.split('?').next().unwrap();
    let parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
    let (kind, rest) = match &parts[..] {
        ["api", kind, rest @ ..] => (*kind, rest),
        ["datasets", rest @ ..] => ("datasets", rest),
        rest => ("models", rest),
    };
    let [organisation, name, route, revision, file @ ..] = rest else { return (Answer::of(404, &[]), none()) };
    let (id, file) = (format!("{kind}/{organisation}/{name}"), file.join("/").replace("%20", " "));
    let state = locked(state);
    if let Some(new) = state.moved.get(&id) {
        let place = path.replacen(&format!("{organisation}/{name}"), new.split_once('/').unwrap().1, 1);
        return (Answer::of(307, &[format!("Location: {place}")]), none());
    }
    let token = request.authorization.as_deref();
    if token.is_some_and(|token| token != format!("Bearer {TOKEN}")) {
        return (Answer::refusal(401, "", "Invalid credentials in Authorization header"), none());
    }
    let Some(repo) = state.repos.get(&id).filter(|repo| !repo.is_private || token.is_some()) else {
        let status = if token.is_some() { 404 } else { 401 };
        return (Answer::refusal(status, "RepoNotFound", "Repository not found"), none());
    };
    let revision = revision.replace("%2F", "/");
    if revision != "main" && revision != repo.commit && !repo.revisions.contains(&revision) {
        return (Answer::refusal(404, "RevisionNotFound", &format!("Invalid rev id: {revision}")), none());
    }
    if *route == "revision" {
        let siblings: Vec<_> = repo
            .files
            .iter()
            .map(|(name, bytes)| json!({"rfilename": name, "size": repo.claimed.unwrap_or(bytes.len() as u64)}))
            .collect();
        let body = json!({"id": id, "sha": repo.commit, "siblings": siblings}).to_string().into_bytes();
        return (Answer { status: 200, headers: vec![], body }, none());
    }
    if repo.is_gated {
        let status = if token.is_some() { 403 } else { 401 };
        return (Answer::refusal(status, "GatedRepo", "Access to this model is restricted"), none());
    }
    let Some(bytes) = repo.files.get(&file) else {
        return (Answer::refusal(404, "EntryNotFound", "Entry not found"), none());
    };
    let hash = etag(&file, bytes);
    let commit = format!("X-Repo-Commit: {}", repo.commit);
    if is_large(&file) {
        let headers = [
            commit,
            format!("X-Linked-ETag: \"{hash}\""),
            format!("X-Linked-Size: {}", bytes.len()),
            format!("Location: {}/blob/{hash}?{SIGNATURE}", state.cdn),
        ];
        return (Answer::of(302, &headers), none());
    }
    (Answer { status: 200, headers: vec![commit, format!("ETag: W/\"{hash}\"")], body: bytes.clone() }, file)
}
