//! The data-flow match: edges from the occurrences of a variable to the occurrences its value comes
//! from. An occurrence is a token of the syntax tree, numbered, with its text.
//!
//! One walk over the tree tracks, per name, the occurrences at which its value may have been set,
//! and adds an edge per use. Loop bodies are walked twice; branches are walked separately and
//! joined. Variables are then numbered by first occurrence, so consistent renaming does not change
//! the result.
//!
//! The rules and their limits are those of the PyPI package: if the tree lacks a part that a rule
//! needs (after a syntax error, for example), the whole text has no data flow. The walk is bounded
//! because its cost is exponential in the nesting of loops: beyond [`MAX_STEPS`] or [`MAX_DEPTH`] a
//! text has no data flow (in the package, Python's recursion limit does this at a depth just under
//! 1,000).

use std::collections::{HashMap, HashSet};

use tree_sitter::{Node, Point};

use crate::language::Language;

/// Maximum depth of a tree.
const MAX_DEPTH: usize = 900;
/// Maximum steps of a walk: nodes, variables copied at branches, and parents of edges.
const MAX_STEPS: usize = 2_000_000;

/// Origin of a variable's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Relation {
    /// The value itself: a use, or a declaration with its value.
    ComesFrom,
    /// An assignment.
    ComputedFrom,
}

/// An occurrence of a variable and the occurrences its value comes from. Names and occurrences are
/// numbers.
#[derive(Debug, Clone)]
struct Edge {
    name: u32,
    index: u32,
    relation: Relation,
    parents: Vec<u32>,
    parent_indexes: Vec<u32>,
}

/// An edge whose variables are numbered by first occurrence.
pub(crate) type NormalEdge = (u32, Relation, Vec<u32>);

/// The occurrences that the value of each name may come from.
type States = HashMap<u32, Vec<u32>>;

/// Returns (edges of `reference` that occur in `candidate`, edges of `reference`), counted with
/// multiplicity.
pub(crate) fn matches(reference: &[NormalEdge], candidate: &[NormalEdge]) -> (u64, u64) {
    let mut left: HashMap<&NormalEdge, u64> = HashMap::new();
    candidate.iter().for_each(|edge| *left.entry(edge).or_default() += 1);
    let matched = reference.iter().filter(|edge| match left.get_mut(edge) {
        Some(count) if *count > 0 => {
            *count -= 1;
            true
        }
        _ => false,
    });
    (matched.count() as u64, reference.len() as u64)
}

/// The data flow of `code`, whose syntax tree is `root`.
pub(crate) fn normalised(language: Language, root: Node, code: &str) -> Vec<NormalEdge> {
    normalise(&connected(edges(language, root, code).unwrap_or_default()))
}

fn edges(language: Language, root: Node, code: &str) -> Option<Vec<Edge>> {
    let tokens = Tokens::new(root, code, MAX_DEPTH)?;
    let mut flow = Flow { tokens, states: States::new(), edges: Vec::new(), steps_left: MAX_STEPS };
    match language {
        Language::Python => flow.python(root)?,
        Language::Java => flow.c_like(root, &JAVA)?,
        Language::JavaScript => flow.c_like(root, &JAVASCRIPT)?,
        Language::C | Language::Cpp => flow.c_like(root, &C)?,
    }
    Some(flow.edges)
}

/// The edges in source order, one per occurrence, without occurrences that have no flow in or out.
fn connected(mut edges: Vec<Edge>) -> Vec<Edge> {
    edges.sort_by_key(|edge| edge.index);
    let into = edges.iter().filter(|edge| !edge.parent_indexes.is_empty()).map(|edge| edge.index);
    let out_of = edges.iter().flat_map(|edge| edge.parent_indexes.iter().copied());
    let used: HashSet<u32> = into.chain(out_of).collect();
    edges.retain(|edge| used.contains(&edge.index));
    joined(edges, |edge| edge.index)
}

/// Merges the edges of each key: the parents of all of them, the name and relation of the last.
fn joined<K: std::hash::Hash + Eq>(edges: Vec<Edge>, key: impl Fn(&Edge) -> K) -> Vec<Edge> {
    let mut places: HashMap<K, usize> = HashMap::new();
    let mut out: Vec<(Edge, bool)> = Vec::new();
    for edge in edges {
        match places.entry(key(&edge)) {
            std::collections::hash_map::Entry::Vacant(place) => {
                place.insert(out.len());
                out.push((edge, false));
            }
            std::collections::hash_map::Entry::Occupied(place) => {
                let (first, repeated) = &mut out[*place.get()];
                (first.name, first.relation, *repeated) = (edge.name, edge.relation, true);
                first.parents.extend(edge.parents);
                first.parent_indexes.extend(edge.parent_indexes);
            }
        }
    }
    let distinct = |(mut edge, repeated): (Edge, bool)| {
        // Repeated parents within one edge are kept (`x = a + a` has `a` twice); repeats from
        // merging are dropped.
        if repeated {
            let mut seen = HashSet::new();
            edge.parents.retain(|&name| seen.insert(name));
            sort_distinct(&mut edge.parent_indexes);
        }
        edge
    };
    out.into_iter().map(distinct).collect()
}

