//! What the kernel says of its own types and functions: BTF, as `/sys/kernel/btf/vmlinux` has it.
//!
//! A pure function of its bytes, and total: whatever they are, it ends soon, in an answer or in none. An answer is given only
//! where there is exactly one: a name that two types have, with different answers, has none. Source:
//! `Documentation/bpf/btf.rst`.

use zerocopy::{FromBytes, Immutable, KnownLayout, little_endian};

type U16 = little_endian::U16;
type U32 = little_endian::U32;

const MAGIC: u16 = 0xeb9f;
const VERSION: u8 = 1;

/// Types that name others are followed so far, and structures without a name looked into so deep.
const DEPTH_MAX: usize = 16;

/// Members looked at for one answer. The largest structure of a kernel has some hundred.
const MEMBERS_MAX: usize = 1 << 16;

const KIND_INT: u32 = 1;
const KIND_PTR: u32 = 2;
const KIND_ARRAY: u32 = 3;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_ENUM: u32 = 6;
const KIND_FWD: u32 = 7;
const KIND_TYPEDEF: u32 = 8;
const KIND_VOLATILE: u32 = 9;
const KIND_CONST: u32 = 10;
const KIND_RESTRICT: u32 = 11;
const KIND_FUNC: u32 = 12;
const KIND_FUNC_PROTO: u32 = 13;
const KIND_VAR: u32 = 14;
const KIND_DATASEC: u32 = 15;
const KIND_FLOAT: u32 = 16;
const KIND_DECL_TAG: u32 = 17;
const KIND_TYPE_TAG: u32 = 18;
const KIND_ENUM64: u32 = 19;

/// What all begins with, `struct btf_header`.
#[derive(FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    magic: U16,
    version: u8,
    flags: u8,
    header_bytes: U32,
    types_offset: U32,
    types_bytes: U32,
    strings_offset: U32,
    strings_bytes: U32,
}

/// What each type begins with, `struct btf_type`.
#[derive(Clone, Copy, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Head {
    name: U32,
    info: U32,
    /// The size, or the type that this one is made of.
    size_or_kind: U32,
}

impl Head {
    fn kind(self) -> u32 {
        self.info.get() >> 24 & 0x1f
    }

    fn items(self) -> usize {
        (self.info.get() & 0xffff) as usize
    }

    /// Whether its members' offsets hold the widths of bit fields as well.
    fn has_widths(self) -> bool {
        self.info.get() >> 31 != 0
    }

    /// Bytes of what follows.
    fn rest(self) -> Option<usize> {
        Some(match self.kind() {
            KIND_INT | KIND_VAR | KIND_DECL_TAG => 4,
            KIND_ARRAY => size_of::<Array>(),
            KIND_STRUCT | KIND_UNION => self.items() * size_of::<Item>(),
            KIND_ENUM | KIND_FUNC_PROTO => self.items() * size_of::<Pair>(),
            KIND_DATASEC | KIND_ENUM64 => self.items() * size_of::<Item>(),
            KIND_PTR | KIND_FWD | KIND_TYPEDEF | KIND_VOLATILE | KIND_CONST | KIND_RESTRICT
            | KIND_FUNC | KIND_FLOAT | KIND_TYPE_TAG => 0,
            _ => return None,
        })
    }
}

/// `struct btf_array`.
#[derive(FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Array {
    element: U32,
    index: U32,
    elements: U32,
}

/// A member of a structure, `struct btf_member`, or of an enumeration of 64 bits.
#[derive(Clone, Copy, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Item {
    name: U32,
    first: U32,
    second: U32,
}

/// A parameter, `struct btf_param`, or an enumerator, `struct btf_enum`.
#[derive(Clone, Copy, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Pair {
    name: U32,
    value: U32,
}

/// Why bytes are not BTF that can be read.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum BtfError {
    /// It does not begin as such.
    #[error("it does not begin like a description of types")]
    NotBtf,
    /// It ends too early, or its parts are not where it says.
    #[error("it ends in the middle of a part")]
    Truncated,
    /// It has kinds of types that are newer than this program, and so cannot be skipped.
    #[error("it has types of a kind, {0}, that this version of tmem does not know")]
    Unknown(u32),
}

