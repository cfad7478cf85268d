//! Base and tuned checkpoint with different vocabularies: rows of the embeddings are matched by
//! token, and rows that only the tuned checkpoint has are outside D.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use cpift_core::format::checkpoint::{Row, Rows};
use cpift_core::format::tokens::{Tokens, embeddings};
use cpift_core::{BadInput, Checkpoint};

/// Gives the embeddings of `tuned` the rows of `base`, if the numbers of rows differ or the same
/// tokens have other ids, and those of `fisher` too if they have as many rows as those of `tuned`.
/// Returns the number of elements in rows that the base does not have.
///
/// A row of the base without a token (padding) that `tuned` does not have either counts as
/// unchanged.
///
/// # Errors
/// [`BadInput`] for a tokenizer that is missing or cannot be read, or a token without a row.
pub(crate) fn match_rows(
    base: &Checkpoint,
    tuned: &mut Checkpoint,
    mut fisher: Option<&mut Checkpoint>,
) -> Result<u64> {
    let names: Vec<String> = embeddings(base).into_iter().filter(|name| has_same_width(base, tuned, name)).collect();
    let rows = |checkpoint: &Checkpoint, name: &str| checkpoint.get(name).map_or(0, |view| view.shape[0]);
    let differs = names.iter().find(|name| rows(base, name) != rows(tuned, name));
    let Some(sample) = differs.or(names.first()) else { return Ok(0) };
    let tokens = |checkpoint: &Checkpoint| match checkpoint.folder() {
        Some(folder) => Tokens::read(folder, Some(rows(checkpoint, sample))),
        None => Ok(None),
    };
    let (Some(ours), Some(theirs)) = (tokens(base)?, tokens(tuned)?) else {
        return match differs {
            None => Ok(0),
            Some(name) => Err(without_tokenizer(base, tuned, name).into()),
        };
    };
    let absent = ours.in_order().into_iter().find(|token| !theirs.ids.contains_key(*token)).map(str::to_owned);
    match (differs, absent) {
        (None, None) if ours.ids == theirs.ids => return Ok(0),
        (None, Some(token)) => {
            log::warn!(
                "{}: other tokens than in {}, which has {token:?}: rows of the embeddings are compared by position",
                tuned.path().display(),
                base.path().display()
            );
            return Ok(0);
        }
        (Some(name), Some(token)) => {
            let message = format!("the token {token:?} of {} has no row", base.path().display());
            return Err(BadInput::new(tuned.path(), message)
                .tensor(name)
                .expected("all tokens of the base, in any order")
                .hint("was it tuned from another model? extra tokens and trimmed padding are fine")
                .into());
        }
        (_, None) => {}
    }
    let by_id: BTreeMap<usize, &str> = ours.ids.iter().map(|(token, id)| (*id, token.as_str())).collect();
    let taken: BTreeSet<usize> = theirs.ids.values().copied().collect();
    let (mut extra, mut unchanged) = (0, 0);
    for name in &names {
        let (view, n) = (base.get(name).expect("the base has it"), rows(tuned, name));
        let width = view.shape[1];
        let mut found = Rows { shape: view.shape.to_vec(), sources: Vec::new(), given: Vec::new() };
        for row in 0..view.shape[0] {
            let place = match by_id.get(&row) {
                Some(token) => Some(theirs.ids[*token]),
                None => Some(row).filter(|row| !taken.contains(row)),
            };
            found.sources.push(match place.filter(|place| *place < n) {
                Some(place) => Row::Stored(place as u32),
                None => {
                    let mut values = vec![0f64; width];
                    view.read(row * width, &mut values);
                    found.given.push(values);
                    Row::Given(found.given.len() as u32 - 1)
                }
            });
        }
        let used: BTreeSet<u32> =
            found.sources.iter().filter_map(|row| if let Row::Stored(row) = row { Some(*row) } else { None }).collect();
        extra += ((n - used.len()) * width) as u64;
        unchanged = unchanged.max(found.given.len());
        if let Some(fisher) = fisher.as_mut().filter(|fisher| rows(fisher, name) == n && n != view.shape[0]) {
            let zero = |row: &Row| if let Row::Given(_) = row { Row::Zero } else { *row };
            let sources = found.sources.iter().map(zero).collect();
            fisher.map_rows(name, Rows { shape: view.shape.to_vec(), sources, given: Vec::new() });
        }
        tuned.map_rows(name, found);
    }
    log::info!(
        "{}: rows of the embeddings are matched by token to those of {}; {extra} elements that it does not have are outside D",
        tuned.path().display(),
        base.path().display()
    );
    if unchanged > 0 {
        log::info!(
            "{unchanged} rows without a token count as unchanged: {} does not have them",
            tuned.path().display()
        );
    }
    Ok(extra)
}

fn has_same_width(base: &Checkpoint, tuned: &Checkpoint, name: &str) -> bool {
    match (base.get(name), tuned.get(name)) {
        (Some(a), Some(b)) => a.shape.len() == 2 && b.shape.len() == 2 && a.shape[1] == b.shape[1],
        _ => false,
    }
}

fn without_tokenizer(base: &Checkpoint, tuned: &Checkpoint, name: &str) -> BadInput {
    let shape = |checkpoint: &Checkpoint| checkpoint.get(name).map_or(Vec::new(), |view| view.shape.to_vec());
    BadInput::new(tuned.path(), format!("the vocabulary differs from {}", base.path().display()))
        .tensor(name)
        .expected(format!("{:?}", shape(base)))
        .found(format!("{:?}", shape(tuned)))
        .hint("rows are matched by token if both are directories with a tokenizer.json")
}
