//! How a device is reached: by ublk, by NBD, or by both.
//!
//! One device has at most one node (`/dev/ublkbN`, `/dev/nbdN`), and at most one export. The engine
//! does not know of either, and the daemon knows no more than what is here.

use std::fs::File;
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tmem::NotesError;

use crate::device::{BlockDevice, IoStats};
use crate::nbd::{
    CONNECTION_DEPTH, Export, KernelClient, KernelError, NbdServer, transmission_flags,
};
use crate::ublk::{QueuePlan, ServerError, UblkServer};

/// How long connections may take to end once the kernel has let go of them, and how often to look.
const END_LIMIT: Duration = Duration::from_secs(5);
const LOOK_PERIOD: Duration = Duration::from_millis(10);

/// Why a device could not be detached. It goes on as before.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DetachError {
    /// Clients are connected.
    #[error("NBD clients are connected to it ({connections} connections): disconnect them first")]
    Clients {
        /// Their connections.
        connections: u32,
    },
    /// The kernel's client.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The ublk driver.
    #[error(transparent)]
    Ublk(#[from] ServerError),
}

/// What stands between the kernel and a device.
pub enum Node {
    /// A ublk block device.
    Ublk(UblkServer),
    /// The kernel's NBD client on the device's export.
    Nbd(KernelClient),
}

impl Node {
    fn path(&self) -> &str {
        match self {
            Node::Ublk(server) => server.path(),
            Node::Nbd(client) => client.path(),
        }
    }

    fn has_ended(&self) -> bool {
        match self {
            Node::Ublk(server) => server.has_ended(),
            Node::Nbd(client) => client.has_ended(),
        }
    }
}

/// Whether a device's node can be used.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceState {
    /// It can, or there is none.
    #[default]
    Live,
    /// Somebody else has removed it, or ended its NBD connection for good.
    Dead,
}

impl DeviceState {
    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Live => "live",
            Self::Dead => "dead",
        }
    }
}

/// See the module's description.
pub struct Attachment {
    node: Option<Node>,
    export: Option<(Arc<NbdServer>, Arc<Export>)>,
}

impl Attachment {
    /// A device that is reached by nothing.
    pub fn none() -> Self {
        Self { node: None, export: None }
    }

    /// A device that is reached by its node alone.
    pub fn new(node: Node) -> Self {
        Self { node: Some(node), export: None }
    }

    /// Exports a device under `name`; it has no node yet.
    pub fn export(
        server: &Arc<NbdServer>,
        name: &str,
        device: Arc<BlockDevice>,
        flush: bool,
    ) -> Self {
        let export = Arc::new(Export::new(name, device, server.workers(), flush));
        server.add(Arc::clone(&export));
        Self { node: None, export: Some((Arc::clone(server), export)) }
    }

    /// Has the kernel's client make the device's node. `note` is told of what is being made: [`KernelClient::attach`].
    ///
    /// # Panics
    ///
    /// If the device is not exported.
    pub fn connect_kernel(
        &self,
        note: impl FnMut(u32, u64) -> Result<(), NotesError>,
    ) -> Result<KernelClient, KernelError> {
        let (server, export) = self.exported();
        let seat = server.seat(export)?;
        let flags = transmission_flags(export, false);
        let (client, socket) = KernelClient::attach(export.device().bytes(), flags, note)?;
        seat.take(socket, Some(&client));
        Ok(client)
    }

    /// Gives the kernel's client, whose connection has ended, another one.
    ///
    /// # Panics
    ///
    /// If the device is not exported.
    pub fn reconnect_kernel(&self, client: &KernelClient) -> Result<(), KernelError> {
        let (server, export) = self.exported();
        let seat = server.seat(export)?;
        seat.take(client.reconnect()?, Some(client));
        Ok(())
    }

    fn exported(&self) -> (&NbdServer, &Arc<Export>) {
        let (server, export) = self.export.as_ref().expect("the kernel's client has an export");
        (server, export)
    }

    /// Waits a while for connections to end that the kernel has let go of.
    pub fn settle(&self) {
        let deadline = Instant::now() + END_LIMIT;
        while self.connections() > 0 && Instant::now() < deadline {
            sleep(LOOK_PERIOD);
        }
    }

    /// The same device with a node.
    pub fn with_node(self, node: Node) -> Self {
        Self { node: Some(node), ..self }
    }

