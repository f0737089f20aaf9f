//! What the fuzzers start from: conversations made by hand, good ones and bad ones.
//!
//! `cargo test -p tmem-ublk-target --test nbd -- --ignored make_seeds` writes them anew.

use std::fs;

use crate::corpus::directory;
use crate::fuzzing::spec::*;
use crate::fuzzing::{CONTEXTS, EXPORT_SHIFT, STRUCTURED};

/// An input of a fuzz target.
pub struct Seed {
    pub target: &'static str,
    pub name: String,
    pub bytes: Vec<u8>,
}

/// All of them.
pub fn all() -> Vec<Seed> {
    let haggling = negotiations().into_iter().enumerate();
    let haggling = haggling.map(|(number, (name, bytes))| Seed {
        target: "nbd_negotiation",
        name: format!("seed-{name}"),
        // Whole, in small pieces, and in pieces of all sizes, by turns.
        bytes: [&[[0, 1, 23, 200][number % 4]], &bytes[..]].concat(),
    });
    let serving = transmissions().into_iter().enumerate();
    let serving = serving.map(|(number, (name, terms, bytes))| Seed {
        target: "nbd_transmission",
        name: format!("seed-{name}"),
        bytes: [&[terms, [0, 28, 150, 7][number % 4]], &bytes[..]].concat(),
    });
    haggling.chain(serving).collect()
}

#[test]
fn every_seed_is_in_the_corpus_as_it_is_made_here() {
    for Seed { target, name, bytes } in all() {
        let path = directory(target).join(name);
        let found = fs::read(&path).unwrap_or_default();
        assert!(found == bytes, "{} is missing or old: see tests/fuzz/README.md", path.display());
    }
}

#[test]
#[ignore = "it writes to the source tree"]
fn make_seeds() {
    for Seed { target, name, bytes } in all() {
        fs::create_dir_all(directory(target)).unwrap();
        fs::write(directory(target).join(name), bytes).unwrap();
    }
}

