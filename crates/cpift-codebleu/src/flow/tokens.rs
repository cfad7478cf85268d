//! The tokens of a tree, numbered, with their text as the data flow sees it.

use std::collections::HashMap;

use tree_sitter::{Node, Point};

/// A token: where it stands in the order of the code, and the number of its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Token {
    pub index: u32,
    pub name: u32,
}

/// The tokens by the bytes they cover.
pub struct Tokens<'a> {
    by_range: HashMap<(usize, usize), Token>,
    names: HashMap<String, u32>,
    lines: Vec<Line<'a>>,
}

/// A line of the code.
struct Line<'a> {
    text: &'a str,
    /// Where each character starts, and the end; empty where characters are bytes.
    starts: Vec<usize>,
}

/// Whether `node` is one token: it has no children, or is a string, whose parts do not count. Comments are none.
pub fn is_token(node: Node) -> bool {
    let whole = node.child_count() == 0 || matches!(node.kind(), "string_literal" | "string" | "character_literal");
    whole && node.kind() != "comment"
}

impl<'a> Tokens<'a> {
    /// The tokens under `root`; `None` where the tree is deeper than `max_depth`.
    pub fn new(root: Node, code: &'a str, max_depth: usize) -> Option<Self> {
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
        // Tokens of no width at one place are one: the last.
        self.by_range.insert((node.start_byte(), node.end_byte()), Token { index, name });
    }

    /// The text between two places, without the ends of lines. Columns are bytes to the grammar, but are taken for characters: the PyPI
    /// package does so, and in lines with other than ASCII the text moves to the right.
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

    /// The token that is `node`, if one is.
    pub fn of(&self, node: Node) -> Option<Token> {
        self.by_range.get(&(node.start_byte(), node.end_byte())).copied()
    }

    /// Whether the grammar fixes the token's text, as that of keywords and punctuation.
    pub fn is_fixed(&self, node: Node, token: Token) -> bool {
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

    /// The characters from `from` to before `to`, as far as there are any.
    fn characters(&self, from: usize, to: usize) -> &'a str {
        let byte = |character: usize| match self.starts.is_empty() {
            true => character.min(self.text.len()),
            false => self.starts[character.min(self.starts.len() - 1)],
        };
        &self.text[byte(from)..byte(to.max(from))]
    }
}
