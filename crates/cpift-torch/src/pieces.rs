//! Pieces of parameters: what one process keeps, updates and saves of each.

use std::collections::BTreeMap;

use tch::Tensor;

/// The part of a parameter that this process keeps and updates.
pub struct Piece {
    /// The elements: flat, or in one process the parameter itself.
    pub tensor: Tensor,
    /// Flat index of the first element in the parameter.
    pub start: i64,
    /// Shape of the whole parameter.
    pub shape: Vec<i64>,
}

impl Piece {
    /// The whole of `parameter`; shares its storage.
    pub fn whole(parameter: &Tensor) -> Self {
        Self { tensor: parameter.shallow_clone(), start: 0, shape: parameter.size() }
    }

    /// Number of elements of the whole parameter.
    pub fn whole_len(&self) -> i64 {
        self.shape.iter().product()
    }

    /// Number of elements of the piece.
    pub fn len(&self) -> i64 {
        self.tensor.numel() as i64
    }

    /// Returns true if this process keeps no element of the parameter.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A piece at the same place with other elements.
    pub fn with(&self, tensor: Tensor) -> Self {
        Self { tensor, start: self.start, shape: self.shape.clone() }
    }
}

/// Pieces by parameter name, in bytewise name order.
pub type Pieces = BTreeMap<String, Piece>;

/// The whole parameters as pieces.
pub fn whole_pieces(parameters: &BTreeMap<String, Tensor>) -> Pieces {
    parameters.iter().map(|(name, t)| (name.clone(), Piece::whole(t))).collect()
}