/// What sort of value something is, as far as that matters in a call.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Sort {
    /// An integer.
    Integer,
    /// The address of something.
    Pointer,
    /// A structure, by its value.
    Structure,
    /// Any other.
    Other,
}

/// A member of a structure.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Member {
    /// Where it is, in bytes.
    pub offset: u32,
    /// Its size in bytes.
    pub bytes: u32,
    /// What it is.
    pub sort: Sort,
}

/// A parameter of a function.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Parameter<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its size in bytes.
    pub bytes: u32,
    /// What it is.
    pub sort: Sort,
}

/// See the module's description.
#[derive(Debug)]
pub struct Btf<'a> {
    types: &'a [u8],
    strings: &'a [u8],
    /// Where each type is among them, from number 1 on.
    offsets: Vec<u32>,
}

impl<'a> Btf<'a> {
    /// Finds the types. What they name is looked at when it is asked for.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, BtfError> {
        let (header, _) = Header::ref_from_prefix(bytes).map_err(|_| BtfError::NotBtf)?;
        if header.magic.get() != MAGIC || header.version != VERSION {
            return Err(BtfError::NotBtf);
        }
        let part = |offset: U32, length: U32| {
            let begin = (header.header_bytes.get() as usize).checked_add(offset.get() as usize)?;
            bytes.get(begin..begin.checked_add(length.get() as usize)?)
        };
        let types = part(header.types_offset, header.types_bytes).ok_or(BtfError::Truncated)?;
        let strings = part(header.strings_offset, header.strings_bytes);
        let strings = strings.ok_or(BtfError::Truncated)?;
        let (mut offsets, mut at) = (Vec::new(), 0);
        while at < types.len() {
            let (head, rest) =
                Head::read_from_prefix(&types[at..]).map_err(|_| BtfError::Truncated)?;
            let more = head.rest().ok_or(BtfError::Unknown(head.kind()))?;
            if rest.len() < more {
                return Err(BtfError::Truncated);
            }
            offsets.push(at as u32);
            at += size_of::<Head>() + more;
        }
        Ok(Self { types, strings, offsets })
    }

    /// The member of that name of the structure of that name, and so of those without a name inside it.
    pub fn member(&self, structure: &str, member: &str) -> Option<Member> {
        let structures = self.named(structure, |kind| kind == KIND_STRUCT);
        the_only(structures.map(|(id, _)| {
            let mut left = MEMBERS_MAX;
            self.member_in(id, member, 0, &mut left)
        }))
    }

    /// How large the structure of that name is.
    pub fn structure_bytes(&self, name: &str) -> Option<u32> {
        let structures = self.named(name, |kind| kind == KIND_STRUCT);
        the_only(structures.map(|(_, head)| Some(head.size_or_kind.get())))
    }

    /// The parameters of the function of that name.
    pub fn function(&self, name: &str) -> Option<Vec<Parameter<'a>>> {
        let functions = self.named(name, |kind| kind == KIND_FUNC);
        the_only(functions.map(|(_, head)| self.parameters(head.size_or_kind.get())))
    }

    /// The value of the enumerator of that name.
    pub fn enumerator(&self, name: &str) -> Option<u64> {
        let all = (1..=self.offsets.len() as u32).filter_map(|id| self.head(id));
        the_only(all.flat_map(|(head, rest)| {
            let kind = head.kind();
            let narrow = (kind == KIND_ENUM).then(|| items::<Pair>(rest, head.items()));
            let wide = (kind == KIND_ENUM64).then(|| items::<Item>(rest, head.items()));
            let narrow = narrow.into_iter().flatten().filter(|pair| self.is(pair.name, name));
            let wide = wide.into_iter().flatten().filter(|item| self.is(item.name, name));
            let narrow = narrow.map(|pair| u64::from(pair.value.get()));
            let wide =
                wide.map(|item| u64::from(item.second.get()) << 32 | u64::from(item.first.get()));
            narrow.chain(wide).map(Some)
        }))
    }

    fn head(&self, id: u32) -> Option<(Head, &'a [u8])> {
        let at = *self.offsets.get((id as usize).checked_sub(1)?)?;
        Head::read_from_prefix(self.types.get(at as usize..)?).ok()
    }

    fn string(&self, offset: U32) -> Option<&'a str> {
        let rest = self.strings.get(offset.get() as usize..)?;
        let end = rest.iter().position(|&byte| byte == 0)?;
        std::str::from_utf8(&rest[..end]).ok()
    }

    fn is(&self, offset: U32, name: &str) -> bool {
        let rest = self.strings.get(offset.get() as usize..);
        let after = rest.and_then(|rest| rest.strip_prefix(name.as_bytes()));
        after.is_some_and(|after| after.first() == Some(&0))
    }

    /// The types of that name that are such.
    fn named(&self, name: &str, such: fn(u32) -> bool) -> impl Iterator<Item = (u32, Head)> {
        (1..=self.offsets.len() as u32).filter_map(move |id| {
            let (head, _) = self.head(id)?;
            (such(head.kind()) && self.is(head.name, name)).then_some((id, head))
        })
    }

    fn member_in(&self, id: u32, name: &str, depth: usize, left: &mut usize) -> Option<Member> {
        let (head, rest) = self.resolve(id)?;
        if depth == DEPTH_MAX || !matches!(head.kind(), KIND_STRUCT | KIND_UNION) {
            return None;
        }
        for item in items::<Item>(rest, head.items()) {
            *left = left.checked_sub(1)?;
            let (bits, width) = match head.has_widths() {
                true => (item.second.get() & 0xff_ffff, item.second.get() >> 24),
                false => (item.second.get(), 0),
            };
            if self.is(item.name, name) {
                let (bytes, sort) = self.value(item.first.get())?;
                let whole = width == 0 && bits % 8 == 0;
                return whole.then_some(Member { offset: bits / 8, bytes, sort });
            }
            if self.is(item.name, "") && width == 0 && bits % 8 == 0 {
                let inner = self.member_in(item.first.get(), name, depth + 1, left);
                if let Some(inner) = inner {
                    let offset = inner.offset.checked_add(bits / 8)?;
                    return Some(Member { offset, ..inner });
                }
            }
        }
        None
    }

    fn parameters(&self, prototype: u32) -> Option<Vec<Parameter<'a>>> {
        let (head, rest) = self.head(prototype)?;
        if head.kind() != KIND_FUNC_PROTO {
            return None;
        }
        let parameter = |pair: Pair| {
            let (bytes, sort) = self.value(pair.value.get())?;
            Some(Parameter { name: self.string(pair.name)?, bytes, sort })
        };
        items::<Pair>(rest, head.items()).map(parameter).collect()
    }

    /// The type itself, behind other names and qualifiers.
    fn resolve(&self, mut id: u32) -> Option<(Head, &'a [u8])> {
        for _ in 0..DEPTH_MAX {
            let (head, rest) = self.head(id)?;
            match head.kind() {
                KIND_TYPEDEF | KIND_VOLATILE | KIND_CONST | KIND_RESTRICT | KIND_TYPE_TAG => {
                    id = head.size_or_kind.get();
                }
                _ => return Some((head, rest)),
            }
        }
        None
    }

    /// Size and sort of a type's values. All of the machines that this is for have addresses of eight bytes.
    fn value(&self, id: u32) -> Option<(u32, Sort)> {
        let (head, rest) = self.resolve(id)?;
        let size = head.size_or_kind.get();
        Some(match head.kind() {
            KIND_INT => (size, Sort::Integer),
            KIND_PTR => (8, Sort::Pointer),
            KIND_STRUCT | KIND_UNION => (size, Sort::Structure),
            KIND_ENUM | KIND_ENUM64 | KIND_FLOAT => (size, Sort::Other),
            KIND_ARRAY => {
                let (array, _) = Array::read_from_prefix(rest).ok()?;
                let (element, _) = self.resolve(array.element.get())?;
                let bytes = match element.kind() {
                    KIND_PTR => 8,
                    KIND_INT | KIND_STRUCT | KIND_UNION | KIND_ENUM => element.size_or_kind.get(),
                    _ => return None,
                };
                (bytes.checked_mul(array.elements.get())?, Sort::Other)
            }
            _ => return None,
        })
    }
}