fn sort_distinct(indexes: &mut Vec<u32>) {
    indexes.sort_unstable();
    indexes.dedup();
}

fn normalise(edges: &[Edge]) -> Vec<NormalEdge> {
    let mut numbers: HashMap<u32, u32> = HashMap::new();
    let mut number = |name: u32| {
        let next = numbers.len() as u32;
        *numbers.entry(name).or_insert(next)
    };
    let mut normal = |edge: &Edge| {
        let parents = edge.parents.iter().map(|&name| number(name)).collect();
        (number(edge.name), edge.relation, parents)
    };
    edges.iter().map(&mut normal).collect()
}

/// State of a walk. Methods return `None` if the text has no data flow.
struct Flow<'a> {
    tokens: Tokens<'a>,
    states: States,
    edges: Vec<Edge>,
    steps_left: usize,
}

impl Flow<'_> {
    fn spend(&mut self, steps: usize) -> Option<()> {
        self.steps_left = self.steps_left.checked_sub(steps)?;
        Some(())
    }

    fn edge(&mut self, token: Token, relation: Relation, parents: &[Token]) -> Option<()> {
        self.spend(1 + parents.len())?;
        let (names, indexes) = parents.iter().map(|parent| (parent.name, parent.index)).unzip();
        self.edges.push(Edge {
            name: token.name,
            index: token.index,
            relation,
            parents: names,
            parent_indexes: indexes,
        });
        Some(())
    }

    /// The variables under `node`: its tokens other than keywords and punctuation.
    fn variables(&mut self, node: Node) -> Option<Vec<Token>> {
        let (mut stack, mut out) = (vec![node], Vec::new());
        while let Some(node) = stack.pop() {
            self.spend(1)?;
            if is_token(node) {
                let token = self.tokens.of(node)?;
                if !self.tokens.is_fixed(node, token) {
                    out.push(token);
                }
            } else {
                stack.extend(children(node).into_iter().rev());
            }
        }
        Some(out)
    }

    /// Adds the use of a single token: its value comes from the occurrences that set its name.
    fn occurrence(&mut self, node: Node) -> Option<()> {
        let token = self.tokens.of(node)?;
        if self.tokens.is_fixed(node, token) {
            return Some(());
        }
        if let Some(set) = self.states.get(&token.name).cloned() {
            self.spend(set.len())?;
            self.edges.push(Edge {
                name: token.name,
                index: token.index,
                relation: Relation::ComesFrom,
                parents: vec![token.name],
                parent_indexes: set,
            });
            return Some(());
        }
        if node.kind() == "identifier" {
            self.set(token);
        }
        self.edge(token, Relation::ComesFrom, &[])
    }

    fn set(&mut self, token: Token) {
        self.states.insert(token.name, vec![token.index]);
    }

    /// Adds an edge from every value to every target, and sets the targets.
    fn pairs(&mut self, targets: &[Token], values: &[Token], relation: Relation) -> Option<()> {
        for &target in targets {
            for &value in values {
                self.edge(target, relation, &[value])?;
            }
            self.set(target);
        }
        Some(())
    }

    /// Adds a declaration without a value.
    fn declare(&mut self, name: Node) -> Option<()> {
        for target in self.variables(name)? {
            self.edge(target, Relation::ComesFrom, &[])?;
            self.set(target);
        }
        Some(())
    }

    /// Merges edges that the two walks of a loop added twice, from edge `first` on.
    fn join_walks(&mut self, first: usize) -> Option<()> {
        let walks = self.edges.split_off(first);
        self.spend(walks.len())?;
        self.edges.extend(joined(walks, |edge| (edge.name, edge.index, edge.relation)));
        Some(())
    }

    /// A copy of the current states, to restore at the next branch.
    fn branch_off(&mut self) -> Option<States> {
        self.spend(self.states.values().map(|set| 1 + set.len()).sum())?;
        Some(self.states.clone())
    }

    /// Adds the occurrences set in other branches.
    fn join_branches(&mut self, others: Vec<States>) -> Option<()> {
        for (name, set) in others.into_iter().flatten() {
            self.spend(set.len())?;
            let all = self.states.entry(name).or_default();
            all.extend(set);
        }
        self.states.values_mut().for_each(sort_distinct);
        Some(())
    }
}

