//! Requests to the Hugging Face Hub: its address and token from the environment, redirects, and
//! what a refusal means.

use std::fmt;
use std::fs;
use std::io::{ErrorKind, Read};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use serde::Deserialize;
use ureq::http::{HeaderMap, Response, StatusCode};
use ureq::{Agent, Body};

use super::cache::{Kind, Name, home, is_commit, path_in, variable};
use crate::error::BadInput;

/// Address of the Hub, unless HF_ENDPOINT is set.
const ENDPOINT: &str = "https://huggingface.co";
/// Maximum size of the description of a repository, in bytes.
const MAX_INFO: u64 = 64 << 20;
/// Redirects that are followed.
const MAX_REDIRECTS: usize = 5;
/// Requests that are sent, if the answer may be another one later.
pub(super) const TRIES: u32 = 4;
/// Errors of connections that were made.
const BROKEN: [ErrorKind; 6] = [
    ErrorKind::ConnectionReset,
    ErrorKind::ConnectionAborted,
    ErrorKind::BrokenPipe,
    ErrorKind::UnexpectedEof,
    ErrorKind::TimedOut,
    ErrorKind::WouldBlock,
];
/// Longest wait that a server can ask for.
const MAX_WAIT: Duration = Duration::from_secs(60);

/// Returns true if HF_HUB_OFFLINE, or TRANSFORMERS_OFFLINE, is set.
pub(super) fn is_offline() -> bool {
    is_set("HF_HUB_OFFLINE") || variable("HF_HUB_OFFLINE").is_none() && is_set("TRANSFORMERS_OFFLINE")
}

/// Returns true for the values that huggingface_hub takes as true.
fn is_set(name: &str) -> bool {
    variable(name).is_some_and(|value| {
        ["1", "ON", "YES", "TRUE"].iter().any(|yes| value.to_string_lossy().eq_ignore_ascii_case(yes))
    })
}

/// Reason for a failed download.
#[derive(Debug)]
pub(super) struct Failure {
    message: String,
    expected: Option<String>,
    found: Option<String>,
    hint: Option<String>,
    kind: Kinds,
}

/// Classes of failures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kinds {
    /// There is no connection.
    Unreachable,
    /// The same request may succeed later, after this time if the server names one.
    Passing(Option<Duration>),
    /// The same request would fail again.
    Lasting,
}

impl Failure {
    fn new(kind: Kinds, message: impl Into<String>) -> Self {
        Self { message: message.into(), expected: None, found: None, hint: None, kind }
    }

    /// A failure that would come again.
    pub fn lasting(message: impl Into<String>) -> Self {
        Self::new(Kinds::Lasting, message)
    }

    /// A failure that may not come again.
    pub fn passing(message: impl Into<String>) -> Self {
        Self::new(Kinds::Passing(None), message)
    }

    /// States the expected value.
    pub fn expected(self, text: impl Into<String>) -> Self {
        Self { expected: Some(text.into()), ..self }
    }

    /// States the value found.
    pub fn found(self, text: impl Into<String>) -> Self {
        Self { found: Some(text.into()), ..self }
    }

    /// Tells the user how to fix it.
    pub fn hint(self, text: impl Into<String>) -> Self {
        Self { hint: Some(text.into()), ..self }
    }

    /// Returns true if there was no connection to the server.
    pub fn is_unreachable(&self) -> bool {
        self.kind == Kinds::Unreachable
    }

    /// Returns true if the same request would fail again.
    pub fn is_lasting(&self) -> bool {
        self.kind == Kinds::Lasting
    }

    /// Time to wait before the request with this number is sent again.
    pub fn wait(&self, tries: u32) -> Duration {
        let own = Duration::from_millis(250 << tries.min(5));
        match self.kind {
            Kinds::Passing(Some(asked)) => asked.min(MAX_WAIT).max(own),
            _ => own,
        }
    }