/// What follows a type: so many of these.
fn items<T: FromBytes>(rest: &[u8], count: usize) -> impl Iterator<Item = T> {
    rest.chunks_exact(size_of::<T>()).take(count).filter_map(|bytes| T::read_from_bytes(bytes).ok())
}

/// The answer that all agree on.
fn the_only<T: PartialEq>(mut all: impl Iterator<Item = Option<T>>) -> Option<T> {
    let first = all.next()??;
    all.all(|other| other.as_ref() == Some(&first)).then_some(first)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Writes BTF.
    #[derive(Default)]
    pub(in crate::freed) struct Writer {
        types: Vec<u8>,
        strings: Vec<u8>,
        count: u32,
    }

    impl Writer {
        pub(in crate::freed) fn new() -> Self {
            Self { strings: vec![0], ..Self::default() }
        }

        fn string(&mut self, name: &str) -> u32 {
            if name.is_empty() {
                return 0;
            }
            let at = self.strings.len() as u32;
            self.strings.extend_from_slice(name.as_bytes());
            self.strings.push(0);
            at
        }

        fn words(&mut self, words: &[u32]) {
            for word in words {
                self.types.extend_from_slice(&word.to_le_bytes());
            }
        }

        fn head(&mut self, name: &str, kind: u32, items: usize, size_or_kind: u32) -> u32 {
            let name = self.string(name);
            self.words(&[name, kind << 24 | items as u32, size_or_kind]);
            self.count += 1;
            self.count
        }

        pub(in crate::freed) fn int(&mut self, name: &str, bytes: u32) -> u32 {
            let id = self.head(name, KIND_INT, 0, bytes);
            self.words(&[bytes * 8]);
            id
        }

        pub(in crate::freed) fn pointer(&mut self) -> u32 {
            self.head("", KIND_PTR, 0, 0)
        }

        pub(in crate::freed) fn other_name(&mut self, name: &str, of: u32) -> u32 {
            self.head(name, KIND_TYPEDEF, 0, of)
        }

        /// Members are names, types and offsets in bits.
        pub(in crate::freed) fn structure(
            &mut self,
            name: &str,
            bytes: u32,
            members: &[(&str, u32, u32)],
        ) -> u32 {
            let id = self.head(name, KIND_STRUCT, members.len(), bytes);
            for &(name, kind, bits) in members {
                let name = self.string(name);
                self.words(&[name, kind, bits]);
            }
            id
        }

        pub(in crate::freed) fn enumeration(&mut self, values: &[(&str, u32)]) -> u32 {
            let id = self.head("", KIND_ENUM, values.len(), 4);
            for &(name, value) in values {
                let name = self.string(name);
                self.words(&[name, value]);
            }
            id
        }

        pub(in crate::freed) fn function(&mut self, name: &str, parameters: &[(&str, u32)]) {
            let prototype = self.head("", KIND_FUNC_PROTO, parameters.len(), 0);
            for &(name, kind) in parameters {
                let name = self.string(name);
                self.words(&[name, kind]);
            }
            self.head(name, KIND_FUNC, 0, prototype);
        }

        pub(in crate::freed) fn finish(&self) -> Vec<u8> {
            let mut all = Vec::new();
            all.extend_from_slice(&MAGIC.to_le_bytes());
            all.extend_from_slice(&[VERSION, 0]);
            let (types, strings) = (self.types.len() as u32, self.strings.len() as u32);
            for word in [24, 0, types, types, strings] {
                all.extend_from_slice(&word.to_le_bytes());
            }
            all.extend_from_slice(&self.types);
            all.extend_from_slice(&self.strings);
            all
        }
    }

    fn sample() -> Writer {
        let mut writer = Writer::new();
        let int = writer.int("int", 4);
        let long = writer.int("unsigned long", 8);
        let device = writer.other_name("dev_t", int);
        let pointer = writer.pointer();
        let inner = writer.structure("", 16, &[("x", long, 0), ("y", device, 64)]);
        writer.structure("outer", 40, &[("a", pointer, 0), ("", inner, 64), ("b", int, 192)]);
        writer.enumeration(&[("ONE", 1), ("SIX", 64)]);
        writer.function("call", &[("type", int), ("begin", long), ("what", inner)]);
        writer
    }

    #[test]
    fn members_are_found_and_so_are_those_inside() {
        let bytes = sample().finish();
        let btf = Btf::parse(&bytes).unwrap();
        let integer = |offset, bytes| Some(Member { offset, bytes, sort: Sort::Integer });
        assert_eq!(
            btf.member("outer", "a"),
            Some(Member { offset: 0, bytes: 8, sort: Sort::Pointer })
        );
        assert_eq!(btf.member("outer", "x"), integer(8, 8));
        assert_eq!(btf.member("outer", "y"), integer(16, 4));
        assert_eq!(btf.member("outer", "b"), integer(24, 4));
        assert_eq!(btf.member("outer", "c"), None);
        assert_eq!(btf.member("oute", "a"), None);
    }

    #[test]
    fn functions_and_enumerators_are_found() {
        let bytes = sample().finish();
        let btf = Btf::parse(&bytes).unwrap();
        let parameters = btf.function("call").unwrap();
        let seen: Vec<_> =
            parameters.iter().map(|each| (each.name, each.bytes, each.sort)).collect();
        assert_eq!(
            seen,
            [
                ("type", 4, Sort::Integer),
                ("begin", 8, Sort::Integer),
                ("what", 16, Sort::Structure)
            ]
        );
        assert_eq!(btf.function("called"), None);
        assert_eq!(btf.enumerator("SIX"), Some(64));
        assert_eq!(btf.enumerator("SEVEN"), None);
    }

    #[test]
    fn two_answers_are_none() {
        let mut writer = sample();
        writer.enumeration(&[("ONE", 2)]);
        writer.structure("outer", 8, &[("a", 2, 0)]);
        let bytes = writer.finish();
        let btf = Btf::parse(&bytes).unwrap();
        assert_eq!(btf.enumerator("ONE"), None);
        assert_eq!(btf.member("outer", "a"), None);
    }

    #[test]
    fn a_bit_field_is_no_member() {
        let mut writer = Writer::new();
        let int = writer.int("int", 4);
        writer.structure("flags", 4, &[("bits", int, 3)]);
        let bytes = writer.finish();
        assert_eq!(Btf::parse(&bytes).unwrap().member("flags", "bits"), None);
    }

    #[test]
    fn what_is_cut_off_is_refused() {
        let bytes = sample().finish();
        for length in 0..bytes.len() {
            assert!(Btf::parse(&bytes[..length]).is_err(), "{length} bytes of {}", bytes.len());
        }
    }

    #[test]
    fn types_that_are_made_of_themselves_end() {
        let mut writer = Writer::new();
        let this = writer.other_name("loop", 1);
        let members: Vec<_> = (0..300).map(|_| ("", 2, 0)).collect();
        writer.structure("deep", 8, &members);
        writer.structure("shallow", 8, &[("x", this, 0)]);
        let bytes = writer.finish();
        let btf = Btf::parse(&bytes).unwrap();
        assert_eq!(btf.member("shallow", "x"), None);
        assert_eq!(btf.member("deep", "x"), None);
    }

    proptest! {
        #[test]
        fn any_bytes_will_do(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            ask(&bytes);
        }

        #[test]
        fn changed_bytes_will_do(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
            let mut bytes = sample().finish();
            for (index, value) in changes {
                let at = index.index(bytes.len());
                bytes[at] = value;
            }
            ask(&bytes);
        }
    }

    fn ask(bytes: &[u8]) {
        if let Ok(btf) = Btf::parse(bytes) {
            for name in ["", "a", "x", "outer", "call"] {
                let _ = (btf.member("outer", name), btf.member("", name));
                let _ = (btf.function(name), btf.enumerator(name));
            }
        }
    }
}
