//! What the kernel is told of a device: sizes, limits, and what it need not send.
//!
//! Blocks of 4096 bytes, so that every request is whole pages. No volatile cache, so that no
//! flush is ever sent. Discards are large, so that dropping a large device is few requests, but not
//! so large that one holds its queue up; the granularity is a page because the engine's is.

use libublk::sys;
use tmem::PAGE_SIZE;

/// Bytes of a sector, the unit in which the kernel counts.
pub const SECTOR_BYTES: u64 = 512;

/// Sectors of a page.
pub const PAGE_SECTORS: u64 = PAGE_SIZE as u64 / SECTOR_BYTES;

const PAGE_SHIFT: u8 = PAGE_SIZE.trailing_zeros() as u8;

/// The most that one discard may cover. A queue serves its requests one after the other, and a
/// discard frees page by page: reads behind it, of programs that wait for their memory, must not
/// wait for a whole device to be emptied.
const DISCARD_BYTES_MAX: u64 = 256 << 20;

const DISCARD_SECTORS_MAX: u32 = (DISCARD_BYTES_MAX / SECTOR_BYTES) as u32;

/// The parameters of a device of `bytes` bytes whose requests have at most `io_bytes` of data.
pub fn params(bytes: u64, io_bytes: u32) -> sys::ublk_params {
    debug_assert!(bytes > 0 && bytes.is_multiple_of(PAGE_SIZE as u64));
    sys::ublk_params {
        types: sys::UBLK_PARAM_TYPE_BASIC | sys::UBLK_PARAM_TYPE_DISCARD,
        basic: sys::ublk_param_basic {
            attrs: 0,
            logical_bs_shift: PAGE_SHIFT,
            physical_bs_shift: PAGE_SHIFT,
            io_opt_shift: PAGE_SHIFT,
            io_min_shift: PAGE_SHIFT,
            max_sectors: io_bytes / SECTOR_BYTES as u32,
            dev_sectors: bytes / SECTOR_BYTES,
            ..Default::default()
        },
        discard: sys::ublk_param_discard {
            discard_granularity: PAGE_SIZE as u32,
            max_discard_sectors: DISCARD_SECTORS_MAX,
            max_write_zeroes_sectors: DISCARD_SECTORS_MAX,
            // The driver takes nothing else.
            max_discard_segments: 1,
            ..Default::default()
        },
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_pages_without_a_cache() {
        let params = params(1 << 30, 128 << 10);
        assert_eq!(params.basic.attrs, 0);
        assert_eq!(params.basic.logical_bs_shift, 12);
        assert_eq!(params.basic.dev_sectors, 2 << 20);
        assert_eq!(params.basic.max_sectors, 256);
    }

    #[test]
    fn a_discard_is_large_but_does_not_hold_its_queue_up() {
        let params = params(1 << 40, 128 << 10);
        let sectors = u64::from(params.discard.max_discard_sectors);
        assert_ne!(params.types & sys::UBLK_PARAM_TYPE_DISCARD, 0);
        assert!(sectors.is_multiple_of(PAGE_SECTORS));
        assert_eq!(sectors * SECTOR_BYTES, 256 << 20);
        assert_eq!(params.discard.max_write_zeroes_sectors, params.discard.max_discard_sectors);
    }
}
