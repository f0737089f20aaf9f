//! The engine's own figure of its memory against the kernel's.
//!
//! All of it is in one memory file, whose bytes the kernel counts.

// In a test a panic is the report.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::os::unix::fs::MetadataExt;

use tmem::{Config, Engine, Handle, OBJECT_PAGES, PAGE_SIZE, Page, PoolKind, PutError, Store};

fn page(seed: u64) -> Page {
    let mut page = [0; PAGE_SIZE];
    let mut state = seed | 1;
    for byte in &mut page[..(seed % 4096) as usize] {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        *byte = (state >> 56) as u8;
    }
    page
}

#[test]
#[cfg_attr(miri, ignore = "Miri has no memory files")]
fn memory_used_is_what_the_kernel_counts() {
    let limit = 64 << 20;
    let store = Store::new().unwrap();
    let file = File::from(store.file().try_clone_to_owned().unwrap());
    let kernel_bytes = || file.metadata().unwrap().blocks() * 512;
    let config = Config { limit, limit_max: 4 * limit, shards: 4 };
    let engine = Engine::create(&config, store).unwrap();
    // What no memory file holds: the shards themselves.
    let apart = engine.stats().mem_used_total - kernel_bytes();
    assert!(apart < 1 << 20, "{apart}");
    let check = |when: &str| {
        let (told, counted) = (engine.stats().mem_used_total, kernel_bytes() + apart);
        assert_eq!(told, counted, "{when}");
    };
    let client = engine.create_client().unwrap();
    let pages = 64 * u64::from(OBJECT_PAGES);
    let pool = engine.create_pool(client, PoolKind::Persistent, pages).unwrap();
    check("with a pool");
    let mut queue = engine.queue(client);
    let mut fill = |until: u64| {
        for at in 0..until {
            let handle = Handle::from_page(pool, at);
            loop {
                match engine.put(&mut queue, handle, &page(at * 7919)) {
                    Err(PutError::Starved) => drop(engine.supply().unwrap()),
                    Err(PutError::Full) => return,
                    put => break put.unwrap(),
                }
            }
        }
    };
    fill(5000);
    check("filled");
    let filled = kernel_bytes();
    engine.flush_range(pool, 100, pages);
    engine.settle().unwrap();
    while engine.settle().unwrap().released > 0 {}
    let left = kernel_bytes();
    assert!(left < filled / 3 * 2, "memory was not given back: {left} bytes of {filled}");
    check("given back");
    fill(pages);
    assert!(engine.stats().pools.failed_puts > 0, "it is not full");
    check("full");
    assert!(kernel_bytes() + apart <= limit, "more than the limit");
    let other = engine.create_pool(client, PoolKind::Persistent, pages);
    assert!(other.is_err(), "there is no room for another pool");
    check("after a refusal");
    engine.destroy_pool(pool).unwrap();
    engine.settle().unwrap();
    while engine.settle().unwrap().released > 0 {}
    check("empty");
}
