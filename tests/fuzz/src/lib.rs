//! Conversations with the NBD protocol, made of arbitrary bytes, and the check that what comes out
//! is what must.
//!
//! The fuzz targets call [`negotiation`] and [`transmission`], and so does an ordinary test of the
//! front end for each file of `corpus/`. [`feed`] drives the protocol, [`haggling`] and [`serving`]
//! say what it must answer; they know the protocol from [`spec`] and not from the server.

mod feed;
pub mod fixture;
mod haggling;
pub mod reader;
mod serving;
pub mod spec;

use fixture::Fixture;
use haggling::Stands;
use reader::Reader;

/// Bits of the first byte of a [`transmission`]: structured replies, the metadata context, and from
/// the third on the number of the export.
pub const STRUCTURED: u8 = 1;
pub const CONTEXTS: u8 = 2;
pub const EXPORT_SHIFT: u32 = 2;

/// The first byte says in which pieces the rest comes, the rest is all that a client says.
pub fn negotiation(data: &[u8]) {
    let Some((how, input)) = data.split_first() else { return };
    converse(&fixture::fixture(), input, *how);
}

/// The first byte says what is agreed upon, the second in which pieces the rest comes, and the rest
/// are a client's requests.
pub fn transmission(data: &[u8]) {
    let Some(([terms, how], requests)) = data.split_first_chunk() else { return };
    let input = [&agreement(*terms)[..], requests].concat();
    converse(&fixture::fixture(), &input, *how);
}

/// What a client says to agree upon such terms.
fn agreement(terms: u8) -> Vec<u8> {
    let names = [fixture::FLUSHED, fixture::PLAIN, fixture::DRY, fixture::FLUSHED];
    let name = names[usize::from(terms >> EXPORT_SHIFT) % names.len()];
    let mut bytes = spec::be32(spec::HANDSHAKE_FLAGS.into()).to_vec();
    if terms & (STRUCTURED | CONTEXTS) != 0 {
        bytes.extend(spec::option(spec::OPT_STRUCTURED_REPLY, &[]));
    }
    if terms & CONTEXTS != 0 {
        let data = spec::contexts(name, &[spec::BASE_ALLOCATION]);
        bytes.extend(spec::option(spec::OPT_SET_META_CONTEXT, &data));
    }
    bytes.extend(spec::option(spec::OPT_GO, &spec::inform(name, &[])));
    bytes
}

fn converse(fixture: &Fixture, input: &[u8], how: u8) {
    let heard = feed::feed(fixture, input, how);
    let (mut asked, mut said) = (Reader(input), Reader(&heard.output));
    let ends = match haggling::check(&mut asked, &mut said) {
        Stands::Agreed(terms) => serving::check(terms, &mut asked, &mut said),
        Stands::Ended => true,
        Stands::Open => false,
    };
    assert_eq!(heard.ended, ends, "the server ends a connection exactly when it has to");
    assert!(said.is_empty(), "the server said {} bytes that nobody asked for", said.0.len());
}
