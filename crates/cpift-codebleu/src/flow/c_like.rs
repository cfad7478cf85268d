//! Data flow of Java, JavaScript, C and C++.

use tree_sitter::Node;

use super::{Flow, Relation, children, tokens};

/// The node kinds that a language's rules are for.
pub struct Rules {
    /// `name` and perhaps `value`.
    declarator: &'static str,
    /// `left` and `right`.
    assignments: &'static [&'static str],
    /// An increment or decrement.
    update: &'static str,
    /// A loop over a collection: `name`, `value`, `body`.
    for_each: &'static str,
    /// What stands before the parts of a `for` that are walked again.
    for_header: &'static str,
    /// Whether what was set before an `if` may also hold after one with an else.
    before_survives_else: bool,
}

/// Java.
pub const JAVA: Rules = Rules {
    declarator: "variable_declarator",
    assignments: &["assignment_expression"],
    update: "update_expression",
    for_each: "enhanced_for_statement",
    for_header: "local_variable_declaration",
    before_survives_else: false,
};

/// JavaScript. Its plain assignments are no assignments to the package, and so not here.
pub const JAVASCRIPT: Rules = Rules {
    assignments: &["assignment_pattern", "augmented_assignment_expression"],
    for_each: NONE,
    for_header: "variable_declaration",
    before_survives_else: true,
    ..JAVA
};

/// C and C++. The package takes C#'s rules for them, of whose node kinds these are the ones their grammars have.
pub const C: Rules = Rules {
    declarator: NONE,
    assignments: &["assignment_expression"],
    update: NONE,
    for_each: NONE,
    for_header: NONE,
    before_survives_else: false,
};

/// No node's kind.
const NONE: &str = "";

impl Flow<'_> {
    /// Walks `node`.
    pub fn c_like(&mut self, node: Node, rules: &Rules) -> Option<()> {
        self.spend(1)?;
        if tokens::is_token(node) {
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

    /// From `else` (or a chained `if`) on, every part is walked from the state before the statement.
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
