//! The store: one memory file with all that outlives the process.
//!
//! ```text
//! 0            header        how large everything is: written once, checked before anything else is touched; and
//!                            whether the file is one that is never swapped out
//! 4 KiB        records       the pool limit, the pools, the backing file
//! 8 KiB        notes         what the daemon wants to know again: two copies
//! 256 KiB      moves         of the backing file's cleaner                     (crate::backing)
//! 1 MiB        segments      of the backing file's log                        (crate::backing)
//! 16 MiB       directories   one window for each pool that there can be       (crate::directory)
//!              frame table                                                    (crate::arena)
//!              arena
//!              I/O memory    one window for each pool that there can be       (crate::io_memory)
//! ```
//!
//! Everything is at a place that follows from the header, and has memory only where it is in use. So who has the
//! file has all of it: whatever is added later needs no other file. The file is passed on like any other, to a
//! child or over a Unix socket.
//!
//! Bytes are in the order of the machine. A layout with another [`VERSION`] is refused; there is no other yet.
//!
//! Who may write what in it, is for the owners of the parts to say. One process at a time has an engine on a store;
//! that is up to the caller.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rapidhash::v3::rapidhash_v3;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::backing::{KEY_BYTES, MOVES_BYTES, SEGMENTS_BYTES_MAX};
use crate::directory::Directory;
use crate::durable::{DurableU64, crash_point};
use crate::engine::POOLS_MAX;
use crate::frame::{BUDDIES_MAX, FrameMeta, GRANULE, NIL};
use crate::handle::{ClientId, PAGE_SIZE, POOL_PAGES_MAX, PoolId, PoolKind};
use crate::io_memory::IO_MEMORY_BYTES_MAX;
use crate::region::{MemoryFile, Region};
use crate::sync::Mutex;

/// The layout that this code knows.
const VERSION: u32 = 1;

const MAGIC: [u8; MAGIC_BYTES] = *b"tmem\0mem";
const MAGIC_BYTES: usize = size_of::<u64>();

/// Most bytes of notes.
pub const NOTES_BYTES_MAX: usize = NOTES_BYTES - size_of::<NotesHeader>();

/// Bytes of one copy of the notes.
const NOTES_BYTES: usize = 64 << 10;

/// Bytes that are always in memory.
pub(crate) const STORE_BYTES: u64 = RECORDS_AT + PAGE_SIZE as u64;

const RECORDS_AT: u64 = PAGE_SIZE as u64;
const NOTES_AT: u64 = RECORDS_AT + PAGE_SIZE as u64;
const MOVES_AT: u64 = 256 << 10;
const SEGMENTS_AT: u64 = 1 << 20;
const DIRECTORIES_AT: u64 = 16 << 20;
const DIRECTORY_BYTES_MAX: u64 = Directory::bytes_for(POOL_PAGES_MAX);
const TABLE_AT: u64 = DIRECTORIES_AT + POOLS_MAX as u64 * DIRECTORY_BYTES_MAX;

const _: () = assert!(size_of::<Records>() <= PAGE_SIZE);
const _: () = assert!(NOTES_AT + 2 * NOTES_BYTES as u64 <= MOVES_AT);
const _: () = assert!(MOVES_AT + MOVES_BYTES as u64 <= SEGMENTS_AT);
const _: () = assert!(SEGMENTS_AT + SEGMENTS_BYTES_MAX <= DIRECTORIES_AT);
const _: () = assert!(TABLE_AT.is_multiple_of(PAGE_SIZE as u64));

/// Why an engine cannot go on from a store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AttachError {
    /// Nothing was ever in it, or who made it died before it was a store.
    #[error("the memory file is empty: there is nothing to go on from")]
    Empty,
    /// It is not a store, or not all of one.
    #[error("the memory file's header is damaged or none of tmem's: nothing in it can be used")]
    Damaged,
    /// It is of another version of tmem, or of one that was built otherwise.
    #[error(
        "the memory file has layout {found}, and this program knows {VERSION} only: go on with the program that made \
         it"
    )]
    Layout {
        /// What it has: version, bytes of a granule, and zpages of a frame.
        found: String,
    },
    /// A part of it that nothing can be found without says what no engine ever wrote.
    #[error(
        "the memory file is damaged: {what} cannot be. Nothing in it can be used: begin with an empty one, and see \
         whether the machine's memory is sound"
    )]
    Tables {
        /// The part.
        what: &'static str,
    },
    /// The kernel did not give what is needed to have it in memory.
    #[error("cannot map the memory file: {source}")]
    Memory {
        /// The system call's error.
        #[from]
        source: io::Error,
    },
}

