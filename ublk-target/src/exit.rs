//! How a command ends: the exit codes, and the failure that leads to each.
//!
//! The codes are part of the interface. Scripts test them, so a code never changes its meaning;
//! [`table`] is the one list of them, and `tmem --help` prints it.

use std::process::ExitCode;

use serde::{Deserialize, Serialize};

/// Why a command ended as it did. On the wire it is the name in kebab case.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Exit {
    /// Done.
    Ok,
    /// The command line or the configuration file is wrong.
    Usage,
    /// No daemon answers at the control socket.
    NoDaemon,
    /// Not allowed.
    Permission,
    /// The device is in use and was left alone.
    InUse,
    /// There is no device of that name.
    NotFound,
    /// There is a device of that name already.
    NameTaken,
    /// A size or a limit is out of bounds.
    Size,
    /// The kernel offers no usable ublk.
    NoUblk,
    /// Another daemon serves the control socket.
    Running,
    /// The kernel offers no usable NBD client.
    NoNbd,
    /// There is something on the backing file or device.
    Foreign,
    /// Something failed at run time. A peer's code that we do not know is read as this one.
    #[serde(other)]
    Failure,
}

impl Exit {
    /// Every code, in the order of their numbers.
    pub const ALL: [Exit; 13] = [
        Exit::Ok,
        Exit::Failure,
        Exit::Usage,
        Exit::NoDaemon,
        Exit::Permission,
        Exit::InUse,
        Exit::NotFound,
        Exit::NameTaken,
        Exit::Size,
        Exit::NoUblk,
        Exit::Running,
        Exit::NoNbd,
        Exit::Foreign,
    ];

    /// The process's exit status.
    pub fn code(self) -> u8 {
        match self {
            Exit::Ok => 0,
            Exit::Failure => 1,
            Exit::Usage => 2,
            Exit::NoDaemon => 3,
            Exit::Permission => 4,
            Exit::InUse => 5,
            Exit::NotFound => 6,
            Exit::NameTaken => 7,
            Exit::Size => 8,
            Exit::NoUblk => 9,
            Exit::Running => 10,
            Exit::NoNbd => 11,
            Exit::Foreign => 12,
        }
    }

    /// What the code means, in a few words.
    pub fn meaning(self) -> &'static str {
        match self {
            Exit::Ok => "success",
            Exit::Failure => "failed at run time",
            Exit::Usage => "wrong command line or configuration file",
            Exit::NoDaemon => "no daemon answers at the control socket",
            Exit::Permission => "permission denied",
            Exit::InUse => "refused: the device is in use",
            Exit::NotFound => "no device of that name",
            Exit::NameTaken => "a device of that name exists",
            Exit::Size => "size or limit out of bounds",
            Exit::NoUblk => "the kernel offers no usable ublk",
            Exit::Running => "another daemon serves the socket",
            Exit::NoNbd => "the kernel offers no usable NBD client",
            Exit::Foreign => "refused: the backing file holds something else",
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        exit.code().into()
    }
}

/// The exit codes as text, one a line, for the help and the handbook.
pub fn table() -> String {
    let mut text = String::from("Exit codes:");
    for exit in Exit::ALL {
        text.push_str(&format!("\n  {:>2}  {}", exit.code(), exit.meaning()));
    }
    text
}

/// A command that failed: the code it ends with, and one line for the user that says what is
/// wrong and what to do.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize, thiserror::Error)]
#[error("{message}")]
#[serde(deny_unknown_fields)]
pub struct Failure {
    /// The kind of failure.
    pub code: Exit,
    /// What is wrong and what to do, in one line.
    pub message: String,
}

impl Failure {
    /// A failure of kind `code`. Control characters in the message become spaces, so that it is
    /// one line whatever names went into it.
    pub fn new(code: Exit, message: impl ToString) -> Self {
        let message = message.to_string();
        let message = message.trim_end().chars();
        Self { code, message: message.map(|c| if c.is_control() { ' ' } else { c }).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_distinct_and_numbered_in_order() {
        for (number, exit) in Exit::ALL.into_iter().enumerate() {
            assert_eq!(usize::from(exit.code()), number);
        }
    }

    #[test]
    fn table_lists_every_code() {
        let table = table();
        assert_eq!(table.lines().count(), 1 + Exit::ALL.len());
        assert!(table.contains("\n   5  refused: the device is in use\n"), "{table}");
    }

    #[test]
    fn a_failure_is_one_line() {
        let failure = Failure::new(Exit::InUse, "swap0:\nbusy\x1b[31m\n");
        assert_eq!(failure.to_string(), "swap0: busy [31m");
    }

    #[test]
    fn an_unknown_code_from_a_newer_peer_is_a_plain_failure() {
        let failure: Failure = serde_json::from_str(r#"{"code":"eaten","message":"x"}"#).unwrap();
        assert_eq!(failure.code, Exit::Failure);
    }
}
