//! A backing file in memory.

use tmem::{Job, PAGE_SIZE, Writeback};

/// What tables and buffers of a small backing file take of the pool limit, in bytes.
pub const TABLES: u64 = (9 << 15) + 9 * PAGE_SIZE as u64;

/// Does the first `done` bytes of a job that is under way.
pub fn carry_out(writeback: &Writeback, job: Job, file: &mut [u8], done: usize) {
    assert!(done <= job.bytes);
    let bytes = &mut file[job.offset as usize..][..done];
    let buffer = writeback.buffer(job.unit).as_ptr();
    // SAFETY: the unit's buffer has the job's bytes, and is ours until the job has ended.
    unsafe {
        match job.is_write {
            true => bytes.as_mut_ptr().copy_from_nonoverlapping(buffer, done),
            false => buffer.copy_from_nonoverlapping(bytes.as_ptr(), done),
        }
    }
}
