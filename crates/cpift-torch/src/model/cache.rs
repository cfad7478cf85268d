//! The key-value cache of a batch whose rows come and go.
//!
//! All rows write into the same column, one column per token, so the tokens of each row end at the
//! newest column. Attention masks what a row has not written; keys carry their positions, so a
//! column may move.
//!
//! Shape suffixes: b batch, k key-value heads, d head width.

use tch::{Device, Kind, Tensor};

use super::config::ModelConfig;

/// Columns by which a full cache grows.
const GROWTH: i64 = 64;

/// Key-value cache: [b, k, capacity, d] for each block. Columns from `first` to `end` are those of
/// the longest row. A shorter row has finite values in columns that it has not written: masked
/// scores would be NaN otherwise.
pub struct KvCache {
    layers: Vec<(Tensor, Tensor)>,
    first: i64,
    end: i64,
}

impl KvCache {
    /// An empty cache for `b` rows of up to `capacity` tokens.
    pub(super) fn new(c: &ModelConfig, b: i64, capacity: i64, options: (Kind, Device)) -> Self {
        let shape = [b, c.num_key_value_heads, capacity, c.head_dim];
        let layer = |_| (Tensor::empty(shape, options), Tensor::empty(shape, options));
        Self { layers: (0..c.num_hidden_layers).map(layer).collect(), first: 0, end: 0 }
    }

    /// Number of tokens of the longest row.
    pub fn length(&self) -> i64 {
        self.end - self.first
    }

    /// Number of tokens for which there is memory.
    pub fn capacity(&self) -> i64 {
        self.layers.first().map_or(0, |(k, _)| k.size()[2])
    }

    /// Drops all tokens but the first `length`.
    pub fn truncate(&mut self, length: i64) {
        self.end = self.end.min(self.first + length);
    }

    /// Drops columns before the last `length`: no row is longer.
    pub fn keep_newest(&mut self, length: i64) {
        self.first = self.first.max(self.end - length);
    }

    /// Makes room for one more token. A full cache moves its columns to the left, over those that
    /// no row uses any more, block by block.
    pub fn reserve(&mut self) {
        if self.end < self.capacity() {
            return;
        }
        let length = self.length();
        for tensor in self.layers.iter_mut().flat_map(|(k, v)| [k, v]) {
            let (b, k, _, d) = tensor.size4().expect("a cache has four dimensions");
            let moved = Tensor::empty([b, k, length + GROWTH, d], (tensor.kind(), tensor.device()));
            moved.narrow(2, 0, length).copy_(&tensor.narrow(2, self.first, length));
            *tensor = moved;
        }
        (self.first, self.end) = (0, length);
    }

    /// Appends a block's new keys and values and returns all of them.
    pub(super) fn extend(&self, layer: usize, k: &Tensor, v: &Tensor) -> (Tensor, Tensor) {
        let s = k.size()[2];
        let write = |all: &Tensor, new: &Tensor| {
            all.narrow(2, self.end, s).copy_(new);
            all.narrow(2, self.first, self.length() + s)
        };
        let (all_k, all_v) = &self.layers[layer];
        (write(all_k, k), write(all_v, v))
    }

    /// Advances by `s` tokens, which every block has written.
    pub(super) fn advance(&mut self, s: i64) {
        self.end += s;
    }

    /// Keeps only the batch rows `rows` (int64), in that order.
    pub fn keep_rows(&mut self, rows: &Tensor) {
        for tensor in self.layers.iter_mut().flat_map(|(k, v)| [k, v]) {
            *tensor = tensor.index_select(0, rows);
        }
    }

    /// Replaces the batch rows `rows` (int64) by those of `new`.
    ///
    /// # Panics
    /// If a new row is longer than the rows have been since the cache last moved.
    pub fn replace_rows(&mut self, rows: &Tensor, new: &Self) {
        let length = new.length();
        assert!(length <= self.end, "{length} new columns, {} before the newest", self.end);
        let replace = |all: &Tensor, new_rows: &Tensor| {
            // An old value that is not finite would spread from under the mask.
            let _ = all.narrow(2, 0, self.end).index_fill_(0, rows, 0.0);
            let newest = new_rows.narrow(2, new.first, length);
            let _ = all.narrow(2, self.end - length, length).index_copy_(0, rows, &newest);
        };
        for ((k, v), (new_k, new_v)) in self.layers.iter().zip(&new.layers) {
            replace(k, new_k);
            replace(v, new_v);
        }
        self.first = self.first.min(self.end - length);
    }
}
