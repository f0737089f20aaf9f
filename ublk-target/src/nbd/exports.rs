//! The exports: which devices clients may use, under which names, and who does.
//!
//! An export that is closed takes no more visitors, and it is removed only when it has none: that is
//! how a device is never pulled away from under a client. Nothing here allocates once an export is
//! there; the locks are the standard library's because those never do, not even to wait.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tmem::POOLS_MAX;

use crate::device::{BlockDevice, IoCounters, IoStats};

/// Set in an export's count of visitors once it is closed.
const CLOSED: u32 = 1 << 31;

/// A device under a name.
pub struct Export {
    name: String,
    device: Arc<BlockDevice>,
    flush: bool,
    visitors: AtomicU32,
    workers: Box<[PerWorker]>,
}

/// What a worker thread serves an export with; each has its own, so that nobody waits for a lock.
struct PerWorker {
    queue: Mutex<tmem::Queue>,
    counters: IoCounters,
}

impl Export {
    /// An export for so many workers. Whether it offers FLUSH is no promise either way: there is
    /// no volatile cache.
    pub fn new(name: &str, device: Arc<BlockDevice>, workers: usize, flush: bool) -> Self {
        let per_worker =
            || PerWorker { queue: Mutex::new(device.queue()), counters: IoCounters::default() };
        let workers = std::iter::repeat_with(per_worker).take(workers).collect();
        Self { name: name.to_owned(), device, flush, visitors: AtomicU32::new(0), workers }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The device.
    pub fn device(&self) -> &BlockDevice {
        &self.device
    }

    /// Whether it offers FLUSH and FUA.
    pub fn offers_flush(&self) -> bool {
        self.flush
    }

    /// The engine queue of a worker.
    pub fn queue(&self, worker: usize) -> MutexGuard<'_, tmem::Queue> {
        lock(&self.workers[worker].queue)
    }

    /// The counters of a worker.
    pub fn counters(&self, worker: usize) -> &IoCounters {
        &self.workers[worker].counters
    }

    /// What all workers did.
    pub fn io_stats(&self) -> IoStats {
        let mut sum = IoStats::default();
        self.workers.iter().for_each(|worker| worker.counters.add_to(&mut sum));
        sum
    }

    /// How many connections use it.
    pub fn visitors(&self) -> u32 {
        self.visitors.load(Ordering::Acquire) & !CLOSED
    }

    /// Closes it, so that nobody can begin to use it, and says how many connections use it still.
    pub fn close(&self) -> u32 {
        self.visitors.fetch_or(CLOSED, Ordering::AcqRel) & !CLOSED
    }

    /// Opens it again.
    pub fn reopen(&self) {
        self.visitors.fetch_and(!CLOSED, Ordering::AcqRel);
    }

    fn is_open(&self) -> bool {
        self.visitors.load(Ordering::Acquire) & CLOSED == 0
    }

    fn admit(&self) -> bool {
        let one_more = |visitors| (visitors & CLOSED == 0).then_some(visitors + 1);
        self.visitors.fetch_update(Ordering::AcqRel, Ordering::Acquire, one_more).is_ok()
    }
}

/// A connection's use of an export, from the end of the negotiation until it leaves or is dropped.
pub struct Visit {
    export: Arc<Export>,
    has_left: bool,
}

impl Visit {
    /// Begins one, unless the export is closed.
    pub fn begin(export: &Arc<Export>) -> Option<Self> {
        export.admit().then(|| Self { export: Arc::clone(export), has_left: false })
    }

    /// What is used.
    pub fn export(&self) -> &Export {
        &self.export
    }

    /// Ends the use. What the export holds is freed, if nobody else has it, only when this is dropped.
    pub fn leave(&mut self) {
        if !std::mem::replace(&mut self.has_left, true) {
            self.export.visitors.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        self.leave();
    }
}

/// All exports of a server.
pub struct Exports {
    list: Mutex<Vec<Arc<Export>>>,
}

impl Default for Exports {
    fn default() -> Self {
        // Each has a pool, so that this is never too small, and no worker waits for memory that is
        // got under the lock.
        Self { list: Mutex::new(Vec::with_capacity(POOLS_MAX)) }
    }
}

impl Exports {
    /// Adds an export.
    pub fn add(&self, export: Arc<Export>) {
        let mut list = lock(&self.list);
        assert!(list.len() < POOLS_MAX, "more exports than pools");
        assert!(list.iter().all(|other| other.name != export.name), "two exports of one name");
        list.push(export);
    }

    /// Removes an export.
    pub fn remove(&self, export: &Arc<Export>) {
        let mut list = lock(&self.list);
        let at = list.iter().position(|other| Arc::ptr_eq(other, export));
        let removed = at.map(|at| list.remove(at));
        // What else it frees is not for the lock to wait for.
        drop(list);
        drop(removed);
    }

    /// Calls `look` with the export that `name` means, unless it is closed: the one of that name, or
    /// with an empty name the only one there is.
    pub fn with<T>(&self, name: &[u8], look: impl FnOnce(&Export) -> T) -> Option<T> {
        let list = lock(&self.list);
        find(&list, name).filter(|export| export.is_open()).map(|export| look(export))
    }

    /// Begins a visit to the export that `name` means, unless it is closed.
    pub fn visit(&self, name: &[u8]) -> Option<Visit> {
        let list = lock(&self.list);
        find(&list, name).and_then(Visit::begin)
    }

    /// Calls `look` with each export.
    pub fn for_each(&self, look: impl FnMut(&Export)) {
        lock(&self.list).iter().map(AsRef::as_ref).for_each(look);
    }
}

/// Locks. A thread that panics with one of these locks ends the process.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn find<'a>(list: &'a [Arc<Export>], name: &[u8]) -> Option<&'a Arc<Export>> {
    match list {
        [only] if name.is_empty() => Some(only),
        list => list.iter().find(|export| export.name.as_bytes() == name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::tests::device;

    fn export(name: &str) -> Arc<Export> {
        let (device, _) = device(1 << 20);
        Arc::new(Export::new(name, Arc::new(device), 1, true))
    }

    #[test]
    fn names_find_their_exports_and_no_name_the_only_one() {
        let exports = Exports::default();
        let name = |asked: &[u8]| exports.with(asked, |export| export.name().to_owned());
        assert_eq!(name(b""), None);
        exports.add(export("a"));
        assert_eq!(name(b"").as_deref(), Some("a"));
        let b = export("b");
        exports.add(Arc::clone(&b));
        assert_eq!(name(b""), None);
        assert_eq!(name(b"b").as_deref(), Some("b"));
        assert_eq!(name(b"c"), None);
        exports.remove(&b);
        assert_eq!(name(b"b"), None);
        assert_eq!(name(b"").as_deref(), Some("a"));
    }

    #[test]
    fn what_is_closed_is_not_visited_and_knows_who_is_left() {
        let exports = Exports::default();
        let a = export("a");
        exports.add(Arc::clone(&a));
        let mut visits = [exports.visit(b"a").unwrap(), exports.visit(b"").unwrap()];
        assert_eq!((a.visitors(), a.close()), (2, 2));
        assert!(exports.visit(b"a").is_none());
        assert_eq!(exports.with(b"a", |_| ()), None);
        visits[0].leave();
        assert_eq!((a.visitors(), a.close()), (1, 1));
        drop(visits);
        assert_eq!((a.visitors(), a.close()), (0, 0));
        a.reopen();
        assert!(exports.visit(b"a").is_some());
    }
}
