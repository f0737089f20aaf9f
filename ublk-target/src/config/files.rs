//! Which files the configuration is read from, and in which order.
//!
//! The rules are systemd's. The main file is `tmem.toml` of the first directory that has one; files in `tmem.toml.d` of all directories
//! come after it, sorted by name, and of two with one name only that of the first directory counts. So what a
//! distribution brings is changed by a file of its own in `/etc`, and switched off by an empty one or a link to
//! `/dev/null` there.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::ConfigError;

/// The directories, by precedence: the administrator's, the running system's, that of what was installed by hand, the
/// distribution's.
const DIRECTORIES: [&str; 4] = ["etc/tmem", "run/tmem", "usr/local/lib/tmem", "usr/lib/tmem"];

const MAIN: &str = "tmem.toml";
const DROP_INS: &str = "tmem.toml.d";

/// A file that was read.
#[derive(Debug)]
pub(super) struct Source {
    /// Its path, as messages name it.
    pub path: PathBuf,
    /// What is in it.
    pub text: String,
}

impl Source {
    /// Reads the file at `path`.
    pub(super) fn read(path: &Path) -> Result<Self, ConfigError> {
        Self::read_as(path, path)
    }

    fn read_as(file: &Path, path: &Path) -> Result<Self, ConfigError> {
        let path = path.to_owned();
        match fs::read_to_string(file) {
            Ok(text) => Ok(Self { path, text }),
            Err(source) => Err(ConfigError::Read { path, source }),
        }
    }
}

/// Reads the files of the system whose root directory is `root`, those that win last. There may be none.
pub(super) fn read_all(root: &Path) -> Result<Vec<Source>, ConfigError> {
    let mut found = Vec::new();
    for directory in DIRECTORIES {
        let file = root.join(directory).join(MAIN);
        // A link that leads nowhere is there, and an error.
        if file.symlink_metadata().is_ok() {
            found.push(file);
            break;
        }
    }
    let mut drop_ins: BTreeMap<OsString, PathBuf> = BTreeMap::new();
    for directory in DIRECTORIES {
        for file in list(&root.join(directory).join(DROP_INS))? {
            if let Some(name) = file.file_name() {
                drop_ins.entry(name.to_owned()).or_insert(file);
            }
        }
    }
    found.extend(drop_ins.into_values());
    found
        .iter()
        .map(|file| Source::read_as(file, &Path::new("/").join(below(root, file))))
        .collect()
}

/// The drop-ins in `directory`, which need not exist.
fn list(directory: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let failed = |source| ConfigError::Read { path: directory.to_owned(), source };
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(failed)?,
    };
    let mut files = Vec::new();
    for entry in entries {
        let file = entry.map_err(failed)?.path();
        // Other names are what editors and package managers leave beside a file.
        let hidden = file.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if !hidden && file.extension().is_some_and(|extension| extension == "toml") {
            files.push(file);
        }
    }
    Ok(files)
}

fn below<'a>(root: &Path, file: &'a Path) -> &'a Path {
    file.strip_prefix(root).unwrap_or(file)
}
