//! The tokens of a syntax tree, numbered, with the text that the data flow compares.

use std::collections::HashMap;

use tree_sitter::{Node, Point};

/// A token: its index in source order and the number of its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Token {
    pub(crate) index: u32,
    pub(crate) name: u32,
}

/// The tokens by their byte range.
pub(crate) struct Tokens<'a> {
    by_range: HashMap<(usize, usize), Token>,
    names: HashMap<String, u32>,
    lines: Vec<Line<'a>>,
}

/// A line of the code.
struct Line<'a> {
    text: &'a str,
    /// Byte index of each character and of the end; empty for ASCII text.
    starts: Vec<usize>,
}

/// Returns true if `node` is one token: it has no children, or is a string, whose parts are
/// ignored. Comments are not tokens.
pub(crate) fn is_token(node: Node) -> bool {
    let whole = node.child_count() == 0 || matches!(node.kind(), "string_literal" | "string" | "character_literal");
    whole && node.kind() != "comment"
}

impl<'a> Tokens<'a> {
    /// Collects the tokens under `root`, or returns `None` if the tree is deeper than `max_depth`.
    pub(crate) fn new(root: Node, code: &'a str, max_depth: usize) -> Option<Self> {
        let lines = code.split('\n').map(Line::new).collect();
        let mut tokens = Self { by_range: HashMap::new(), names: HashMap::new(), lines };
        let mut cursor = root.walk();
        let mut depth = 1;
        let mut index = 0;
        loop {
            let node = cursor.node();
            if is_token(node) {
                tokens.add(node, index);
                index += 1;
            } else if cursor.goto_first_child() {
                depth += 1;
                if depth > max_depth {
                    return None;
                }
                continue;
            }
            while !cursor.goto_next_sibling() {
                if !cursor.goto_parent() {
                    return Some(tokens);
                }
                depth -= 1;
            }
        }
    }

    fn add(&mut self, node: Node, index: u32) {
        let text = self.text(node.start_position(), node.end_position());
        let next = self.names.len() as u32;
        let name = *self.names.entry(text).or_insert(next);
        // Of several zero-width tokens at one position the last one counts.
        self.by_range.insert((node.start_byte(), node.end_byte()), Token { index, name });
    }

    /// The text between two positions, without line ends. The grammar's columns are bytes but are
    /// read as characters, as in the PyPI package: in lines with non-ASCII characters the text is
    /// shifted to the right.
    fn text(&self, start: Point, end: Point) -> String {
        let line =
            |row: usize, from: usize, to: usize| self.lines.get(row).map_or("", |line| line.characters(from, to));
        if start.row == end.row {
            return line(start.row, start.column, end.column).to_owned();
        }
        let mut text = line(start.row, start.column, usize::MAX).to_owned();
        (start.row + 1..end.row).for_each(|row| text.push_str(line(row, 0, usize::MAX)));
        text.push_str(line(end.row, 0, end.column));
        text
    }

    /// The token with the byte range of `node`.
    pub(crate) fn of(&self, node: Node) -> Option<Token> {
        self.by_range.get(&(node.start_byte(), node.end_byte())).copied()
    }

    /// Returns true if the grammar fixes the token's text, as for keywords and punctuation.
    pub(crate) fn is_fixed(&self, node: Node, token: Token) -> bool {
        self.names.get(node.kind()) == Some(&token.name)
    }
}

impl<'a> Line<'a> {
    fn new(text: &'a str) -> Self {
        let starts = if text.is_ascii() {
            Vec::new()
        } else {
            text.char_indices().map(|(at, _)| at).chain([text.len()]).collect()
        };
        Self { text, starts }
    }

    /// The characters `from..to`, clipped to the line.
    fn characters(&self, from: usize, to: usize) -> &'a str {
        let byte = |character: usize| match self.starts.is_empty() {
            true => character.min(self.text.len()),
            false => self.starts[character.min(self.starts.len() - 1)],
        };
        &self.text[byte(from)..byte(to.max(from))]
    }
}
