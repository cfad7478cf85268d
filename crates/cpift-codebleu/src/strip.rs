//! Removal of comments and docstrings before parsing, as the PyPI package does it.

use std::borrow::Cow;
use std::sync::LazyLock;

use regex::Regex;

use crate::language::Language;

/// Returns `code` without comments (for Python, without docstrings as well) and without blank
/// lines.
pub(crate) fn comments(language: Language, code: &str) -> Cow<'_, str> {
    let stripped = match language {
        // Code that Python's tokenizer rejects is left as it is.
        Language::Python => match without_python_comments(code) {
            Some(stripped) => stripped,
            None => return Cow::Borrowed(code),
        },
        _ => without_c_like_comments(code),
    };
    let lines: Vec<&str> = stripped.split('\n').filter(|line| !trim(line).is_empty()).collect();
    Cow::Owned(lines.join("\n"))
}

/// Returns true for white space as Python's `str.split` defines it: Unicode's, and the four
/// separators of ASCII.
pub(crate) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// Returns `text` without leading and trailing white space.
pub(crate) fn trim(text: &str) -> &str {
    text.trim_matches(is_space)
}

/// Java, JavaScript, C and C++: returns `code` with a space in place of each comment. Quoted text
/// is left alone; an unclosed quote or comment counts as plain text.
fn without_c_like_comments(code: &str) -> String {
    let bytes = code.as_bytes();
    // A failed search for a closer is not repeated, so time stays linear.
    let (mut unclosed_comment, mut unclosed_quote) = (false, [false; 2]);
    let (mut out, mut kept, mut at) = (String::with_capacity(code.len()), 0, 0);
    while at < bytes.len() {
        match (bytes[at], bytes.get(at + 1)) {
            (b'/', Some(b'/')) => {
                out.push_str(&code[kept..at]);
                out.push(' ');
                at = code[at..].find('\n').map_or(bytes.len(), |end| at + end);
                kept = at;
            }
            (b'/', Some(b'*')) if !unclosed_comment => match code[at + 2..].find("*/") {
                Some(end) => {
                    out.push_str(&code[kept..at]);
                    out.push(' ');
                    at += 2 + end + 2;
                    kept = at;
                }
                None => unclosed_comment = true,
            },
            (quote @ (b'\'' | b'"'), _) => {
                let unclosed = &mut unclosed_quote[usize::from(quote == b'"')];
                let end = if *unclosed { None } else { end_of_quote(bytes, at + 1, quote) };
                // After a failed search every later quote of this kind is escaped, and a search
                // from it fails as well.
                *unclosed = end.is_none();
                at = end.unwrap_or(at + 1);
            }
            _ => at += 1,
        }
    }
    out.push_str(&code[kept..]);
    out
}

/// Index of the byte after the quote that closes the text starting at `at`.
fn end_of_quote(bytes: &[u8], mut at: usize, quote: u8) -> Option<usize> {
    while at < bytes.len() {
        match bytes[at] {
            b'\\' => at += 2,
            byte if byte == quote => return Some(at + 1),
            _ => at += 1,
        }
    }
    None
}

/// Python numbers and names. Their ends matter because a string prefix may follow a number but not
/// a name.
static WORD: LazyLock<Regex> = LazyLock::new(|| {
    let digits = r"[0-9](?:_?[0-9])*";
    let exponent = format!("[eE][-+]?{digits}");
    let float = format!(r"(?:(?:{digits}\.(?:{digits})?|\.{digits})(?:{exponent})?|{digits}{exponent})");
    let integer = r"0[xX](?:_?[0-9a-fA-F])+|0[bB](?:_?[01])+|0[oO](?:_?[0-7])+|0(?:_?0)*|[1-9](?:_?[0-9])*";
    let word = format!(r"^(?:{digits}[jJ]|{float}[jJ]|{float}|{integer}|[\p{{L}}\p{{N}}_]+)");
    Regex::new(&word).expect("a constant that parses")
});

const TAB: usize = 8;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Comment,
    String,
    Indent,
    Newline,
    /// Any other token.
    Other,
}

/// Python: returns `source` without comments and docstrings, or `None` if the tokenizer would raise
/// an error.
///
/// Tokens follow the standard library's pure-Python tokenizer (3.11 and older). As in the package,
/// a docstring is a string that comes first after an indent or a new line, or that starts a line.
fn without_python_comments(source: &str) -> Option<String> {
    let mut out = Output { source, text: String::with_capacity(source.len()), previous: Kind::Indent, end: 0 };
    Tokenizer::new(source).run(&mut out)?;
    Some(out.text)
}

struct Output<'a> {
    source: &'a str,
    text: String,
    previous: Kind,
    /// Index of the byte after the last token.
    end: usize,
}

