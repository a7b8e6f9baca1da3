use crate::Case;

pub fn all() -> Vec<Case> {
    Vec::new()
}
