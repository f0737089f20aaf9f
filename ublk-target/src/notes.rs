//! What the next process has to know that goes on when this one dies: it is noted in the store, which outlives both.
//!
//! Each change is noted before it takes effect in the kernel, and what has not is marked as being made. So
//! nothing that the kernel has of ours is unknown to who goes on.

use std::io;
use std::sync::OnceLock;
use std::time::Duration;

use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};
use tmem::{NotesError, Store};

use crate::backing::BackingNote;
use crate::config::RunConfig;
use crate::freed::Plan;

/// The form that this code knows.
const VERSION: u32 = 1;

/// All that is noted.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Notes {
    version: u32,
    /// What the daemon shall be. Of `swaps` those are left that have not been made yet.
    pub config: RunConfig,
    /// Its devices, in the order in which they were added.
    pub devices: Vec<DeviceNote>,
    /// The backing file, if there is one.
    pub backing: Option<BackingNote>,
    /// The process that serves.
    pub worker: u32,
    /// The one that has started it. What another has started, and is not of use any more, ends.
    pub supervisor: u32,
    /// How it is found out which places of swap the kernel frees, if it can be.
    #[serde(default, deserialize_with = "if_known")]
    pub freed: Option<Plan>,
    /// How often another went on.
    pub takeovers: Takeovers,
    /// Nothing is in use any more, and nobody shall go on.
    pub is_ended: bool,
}

/// A device.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct DeviceNote {
    /// Its name.
    pub name: String,
    /// The number of its pool.
    pub pool: u16,
    /// Its size in pages.
    pub pages: u64,
    /// Whether it is for us to switch swap on it off.
    pub swapped_by_us: bool,
    /// What stands between the kernel and it.
    pub node: Option<NodeNote>,
    /// Whether it has been made; else it is being made.
    pub is_made: bool,
    /// By what the process is known that observes what swap on it is freed, if there is one. No other ever has it.
    #[serde(default)]
    pub observer: Option<u64>,
}

/// A device's node.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub enum NodeNote {
    /// A ublk device.
    Ublk {
        /// Its number.
        id: u32,
        /// Hardware queues.
        queues: u16,
        /// Requests that each holds.
        depth: u16,
    },
    /// The kernel's NBD client.
    Nbd {
        /// Its number.
        number: u32,
        /// What it is known by.
        id: u64,
    },
}

/// How often a process went on for one that had died.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Takeovers {
    /// How often.
    pub count: u64,
    /// How long the last one took, from when it was seen until I/O went on.
    pub last: Duration,
}

/// Why there is nothing to go on from.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NoNotes {
    /// Nothing was noted, or it is not whole.
    #[error("the memory file has no notes of a daemon")]
    None,
    /// It makes no sense to this program.
    #[error(
        "the memory file has notes that this program does not know ({0}): go on with the one that wrote them"
    )]
    Unknown(#[from] serde_json::Error),
}

/// What another program may have noted in another form, and can be done without.
fn if_known<'de, T: DeserializeOwned, D: Deserializer<'de>>(
    notes: D,
) -> Result<Option<T>, D::Error> {
    let value = serde_json::Value::deserialize(notes)?;
    Ok(serde_json::from_value(value).ok())
}

/// The notes of the process that serves, as it writes them.
pub struct Notebook {
    store: Store,
    notes: Mutex<Notes>,
    /// Who wants to know that there are other devices, or another backing file.
    watcher: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl Notes {
    /// The last ones in a store.
    pub fn read(store: &Store) -> Result<Self, NoNotes> {
        let bytes = store.notes().ok_or(NoNotes::None)?;
        let notes: Self = serde_json::from_slice(&bytes)?;
        match notes.version {
            VERSION => Ok(notes),
            other => {
                let what = format_args!("version {other}");
                Err(NoNotes::Unknown(serde::de::Error::custom(what)))
            }
        }
    }
}

impl Notebook {
    /// A new one, for a daemon without devices.
    pub fn new(store: Store, config: RunConfig) -> Result<Self, NotesError> {
        let notes = Notes {
            version: VERSION,
            config,
            devices: Vec::new(),
            backing: None,
            worker: std::process::id(),
            supervisor: std::os::unix::process::parent_id(),
            freed: None,
            takeovers: Takeovers::default(),
            is_ended: false,
        };
        let notebook = Self::resume(store, notes);
        notebook.update(|_| {})?;
        Ok(notebook)
    }

