//! Products through cuBLASLt, where its library can be opened. It picks a kernel for each shape, so the last bits of a row
//! depend on how many rows there are; [`Options::batch_invariant`](super::Options) asks for our kernel instead, which also
//! takes over what the library does not do.
//!
//! cuBLASLt is column-major. A matrix that lies row by row is its own transpose there, so `c = a b` is asked for as
//! `c^T = b^T a^T`: first operand b, second a, n rows and m columns.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr;

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys::{
    self, cublasLtMatmulDescAttributes_t as Of, cublasLtMatmulPreferenceAttributes_t as Preferred,
};

use super::memory::{Context, CudaSpan};
use super::products::Product;
use super::{Element, libraries};
use crate::device::{ALIGN_BYTES, DType};
use crate::error::{Error, Result};

/// Of the ops' workspace, and at most: what NVIDIA recommends for Hopper.
const WORKSPACE_SHARE: usize = 4;
const WORKSPACE_BYTES: usize = 32 << 20;
/// Which `m` occur depends on the data: beyond this many plans all are forgotten.
const MAX_PLANS: usize = 4096;
/// What a bias pointer must be a multiple of. Unlike those of matrices it cannot be told to the heuristic.
const BIAS_ALIGNMENT: u64 = 16;
/// The heuristic asks no more of a pointer.
const MAX_ALIGNMENT: u32 = 256;
/// Partial sums are added in f32, out of place: never in the type of the output.
const REDUCTION: u32 = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;

/// An open library.
pub(super) struct Blas {
    handle: sys::cublasLtHandle_t,
    workspace: CudaSpan,
    plans: RefCell<HashMap<Key, Option<Plan>>>,
}

/// What the choice of a kernel depends on.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Key {
    types: [DType; 2],
    shape: [usize; 3],
    /// Of a, b and c.
    ld: [usize; 3],
    /// a and b.
    transposed: [bool; 2],
    /// Of a, b, what is added, and c, in bytes.
    alignment: [u32; 4],
    bias: bool,
    adds: bool,
}

/// How one is multiplied.
struct Plan {
    desc: sys::cublasLtMatmulDesc_t,
    /// b, a, c
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    chosen: sys::cublasLtMatmulHeuristicResult_t,
}

fn failed(what: &'static str) -> impl Fn(CublasError) -> Error {
    move |e| Error::op("cuBLASLt", format!("{what}: {e}; --batch-invariant does without it"))
}

fn data_type(dtype: DType) -> sys::cudaDataType {
    match dtype {
        DType::F32 => sys::cudaDataType::CUDA_R_32F,
        DType::Bf16 => sys::cudaDataType::CUDA_R_16BF,
        DType::U32 => sys::cudaDataType::CUDA_R_32U,
    }
}

/// The largest power of two that divides the address, as far as it matters.
fn alignment(address: u64) -> u32 {
    (1 << address.trailing_zeros().min(MAX_ALIGNMENT.trailing_zeros())) as u32
}

impl Blas {
    /// With the end of the ops' workspace, where there is a library; the workspace that is left.
    pub fn open(workspace: CudaSpan) -> Result<(CudaSpan, Option<Self>)> {
        if libraries::cublaslt().is_err() {
            return Ok((workspace, None));
        }
        let handle = result::create_handle().map_err(failed("it does not start"))?;
        let bytes = (workspace.len() / WORKSPACE_SHARE).min(WORKSPACE_BYTES);
        let (rest, workspace) = {
            let at = (workspace.len() - bytes).next_multiple_of(ALIGN_BYTES).min(workspace.len());
            workspace.split(at)
        };
        Ok((rest, Some(Self { handle, workspace, plans: RefCell::default() })))
    }

