//! What a page holds: a pure function of (seed, page number, version), so that any page can be
//! checked without a copy of it, and a wrong one tells whose it is.
//!
//! Kinds of pages follow what swap really gets: objects full of pointers and small numbers, text,
//! one repeated word, and data that does not compress. Every page carries its number and version:
//! a page of one word in that word, the others in their first 16 bytes.

use std::fmt;

/// Bytes in a page.
pub const PAGE: usize = 4096;

/// A page's bytes.
pub type Page = [u8; PAGE];

/// A small fast generator of reproducible numbers (splitmix64).
pub struct Random(u64);

impl Random {
    /// A generator whose numbers depend on all of `parts`.
    pub fn new(parts: [u64; 3]) -> Self {
        let mut state = 0x243f_6a88_85a3_08d3;
        for part in parts {
            state = Random(state ^ part).next();
        }
        Random(state)
    }

    /// The next 64 bits.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `limit`, which is not 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(limit)) >> 64) as u64
    }
}

/// How many pages of a hundred are of which kind.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mix {
    heap: u64,
    same: u64,
    text: u64,
    random: u64,
}

impl Default for Mix {
    fn default() -> Self {
        Mix { heap: 60, same: 10, text: 15, random: 15 }
    }
}

impl Mix {
    /// Reads `heap=60,same=10,text=15,random=15`; what is not named is 0, and the sum is 100.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut mix = Mix { heap: 0, same: 0, text: 0, random: 0 };
        for part in text.split(',') {
            let (kind, share) = part.split_once('=').ok_or(format!("{part:?} is not KIND=N"))?;
            let share = share.parse().map_err(|_| format!("{share:?} is no number"))?;
            match kind {
                "heap" => mix.heap = share,
                "same" => mix.same = share,
                "text" => mix.text = share,
                "random" => mix.random = share,
                _ => return Err(format!("no pages are {kind:?} (heap, same, text, random)")),
            }
        }
        match [mix.heap, mix.same, mix.text, mix.random].iter().sum::<u64>() {
            100 => Ok(mix),
            sum => Err(format!("the mix adds up to {sum}, not 100")),
        }
    }
}

/// The contents of all pages of one run.
#[derive(Clone, Copy)]
pub struct Pattern {
    /// Makes the pages of one run unlike those of another.
    pub seed: u64,
    /// Which kinds of pages there are.
    pub mix: Mix,
}

const TAG: u16 = 0x7e3d;

/// Highest version of a page, and highest page number: both fit the word of a same-filled page.
pub const MAX_VERSION: u32 = 0xff_ffff;
/// Number of pages that a pattern can tell apart.
pub const MAX_PAGES: u64 = 1 << 24;

impl Pattern {
    /// Writes what page `number` holds in its `version`.
    pub fn fill(&self, number: u64, version: u32, page: &mut Page) {
        let mut random = Random::new([self.seed, number, u64::from(version)]);
        let kind = random.below(100);
        let mix = self.mix;
        if kind < mix.same {
            let word = mark(number, version) ^ self.same_mask();
            for chunk in page.chunks_exact_mut(8) {
                chunk.copy_from_slice(&word.to_le_bytes());
            }
            return;
        }
        if kind < mix.same + mix.heap {
            heap(&mut random, page);
        } else if kind < mix.same + mix.heap + mix.text {
            text(&mut random, page);
        } else {
            for chunk in page.chunks_exact_mut(8) {
                chunk.copy_from_slice(&random.next().to_le_bytes());
            }
        }
        page[..8].copy_from_slice(&mark(number, version).to_le_bytes());
        page[8..16].copy_from_slice(&self.seed.to_le_bytes());
    }

