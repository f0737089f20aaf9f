//! Where NBD is served: `unix:PATH`, and nothing else.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// A Unix socket to serve NBD on, by its absolute path.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct NbdAddress(PathBuf);

/// Why an address is wrong.
#[derive(Debug, thiserror::Error)]
pub enum AddressError {
    /// An address of another kind.
    #[error(
        "'{0}' is not unix:PATH: only Unix sockets are served, because TCP to the same machine drops \
         the packets that matter when memory is short, and is not authenticated"
    )]
    NotUnix(String),
    /// A path that depends on where we happen to be.
    #[error("'{0}' is not an absolute path: write unix:/run/tmem/nbd.sock")]
    NotAbsolute(String),
}

impl NbdAddress {
    /// The socket.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The URI of an export.
    pub fn uri(&self, export: &str) -> String {
        // What may be in a name needs no escape; what may be in a path does.
        let escaped = fmt::from_fn(|f| {
            self.0.as_os_str().as_encoded_bytes().iter().try_for_each(|&byte| {
                let plain = byte.is_ascii_alphanumeric() || b"/._-~".contains(&byte);
                if plain { write!(f, "{}", char::from(byte)) } else { write!(f, "%{byte:02X}") }
            })
        });
        format!("nbd+unix:///{export}?socket={escaped}")
    }
}

impl Default for NbdAddress {
    fn default() -> Self {
        Self("/run/tmem/nbd.sock".into())
    }
}

impl FromStr for NbdAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let path = text.strip_prefix("unix:").filter(|path| !path.is_empty());
        let path = path.ok_or_else(|| AddressError::NotUnix(text.to_owned()))?;
        if !path.starts_with('/') {
            return Err(AddressError::NotAbsolute(path.to_owned()));
        }
        Ok(Self(path.into()))
    }
}

impl serde::Serialize for NbdAddress {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // It was made of text.
        serializer.collect_str(&format_args!("unix:{}", self.0.display()))
    }
}

impl<'de> serde::Deserialize<'de> for NbdAddress {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unix_sockets_and_nothing_else() {
        let address: NbdAddress = "unix:/run/a b".parse().unwrap();
        assert_eq!(address.path(), Path::new("/run/a b"));
        assert_eq!(address.uri("swap0"), "nbd+unix:///swap0?socket=/run/a%20b");
        for (wrong, hint) in [
            ("tcp:127.0.0.1:10809", "TCP"),
            ("localhost:10809", "TCP"),
            ("unix:", "unix:PATH"),
            ("/run/nbd.sock", "unix:PATH"),
            ("unix:nbd.sock", "absolute"),
        ] {
            let message = wrong.parse::<NbdAddress>().unwrap_err().to_string();
            assert!(message.contains(hint), "{message}");
        }
    }
}