    /// Puts a product into the stream, or says that it cannot be done here.
    pub fn product<T: Element, O: Element>(&self, context: &Context, p: &Product<T, O>) -> Result<bool> {
        let bias = p.bias.address();
        let unlike = bias != 0 && (T::DTYPE != O::DTYPE || !bias.is_multiple_of(BIAS_ALIGNMENT));
        if unlike || (p.accumulate && !p.residual.is_null()) || p.shape.contains(&0) {
            return Ok(false);
        }
        context.bind()?;
        let c = p.c.address();
        let added = if p.accumulate || p.residual.is_null() { c } else { p.residual.address() };
        let adds = p.accumulate || !p.residual.is_null();
        let (a, b) = (p.a.memory.address(), p.b.memory.address());
        let key = Key {
            types: [T::DTYPE, O::DTYPE],
            shape: p.shape,
            ld: [p.a.ld, p.b.ld, p.ldc],
            transposed: [p.a.transposed, p.b.transposed],
            alignment: [a, b, added, c].map(alignment),
            bias: bias != 0,
            adds,
        };
        let mut plans = self.plans.borrow_mut();
        if plans.len() >= MAX_PLANS {
            plans.clear();
        }
        let plan = match plans.get(&key) {
            Some(plan) => plan,
            None => {
                let plan = Plan::new(self.handle, &key, self.workspace.len())?;
                plans.entry(key).or_insert(plan)
            }
        };
        let Some(plan) = plan else { return Ok(false) };
        if bias != 0 {
            plan.set(Of::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias).map_err(failed("bias"))?;
        }
        let stream = context.stream.cast();
        plan.run(self, [b, a, added, c], [p.scale, f32::from(u8::from(adds))], stream).map_err(failed("a product"))?;
        Ok(true)
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        self.plans.borrow_mut().clear();
        // SAFETY: created by us; nobody uses it after this.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

/// A matrix [rows, cols] whose rows lie `ld` apart, as the library sees it: its transpose.
fn layout(dtype: DType, rows: usize, cols: usize, ld: usize) -> Result<sys::cublasLtMatrixLayout_t, CublasError> {
    result::create_matrix_layout(data_type(dtype), cols as u64, rows as u64, ld as i64)
}

impl Plan {
    /// `None` where the library has no kernel for it.
    fn new(handle: sys::cublasLtHandle_t, key: &Key, workspace: usize) -> Result<Option<Self>> {
        match Self::described(key).and_then(|mut plan| {
            plan.chosen = plan.choose(handle, key, workspace)?;
            Ok(plan)
        }) {
            Ok(plan) => Ok(Some(plan)),
            Err(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)) => Ok(None),
            Err(e) => Err(failed("a plan")(e)),
        }
    }

    fn described(key: &Key) -> Result<Self, CublasError> {
        let ([m, n, k], [from, to]) = (key.shape, key.types);
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let mut plan = Self {
            desc: result::create_matmul_desc(compute, sys::cudaDataType::CUDA_R_32F)?,
            layouts: [ptr::null_mut(); 3],
            // SAFETY: numbers, for which zero is as good as another until one is chosen.
            chosen: unsafe { std::mem::zeroed() },
        };
        let operand = |rows, cols, ld, transposed| match transposed {
            true => layout(from, cols, rows, ld),
            false => layout(from, rows, cols, ld),
        };
        plan.layouts[0] = operand(k, n, key.ld[1], key.transposed[1])?;
        plan.layouts[1] = operand(m, k, key.ld[0], key.transposed[0])?;
        plan.layouts[2] = layout(to, m, n, key.ld[2])?;
        // CUBLAS_OP_N and CUBLAS_OP_T.
        let op = |transposed: bool| i32::from(transposed);
        plan.set(Of::CUBLASLT_MATMUL_DESC_TRANSA, &op(key.transposed[1]))?;
        plan.set(Of::CUBLASLT_MATMUL_DESC_TRANSB, &op(key.transposed[0]))?;
        if key.bias {
            plan.set(Of::CUBLASLT_MATMUL_DESC_EPILOGUE, &sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS)?;
        }
        Ok(plan)
    }

    fn set<V>(&self, attribute: Of, value: &V) -> Result<(), CublasError> {
        // SAFETY: the description lives, and copies the value, which has the attribute's size.
        unsafe { result::set_matmul_desc_attribute(self.desc, attribute, ptr::from_ref(value).cast(), size_of::<V>()) }
    }

    fn choose(
        &self,
        handle: sys::cublasLtHandle_t,
        key: &Key,
        workspace: usize,
    ) -> Result<sys::cublasLtMatmulHeuristicResult_t, CublasError> {
        let preference = result::create_matmul_pref()?;
        // SAFETY: the preference lives until the end of this function, and copies values of its attributes' sizes.
        let set = |attribute, value: *const c_void, bytes| unsafe {
            result::set_matmul_pref_attribute(preference, attribute, value, bytes)
        };
        let number = |attribute, value: &u32| set(attribute, ptr::from_ref(value).cast(), size_of::<u32>());
        let [a, b, added, c] = key.alignment;
        let bytes = Preferred::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        let chosen = set(bytes, ptr::from_ref(&workspace).cast(), size_of::<usize>())
            .and_then(|()| number(Preferred::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &REDUCTION))
            .and_then(|()| number(Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &b))
            .and_then(|()| number(Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &a))
            .and_then(|()| number(Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &added))
            .and_then(|()| number(Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &c))
            .and_then(|()| {
                let [first, second, out] = self.layouts;
                // SAFETY: all of them live.
                unsafe { result::get_matmul_algo_heuristic(handle, self.desc, first, second, out, out, preference) }
            });
        // SAFETY: created above.
        unsafe { result::destroy_matmul_pref(preference) }?;
        chosen
    }

    fn run(
        &self,
        blas: &Blas,
        [b, a, added, c]: [u64; 4],
        [alpha, beta]: [f32; 2],
        stream: sys::cudaStream_t,
    ) -> Result<(), CublasError> {
        let [first, second, out] = self.layouts;
        let memory = |address: u64| address as *const c_void;
        // SAFETY: the matrices lie where the layouts say; alpha and beta are read before the call returns.
        unsafe {
            result::matmul(
                blas.handle,
                self.desc,
                ptr::from_ref(&alpha).cast(),
                ptr::from_ref(&beta).cast(),
                memory(b),
                first,
                memory(a),
                second,
                memory(added),
                out,
                memory(c).cast_mut(),
                out,
                &self.chosen.algo,
                memory(blas.workspace.address(0, blas.workspace.len())).cast_mut(),
                blas.workspace.len(),
                stream,
            )
        }
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: created by us, once each; nobody uses them after this.
        unsafe {
            let _ = result::destroy_matmul_desc(self.desc);
            for layout in self.layouts.into_iter().filter(|layout| !layout.is_null()) {
                let _ = result::destroy_matrix_layout(layout);
            }
        }
    }
}