/// Why notes were not taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NotesError {
    /// There is no room for so many.
    #[error("notes of {bytes} bytes: there is room for {NOTES_BYTES_MAX}")]
    Size {
        /// What was asked for, in bytes.
        bytes: usize,
    },
    /// The kernel gave no memory.
    #[error("cannot get memory for notes: {source}")]
    Memory {
        /// The system call's error.
        #[from]
        source: io::Error,
    },
}

/// How large everything in a store is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Geometry {
    /// Frames that the arena has room for.
    pub(crate) frames_max: u32,
    /// Shards of the engine.
    pub(crate) shards: u32,
    /// The largest pool limit, in bytes.
    pub(crate) limit_max: u64,
}

impl Geometry {
    /// Bytes of the memory file that no engine can do without.
    fn needed_bytes(self) -> u64 {
        Store::arena_at(self.frames_max) + u64::from(self.frames_max) * PAGE_SIZE as u64
    }

    /// Bytes of the memory file.
    fn file_bytes(self) -> u64 {
        self.needed_bytes() + POOLS_MAX as u64 * IO_MEMORY_BYTES_MAX
    }
}

#[derive(Clone, Copy, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    /// All zeros until the rest is there.
    magic: [u8; MAGIC_BYTES],
    version: U32,
    granule: U16,
    buddies: U16,
    frames_max: U32,
    shards: U32,
    limit_max: U64,
    /// Of all before it.
    checksum: U64,
}

const HEADER_BYTES: usize = size_of::<Header>();

#[derive(Clone, Copy, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
struct NotesHeader {
    /// Of all after it.
    checksum: U64,
    /// The larger one is the later one; zero if there never was one.
    sequence: U64,
    bytes: U64,
}

/// A pool, as a new process has to know it. All zeros is none.
#[repr(C)]
pub(crate) struct PoolRecord {
    pages: DurableU64,
    /// {client: 16, kind: 8, state: 8}.
    word: DurableU64,
}

/// The backing file, as a new process has to know it. All zeros is none.
#[repr(C)]
pub(crate) struct LogRecord {
    segments: DurableU64,
    /// Whether there is a key: 1 or 0.
    has_key: DurableU64,
    key: [DurableU64; KEY_BYTES / 8],
}

/// How much was written to the backing file in a day. All zeros is nothing.
#[repr(C)]
pub(crate) struct DayRecord {
    /// When it began, in nanoseconds.
    since: DurableU64,
    /// Bytes.
    written: DurableU64,
}

#[repr(C)]
struct Records {
    /// The pool limit, in bytes.
    limit: DurableU64,
    log: LogRecord,
    pools: [PoolRecord; POOLS_MAX],
    day: DayRecord,
    /// Blocks of a unit of writeback.
    unit_blocks: DurableU64,
}

/// Where it says that the file is of a kind that is never swapped out: [`STAYS`], if whoever made it knew that.
const NATURE_AT: usize = 64;
const STAYS: u64 = u64::from_le_bytes(*b"noswap\0\0");

const _: () = assert!(HEADER_BYTES <= NATURE_AT);

/// A pool that there is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub struct PoolInfo {
    /// Its number.
    pub id: PoolId,
    /// Whose it is.
    pub client: ClientId,
    /// What it promises.
    pub kind: PoolKind,
    /// Its size, in pages.
    pub pages: u64,
}

const VACANT: u64 = 0;
const LIVE: u64 = 1;
const CLOSING: u64 = 2;

