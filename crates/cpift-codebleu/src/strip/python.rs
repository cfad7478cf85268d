//! Comments and docstrings of Python, by the rules of the standard library's tokenizer (3.11 and older, the one in pure Python).

use std::sync::LazyLock;

use regex::Regex;

/// Numbers and names: where one ends matters, because a string's prefix may follow a number, and never a name.
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
    /// All that plays no part here.
    Other,
}

/// `source` without comments and docstrings; `None` where the tokenizer would raise an error.
///
/// A docstring is what the package takes for one: a string that is first after an indent or a new line, or that starts a line.
pub fn without_comments(source: &str) -> Option<String> {
    let mut out = Output { source, text: String::with_capacity(source.len()), previous: Kind::Indent, end: 0 };
    Tokenizer::new(source).run(&mut out)?;
    Some(out.text)
}

struct Output<'a> {
    source: &'a str,
    text: String,
    previous: Kind,
    /// The byte after the last token.
    end: usize,
}

impl Output<'_> {
    /// Takes the token of the bytes `start..end` in a line that begins at `line`. Space before it becomes spaces, one for each column.
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

/// A string that goes on in the next line.
struct OpenString {
    start: usize,
    /// Where its first line starts.
    line: usize,
    closer: &'static str,
    /// Of one line each, joined by backslashes.
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

    /// What comes before the tokens of the line: the rest of a string, or the indent. Where the tokens start; `None` for a line without.
    fn line_start(&mut self, start: usize, end: usize, out: &mut Output) -> Option<Option<usize>> {
        let line = &self.source[start..end];
        if let Some(open) = self.open.take() {
            if let Some(length) = quote_end(line, open.closer) {
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
            // A dedent to a column that no line before had is an error.
            self.indents.contains(&column).then_some(())?;
            self.indents.pop();
            out.token(Kind::Other, first, first, start);
        }
        Some(Some(first))
    }

    /// The tokens from `at` to the end of the line.
    fn tokens(&mut self, mut at: usize, line: usize, end: usize, out: &mut Output) {
        let mut unclosed = Unclosed::default();
        while at < end {
            let start = at + self.source[at..end].bytes().take_while(|b| b" \t\x0c".contains(b)).count();
            let rest = &self.source[start..end];
            let (from, kind, length) = match scan(rest, &mut unclosed) {
                Scan::Token(kind, length) => (start, kind, length),
                // Space before it is a token then, and stays as it is.
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

/// Quotes that the rest of the line does not close, so that no search is made twice: after one in vain, every later quote of the kind is
/// an escaped one, from which a search fails as well.
#[derive(Default)]
struct Unclosed {
    single: bool,
    double: bool,
}

/// What a line goes on with.
enum Scan {
    /// A token of so many bytes.
    Token(Kind, usize),
    /// A character that begins no token.
    Unknown(usize),
    /// A string that this line does not end.
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

/// A string, if one begins here and the line ends it or may leave it open.
fn scan_string(rest: &str, unclosed: &mut Unclosed) -> Option<Scan> {
    let prefix = rest.bytes().take(3).take_while(u8::is_ascii_alphabetic).count();
    if !["", "b", "r", "u", "f", "br", "rb", "fr", "rf"].contains(&rest[..prefix].to_ascii_lowercase().as_str()) {
        return None;
    }
    let quoted = &rest[prefix..];
    for closer in ["\'\'\'", "\"\"\""] {
        if let Some(inside) = quoted.strip_prefix(closer) {
            return Some(match quote_end(inside, closer) {
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
    match quote_end(&quoted[1..], closer) {
        Some(length) => Some(Scan::Token(Kind::String, prefix + 1 + length)),
        None if ends_in_escaped_newline(&quoted[1..]) => Some(Scan::Open { closer, single: true }),
        None => {
            *unclosed = true;
            None
        }
    }
}

/// The byte after the first `closer` that is not escaped. A backslash escapes no end of line: a line that ends so has no closer.
fn quote_end(line: &str, closer: &str) -> Option<usize> {
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

/// Whether the text runs into a backslash at the end of its line.
fn ends_in_escaped_newline(line: &str) -> bool {
    let Some(before) = line.strip_suffix("\r\n").or_else(|| line.strip_suffix('\n')) else { return false };
    let backslashes = before.bytes().rev().take_while(|&b| b == b'\\').count();
    backslashes % 2 == 1
}

/// Column (tabs go to multiples of 8, a form feed to 0) and bytes of the space that a line begins with.
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
