//! The negotiation: options and their answers, until a client has chosen an export.
//!
//! Fixed newstyle. An option that is not known, or not in order, is answered with the protocol's
//! error, and the next one is read where it begins. Client and server take turns here, so that
//! nothing is answered before there is room for the longest answer.

use zerocopy::big_endian::{U16, U32};
use zerocopy::{FromBytes, IntoBytes};

use super::buffer::{BUFFER_BYTES, Inbox, Outbox};
use super::exports::{Export, Exports, Visit};
use super::request::{BLOCK_BYTES_MIN, BLOCK_BYTES_PREFERRED, DATA_BYTES_MAX, Terms};
use super::wire::{
    BASE_ALLOCATION, BASE_ALLOCATION_ID, BlockSizes, ExportInfo, GREETING_MAGIC, Greeting,
    OPTION_MAGIC, OPTION_REPLY_MAGIC, OptionHeader, OptionReply, answer, export, handshake, info,
    option,
};

/// Bytes of an option's data that are looked at. The protocol's longest name has 4096.
const OPTION_BYTES_MAX: usize = 8 << 10;

/// Bytes of an option's data that are skipped; a client with more is sent away.
const SKIP_BYTES_MAX: u32 = 1 << 20;

/// Options that a client may send.
const OPTIONS_MAX: u32 = 128;

/// Room for all that answers one option: LIST has an answer for each export.
const ANSWER_BYTES_MAX: usize = 32 << 10;

const _: () = assert!(OPTION_BYTES_MAX + size_of::<OptionHeader>() <= BUFFER_BYTES);
const _: () = assert!(
    ANSWER_BYTES_MAX > tmem::POOLS_MAX * (size_of::<OptionReply>() + 4 + crate::daemon::NAME_MAX)
);

/// What goes with [`answer::UNKNOWN`].
const NO_EXPORT: &[u8] = b"there is no such export";

/// How far a negotiation has come, when it cannot go on by itself.
pub enum Progress {
    /// The client has chosen.
    Agreed(Agreement),
    /// The connection ends once everything is sent.
    End,
    /// Everything must be sent first.
    Flush,
    /// More must come in first.
    Hungry,
}

/// What was agreed upon.
pub struct Agreement {
    /// The export.
    pub visit: Visit,
    /// What requests depend on.
    pub terms: Terms,
}

impl Agreement {
    /// With a client that does not negotiate and is told [`transmission_flags`] in another way, without structured replies.
    pub fn without_negotiation(visit: Visit) -> Self {
        Negotiation::new().agreement(visit)
    }
}

/// A negotiation under way.
pub struct Negotiation {
    stage: Stage,
    no_zeroes: bool,
    structured: bool,
    /// The export for which the context `base:allocation` was chosen.
    allocation: Option<Name>,
    options: u32,
}

enum Stage {
    /// Nothing has been said.
    Silence,
    /// The client's flags come next.
    Flags,
    /// An option comes next.
    Option,
    /// So many bytes of an option's data are skipped, and then it gets that answer.
    Skip { left: u32, option: u32, kind: u32 },
}

/// An export's name, which is short.
#[derive(Clone, Copy, Eq, PartialEq)]
struct Name {
    bytes: [u8; crate::daemon::NAME_MAX],
    length: usize,
}

impl Negotiation {
    /// One that has not begun.
    pub fn new() -> Self {
        let stage = Stage::Silence;
        Self { stage, no_zeroes: false, structured: false, allocation: None, options: 0 }
    }

    /// Goes on as far as possible.
    pub fn advance(
        &mut self,
        inbox: &mut Inbox,
        outbox: &mut Outbox,
        exports: &Exports,
    ) -> Progress {
        loop {
            if outbox.room() < ANSWER_BYTES_MAX {
                return Progress::Flush;
            }
            if let Some(progress) = self.step(inbox, outbox, exports) {
                return progress;
            }
        }
    }

    fn step(
        &mut self,
        inbox: &mut Inbox,
        outbox: &mut Outbox,
        exports: &Exports,
    ) -> Option<Progress> {
        match self.stage {
            Stage::Silence => {
                outbox.push(&Greeting {
                    magic: GREETING_MAGIC.into(),
                    option_magic: OPTION_MAGIC.into(),
                    flags: (handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES).into(),
                });
                self.stage = Stage::Flags;
                None
            }
            Stage::Flags => self.take_flags(inbox),
            Stage::Option => self.take_option(inbox, outbox, exports),
            Stage::Skip { left: 0, option, kind } => {
                reply(outbox, option, kind, &[]);
                self.stage = Stage::Option;
                None
            }
            Stage::Skip { left, option, kind } => {
                let count = inbox.unread().len().min(left as usize);
                inbox.consume(count);
                self.stage = Stage::Skip { left: left - count as u32, option, kind };
                (count == 0).then_some(Progress::Hungry)
            }
        }
    }

