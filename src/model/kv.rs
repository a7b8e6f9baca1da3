//! Keys and values of sequences that grow: one contiguous slot for a prompt, one for each completion.

use super::spec::Spec;
use crate::device::{Arena, Device, Kind, Tensor, View};

/// `[slot rows, kv_heads * head_dim]` for each layer.
pub struct KvCache<D: Device> {
    layers: Vec<(Tensor<D>, Tensor<D>)>,
    /// `[new rows, 1]`: the cache row of each row of the batch.
    append: Tensor<D>,
    appended: usize,
}

/// One layer of a cache, during a pass.
pub struct KvLayer<'a, D: Device> {
    pub keys: &'a mut Tensor<D>,
    pub values: &'a mut Tensor<D>,
    pub append: View<'a, D>,
}

impl<D: Device> KvCache<D> {
    /// `rows` in all slots together; at most `new_rows` are appended in one pass.
    pub fn new(arena: &mut Arena<D>, spec: &Spec, rows: usize, new_rows: usize) -> Self {
        let cols = spec.kv_heads * spec.head_dim;
        let mut take = || arena.stored(Kind::Activations, rows, cols);
        let layers = (0..spec.layers).map(|_| (take(), take())).collect();
        Self { layers, append: arena.indices(Kind::Activations, new_rows, 1), appended: 0 }
    }

    /// Says where the rows of the next pass go.
    pub fn set_append(&mut self, device: &D, rows: &[u32]) -> crate::error::Result<()> {
        self.appended = rows.len();
        device.write_u32(rows, self.append.top_mut(rows.len()))
    }

    pub fn layer(&mut self, layer: usize) -> KvLayer<'_, D> {
        let (keys, values) = &mut self.layers[layer];
        KvLayer { keys, values, append: self.append.top(self.appended) }
    }
}