    /// Says what a page is that is not version `version` of page `number`.
    pub fn diagnose(&self, number: u64, version: u32, page: &Page) -> Fault {
        if page.iter().all(|&byte| byte == 0) {
            return Fault::Zero;
        }
        let mut expected = [0; PAGE];
        let first = word(page, 0);
        for candidate in [first, first ^ self.same_mask()] {
            let Some((other, found)) = unmark(candidate) else { continue };
            self.fill(other, found, &mut expected);
            if expected != *page {
                continue;
            }
            return match other == number {
                true if found < version => Fault::Stale { found },
                true => Fault::Future { found },
                false => Fault::Misplaced { number: other, found },
            };
        }
        self.fill(number, version, &mut expected);
        let differ = |i: &usize| page[*i] != expected[*i];
        let first = (0..PAGE).find(differ).unwrap_or(0) & !7;
        Fault::Corrupt {
            offset: first,
            bytes: (0..PAGE).filter(differ).count(),
            found: word(page, first),
            expected: word(&expected, first),
        }
    }

    fn same_mask(&self) -> u64 {
        Random::new([self.seed, 0, 0]).next() | 1
    }
}

fn word(page: &Page, offset: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&page[offset..offset + 8]);
    u64::from_le_bytes(bytes)
}

fn mark(number: u64, version: u32) -> u64 {
    number << 40 | u64::from(version & MAX_VERSION) << 16 | u64::from(TAG)
}

fn unmark(word: u64) -> Option<(u64, u32)> {
    (word as u16 == TAG).then_some((word >> 40, (word >> 16) as u32 & MAX_VERSION))
}

/// Objects of 48 bytes as an allocator lays them out: a few types, neighbouring pointers, small
/// numbers, flags and padding; and behind them, on most pages, memory that was never used. So the
/// pages compress to sizes from an eighth to two fifths of a page, and no two sizes are the rule.
fn heap(random: &mut Random, page: &mut Page) {
    let used = PAGE / 4 + random.below((PAGE - PAGE / 4) as u64 * 4 / 3) as usize;
    page.fill(0);
    let page = &mut page[..used.min(PAGE)];
    let arena = 0x5581_0000_0000 + (random.below(64) << 24);
    let types = 0x7f3c_a000_0000 + (random.below(8) << 16);
    for object in page.chunks_mut(48) {
        let bits = random.next();
        let words = [
            types + (bits & 3) * 0x140,
            arena + ((bits >> 2) & 0x3_ffff) * 16,
            if bits & (1 << 20) == 0 { 0 } else { arena + ((bits >> 21) & 0xffff) * 16 },
            bits >> 44 & 0x3f,
            1,
            if bits & (3 << 60) == 0 { bits >> 32 & 0xffff_ffff } else { 0 },
        ];
        for (chunk, word) in object.chunks_mut(8).zip(words) {
            chunk.copy_from_slice(&word.to_le_bytes()[..chunk.len()]);
        }
    }
}

const WORDS: &[&str] = &[
    "the ",
    "of ",
    "and ",
    "to ",
    "in ",
    "a ",
    "is ",
    "that ",
    "it ",
    "was ",
    "for ",
    "on ",
    "with ",
    "he ",
    "as ",
    "be ",
    "at ",
    "by ",
    "had ",
    "not ",
    "are ",
    "but ",
    "from ",
    "or ",
    "have ",
    "they ",
    "which ",
    "one ",
    "you ",
    "were ",
    "all ",
    "her ",
    "would ",
    "there ",
    "their ",
    "we ",
    "him ",
    "been ",
    "has ",
    "when ",
    "who ",
    "will ",
    "no ",
    "more ",
    "if ",
    "memory ",
    "kernel ",
    "request ",
    "between ",
    "another ",
    "because ",
    "without ",
    "<div>",
    "</div>\n",
    "class=\"",
    "\": {\n",
    "return ",
    "function ",
    "value ",
    "error: ",
    "http://",
    ".html\n",
    ", ",
    ". ",
];

