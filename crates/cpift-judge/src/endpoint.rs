//! One request to a chat endpoint, and what its failure means for the next.

mod key;
mod reply;

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::{Result, anyhow};
use cpift_core::BadInput;
use cpift_core::error::usage;
use log::{info, warn};
use serde_json::json;
use ureq::Agent;
use ureq::http::{StatusCode, Uri};

pub use key::Key;
use reply::Body;

use crate::prompt::Message;
use crate::rating::{self, Rating};

/// Longest reply that is read.
const MAX_BODY: u64 = 4 << 20;
/// Characters of a body that are shown.
const SHOWN: usize = 200;

/// A chat endpoint and the model asked there.
pub struct Endpoint {
    base: String,
    url: String,
    model: String,
    max_tokens: u32,
    key: Option<Key>,
    agent: Agent,
    form: Mutex<Form>,
}

/// What a judge replied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// The text.
    pub text: String,
    /// Tokens of the question; 0 where the endpoint does not say.
    pub prompt_tokens: u64,
    /// Tokens of the reply; 0 where the endpoint does not say.
    pub completion_tokens: u64,
}

/// Why there is no reply.
#[derive(Debug)]
pub enum Failure {
    /// No question will fare better: a refused key, a wrong address.
    Fatal(anyhow::Error),
    /// The same question may fare better later.
    Passing {
        /// What happened.
        error: anyhow::Error,
        /// The wait that the endpoint asks for.
        retry_after: Option<Duration>,
    },
    /// This question fails again if it is asked again.
    Lasting(anyhow::Error),
}

/// How a request is put, as far as the endpoint has refused another way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Form {
    /// The field that limits the reply's length.
    limit: &'static str,
    /// Whether the temperature is said.
    temperature: bool,
}

impl Form {
    const FIRST: Self = Self { limit: "max_tokens", temperature: true };

    /// Another way, where `refusal` names what it would leave out.
    fn instead(self, refusal: &str) -> Option<Self> {
        if self.limit == Self::FIRST.limit && refusal.contains(Self::FIRST.limit) {
            return Some(Self { limit: "max_completion_tokens", ..self });
        }
        (self.temperature && refusal.contains("temperature")).then_some(Self { temperature: false, ..self })
    }
}

/// A response, read whole.
struct Response {
    status: StatusCode,
    retry_after: Option<Duration>,
    body: Vec<u8>,
}

impl Endpoint {
    /// The endpoint under `base_url`, asked for replies of at most `max_tokens`, each within `timeout`.
    ///
    /// # Errors
    /// [`cpift_core::Usage`] for an address that cannot be one.
    pub fn new(base_url: &str, model: &str, key: Option<Key>, timeout: Duration, max_tokens: u32) -> Result<Self> {
        let base = base_url.trim_end_matches('/');
        // The address is in messages, so that it must hold no secret; refused, it is not repeated.
        if base.contains(['@', '?', '#']) || key.as_ref().is_some_and(|key| key.is_in(base)) {
            return Err(usage(
                "the base URL must not hold a user, a key or a query: the key comes from the environment",
            ));
        }
        let uri: Option<Uri> = base.parse().ok();
        let uri = uri.filter(|uri| matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some());
        let uri = uri.ok_or_else(|| {
            usage(format!("the base URL {base:?} is none: expected http://HOST/v1 or https://HOST/v1"))
        })?;
        let config = Agent::config_builder()
            .timeout_global(Some(timeout))
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false);
        // A proxy does not reach what runs on this machine.
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

    /// The address, without a secret.
    pub fn base_url(&self) -> &str {
        &self.base
    }

    /// Whether the judge is asked at temperature 0; not where it refused that.
    pub fn at_temperature_0(&self) -> bool {
        self.form().temperature
    }

    /// The model asked.
    pub fn model(&self) -> &str {
        &self.model
    }

    /// Sends `messages` and reads the reply, once; again, in another form, where the endpoint refuses a field of the first.
    ///
    /// # Errors
    /// A [`Failure`] whose text names the endpoint and never holds the key.
    pub fn ask(&self, messages: &[Message]) -> Result<Reply, Failure> {
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
        let retry_after = wanted.and_then(|value| reply::retry_after(value, SystemTime::now()));
        let body = response.body_mut().with_config().limit(MAX_BODY).read_to_vec().map_err(|e| self.unanswered(&e))?;
        Ok(Response { status: response.status(), retry_after, body })
    }

    fn form(&self) -> Form {
        *self.form.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps the form that was understood for the questions to come.
    fn remember(&self, form: Form) {
        let mut kept = self.form.lock().unwrap_or_else(PoisonError::into_inner);
        if form.limit != kept.limit && form.limit != Form::FIRST.limit {
            info!("{}: takes {} for {}", self.url, form.limit, Form::FIRST.limit);
            kept.limit = form.limit;
        }
        if kept.temperature && !form.temperature {
            warn!("{}: refuses temperature 0: another run may grade otherwise", self.url);
            kept.temperature = false;
        }
    }

    fn reply(&self, response: &Response) -> Result<Reply, Failure> {
        let body = &response.body;
        let parsed = Body::parse(body).map_err(|e| {
            let error = BadInput::new(&self.url, "the reply is no chat completion")
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
        if cut_off && rating::parse(&text) == Rating::Unrated {
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

    /// What an error under a status of success means.
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

    /// What a status other than success means.
    fn refused(&self, status: StatusCode, body: &[u8], retry_after: Option<Duration>) -> Failure {
        let said = |what: &str| BadInput::new(&self.url, format!("{what} ({status})")).found(self.excerpt(body));
        match status.as_u16() {
            401 | 403 if self.key.is_some() => Failure::Fatal(
                said("the key is refused")
                    .hint("set OPENAI_API_KEY, or the variable that --key-env names, to a valid key")
                    .into(),
            ),
            401 | 403 => Failure::Fatal(
                said("a key is wanted").hint("set OPENAI_API_KEY, or name a variable with --key-env").into(),
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

    /// What a request without a whole response means.
    fn unanswered(&self, error: &ureq::Error) -> Failure {
        let text = |what: String| anyhow!("{}: {}", self.url, self.redact(&what));
        match error {
            ureq::Error::BodyExceedsLimit(_) => {
                Failure::Lasting(text(format!("the reply is longer than {MAX_BODY} bytes")))
            }
            ureq::Error::Timeout(_) => {
                Failure::Passing { error: text("no reply within the time-out".into()), retry_after: None }
            }
            other => Failure::Passing { error: text(format!("no reply: {other}")), retry_after: None },
        }
    }

    /// The first characters of a body, escaped.
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
        // A key that the bound would cut in two.
        let split = format!("{}a\"secret", "x".repeat(SHOWN - 3));
        assert!(!endpoint.excerpt(split.as_bytes()).contains("a\\\"s"));
    }

    #[test]
    fn what_a_status_means_for_the_next_request() {
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
}