impl Output<'_> {
    /// Adds the token at bytes `start..end` of a line that begins at `line`. White space before it
    /// becomes one space per byte.
    fn token(&mut self, kind: Kind, start: usize, end: usize, line: usize) {
        self.text.extend(std::iter::repeat_n(' ', start - self.end.max(line)));
        let first = matches!(self.previous, Kind::Indent | Kind::Newline) || start == line;
        if kind != Kind::Comment && !(kind == Kind::String && first) {
            self.text.push_str(&self.source[start..end]);
        }
        self.previous = kind;
        self.end = end;
    }
}

/// A string that continues on the next line.
struct OpenString {
    start: usize,
    /// Index of the first byte of its first line.
    line: usize,
    closer: &'static str,
    /// True for a single-quoted string, whose lines are joined by backslashes.
    single: bool,
}

struct Tokenizer<'a> {
    source: &'a str,
    depth: i64,
    continued: bool,
    indents: Vec<usize>,
    open: Option<OpenString>,
}

impl<'a> Tokenizer<'a> {
    fn new(source: &'a str) -> Self {
        Self { source, depth: 0, continued: false, indents: vec![0], open: None }
    }

    fn run(mut self, out: &mut Output) -> Option<()> {
        let mut start = 0;
        for line in self.source.split_inclusive('\n') {
            let end = start + line.len();
            if let Some(at) = self.line_start(start, end, out)? {
                self.tokens(at, start, end, out);
            }
            start = end;
        }
        (self.open.is_none() && self.depth == 0 && !self.continued).then_some(())
    }

    /// Reads what precedes the tokens of the line: the rest of a string, or the indent. Returns the
    /// index at which the tokens start, or `None` for a line without tokens.
    fn line_start(&mut self, start: usize, end: usize, out: &mut Output) -> Option<Option<usize>> {
        let line = &self.source[start..end];
        if let Some(open) = self.open.take() {
            if let Some(length) = end_of_python_quote(line, open.closer) {
                out.token(Kind::String, open.start, start + length, open.line);
                return Some(Some(start + length));
            }
            if open.single && !line.ends_with("\\\n") && !line.ends_with("\\\r\n") {
                out.token(Kind::Other, open.start, end, open.line);
            } else {
                self.open = Some(open);
            }
            return Some(None);
        }
        if self.depth != 0 || self.continued {
            self.continued = false;
            return Some(Some(start));
        }
        let (column, width) = indent(line);
        let first = start + width;
        match line.as_bytes().get(width) {
            None => return Some(None),
            Some(b'#') => {
                let text = line.trim_end_matches(['\r', '\n']).len();
                out.token(Kind::Comment, first, start + text, start);
                out.token(Kind::Other, start + text, end, start);
                return Some(None);
            }
            Some(b'\r' | b'\n') => {
                out.token(Kind::Other, first, end, start);
                return Some(None);
            }
            Some(_) => {}
        }
        if column > *self.indents.last()? {
            self.indents.push(column);
            out.token(Kind::Indent, start, first, start);
        }
        while column < *self.indents.last()? {
            // A dedent to a column that no earlier line had is an error.
            self.indents.contains(&column).then_some(())?;
            self.indents.pop();
            out.token(Kind::Other, first, first, start);
        }
        Some(Some(first))
    }

    /// Reads the tokens from `at` to the end of the line.
    fn tokens(&mut self, mut at: usize, line: usize, end: usize, out: &mut Output) {
        let mut unclosed = Unclosed::default();
        while at < end {
            let start = at + self.source[at..end].bytes().take_while(|b| b" \t\x0c".contains(b)).count();
            let rest = &self.source[start..end];
            let (from, kind, length) = match scan(rest, &mut unclosed) {
                Scan::Token(kind, length) => (start, kind, length),
                // The white space before it is then a token as well and is kept.
                Scan::Unknown(length) => (at, Kind::Other, length),
                Scan::Open { closer, single } => {
                    self.open = Some(OpenString { start, line, closer, single });
                    return;
                }
                Scan::Continued => {
                    self.continued = true;
                    return;
                }
                Scan::Nothing => return,
            };
            match rest.as_bytes()[0] {
                b'(' | b'[' | b'{' => self.depth += 1,
                b')' | b']' | b'}' => self.depth -= 1,
                _ => {}
            }
            let kind = if kind == Kind::Newline && self.depth > 0 { Kind::Other } else { kind };
            at = start + length;
            out.token(kind, from, at, line);
        }
    }
}

/// Quotes that the rest of the line does not close. A failed search is not repeated: every later
/// quote of this kind is escaped, and a search from it fails as well.
#[derive(Default)]
struct Unclosed {
    single: bool,
    double: bool,
}