    /// Its node, if it has one.
    pub fn node(&self) -> Option<&str> {
        self.node.as_ref().map(Node::path)
    }

    /// Its node, if that is one of ublk and nothing else leads to the device: what the kernel does with it is all that is
    /// done to the device.
    pub fn only_node(&self) -> Option<&str> {
        match (&self.node, &self.export) {
            (Some(Node::Ublk(server)), None) => Some(server.path()),
            _ => None,
        }
    }

    /// Whether its node is the kernel's NBD client.
    pub fn has_nbd_node(&self) -> bool {
        matches!(self.node, Some(Node::Nbd(_)))
    }

    /// True once its node is gone though nobody told us to remove it.
    pub fn node_has_ended(&self) -> bool {
        self.node.as_ref().is_some_and(Node::has_ended)
    }

    /// Whether its node can be used. One whose NBD connection has ended can: it waits for the next.
    pub fn state(&self) -> DeviceState {
        match self.node_has_ended() {
            true => DeviceState::Dead,
            false => DeviceState::Live,
        }
    }

    /// The URI of its export, if it has one.
    pub fn uri(&self) -> Option<String> {
        self.export.as_ref().map(|(server, export)| server.address().uri(export.name()))
    }

    /// Where it is reached first of all: its node, or else its export.
    pub fn path(&self) -> String {
        self.node().map(str::to_owned).or_else(|| self.uri()).unwrap_or_default()
    }

    /// NBD connections that use it, the kernel's included.
    pub fn connections(&self) -> u32 {
        self.export.as_ref().map_or(0, |(_, export)| export.visitors())
    }

    /// Queues of its node, and requests that each holds.
    pub fn queues(&self) -> (u32, u32) {
        match &self.node {
            None => (0, 0),
            Some(Node::Ublk(server)) => (server.queues().into(), server.depth().into()),
            Some(Node::Nbd(_)) => (1, CONNECTION_DEPTH),
        }
    }

    /// The queues for which it has I/O buffers of ublk's budget.
    pub fn plan(&self) -> Option<QueuePlan> {
        match &self.node {
            Some(Node::Ublk(server)) => {
                Some(QueuePlan { queues: server.queues(), depth: server.depth() })
            }
            _ => None,
        }
    }

    /// What was done by way of all of it.
    pub fn io_stats(&self) -> IoStats {
        let mut sum = self.export.as_ref().map_or_else(IoStats::default, |(_, e)| e.io_stats());
        if let Some(Node::Ublk(server)) = &self.node {
            sum.add(&server.io_stats());
        }
        sum
    }

    /// Detaches the device from all that reaches it, or, if somebody uses it, from nothing. `claim`
    /// is held on the node until it is gone. May be tried again after an error.
    pub fn detach(&self, claim: Option<File>) -> Result<(), DetachError> {
        // First of all nobody new can come.
        self.check_clients(self.kernels_connections())?;
        let stopped = match &self.node {
            None => Ok(()),
            Some(Node::Ublk(server)) => match server.stop(claim) {
                // Somebody else removed it: it is gone, which is what was wanted.
                Err(_) if server.has_ended() => Ok(()),
                result => result.map_err(DetachError::from),
            },
            Some(Node::Nbd(client)) => client.detach(claim).map_err(DetachError::from),
        };
        if stopped.is_err() {
            self.reopen();
            return stopped;
        }
        if self.kernels_connections() > 0 {
            self.settle();
        }
        self.check_clients(0)?;
        if let Some((server, export)) = &self.export {
            server.remove(export);
        }
        Ok(())
    }

    /// Connections that are ours to end.
    fn kernels_connections(&self) -> u32 {
        match &self.node {
            Some(Node::Nbd(_)) => 1,
            _ => 0,
        }
    }

    /// Keeps new NBD clients out, if there are no more than so many; else those that there are stay,
    /// and new ones may come.
    fn check_clients(&self, most: u32) -> Result<(), DetachError> {
        let connections = self.export.as_ref().map_or(0, |(_, export)| export.close());
        if connections > most {
            self.reopen();
            return Err(DetachError::Clients { connections });
        }
        Ok(())
    }

    fn reopen(&self) {
        if let Some((_, export)) = &self.export {
            export.reopen();
        }
    }
}
