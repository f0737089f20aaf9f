//! Which other block devices a device is made of, or is a part of, as sysfs has it.
//!
//! Whoever has a device for himself is found when it is opened (`O_EXCL`). Here is found what has no claim, or has it in
//! another way: partitions that the kernel knows of whatever the disk says, and devices that are made of this one.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{major, minor};

/// Where sysfs is.
pub const SYSFS: &str = "/sys";

/// See the module's description. Names are the kernel's, in order.
#[derive(Debug, Default, Eq, PartialEq)]
pub struct Relatives {
    /// Devices that this one is a part of: of LVM, RAID, bcache and their like.
    pub holders: Vec<String>,
    /// Its partitions.
    pub partitions: Vec<String>,
}

impl Relatives {
    /// Those of a device by its number (`st_rdev`). There are none to be found where there is no sysfs.
    pub fn of(sysfs: &Path, device: u64) -> io::Result<Self> {
        let name = format!("{}:{}", major(device), minor(device));
        let home = sysfs.join("dev/block").join(name);
        let has_number = |name: &String| home.join(name).join("partition").exists();
        let partitions = names(&home)?.into_iter().filter(has_number).collect();
        Ok(Self { holders: names(&home.join("holders"))?, partitions })
    }
}

/// What is in a directory, if there is one.
fn names(directory: &PathBuf) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let name = |entry: io::Result<fs::DirEntry>| Ok(entry?.file_name().to_string_lossy().into());
    let mut names = entries.map(name).collect::<io::Result<Vec<String>>>()?;
    names.sort_unstable();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use rustix::fs::makedev;

    use super::*;

    /// A sysfs with a disk of two partitions, of which the first is a part of a RAID.
    fn sysfs() -> tempfile::TempDir {
        let home = tempfile::tempdir().unwrap();
        let at = |path: &str| home.path().join(path);
        for directory in [
            "block/sda/holders",
            "block/sda/queue",
            "block/sda/sda1/holders/md0",
            "block/sda/sda2/holders",
            "block/sdb/holders/dm-1",
            "block/sdb/holders/dm-0",
            "block/sdc",
            "dev/block",
        ] {
            fs::create_dir_all(at(directory)).unwrap();
        }
        for (number, of) in [(1, "sda1"), (2, "sda2")] {
            fs::write(at("block/sda").join(of).join("partition"), format!("{number}\n")).unwrap();
        }
        // Not a directory, and not a partition.
        fs::write(at("block/sda/size"), "7\n").unwrap();
        for (number, of) in [
            ("8:0", "sda"),
            ("8:1", "sda/sda1"),
            ("8:2", "sda/sda2"),
            ("8:16", "sdb"),
            ("8:32", "sdc"),
        ] {
            symlink(Path::new("../../block").join(of), at("dev/block").join(number)).unwrap();
        }
        home
    }

    #[test]
    fn partitions_and_holders_are_found() {
        let sysfs = sysfs();
        let of = |minor| {
            let found = Relatives::of(sysfs.path(), makedev(8, minor)).unwrap();
            (found.partitions.join(" "), found.holders.join(" "))
        };
        let [disk, first, second, whole, bare, unknown] = [0, 1, 2, 16, 32, 48].map(of);
        assert_eq!(disk, ("sda1 sda2".into(), String::new()));
        assert_eq!(first, (String::new(), "md0".into()));
        assert_eq!(second, (String::new(), String::new()));
        assert_eq!(whole, (String::new(), "dm-0 dm-1".into()));
        assert_eq!(bare, (String::new(), String::new()));
        assert_eq!(unknown, (String::new(), String::new()));
    }

    #[test]
    fn what_cannot_be_looked_at_is_an_error() {
        let sysfs = sysfs();
        let holders = sysfs.path().join("block/sdc/holders");
        fs::write(holders, "").unwrap();
        assert!(Relatives::of(sysfs.path(), makedev(8, 32)).is_err());
    }
}
