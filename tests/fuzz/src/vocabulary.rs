//! Tokens and ids of a tokenizer.json, to which the rows of embeddings are matched.

use std::collections::BTreeSet;

use cpift_core::format::tokens::Tokens;

use crate::bounds;

/// Tokens take a node of a table and of a tree each.
const PER_BYTE: usize = 64;

pub fn run(data: &[u8]) -> bool {
    let path = bounds::write("tokenizer.json", data);
    let read = bounds::bounded_by((1 << 20) + PER_BYTE * data.len(), || {
        let Ok(Some(tokens)) = Tokens::read(bounds::folder(), None) else { return false };
        let ids = &tokens.ids;
        assert_eq!(ids.values().collect::<BTreeSet<_>>().len(), ids.len(), "each id stands for one token");
        true
    });
    let _ = std::fs::remove_file(path);
    read
}
