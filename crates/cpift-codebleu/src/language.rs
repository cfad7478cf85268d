//! The supported languages: names, grammars and keywords, and the removal of comments and
//! docstrings before parsing, as the PyPI package does it.

use std::borrow::Cow;
use std::sync::LazyLock;

use regex::Regex;
use tree_sitter::{ParseOptions, ParseState, Parser, Tree};

/// Maximum length of a parsed text. Error recovery takes quadratic time in the worst case: seconds
/// at this length.
const MAX_BYTES: usize = 100_000;
/// Maximum progress callbacks of the parser per text, also a bound of seconds. Valid code needs
/// about one per 70 bytes.
const MAX_REPORTS: usize = 100_000;

/// A programming language supported by CodeBLEU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Language {
    /// Python 3.
    Python,
    /// Java.
    Java,
    /// JavaScript, with JSX.
    JavaScript,
    /// C.
    C,
    /// C++.
    Cpp,
}

impl Language {
    /// Every supported language.
    pub const ALL: [Self; 5] = [Self::Python, Self::Java, Self::JavaScript, Self::C, Self::Cpp];

    /// The language with this name in data sets or code fences, ignoring case: `python`, `py`,
    /// `C++`, `js`, …
    pub fn named(name: &str) -> Option<Self> {
        match name.trim().to_ascii_lowercase().as_str() {
            "python" | "py" | "python3" => Some(Self::Python),
            "java" => Some(Self::Java),
            "javascript" | "js" | "jsx" | "node" | "nodejs" => Some(Self::JavaScript),
            "c" | "h" => Some(Self::C),
            "cpp" | "c++" | "cc" | "cxx" | "hpp" => Some(Self::Cpp),
            _ => None,
        }
    }

    /// Name in the PyPI package codebleu.
    pub fn name(self) -> &'static str {
        match self {
            Self::Python => "python",
            Self::Java => "java",
            Self::JavaScript => "javascript",
            Self::C => "c",
            Self::Cpp => "cpp",
        }
    }

    /// Parses `code`; syntax errors become error nodes. Returns `None` for a text that is too long
    /// or takes too long.
    pub(crate) fn parse(self, code: &str) -> Option<Tree> {
        if code.len() > MAX_BYTES { None } else { self.parse_within(code, MAX_REPORTS) }
    }

    fn parse_within(self, code: &str, max_reports: usize) -> Option<Tree> {
        let grammar = match self {
            Self::Python => tree_sitter_python::LANGUAGE,
            Self::Java => tree_sitter_java::LANGUAGE,
            Self::JavaScript => tree_sitter_javascript::LANGUAGE,
            Self::C => tree_sitter_c::LANGUAGE,
            Self::Cpp => tree_sitter_cpp::LANGUAGE,
        };
        let mut parser = Parser::new();
        parser.set_language(&grammar.into()).expect("the pinned grammars fit this tree-sitter");
        let mut reports = 0;
        // Callbacks come after a fixed number of steps, so the limit does not depend on the
        // machine.
        let mut give_up = |_: &ParseState| {
            reports += 1;
            reports > max_reports
        };
        let options = ParseOptions::new().progress_callback(&mut give_up);
        parser.parse_with_options(&mut |at, _| &code.as_bytes()[at..], None, Some(options))
    }

    /// The syntax tree of `code`, or that of an empty text if parsing takes too long.
    pub(crate) fn tree(self, code: &str) -> Tree {
        self.parse(code).or_else(|| self.parse("")).expect("nothing is parsed at once")
    }

    pub(crate) fn is_keyword(self, token: &str) -> bool {
        self.keywords().contains(&token)
    }

    /// Tokens of weight 1, exactly those of the PyPI package: some are not keywords, and
    /// JavaScript's `true` is missing.
    #[rustfmt::skip]
    fn keywords(self) -> &'static [&'static str] {
        match self {
            Self::Python => &[
                "False", "None", "True", "and", "as", "assert", "async", "await", "break", "class", "continue", "def", "del",
                "elif", "else", "except", "finally", "for", "from", "global", "if", "import", "in", "is", "lambda",
                "nonlocal", "not", "or", "pass", "raise", "return", "try", "while", "with", "yield", "match", "case", "type",
            ],
            Self::Java => &[
                "abstract", "assert", "boolean", "break", "byte", "case", "catch", "char", "class", "const", "continue",
                "default", "do", "double", "else", "enum", "extends", "final", "finally", "float", "for", "goto", "if",
                "implements", "import", "instanceof", "int", "interface", "long", "native", "new", "package", "private",
                "protected", "public", "return", "short", "static", "strictfp", "super", "switch", "synchronized", "this",
                "throw", "throws", "transient", "try", "void", "volatile", "while",
            ],
            Self::JavaScript => &[
                "await", "break", "case", "catch", "class", "const", "continue", "debugger", "default", "delete", "do",
                "else", "enum", "export", "extends", "false", "finally", "for", "function", "if", "implements", "import",
                "in", "instanceof", "interface", "let", "new", "null", "package", "private", "protected", "public", "return",
                "super", "switch", "static", "this", "throw", "try", "True", "typeof", "var", "void", "while", "with",
                "yield",
            ],
            Self::C => &[
                "auto", "else", "long", "switch", "break", "enum", "register", "typedef", "case", "extern", "return",
                "union", "char", "float", "short", "unsigned", "const", "for", "signed", "void", "continue", "goto",
                "sizeof", "volatile", "default", "if", "static", "while", "do", "int", "struct", "_Packed", "double",
            ],
            Self::Cpp => &[
                "auto", "const", "double", "float", "int", "short", "struct", "unsigned", "break", "continue", "else", "for",
                "long", "signed", "switch", "void", "case", "default", "enum", "goto", "register", "sizeof", "typedef",
                "volatile", "char", "do", "extern", "if", "return", "static", "union", "while", "asm", "dynamic_cast",
                "namespace", "reinterpret_cast", "bool", "explicit", "new", "static_cast", "typeid", "catch", "false", "try",
                "operator", "template", "typename", "class", "friend", "private", "this", "using", "const_cast", "inline",
                "public", "throw", "virtual", "delete", "mutable", "protected", "true", "wchar_t", "and", "bitand", "compl",
                "not_eq", "or_eq", "xor_eq", "and_eq", "bitor", "not", "or", "xor", "cin", "endl", "INT_MIN", "iomanip",
                "main", "npos", "std", "cout", "include", "INT_MAX", "iostream", "MAX_RAND", "NULL", "string",
            ],
        }
    }
}

/// Returns `code` without comments (for Python, without docstrings as well) and without blank
/// lines.
pub(crate) fn without_comments(language: Language, code: &str) -> Cow<'_, str> {
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
    fn a_text_that_takes_too_long_is_given_up_and_good_code_of_its_length_is_not() {
        let slow = "if (a) { b = a; } else { c = b; }\n".repeat(200);
        assert!(Language::Python.parse(&slow).is_some());
        assert!(Language::Python.parse_within(&slow, 300).is_none());
        assert!(Language::C.parse_within(&slow, 300).is_some());
        let long = " ".repeat(MAX_BYTES + 1);
        assert!(Language::C.parse(&long).is_none());
        assert_eq!(Language::C.tree(&long).root_node().to_sexp(), "(translation_unit)");
    }

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
