//! How a checkpoint keeps a weight that the model holds as `[outputs, inputs]`: as it is, transposed, or as some
//! rows of a fused tensor. One formula maps rows both ways, so that loading, saving and gradients agree.

use std::iter::repeat_n;

/// Where a checkpoint keeps a weight.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Stored {
    /// The tensor's name.
    pub tensor: String,
    /// The tensor is `[inputs, outputs]` (GPT-2's Conv1D).
    transposed: bool,
    /// The weights that share the tensor: their rows take turns, `run` at a time.
    parts: &'static [&'static str],
    /// Which of them this is.
    part: usize,
    run: usize,
    /// Each part has columns of its own, too, and where its rows meet those of others there is 0.
    diagonal: bool,
}

impl Stored {
    pub fn whole(tensor: String) -> Self {
        Self { tensor, transposed: false, parts: &[""], part: 0, run: 1, diagonal: false }
    }

    pub fn transposed(self) -> Self {
        Self { transposed: true, ..self }
    }

    /// One of the weights that share the tensor in runs of `run` rows.
    pub fn part(self, parts: &'static [&'static str], part: usize, run: usize) -> Self {
        assert!(part < parts.len() && run > 0, "part {part} of {parts:?} in runs of {run}");
        Self { parts, part, run, ..self }
    }

    /// How tensors `a` and `b` keep an adapter of this weight: where it shares its tensor the A of the parts, `[rank, inputs]`,
    /// lie below each other and the B, `[outputs, rank]`, on the diagonal, so that the one product of both tensors is every
    /// part's own.
    pub fn adapter(&self, [a, b]: [String; 2], rank: usize) -> [Self; 2] {
        let part = |tensor| Self { tensor, transposed: false, ..self.clone() };
        [Self { run: rank, ..part(a) }, Self { diagonal: true, ..part(b) }]
    }

    /// The weight's own name: the tensor's, with the part behind it where there are several.
    pub fn name(&self) -> String {
        match self.parts {
            [_] => self.tensor.clone(),
            parts => format!("{}.{}", self.tensor, parts[self.part]),
        }
    }

    /// The tensor holds the weight and nothing else, in the same order.
    pub fn is_plain(&self) -> bool {
        !self.transposed && self.parts.len() == 1
    }

    /// No other weight shares the tensor.
    pub fn is_alone(&self) -> bool {
        self.parts.len() == 1
    }

    /// How many weights share the tensor.
    pub fn parts(&self) -> usize {
        self.parts.len()
    }

    /// The tensor is `[inputs, outputs]`.
    pub fn is_transposed(&self) -> bool {
        self.transposed
    }

    /// The tensor's shape, given the weight's: vectors have one dimension.
    pub fn shape(&self, weight: &[usize]) -> Vec<usize> {
        let mut shape = weight.to_vec();
        shape[0] *= self.parts.len();
        if self.diagonal {
            shape[1] *= self.parts.len();
        }
        if self.transposed {
            shape.reverse();
        }
        shape
    }

    /// Takes the weight `[rows, cols]` out of the tensor.
    pub fn extract(&self, tensor: &[f32], [rows, cols]: [usize; 2], weight: &mut [f32]) {
        for (to, from) in self.elements([rows, cols]) {
            weight[to] = tensor[from];
        }
    }

    /// Takes the weight's rows `[rows, cols]` out of a matrix that has a row for each output of the tensor.
    pub fn extract_outputs(&self, matrix: &[f32], [rows, cols]: [usize; 2], out: &mut [f32]) {
        Self { transposed: false, ..self.clone() }.extract(matrix, [rows, cols], out);
    }

    /// Puts the weight into its place in the tensor; the other elements stay.
    pub fn insert(&self, weight: &[f32], [rows, cols]: [usize; 2], tensor: &mut [f32]) {
        for (from, to) in self.elements([rows, cols]) {
            tensor[to] = weight[from];
        }
    }

    /// (element of the weight, element of the tensor), all of them.
    fn elements(&self, [rows, cols]: [usize; 2]) -> impl Iterator<Item = (usize, usize)> {
        let parts = self.parts.len();
        let (width, first) = if self.diagonal { (cols * parts, cols * self.part) } else { (cols, 0) };
        let (row_stride, col_stride) = if self.transposed { (1, rows * parts) } else { (width, 1) };
        let places = (0..rows).map(move |row| (row / self.run * parts + self.part) * self.run + row % self.run);
        let by_row = places.enumerate().flat_map(move |(row, place)| repeat_n((row, place), cols).zip(0..cols));
        by_row.map(move |((row, place), col)| (row * cols + col, place * row_stride + (first + col) * col_stride))
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::*;

    fn numbers(range: Range<usize>) -> Vec<f32> {
        range.map(|i| i as f32).collect()
    }

    /// Two heads of two rows: q0 q0 k0 k0 v0 v0 q1 q1 k1 k1 v1 v1, one column each.
    #[test]
    fn heads_are_taken_apart_and_put_together() {
        let fused = numbers(0..12);
        let expected = [[0.0, 1.0, 6.0, 7.0], [2.0, 3.0, 8.0, 9.0], [4.0, 5.0, 10.0, 11.0]];
        let mut again = vec![f32::NAN; 12];
        for (part, expected) in expected.into_iter().enumerate() {
            let stored = Stored::whole("qkv".into()).part(&["q", "k", "v"], part, 2);
            assert_eq!(stored.name(), ["qkv.q", "qkv.k", "qkv.v"][part]);
            assert_eq!((stored.shape(&[4, 1]), stored.shape(&[4])), (vec![12, 1], vec![12]));
            let mut weight = [f32::NAN; 4];
            stored.extract(&fused, [4, 1], &mut weight);
            assert_eq!(weight, expected);
            stored.insert(&weight, [4, 1], &mut again);
        }
        assert_eq!(again, fused);
    }

    /// One tensor's product is that of each part.
    #[test]
    fn adapters_of_parts_are_one_of_the_tensor() {
        let (rows, rank, inputs) = (4, 2, 3);
        let (mut fused_a, mut fused_b) = (vec![0.0; 3 * rank * inputs], vec![0.0; 3 * rows * 3 * rank]);
        let product = |b: &[f32], a: &[f32], rank: usize| -> Vec<f32> {
            let cell = |i: usize| (0..rank).map(|k| b[i / inputs * rank + k] * a[k * inputs + i % inputs]).sum();
            (0..b.len() / rank * inputs).map(cell).collect()
        };
        let mut expected = vec![0.0; 3 * rows * inputs];
        for part in 0..3 {
            let weight = Stored::whole("qkv".into()).part(&["q", "k", "v"], part, 2);
            let [a, b] = weight.adapter(["A".into(), "B".into()], rank);
            assert_eq!((a.shape(&[rank, inputs]), b.shape(&[rows, rank])), (vec![6, 3], vec![12, 6]));
            assert_eq!((a.name(), b.name()), (weight.name().replace("qkv", "A"), weight.name().replace("qkv", "B")));
            let own_a = numbers(10 * part..10 * part + rank * inputs);
            let own_b = numbers(7 * part + 1..7 * part + 1 + rows * rank);
            a.insert(&own_a, [rank, inputs], &mut fused_a);
            b.insert(&own_b, [rows, rank], &mut fused_b);
            weight.insert(&product(&own_b, &own_a, rank), [rows, inputs], &mut expected);
            let mut again = vec![0.0; rows * rank];
            b.extract(&fused_b, [rows, rank], &mut again);
            assert_eq!(again, own_b);
        }
        assert_eq!(product(&fused_b, &fused_a, 3 * rank), expected);
    }

    /// `[inputs 2, outputs 3 * 3]`: columns 0..3 are q.
    #[test]
    fn columns_of_a_transposed_tensor_are_rows() {
        let fused = numbers(0..18);
        let key = Stored::whole("c_attn".into()).transposed().part(&["q", "k", "v"], 1, 3);
        assert_eq!(key.shape(&[3, 2]), [2, 9]);
        let mut weight = [f32::NAN; 6];
        key.extract(&fused, [3, 2], &mut weight);
        assert_eq!(weight, [3.0, 12.0, 4.0, 13.0, 5.0, 14.0]);
        let mut tensor = vec![-1.0; 18];
        key.insert(&weight, [3, 2], &mut tensor);
        let kept = |i: usize| if (3..6).contains(&(i % 9)) { i as f32 } else { -1.0 };
        assert_eq!(tensor, (0..18).map(kept).collect::<Vec<_>>());
    }
}
