//! The NBD front end from end to end: the real server in this process, on a real socket, and clients
//! that know the protocol from its specification alone.
#![allow(clippy::unwrap_used, reason = "a test fails by a panic")]

mod backed;
#[path = "../../../tests/support/backing.rs"]
mod backing;
mod client;
mod closing;
mod commands;
mod contexts;
mod corpus;
mod crowd;
#[path = "../../../tests/fuzz/src/lib.rs"]
mod fuzzing;
mod handshake;
mod information;
mod large;
mod lost;
mod malformed;
mod model;
mod refused;
mod seated;
mod seeds;
mod served;
mod slow;
mod stream;
mod watchdog;
mod written_back;
