//! Whether the kernel can do it: its version, ublk, io_uring, and what it lets us see of swap.

use super::Finding;
use super::host::{Capability, Host};
use crate::freed::Plan;
use crate::ublk::broken;

/// The kernel's version.
pub fn version(host: &Host) -> Finding {
    let check = "kernel";
    let Some(release) = host.release() else {
        return Finding::fail(check, "unknown version", "mount /proc");
    };
    if let Some(how) = broken(&release) {
        let advice = "boot another kernel";
        return Finding::fail(check, format!("{release} {how}"), advice);
    }
    match major_minor(&release) {
        None => Finding::warn(check, format!("{release} is no version"), "use Linux 6.1 or newer"),
        Some(version) if version < (6, 0) => {
            Finding::fail(check, format!("{release} has no ublk"), "use Linux 6.1 or newer")
        }
        Some((6, 0)) => {
            let found = format!("{release} cannot recover ublk devices");
            Finding::fail(check, found, "use Linux 6.1 or newer")
        }
        Some(_) => Finding::ok(check, release),
    }
}

/// The first two numbers of a release.
fn major_minor(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// The ublk driver.
pub fn ublk(host: &Host) -> Finding {
    let check = "ublk";
    if host.exists("dev/ublk-control") {
        return Finding::ok(check, "/dev/ublk-control is there");
    }
    if host.exists("sys/module/ublk_drv") || host.exists("sys/class/misc/ublk-control") {
        let advice = "let this process see the host's /dev";
        return Finding::fail(check, "the driver is loaded, /dev/ublk-control is missing", advice);
    }
    let release = host.release().unwrap_or_default();
    let modules = host.read(&format!("lib/modules/{release}/modules.dep"));
    if modules.is_some_and(|modules| modules.contains("/ublk_drv.ko")) {
        return Finding::ok(check, "the driver is not loaded, and will be when it is needed");
    }
    let advice = "install the module package, or use a kernel with CONFIG_BLK_DEV_UBLK";
    Finding::fail(check, "this kernel has no ublk driver", advice)
}

/// Whether io_uring may be used.
pub fn io_uring(host: &Host) -> Finding {
    let check = "io_uring";
    match host.number("proc/sys/kernel/io_uring_disabled") {
        // Kernels before 6.6 have no such switch.
        None | Some(0) => Finding::ok(check, "enabled"),
        Some(1) if host.can(Capability::SysAdmin) => Finding::ok(check, "enabled for this process"),
        Some(1) => Finding::fail(check, "disabled for this process", "run as root"),
        Some(_) => Finding::fail(
            check,
            "disabled",
            "run 'sysctl kernel.io_uring_disabled=1', which leaves it to root",
        ),
    }
}

/// Whether it can be seen what swap the kernel frees.
pub fn freed_swap(host: &Host) -> Finding {
    let check = "freed-swap";
    let held = |why| format!("{why}, so freed swap is held until it is written over");
    let Some(types) = host.bytes("sys/kernel/btf/vmlinux") else {
        let advice = "use a kernel with CONFIG_DEBUG_INFO_BTF";
        return Finding::warn(check, held("the kernel does not describe itself (BTF)"), advice);
    };
    let Ok(needs_syslog) = Plan::needs_syslog(&types) else {
        let advice = "use Linux 5.16 to 6.17, or 7.3 on";
        return Finding::warn(check, held("this kernel frees swap in a way of its own"), advice);
    };
    if !host.exists("sys/bus/event_source/devices/kprobe/type") {
        let advice = "use a kernel with CONFIG_KPROBE_EVENTS";
        return Finding::warn(check, held("the kernel has no kprobes"), advice);
    }
    if needs_syslog && !host.can(Capability::Syslog) {
        let advice = "run as root; in a container, add the capability";
        return Finding::warn(check, held("no CAP_SYSLOG"), advice);
    }
    Finding::ok(check, "can be seen")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_read() {
        assert_eq!(major_minor("6.12.117-cloud-amd64"), Some((6, 12)));
        assert_eq!(major_minor("7.3-rc1"), Some((7, 3)));
        assert_eq!(major_minor("linux"), None);
    }
}
