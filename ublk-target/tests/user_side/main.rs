//! The user's side from end to end, with real sockets, real signals and the real binary; only the
//! devices are missing.
#![allow(clippy::unwrap_used, reason = "a test fails by a panic")]

mod commands;
mod control;
mod doctor;
mod fake;
mod handover;
mod run;
