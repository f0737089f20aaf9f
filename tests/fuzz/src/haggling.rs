//! What a server must answer to the first half of a conversation: flags and options.
//!
//! Each option of the input is judged here again, by another parser than the server's.

use super::fixture::{BYTES, DRY, FLUSHED, PLAIN};
use super::reader::Reader;
use super::spec::*;

/// What the two sides know when the negotiation is over.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    pub name: &'static [u8],
    pub structured: bool,
    /// Whether `base:allocation` was chosen for this export.
    pub contexts: bool,
}

impl Terms {
    /// Whether FLUSH and FUA were offered.
    pub fn flush(&self) -> bool {
        self.name != PLAIN
    }

    /// What the export can do.
    fn flags(&self) -> u16 {
        let base = 1 << 0 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 10 | 1 << 11;
        base | if self.flush() { 1 << 2 | 1 << 3 } else { 0 } | u16::from(self.structured) << 7
    }
}

/// How a negotiation stands at the end of what the client said.
#[derive(Debug)]
pub enum Stands {
    Agreed(Terms),
    /// The server ends the connection.
    Ended,
    /// Something is to be said still.
    Open,
}

#[derive(Default)]
struct Haggling {
    no_zeroes: bool,
    structured: bool,
    contexts_of: Option<&'static [u8]>,
}

/// Checks what the server said to what the client did, from the first byte on until they agree.
pub fn check(asked: &mut Reader<'_>, said: &mut Reader<'_>) -> Stands {
    assert_eq!(said.u64(), Some(NBDMAGIC));
    assert_eq!(said.u64(), Some(IHAVEOPT));
    assert_eq!(said.u16(), Some(HANDSHAKE_FLAGS));
    let Some(flags) = asked.u32() else { return Stands::Open };
    if flags & !u32::from(HANDSHAKE_FLAGS) != 0 {
        return Stands::Ended;
    }
    let mut haggling = Haggling { no_zeroes: flags & NO_ZEROES != 0, ..Haggling::default() };
    for count in 0.. {
        let Some(mut header) = asked.take(16).map(Reader) else { break };
        let magic = header.u64().expect("it is all there");
        let option = header.u32().expect("it is all there");
        let length = header.u32().expect("it is all there");
        // There is no answer to a name that is too long, so nothing of it is waited for.
        let most = if option == OPT_EXPORT_NAME { OPTION_BYTES_MAX } else { SKIP_BYTES_MAX };
        if magic != IHAVEOPT || length > most || count == OPTIONS_MAX {
            return Stands::Ended;
        }
        let Some(data) = asked.take(length as usize) else { break };
        if let Some(stands) = haggling.option(option, data, said) {
            return stands;
        }
    }
    Stands::Open
}

impl Haggling {
    fn option(&mut self, option: u32, data: &[u8], said: &mut Reader<'_>) -> Option<Stands> {
        if option == OPT_EXPORT_NAME {
            return Some(self.export_name(data, said));
        }
        let is_known = [OPT_ABORT, OPT_LIST, OPT_INFO, OPT_GO, OPT_STRUCTURED_REPLY];
        let is_context = [OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT].contains(&option);
        let expected = if !is_context && !is_known.contains(&option) {
            REP_ERR_UNSUP
        } else if data.len() > OPTION_BYTES_MAX as usize {
            REP_ERR_TOO_BIG
        } else {
            match option {
                OPT_LIST => self.list(data, said),
                OPT_INFO | OPT_GO => match self.inform(option, data, said) {
                    Ok(terms) if option == OPT_GO => {
                        answer(said, option, REP_ACK);
                        return Some(Stands::Agreed(terms));
                    }
                    Ok(_) => REP_ACK,
                    Err(kind) => kind,
                },
                OPT_STRUCTURED_REPLY if data.is_empty() => {
                    self.structured = true;
                    REP_ACK
                }
                OPT_STRUCTURED_REPLY => REP_ERR_INVALID,
                OPT_ABORT => REP_ACK,
                _ => self.contexts(option, data, said),
            }
        };
        let ends = option == OPT_ABORT && expected == REP_ACK;
        answer(said, option, expected);
        ends.then_some(Stands::Ended)
    }

