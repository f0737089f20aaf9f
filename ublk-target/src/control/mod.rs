//! The control plane: how a running daemon is asked to add, remove, list and report.
//!
//! A client connects to the daemon's Unix socket, writes one request as a line of JSON, reads one
//! response line, and is done. Nothing here is on the way of any page: the server may be slow,
//! busy or stuck without a device noticing.

mod client;
mod operations;
mod protocol;
mod report;
mod server;

pub use client::{Client, ClientError};
pub use operations::Operations;
pub use protocol::{REQUEST_MAX, RESPONSE_MAX, Request, VERSION};
pub use report::{REPORT_VERSION, report};
pub use server::{CLIENTS_MAX, Server};

/// Where the control socket is unless the user says otherwise.
pub const DEFAULT_SOCKET: &str = "/run/tmem/control.sock";
