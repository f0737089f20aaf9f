//! A server with its engine and its exports, on a socket of its own.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tmem::{Config, Engine};
use tmem_ublk_target::backing::Backing;
use tmem_ublk_target::device::BlockDevice;
use tmem_ublk_target::nbd::{EngineSide, Export, NbdAddress, NbdServer, NoSeat, Purpose};
use tmem_ublk_target::socket::Listener;
use tmem_ublk_target::supply::Supply;

/// Places for connections that the smallest server has.
pub const PLACES: usize = 8;

/// An export to be: its name, its pages, whether it offers FLUSH.
pub type Plan = (&'static str, u64, bool);

/// The export of most tests.
pub const SWAP0: Plan = ("swap0", 1024, true);

/// Memory of most pools: it is all there from the start, for one step of the supply brings it.
pub const ROOM: u64 = 1 << 20;

/// See the module's description.
pub struct Served {
    // In the order in which they go.
    server: Option<NbdServer>,
    pub exports: Vec<Arc<Export>>,
    _supply: Supply,
    socket: PathBuf,
    _home: tempfile::TempDir,
}

impl Served {
    /// A server with [`SWAP0`] and nothing else.
    pub fn start() -> Self {
        Self::with(&[SWAP0], ROOM, 1)
    }

    /// A server with such exports, on an engine with so many bytes of room, with so many workers.
    pub fn with(plans: &[Plan], room: u64, workers: usize) -> Self {
        let limit = Config::limit_min(1) + room;
        let config = Config { limit, limit_max: limit, shards: 1 };
        let engine = Arc::new(Engine::new(&config).unwrap());
        while engine.supply().unwrap().more {}
        let backing = Arc::new(Backing::new().unwrap());
        Self::on(engine, backing, plans, workers)
    }

    /// A server with such exports on this engine, and on what there is of a backing file.
    pub fn on(engine: Arc<Engine>, backing: Arc<Backing>, plans: &[Plan], workers: usize) -> Self {
        let supply = Supply::start(Arc::clone(&engine)).unwrap();
        let home = tempfile::tempdir().unwrap();
        let socket = home.path().join("nbd.sock");
        let address: NbdAddress = format!("unix:{}", socket.display()).parse().unwrap();
        let waker = Arc::clone(supply.waker());
        let side = EngineSide { waker, backing };
        let listener = Listener::bind(&socket, "--nbd").unwrap();
        let server = NbdServer::prepare(&address, &side, workers, 0, Purpose::Clients).unwrap();
        server.begin(&engine);
        server.listen(listener);
        let exports = plans.iter().map(|&(name, pages, flush)| {
            let device = BlockDevice::new(Arc::clone(&engine), pages).unwrap();
            let export = Export::new(name, Arc::new(device), server.workers(), flush);
            let export = Arc::new(export);
            server.add(Arc::clone(&export));
            export
        });
        let exports = exports.collect();
        Self { server: Some(server), exports, _supply: supply, socket, _home: home }
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    pub fn server(&self) -> &NbdServer {
        self.server.as_ref().unwrap()
    }

    /// A client of an export that has been given a place, and does not negotiate.
    pub fn seated(&self, export: &Arc<Export>) -> Result<UnixStream, NoSeat> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        self.server().seat(export)?.take(ours.into(), None);
        Ok(theirs)
    }

    /// Ends the server, and all connections with it.
    pub fn stop(&mut self) {
        drop(self.server.take());
    }
}

/// Bytes that do not compress, others for another seed.
pub fn noise(bytes: usize, seed: u64) -> Vec<u8> {
    let mut state = seed << 1 | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 24) as u8
    };
    std::iter::repeat_with(next).take(bytes).collect()
}