/// The rules of Python.
impl Flow<'_> {
    /// Walks `node`.
    fn python(&mut self, node: Node) -> Option<()> {
        self.spend(1)?;
        if is_token(node) {
            return self.occurrence(node);
        }
        let field = |name| node.child_by_field_name(name);
        match node.kind() {
            "default_parameter" => match field("value") {
                Some(value) => {
                    self.python(value)?;
                    let (targets, values) = (self.variables(field("name")?)?, self.variables(value)?);
                    self.pairs(&targets, &values, Relation::ComesFrom)
                }
                None => self.declare(field("name")?),
            },
            "assignment" | "augmented_assignment" => match field("right") {
                Some(right) => self.assign(field("left")?, right),
                None => Some(()),
            },
            "for_in_clause" => {
                let right = *children(node).last()?;
                self.python(right)?;
                self.gather(field("left")?, right)
            }
            "if_statement" => self.python_if(node),
            "for_statement" => {
                let first = self.edges.len();
                let last = *children(node).last()?;
                for _ in 0..2 {
                    self.assign(field("left")?, field("right")?)?;
                    // If there is an `else`, it is the last part, and the package walks neither it
                    // nor the body.
                    if last.kind() == "block" {
                        self.python(last)?;
                    }
                }
                self.join_walks(first)
            }
            "while_statement" => {
                let first = self.edges.len();
                for _ in 0..2 {
                    children(node).into_iter().try_for_each(|part| self.python(part))?;
                }
                self.join_walks(first)
            }
            _ => {
                // A comprehension's element precedes the clause that sets its variables.
                let (clauses, others): (Vec<Node>, Vec<Node>) =
                    children(node).into_iter().partition(|part| part.kind() == "for_in_clause");
                clauses.into_iter().chain(others).try_for_each(|part| self.python(part))
            }
        }
    }

    /// Adds an assignment, element by element if both sides have the same number.
    fn assign(&mut self, left: Node, right: Node) -> Option<()> {
        let parts = |node| children(node).into_iter().filter(|part| part.kind() != ",").collect::<Vec<Node>>();
        let (mut lefts, mut rights) = (parts(left), parts(right));
        self.spend(lefts.len() + rights.len())?;
        if lefts.len() != rights.len() || lefts.is_empty() {
            (lefts, rights) = (vec![left], vec![right]);
        }
        rights.iter().try_for_each(|&value| self.python(value))?;
        lefts.iter().zip(&rights).try_for_each(|(&target, &value)| self.gather(target, value))
    }

    /// Adds one edge per target, from all values together.
    fn gather(&mut self, target: Node, value: Node) -> Option<()> {
        let (targets, values) = (self.variables(target)?, self.variables(value)?);
        for target in targets {
            self.edge(target, Relation::ComputedFrom, &values)?;
            self.set(target);
        }
        Some(())
    }

    /// Walks each `elif` and `else` from the state before the statement.
    fn python_if(&mut self, node: Node) -> Option<()> {
        let before = self.branch_off()?;
        let (mut others, mut has_else) = (Vec::new(), false);
        for part in children(node) {
            has_else |= part.kind().contains("else");
            if !matches!(part.kind(), "elif_clause" | "else_clause") {
                self.python(part)?;
                continue;
            }
            self.spend(before.len())?;
            let then = std::mem::replace(&mut self.states, before.clone());
            self.python(part)?;
            others.push(std::mem::replace(&mut self.states, then));
        }
        if !has_else {
            others.push(before);
        }
        self.join_branches(others)
    }
}

/// Node kinds that the rules of a C-like language apply to.
struct Rules {
    /// Declaration with fields `name` and, optionally, `value`.
    declarator: &'static str,
    /// Assignments with fields `left` and `right`.
    assignments: &'static [&'static str],
    /// Increment or decrement.
    update: &'static str,
    /// Loop over a collection with fields `name`, `value` and `body`.
    for_each: &'static str,
    /// Part of a `for` before those that are walked twice.
    for_header: &'static str,
    /// True if values set before an `if` with an `else` may survive it.
    before_survives_else: bool,
}

const JAVA: Rules = Rules {
    declarator: "variable_declarator",
    assignments: &["assignment_expression"],
    update: "update_expression",
    for_each: "enhanced_for_statement",
    for_header: "local_variable_declaration",
    before_survives_else: false,
};

/// The package does not treat plain JavaScript assignments as assignments.
const JAVASCRIPT: Rules = Rules {
    assignments: &["assignment_pattern", "augmented_assignment_expression"],
    for_each: NONE,
    for_header: "variable_declaration",
    before_survives_else: true,
    ..JAVA
};

