//! What the conversations are with: three exports, and what is on them at the start of each.
//!
//! Everything is made once in a process. The first two exports have memory for all their pages; the
//! third has an engine to which nobody brings any, so that writes to it wait and fail.

use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use tmem::{Config, Engine, PAGE_SIZE};
use tmem_ublk_target::bytes::{Part, Stored};
use tmem_ublk_target::device::{BlockDevice, Op, Outcome, Request};
use tmem_ublk_target::nbd::{Export, Exports};

/// Pages of each export: more than fit into one reply's chunk.
pub const PAGES: u64 = 64;
/// Bytes of each export.
pub const BYTES: usize = PAGES as usize * PAGE_SIZE;

/// The export that offers FLUSH.
pub const FLUSHED: &[u8] = b"swap0";
/// The export that does not.
pub const PLAIN: &[u8] = b"swap1";
/// The export without memory.
pub const DRY: &[u8] = b"dry";

/// A page that is lost at the start of each conversation.
pub const LOST_PAGE: u64 = 40;

/// See the module's description.
pub struct Fixture {
    pub exports: Arc<Exports>,
    list: Vec<Listed>,
}

/// An export, and how many requests had changed it when it was last as it should be.
struct Listed {
    export: Arc<Export>,
    changes: u64,
}

/// The fixture, with its exports as they are at the start of a conversation. One at a time has it.
pub fn fixture() -> MutexGuard<'static, Fixture> {
    static FIXTURE: LazyLock<Mutex<Fixture>> = LazyLock::new(|| Mutex::new(Fixture::new()));
    let mut fixture = FIXTURE.lock().unwrap_or_else(PoisonError::into_inner);
    fixture.list.iter_mut().for_each(Listed::reset);
    fixture
}

impl Fixture {
    fn new() -> Self {
        let (wet, dry) = (engine(), engine());
        while wet.supply().expect("there is memory for a small pool").more {}
        let exports = Arc::new(Exports::default());
        let list = [(FLUSHED, &wet, true), (PLAIN, &wet, false), (DRY, &dry, true)];
        let list = list.map(|(name, engine, flush)| {
            let name = str::from_utf8(name).expect("it is ASCII");
            let device = BlockDevice::new(Arc::clone(engine), PAGES).expect("there is room");
            let export = Arc::new(Export::new(name, Arc::new(device), 1, flush));
            exports.add(Arc::clone(&export));
            Listed { export, changes: u64::MAX }
        });
        Self { exports, list: list.into() }
    }

    /// How many connections use an export.
    pub fn visitors(&self) -> u32 {
        self.list.iter().map(|it| it.export.visitors()).sum()
    }
}

/// Pages with contents, few because each costs a fuzzer more than all the rest: at the start, at the
/// edge of what a chunk holds, and beside what is lost.
const WRITTEN_PAGES: [u64; 4] = [0, 1, 32, LOST_PAGE + 1];

/// What is on an export at the start of a conversation.
pub fn contents() -> &'static [u8] {
    static CONTENTS: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let mut bytes = vec![0; BYTES];
        for page in WRITTEN_PAGES {
            // It tells one page from another and one place in a page from another.
            for (at, byte) in bytes[page as usize * PAGE_SIZE..][..PAGE_SIZE].iter_mut().enumerate()
            {
                *byte = (at / 16) as u8 ^ (at % 7) as u8 ^ page as u8;
            }
        }
        bytes
    });
    &CONTENTS
}

fn engine() -> Arc<Engine> {
    let limit = Config::limit_min(1) + 4 * BYTES as u64;
    let config = Config { limit, limit_max: limit, shards: 1 };
    Arc::new(Engine::new(&config).expect("there is memory for a small pool"))
}

impl Listed {
    fn reset(&mut self) {
        let stats = self.export.io_stats();
        let changes = stats.writes + stats.discards;
        if self.changes != changes {
            fill(&self.export);
            self.changes = changes;
        }
    }
}

/// Makes an export what it is at the start of a conversation.
fn fill(export: &Export) {
    let device = export.device();
    let mut queue = export.queue(0);
    let drop_all = Request::new(Op::Discard, 0, PAGES as u32);
    assert_eq!(device.carry_out(&drop_all), Outcome::Done(0));
    if export.name().as_bytes() == DRY {
        return;
    }
    for page in WRITTEN_PAGES {
        let bytes = &contents()[page as usize * PAGE_SIZE..][..PAGE_SIZE];
        assert_eq!(device.write_part(&mut queue, &whole(page), bytes), Stored::Done, "page {page}");
    }
    device.lose_at(&whole(LOST_PAGE));
}

fn whole(page: u64) -> Part {
    Part::first(page * PAGE_SIZE as u64, PAGE_SIZE as u64)
}
