//! The nodes of the devices that a process may have to go on with when another dies: all that they need but the kernel's word.
//!
//! What there is here was there when the process began to wait; a device that came since gets what it needs when it is gone on with.

use std::sync::Arc;
use std::thread::available_parallelism;

use tmem::Store;

use super::error::DaemonError;
use super::successor::{HELPER_BYTES, cannot};
use super::system;
use crate::attachment::{Attachment, Node};
use crate::backing::Backing;
use crate::device::BlockDevice;
use crate::nbd::{AGREED_BYTES, KernelClient, KernelError, Netlink};
use crate::notes::{NodeNote, Notes};
use crate::ublk::{Draft, QueuePlan, Room, Served, ServerError, Started, Way, helpers_for};
use crate::waker::Waker;

/// What a queue takes of the heap: its codec, and room for blocks that it reads from the backing file.
const QUEUE_BYTES: usize = 768 << 10;

/// What the kernel's NBD connection takes: its buffers, the reads that it parks, and room for what it reads from the backing file.
const CONNECTION_BYTES: usize = AGREED_BYTES + (256 << 10);

/// See the module's description.
pub(super) struct Nodes {
    store: Store,
    /// Each for one device: its buffers are in the room of that pool, and its queues are those of that node.
    drafts: Vec<(u16, NodeNote, Draft)>,
    /// Devices of the kernel's NBD client.
    connections: usize,
    /// For these, if there are any.
    netlink: Option<Arc<Netlink>>,
    waker: Arc<Waker>,
    backing: Arc<Backing>,
}

/// A node with which is gone on.
pub(super) enum Begun {
    /// A ublk device of that number.
    Ublk(u32, Draft),
    /// The kernel's NBD client.
    Nbd(KernelClient),
}

impl Nodes {
    /// Gets what the devices of these notes need.
    pub(super) fn prepare(
        store: &Store,
        notes: &Notes,
        waker: &Arc<Waker>,
        backing: &Arc<Backing>,
    ) -> Result<Self, DaemonError> {
        let (mut drafts, mut connections) = (Vec::new(), 0);
        for note in &notes.devices {
            match note.node {
                Some(node @ NodeNote::Ublk { queues, depth, .. }) => {
                    let room = Room { store: store.clone(), pool: note.pool };
                    let draft = Draft::new(QueuePlan { queues, depth }, room, true)?;
                    drafts.push((note.pool, node, draft));
                }
                Some(NodeNote::Nbd { .. }) => connections += 1,
                None => {}
            }
        }
        let netlink = (connections > 0).then(Netlink::open).transpose();
        let netlink = netlink.map_err(KernelError::from)?.map(Arc::new);
        let (waker, backing) = (Arc::clone(waker), Arc::clone(backing));
        Ok(Self { store: store.clone(), drafts, connections, netlink, waker, backing })
    }

    /// What they will take of the heap.
    pub(super) fn heap_bytes(&self) -> Result<usize, DaemonError> {
        let helpers = helpers_for(available_parallelism().map_err(system("count the CPUs"))?.get());
        let queues: usize =
            self.drafts.iter().map(|(_, _, draft)| usize::from(draft.plan().queues)).sum();
        Ok(queues * QUEUE_BYTES
            + self.drafts.len() * helpers * HELPER_BYTES
            + self.connections * CONNECTION_BYTES)
    }

    /// Begins to go on with a node: of ublk there is much to do in the kernel, for all devices at the same time.
    pub(super) fn begin(&mut self, node: NodeNote, block: &Arc<BlockDevice>) -> Begun {
        let (id, queues, depth) = match node {
            NodeNote::Nbd { number, id } => {
                let netlink = self.netlink.clone();
                let netlink = netlink.map_or_else(|| Netlink::open().map(Arc::new), Ok);
                let netlink = netlink.unwrap_or_else(|error| cannot("go on", &error));
                return Begun::Nbd(KernelClient::of(number, id, netlink));
            }
            NodeNote::Ublk { id, queues, depth } => (id, queues, depth),
        };
        let pool = block.pool().number();
        let room = || Room { store: self.store.clone(), pool };
        let is_its = |(its, other, _): &(u16, NodeNote, Draft)| *its == pool && *other == node;
        let draft = match self.drafts.iter().position(is_its) {
            Some(at) => self.drafts.swap_remove(at).2,
            // It was made after us, though others may have had its number or its pool.
            None => Draft::new(QueuePlan { queues, depth }, room(), true)
                .unwrap_or_else(|error| cannot("go on", &error)),
        };
        let served = Served {
            device: Arc::clone(block),
            waker: Arc::clone(&self.waker),
            backing: Arc::clone(&self.backing),
        };
        draft.begin(served, Way::Recover(id));
        Begun::Ublk(id, draft)
    }

    /// Goes on with a node, and I/O to it; none if it is gone.
    pub(super) fn finish(&mut self, begun: Begun, exported: &Attachment) -> Option<Node> {
        match begun {
            Begun::Ublk(id, draft) => match draft.finish(Way::Recover(id)) {
                Ok(Started::Live(server)) => Some(Node::Ublk(server)),
                Err(ServerError::Gone) => None,
                Ok(Started::Taken(_)) => cannot("go on", &"the device is another's"),
                Err(error) => cannot("go on", &error),
            },
            Begun::Nbd(client) => match exported.reconnect_kernel(&client) {
                Ok(()) => Some(Node::Nbd(client)),
                Err(KernelError::Gone { .. }) => None,
                Err(error) => cannot("go on", &error),
            },
        }
    }
}
