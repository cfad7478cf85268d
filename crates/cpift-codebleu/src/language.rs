//! The supported languages: names, grammars and keywords.

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
}
