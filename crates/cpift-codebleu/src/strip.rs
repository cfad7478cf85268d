//! Taking comments and docstrings out, as the PyPI package does before it parses.

mod c_like;
mod python;

use std::borrow::Cow;

use crate::Language;

/// `code` without comments (in Python without docstrings too) and without blank lines.
pub fn comments(language: Language, code: &str) -> Cow<'_, str> {
    let stripped = match language {
        // What Python's tokenizer refuses stays as it is.
        Language::Python => match python::without_comments(code) {
            Some(stripped) => stripped,
            None => return Cow::Borrowed(code),
        },
        _ => c_like::without_comments(code),
    };
    let lines: Vec<&str> = stripped.split('\n').filter(|line| !trim(line).is_empty()).collect();
    Cow::Owned(lines.join("\n"))
}

/// White space as Python's `str.split` has it: Unicode's, and the four separators of ASCII.
pub fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// `text` without white space around it.
pub fn trim(text: &str) -> &str {
    text.trim_matches(is_space)
}
