//! What the body and the headers of a response say, without regard to where it came from.

use std::time::{Duration, SystemTime};

use serde_json::Value;

/// The body of a response of success.
#[derive(Debug, PartialEq)]
pub(super) enum Body {
    /// A chat completion.
    Completion {
        /// The text; empty where there is none.
        text: String,
        /// Whether it ended because of the limit on its length.
        cut_off: bool,
        /// Tokens of the question; 0 where the endpoint does not say.
        prompt_tokens: u64,
        /// Tokens of the reply; 0 where the endpoint does not say.
        completion_tokens: u64,
    },
    /// An error under a status of success, as gateways send it.
    Error {
        /// As of HTTP, where it is a number.
        code: Option<u16>,
        /// What it says.
        message: String,
    },
}

impl Body {
    /// Reads a body. The text may be one string or a list of parts; what is missing beside it is no error.
    ///
    /// # Errors
    /// What is wrong with a body that is neither.
    pub(super) fn parse(body: &[u8]) -> Result<Self, String> {
        let body: Value = serde_json::from_slice(body).map_err(|e| e.to_string())?;
        if let Some(error) = body.get("error").filter(|error| error.is_object()) {
            return Ok(Self::error(error));
        }
        let choice = &body["choices"][0];
        let content = choice["message"].get("content").ok_or("no such field")?;
        let text = text(content).ok_or("content that is no text")?;
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

/// A text, null for none, or a list of parts of which those with a text count.
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

/// The wait that a Retry-After asks for: seconds, with a fraction or without, or a date of HTTP.
pub(super) fn retry_after(value: &str, now: SystemTime) -> Option<Duration> {
    let value = value.trim();
    if let Ok(seconds) = value.parse() {
        return Duration::try_from_secs_f64(seconds).ok();
    }
    let date = httpdate::parse_http_date(value).ok()?;
    Some(date.duration_since(now).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

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