    /// One that goes on from these.
    pub fn resume(store: Store, notes: Notes) -> Self {
        Self { store, notes: Mutex::new(notes), watcher: OnceLock::new() }
    }

    /// Where they are.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// What is noted now.
    pub fn notes(&self) -> Notes {
        self.notes.lock().clone()
    }

    /// Has this called whenever there are other devices, or a backing file.
    pub fn watch(&self, watcher: Box<dyn Fn() + Send + Sync>) {
        // There is one who asks, once.
        let _ = self.watcher.set(watcher);
    }

    /// Changes what is noted, if that can be written: then it is when this returns.
    pub fn update(&self, change: impl FnOnce(&mut Notes)) -> Result<(), NotesError> {
        let mut notes = self.notes.lock();
        let mut changed = notes.clone();
        change(&mut changed);
        let bytes = serde_json::to_vec(&changed).map_err(io::Error::other)?;
        self.store.set_notes(&bytes)?;
        let has_others = notes.devices != changed.devices || notes.backing != changed.backing;
        *notes = changed;
        drop(notes);
        if has_others && let Some(watcher) = self.watcher.get() {
            watcher();
        }
        Ok(())
    }

    /// The same for one device. It is there.
    pub fn update_device(
        &self,
        name: &str,
        change: impl FnOnce(&mut DeviceNote),
    ) -> Result<(), NotesError> {
        self.update(|notes| {
            if let Some(note) = notes.devices.iter_mut().find(|note| note.name == name) {
                change(note);
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::FrontEnd;

    fn config() -> RunConfig {
        RunConfig {
            frontend: FrontEnd::Ublk,
            nbd: Some("unix:/run/a b".parse().unwrap()),
            pool_limit: 1 << 30,
            control: "/run/c".into(),
            swapon: true,
            best_effort: false,
            backing: None,
            encrypt_backing: true,
            writeback: tmem::WritebackSettings::default(),
            swaps: Vec::new(),
        }
    }

    #[test]
    fn what_is_noted_is_read_by_another() {
        let store = Store::new().unwrap();
        assert!(matches!(Notes::read(&store), Err(NoNotes::None)));
        let notebook = Notebook::new(store.clone(), config()).unwrap();
        let node = Some(NodeNote::Ublk { id: 3, queues: 2, depth: 16 });
        let device = DeviceNote {
            name: "a".into(),
            pool: 5,
            pages: 7,
            swapped_by_us: true,
            node,
            is_made: false,
            observer: None,
        };
        notebook.update(|notes| notes.devices.push(device)).unwrap();
        notebook.update_device("a", |note| note.is_made = true).unwrap();
        let read = Notes::read(&store).unwrap();
        assert_eq!(read, notebook.notes());
        assert_eq!((read.devices[0].is_made, read.config.nbd), (true, config().nbd));
    }

    #[test]
    fn what_cannot_be_written_is_not_noted() {
        let notebook = Notebook::new(Store::new().unwrap(), config()).unwrap();
        let long = "x".repeat(tmem::NOTES_BYTES_MAX);
        notebook.update(|notes| notes.config.control = long.into()).unwrap_err();
        assert_eq!(notebook.notes().config.control, config().control);
    }

    #[test]
    fn what_can_be_done_without_may_be_missing_or_unknown() {
        let notebook = Notebook::new(Store::new().unwrap(), config()).unwrap();
        let mut json = serde_json::to_value(notebook.notes()).unwrap();
        json["freed"] = serde_json::json!({ "another": "form" });
        assert_eq!(serde_json::from_value::<Notes>(json.clone()).unwrap(), notebook.notes());
        json.as_object_mut().unwrap().remove("freed");
        assert_eq!(serde_json::from_value::<Notes>(json).unwrap(), notebook.notes());
    }

    #[test]
    fn notes_of_another_version_are_refused() {
        let store = Store::new().unwrap();
        let notebook = Notebook::new(store.clone(), config()).unwrap();
        notebook.update(|notes| notes.version = 2).unwrap();
        let error = Notes::read(&store).unwrap_err().to_string();
        assert!(error.contains("version 2"), "{error}");
    }
}