/// See the module's description.
#[derive(Clone)]
pub struct Store {
    file: MemoryFile,
    /// Header and records.
    head: Arc<Region>,
    /// Held while notes are read or written.
    notes: Arc<Mutex<Region>>,
}

impl Store {
    /// An empty store.
    pub fn new() -> io::Result<Self> {
        Self::made(MemoryFile::unswappable("tmem", TABLE_AT)?)
    }

    /// An empty store in a file that outlives all processes: it is `name` in a file system of its own, without swap, that
    /// is mounted on this directory. Unmounting that takes it away. For those who may mount, from Linux 6.4 on.
    #[cfg(not(miri))]
    pub fn mounted(directory: &std::path::Path, name: &str) -> io::Result<Self> {
        Self::made(MemoryFile::mounted(directory, name, TABLE_AT)?)
    }

    /// The store in a memory file that another process made. Nothing in it is changed.
    #[cfg(not(miri))]
    pub fn from_file(file: std::os::fd::OwnedFd) -> Result<Self, AttachError> {
        let file = MemoryFile::from_file(file);
        if file.bytes()? < TABLE_AT {
            return Err(AttachError::Damaged);
        }
        let mut store = Self::over(file)?;
        if store.nature().load(Ordering::Acquire) == STAYS {
            store.file = store.file.that_stays();
        }
        match store.geometry() {
            Err(AttachError::Empty) => Ok(store),
            // What is behind the file's end cannot be looked at.
            Ok(geometry) if store.file.bytes()? < geometry.needed_bytes() => {
                Err(AttachError::Damaged)
            }
            result => result.map(|_| store),
        }
    }

