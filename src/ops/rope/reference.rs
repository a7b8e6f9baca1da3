use super::{Direction, Rope, Rotate};
use crate::device::Reference;
use crate::error::Result;

impl Rope for Reference {
    fn rope(&self, a: Rotate<Self>) -> Result<()> {
        a.check()?;
        let (cols, half) = (a.x.cols(), a.cos.cols());
        let (positions, cos, sin) = (a.positions.u32s(), a.cos.f64s(), a.sin.f64s());
        let x = a.x.into_f64s();
        for (r, position) in positions.iter().enumerate() {
            for head in (0..cols).step_by(a.head_dim) {
                for i in 0..half {
                    let (low, high) = (r * cols + head + i, r * cols + head + half + i);
                    let (c, s) = (cos[*position as usize * half + i], sin[*position as usize * half + i]);
                    let s = if a.direction == Direction::Forward { s } else { -s };
                    (x[low], x[high]) = (x[low] * c - x[high] * s, x[high] * c + x[low] * s);
                }
            }
        }
        Ok(())
    }
}
