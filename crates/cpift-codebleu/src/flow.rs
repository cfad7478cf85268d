//! The data-flow match: for each variable, which earlier ones its value comes from.
//!
//! One walk over the tree keeps, for every name, the places that its value may have been set, and notes an edge for each use. Bodies of
//! loops are walked twice, branches apart and joined. Edges are then numbered by variable in the order of first occurrence, so that
//! consistent renaming changes nothing.
//!
//! The rules are those of the PyPI package, as are their limits: where a tree lacks a part that a rule asks for (after a syntax error,
//! say), the whole text has no data flow. The walk is bounded, because it is exponential in the nesting of loops: beyond [`MAX_STEPS`]
//! or [`MAX_DEPTH`] a text has no data flow either (for the package, Python's recursion limit does this at a depth just under 1,000).

mod c_like;
mod python;
mod tokens;

use std::collections::{HashMap, HashSet};

use tree_sitter::Node;

use crate::Language;
use tokens::{Token, Tokens};

/// The deepest tree that is walked.
const MAX_DEPTH: usize = 900;
/// The most steps of a walk: nodes, variables copied at branches, and edges' parents.
const MAX_STEPS: usize = 2_000_000;

/// How a value gets to a variable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Relation {
    /// As it is: a use, a declaration with its value.
    ComesFrom,
    /// By an assignment.
    ComputedFrom,
}

/// A variable's occurrence and where its value is from. Names and occurrences are numbers.
#[derive(Debug, Clone)]
struct Edge {
    name: u32,
    index: u32,
    relation: Relation,
    parents: Vec<u32>,
    parent_indexes: Vec<u32>,
}

/// An edge with its variables numbered by first occurrence.
pub type NormalEdge = (u32, Relation, Vec<u32>);

/// For each name, the occurrences its value may come from.
type States = HashMap<u32, Vec<u32>>;

/// (edges of `reference` that occur in `candidate`, edges of `reference`), each as often as it is there.
pub fn matches(reference: &[NormalEdge], candidate: &[NormalEdge]) -> (u64, u64) {
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

/// The data flow of `code`, whose tree has `root`.
pub fn normalised(language: Language, root: Node, code: &str) -> Vec<NormalEdge> {
    normalise(&connected(edges(language, root, code).unwrap_or_default()))
}

fn edges(language: Language, root: Node, code: &str) -> Option<Vec<Edge>> {
    let tokens = Tokens::new(root, code, MAX_DEPTH)?;
    let mut flow = Flow { tokens, states: States::new(), edges: Vec::new(), steps_left: MAX_STEPS };
    match language {
        Language::Python => flow.python(root)?,
        Language::Java => flow.c_like(root, &c_like::JAVA)?,
        Language::JavaScript => flow.c_like(root, &c_like::JAVASCRIPT)?,
        Language::C | Language::Cpp => flow.c_like(root, &c_like::C)?,
    }
    Some(flow.edges)
}

/// The edges in the order of the code, without occurrences that nothing flows into or out of, one an occurrence.
fn connected(mut edges: Vec<Edge>) -> Vec<Edge> {
    edges.sort_by_key(|edge| edge.index);
    let into = edges.iter().filter(|edge| !edge.parent_indexes.is_empty()).map(|edge| edge.index);
    let out_of = edges.iter().flat_map(|edge| edge.parent_indexes.iter().copied());
    let used: HashSet<u32> = into.chain(out_of).collect();
    edges.retain(|edge| used.contains(&edge.index));
    joined(edges, |edge| edge.index)
}

/// One edge for each key, with the parents of all that have it; name and relation are the last one's.
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
        // Repetitions within a single edge stay, as `x = a + a` has a twice; those that joining makes go.
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

/// A walk under way. Its methods return `None` where the text turns out to have no data flow.
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

    /// The variables under `node`: all its tokens but keywords and punctuation.
    fn variables(&mut self, node: Node) -> Option<Vec<Token>> {
        let (mut stack, mut out) = (vec![node], Vec::new());
        while let Some(node) = stack.pop() {
            self.spend(1)?;
            if tokens::is_token(node) {
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

    /// A token on its own: it comes from where its name was set.
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

    /// An edge from every value to every target, which are set.
    fn pairs(&mut self, targets: &[Token], values: &[Token], relation: Relation) -> Option<()> {
        for &target in targets {
            for &value in values {
                self.edge(target, relation, &[value])?;
            }
            self.set(target);
        }
        Some(())
    }

    /// A declaration without a value.
    fn declare(&mut self, name: Node) -> Option<()> {
        for target in self.variables(name)? {
            self.edge(target, Relation::ComesFrom, &[])?;
            self.set(target);
        }
        Some(())
    }

    /// Joins what the walks of a loop noted more than once, from the edge `first` on.
    fn join_walks(&mut self, first: usize) -> Option<()> {
        let walks = self.edges.split_off(first);
        self.spend(walks.len())?;
        self.edges.extend(joined(walks, |edge| (edge.name, edge.index, edge.relation)));
        Some(())
    }

    /// The states now, to return to at another branch.
    fn branch_off(&mut self) -> Option<States> {
        self.spend(self.states.values().map(|set| 1 + set.len()).sum())?;
        Some(self.states.clone())
    }

    /// Adds what may have been set in other branches.
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

fn children(node: Node) -> Vec<Node> {
    let mut cursor = node.walk();
    node.children(&mut cursor).collect()
}