    /// The memory file, to be passed on.
    #[cfg(not(miri))]
    pub fn file(&self) -> std::os::fd::BorrowedFd<'_> {
        self.file.file()
    }

    /// The store in a file that has just been made.
    fn made(file: MemoryFile) -> io::Result<Self> {
        let store = Self::over(file)?;
        store.head.populate(0, store.head.bytes())?;
        if store.file.stays() {
            store.nature().store(STAYS, Ordering::Release);
        }
        Ok(store)
    }

    fn over(file: MemoryFile) -> io::Result<Self> {
        let head = Arc::new(Region::of(&file, 0, NOTES_AT as usize)?);
        let notes = Region::of(&file, NOTES_AT, 2 * NOTES_BYTES)?;
        Ok(Self { file, head, notes: Arc::new(Mutex::new(notes)) })
    }

    /// Whether no engine was ever made on it.
    pub fn is_empty(&self) -> bool {
        matches!(self.geometry(), Err(AttachError::Empty))
    }

    /// Makes an empty store one of this geometry.
    ///
    /// # Panics
    ///
    /// If it is not empty.
    pub(crate) fn format(&self, geometry: Geometry) -> io::Result<()> {
        assert!(self.is_empty(), "a store can be made once");
        let Geometry { frames_max, shards, limit_max } = geometry;
        assert!(frames_max > 0 && frames_max < NIL);
        self.file.resize(geometry.file_bytes())?;
        let mut header = Header {
            magic: MAGIC,
            version: U32::new(VERSION),
            granule: U16::new(GRANULE as u16),
            buddies: U16::new(BUDDIES_MAX as u16),
            frames_max: U32::new(frames_max),
            shards: U32::new(shards),
            limit_max: U64::new(limit_max),
            checksum: U64::ZERO,
        };
        header.checksum = U64::new(header.sum());
        // The magic is last, and one word: what is not whole is empty.
        self.head.write(MAGIC_BYTES, &header.as_bytes()[MAGIC_BYTES..]);
        self.magic().store(zerocopy::transmute!(header.magic), Ordering::Release);
        Ok(())
    }

    /// How large everything is.
    pub(crate) fn geometry(&self) -> Result<Geometry, AttachError> {
        let mut bytes = [0; HEADER_BYTES];
        self.head.read(0, &mut bytes);
        let header: Header = zerocopy::transmute!(bytes);
        if header.magic == [0; MAGIC_BYTES] {
            return Err(AttachError::Empty);
        }
        if header.magic != MAGIC {
            return Err(AttachError::Damaged);
        }
        // Before the checksum, which may be elsewhere in another version.
        let layout = (header.version.get(), header.granule.get(), header.buddies.get());
        if layout != (VERSION, GRANULE as u16, BUDDIES_MAX as u16) {
            return Err(AttachError::Layout { found: format!("{layout:?}") });
        }
        let geometry = Geometry {
            frames_max: header.frames_max.get(),
            shards: header.shards.get(),
            limit_max: header.limit_max.get(),
        };
        let is_sane = header.checksum.get() == header.sum()
            && (1..NIL).contains(&geometry.frames_max)
            && geometry.shards.is_power_of_two();
        if is_sane { Ok(geometry) } else { Err(AttachError::Damaged) }
    }

    /// The frame table of an arena of so many frames.
    pub(crate) fn table(&self, frames_max: u32) -> io::Result<Region> {
        Region::of(&self.file, TABLE_AT, frames_max as usize * size_of::<FrameMeta>())
    }

    /// The frames of an arena of so many.
    pub(crate) fn frames(&self, frames_max: u32) -> io::Result<Region> {
        let at = Self::arena_at(frames_max);
        Region::of(&self.file, at, frames_max as usize * PAGE_SIZE)
    }

    /// Where the frames of an arena of so many begin.
    pub(crate) fn arena_at(frames_max: u32) -> u64 {
        let table = u64::from(frames_max) * size_of::<FrameMeta>() as u64;
        (TABLE_AT + table).next_multiple_of(PAGE_SIZE as u64)
    }

    /// Room for the directory of a pool.
    pub(crate) fn directory(&self, pool: PoolId, bytes: u64) -> io::Result<Region> {
        assert!(usize::from(pool.0) < POOLS_MAX && bytes <= DIRECTORY_BYTES_MAX);
        let at = DIRECTORIES_AT + u64::from(pool.0) * DIRECTORY_BYTES_MAX;
        Region::of(&self.file, at, bytes as usize)
    }

    /// Gives back all memory of a directory, for a pool that there is not.
    pub(crate) fn clear_directory(&self, pool: PoolId) -> io::Result<()> {
        let at = DIRECTORIES_AT + u64::from(pool.0) * DIRECTORY_BYTES_MAX;
        crash_point();
        self.file.punch(at, DIRECTORY_BYTES_MAX)
    }

    /// A part of the I/O memory of the pool of this number.
    pub(crate) fn io_memory(&self, pool: u16, offset: u64, bytes: usize) -> io::Result<Region> {
        let end = offset + bytes as u64;
        assert!(
            usize::from(pool) < POOLS_MAX && end <= IO_MEMORY_BYTES_MAX,
            "beyond a pool's I/O memory"
        );
        let geometry = self.geometry().map_err(io::Error::other)?;
        // Of a store that another program made, which knew of no such memory: all who see that make it as large.
        if self.file.bytes()? < geometry.file_bytes() {
            self.file.resize(geometry.file_bytes())?;
        }
        let at = geometry.needed_bytes() + u64::from(pool) * IO_MEMORY_BYTES_MAX;
        Region::of(&self.file, at + offset, bytes)
    }

    /// Gives back the I/O memory of a pool that there is not any more.
    pub(crate) fn clear_io_memory(&self, pool: PoolId) -> io::Result<()> {
        let geometry = self.geometry().map_err(io::Error::other)?;
        let at = geometry.needed_bytes() + u64::from(pool.0) * IO_MEMORY_BYTES_MAX;
        crash_point();
        self.file.punch(at, IO_MEMORY_BYTES_MAX)
    }

    /// Where the I/O memory begins.
    #[cfg(all(test, not(miri)))]
    pub(crate) fn io_at(&self) -> Result<u64, AttachError> {
        Ok(self.geometry()?.needed_bytes())
    }

    /// Room for what a log's cleaner notes.
    pub(crate) fn moves(&self) -> io::Result<Region> {
        Region::of(&self.file, MOVES_AT, MOVES_BYTES)
    }

    /// Room for the table of a log's segments.
    pub(crate) fn segments(&self, bytes: u64) -> io::Result<Region> {
        assert!(bytes <= SEGMENTS_BYTES_MAX);
        Region::of(&self.file, SEGMENTS_AT, bytes as usize)
    }

    #[allow(unsafe_code)]
    fn magic(&self) -> &DurableU64 {
        // SAFETY: it is at the start of the page that the header is in, of which the same is true as of the records.
        unsafe { self.head.start().cast().as_ref() }
    }

    #[allow(unsafe_code)]
    fn nature(&self) -> &DurableU64 {
        // SAFETY: as of the magic, in whose page it is.
        unsafe { self.head.start().add(NATURE_AT).cast().as_ref() }
    }

    #[allow(unsafe_code)]
    fn records(&self) -> &Records {
        // SAFETY: the page was populated when the store was made, or belongs to one that was; it is made of
        // atomics, for which every bit pattern is valid, and lives as long as the region.
        unsafe { self.head.start().add(RECORDS_AT as usize).cast().as_ref() }
    }

    pub(crate) fn log(&self) -> &LogRecord {
        &self.records().log
    }

    /// Blocks of a unit of writeback: 0 in the store of a program that did not note it.
    pub(crate) fn unit_blocks(&self) -> u64 {
        self.records().unit_blocks.load(Ordering::Acquire)
    }

    pub(crate) fn set_unit_blocks(&self, blocks: u32) {
        self.records().unit_blocks.store(blocks.into(), Ordering::Release);
    }

    pub(crate) fn day(&self) -> &DayRecord {
        &self.records().day
    }

    pub(crate) fn pool(&self, id: PoolId) -> &PoolRecord {
        &self.records().pools[usize::from(id.0)]
    }

    pub(crate) fn limit(&self) -> u64 {
        self.records().limit.load(Ordering::Acquire)
    }

    pub(crate) fn set_limit(&self, bytes: u64) {
        self.records().limit.store(bytes, Ordering::Release);
    }

    /// What was last noted, if anything was and it is whole.
    pub fn notes(&self) -> Option<Vec<u8>> {
        latest_notes(&self.notes.lock()).map(|(_, notes)| notes)
    }

    /// Notes this in place of what was noted before, at once: who dies meanwhile leaves the one or the other. It may
    /// wait for memory, and is not for the I/O path.
    pub fn set_notes(&self, notes: &[u8]) -> Result<(), NotesError> {
        if notes.len() > NOTES_BYTES_MAX {
            return Err(NotesError::Size { bytes: notes.len() });
        }
        let region = self.notes.lock();
        region.populate(0, region.bytes())?;
        let sequence = latest_notes(&region).map_or(0, |(sequence, _)| sequence) + 1;
        let mut header = NotesHeader {
            checksum: U64::ZERO,
            sequence: U64::new(sequence),
            bytes: U64::new(notes.len() as u64),
        };
        header.checksum = U64::new(header.sum(notes));
        let at = notes_at(sequence);
        region.write(at + size_of::<NotesHeader>(), notes);
        region.write(at, header.as_bytes());
        Ok(())
    }
}

