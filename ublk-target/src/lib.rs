//! Transcendent memory: the daemon that serves the engine as block devices, and its user's side.
//!
//! The binary `tmem` is this library and a page of `main`. The user's side is the command line
//! ([`cli`]), the configuration ([`config`]), the control plane ([`control`]), what is printed
//! ([`output`]) and how it ends ([`exit`]); [`service`] is where it meets the [`daemon`].
#![deny(unsafe_code)]

mod attachment;
pub mod backing;
pub mod bytes;
pub mod cli;
pub mod commands;
pub mod config;
pub mod control;
pub mod daemon;
pub mod device;
pub mod doctor;
pub mod exit;
pub mod freed;
pub mod handover;
mod hold;
pub mod inherited;
mod log;
pub mod logger;
mod module;
pub mod nbd;
pub mod notes;
mod notify;
pub mod output;
pub mod process;
mod program;
pub mod service;
pub mod signals;
pub mod size;
pub mod socket;
pub mod standby;
pub mod supervisor;
pub mod supply;
pub mod swap;
pub mod table;
pub mod ublk;
mod uring;
pub mod waker;
pub mod watchdog;
pub mod worker;
