//! The NBD front end: devices exported over a Unix socket, and the kernel's own client on them.
//!
//! From the bytes upwards: [`wire`] has the layouts, [`request`] judges requests, [`negotiation`]
//! and [`session`] are the two halves of a connection, [`wants`] is what it waits for from the backing
//! file, [`parked`] what it goes on without until that is there, [`protocol`] is a connection without its socket; [`worker`] moves the bytes with io_uring,
//! [`server`] accepts connections, [`exports`] says what there is to connect to. [`kernel`] attaches the
//! kernel's client, which is told what to do by [`netlink`].
//!
//! Unix sockets only. Under memory pressure the kernel drops packets for a TCP server on the same
//! machine, the very packets that would free memory; and nothing of NBD is authenticated.

mod address;
mod buffer;
mod exports;
mod kernel;
mod negotiation;
mod netlink;
mod parked;
mod protocol;
mod reply;
mod request;
mod ring;
mod server;
mod session;
mod wants;
#[allow(missing_docs, reason = "they are the specification's names")]
mod wire;
mod worker;

pub use address::{AddressError, NbdAddress};
pub use exports::{Export, Exports};
pub use kernel::{CONNECTION_DEPTH, KernelClient, KernelError, check_reserve};
pub use negotiation::transmission_flags;
pub use netlink::{Netlink, NetlinkError};
pub use protocol::{AGREED_BYTES, Progress, Protocol};
pub use server::{NbdServer, NbdServerError, NoSeat, Purpose, Seat};
pub use worker::EngineSide;
