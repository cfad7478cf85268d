//! Low-rank adapters beside the linear layers of a model: y = W·x + s·B·(A·x).

use std::cell::RefCell;
use std::rc::Rc;

use tch::Tensor;

use crate::ffi;

/// Factors of a low-rank product.
pub struct LowRank {
    /// A, [r, i], f32.
    pub a: Tensor,
    /// B, [o, r], f32.
    pub b: Tensor,
    /// s, the scale of the product.
    pub scale: f64,
}

impl LowRank {
    /// A copy that shares storage.
    fn shared(&self) -> Self {
        Self { a: self.a.shallow_clone(), b: self.b.shallow_clone(), scale: self.scale }
    }
}

/// Place for an adapter in a linear layer, which the layer shares with the list of the model.
#[derive(Clone, Default)]
pub(crate) struct AdapterSlot(Rc<RefCell<Option<LowRank>>>);

impl AdapterSlot {
    pub(crate) fn set(&self, adapter: LowRank) {
        *self.0.borrow_mut() = Some(adapter);
    }

    pub(crate) fn get(&self) -> Option<LowRank> {
        self.0.borrow().as_ref().map(LowRank::shared)
    }

    /// Adds the product of the adapter and `x`, if there is one, to the layer's output `y`, in the
    /// dtype of `x`.
    pub(crate) fn add_to(&self, y: Tensor, x: &Tensor) -> Tensor {
        let slot = self.0.borrow();
        let Some(LowRank { a, b, scale }) = slot.as_ref() else { return y };
        let kind = x.kind();
        // Scaled while it is narrow.
        let inner = ffi::linear(x, &a.to_kind(kind), None) * *scale;
        y + ffi::linear(&inner, &b.to_kind(kind), None)
    }
}
