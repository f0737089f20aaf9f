//! The control protocol: one request line, one response line, both JSON.
//!
//! ```text
//! -> {"version":1,"request":{"add-swap":{"name":"swap0","bytes":4294967296}}}
//! <- {"version":1,"response":{"added":{"name":"swap0","path":"/dev/ublkb0",...}}}
//! -> {"version":1,"request":"list"}
//! <- {"version":1,"response":{"devices":[...]}}
//! -> {"version":1,"request":{"del":{"name":"nosuch"}}}
//! <- {"version":1,"response":{"failed":{"code":"not-found","message":"..."}}}
//! ```
//!
//! A request with a field that the daemon does not know is refused, for it would ask for something
//! that is not done. Reports carry whatever the daemon counts, so that a client of another release
//! can still print them.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tmem::WritebackSettings;

use crate::backing::{BackingInfo, WritebackChange};
use crate::daemon::DeviceInfo;
use crate::exit::{Exit, Failure};

/// The version of requests and responses.
pub const VERSION: u32 = 1;

/// Longest request line in bytes, its newline included.
pub const REQUEST_MAX: usize = 64 << 10;

/// Longest response line in bytes, its newline included.
pub const RESPONSE_MAX: usize = 1 << 20;

/// What a client asks for.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Make a swap device.
    AddSwap {
        /// Its name; the daemon finds one if this is absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        name: Option<String>,
        /// Its size in bytes.
        bytes: u64,
    },
    /// Remove a device.
    Del {
        /// Its name.
        name: String,
    },
    /// List the devices.
    List,
    /// Take a backing file into use.
    SetBacking {
        /// Its absolute path.
        path: String,
        /// Its size in bytes, if it is to have a certain one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        bytes: Option<u64>,
        /// Whether it is taken whatever is in it.
        #[serde(default)]
        force: bool,
    },
    /// Set the pool limit.
    SetPoolLimit {
        /// The limit in bytes.
        bytes: u64,
    },
    /// Change a setting of writeback.
    SetWriteback(WritebackChange),
    /// Report all figures.
    Stats,
    /// Have a process of the program go on that has the daemon's name by now. If it does, this one is not answered.
    Upgrade,
    /// Say what became of that.
    UpgradeOutcome,
}

impl Request {
    /// True for the requests that are answered at once and change nothing.
    pub fn is_query(&self) -> bool {
        matches!(self, Request::List | Request::Stats | Request::UpgradeOutcome)
    }

    /// The request as a line.
    pub fn to_line(&self) -> String {
        line(&RequestLine { version: VERSION, request: self.clone() })
    }

    /// Reads a request line, without its newline.
    pub fn parse(line: &[u8]) -> Result<Self, Failure> {
        check_version(line).map_err(|message| Failure::new(Exit::Failure, message))?;
        let parsed = serde_json::from_slice::<RequestLine>(line);
        parsed.map(|line| line.request).map_err(|error| {
            Failure::new(Exit::Failure, format!("the request is not understood: {error}"))
        })
    }
}

/// What a daemon answers.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Response {
    /// The device was made.
    Added(DeviceInfo),
    /// The backing file now in use.
    Backing(BackingInfo),
    /// The device is gone.
    Deleted,
    /// The devices.
    Devices(Vec<DeviceInfo>),
    /// It was not done.
    Failed(Failure),
    /// The pool limit now in force, in bytes.
    PoolLimit(u64),
    /// The report, see `report.rs`.
    Stats(Value),
    /// Another process serves, of the program that has the daemon's name.
    Upgraded {
        /// Which.
        pid: u32,
    },
    /// That is still under way, or nothing is known of it.
    UpgradePending,
    /// The settings of writeback now in force.
    Writeback(WritebackSettings),
}

impl Response {
    /// The response as a line.
    pub fn to_line(&self) -> String {
        line(&ResponseLine { version: VERSION, response: self.clone() })
    }

