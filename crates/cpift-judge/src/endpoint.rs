//! Requests to an OpenAI-compatible chat endpoint, its replies, and the classes of failures. The
//! API key is read from the environment, sent to the endpoint, and removed from all output.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::{Result, anyhow};
use cpift_core::BadInput;
use cpift_core::error::usage;
use log::{info, warn};
use serde_json::{Value, json};
use ureq::Agent;
use ureq::http::{StatusCode, Uri};

use crate::question::{Message, Rating};

/// Maximum size of a response body in bytes.
const MAX_BODY: u64 = 4 << 20;
/// Characters of a response body in an error message.
const SHOWN: usize = 200;

/// A chat endpoint and the model to ask.
pub(crate) struct Endpoint {
    base: String,
    url: String,
    model: String,
    max_tokens: u32,
    key: Option<Key>,
    agent: Agent,
    form: Mutex<Form>,
}

/// A judge's reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Reply {
    pub(crate) text: String,
    /// Tokens of the question; 0 if the endpoint does not report them.
    pub(crate) prompt_tokens: u64,
    /// Tokens of the reply; 0 if the endpoint does not report them.
    pub(crate) completion_tokens: u64,
}

/// Reason for a missing reply.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Every further question would fail as well: a refused key, a wrong address.
    Fatal(anyhow::Error),
    /// The same question may succeed later.
    Passing {
        error: anyhow::Error,
        /// Wait requested by the endpoint.
        retry_after: Option<Duration>,
    },
    /// The same question would fail again.
    Lasting(anyhow::Error),
}

/// Form of a request, adapted to what the endpoint has refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Form {
    /// Name of the field that limits the length of the reply.
    limit: &'static str,
    /// True if the request sets the temperature.
    temperature: bool,
}

impl Form {
    const FIRST: Self = Self { limit: "max_tokens", temperature: true };

    /// An alternative form without the field that `refusal` names.
    fn instead(self, refusal: &str) -> Option<Self> {
        if self.limit == Self::FIRST.limit && refusal.contains(Self::FIRST.limit) {
            return Some(Self { limit: "max_completion_tokens", ..self });
        }
        (self.temperature && refusal.contains("temperature")).then_some(Self { temperature: false, ..self })
    }
}

/// A response with its whole body.
struct Response {
    status: StatusCode,
    retry_after: Option<Duration>,
    body: Vec<u8>,
}