/// Where the notes of a sequence number are.
fn notes_at(sequence: u64) -> usize {
    (sequence % 2) as usize * NOTES_BYTES
}

/// The copy of the notes that is the latest, with its sequence number.
fn latest_notes(region: &Region) -> Option<(u64, Vec<u8>)> {
    let whole = |copy| {
        let mut all = vec![0; NOTES_BYTES];
        region.read(notes_at(copy), &mut all);
        let (header, notes) = NotesHeader::read_from_prefix(&all).ok()?;
        let notes = notes.get(..usize::try_from(header.bytes.get()).ok()?)?;
        let is_whole = header.sequence != U64::ZERO && header.checksum.get() == header.sum(notes);
        is_whole.then(|| (header.sequence.get(), notes.to_vec()))
    };
    (0..2).filter_map(whole).max_by_key(|(sequence, _)| *sequence)
}

impl Header {
    fn sum(&self) -> u64 {
        rapidhash_v3(&self.as_bytes()[..HEADER_BYTES - size_of::<U64>()])
    }
}

impl NotesHeader {
    fn sum(&self, notes: &[u8]) -> u64 {
        let header = rapidhash_v3(&self.as_bytes()[size_of::<U64>()..]);
        header ^ rapidhash_v3(notes).rotate_left(1)
    }
}

