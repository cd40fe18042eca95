//! What a server does to a store: killed backends, standbys, other transactions, poolers.