    /// Reads a response line; on error, a sentence for the user.
    pub fn parse(line: &[u8]) -> Result<Self, String> {
        check_version(line)?;
        let parsed = serde_json::from_slice::<ResponseLine>(line);
        parsed.map(|line| line.response).map_err(|error| error.to_string())
    }
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct RequestLine {
    version: u32,
    request: Request,
}

#[derive(Deserialize, Serialize)]
struct ResponseLine {
    version: u32,
    response: Response,
}

/// Refuses a line of another version before its shape is looked at, which may be another one too.
fn check_version(line: &[u8]) -> Result<(), String> {
    #[derive(Deserialize)]
    struct AnyLine {
        version: u32,
    }

    match serde_json::from_slice(line) {
        Ok(AnyLine { version: VERSION }) => Ok(()),
        Ok(AnyLine { version }) => Err(format!(
            "the other side speaks version {version} of the protocol, this one version {VERSION}: \
             use the tmem that the daemon was started from"
        )),
        Err(error) => Err(format!("not a line of the control protocol: {error}")),
    }
}

/// `message` as one line of JSON.
fn line(message: &impl Serialize) -> String {
    let mut line = serde_json::to_string(message).expect("messages have string keys only");
    line.push('\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_look_as_documented() {
        let add = Request::AddSwap { name: Some("a".into()), bytes: 4096 };
        let text = "{\"version\":1,\"request\":{\"add-swap\":{\"name\":\"a\",\"bytes\":4096}}}\n";
        assert_eq!(add.to_line(), text);
        assert_eq!(Request::parse(text.trim().as_bytes()), Ok(add));
        assert_eq!(Request::List.to_line(), "{\"version\":1,\"request\":\"list\"}\n");
    }

    #[test]
    fn every_request_comes_back() {
        for request in [
            Request::AddSwap { name: None, bytes: u64::MAX },
            Request::Del { name: "a\"\n".into() },
            Request::List,
            Request::SetBacking { path: "/a b".into(), bytes: None, force: true },
            Request::SetPoolLimit { bytes: 0 },
            Request::SetWriteback(WritebackChange::Low(65)),
            Request::SetWriteback(WritebackChange::Rate(None)),
            Request::SetWriteback(WritebackChange::Age(Some(1))),
            Request::Stats,
            Request::Upgrade,
            Request::UpgradeOutcome,
        ] {
            let line = request.to_line();
            assert_eq!(line.find('\n'), Some(line.len() - 1), "{line:?}");
            assert_eq!(Request::parse(line.trim_end().as_bytes()), Ok(request));
        }
    }

    #[test]
    fn bad_requests_are_refused() {
        for text in [
            "",
            "x",
            "{}",
            "[1]",
            "{\"version\":1}",
            "{\"version\":1,\"request\":\"format\"}",
            "{\"version\":1,\"request\":\"list\",\"more\":1}",
            "{\"version\":1,\"request\":{\"del\":{\"name\":\"a\",\"force\":true}}}",
            "{\"version\":1,\"request\":{\"del\":{}}}",
            "{\"version\":1,\"request\":{\"add-swap\":{\"bytes\":-1}}}",
            "{\"version\":1,\"request\":{\"add-swap\":{\"bytes\":1e30}}}",
            "{\"version\":1,\"request\":{\"set-backing\":{\"path\":\"/a\",\"encrypt\":false}}}",
            "{\"version\":1,\"request\":{\"set-backing\":{\"force\":true}}}",
            "{\"version\":1,\"request\":{\"set-writeback\":{\"low\":\"6%\"}}}",
            "{\"version\":1,\"request\":{\"set-writeback\":{\"colour\":6}}}",
            "{\"version\":1,\"request\":{\"set-writeback\":{\"low\":6,\"high\":8}}}",
            "{\"version\":1,\"version\":1,\"request\":\"list\"}",
            "{\"version\":1,\"request\":\"list\"} x",
        ] {
            let failure = Request::parse(text.as_bytes()).unwrap_err();
            assert_eq!(failure.code, Exit::Failure, "{text}");
            assert!(!failure.message.contains('\n'), "{text}");
        }
        assert!(Request::parse(b"\xff\xfe").is_err());
        assert!(Request::parse(&vec![b'['; REQUEST_MAX]).is_err());
    }

    #[test]
    fn another_version_is_named() {
        let text = b"{\"version\":2,\"request\":{\"anything\":[]}}";
        let message = Request::parse(text).unwrap_err().message;
        assert!(message.contains("version 2"), "{message}");
    }

    #[test]
    fn responses_tolerate_what_a_newer_daemon_adds() {
        let text = "{\"version\":1,\"response\":\"deleted\",\"took_ms\":3}";
        assert_eq!(Response::parse(text.as_bytes()), Ok(Response::Deleted));
    }
}