impl PoolRecord {
    /// Notes that there is this pool.
    pub(crate) fn open(&self, client: ClientId, kind: PoolKind, pages: u64) {
        self.pages.store(pages, Ordering::Release);
        let word = u64::from(client.0) << 16 | (kind as u64) << 8 | LIVE;
        self.word.store(word, Ordering::Release);
    }

    /// Notes that the pool is going: what is in it is of no use to anybody.
    pub(crate) fn close(&self) {
        let word = self.word.load(Ordering::Acquire) & !0xff;
        self.word.store(word | CLOSING, Ordering::Release);
    }

    /// Notes that there is no such pool.
    pub(crate) fn remove(&self) {
        self.word.store(VACANT, Ordering::Release);
    }

    /// Whether there is a pool, or was one of which nothing is left but what has to be cleared away.
    pub(crate) fn is_vacant(&self) -> bool {
        self.word.load(Ordering::Acquire) == VACANT
    }

    /// Whether it says what is ever written.
    pub(crate) fn is_sound(&self) -> bool {
        let word = self.word.load(Ordering::Acquire);
        let pages = self.pages.load(Ordering::Acquire);
        let (client, kind, state) = (word >> 16, word >> 8 & 0xff, word & 0xff);
        word == VACANT
            || matches!(state, LIVE | CLOSING)
                && kind <= PoolKind::Persistent as u64
                && client < POOLS_MAX as u64
                && (1..=POOL_PAGES_MAX).contains(&pages)
    }

    /// The pool, if there is one.
    pub(crate) fn pool(&self, id: PoolId) -> Option<PoolInfo> {
        let word = self.word.load(Ordering::Acquire);
        let pages = self.pages.load(Ordering::Acquire);
        let kind = match word >> 8 & 0xff {
            0 => PoolKind::Ephemeral,
            _ => PoolKind::Persistent,
        };
        let is_sane = word & 0xff == LIVE && (1..=POOL_PAGES_MAX).contains(&pages);
        is_sane.then_some(PoolInfo { id, client: ClientId((word >> 16) as u16), kind, pages })
    }
}

impl DayRecord {
    /// When it began, in nanoseconds, and how many bytes were written in it.
    pub(crate) fn get(&self) -> (u64, u64) {
        (self.since.load(Ordering::Acquire), self.written.load(Ordering::Acquire))
    }

    /// Notes both. Who dies between has noted too little for a day that is over.
    pub(crate) fn set(&self, since: u64, written: u64) {
        self.written.store(written, Ordering::Release);
        self.since.store(since, Ordering::Release);
    }
}

impl LogRecord {
    /// Notes that there is a backing file with so many segments.
    pub(crate) fn open(&self, segments: u32, key: Option<&[u8; KEY_BYTES]>) {
        self.has_key.store(u64::from(key.is_some()), Ordering::Release);
        if let Some(key) = key {
            for (word, bytes) in self.key.iter().zip(key.chunks_exact(8)) {
                let bytes = bytes.try_into().expect("chunks of 8");
                word.store(u64::from_le_bytes(bytes), Ordering::Release);
            }
        }
        self.segments.store(segments.into(), Ordering::Release);
    }

    /// Segments of the backing file; 0 if there is none.
    pub(crate) fn segments(&self) -> u64 {
        self.segments.load(Ordering::Acquire)
    }

    pub(crate) fn key(&self) -> Option<[u8; KEY_BYTES]> {
        if self.has_key.load(Ordering::Acquire) == 0 {
            return None;
        }
        let mut key = [0; KEY_BYTES];
        for (word, bytes) in self.key.iter().zip(key.chunks_exact_mut(8)) {
            bytes.copy_from_slice(&word.load(Ordering::Acquire).to_le_bytes());
        }
        Some(key)
    }
}

#[cfg(all(test, not(miri)))]
mod tests {
    use super::*;