    /// The failure as an error about the name or the file `what`.
    pub fn about(self, what: &str) -> BadInput {
        let mut error = BadInput::new(what, self.message);
        if let Some(text) = self.expected {
            error = error.expected(text);
        }
        if let Some(text) = self.found {
            error = error.found(text);
        }
        match self.hint {
            Some(text) => error.hint(text),
            None => error,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// An access token, which never appears in a message.
struct Token {
    value: String,
    /// Place that it was found in.
    source: String,
}

impl Token {
    /// HF_TOKEN, else the file that `hf auth login` writes.
    fn find() -> Result<Option<Self>, Failure> {
        if is_set("HF_HUB_DISABLE_IMPLICIT_TOKEN") {
            return Ok(None);
        }
        let set = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"].into_iter().find_map(|name| Some((name, variable(name)?)));
        let (source, value) = match set {
            Some((name, value)) => (name.to_owned(), value.to_string_lossy().into_owned()),
            None => {
                let file: Option<PathBuf> = path_in("HF_TOKEN_PATH").or_else(|| Some(home()?.join("token")));
                let Some(file) = file else { return Ok(None) };
                let Ok(text) = fs::read_to_string(&file) else { return Ok(None) };
                (file.display().to_string(), text)
            }
        };
        let value = value.trim().to_owned();
        match value.bytes().all(|byte| byte.is_ascii_graphic()) {
            _ if value.is_empty() => Ok(None),
            true => Ok(Some(Self { value, source })),
            false => Err(Failure::lasting(format!("{source} holds no token of the Hugging Face Hub"))
                .expected("one word that begins with hf_")),
        }
    }
}

/// Files of a repository at a commit.
pub(super) struct Listing {
    pub commit: String,
    pub files: Vec<ListedFile>,
}

/// A file of a [`Listing`].
#[derive(Deserialize)]
pub(super) struct ListedFile {
    #[serde(rename = "rfilename")]
    pub path: String,
    #[serde(default)]
    pub size: Option<u64>,
}

/// A file as the Hub describes it.
#[derive(Debug)]
pub(super) struct Metadata {
    pub commit: String,
    /// Name of its blob: the SHA-256 of a large file, the Git hash of others.
    pub etag: String,
    pub size: u64,
    /// True if the file is kept outside the Git repository, so that `etag` is a SHA-256.
    pub is_large: bool,
}

/// Connection to the Hub.
pub(super) struct Client {
    agent: Agent,
    endpoint: String,
    token: Option<Token>,
}

impl Client {
    /// A client by the environment.
    ///
    /// # Errors
    /// For an address or a token that cannot be one.
    pub fn new() -> anyhow::Result<Self> {
        let set = variable("HF_ENDPOINT").map(|value| value.to_string_lossy().into_owned());
        let endpoint = set.as_deref().unwrap_or(ENDPOINT).trim_end_matches('/').to_owned();
        // Messages contain the address, so it must not contain a secret.
        if origin(&endpoint).is_none() || endpoint.contains(['@', '?', '#']) {
            let error = BadInput::new("HF_ENDPOINT", "is no address of a Hub");
            return Err(error.expected("https://HOST, without a user or a query").into());
        }
        let read = variable("HF_HUB_DOWNLOAD_TIMEOUT").and_then(|value| value.to_str()?.parse().ok());
        let config = Agent::config_builder()
            .timeout_connect(Some(Duration::from_secs(10)))
            .timeout_per_read(Some(Duration::from_secs(read.unwrap_or(30).max(1))))
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            // Sizes are those of the files.
            .accept_encoding("identity")
            .user_agent(concat!("cpift/", env!("CARGO_PKG_VERSION")));
        // A proxy cannot reach servers on this machine.
        let local = ["http://127.0.0.1", "http://localhost", "http://[::1]"].iter().any(|it| endpoint.starts_with(it));
        let config = if local { config.proxy(None) } else { config };
        let token = Token::find().map_err(|failure| failure.about(&endpoint))?;
        Ok(Self { agent: config.build().into(), endpoint, token })
    }

    /// Address of the Hub.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// The files of a repository at a revision.
    ///
    /// # Errors
    /// Without an answer that has them.
    pub fn listing(&self, name: &Name, revision: &str) -> Result<Listing, Failure> {
        #[derive(Deserialize)]
        struct Info {
            sha: String,
            #[serde(default)]
            siblings: Vec<ListedFile>,
        }
        let kind = name.kind.prefix();
        let url = format!("{}/api/{kind}/{}/revision/{}?blobs=true", self.endpoint, name.id, escaped(revision, false));
        let (mut body, url) = (String::new(), &url);
        self.retried(|| {
            let response = self.accepted(name, self.follow("GET", url, None, true)?)?;
            body.clear();
            let read = response.into_body().into_with_config().limit(MAX_INFO).reader().read_to_string(&mut body);
            read.map(drop).map_err(|e| Failure::passing(format!("the answer of {} broke off: {e}", self.endpoint)))
        })?;
        let info: Option<Info> = serde_json::from_str(&body).ok();
        let info = info.filter(|info| is_commit(&info.sha)).ok_or_else(|| self.no_hub())?;
        Ok(Listing { commit: info.sha, files: info.siblings })
    }

    /// The description of a file at a revision.
    ///
    /// # Errors
    /// Without an answer that has it.
    pub fn metadata(&self, name: &Name, revision: &str, path: &str) -> Result<Metadata, Failure> {
        let url = self.file_url(name, revision, path);
        let response = self.retried(|| self.accepted(name, self.follow("HEAD", &url, None, false)?))?;
        let header = |key: &str| response.headers().get(key).and_then(|value| value.to_str().ok());
        let linked = header("x-linked-etag");
        let etag = linked.or_else(|| header("etag")).map(|etag| etag.trim_start_matches("W/").trim_matches('"'));
        let size = header("x-linked-size").or_else(|| header("content-length")).and_then(|size| size.parse().ok());
        let sound = |etag: &&str| {
            let known = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
            !etag.is_empty() && etag.len() <= 128 && !etag.starts_with('.') && etag.bytes().all(known)
        };
        match (header("x-repo-commit").filter(|commit| is_commit(commit)), etag.filter(sound), size) {
            (Some(commit), Some(etag), Some(size)) => Ok(Metadata {
                commit: commit.to_owned(),
                is_large: linked.is_some() && etag.len() == 64 && etag.bytes().all(|b| b.is_ascii_hexdigit()),
                etag: etag.to_owned(),
                size,
            }),
            _ => Err(self.no_hub()),
        }
    }

    /// The bytes of a file from `offset` on.
    ///
    /// # Errors
    /// Without an answer that has them.
    pub fn content(&self, name: &Name, commit: &str, path: &str, offset: u64) -> Result<Response<Body>, Failure> {
        let url = self.file_url(name, commit, path);
        self.accepted(name, self.follow("GET", &url, (offset > 0).then_some(offset), true)?)
    }

    /// Repeats a request that may succeed later.
    fn retried<T>(&self, mut request: impl FnMut() -> Result<T, Failure>) -> Result<T, Failure> {
        let mut tries = 1;
        loop {
            match request() {
                Err(failure) if matches!(failure.kind, Kinds::Passing(_)) && tries < TRIES => {
                    log::info!("{failure}; trying again");
                    thread::sleep(failure.wait(tries));
                    tries += 1;
                }
                other => return other,
            }
        }
    }

    fn file_url(&self, name: &Name, revision: &str, path: &str) -> String {
        let below = match name.kind {
            Kind::Model => "",
            Kind::Dataset => "datasets/",
        };
        let (revision, path) = (escaped(revision, false), escaped(path, true));
        format!("{}/{below}{}/resolve/{revision}/{path}", self.endpoint, name.id)
    }

    /// Sends a request and follows redirects, on the same server (a renamed repository) or, with
    /// `elsewhere`, to any. Only the Hub itself gets the token.
    fn follow(&self, method: &str, url: &str, offset: Option<u64>, elsewhere: bool) -> Result<Response<Body>, Failure> {
        let home = origin(&self.endpoint);
        let mut url = url.to_owned();
        for _ in 0..=MAX_REDIRECTS {
            let here = origin(&url).unwrap_or_default();
            let mut request = if method == "HEAD" { self.agent.head(&url) } else { self.agent.get(&url) };
            if let Some(token) = self.token.as_ref().filter(|_| Some(here) == home) {
                request = request.header("authorization", format!("Bearer {}", token.value));
            }
            if let Some(offset) = offset {
                request = request.header("range", format!("bytes={offset}-"));
            }
            let response = request.call().map_err(|error| unanswered(here, &error))?;
            let to = response.headers().get("location").and_then(|value| value.to_str().ok());
            let Some(to) = to.filter(|_| response.status().is_redirection()) else { return Ok(response) };
            let next = if to.starts_with('/') && !to.starts_with("//") { format!("{here}{to}") } else { to.to_owned() };
            match origin(&next) {
                Some(there) if elsewhere || there == here => url = next,
                Some(_) => return Ok(response),
                None => return Err(Failure::lasting(format!("{here} redirects to an address that is none"))),
            }
        }
        Err(Failure::lasting(format!("{} redirects in circles", self.endpoint)))
    }

    /// The answer, unless it is a refusal.
    fn accepted(&self, name: &Name, response: Response<Body>) -> Result<Response<Body>, Failure> {
        let status = response.status();
        if status.is_success() || status.is_redirection() { Ok(response) } else { Err(self.refusal(name, &response)) }
    }

    fn refusal(&self, name: &Name, response: &Response<Body>) -> Failure {
        let (status, headers) = (response.status(), response.headers());
        let text = |key: &str| headers.get(key).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let (code, message) = (text("x-error-code"), text("x-error-message"));
        let page = match name.kind {
            Kind::Model => format!("{}/{}", self.endpoint, name.id),
            Kind::Dataset => format!("{}/datasets/{}", self.endpoint, name.id),
        };
        let what = match name.kind {
            Kind::Model => "no such checkpoint: there is no model",
            Kind::Dataset => "there is no dataset",
        };
        let failure = |text: String| {
            let failure = Failure::lasting(format!("{text} ({status})"));
            if message.is_empty() { failure } else { failure.found(shortened(message)) }
        };
        let token = self.token.as_ref().map(|token| token.source.as_str());
        let get_token = format!("set HF_TOKEN to a token of {}/settings/tokens", self.endpoint);
        match (status.as_u16(), code, token) {
            (_, "GatedRepo", None) => failure(format!("{page} is gated"))
                .hint(format!("accept its licence at {page}, then {get_token} of the same account")),
            (_, "GatedRepo", Some(source)) => failure(format!("{page} is gated, and the token has no access to it"))
                .hint(format!("accept its licence at {page} with the account of the token in {source}")),
            (_, "RevisionNotFound", _) => failure(format!("{page} has no revision {}", name.revision()))
                .hint(format!("{page}/refs lists branches and tags; a commit is written in full")),
            (_, "EntryNotFound", _) => failure(format!("{page} has no such file at {}", name.revision()))
                .hint(format!("{page}/tree/{} lists the files", name.revision())),
            (_, "DisabledRepo", _) => failure(format!("{page} is disabled by the Hub")),
            (401, "", Some(source)) => failure(format!("{} refuses the token in {source}", self.endpoint))
                .hint(format!("{get_token}, or unset it for public repositories")),
            (401 | 404, _, None) => failure(format!("{what} of this name at {}, or it is private", self.endpoint))
                .hint(format!("check the name at {page}; for a private one, {get_token}")),
            (401 | 404, _, Some(source)) => {
                failure(format!("{what} of this name at {} that the token can read", self.endpoint))
                    .hint(format!("check the name at {page}, and the rights of the token in {source}"))
            }
            (403, _, _) => failure(format!("{} refuses access to {page}", self.endpoint))
                .hint("a fine-grained token needs the right to read this repository"),
            (408 | 425 | 429 | 500..=599, _, _) => {
                let wait = text("retry-after").trim().parse().ok().map(Duration::from_secs);
                let hint = match (status, token) {
                    (StatusCode::TOO_MANY_REQUESTS, None) => format!("wait, or {get_token}: it has a higher limit"),
                    _ => "run again later: files that are complete are kept".to_owned(),
                };
                let failure = failure(format!("{} cannot answer now", self.endpoint)).hint(hint);
                Failure { kind: Kinds::Passing(wait), ..failure }
            }
            _ => failure(format!("{} refuses the request", self.endpoint)),
        }
    }

    fn no_hub(&self) -> Failure {
        Failure::lasting(format!("the answer of {} is not that of a Hub", self.endpoint))
            .hint("check HF_ENDPOINT, and proxies in between")
    }
}

/// Header `content-range`: first byte and total size.
pub(super) fn content_range(headers: &HeaderMap) -> Option<(u64, Option<u64>)> {
    let (range, total) = headers.get("content-range")?.to_str().ok()?.strip_prefix("bytes ")?.split_once('/')?;
    Some((range.split('-').next()?.parse().ok()?, total.parse().ok()))
}

/// Scheme, host and port of an address; none if it is no address of a web server.
fn origin(url: &str) -> Option<&str> {
    let (scheme, rest) = url.split_once("://")?;
    let host = rest.split(['/', '?', '#']).next().filter(|host| !host.is_empty())?;
    matches!(scheme, "http" | "https").then(|| &url[..scheme.len() + 3 + host.len()])
}

/// Percent-encodes all but letters, digits, `-._~` and, in a path, `/`.
fn escaped(text: &str, is_path: bool) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || is_path && byte == b'/';
    text.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

/// The first characters of a message of a server.
fn shortened(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(200).collect()
}

/// Failure of a request to `host` without a complete answer.
pub(super) fn unanswered(host: &str, error: &ureq::Error) -> Failure {
    let reachable = |text: String| Failure::passing(format!("{host}: {text}"));
    match error {
        ureq::Error::Timeout(ureq::Timeout::Connect | ureq::Timeout::Resolve)
        | ureq::Error::HostNotFound
        | ureq::Error::ConnectionFailed
        | ureq::Error::ConnectProxyFailed(_) => unreachable(host, &error.to_string()),
        // A connection that was there, and no name, route or server before.
        ureq::Error::Io(io) if !BROKEN.contains(&io.kind()) => unreachable(host, &io.to_string()),
        ureq::Error::Timeout(_) => reachable("no answer within the time limit".to_owned()),
        other => reachable(other.to_string()),
    }
}

fn unreachable(host: &str, why: &str) -> Failure {
    let message = format!("no complete copy in {}, and {host} cannot be reached: {why}", super::cache::shown());
    Failure::new(Kinds::Unreachable, message).hint(
        "without network, fill the cache elsewhere (hf download) and copy it, or set HF_HUB_CACHE; HF_ENDPOINT names \
             a mirror, HTTPS_PROXY a proxy",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_an_origin_and_paths_are_escaped() {
        assert_eq!(origin("https://a.b:8/c?d"), Some("https://a.b:8"));
        assert_eq!(origin("http://a"), Some("http://a"));
        for other in ["ftp://a/b", "/a", "https://", "a.b"] {
            assert_eq!(origin(other), None, "{other}");
        }
        assert_eq!(escaped("refs/pr/1", false), "refs%2Fpr%2F1");
        assert_eq!(escaped("a b/ü.json", true), "a%20b/%C3%BC.json");
    }

    #[test]
    fn waits_grow_and_follow_the_server_up_to_a_limit() {
        assert!(Failure::passing("x").wait(1) < Failure::passing("x").wait(3));
        let asked = |seconds| Failure::new(Kinds::Passing(Some(Duration::from_secs(seconds))), "x").wait(1);
        assert_eq!((asked(20), asked(1000)), (Duration::from_secs(20), MAX_WAIT));
    }
}