    fn export_name(&self, name: &[u8], said: &mut Reader<'_>) -> Stands {
        let Some(name) = find(name) else { return Stands::Ended };
        let terms = self.terms(name);
        assert_eq!(said.u64(), Some(BYTES as u64));
        assert_eq!(said.u16(), Some(terms.flags()));
        if !self.no_zeroes {
            assert_eq!(said.take(124), Some(&[0; 124][..]));
        }
        Stands::Agreed(terms)
    }

    fn list(&self, data: &[u8], said: &mut Reader<'_>) -> u32 {
        if !data.is_empty() {
            return REP_ERR_INVALID;
        }
        for name in [FLUSHED, PLAIN, DRY] {
            assert_eq!(answer(said, OPT_LIST, REP_SERVER), string(name));
        }
        REP_ACK
    }

    fn inform(&self, option: u32, data: &[u8], said: &mut Reader<'_>) -> Result<Terms, u32> {
        let (name, kinds) = split_inform(data).ok_or(REP_ERR_INVALID)?;
        let name = find(name).ok_or(REP_ERR_UNKNOWN)?;
        let terms = self.terms(name);
        let about = [&be16(INFO_EXPORT)[..], &be64(BYTES as u64), &be16(terms.flags())].concat();
        assert_eq!(answer(said, option, REP_INFO), about);
        if kinds.contains(&INFO_NAME) {
            let about = [&be16(INFO_NAME)[..], name].concat();
            assert_eq!(answer(said, option, REP_INFO), about);
        }
        let sizes = [512, 4096, DATA_BYTES_MAX].map(be32).concat();
        let about = [&be16(INFO_BLOCK_SIZE)[..], &sizes].concat();
        assert_eq!(answer(said, option, REP_INFO), about);
        Ok(terms)
    }

    fn contexts(&mut self, option: u32, data: &[u8], said: &mut Reader<'_>) -> u32 {
        let is_set = option == OPT_SET_META_CONTEXT;
        if is_set {
            self.contexts_of = None;
        }
        let Some((name, queries)) = split_contexts(data).filter(|_| self.structured) else {
            return REP_ERR_INVALID;
        };
        let Some(name) = find(name) else { return REP_ERR_UNKNOWN };
        let all = !is_set && (queries.is_empty() || queries.contains(&&b"base:"[..]));
        if all || queries.contains(&BASE_ALLOCATION) {
            let about = answer(said, option, REP_META_CONTEXT);
            assert_eq!(&about[4..], BASE_ALLOCATION);
            if is_set {
                self.contexts_of = Some(name);
            }
        }
        REP_ACK
    }

    fn terms(&self, name: &'static [u8]) -> Terms {
        Terms { name, structured: self.structured, contexts: self.contexts_of == Some(name) }
    }
}

/// Takes one answer to `option`, which must be of this kind, and returns its data. What is said of
/// an error is not looked at.
fn answer<'a>(said: &mut Reader<'a>, option: u32, kind: u32) -> &'a [u8] {
    assert_eq!(said.u64(), Some(OPTION_REPLY_MAGIC), "no answer to option {option}");
    assert_eq!(said.u32(), Some(option));
    let found = said.u32().expect("an answer has a kind");
    assert_eq!(found, kind, "option {option} was answered with {found:#x}, not {kind:#x}");
    let data = said.string().expect("an answer has its data");
    assert!(data.is_empty() || kind != REP_ACK, "there is nothing to say with an ACK");
    data
}

fn find(name: &[u8]) -> Option<&'static [u8]> {
    [FLUSHED, PLAIN, DRY].into_iter().find(|known| *known == name)
}

fn split_inform(data: &[u8]) -> Option<(&[u8], Vec<u16>)> {
    let mut data = Reader(data);
    let name = data.string()?;
    let count = data.u16()?;
    let kinds = (0..count).map(|_| data.u16()).collect::<Option<_>>()?;
    data.is_empty().then_some((name, kinds))
}

fn split_contexts(data: &[u8]) -> Option<(&[u8], Vec<&[u8]>)> {
    let mut data = Reader(data);
    let name = data.string()?;
    let count = data.u32()?;
    let queries = (0..count).map(|_| data.string()).collect::<Option<_>>()?;
    data.is_empty().then_some((name, queries))
}
