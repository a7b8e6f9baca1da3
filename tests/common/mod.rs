//! What several test targets run: ops as values with their awkward shapes, the closeness rule, tiny models. A target
//! includes it by its path and uses all of it.

pub mod case;
pub mod checks;
pub mod kl;
pub mod ops;
pub mod rollouts;
pub mod tiny;