    fn take_flags(&mut self, inbox: &mut Inbox) -> Option<Progress> {
        let Ok((flags, _)) = U32::ref_from_prefix(inbox.unread()) else {
            return Some(Progress::Hungry);
        };
        let flags = flags.get();
        inbox.consume(size_of::<U32>());
        let known = u32::from(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
        if flags & !known != 0 {
            return Some(Progress::End);
        }
        self.no_zeroes = flags & u32::from(handshake::NO_ZEROES) != 0;
        self.stage = Stage::Option;
        None
    }

    fn take_option(
        &mut self,
        inbox: &mut Inbox,
        outbox: &mut Outbox,
        exports: &Exports,
    ) -> Option<Progress> {
        let Ok((header, rest)) = OptionHeader::ref_from_prefix(inbox.unread()) else {
            return Some(Progress::Hungry);
        };
        let (option, length) = (header.option.get(), header.length.get());
        if header.magic.get() != OPTION_MAGIC
            || length > SKIP_BYTES_MAX
            || self.options >= OPTIONS_MAX
        {
            return Some(Progress::End);
        }
        let bytes = length as usize;
        // The old way to choose has no errors.
        if option == option::EXPORT_NAME && bytes > OPTION_BYTES_MAX {
            return Some(Progress::End);
        }
        let kind = match is_known(option) {
            false => Some(answer::UNSUPPORTED),
            true if bytes > OPTION_BYTES_MAX => Some(answer::TOO_BIG),
            true => None,
        };
        if let Some(kind) = kind {
            self.options += 1;
            inbox.consume(size_of::<OptionHeader>());
            self.stage = Stage::Skip { left: length, option, kind };
            return None;
        }
        let data = rest.get(..bytes);
        let Some(data) = data else { return Some(Progress::Hungry) };
        self.options += 1;
        let progress = self.answer(option, data, outbox, exports);
        inbox.consume(size_of::<OptionHeader>() + bytes);
        progress
    }

    fn answer(
        &mut self,
        option: u32,
        data: &[u8],
        outbox: &mut Outbox,
        exports: &Exports,
    ) -> Option<Progress> {
        match option {
            option::EXPORT_NAME => return Some(self.export_name(data, outbox, exports)),
            option::ABORT => {
                reply(outbox, option, answer::ACK, &[]);
                return Some(Progress::End);
            }
            option::LIST => list(data, outbox, exports),
            option::INFO | option::GO => return self.inform(option, data, outbox, exports),
            option::STRUCTURED_REPLY => {
                self.structured |= data.is_empty();
                let kind = if data.is_empty() { answer::ACK } else { answer::INVALID };
                reply(outbox, option, kind, &[]);
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                self.contexts(option, data, outbox, exports);
            }
            _ => unreachable!("an unknown option was skipped"),
        }
        None
    }

    /// The old way to choose: there is no answer to a wrong name but the end.
    fn export_name(&self, name: &[u8], outbox: &mut Outbox, exports: &Exports) -> Progress {
        let Some(visit) = exports.visit(name) else { return Progress::End };
        let agreement = self.agreement(visit);
        outbox.push(&export_info(agreement.visit.export(), self.structured));
        if !self.no_zeroes {
            outbox.append(124).fill(0);
        }
        Progress::Agreed(agreement)
    }

    /// INFO and GO.
    fn inform(
        &self,
        option: u32,
        data: &[u8],
        outbox: &mut Outbox,
        exports: &Exports,
    ) -> Option<Progress> {
        let Some((name, wanted)) = parse_inform(data) else {
            reply(outbox, option, answer::INVALID, &[]);
            return None;
        };
        if option == option::INFO {
            match exports.with(name, |about| self.describe(option, about, wanted, outbox)) {
                Some(()) => reply(outbox, option, answer::ACK, &[]),
                None => reply(outbox, option, answer::UNKNOWN, NO_EXPORT),
            }
            return None;
        }
        let Some(visit) = exports.visit(name) else {
            reply(outbox, option, answer::UNKNOWN, NO_EXPORT);
            return None;
        };
        self.describe(option, visit.export(), wanted, outbox);
        reply(outbox, option, answer::ACK, &[]);
        Some(Progress::Agreed(self.agreement(visit)))
    }

    /// All that an answer to INFO or GO says of an export.
    fn describe(&self, option: u32, about: &Export, wanted: &[U16], outbox: &mut Outbox) {
        let export_info = export_info(about, self.structured);
        let kind = U16::new(info::EXPORT);
        let parts = [kind.as_bytes(), export_info.as_bytes()];
        reply_with(outbox, option, answer::INFO, &parts);
        if wanted.iter().any(|kind| kind.get() == info::NAME) {
            let kind = U16::new(info::NAME);
            let parts = [kind.as_bytes(), about.name().as_bytes()];
            reply_with(outbox, option, answer::INFO, &parts);
        }
        let sizes = BlockSizes {
            kind: info::BLOCK_SIZE.into(),
            minimum: BLOCK_BYTES_MIN.into(),
            preferred: BLOCK_BYTES_PREFERRED.into(),
            maximum: DATA_BYTES_MAX.into(),
        };
        reply(outbox, option, answer::INFO, sizes.as_bytes());
    }

    /// LIST_META_CONTEXT and SET_META_CONTEXT.
    fn contexts(&mut self, option: u32, data: &[u8], outbox: &mut Outbox, exports: &Exports) {
        let is_set = option == option::SET_META_CONTEXT;
        if is_set {
            self.allocation = None;
        }
        let parsed = parse_contexts(data, is_set).filter(|_| self.structured);
        let Some((name, is_wanted)) = parsed else {
            return reply(outbox, option, answer::INVALID, &[]);
        };
        let Some(name) = exports.with(name, Name::of) else {
            return reply(outbox, option, answer::UNKNOWN, NO_EXPORT);
        };
        if is_wanted {
            // A list gives no numbers.
            let id = U32::new(if is_set { BASE_ALLOCATION_ID } else { 0 });
            let parts = [id.as_bytes(), BASE_ALLOCATION];
            reply_with(outbox, option, answer::META_CONTEXT, &parts);
            if is_set {
                self.allocation = Some(name);
            }
        }
        reply(outbox, option, answer::ACK, &[]);
    }

    fn agreement(&self, visit: Visit) -> Agreement {
        let export = visit.export();
        let terms = Terms {
            bytes: export.device().bytes(),
            flush: export.offers_flush(),
            structured: self.structured,
            allocation: self.allocation == Some(Name::of(export)),
        };
        Agreement { visit, terms }
    }
}

impl Name {
    fn of(export: &Export) -> Self {
        let name = export.name().as_bytes();
        let mut bytes = [0; crate::daemon::NAME_MAX];
        bytes[..name.len()].copy_from_slice(name);
        Self { bytes, length: name.len() }
    }
}

fn is_known(option: u32) -> bool {
    use option::*;
    let others = [LIST_META_CONTEXT, SET_META_CONTEXT, STRUCTURED_REPLY];
    matches!(option, EXPORT_NAME | ABORT | LIST | INFO | GO) || others.contains(&option)
}

fn list(data: &[u8], outbox: &mut Outbox, exports: &Exports) {
    if !data.is_empty() {
        return reply(outbox, option::LIST, answer::INVALID, &[]);
    }
    exports.for_each(|export| {
        let name = export.name().as_bytes();
        let length = U32::new(name.len() as u32);
        reply_with(outbox, option::LIST, answer::SERVER, &[length.as_bytes(), name]);
    });
    reply(outbox, option::LIST, answer::ACK, &[]);
}

fn export_info(about: &Export, structured: bool) -> ExportInfo {
    let flags = transmission_flags(about, structured);
    ExportInfo { bytes: about.device().bytes().into(), flags: flags.into() }
}

/// What a server offers on an export, to a client that wants structured replies or does not.
pub fn transmission_flags(about: &Export, structured: bool) -> u16 {
    let mut flags = export::HAS_FLAGS
        | export::SEND_TRIM
        | export::SEND_WRITE_ZEROES
        | export::SEND_FAST_ZERO
        | export::SEND_CACHE
        | export::CAN_MULTI_CONN;
    if about.offers_flush() {
        flags |= export::SEND_FLUSH | export::SEND_FUA;
    }
    if structured {
        flags |= export::SEND_DF;
    }
    flags
}

fn reply(outbox: &mut Outbox, option: u32, kind: u32, data: &[u8]) {
    reply_with(outbox, option, kind, &[data]);
}

fn reply_with(outbox: &mut Outbox, option: u32, kind: u32, parts: &[&[u8]]) {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    outbox.push(&OptionReply {
        magic: OPTION_REPLY_MAGIC.into(),
        option: option.into(),
        kind: kind.into(),
        length: (length as u32).into(),
    });
    parts.iter().for_each(|part| outbox.push(*part));
}

/// Name and wanted kinds of information: `u32 length, name, u16 count, count * u16`, no more and
/// no less.
fn parse_inform(data: &[u8]) -> Option<(&[u8], &[U16])> {
    let (name, rest) = split_string(data)?;
    let (count, rest) = U16::ref_from_prefix(rest).ok()?;
    let wanted = <[U16]>::ref_from_bytes(rest).ok()?;
    (wanted.len() == usize::from(count.get())).then_some((name, wanted))
}

/// Name, and whether one of the queries asks for `base:allocation`: `u32 length, name, u32 count,
/// count * (u32 length, query)`. To list without a query is to list all there is.
fn parse_contexts(data: &[u8], is_set: bool) -> Option<(&[u8], bool)> {
    let (name, rest) = split_string(data)?;
    let (count, mut rest) = U32::ref_from_prefix(rest).ok()?;
    let mut is_wanted = count.get() == 0 && !is_set;
    for _ in 0..count.get() {
        // Each takes four bytes at least, so that this ends with the data.
        let query;
        (query, rest) = split_string(rest)?;
        is_wanted |= query == BASE_ALLOCATION || (!is_set && query == b"base:");
    }
    rest.is_empty().then_some((name, is_wanted))
}

fn split_string(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = U32::ref_from_prefix(data).ok()?;
    rest.split_at_checked(length.get() as usize)
}
