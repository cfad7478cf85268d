//! Values of a row that are neither text nor a JSON number: NaN and the infinities, and bytes that are not UTF-8.
//!
//! A column that nobody reads must not stop a run, so such a value stands in its row as a marker that says why it cannot be used. Where
//! the column is read, the marker is no text, list or number, and the error shows the reason in place of the value.

use serde_json::{Value, json};

/// The marker's only key. No column has a name that begins with NUL.
pub(super) const KEY: &str = "\0unusable";

/// The marker of a value that cannot be used; `found` is what messages show, such as `NaN`.
pub fn unusable(found: &str) -> Value {
    json!({ KEY: found })
}

/// What messages show of `value`, if it is a marker.
pub fn reason(value: &Value) -> Option<&str> {
    value.as_object().filter(|object| object.len() == 1)?.get(KEY)?.as_str()
}

/// Returns true if `value` is a marker or holds one.
pub fn has_unusable(value: &Value) -> bool {
    match value {
        Value::Array(list) => list.iter().any(has_unusable),
        Value::Object(map) => reason(value).is_some() || map.values().any(has_unusable),
        _ => false,
    }
}

/// `value` as JSON, markers written as what was found.
pub fn text_of(value: &Value) -> String {
    let mut text = value.to_string();
    if has_unusable(value) {
        let open = format!("{{{}:\"", json!(KEY));
        while let Some(start) = text.find(&open) {
            let from = start + open.len();
            let Some(length) = text[from..].find("\"}") else { break };
            text = format!("{}{}{}", &text[..start], &text[from..from + length], &text[from + length + 2..]);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markers_are_told_from_other_values_and_shown_as_what_was_found() {
        let nested = json!({"a": [1, unusable("NaN")], "b": unusable("-Infinity"), "c": {}});
        assert!(has_unusable(&nested) && reason(&nested).is_none() && reason(&nested["b"]) == Some("-Infinity"));
        assert_eq!(text_of(&nested), r#"{"a":[1,NaN],"b":-Infinity,"c":{}}"#);
        let plain = json!({"a": ["NaN", null, {}]});
        assert!(!has_unusable(&plain));
        assert_eq!(text_of(&plain), r#"{"a":["NaN",null,{}]}"#);
    }
}
