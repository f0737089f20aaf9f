//! The contenders: ways to put a page away and to get it back.
//!
//! The bare codecs keep nothing: a put compresses, a get decompresses what was compressed before.
//! The engine and zram are stores. What is common to all is enough to time and to check them alike.

use std::ops::Range;

use tmem::{ClientId, Engine, Got, Handle, PAGE_SIZE, Page, PoolId, Queue, SHARDS_MAX};

use crate::bare::{C, Flex, Payloads};
use crate::zram::Zram;

/// One step of work: a page of the set, and the position that it is put to or got from.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    pub position: usize,
    pub content: usize,
}

/// Pages in a row that direct I/O can use.
pub struct Buffer {
    bytes: Vec<u8>,
    range: Range<usize>,
}

impl Buffer {
    pub fn new(pages: usize) -> Self {
        let bytes = vec![0; (pages + 1) * PAGE_SIZE];
        let start = bytes.as_ptr().align_offset(PAGE_SIZE);
        Self { bytes, range: start..start + pages * PAGE_SIZE }
    }

    pub fn pages(&self) -> &[Page] {
        self.bytes[self.range.clone()].as_chunks().0
    }

    pub fn pages_mut(&mut self) -> &mut [Page] {
        self.bytes[self.range.clone()].as_chunks_mut().0
    }
}

/// A way to put pages away and to get them back. What fails, panics: a bench has no use for a
/// contender that is only half there.
pub trait Contender {
    fn name(&self) -> &'static str;

    /// Puts a page, which has to be of a `Buffer`.
    fn put(&mut self, step: Step, page: &Page);

    /// Gets a page.
    fn get(&mut self, step: Step) -> &Page;

    /// Puts pages at positions in a row, as one request where the contender knows requests.
    fn put_request(&mut self, steps: &[Step], pages: &[Page]) {
        for (step, page) in steps.iter().zip(pages) {
            self.put(*step, page);
        }
    }
}

/// lz4_flex with the engine's options.
pub struct BareFlex<'a> {
    codec: Flex,
    payloads: &'a Payloads,
    page: Page,
}

impl<'a> BareFlex<'a> {
    pub fn new(payloads: &'a Payloads) -> Self {
        Self { codec: Flex::new(), payloads, page: [0; PAGE_SIZE] }
    }
}

impl Contender for BareFlex<'_> {
    fn name(&self) -> &'static str {
        "lz4_flex"
    }

    fn put(&mut self, _: Step, page: &Page) {
        used(self.codec.compress(page));
    }

    fn get(&mut self, step: Step) -> &Page {
        Flex::decompress(self.payloads.get(step.content), &mut self.page);
        &self.page
    }
}

/// The C library.
pub struct BareC<'a> {
    codec: C,
    payloads: &'a Payloads,
    page: Page,
}

impl<'a> BareC<'a> {
    pub fn new(payloads: &'a Payloads) -> Self {
        Self { codec: C::new(), payloads, page: [0; PAGE_SIZE] }
    }
}

impl Contender for BareC<'_> {
    fn name(&self) -> &'static str {
        "lz4-c"
    }

    fn put(&mut self, _: Step, page: &Page) {
        used(self.codec.compress(page));
    }

    fn get(&mut self, step: Step) -> &Page {
        C::decompress(self.payloads.get(step.content), &mut self.page);
        &self.page
    }
}

/// The engine, through a queue of its own.
pub struct Tmem<'a> {
    engine: &'a Engine,
    queue: Queue,
    pool: PoolId,
    page: Page,
}

impl<'a> Tmem<'a> {
    pub fn new(engine: &'a Engine, client: ClientId, pool: PoolId) -> Self {
        Self { engine, queue: engine.queue(client), pool, page: [0; PAGE_SIZE] }
    }

    fn handle(&self, step: Step) -> Handle {
        Handle::from_page(self.pool, step.position as u64)
    }
}

impl Contender for Tmem<'_> {
    fn name(&self) -> &'static str {
        "tmem"
    }

    fn put(&mut self, step: Step, page: &Page) {
        let handle = self.handle(step);
        let result = self.engine.put(&mut self.queue, handle, page);
        assert_eq!(result, Ok(()), "the limit is too low for the set");
    }

    fn get(&mut self, step: Step) -> &Page {
        let handle = self.handle(step);
        assert_eq!(self.engine.get(&mut self.queue, handle, &mut self.page), Ok(Got::Hit));
        &self.page
    }
}

/// Kernel zram, by system calls that read and write the device directly.
pub struct DirectZram<'a> {
    zram: &'a Zram,
    buffer: Buffer,
}

impl<'a> DirectZram<'a> {
    pub fn new(zram: &'a Zram) -> Self {
        Self { zram, buffer: Buffer::new(1) }
    }
}

impl Contender for DirectZram<'_> {
    fn name(&self) -> &'static str {
        "zram-lz4"
    }

    fn put(&mut self, step: Step, page: &Page) {
        let written = self.zram.write(step.position as u64, std::slice::from_ref(page));
        written.expect("zram takes what it has room for");
    }

    fn get(&mut self, step: Step) -> &Page {
        let page = &mut self.buffer.pages_mut()[0];
        self.zram.read(step.position as u64, page).expect("zram gives what it has");
        page
    }

    fn put_request(&mut self, steps: &[Step], pages: &[Page]) {
        let written = self.zram.write(steps[0].position as u64, pages);
        written.expect("zram takes what it has room for");
    }
}

/// Shards of the engine: as many as the daemon has with a queue for each processor.
pub fn shards() -> usize {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    processors.next_power_of_two().min(SHARDS_MAX)
}

/// Keeps the compiler from leaving out what made the bytes.
pub fn used(bytes: &[u8]) {
    std::hint::black_box(bytes);
}
