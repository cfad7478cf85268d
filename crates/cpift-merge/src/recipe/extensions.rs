//! The `cpift` keys of a recipe: what we have and mergekit has not.

use std::f64::consts::FRAC_PI_2;
use std::path::PathBuf;

use anyhow::Result;

use super::inputs::folder;
use super::node::{Fields, Node};
use super::settings::rules;
use crate::cli::Space;
use crate::request::{Method, ModelRequest, Request};

/// Reads `cpift` of the whole recipe.
pub(super) fn of_all(request: &mut Request, node: &Node<'_>) -> Result<()> {
    let known: &[&str] = match request.method {
        Method::Slerp | Method::SphericalMean => &["protect", "epsilon", "space", "base"],
        Method::DareLinear | Method::DareTies => &["protect", "seed"],
        _ => &["protect"],
    };
    let fields = node.fields(known, |_| None)?;
    request.protect = path(&fields, "protect")?;
    if let Some(node) = fields.get("seed") {
        request.seed = node.count()? as u64;
    }
    if let Some(node) = fields.get("epsilon") {
        request.epsilon = *rules(&node, &(0.0..=FRAC_PI_2))?.single().get_or_insert(request.epsilon);
    }
    if let Some(node) = fields.get("space") {
        let found = [Space::Weights, Space::Delta].into_iter().find(|space| node.text().ok() == Some(space.name()));
        request.space = found.ok_or_else(|| node.error("has a value of another kind").expected("weights, delta"))?;
    }
    if let Some(base) = path(&fields, "base")? {
        request.base = Some(base);
    }
    Ok(())
}

/// Reads `cpift` of a model.
pub(super) fn of_model(method: Method, model: &mut ModelRequest, node: &Node<'_>) -> Result<()> {
    let known: &[&str] = if method == Method::SphericalMean { &["mask", "weight"] } else { &["mask"] };
    let fields = node.fields(known, |_| None)?;
    model.mask = path(&fields, "mask")?;
    if let Some(node) = fields.get("weight") {
        model.weight = rules(&node, &(0.0..=f64::MAX))?;
    }
    Ok(())
}

fn path(fields: &Fields<'_>, key: &str) -> Result<Option<PathBuf>> {
    fields.get(key).map(|node| folder(&node).map(PathBuf::from)).transpose()
}
