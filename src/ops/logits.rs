//! Tiles of logits on the CPU, for the ops that walk the vocabulary and keep no `[rows, vocab]` matrix.

use rayon::prelude::*;

use super::gemm::{Numbers, Operand, Right, Start, gemm};
use super::logprob_head::{TILE_ROWS, TILE_VOCAB};
use crate::device::Cpu;

/// Rows of one task of the passes over a tile.
pub const ROWS_PER_TASK: usize = 16;

/// Rows, and the entries of the vocabulary whose logits they get.
pub struct Tile {
    pub row: usize,
    pub rows: usize,
    pub entry: usize,
    pub entries: usize,
}

/// All tiles, vocabulary innermost and in order.
pub fn tiles(rows: usize, vocab: usize) -> impl Iterator<Item = Tile> {
    (0..rows).step_by(TILE_ROWS).flat_map(move |row| {
        (0..vocab).step_by(TILE_VOCAB).map(move |entry| Tile {
            row,
            rows: TILE_ROWS.min(rows - row),
            entry,
            entries: TILE_VOCAB.min(vocab - entry),
        })
    })
}

impl Tile {
    /// `[rows, entries]` at the front of `scratch`: hidden rows `h [_, hidden]` times the head `w [_, hidden]`, times `scale`.
    pub fn logits<'a>(
        &self,
        cpu: &Cpu,
        (hidden, scale): (usize, f32),
        h: &[f32],
        w: Numbers,
        scratch: &'a mut [f32],
    ) -> &'a mut [f32] {
        let h = Operand::new(&h[self.row * hidden..][..self.rows * hidden], hidden);
        let w = Right::transposed(w.from(self.entry * hidden), hidden);
        let logits = &mut scratch[..self.rows * self.entries];
        gemm(cpu, [self.rows, self.entries, hidden], h, w, logits, Start::Zero);
        if scale != 1.0 {
            let rows = ROWS_PER_TASK * self.entries;
            cpu.run(|| logits.par_chunks_mut(rows).for_each(|logits| logits.iter_mut().for_each(|l| *l *= scale)));
        }
        logits
    }

    /// What the gradient `dl [rows, entries]` adds: `dh += dl W`, `dweight += dl^T h`.
    pub fn add_gradients(
        &self,
        cpu: &Cpu,
        hidden: usize,
        [dl, h]: [&[f32]; 2],
        w: Numbers,
        dh: &mut [f32],
        dweight: Option<&mut [f32]>,
    ) {
        let rows = self.row * hidden..(self.row + self.rows) * hidden;
        let entries = self.entry * hidden..(self.entry + self.entries) * hidden;
        let w = Right::new(w.from(entries.start), hidden);
        let shape = [self.rows, hidden, self.entries];
        gemm(cpu, shape, Operand::new(dl, self.entries), w, &mut dh[rows.clone()], Start::Output);
        if let Some(dweight) = dweight {
            let (dl, h) = (Operand::transposed(dl, self.entries), Operand::new(&h[rows], hidden));
            gemm(cpu, [self.entries, hidden, self.rows], dl, h, &mut dweight[entries], Start::Output);
        }
    }
}
