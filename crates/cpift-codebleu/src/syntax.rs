//! The syntax match: the subtrees of the reference that occur in the candidate.
//!
//! Two subtrees are equal if tree-sitter prints the same s-expression for them: kinds and field
//! names of the named nodes, no text. Printing every subtree takes quadratic time (and overflows
//! the C stack on deep trees). Instead each distinct s-expression gets a number derived from the
//! numbers of its children, bottom-up, in one pass without recursion.

use std::collections::{HashMap, HashSet};

use tree_sitter::Node;

/// Returns (subtrees of `reference` that occur in `candidate`, subtrees of `reference`). The root
/// and every node with children are subtrees.
pub(crate) fn matches(reference: Node, candidate: Node) -> (u64, u64) {
    let mut forms = Forms::default();
    let candidate: HashSet<u32> = forms.subtrees(candidate).into_iter().collect();
    let reference = forms.subtrees(reference);
    (reference.iter().filter(|form| candidate.contains(form)).count() as u64, reference.len() as u64)
}

/// The printed children of a node: field name and number of the s-expression.
type Printed = Vec<(Option<&'static str>, u32)>;

/// Numbers of the distinct s-expressions seen so far.
#[derive(Default)]
struct Forms {
    numbers: HashMap<(String, Printed), u32>,
}

/// A node whose children are being visited.
struct Open<'tree> {
    node: Node<'tree>,
    field: Option<&'static str>,
    printed: Printed,
    /// True if a child has an error.
    error_below: bool,
}

impl<'tree> Open<'tree> {
    fn new(node: Node<'tree>, field: Option<&'static str>) -> Self {
        Self { node, field, printed: Vec::new(), error_below: false }
    }
}

impl Forms {
    /// Numbers of the s-expressions of all subtrees under `root`.
    fn subtrees(&mut self, root: Node) -> Vec<u32> {
        let mut subtrees = Vec::new();
        let mut cursor = root.walk();
        let mut open = vec![Open::new(root, None)];
        loop {
            if cursor.goto_first_child() {
                open.push(Open::new(cursor.node(), cursor.field_name()));
                continue;
            }
            loop {
                let closed = open.pop().expect("the cursor is inside an open node");
                let form = self.number(&closed);
                if open.is_empty() || closed.node.child_count() > 0 {
                    subtrees.push(form);
                }
                let Some(parent) = open.last_mut() else { return subtrees };
                parent.error_below |= closed.node.has_error();
                if closed.node.is_named() || closed.node.is_missing() {
                    parent.printed.push((closed.field, form));
                } else {
                    // Punctuation and keywords are not printed, but their children are.
                    let inside = closed.printed.into_iter().map(|(field, form)| (field.or(closed.field), form));
                    parent.printed.extend(inside);
                }
                if cursor.goto_next_sibling() {
                    open.push(Open::new(cursor.node(), cursor.field_name()));
                    break;
                }
                cursor.goto_parent();
            }
        }
    }

    fn number(&mut self, open: &Open) -> u32 {
        let node = open.node;
        // tree-sitter prints leaves: they may be missing, or errors that hold the unexpected
        // character. A node whose children are all unprinted looks like a leaf of its kind.
        let mut head = match (node.child_count(), node.is_named()) {
            (0, _) => node.to_sexp(),
            (_, true) => format!("({})", node.kind()),
            (_, false) => format!("{:?}", node.kind()),
        };
        // An error without an erroneous child is a hidden missing token that is printed all the
        // same, such as the end of an `#include`.
        if node.has_error() && !node.is_error() && !open.error_below && node.child_count() > 0 {
            head.push_str("MISSING");
        }
        let next = self.numbers.len() as u32;
        *self.numbers.entry((head, open.printed.clone())).or_insert(next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::language::Language;

    fn printed_subtrees(root: Node) -> Vec<String> {
        let (mut stack, mut out) = (vec![root], Vec::new());
        while let Some(node) = stack.pop() {
            out.push(node.to_sexp());
            let mut cursor = node.walk();
            stack.extend(node.children(&mut cursor).filter(|child| child.child_count() > 0));
        }
        out
    }

    /// Numbers form the same equality classes as the s-expressions, whatever the order of the
    /// nodes.
    #[test]
    fn forms_are_equal_exactly_where_the_printed_trees_are() {
        for (language, code) in [
            (
                Language::Python,
                "def f(a, b=1, *c):\n    for x in a:\n        if x not in b: yield f(x)[1:]\n    return not a is not b\n",
            ),
            (Language::Python, "x = (1 + \ny = ]  @ 3 $ 'a\nclass"),
            (
                Language::Java,
                "class A<T> { int[] f(T a) throws E { for (var x : a) { if (x != null) g(x); } return new int[]{1}; } ",
            ),
            (
                Language::JavaScript,
                "const {a, ...b} = await f(`x${y}`); class A extends B { static #p = 1; get q() { return <p a={1}/>; } } ,,",
            ),
            (
                Language::C,
                "#include <a.h>\nstruct s { int x[3]; } *p; int main(void) { return p->x[0] ? sizeof(int) : 'a'; @",
            ),
            (
                Language::Cpp,
                "template<class T> auto f(T&& t) noexcept -> decltype(t) { return [=](auto x){ return x <=> 1; }(t); } )",
            ),
        ] {
            let tree = language.tree(code);
            let mut forms = Forms::default();
            let numbers = forms.subtrees(tree.root_node());
            let printed = printed_subtrees(tree.root_node());
            let mut by_number: Vec<usize> = counted(&numbers);
            let mut by_text: Vec<usize> = counted(&printed);
            by_number.sort_unstable();
            by_text.sort_unstable();
            assert_eq!(by_number, by_text, "{code}");
        }
    }

    fn counted<T: std::hash::Hash + Eq>(items: &[T]) -> Vec<usize> {
        let mut counts: HashMap<&T, usize> = HashMap::new();
        items.iter().for_each(|item| *counts.entry(item).or_default() += 1);
        counts.into_values().collect()
    }
}
