//! The configuration files: cases as directory trees, and the example that documents every key.
//!
//! A case is a directory below `tests/config`: in `root` the files of a system, and beside it either `expected`, what
//! `tmem config` prints for it, or `error`, a part of each line of which the message must have. With
//! `TMEM_BLESS=1` what is printed becomes what is expected.
#![allow(clippy::unwrap_used, reason = "a test fails by a panic")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use tmem_ublk_target::cli::RunArgs;
use tmem_ublk_target::config::{Files, Machine, RunConfig};
use tmem_ublk_target::exit::Failure;

const MACHINE: Machine = Machine { ram: 16 << 30, pool_limit_min: 1 << 20 };

const EXAMPLE: &str = include_str!("../tmem.toml.example");

fn here() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}

#[test]
fn every_case_is_as_expected() {
    let mut count = 0;
    for entry in fs::read_dir(here().join("tests/config")).unwrap() {
        let case = entry.unwrap().path();
        let shown = Files::read(None, &case.join("root")).and_then(|files| files.show(&MACHINE));
        let name = case.file_name().unwrap().to_string_lossy();
        if let Ok(parts) = fs::read_to_string(case.join("error")) {
            let message = shown.expect_err(&name).message;
            assert!(!parts.trim().is_empty(), "{name} expects nothing");
            for part in parts.lines() {
                assert!(message.contains(part), "{name}: '{part}' is not in: {message}");
            }
        } else {
            let shown = shown.unwrap_or_else(|failure| panic!("{name}: {failure}"));
            let file = case.join("expected");
            if std::env::var_os("TMEM_BLESS").is_some() {
                fs::write(&file, &shown).unwrap();
            }
            assert_eq!(shown, fs::read_to_string(&file).unwrap(), "{name}");
        }
        count += 1;
    }
    assert!(count >= 15, "only {count} cases were found");
}

/// The configuration that a file of `text` makes.
fn configure(text: &str) -> Result<RunConfig, Failure> {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("tmem.toml");
    fs::write(&file, text).unwrap();
    let files = Files::read(Some(&file), Path::new("/"))?;
    RunConfig::new(&RunArgs::default(), None, &files, &MACHINE)
}

#[test]
fn what_is_shown_makes_the_same_daemon() {
    for entry in fs::read_dir(here().join("tests/config")).unwrap() {
        let case = entry.unwrap().path();
        if !case.join("expected").exists() {
            continue;
        }
        let files = Files::read(None, &case.join("root")).unwrap();
        let meant = RunConfig::new(&RunArgs::default(), None, &files, &MACHINE).unwrap();
        assert_eq!(configure(&files.show(&MACHINE).unwrap()).unwrap(), meant, "{}", case.display());
    }
}

/// A key of the example: its section, the line that sets it, and whether that is its default.
struct Key {
    section: &'static str,
    line: &'static str,
    is_default: bool,
}

/// The keys of the example, each of which is commented out behind its description.
fn example_keys() -> Vec<Key> {
    let (mut section, mut is_default, mut keys) = ("", true, Vec::new());
    for line in EXAMPLE.lines() {
        let setting = line
            .strip_prefix('#')
            .filter(|rest| rest.starts_with(|c: char| c.is_ascii_lowercase()));
        if let Some(line) = setting {
            assert!(line.contains(" = "), "neither text nor a key: #{line}");
            keys.push(Key { section, line, is_default });
        } else if let Some(name) = line.strip_prefix("#[[").or(line.strip_prefix('[')) {
            section = line.trim_start_matches('#');
            is_default &= !name.contains("]]");
        } else if line.is_empty() {
            is_default = true;
        } else {
            assert!(line == "#" || line.starts_with("# "), "neither text nor a key: {line}");
            is_default &= !line.contains("No default");
        }
    }
    keys
}

#[test]
fn the_example_shows_the_defaults() {
    assert_eq!(configure(EXAMPLE).unwrap(), configure("").unwrap(), "as it is it sets nothing");
    let mut defaults = 0;
    for Key { section, line, is_default } in example_keys() {
        // What these two need beside them.
        let beside = match line.split(' ').next() {
            Some("size") if section == "[backing]" => "path = '/a'",
            Some("name") => "size = '1G'",
            _ => "",
        };
        let config = configure(&format!("{section}\n{beside}\n{line}\n"))
            .unwrap_or_else(|failure| panic!("{line}: {failure}"));
        let with_nothing = configure("").unwrap();
        assert_eq!(config == with_nothing, is_default, "{line}: is it the default?");
        defaults += usize::from(is_default);
    }
    assert!(defaults >= 12, "only {defaults}");
}

/// The names between backticks of what is expected instead of an unknown key.
fn known_keys(section: &str) -> BTreeSet<(String, String)> {
    let message = configure(&format!("{section}\nunknown-key = 1\n")).unwrap_err().message;
    assert!(message.contains("unknown field `unknown-key`"), "{message}");
    let names = message.split('`').skip(3).step_by(2);
    names.map(|name| (section.to_owned(), name.to_owned())).collect()
}

#[test]
fn the_example_and_what_is_shown_have_every_key() {
    let mut known: BTreeSet<_> =
        ["", "[backing]", "[writeback]", "[[swap]]"].into_iter().flat_map(known_keys).collect();
    for table in ["backing", "writeback", "swap"] {
        assert!(known.remove(&(String::new(), table.to_owned())), "{table}");
    }
    assert!(known.len() >= 18, "{known:?}");

    let keys = example_keys().into_iter();
    let name = |line: &str| line.split(' ').next().unwrap().to_owned();
    let example: BTreeSet<_> = keys.map(|key| (key.section.to_owned(), name(key.line))).collect();
    assert_eq!(example, known);

    let all = "[[swap]]\nsize = '1G'\n";
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("tmem.toml");
    fs::write(&file, all).unwrap();
    let shown = Files::read(Some(&file), Path::new("/")).unwrap().show(&MACHINE).unwrap();
    let mut section = "";
    let mut found = BTreeSet::new();
    for line in shown.lines() {
        if line.starts_with('[') {
            section = line;
        } else if let Some((key, _)) = line.trim_start_matches('#').split_once(" = ") {
            found.insert((section.to_owned(), key.to_owned()));
        }
    }
    assert_eq!(found, known);
}

#[test]
fn the_distributions_file_is_good_on_every_machine() {
    let file = here().join("../dist/tmem.toml");
    let files = Files::read(Some(&file), Path::new("/")).unwrap();
    for ram in [64 << 20, 512 << 20, 16 << 30, 4 << 40] {
        let machine = Machine { ram, ..MACHINE };
        let config = RunConfig::new(&RunArgs::default(), None, &files, &machine).unwrap();
        assert!(config.swapon && config.swaps.len() == 1, "{config:?}");
    }
}