/// Next element of a line.
enum Scan {
    /// A token and its length in bytes.
    Token(Kind, usize),
    /// A character that begins no token, and its length in bytes.
    Unknown(usize),
    /// A string that does not end on this line.
    Open { closer: &'static str, single: bool },
    /// A backslash at the end of the line.
    Continued,
    /// The end of the text.
    Nothing,
}

fn scan(rest: &str, unclosed: &mut Unclosed) -> Scan {
    let Some(first) = rest.chars().next() else { return Scan::Nothing };
    match rest {
        "\\\n" | "\\\r\n" => return Scan::Continued,
        "\n" | "\r\n" => return Scan::Token(Kind::Newline, rest.len()),
        _ if first == '#' => return Scan::Token(Kind::Comment, rest.find(['\r', '\n']).unwrap_or(rest.len())),
        _ => {}
    }
    if let Some(string) = scan_string(rest, unclosed) {
        return string;
    }
    if let Some(word) = WORD.find(rest) {
        return Scan::Token(Kind::Other, word.end());
    }
    if rest.starts_with("!=") || "%&()*+,-./:;<=>@[]^{|}~".contains(first) {
        return Scan::Token(Kind::Other, if first == '!' { 2 } else { 1 });
    }
    Scan::Unknown(first.len_utf8())
}

/// Reads a string, if one begins here and ends on this line or may continue on the next.
fn scan_string(rest: &str, unclosed: &mut Unclosed) -> Option<Scan> {
    let prefix = rest.bytes().take(3).take_while(u8::is_ascii_alphabetic).count();
    if !["", "b", "r", "u", "f", "br", "rb", "fr", "rf"].contains(&rest[..prefix].to_ascii_lowercase().as_str()) {
        return None;
    }
    let quoted = &rest[prefix..];
    for closer in ["\'\'\'", "\"\"\""] {
        if let Some(inside) = quoted.strip_prefix(closer) {
            return Some(match end_of_python_quote(inside, closer) {
                Some(length) => Scan::Token(Kind::String, prefix + 3 + length),
                None => Scan::Open { closer, single: false },
            });
        }
    }
    let (closer, unclosed) = match quoted.bytes().next()? {
        b'\'' => ("\'", &mut unclosed.single),
        b'"' => ("\"", &mut unclosed.double),
        _ => return None,
    };
    if *unclosed {
        return None;
    }
    match end_of_python_quote(&quoted[1..], closer) {
        Some(length) => Some(Scan::Token(Kind::String, prefix + 1 + length)),
        None if ends_in_escaped_newline(&quoted[1..]) => Some(Scan::Open { closer, single: true }),
        None => {
            *unclosed = true;
            None
        }
    }
}

/// Index of the byte after the first unescaped `closer`. A backslash does not escape a line end:
/// such a line has no closer.
fn end_of_python_quote(line: &str, closer: &str) -> Option<usize> {
    let bytes = line.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        match bytes[at] {
            b'\\' if bytes.get(at + 1) == Some(&b'\n') => return None,
            b'\\' => at += 2,
            _ if bytes[at..].starts_with(closer.as_bytes()) => return Some(at + closer.len()),
            _ => at += 1,
        }
    }
    None
}

/// Returns true if an unescaped backslash precedes the line end.
fn ends_in_escaped_newline(line: &str) -> bool {
    let Some(before) = line.strip_suffix("\r\n").or_else(|| line.strip_suffix('\n')) else { return false };
    let backslashes = before.bytes().rev().take_while(|&b| b == b'\\').count();
    backslashes % 2 == 1
}

/// Column (tabs advance to multiples of 8, a form feed resets to 0) and byte length of the leading
/// white space.
fn indent(line: &str) -> (usize, usize) {
    let (mut column, mut width) = (0, 0);
    for byte in line.bytes() {
        match byte {
            b' ' => column += 1,
            b'\t' => column = (column / TAB + 1) * TAB,
            b'\x0c' => column = 0,
            _ => break,
        }
        width += 1;
    }
    (column, width)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_go_and_quotes_stay() {
        for (code, wanted) in [
            ("a; // b\nc;", "a;  \nc;"),
            ("a /* b\n */ c /**/ d", "a   c   d"),
            ("\"//\" + '/*' + \"\\\"//\" // x", "\"//\" + '/*' + \"\\\"//\"  "),
            ("it's // open", "it's  "),
            ("/* open // é", "/* open  "),
            ("'\\", "'\\"),
            ("\"a\nb\" // c", "\"a\nb\"  "),
        ] {
            assert_eq!(without_c_like_comments(code), wanted, "{code}");
        }
    }
}
