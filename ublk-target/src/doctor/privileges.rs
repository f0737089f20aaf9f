//! Whether this process may do it: capabilities, locked memory, the tools it calls.

use super::Finding;
use super::host::{Capability, Host};

/// Advice for a missing capability.
const RUN_AS_ROOT: &str = "run as root; in a container, add the capability";

/// Making devices and swapping to them.
pub fn device_control(host: &Host) -> Finding {
    let check = "device-control";
    if host.can(Capability::SysAdmin) {
        Finding::ok(check, "CAP_SYS_ADMIN")
    } else {
        Finding::fail(check, "no CAP_SYS_ADMIN, so no devices and no swapon", RUN_AS_ROOT)
    }
}

/// Locking the daemon's memory, without which it would wait for its own pages.
pub fn locked_memory(host: &Host) -> Finding {
    let check = "locked-memory";
    if host.can(Capability::IpcLock) {
        return Finding::ok(check, "CAP_IPC_LOCK");
    }
    match host.field::<String>("proc/self/limits", "Max locked memory") {
        Some(limit) if limit == "unlimited" => Finding::ok(check, "unlimited"),
        Some(limit) => {
            let found = format!("no CAP_IPC_LOCK, and a limit of {limit} bytes");
            Finding::fail(check, found, "run as root, or with 'ulimit -l unlimited'")
        }
        None => Finding::fail(check, "no CAP_IPC_LOCK", RUN_AS_ROOT),
    }
}

/// Telling the kernel that the daemon writes out memory, so that it is not made to wait for that.
pub fn io_flusher(host: &Host) -> Finding {
    let check = "io-flusher";
    if host.can(Capability::SysResource) {
        Finding::ok(check, "CAP_SYS_RESOURCE")
    } else {
        let found = "no CAP_SYS_RESOURCE, so the daemon could wait for its own device";
        Finding::fail(check, found, RUN_AS_ROOT)
    }
}

/// Serving a page before other programs that want the same CPU.
pub fn priority(host: &Host) -> Finding {
    let check = "priority";
    // The limit is 20 less the nice value.
    let limit = || host.field::<u32>("proc/self/limits", "Max nice priority");
    if host.can(Capability::SysNice) {
        Finding::ok(check, "CAP_SYS_NICE")
    } else if limit().is_some_and(|limit| limit >= 40) {
        Finding::ok(check, "nice -20 is within the limit")
    } else {
        let found = "no CAP_SYS_NICE, so I/O waits for the turns of other programs; no swap by NBD";
        Finding::warn(check, found, RUN_AS_ROOT)
    }
}

/// The programs that `--swapon` calls.
pub fn swap_tools(host: &Host) -> Finding {
    let check = "swap-tools";
    let tools = ["mkswap", "swapon", "swapoff"];
    let missing: Vec<_> = tools.into_iter().filter(|tool| !installed(host, tool)).collect();
    if missing.is_empty() {
        return Finding::ok(check, tools.join(", "));
    }
    let found = format!("{} not found", missing.join(", "));
    Finding::warn(check, found, "install util-linux, or do without --swapon")
}

fn installed(host: &Host, tool: &str) -> bool {
    ["usr/sbin", "sbin", "usr/bin", "bin", "usr/local/sbin"]
        .iter()
        .any(|directory| host.exists(&format!("{directory}/{tool}")))
}