impl Endpoint {
    /// The endpoint under `base_url`, with replies of at most `max_tokens` tokens within `timeout`.
    ///
    /// # Errors
    /// [`cpift_core::Usage`] for an invalid address, or one that contains a secret.
    pub(crate) fn new(
        base_url: &str,
        model: &str,
        key: Option<Key>,
        timeout: Duration,
        max_tokens: u32,
    ) -> Result<Self> {
        let base = base_url.trim_end_matches('/');
        // Messages contain the address, so it must not contain a secret. The error does not repeat
        // it.
        if base.contains(['@', '?', '#']) || key.as_ref().is_some_and(|key| key.is_in(base)) {
            return Err(usage(
                "the base URL must not contain a user, a key or a query: set the key in the environment",
            ));
        }
        let uri: Option<Uri> = base.parse().ok();
        let uri = uri.filter(|uri| matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some());
        let uri =
            uri.ok_or_else(|| usage(format!("invalid base URL {base:?}: expected http://HOST/v1 or https://HOST/v1")))?;
        let config = Agent::config_builder()
            .timeout_global(Some(timeout))
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false);
        // A proxy cannot reach servers on this machine.
        let config = if is_loopback(uri.host().unwrap_or_default()) { config.proxy(None) } else { config };
        Ok(Self {
            base: base.to_owned(),
            url: format!("{base}/chat/completions"),
            model: model.to_owned(),
            max_tokens,
            key,
            agent: config.build().into(),
            form: Mutex::new(Form::FIRST),
        })
    }

    /// The address; contains no secret.
    pub(crate) fn base_url(&self) -> &str {
        &self.base
    }

    /// Returns true if requests set temperature 0; false once the endpoint has refused that.
    pub(crate) fn at_temperature_0(&self) -> bool {
        self.form().temperature
    }

    /// Name of the model to ask.
    pub(crate) fn model(&self) -> &str {
        &self.model
    }

    /// Sends `messages` once and reads the reply. If the endpoint refuses a field, the request is
    /// sent again without it.
    ///
    /// # Errors
    /// A [`Failure`] whose text names the endpoint and never contains the key.
    pub(crate) fn ask(&self, messages: &[Message]) -> Result<Reply, Failure> {
        let mut form = self.form();
        loop {
            let response = self.send(messages, form)?;
            if response.status.is_success() {
                self.remember(form);
                return self.reply(&response);
            }
            let refusal = String::from_utf8_lossy(&response.body);
            match form.instead(&refusal).filter(|_| response.status == StatusCode::BAD_REQUEST) {
                Some(other) => form = other,
                None => return Err(self.refused(response.status, &response.body, response.retry_after)),
            }
        }
    }

    fn send(&self, messages: &[Message], form: Form) -> Result<Response, Failure> {
        let mut body = json!({"model": self.model, "messages": messages, form.limit: self.max_tokens});
        if form.temperature {
            body["temperature"] = json!(0);
        }
        let mut request = self.agent.post(&self.url).content_type("application/json");
        if let Some(key) = &self.key {
            request = request.header("authorization", key.header());
        }
        let mut response = request.send(body.to_string()).map_err(|e| self.unanswered(&e))?;
        let wanted = response.headers().get("retry-after").and_then(|value| value.to_str().ok());
        let retry_after = wanted.and_then(|value| retry_after(value, SystemTime::now()));
        let body = response.body_mut().with_config().limit(MAX_BODY).read_to_vec().map_err(|e| self.unanswered(&e))?;
        Ok(Response { status: response.status(), retry_after, body })
    }

    fn form(&self) -> Form {
        *self.form.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps the accepted form for the next questions.
    fn remember(&self, form: Form) {
        let mut kept = self.form.lock().unwrap_or_else(PoisonError::into_inner);
        if form.limit != kept.limit && form.limit != Form::FIRST.limit {
            info!("{}: accepts {} instead of {}", self.url, form.limit, Form::FIRST.limit);
            kept.limit = form.limit;
        }
        if kept.temperature && !form.temperature {
            warn!("{}: refuses temperature 0, so grades may differ between runs", self.url);
            kept.temperature = false;
        }
    }

    fn reply(&self, response: &Response) -> Result<Reply, Failure> {
        let body = &response.body;
        let parsed = Body::parse(body).map_err(|e| {
            let error = BadInput::new(&self.url, "the reply is not a chat completion")
                .expected("JSON with choices[0].message.content")
                .found(format!("{} ({e})", self.excerpt(body)))
                .hint("the base URL usually ends in /v1");
            Failure::Lasting(error.into())
        })?;
        let (text, cut_off, prompt_tokens, completion_tokens) = match parsed {
            Body::Error { code, message } => return Err(self.error(code, &message, response.retry_after)),
            Body::Completion { text, cut_off, prompt_tokens, completion_tokens } => {
                (text, cut_off, prompt_tokens, completion_tokens)
            }
        };
        let useless = |what: &str| Failure::Lasting(BadInput::new(&self.url, what).found(self.excerpt(body)).into());
        if cut_off && Rating::of(&text) == Rating::Unrated {
            let limit = self.max_tokens;
            return Err(useless(&format!(
                "the reply was cut off at {limit} tokens, before its rating: raise --max-tokens"
            )));
        }
        if text.trim().is_empty() {
            return Err(useless("the reply is empty"));
        }
        Ok(Reply { text: self.redact(&text), prompt_tokens, completion_tokens })
    }

    /// Classifies an error object in the body of a successful response.
    fn error(&self, code: Option<u16>, message: &str, retry_after: Option<Duration>) -> Failure {
        let name = code.map_or("an error without a code".into(), |code| format!("error {code}"));
        let said = |what: &str| {
            BadInput::new(&self.url, format!("{what} ({name})")).found(self.excerpt(message.as_bytes())).into()
        };
        match code {
            Some(429 | 500..=599) => Failure::Passing { error: said("the endpoint cannot answer now"), retry_after },
            _ => Failure::Lasting(said("the question is refused")),
        }
    }

    /// Classifies a status other than success.
    fn refused(&self, status: StatusCode, body: &[u8], retry_after: Option<Duration>) -> Failure {
        let said = |what: &str| BadInput::new(&self.url, format!("{what} ({status})")).found(self.excerpt(body));
        match status.as_u16() {
            401 | 403 if self.key.is_some() => Failure::Fatal(
                said("the key is refused")
                    .hint("set OPENAI_API_KEY, or the variable that --key-env names, to a valid key")
                    .into(),
            ),
            401 | 403 => Failure::Fatal(
                said("the endpoint requires a key")
                    .hint("set OPENAI_API_KEY, or name a variable with --key-env")
                    .into(),
            ),
            300..=399 | 404 | 405 => Failure::Fatal(
                said("there is no such endpoint or model")
                    .hint("the base URL usually ends in /v1; URL/models lists the models")
                    .into(),
            ),
            408 | 425 | 429 | 500..=599 => {
                Failure::Passing { error: said("the endpoint cannot answer now").into(), retry_after }
            }
            _ => Failure::Lasting(said("the question is refused").into()),
        }
    }

    /// Classifies a request without a complete response.
    fn unanswered(&self, error: &ureq::Error) -> Failure {
        let text = |what: String| anyhow!("{}: {}", self.url, self.redact(&what));
        match error {
            ureq::Error::BodyExceedsLimit(_) => {
                Failure::Lasting(text(format!("the reply is longer than {MAX_BODY} bytes")))
            }
            ureq::Error::Timeout(_) => {
                Failure::Passing { error: text("no reply within the timeout".into()), retry_after: None }
            }
            other => Failure::Passing { error: text(format!("no reply: {other}")), retry_after: None },
        }
    }

    /// The first characters of a body, escaped and without the key.
    fn excerpt(&self, body: &[u8]) -> String {
        let text = self.redact(&String::from_utf8_lossy(body));
        let shown: String = text.chars().take(SHOWN).collect();
        let more = if shown.len() < text.len() { "…" } else { "" };
        format!("\"{}{more}\"", shown.escape_debug())
    }

    fn redact(&self, text: &str) -> String {
        self.key.as_ref().map_or_else(|| text.to_owned(), |key| key.redact(text))
    }
}

