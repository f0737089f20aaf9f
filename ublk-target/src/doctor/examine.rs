//! The list of checks.

use std::path::Path;

use super::finding::Finding;
use super::host::Host;
use super::{kernel, memory, privileges};

/// Examines the machine whose root directory is `root`.
pub fn examine(root: &Path) -> Vec<Finding> {
    let host = Host::new(root);
    let checks = [
        kernel::version,
        kernel::ublk,
        kernel::io_uring,
        kernel::freed_swap,
        privileges::device_control,
        privileges::locked_memory,
        privileges::io_flusher,
        privileges::priority,
        privileges::swap_tools,
        memory::zswap,
        memory::other_zram,
        memory::page_cluster,
        memory::swappiness,
        memory::min_free,
    ];
    checks.iter().map(|check| check(&host)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;

    #[test]
    fn an_empty_machine_is_examined_without_a_panic() {
        let root = tempfile::tempdir().unwrap();
        let findings = examine(root.path());
        assert_eq!(findings.len(), 14);
        assert!(findings.iter().any(|finding| finding.level == Level::Fail));
    }
}
