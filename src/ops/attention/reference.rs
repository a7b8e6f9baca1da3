use super::{Attention, Backward, Dims, Forward, NO_PARENT, Segment};
use crate::device::Reference;
use crate::error::Result;

/// One query of one head: its row, and the key rows it sees.
struct Query {
    row: usize,
    head: usize,
    keys: Vec<usize>,
}

/// The path root -> segment as indices into the table.
fn path(segments: &[Segment], mut index: usize) -> Vec<usize> {
    let mut path = vec![index];
    while segments[index].parent != NO_PARENT {
        index = segments[index].parent as usize;
        path.push(index);
    }
    path.reverse();
    path
}

/// Key rows of the path root -> segment, by position.
fn path_rows(segments: &[Segment], index: usize) -> impl Iterator<Item = usize> {
    let rows = |s: usize| segments[s].start as usize..(segments[s].start + segments[s].len) as usize;
    path(segments, index).into_iter().flat_map(rows)
}

fn queries(segments: &[Segment], dims: &Dims) -> Vec<Query> {
    let mut all = Vec::new();
    for (index, s) in segments.iter().enumerate() {
        let path: Vec<usize> = path_rows(segments, index).collect();
        for i in 0..s.queries as usize {
            let position = (s.position + s.len - s.queries) as usize + i;
            let keys = path[dims.first_visible(position)..=position].to_vec();
            let row = s.query_start as usize + i;
            all.extend((0..dims.heads).map(|head| Query { row, head, keys: keys.clone() }));
        }
    }
    all
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

impl Attention for Reference {
    fn attention(&self, a: Forward<Self>) -> Result<()> {
        a.check()?;
        let d = a.dims;
        let (q, k, v) = (a.q.f64s(), a.k.f64s(), a.v.f64s());
        let (o, lse) = (a.o.into_f64s(), a.lse.into_f64s());
        let group = d.heads / d.kv_heads;
        for query in queries(bytemuck::cast_slice(a.segments.u32s()), &d) {
            let at = (query.row * d.heads + query.head) * d.head_dim;
            let key = |row: usize| (row * d.kv_heads + query.head / group) * d.head_dim;
            let q = &q[at..at + d.head_dim];
            let s: Vec<f64> = query.keys.iter().map(|r| d.scale() * dot(q, &k[key(*r)..][..d.head_dim])).collect();
            let max = s.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = s.iter().map(|s| (s - max).exp()).sum();
            lse[query.row * d.heads + query.head] = max + total.ln();
            for i in 0..d.head_dim {
                let weighted = query.keys.iter().zip(&s).map(|(r, s)| (s - max).exp() / total * v[key(*r) + i]);
                o[at + i] = weighted.sum();
            }
        }
        Ok(())
    }

    fn attention_backward(&self, a: Backward<Self>) -> Result<()> {
        a.check()?;
        let d = a.dims;
        let (q, k, v, o) = (a.q.f64s(), a.k.f64s(), a.v.f64s(), a.o.f64s());
        let (d_o, lse) = (a.d_o.f64s(), a.lse.f64s());
        let (dq, dk, dv) = (a.dq.into_f64s(), a.dk.into_f64s(), a.dv.into_f64s());
        for gradient in [&mut *dq, &mut *dk, &mut *dv] {
            gradient.fill(0.0);
        }
        let group = d.heads / d.kv_heads;
        for query in queries(bytemuck::cast_slice(a.segments.u32s()), &d) {
            let at = (query.row * d.heads + query.head) * d.head_dim;
            let wide = at..at + d.head_dim;
            let delta = dot(&d_o[wide.clone()], &o[wide.clone()]);
            for row in query.keys {
                let key = (row * d.kv_heads + query.head / group) * d.head_dim;
                let narrow = key..key + d.head_dim;
                let s = d.scale() * dot(&q[wide.clone()], &k[narrow.clone()]);
                let p = (s - lse[query.row * d.heads + query.head]).exp();
                let ds = p * (dot(&d_o[wide.clone()], &v[narrow]) - delta);
                for i in 0..d.head_dim {
                    dq[at + i] += d.scale() * ds * k[key + i];
                    dk[key + i] += d.scale() * ds * q[at + i];
                    dv[key + i] += p * d_o[at + i];
                }
            }
        }
        Ok(())
    }
}
