//! A place in a recipe: its value and the path of keys to it, so that every error can say where it is.

use std::path::Path;

use anyhow::Result;
use cpift_core::BadInput;
use serde_json::{Map, Value};

/// A value in the file and how to get there.
#[derive(Clone)]
pub(super) struct Node<'a> {
    file: &'a Path,
    path: String,
    value: &'a Value,
}

/// A mapping whose keys are all known.
#[derive(Clone)]
pub(super) struct Fields<'a> {
    node: Node<'a>,
    map: &'a Map<String, Value>,
}

impl<'a> Node<'a> {
    /// The whole file.
    pub fn root(file: &'a Path, value: &'a Value) -> Self {
        Self { file, path: String::new(), value }
    }

    /// An error about this place.
    pub fn error(&self, message: &str) -> BadInput {
        let place = if self.path.is_empty() { "the recipe" } else { &self.path };
        BadInput::new(self.file, format!("{place}: {message}"))
    }

    fn unexpected<T>(&self, expected: &str) -> Result<T> {
        Err(self.error("has a value of another kind").expected(expected).found(self.shown()).into())
    }

    /// The value as JSON, cut to a length that fits a line.
    pub fn shown(&self) -> String {
        const LONGEST: usize = 60;
        let text = self.value.to_string();
        match text.char_indices().nth(LONGEST) {
            Some((end, _)) => format!("{}...", &text[..end]),
            None => text,
        }
    }

    pub fn is_list(&self) -> bool {
        self.value.is_array()
    }

    pub fn is_mapping(&self) -> bool {
        self.value.is_object()
    }

    pub fn text(&self) -> Result<&'a str> {
        match self.value.as_str() {
            Some(text) if !text.trim().is_empty() => Ok(text),
            _ => self.unexpected("text"),
        }
    }

    /// A finite number; one in quotes is taken too.
    pub fn number(&self) -> Result<f64> {
        let number = match self.value {
            Value::String(text) => text.trim().parse().ok(),
            value => value.as_f64(),
        };
        match number.filter(|n| n.is_finite()) {
            Some(number) => Ok(number),
            None => self.unexpected("a finite number"),
        }
    }

    pub fn count(&self) -> Result<usize> {
        match self.value.as_u64().and_then(|n| usize::try_from(n).ok()) {
            Some(count) => Ok(count),
            None => self.unexpected("a whole number, 0 or more"),
        }
    }

    /// True or false, in any of the ways YAML 1.1 and mergekit have to write it.
    pub fn flag(&self) -> Result<bool> {
        match self.value.to_string().trim_matches('"').to_ascii_lowercase().as_str() {
            "true" | "yes" | "on" | "1" | "1.0" => Ok(true),
            "false" | "no" | "off" | "0" | "0.0" => Ok(false),
            _ => self.unexpected("true or false"),
        }
    }

    /// The entries of a list that has at least one.
    pub fn entries(&self) -> Result<Vec<Self>> {
        let Some(list) = self.value.as_array().filter(|list| !list.is_empty()) else {
            return self.unexpected("a list with at least one entry");
        };
        let entry = |(i, value)| Self { path: format!("{}[{i}]", self.path), value, ..self.clone() };
        Ok(list.iter().enumerate().map(entry).collect())
    }

    /// A mapping with none but the `known` keys. `hint` may tell what is wrong with another.
    pub fn fields(&self, known: &[&str], hint: impl Fn(&str) -> Option<String>) -> Result<Fields<'a>> {
        let Some(map) = self.value.as_object() else {
            return self.unexpected(&format!("a mapping with {}", known.join(", ")));
        };
        let Some(key) = map.keys().find(|key| !known.contains(&key.as_str())) else {
            return Ok(Fields { node: self.clone(), map });
        };
        let (place, hint) = (self.child(key, &Value::Null), hint(key));
        let problem = if hint.is_some() { "is not supported here" } else { "is not a known key" };
        let hint = hint.or_else(|| closest(key, known).map(|near| format!("did you mean {near}?")));
        let known = if known.is_empty() { "no keys".to_owned() } else { known.join(", ") };
        let error = place.error(problem).expected(known).found(place.last_key(key));
        Err(match hint {
            Some(hint) => error.hint(hint),
            None => error,
        }
        .into())
    }

    fn last_key(&self, key: &str) -> String {
        Node { value: &Value::String(key.to_owned()), ..self.clone() }.shown()
    }

    fn child(&self, key: &str, value: &'a Value) -> Self {
        const LONGEST: usize = 100;
        let key: String = key.chars().take(LONGEST).collect();
        let path = if self.path.is_empty() { key } else { format!("{}.{key}", self.path) };
        Self { path, value, ..self.clone() }
    }
}

impl<'a> Fields<'a> {
    /// The value of `key`, where it is written and not null.
    pub fn get(&self, key: &str) -> Option<Node<'a>> {
        let value = self.map.get(key).filter(|value| !value.is_null())?;
        Some(self.node.child(key, value))
    }

    /// The value of `key`, which must be there.
    pub fn require(&self, key: &str) -> Result<Node<'a>> {
        let missing = || self.node.error("a key is missing").expected(key).into();
        self.get(key).ok_or_else(missing)
    }

    /// The mapping itself.
    pub fn node(&self) -> &Node<'a> {
        &self.node
    }
}

/// The entry of `known` that `word` may be a slip of: at most two letters apart and mostly the same.
fn closest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    let near = known.iter().map(|k| (distance(word, k), *k)).min()?;
    (near.0 <= 2 && near.0 * 2 < near.1.len()).then_some(near.1)
}

/// Letters to change, add, drop or swap with their neighbour to get from `a` to `b`; 3 where lengths are far apart.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().take(64).collect(), b.chars().collect());
    if a.len().abs_diff(b.len()) > 2 {
        return 3;
    }
    let mut rows = vec![(0..=b.len()).collect::<Vec<usize>>()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let same = usize::from(a[i - 1] != b[j - 1]);
            let mut best = (rows[i - 1][j - 1] + same).min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_are_recognised_and_other_words_are_not() {
        let known = ["weight", "density", "t", "normalize"];
        for (slip, word) in [("wieght", "weight"), ("densty", "density"), ("normalise", "normalize")] {
            assert_eq!(closest(slip, &known), Some(word));
        }
        for word in ["", "x", "gamma", "weight_by_layer", "epsilon"] {
            assert_eq!(closest(word, &known), None, "{word}");
        }
        assert_eq!((distance("ab", "ba"), distance("abc", "abd"), distance("", "ab")), (1, 1, 2));
    }
}
