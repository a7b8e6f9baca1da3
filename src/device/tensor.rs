use super::Device;

/// What a tensor holds. The device decides how wide a float is ([`Device::width`]).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum DType {
    F32,
    /// The upper half of an f32; on devices that compute with it ([`Device::storage`]).
    Bf16,
    U32,
}

impl DType {
    /// Of one element, where a float is as wide as it says.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 | Self::U32 => 4,
            Self::Bf16 => 2,
        }
    }
}

/// What a device keeps numbers in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Storage {
    /// Weights and activations.
    pub dtype: DType,
    /// Matrices that are bfloat16 in their file and never change stay bfloat16, whatever `dtype`: half the memory, the same bits.
    pub bf16_matrices: bool,
}

impl Storage {
    pub const CPU: Self = Self { dtype: DType::F32, bf16_matrices: true };
}

impl From<DType> for Storage {
    fn from(dtype: DType) -> Self {
        Self { dtype, bf16_matrices: false }
    }
}

/// Contiguous row-major `[rows, cols]`, owned. Made by [`super::Arena::take`] only.
pub struct Tensor<D: Device> {
    pub(super) span: D::Span,
    pub(super) dtype: DType,
    pub(super) rows: usize,
    pub(super) cols: usize,
}

/// A run of whole rows of a tensor, to read.
pub struct View<'a, D: Device> {
    pub(super) span: &'a D::Span,
    pub(super) dtype: DType,
    /// First element, counted in elements from the start of the tensor.
    pub(super) offset: usize,
    rows: usize,
    cols: usize,
}

/// A run of whole rows of a tensor, to write.
pub struct ViewMut<'a, D: Device> {
    pub(super) span: &'a mut D::Span,
    pub(super) dtype: DType,
    pub(super) offset: usize,
    rows: usize,
    cols: usize,
}

impl<D: Device> Tensor<D> {
    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    pub fn len(&self) -> usize {
        self.rows * self.cols
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn view(&self) -> View<'_, D> {
        View { span: &self.span, dtype: self.dtype, offset: 0, rows: self.rows, cols: self.cols }
    }

    pub fn view_mut(&mut self) -> ViewMut<'_, D> {
        ViewMut { dtype: self.dtype, offset: 0, rows: self.rows, cols: self.cols, span: &mut self.span }
    }

    /// The first `rows` rows: tensors are sized for the largest batch, views for the present one.
    pub fn top(&self, rows: usize) -> View<'_, D> {
        assert!(rows <= self.rows, "a view of {rows} rows was asked of a tensor with {}", self.rows);
        View { rows, ..self.view() }
    }

    pub fn top_mut(&mut self, rows: usize) -> ViewMut<'_, D> {
        assert!(rows <= self.rows, "a view of {rows} rows was asked of a tensor with {}", self.rows);
        ViewMut { rows, ..self.view_mut() }
    }
}

impl<D: Device> Clone for View<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<D: Device> Copy for View<'_, D> {}

impl<'a, D: Device> View<'a, D> {
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    pub fn len(&self) -> usize {
        self.rows * self.cols
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn shape(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    pub fn slice(self, first: usize, rows: usize) -> View<'a, D> {
        assert!(first + rows <= self.rows, "rows {first}..{} of a view of {}", first + rows, self.rows);
        View { offset: self.offset + first * self.cols, rows, ..self }
    }

    /// The same elements under another shape: a norm over heads sees `[rows * heads, head_dim]`.
    pub fn reshape(self, rows: usize, cols: usize) -> View<'a, D> {
        assert_eq!(rows * cols, self.len(), "reshape to [{rows}, {cols}] changes the number of elements");
        View { rows, cols, ..self }
    }
}

impl<D: Device> ViewMut<'_, D> {
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    pub fn len(&self) -> usize {
        self.rows * self.cols
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn shape(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    pub fn view(&self) -> View<'_, D> {
        View { span: self.span, dtype: self.dtype, offset: self.offset, rows: self.rows, cols: self.cols }
    }

    /// The same rows for one more call.
    pub fn again(&mut self) -> ViewMut<'_, D> {
        ViewMut { span: self.span, dtype: self.dtype, offset: self.offset, rows: self.rows, cols: self.cols }
    }

    pub fn slice(self, first: usize, rows: usize) -> Self {
        assert!(first + rows <= self.rows, "rows {first}..{} of a view of {}", first + rows, self.rows);
        Self { offset: self.offset + first * self.cols, rows, ..self }
    }

    pub fn reshape(self, rows: usize, cols: usize) -> Self {
        assert_eq!(rows * cols, self.len(), "reshape to [{rows}, {cols}] changes the number of elements");
        Self { rows, cols, ..self }
    }
}