/// Words as prose and markup use them, the frequent ones more often; now and then a phrase that was
/// there before comes again.
fn text(random: &mut Random, page: &mut Page) {
    let mut at = 0;
    while at < PAGE {
        let bits = random.next();
        let len;
        if at > 256 && bits >> 62 == 0 {
            let back = (bits >> 16) as usize % (at - 64);
            len = (12 + (bits >> 48) as usize % 40).min(PAGE - at);
            page.copy_within(back..back + len, at);
        } else {
            let pick = (bits % WORDS.len() as u64).min((bits >> 32) % WORDS.len() as u64);
            let word = WORDS[pick as usize].as_bytes();
            len = word.len().min(PAGE - at);
            page[at..at + len].copy_from_slice(&word[..len]);
        }
        at += len;
    }
}

/// What is wrong with a page.
#[derive(Debug, PartialEq)]
pub enum Fault {
    /// It holds zeros only.
    Zero,
    /// It holds an older version of itself.
    Stale {
        /// The version that it holds.
        found: u32,
    },
    /// It holds a version that was not written yet.
    Future {
        /// The version that it holds.
        found: u32,
    },
    /// It holds another page.
    Misplaced {
        /// Whose contents it holds.
        number: u64,
        /// In which version.
        found: u32,
    },
    /// It holds no page of this run.
    Corrupt {
        /// Where the first wrong word is.
        offset: usize,
        /// How many bytes are wrong.
        bytes: usize,
        /// That word as it is.
        found: u64,
        /// That word as it should be.
        expected: u64,
    },
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Zero => write!(f, "lost: it reads as zeros"),
            Fault::Stale { found } => write!(f, "stale: it holds its older version {found}"),
            Fault::Future { found } => write!(f, "wrong: it holds its later version {found}"),
            Fault::Misplaced { number, found } => {
                write!(f, "misplaced: it holds page {number}, version {found}")
            }
            Fault::Corrupt { offset, bytes, found, expected } => write!(
                f,
                "corrupt: {bytes} bytes differ, at {offset} is {found:#018x}, not {expected:#018x}"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATTERN: Pattern =
        Pattern { seed: 42, mix: Mix { heap: 60, same: 10, text: 15, random: 15 } };

    fn page(number: u64, version: u32) -> Page {
        let mut page = [0; PAGE];
        PATTERN.fill(number, version, &mut page);
        page
    }

    #[test]
    fn every_kind_of_fault_is_told_apart() {
        for number in 0..200 {
            let good = page(number, 7);
            assert_eq!(good, page(number, 7));
            assert_eq!(
                PATTERN.diagnose(number, 7, &page(number, 3)),
                Fault::Stale { found: 3 },
                "{number}"
            );
            assert_eq!(PATTERN.diagnose(number, 7, &page(number, 9)), Fault::Future { found: 9 });
            assert_eq!(
                PATTERN.diagnose(number, 7, &page(number + 1, 7)),
                Fault::Misplaced { number: number + 1, found: 7 }
            );
            assert_eq!(PATTERN.diagnose(number, 7, &[0; PAGE]), Fault::Zero);
            let mut flipped = good;
            flipped[4000] ^= 4;
            assert!(matches!(
                PATTERN.diagnose(number, 7, &flipped),
                Fault::Corrupt { offset: 4000, bytes: 1, .. }
            ));
        }
    }

    #[test]
    fn another_seed_is_another_run() {
        let other = Pattern { seed: 43, ..PATTERN };
        for number in 0..200 {
            let fault = other.diagnose(number, 1, &page(number, 1));
            assert!(matches!(fault, Fault::Corrupt { .. }), "{number}: {fault}");
        }
    }

    #[test]
    fn mixes_add_up() {
        assert_eq!(Mix::parse("heap=60,same=10,text=15,random=15"), Ok(Mix::default()));
        assert!(Mix::parse("random=100").is_ok());
        for wrong in ["", "heap", "heap=x", "heap=60", "heaps=100"] {
            assert!(Mix::parse(wrong).is_err(), "{wrong}");
        }
    }
}
