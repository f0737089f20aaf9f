//! Replays what the fuzzers start from and what they have found.

use std::fs;
use std::path::{Path, PathBuf};

use crate::{fuzzing, seeds};

/// A target's inputs: `tests/fuzz/corpus/TARGET`.
pub fn directory(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/corpus").join(target)
}

fn replay(target: &str, run: fn(&[u8])) {
    let mut paths: Vec<_> =
        fs::read_dir(directory(target)).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let seeds = seeds::all().iter().filter(|seed| seed.target == target).count();
    assert!(seeds > 0 && paths.len() >= seeds, "{} of {seeds} files are there", paths.len());
    for path in paths {
        // Shown if it fails.
        println!("{}", path.display());
        run(&fs::read(path).unwrap());
    }
}

#[test]
fn every_negotiation_of_the_corpus_ends_as_it_must() {
    replay("nbd_negotiation", fuzzing::negotiation);
}

#[test]
fn every_transmission_of_the_corpus_ends_as_it_must() {
    replay("nbd_transmission", fuzzing::transmission);
}
