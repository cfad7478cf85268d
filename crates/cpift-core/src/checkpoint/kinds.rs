//! Kinds of tensors, told by their names, that can be left out of D when core regions are found.

/// A kind of tensor that `--exclude` names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TensorKind {
    /// Input and output embeddings: `embed_tokens`, `lm_head`.
    Embeddings,
    /// Normalisation weights: names that contain `norm`.
    Norms,
}

impl TensorKind {
    /// Whether the tensor called `name` is of this kind.
    pub fn matches(self, name: &str) -> bool {
        match self {
            Self::Embeddings => name.contains("embed_tokens") || name.starts_with("lm_head"),
            Self::Norms => name.contains("norm"),
        }
    }
}

impl std::fmt::Display for TensorKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Embeddings => "embeddings",
            Self::Norms => "norms",
        })
    }
}

impl std::str::FromStr for TensorKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "embeddings" => Ok(Self::Embeddings),
            "norms" => Ok(Self::Norms),
            other => Err(format!("expected embeddings or norms, found {other:?}")),
        }
    }
}