fn is_loopback(host: &str) -> bool {
    let host = host.trim_matches(['[', ']']);
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// Body of a successful response.
#[derive(Debug, PartialEq)]
enum Body {
    /// A chat completion.
    Completion {
        /// Empty if there is no text.
        text: String,
        /// True if the limit on the length ended the reply.
        cut_off: bool,
        prompt_tokens: u64,
        completion_tokens: u64,
    },
    /// An error object, as gateways send it with status 200.
    Error {
        /// HTTP status, if the code is a number.
        code: Option<u16>,
        message: String,
    },
}

impl Body {
    /// Parses a body. The text may be one string or a list of parts; all other fields are optional.
    ///
    /// # Errors
    /// A description of the first missing or malformed part.
    fn parse(body: &[u8]) -> Result<Self, String> {
        let body: Value = serde_json::from_slice(body).map_err(|e| e.to_string())?;
        if let Some(error) = body.get("error").filter(|error| error.is_object()) {
            return Ok(Self::error(error));
        }
        let choice = &body["choices"][0];
        let content = choice["message"].get("content").ok_or("this field is missing")?;
        let text = text(content).ok_or("content is not a text")?;
        let count = |name: &str| body["usage"][name].as_u64().unwrap_or(0);
        Ok(Self::Completion {
            text,
            cut_off: choice["finish_reason"] == "length",
            prompt_tokens: count("prompt_tokens"),
            completion_tokens: count("completion_tokens"),
        })
    }

    fn error(error: &Value) -> Self {
        let code = &error["code"];
        let number = code.as_u64().or_else(|| code.as_str()?.trim().parse().ok());
        let message = error["message"].as_str().map_or_else(|| error.to_string(), str::to_owned);
        Self::Error { code: number.and_then(|n| u16::try_from(n).ok()), message }
    }
}

/// Text of `content`: a string, null (empty), or a list whose parts with a text are joined.
fn text(content: &Value) -> Option<String> {
    match content {
        Value::Null => Some(String::new()),
        Value::String(text) => Some(text.clone()),
        Value::Array(parts) => {
            let text = |part: &Value| part.as_str().or_else(|| part["text"].as_str()).map(str::to_owned);
            Some(parts.iter().filter_map(text).collect())
        }
        _ => None,
    }
}

/// Parses a Retry-After header: seconds, possibly fractional, or an HTTP date.
fn retry_after(value: &str, now: SystemTime) -> Option<Duration> {
    let value = value.trim();
    if let Ok(seconds) = value.parse() {
        return Duration::try_from_secs_f64(seconds).ok();
    }
    let date = httpdate::parse_http_date(value).ok()?;
    Some(date.duration_since(now).unwrap_or_default())
}

/// Replacement for the key in anything the endpoint sends back.
const REDACTED: &str = "(key)";
/// Shorter keys may be ordinary words: local endpoints are given keys such as `none`.
const SECRET: usize = 16;

/// A secret without `Debug` and `Display`, so that it cannot be printed by accident.
pub(crate) struct Key(String);

impl Key {
    /// Reads the key from the environment variable `name`, or from OPENAI_API_KEY by default.
    ///
    /// # Errors
    /// [`cpift_core::Usage`] if `name` is not the name of a variable that is set. The message does
    /// not repeat `name`, which may be the key itself, given by mistake.
    pub(crate) fn from_env(name: Option<&str>) -> Result<Option<Self>> {
        let variable = name.unwrap_or("OPENAI_API_KEY");
        let named = variable.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') && !variable.is_empty();
        let value = if named { std::env::var(variable).unwrap_or_default() } else { String::new() };
        match value.trim() {
            "" if name.is_some() => Err(usage(
                "--key-env takes the NAME of an environment variable that holds the key; no variable of this name is set",
            )),
            "" => Ok(None),
            key => Self::new(key).map(Some),
        }
    }

    /// Checks the characters and length of a key.
    ///
    /// # Errors
    /// [`cpift_core::Usage`] for text that cannot be a key.
    pub(crate) fn new(key: &str) -> Result<Self> {
        // A shorter key could not be told from ordinary text when it is removed from messages.
        if key.len() < 4 || !key.chars().all(|c| c.is_ascii_graphic()) {
            return Err(usage(
                "the key in the environment is not valid: expected 4 or more printable ASCII characters",
            ));
        }
        Ok(Self(key.to_owned()))
    }

    /// Value of the authorization header.
    pub(crate) fn header(&self) -> String {
        format!("Bearer {}", self.0)
    }

    /// Returns true if `text` contains the key.
    pub(crate) fn is_in(&self, text: &str) -> bool {
        text.contains(&self.0)
    }

    /// Refuses a command line that contains the key, because the command line is recorded.
    ///
    /// # Errors
    /// [`cpift_core::Usage`], without the key.
    pub(crate) fn check_arguments(&self, arguments: &[String]) -> Result<()> {
        if self.0.len() >= SECRET && arguments.iter().any(|argument| self.is_in(argument)) {
            return Err(usage("an argument contains the key and would be recorded: set the key in the environment"));
        }
        Ok(())
    }

    /// Removes the key from `text`, both plain and as JSON escapes it.
    pub(crate) fn redact(&self, text: &str) -> String {
        let quoted = json!(self.0).to_string();
        text.replace(&self.0, REDACTED).replace(&quoted[1..quoted.len() - 1], REDACTED)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(url: &str, key: Option<&str>) -> Result<Endpoint> {
        Endpoint::new(url, "m", key.map(Key::new).transpose()?, Duration::from_secs(1), 1024)
    }

    #[test]
    fn addresses_that_hold_secrets_or_are_none_are_refused_without_being_repeated() {
        for url in ["http://user:hunter22@h/v1", "https://h/v1?api-key=hunter22", "https://h/hunter22/v1"] {
            let error = endpoint(url, Some("hunter22")).err().unwrap().to_string();
            assert!(error.contains("environment") && !error.contains("hunter22"), "{error}");
        }
        for url in ["", "h/v1", "ftp://h/v1", "http://"] {
            assert!(endpoint(url, None).is_err(), "{url}");
        }
        assert_eq!(endpoint("http://h/v1//", None).unwrap().url, "http://h/v1/chat/completions");
    }

    #[test]
    fn excerpts_are_escaped_bounded_and_without_the_key() {
        let endpoint = endpoint("http://h/v1", Some("a\"secret")).unwrap();
        let shown = endpoint.excerpt(b"<html>\n\x1b[31m a\"secret and \"a\\\"secret\"");
        assert_eq!(shown, "\"<html>\\n\\u{1b}[31m (key) and \\\"(key)\\\"\"");
        let long = endpoint.excerpt("é".repeat(1000).as_bytes());
        assert_eq!(long.chars().count(), SHOWN + 3);
        // A key that the limit would cut in two.
        let split = format!("{}a\"secret", "x".repeat(SHOWN - 3));
        assert!(!endpoint.excerpt(split.as_bytes()).contains("a\\\"s"));
    }

    #[test]
    fn statuses_are_classified() {
        let endpoint = endpoint("http://h/v1", Some("sk-secret")).unwrap();
        let kind = |status: u16| match endpoint.refused(StatusCode::from_u16(status).unwrap(), b"", None) {
            Failure::Fatal(_) => "fatal",
            Failure::Passing { .. } => "passing",
            Failure::Lasting(_) => "lasting",
        };
        assert!([401, 403, 404, 307].iter().all(|s| kind(*s) == "fatal"));
        assert!([408, 429, 500, 502, 503, 529].iter().all(|s| kind(*s) == "passing"));
        assert!([400, 413, 422].iter().all(|s| kind(*s) == "lasting"));
    }

    #[test]
    fn a_refusal_changes_what_it_names_and_nothing_twice() {
        let plain = Form { limit: "max_completion_tokens", temperature: true };
        assert_eq!(Form::FIRST.instead("'max_tokens' is not supported. Use 'max_completion_tokens'."), Some(plain));
        let bare = Form { temperature: false, ..plain };
        assert_eq!(plain.instead("'temperature' does not support 0"), Some(bare));
        assert_eq!(plain.instead("max_completion_tokens is too large"), None);
        assert_eq!(bare.instead("max_tokens and temperature"), None);
    }

    #[test]
    fn loopback_is_told_from_other_hosts() {
        assert!(["localhost", "127.0.0.1", "[::1]"].iter().all(|h| is_loopback(h)));
        assert!(["127.0.0.1.example.com", "10.0.0.1", "h"].iter().all(|h| !is_loopback(h)));
    }

    fn completion(body: &str) -> (String, bool, u64, u64) {
        match Body::parse(body.as_bytes()) {
            Ok(Body::Completion { text, cut_off, prompt_tokens, completion_tokens }) => {
                (text, cut_off, prompt_tokens, completion_tokens)
            }
            other => panic!("{body}: {other:?}"),
        }
    }

    #[test]
    fn texts_and_counts_are_read_in_every_form_they_come_in() {
        let whole = r#"{"choices": [{"message": {"content": "x"}, "finish_reason": "length"}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 4}, "error": null}"#;
        assert_eq!(completion(whole), ("x".into(), true, 3, 4));
        for usage in ["null", "{}", r#"{"prompt_tokens": null, "completion_tokens": -1}"#, "7"] {
            let body = format!(r#"{{"choices": [{{"message": {{"content": "x"}}}}], "usage": {usage}}}"#);
            assert_eq!(completion(&body), ("x".into(), false, 0, 0));
        }
        let parts =
            r#"{"choices": [{"message": {"content": [{"type": "text", "text": "a"}, {"type": "image"}, "b"]}}]}"#;
        assert_eq!(completion(parts).0, "ab");
        assert_eq!(completion(r#"{"choices": [{"message": {"content": null}}]}"#).0, "");
        for body in ["", "[]", r#"{"choices": []}"#, r#"{"choices": [{"message": {"content": 7}}]}"#] {
            assert!(Body::parse(body.as_bytes()).is_err(), "{body}");
        }
    }

    #[test]
    fn errors_under_a_status_of_success_have_their_code() {
        let error = |body: &str| match Body::parse(body.as_bytes()) {
            Ok(Body::Error { code, message }) => (code, message),
            other => panic!("{body}: {other:?}"),
        };
        assert_eq!(error(r#"{"error": {"code": 429, "message": "slow"}}"#), (Some(429), "slow".into()));
        assert_eq!(error(r#"{"error": {"code": "502"}, "choices": []}"#), (Some(502), r#"{"code":"502"}"#.into()));
        assert_eq!(error(r#"{"error": {"code": "bad_model", "message": "m"}}"#), (None, "m".into()));
    }

    #[test]
    fn waits_are_read_as_seconds_and_as_dates() {
        let now = httpdate::parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        let wait = |value: &str| retry_after(value, now).map(|wait| wait.as_secs_f64());
        assert_eq!((wait("7"), wait(" 1.5 "), wait("0")), (Some(7.0), Some(1.5), Some(0.0)));
        assert_eq!(wait("Sun, 06 Nov 1994 08:49:40 GMT"), Some(3.0));
        assert_eq!(wait("Sun, 06 Nov 1994 08:49:00 GMT"), Some(0.0), "a date that has passed");
        for value in ["", "soon", "-1", "nan", "inf", "1e300"] {
            assert_eq!(wait(value), None, "{value}");
        }
    }
}