/// Client flags and options, each under a name.
fn negotiations() -> Vec<(&'static str, Vec<u8>)> {
    let start = be32(HANDSHAKE_FLAGS.into()).to_vec();
    let with = |options: &[Vec<u8>]| [&start[..], &options.concat()].concat();
    let go = |name: &[u8]| option(OPT_GO, &inform(name, &[INFO_NAME, INFO_BLOCK_SIZE]));
    let info = |name: &[u8]| option(OPT_INFO, &inform(name, &[INFO_DESCRIPTION, 9]));
    let structured = option(OPT_STRUCTURED_REPLY, &[]);
    let list = option(OPT_LIST, &[]);
    let abort = option(OPT_ABORT, &[]);
    let choose =
        |name: &[u8], queries: &[&[u8]]| option(OPT_SET_META_CONTEXT, &contexts(name, queries));
    let ask =
        |name: &[u8], queries: &[&[u8]]| option(OPT_LIST_META_CONTEXT, &contexts(name, queries));
    let base = BASE_ALLOCATION;
    let read = request(0, CMD_READ, 9, 4000, 5000);
    let status = request(FLAG_REQ_ONE, CMD_BLOCK_STATUS, 8, 0, 8192);
    let wrong_count = option(OPT_GO, &[string(b"swap0"), be16(3).to_vec()].concat());
    let long_name = option(OPT_INFO, &[&be32(u32::MAX)[..], b"swap0", &be16(0)].concat());
    let odd = option(OPT_INFO, &[inform(b"swap0", &[1]), vec![0]].concat());
    let many_queries = [&string(b"swap0")[..], &be32(u32::MAX), &[0; 40]].concat();
    let bad_magic = [&be64(IHAVEOPT ^ 1)[..], &be32(OPT_LIST), &be32(0)].concat();
    vec![
        ("go", with(&[go(b"swap0"), read.clone()])),
        ("list-info-go", with(&[list.clone(), info(b"swap1"), go(b"swap1"), read.clone()])),
        (
            "structured",
            with(&[
                structured.clone(),
                choose(b"swap0", &[base]),
                go(b"swap0"),
                read.clone(),
                status,
            ]),
        ),
        ("list-contexts", with(&[structured.clone(), ask(b"dry", &[b"base:"]), ask(b"dry", &[])])),
        (
            "contexts-of-another",
            with(&[structured.clone(), choose(b"swap1", &[b"qemu:", base]), go(b"swap0")]),
        ),
        ("contexts-unstructured", with(&[choose(b"swap0", &[base]), ask(b"swap0", &[])])),
        (
            "contexts-malformed",
            with(&[structured.clone(), option(OPT_SET_META_CONTEXT, &many_queries), list.clone()]),
        ),
        ("export-name", with(&[option(OPT_EXPORT_NAME, b"swap0"), read.clone()])),
        ("export-name-zeroes", [be32(1).to_vec(), option(OPT_EXPORT_NAME, b"dry"), read].concat()),
        ("export-name-unknown", with(&[option(OPT_EXPORT_NAME, b"swap9"), list.clone()])),
        ("export-name-too-long", with(&[option_header(OPT_EXPORT_NAME, OPTION_BYTES_MAX + 1)])),
        ("export-name-empty", with(&[option(OPT_EXPORT_NAME, b"")])),
        ("go-unknown", with(&[go(b"swap9"), go(b""), go(&[b'x'; 300]), abort.clone()])),
        ("go-wrong-count", with(&[wrong_count, list.clone(), go(b"swap0")])),
        ("info-name-too-long", with(&[long_name, odd, list.clone()])),
        ("info-empty", with(&[option(OPT_INFO, &[]), option(OPT_GO, &[0; 3]), list.clone()])),
        ("list-with-data", with(&[option(OPT_LIST, b"x"), option(OPT_STRUCTURED_REPLY, b"y")])),
        ("abort", with(&[abort.clone(), list.clone()])),
        (
            "unknown-options",
            with(&[option(5, &[]), option(0, b"abc"), option(11, &[9; 70]), abort]),
        ),
        ("too-big", with(&[option(OPT_LIST, &vec![0; 8193]), list.clone()])),
        ("much-to-skip", with(&[option(99, &vec![1; 9000]), list.clone()])),
        ("length-4g", with(&[option_header(OPT_GO, u32::MAX), vec![0; 30]])),
        ("too-many", with(&vec![option(77, &[]); 130])),
        ("bad-magic", with(&[list.clone(), bad_magic, list.clone()])),
        ("bad-flags", [be32(0x8000_0003).to_vec(), list.clone()].concat()),
        ("no-flags", [be32(0).to_vec(), list.clone()].concat()),
        ("half-flags", vec![0, 0]),
        ("half-header", with(&[list.clone(), option_header(OPT_GO, 20)[..9].to_vec()])),
        ("half-data", with(&[list, inform(b"swap0", &[]), vec![0; 5]])[..30].to_vec()),
        ("http", b"GET / HTTP/1.1\r\nHost: swap\r\n\r\n".to_vec()),
    ]
}

