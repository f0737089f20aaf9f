//! `ublk-null BYTES QUEUES DEPTH`: a ublk device that answers every request at once and keeps nothing.
//!
//! Its device is like one of tmem's (requests of 128 KiB at most, blocks of a page, buffers that the
//! kernel copies to and from) and so are its queues' threads: an io_uring of the same kind, the same
//! scheduling class and priority, on the processors whose requests they serve. So what a request costs
//! here is what ublk costs. It prints the device's path when that is live. The kernel stops the device
//! when this process ends, which it would not do with a promise of recovery like tmem's.

use std::cell::RefCell;
use std::process::ExitCode;

use io_uring::IoUring;
use libublk::ctrl::{UblkCtrl, UblkCtrlBuilder};
use libublk::io::{UblkDev, UblkIOCtx, UblkQueue};
use libublk::{BufDesc, BufDescList, UblkError, UblkFlags, UblkIORes, sys, ublk_init_task_ring};

/// Largest request.
const IO_BYTES: u32 = 128 << 10;

const SECTOR_SHIFT: u8 = 9;
const PAGE_SHIFT: u8 = 12;

fn main() -> ExitCode {
    let numbers: Option<Vec<u64>> =
        std::env::args().skip(1).map(|word| word.parse().ok()).collect();
    let Some(&[bytes, queues, depth]) = numbers.as_deref() else {
        eprintln!("usage: ublk-null BYTES QUEUES DEPTH");
        return ExitCode::from(2);
    };
    match serve(bytes, queues as u16, depth as u16) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ublk-null: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Makes the device and serves it until the kernel stops it.
fn serve(bytes: u64, queues: u16, depth: u16) -> Result<(), UblkError> {
    let control = UblkCtrlBuilder::default()
        .name("null")
        .nr_queues(queues)
        .depth(depth)
        .io_buf_bytes(IO_BYTES)
        .dev_flags(UblkFlags::UBLK_DEV_F_ADD_DEV | UblkFlags::UBLK_DEV_F_MLOCK_IO_BUFFER)
        .build()?;
    let target = |dev: &mut UblkDev| {
        dev.tgt.dev_size = bytes;
        dev.tgt.params = params(bytes);
        Ok(())
    };
    let live = |control: &UblkCtrl| println!("{}", control.get_bdev_path());
    control.run_target(target, |queue, dev: &_| answer(queue, dev), live)?;
    Ok(())
}

fn params(bytes: u64) -> sys::ublk_params {
    sys::ublk_params {
        types: sys::UBLK_PARAM_TYPE_BASIC,
        basic: sys::ublk_param_basic {
            logical_bs_shift: PAGE_SHIFT,
            physical_bs_shift: PAGE_SHIFT,
            io_opt_shift: PAGE_SHIFT,
            io_min_shift: PAGE_SHIFT,
            max_sectors: IO_BYTES >> SECTOR_SHIFT,
            dev_sectors: bytes >> SECTOR_SHIFT,
            ..Default::default()
        },
        ..Default::default()
    }
}

/// Makes this thread's ring as tmem's queues have it: they take completions when they ask for them, and
/// libublk's own ring whenever the thread enters the kernel. With that this would be no floor under tmem.
fn init_ring(depth: u16) -> Result<(), UblkError> {
    ublk_init_task_ring(|cell| {
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .build(depth.into())?;
        cell.set(RefCell::new(ring)).map_err(|_| UblkError::OtherError(-libc::EEXIST))
    })
}

/// Gives this thread the class and the priority that tmem's have.
fn schedule_like_tmem() {
    // SAFETY: all zeros is a scheduling parameter.
    let parameter: libc::sched_param = unsafe { std::mem::zeroed() };
    // SAFETY: the call reads the parameter, and 0 is this thread.
    let class = unsafe { libc::sched_setscheduler(0, libc::SCHED_BATCH, &parameter) };
    // SAFETY: the call has no memory of ours, and 0 is this thread.
    let priority = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -20) };
    assert!(class == 0 && priority == 0, "who may make a ublk device may do this");
}

/// A queue's thread, which libublk has started and pins: every request succeeds in full.
fn answer(queue: u16, dev: &UblkDev) {
    schedule_like_tmem();
    let buffers = dev.alloc_queue_io_bufs();
    let done = |queue: &UblkQueue, tag: u16, _: &UblkIOCtx| {
        let bytes = (queue.get_iod(tag).nr_sectors << SECTOR_SHIFT) as i32;
        let buffer = BufDesc::Slice(buffers[usize::from(tag)].as_slice());
        let result = queue.complete_io_cmd_unified(tag, buffer, Ok(UblkIORes::Result(bytes)));
        result.expect("the ring has room for a completion of each request");
    };
    init_ring(dev.dev_info.queue_depth)
        .and_then(|()| UblkQueue::new(queue, dev))
        .and_then(|queue| queue.submit_fetch_commands_unified(BufDescList::Slices(Some(&buffers))))
        .expect("a queue that cannot start leaves the device unusable")
        .wait_and_handle_io(done);
}