    const GEOMETRY: Geometry = Geometry { frames_max: 100, shards: 4, limit_max: 1 << 20 };

    fn again(store: &Store) -> Result<Store, AttachError> {
        let file = store.file().try_clone_to_owned();
        Store::from_file(file.expect("a file can be had twice"))
    }

    #[test]
    fn a_store_is_found_again_in_its_file() {
        let store = Store::new().unwrap();
        assert!(again(&store).unwrap().is_empty());
        store.format(GEOMETRY).unwrap();
        store.set_limit(77);
        store.pool(PoolId(3)).open(ClientId(5), PoolKind::Ephemeral, 9);
        store.log().open(6, Some(&[7; KEY_BYTES]));
        let again = again(&store).unwrap();
        assert_eq!(again.geometry().unwrap(), GEOMETRY);
        assert_eq!(again.file.stays(), store.file.stays());
        assert_eq!((again.limit(), again.log().segments()), (77, 6));
        assert_eq!(again.log().key(), Some([7; KEY_BYTES]));
        let (id, client) = (PoolId(3), ClientId(5));
        let info = PoolInfo { id, client, kind: PoolKind::Ephemeral, pages: 9 };
        assert_eq!(again.pool(id).pool(id), Some(info));
        again.pool(id).close();
        assert!(store.pool(id).pool(id).is_none() && !store.pool(id).is_vacant());
        again.pool(id).remove();
        assert!(store.pool(id).is_vacant());
    }

    #[test]
    fn another_layout_is_refused_before_it_is_touched() {
        let store = Store::new().unwrap();
        store.format(GEOMETRY).unwrap();
        store.head.write(8, &2u32.to_le_bytes());
        let error = again(&store).err().unwrap();
        assert!(error.to_string().contains("(2, "), "{error}");
        store.head.write(8, &VERSION.to_le_bytes());
        assert!(again(&store).is_ok());
        // What was never whole is empty, and can be used anew.
        store.head.write(0, &[0; 8]);
        assert!(again(&store).unwrap().is_empty());
        store.format(GEOMETRY).unwrap();
        assert_eq!(again(&store).unwrap().geometry().unwrap(), GEOMETRY);
        // Whatever else changes is damage.
        for at in [0, 16, 20, 24, HEADER_BYTES - 1] {
            let mut byte = [0];
            store.head.read(at, &mut byte);
            store.head.write(at, &[byte[0] ^ 0x10]);
            assert!(matches!(again(&store), Err(AttachError::Damaged)), "byte {at}");
            store.head.write(at, &byte);
        }
        // What is cut off is, too.
        let bytes = GEOMETRY.needed_bytes();
        store.file.resize(bytes - 1).unwrap();
        assert!(matches!(again(&store), Err(AttachError::Damaged)));
        store.file.resize(bytes).unwrap();
        assert!(again(&store).is_ok());
        let other = rustix::fs::memfd_create("tmem-test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        assert!(matches!(Store::from_file(other), Err(AttachError::Damaged)));
    }

    #[test]
    fn notes_are_the_last_ones_or_those_before() {
        let store = Store::new().unwrap();
        assert_eq!(store.notes(), None);
        for text in ["one", "two", "", "four"] {
            store.set_notes(text.as_bytes()).unwrap();
            assert_eq!(again(&store).unwrap().notes(), Some(text.into()));
        }
        // A copy that was being written when its process died.
        let (sequence, _) = latest_notes(&store.notes.lock()).unwrap();
        let at = notes_at(sequence) + size_of::<NotesHeader>();
        store.notes.lock().write(at, b"g");
        assert_eq!(store.notes(), Some(Vec::new()));
        store.set_notes(b"five").unwrap();
        assert_eq!(store.notes(), Some(b"five".to_vec()));
        let most = vec![1; NOTES_BYTES_MAX + 1];
        assert!(matches!(store.set_notes(&most), Err(NotesError::Size { .. })));
        store.set_notes(&most[1..]).unwrap();
        assert_eq!(store.notes().unwrap().len(), NOTES_BYTES_MAX);
    }
}
