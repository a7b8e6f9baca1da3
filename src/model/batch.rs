//! A host batch on the device.

use crate::data::{self, Extent, Temperature};
use crate::device::{Arena, Device, Kind, Tensor, View};
use crate::error::Result;
use crate::ops::attention::{NO_PARENT, Segment};

/// Index tensors of one batch, sized for the largest.
pub struct Batch<D: Device> {
    /// `[rows, 1]`
    tokens: Tensor<D>,
    positions: Tensor<D>,
    /// `[segments, 6]`
    segments: Tensor<D>,
    /// `[targets, 1]`
    completion_rows: Tensor<D>,
    targets: Tensor<D>,
    size: Extent,
    temperature: Temperature,
}

impl<D: Device> Batch<D> {
    pub fn new(arena: &mut Arena<D>, largest: &Extent) -> Self {
        let mut column = |rows| arena.indices(Kind::Activations, rows, 1);
        let (tokens, positions) = (column(largest.rows), column(largest.rows));
        let (completion_rows, targets) = (column(largest.targets), column(largest.targets));
        let segments = arena.indices(Kind::Activations, largest.segments, Segment::WORDS);
        let (size, temperature) = (Extent::default(), Temperature::ONE);
        Self { tokens, positions, segments, completion_rows, targets, size, temperature }
    }

    /// Uploads a batch that queries every row.
    pub fn load(&mut self, device: &D, batch: &data::Batch) -> Result<()> {
        let segments: Vec<Segment> = batch.segments.iter().map(whole).collect();
        self.load_rows(device, &batch.tokens, &batch.positions, &segments)?;
        device.write_u32(&batch.completion_rows, self.completion_rows.top_mut(batch.completion_rows.len()))?;
        device.write_u32(&batch.targets, self.targets.top_mut(batch.targets.len()))?;
        self.size = batch.extent();
        self.temperature = batch.temperature;
        Ok(())
    }

    /// Uploads rows whose keys live in a cache: `segments` says where.
    pub fn load_decode(
        &mut self,
        device: &D,
        tokens: &[u32],
        positions: &[u32],
        segments: &[Segment],
        read_rows: &[u32],
    ) -> Result<()> {
        self.load_rows(device, tokens, positions, segments)?;
        device.write_u32(read_rows, self.completion_rows.top_mut(read_rows.len()))?;
        self.size = Extent {
            rows: tokens.len(),
            targets: read_rows.len(),
            segments: segments.len(),
            sequences: read_rows.len(),
            longest: segments.iter().map(|s| (s.position + s.len) as usize).max().unwrap_or(0),
        };
        Ok(())
    }

    /// Reads other rows of the pass that ran.
    pub fn read(&mut self, device: &D, rows: &[u32]) -> Result<()> {
        device.write_u32(rows, self.completion_rows.top_mut(rows.len()))?;
        self.size.targets = rows.len();
        Ok(())
    }

    fn load_rows(&mut self, device: &D, tokens: &[u32], positions: &[u32], segments: &[Segment]) -> Result<()> {
        device.write_u32(tokens, self.tokens.top_mut(tokens.len()))?;
        device.write_u32(positions, self.positions.top_mut(positions.len()))?;
        device.write_u32(bytemuck::cast_slice(segments), self.segments.top_mut(segments.len()))
    }

    /// Sizes without contents: what a dry run needs to count work.
    pub fn resize(&mut self, size: Extent) {
        self.size = size;
    }

    pub fn size(&self) -> Extent {
        self.size
    }

    /// At which its targets' log-probabilities are taken.
    pub fn temperature(&self) -> Temperature {
        self.temperature
    }

    pub fn tokens(&self) -> View<'_, D> {
        self.tokens.top(self.size.rows)
    }

    pub fn positions(&self) -> View<'_, D> {
        self.positions.top(self.size.rows)
    }

    pub fn segments(&self) -> View<'_, D> {
        self.segments.top(self.size.segments)
    }

    pub fn completion_rows(&self) -> View<'_, D> {
        self.completion_rows.top(self.size.targets)
    }

    pub fn targets(&self) -> View<'_, D> {
        self.targets.top(self.size.targets)
    }
}

fn whole(s: &data::Segment) -> Segment {
    Segment {
        start: s.start as u32,
        len: s.len as u32,
        parent: s.parent.map_or(NO_PARENT, |p| p as u32),
        position: s.position as u32,
        query_start: s.start as u32,
        queries: s.len as u32,
    }
}
