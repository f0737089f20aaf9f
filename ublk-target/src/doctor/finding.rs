//! A finding of the doctor, and how findings are shown.

use std::fmt;

use serde::Serialize;

/// How grave a finding is.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// As it should be.
    Ok,
    /// Works, but not as well as it could.
    Warn,
    /// tmem will not work, or not safely.
    Fail,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Level::Ok => "ok",
            Level::Warn => "warn",
            Level::Fail => "fail",
        })
    }
}

/// What one check found.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Finding {
    /// The check's name.
    pub check: &'static str,
    /// How grave it is.
    pub level: Level,
    /// What is the case.
    pub found: String,
    /// What to do about it; empty if nothing.
    pub advice: String,
}

impl Finding {
    pub(super) fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self { check, level: Level::Ok, found: found.into(), advice: String::new() }
    }

    pub(super) fn warn(
        check: &'static str,
        found: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        Self { check, level: Level::Warn, found: found.into(), advice: advice.into() }
    }

    pub(super) fn fail(
        check: &'static str,
        found: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        Self { check, level: Level::Fail, found: found.into(), advice: advice.into() }
    }
}

/// The findings for people, a line each.
pub fn to_text(findings: &[Finding]) -> String {
    let width = findings.iter().map(|finding| finding.check.len()).max().unwrap_or(0);
    let mut text = String::new();
    for Finding { check, level, found, advice } in findings {
        let advice = if advice.is_empty() { String::new() } else { format!(": {advice}") };
        text.push_str(&format!("{level:<4} {check:<width$} {found}{advice}\n"));
    }
    text
}

/// The findings for programs.
pub fn to_json(findings: &[Finding]) -> String {
    format!("{:#}\n", serde_json::json!({ "version": 1, "checks": findings }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_finding_is_a_line() {
        let findings =
            [Finding::ok("kernel", "6.12"), Finding::warn("page-cluster", "3", "set it to 0")];
        let text = to_text(&findings);
        assert_eq!(text, "ok   kernel       6.12\nwarn page-cluster 3: set it to 0\n");
    }

    #[test]
    fn json_has_every_field() {
        let json: serde_json::Value =
            serde_json::from_str(&to_json(&[Finding::fail("ublk", "none", "load it")])).unwrap();
        let check = serde_json::json!(
            {"check": "ublk", "level": "fail", "found": "none", "advice": "load it"}
        );
        assert_eq!(json["checks"][0], check);
    }
}
