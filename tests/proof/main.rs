//! Proofs by machine: what no list of cases would come upon.

mod sim;
