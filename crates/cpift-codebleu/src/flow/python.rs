//! Data flow of Python.

use tree_sitter::Node;

use super::{Flow, Relation, children, tokens};

impl Flow<'_> {
    /// Walks `node`.
    pub fn python(&mut self, node: Node) -> Option<()> {
        self.spend(1)?;
        if tokens::is_token(node) {
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
                    // With an else, that is the last part, and the package walks neither.
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
                // A comprehension's element stands before the clause that sets its variables.
                let (clauses, others): (Vec<Node>, Vec<Node>) =
                    children(node).into_iter().partition(|part| part.kind() == "for_in_clause");
                clauses.into_iter().chain(others).try_for_each(|part| self.python(part))
            }
        }
    }

    /// An assignment, part by part where both sides have as many.
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

    /// One edge to each target, from all values together.
    fn gather(&mut self, target: Node, value: Node) -> Option<()> {
        let (targets, values) = (self.variables(target)?, self.variables(value)?);
        for target in targets {
            self.edge(target, Relation::ComputedFrom, &values)?;
            self.set(target);
        }
        Some(())
    }

    /// Each `elif` and `else` is walked from the state before the statement.
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