/// C and C++. The package applies its C# rules; these are the node kinds that also exist in the C
/// and C++ grammars.
const C: Rules = Rules {
    declarator: NONE,
    assignments: &["assignment_expression"],
    update: NONE,
    for_each: NONE,
    for_header: NONE,
    before_survives_else: false,
};

/// Matches no node kind.
const NONE: &str = "";

/// The rules of Java, JavaScript, C and C++.
impl Flow<'_> {
    /// Walks `node`.
    fn c_like(&mut self, node: Node, rules: &Rules) -> Option<()> {
        self.spend(1)?;
        if is_token(node) {
            return self.occurrence(node);
        }
        let field = |name| node.child_by_field_name(name);
        match node.kind() {
            kind if kind == rules.declarator => match field("value") {
                Some(value) => self.bind(field("name")?, value, Relation::ComesFrom, rules),
                None => self.declare(field("name")?),
            },
            kind if rules.assignments.contains(&kind) => {
                self.bind(field("left")?, field("right")?, Relation::ComputedFrom, rules)
            }
            kind if kind == rules.update => {
                let variables = self.variables(node)?;
                self.pairs(&variables, &variables, Relation::ComputedFrom)
            }
            "if_statement" => self.c_like_if(node, rules),
            "for_statement" => {
                let first = self.edges.len();
                let parts = children(node);
                self.c_like_all(&parts, rules)?;
                let again = parts.iter().position(|part| part.kind() == rules.for_header);
                self.c_like_all(&parts[again.map_or(parts.len(), |header| header + 1)..], rules)?;
                self.join_walks(first)
            }
            "while_statement" => {
                let first = self.edges.len();
                let parts = children(node);
                self.c_like_all(&parts, rules)?;
                self.c_like_all(&parts, rules)?;
                self.join_walks(first)
            }
            kind if kind == rules.for_each => {
                let first = self.edges.len();
                for _ in 0..2 {
                    self.bind(field("name")?, field("value")?, Relation::ComputedFrom, rules)?;
                    self.c_like(field("body")?, rules)?;
                }
                self.join_walks(first)
            }
            _ => self.c_like_all(&children(node), rules),
        }
    }

    fn c_like_all(&mut self, nodes: &[Node], rules: &Rules) -> Option<()> {
        nodes.iter().try_for_each(|&node| self.c_like(node, rules))
    }

    fn bind(&mut self, target: Node, value: Node, relation: Relation, rules: &Rules) -> Option<()> {
        self.c_like(value, rules)?;
        let (targets, values) = (self.variables(target)?, self.variables(value)?);
        self.pairs(&targets, &values, relation)
    }

    /// Walks every part from `else` (or a chained `if`) on from the state before the statement.
    fn c_like_if(&mut self, node: Node, rules: &Rules) -> Option<()> {
        let parts = children(node);
        let alternative = |part: &&Node| matches!(part.kind(), "if_statement" | "else");
        let first = parts.iter().take_while(|part| !alternative(part)).count();
        let before = self.branch_off()?;
        self.c_like_all(&parts[..first], rules)?;
        let mut others = Vec::new();
        for &part in &parts[first..] {
            self.spend(before.len())?;
            let then = std::mem::replace(&mut self.states, before.clone());
            self.c_like(part, rules)?;
            others.push(std::mem::replace(&mut self.states, then));
        }
        if rules.before_survives_else || !parts.iter().any(|part| part.kind().contains("else")) {
            others.push(before);
        }
        self.join_branches(others)
    }
}

fn children(node: Node) -> Vec<Node> {
    let mut cursor = node.walk();
    node.children(&mut cursor).collect()
}

/// A token: its index in source order and the number of its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Token {
    index: u32,
    name: u32,
}

/// The tokens by their byte range.
struct Tokens<'a> {
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
fn is_token(node: Node) -> bool {
    let whole = node.child_count() == 0 || matches!(node.kind(), "string_literal" | "string" | "character_literal");
    whole && node.kind() != "comment"
}

impl<'a> Tokens<'a> {
    /// Collects the tokens under `root`, or returns `None` if the tree is deeper than `max_depth`.
    fn new(root: Node, code: &'a str, max_depth: usize) -> Option<Self> {
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
    fn of(&self, node: Node) -> Option<Token> {
        self.by_range.get(&(node.start_byte(), node.end_byte())).copied()
    }

    /// Returns true if the grammar fixes the token's text, as for keywords and punctuation.
    fn is_fixed(&self, node: Node, token: Token) -> bool {
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