/// Terms and requests, each under a name.
fn transmissions() -> Vec<(&'static str, u8, Vec<u8>)> {
    const SIMPLE: u8 = 0;
    const BOTH: u8 = STRUCTURED | CONTEXTS;
    const PLAIN: u8 = 1 << EXPORT_SHIFT;
    const DRY: u8 = 2 << EXPORT_SHIFT;
    const BYTES: u32 = 256 << 10;
    let write = |flags, cookie, offset, data: &[u8]| {
        [&request(flags, CMD_WRITE, cookie, offset, data.len() as u32)[..], data].concat()
    };
    let read = |flags, offset, length| request(flags, CMD_READ, offset ^ 0x77, offset, length);
    let zeroes = |flags, offset, length| request(flags, CMD_WRITE_ZEROES, 6, offset, length);
    let trim = |offset, length| request(0, CMD_TRIM, 4, offset, length);
    let status = |flags, offset, length| request(flags, CMD_BLOCK_STATUS, 7, offset, length);
    let flush = request(FLAG_FUA, CMD_FLUSH, 3, 0, 0);
    let cache = request(0, CMD_CACHE, 5, 0, BYTES);
    let disconnect = request(0, CMD_DISC, 2, 0, 0);
    let bad_magic = [&be32(REQUEST_MAGIC ^ 1)[..], &flush[4..]].concat();
    let patches = [write(0, 1, 4090, b"over the edge"), read(0, 4000, 300)].concat();
    let lost = 40 * 4096;
    let around_lost = [read(0, lost, 1), read(0, lost - 4096, 8192), read(0, 0, 200_000)].concat();
    let mend =
        [write(0, 1, lost + 5, b"patch"), zeroes(0, lost, 4096), read(0, lost, 4096)].concat();
    let states = [status(0, 0, BYTES), status(FLAG_REQ_ONE, 5, 9000), status(0, lost, 1)].concat();
    let bounds = [
        read(0, u64::from(BYTES) - 1, 2),
        write(0, 1, u64::from(BYTES), b"beyond"),
        trim(u64::MAX, u32::MAX),
        zeroes(0, 1, u32::MAX),
        status(0, 0, 0),
        read(0, u64::from(BYTES), 0),
    ]
    .concat();
    let unknown =
        [request(0, 8, 1, 0, 9), request(0xffff, 0xffff, 1, 0, 0), flush.clone()].concat();
    let bad_flags = [read(FLAG_REQ_ONE, 0, 1), write(FLAG_DF, 1, 0, b"no"), trim(0, 0)].concat();
    let commands =
        [&flush[..], &cache, &trim(4095, 9000), &zeroes(FLAG_NO_HOLE, 100, 9000)].concat();
    let whole = [write(FLAG_FUA, 1, 8192, &[0x5a; 4096]), read(0, 8000, 5000)].concat();
    vec![
        ("patches-simple", SIMPLE, patches.clone()),
        ("patches-structured", BOTH, patches.clone()),
        ("whole-page", SIMPLE, whole.clone()),
        ("whole-page-structured", BOTH, whole.clone()),
        ("whole-page-dry", DRY, [whole, read(0, 8192, 4096)].concat()),
        ("patches-dry", DRY | STRUCTURED, [patches, zeroes(FLAG_NO_HOLE, 0, 20_000)].concat()),
        ("commands", SIMPLE, [commands.clone(), read(0, 0, 20_000)].concat()),
        ("commands-plain", PLAIN, commands.clone()),
        ("commands-then-disconnect", BOTH, [commands, disconnect.clone(), flush.clone()].concat()),
        ("all-simple", SIMPLE, [read(0, 0, BYTES), read(FLAG_FUA, 0, 131_073)].concat()),
        ("all-structured", BOTH, [read(0, 1, 200_000), read(FLAG_DF, 60_000, 150_000)].concat()),
        ("lost-simple", SIMPLE, around_lost.clone()),
        ("lost-structured", BOTH, [around_lost, read(FLAG_DF, 0, BYTES)].concat()),
        ("lost-mended", BOTH, mend),
        ("states", BOTH, [trim(0, 12_288), states.clone()].concat()),
        ("states-not-chosen", STRUCTURED, states),
        ("bounds-simple", SIMPLE, bounds.clone()),
        ("bounds-structured", BOTH, bounds),
        ("unknown", SIMPLE, unknown.clone()),
        ("unknown-structured", BOTH | PLAIN, unknown),
        ("bad-flags", STRUCTURED | PLAIN, bad_flags),
        ("no-length", BOTH, [read(0, 7, 0), read(FLAG_DF, 7, 0), write(0, 1, 0, b"")].concat()),
        ("bad-magic", SIMPLE, [flush.clone(), bad_magic, flush.clone()].concat()),
        ("write-too-long", SIMPLE, request(0, CMD_WRITE, 1, 0, DATA_BYTES_MAX + 1)),
        ("write-4g", BOTH, request(0, CMD_WRITE, 1, u64::MAX, u32::MAX)),
        ("half-header", SIMPLE, [&flush[..], &flush[..13]].concat()),
        ("half-data", SIMPLE, write(0, 1, 0, &[3; 6000])[..5000].to_vec()),
        ("half-refused", BOTH, write(0, 1, 1 << 40, &[3; 600])[..500].to_vec()),
        ("disconnect", SIMPLE, disconnect),
        ("nothing", BOTH, Vec::new()),
    ]
}
