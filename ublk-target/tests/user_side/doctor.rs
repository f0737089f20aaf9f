//! `tmem doctor` on machines that are directory trees: each directory under `tests/doctor` is the
//! root of one, with the report that is expected of it in `expected`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn doctor(root: &Path, words: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tmem"));
    command.arg("doctor").arg("--root").arg(root).args(words).output().unwrap()
}

fn machines() -> Vec<PathBuf> {
    let home = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/doctor");
    let mut machines: Vec<_> =
        fs::read_dir(home).unwrap().map(|entry| entry.unwrap().path()).collect();
    machines.sort();
    assert!(machines.len() >= 5);
    machines
}

#[test]
fn every_machine_gets_its_report() {
    for machine in machines() {
        let output = doctor(&machine, &[]);
        let report = String::from_utf8(output.stdout).unwrap();
        let expected = fs::read_to_string(machine.join("expected")).unwrap();
        assert_eq!(report, expected, "{}", machine.display());
        let failed = report.lines().any(|line| line.starts_with("fail"));
        assert_eq!(output.status.code(), Some(failed.into()), "{}", machine.display());
    }
}

#[test]
fn json_says_the_same() {
    for machine in machines() {
        let output = doctor(&machine, &["--json"]);
        let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let levels = json["checks"].as_array().unwrap().iter();
        let levels: Vec<_> = levels.map(|check| check["level"].as_str().unwrap()).collect();
        let expected = fs::read_to_string(machine.join("expected")).unwrap();
        let expected: Vec<_> = expected.lines().filter_map(|line| line.split(' ').next()).collect();
        assert_eq!(levels, expected, "{}", machine.display());
    }
}

#[test]
fn this_machine_can_be_examined() {
    let output = doctor(Path::new("/"), &[]);
    assert!(matches!(output.status.code(), Some(0 | 1)), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
}
