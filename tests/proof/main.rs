//! Proofs by machine, on the crate's own protocol, settlement rules and layers. See `docs/proof.md`.

mod model;
mod sim;
