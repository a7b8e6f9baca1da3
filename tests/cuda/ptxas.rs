//! What the kernels take of a multiprocessor, as ptxas says it: registers, shared memory, spills. A change is seen in
//! review: `CUVEE_BLESS=1 cargo test --release --test cuda -- ptxas` writes kernels/ptxas.txt anew.

use std::fs;
use std::path::PathBuf;

use cuvee::device::cuda::{RESOURCES, kernels};

use crate::child::ignore;
use crate::{Body, Case, Mode};

/// The compiler of the snapshot.
const NVCC: &str = "13.0.88";

fn snapshot() {
    match kernels::NVCC {
        None => ignore("this build has no nvcc; .ci/get-nvcc fetches one"),
        Some(NVCC) => {}
        Some(other) => ignore(&format!("nvcc is {other}, the snapshot was made with {NVCC}")),
    }
    let root = std::env::var_os("CUVEE_TEST_ROOT").map_or(PathBuf::from("."), PathBuf::from);
    let path = root.join("kernels/ptxas.txt");
    if std::env::var_os("CUVEE_BLESS").is_some() {
        return fs::write(&path, RESOURCES).unwrap();
    }
    let kept = fs::read_to_string(&path).unwrap();
    let new = RESOURCES.lines().filter(|line| !kept.lines().any(|old| old == *line));
    let new: Vec<&str> = new.take(20).collect();
    assert!(kept == RESOURCES, "kernels take other resources than kernels/ptxas.txt says:\n{}", new.join("\n"));
}

pub fn all() -> Vec<Case> {
    vec![Case { name: "ptxas".into(), modes: &[Mode::Plain], bug: None, body: Body::Alone(Box::new(snapshot)) }]
}
