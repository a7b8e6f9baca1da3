//! Ops on the GPU against the f64 reference.

use cuvee::device::{Arena, Cuda, DType, Device, Kind, Philox, Reference, Tensor};
use cuvee::ops::{Backend, rms_norm};

use crate::Case;

/// A device's tensor with standard normal numbers, other ones for every name, rounded to bfloat16 so that every device
/// holds the same.
fn tensor<D: Device>(device: &D, dtype: DType, name: &str, [rows, cols]: [usize; 2]) -> Tensor<D> {
    let mut arena = Arena::with_bytes(device, Arena::<D>::bytes_of(dtype, rows, cols)).unwrap();
    let mut tensor = arena.take(Kind::Activations, dtype, rows, cols);
    let random = Philox::named(1, name);
    let number = |i| f64::from(half::bf16::from_f32(random.normal(i as u64) as f32).to_f32());
    let values: Vec<f64> = (0..rows * cols).map(number).collect();
    device.write_f64(&values, tensor.view_mut()).unwrap();
    tensor
}

fn read<D: Device>(device: &D, tensor: &Tensor<D>) -> Vec<f64> {
    let mut values = vec![0.0; tensor.len()];
    device.read_f64(tensor.view(), &mut values).unwrap();
    values
}

fn forward<D: Backend>(device: &D, storage: DType, [rows, hidden]: [usize; 2]) -> [Vec<f64>; 2] {
    let x = tensor(device, storage, "x", [rows, hidden]);
    let weight = tensor(device, storage, "weight", [1, hidden]);
    let mut y = tensor(device, storage, "y", [rows, hidden]);
    let mut rstd = tensor(device, DType::F32, "rstd", [rows, 1]);
    let arguments =
        rms_norm::Forward { x: x.view(), weight: weight.view(), eps: 1e-2, y: y.view_mut(), rstd: rstd.view_mut() };
    device.rms_norm(arguments).unwrap_or_else(|e| panic!("{e}"));
    [read(device, &y), read(device, &rstd)]
}

fn rms_norm(cuda: &Cuda) {
    let storage = cuda.storage();
    for shape in [[1, 1], [3, 31], [47, 123], [2, 507]] {
        let (found, oracle) = (forward(cuda, storage, shape), forward(&Reference, DType::F32, shape));
        let close = if storage == DType::Bf16 { [1.0 / 128.0, 1e-6] } else { [1e-6, 1e-6] };
        for ((found, oracle), close) in found.iter().zip(&oracle).zip(close) {
            let size = oracle.iter().fold(0.0f64, |m, x| m.max(x.abs()));
            let wrong = found.iter().zip(oracle).position(|(x, y)| !((x - y).abs() <= close * size));
            assert_eq!(wrong, None, "{shape:?}: {found:?}, {oracle:?}");
        }
        assert_eq!(found, forward(cuda, storage, shape), "another result of another order of threads");
    }
}

pub fn all() -> Vec<Case> {
    vec![Case::new("rms_norm::f32", DType::F32, rms_norm), Case::new("rms_norm::bf16", DType::Bf16, rms_norm)]
}
