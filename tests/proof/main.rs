//! Proofs of the promises, on the crate's own protocol and settlement rules. See `docs/proof.md`.

mod sim;
