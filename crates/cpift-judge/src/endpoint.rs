//! One request to a chat endpoint, and what its failure means for the next.

use std::time::Duration;

use anyhow::{Result, anyhow};
use cpift_core::BadInput;
use cpift_core::error::usage;
use serde::Deserialize;
use serde_json::json;
use ureq::Agent;
use ureq::http::{StatusCode, Uri};

use crate::prompt::Message;

/// Longest reply that is read.
const MAX_BODY: u64 = 4 << 20;
/// Longest graded answer asked for, in tokens.
const MAX_TOKENS: u32 = 1024;
/// Characters of a body that are shown.
const SHOWN: usize = 200;
/// What stands for the key in whatever an endpoint sends back.
const REDACTED: &str = "(key)";

/// A secret that is sent and otherwise goes nowhere: it has no `Debug` and no `Display`.
pub struct Key(String);

impl Key {
    /// Reads the key from the variable called `name`, or from OPENAI_API_KEY where that is set.
    ///
    /// # Errors
    /// [`cpift_core::Usage`], which never repeats `name`: the key itself may stand there by mistake.
    pub fn from_env(name: Option<&str>) -> Result<Option<Self>> {
        let variable = name.unwrap_or("OPENAI_API_KEY");
        let named = variable.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') && !variable.is_empty();
        let value = if named { std::env::var(variable).unwrap_or_default() } else { String::new() };
        match value.trim() {
            "" if name.is_some() => Err(usage(
                "--key-env takes the NAME of an environment variable that holds the key; there is none of this name",
            )),
            "" => Ok(None),
            key => Self::new(key).map(Some),
        }
    }

    /// A key given by the caller.
    ///
    /// # Errors
    /// [`cpift_core::Usage`] for what cannot be a key.
    pub fn new(key: &str) -> Result<Self> {
        // Shorter ones could not be told from ordinary text when they are taken out of messages.
        if key.len() < 4 || !key.chars().all(|c| c.is_ascii_graphic()) {
            return Err(usage(
                "the key in the environment cannot be one: expected 4 or more printable ASCII characters",
            ));
        }
        Ok(Self(key.to_owned()))
    }
}

/// A chat endpoint and the model asked there.
pub struct Endpoint {
    url: String,
    model: String,
    key: Option<Key>,
    agent: Agent,
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

#[derive(Deserialize)]
struct Completion {
    choices: Vec<Choice>,
    #[serde(default)]
    usage: Option<Tokens>,
}

#[derive(Deserialize)]
struct Choice {
    message: Content,
}

#[derive(Deserialize)]
struct Content {
    /// Null where a model says nothing.
    content: Option<String>,
}

#[derive(Deserialize, Default)]
struct Tokens {
    #[serde(default)]
    prompt_tokens: u64,
    #[serde(default)]
    completion_tokens: u64,
}

impl Endpoint {
    /// The endpoint under `base_url`, asked with at most `timeout` for each reply.
    ///
    /// # Errors
    /// [`cpift_core::Usage`] for an address that cannot be one.
    pub fn new(base_url: &str, model: &str, key: Option<Key>, timeout: Duration) -> Result<Self> {
        let base = base_url.trim_end_matches('/');
        // The address is in messages, so that it must hold no secret; refused, it is not repeated.
        if base.contains(['@', '?', '#']) || key.as_ref().is_some_and(|key| base.contains(&key.0)) {
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
        let url = format!("{base}/chat/completions");
        Ok(Self { url, model: model.to_owned(), key, agent: config.build().into() })
    }

    /// The model asked.
    pub fn model(&self) -> &str {
        &self.model
    }

    /// Sends `messages` and reads the reply, once.
    ///
    /// # Errors
    /// A [`Failure`] whose text names the endpoint and never holds the key.
    pub fn ask(&self, messages: &[Message]) -> Result<Reply, Failure> {
        let body = json!({"model": self.model, "messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS});
        let mut request = self.agent.post(&self.url).content_type("application/json");
        if let Some(Key(key)) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let mut response = request.send(body.to_string()).map_err(|e| self.unanswered(&e))?;
        let retry_after = response.headers().get("retry-after").and_then(|v| v.to_str().ok()?.trim().parse().ok());
        let body = response.body_mut().with_config().limit(MAX_BODY).read_to_vec().map_err(|e| self.unanswered(&e))?;
        if response.status().is_success() {
            return self.reply(&body).map_err(Failure::Lasting);
        }
        Err(self.refused(response.status(), &body, retry_after.map(Duration::from_secs)))
    }

    fn reply(&self, body: &[u8]) -> Result<Reply> {
        let malformed = |found: String| {
            BadInput::new(&self.url, "the reply is no chat completion")
                .expected("JSON with choices[0].message.content")
                .found(found)
                .hint("the base URL usually ends in /v1")
        };
        let completion: Completion =
            serde_json::from_slice(body).map_err(|e| malformed(format!("{} ({e})", self.excerpt(body))))?;
        let choice = completion.choices.into_iter().next().ok_or_else(|| malformed(self.excerpt(body)))?;
        let tokens = completion.usage.unwrap_or_default();
        Ok(Reply {
            text: self.redact(&choice.message.content.unwrap_or_default()),
            prompt_tokens: tokens.prompt_tokens,
            completion_tokens: tokens.completion_tokens,
        })
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
        match &self.key {
            None => text.to_owned(),
            Some(Key(key)) => {
                // As it is, and as JSON writes it.
                let quoted = json!(key).to_string();
                text.replace(key, REDACTED).replace(&quoted[1..quoted.len() - 1], REDACTED)
            }
        }
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
        Endpoint::new(url, "m", key.map(Key::new).transpose()?, Duration::from_secs(1))
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
    fn loopback_is_told_from_other_hosts() {
        assert!(["localhost", "127.0.0.1", "[::1]"].iter().all(|h| is_loopback(h)));
        assert!(["127.0.0.1.example.com", "10.0.0.1", "h"].iter().all(|h| !is_loopback(h)));
    }
}
