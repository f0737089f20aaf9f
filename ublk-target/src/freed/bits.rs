//! A bit for each page, in memory that the kernel sets bits of as well.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// Pages of a word.
pub(super) const WORD_PAGES: u64 = u64::BITS as u64;

/// Words for so many pages.
pub(super) fn words_for(pages: u64) -> u64 {
    pages.div_ceil(WORD_PAGES)
}

/// The words. Pages beyond them are not marked, and cannot be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bits<'a>(pub(super) &'a [AtomicU64]);

impl Bits<'_> {
    /// The first marked page of these.
    pub(super) fn next(self, pages: Range<u64>) -> Option<u64> {
        let (first, _) = place(pages.start);
        let count = (words_for(pages.end) as usize).saturating_sub(first);
        let mut mask = !0 << (pages.start % WORD_PAGES);
        for (index, word) in self.0.iter().enumerate().skip(first).take(count) {
            let marked = word.load(Ordering::Acquire) & mask;
            if marked != 0 {
                let page = index as u64 * WORD_PAGES + u64::from(marked.trailing_zeros());
                return Some(page).filter(|page| *page < pages.end);
            }
            mask = !0;
        }
        None
    }

    /// Takes a mark away. What was marked before the caller came to know of whatever unmarks the page is seen here, so most
    /// pages need no more than a look.
    pub(super) fn unmark(self, page: u64) {
        let (index, bit) = place(page);
        if let Some(word) = self.0.get(index)
            && word.load(Ordering::SeqCst) & bit != 0
        {
            word.fetch_and(!bit, Ordering::SeqCst);
        }
    }
}

fn place(page: u64) -> (usize, u64) {
    ((page / WORD_PAGES) as usize, 1 << (page % WORD_PAGES))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn only_the_page_itself_is_unmarked() {
        let words: Vec<AtomicU64> = (0..3).map(|_| AtomicU64::new(!0)).collect();
        let bits = Bits(&words);
        bits.unmark(64);
        assert_eq!((bits.next(63..200), bits.next(64..200)), (Some(63), Some(65)));
        assert_eq!((bits.next(191..200), bits.next(192..200)), (Some(191), None));
        bits.unmark(u64::MAX);
        assert_eq!(bits.next(u64::MAX..u64::MAX), None);
    }

    proptest! {
        #[test]
        fn as_a_set_of_pages(
            marked in prop::collection::btree_set(0u64..640, 0..40),
            steps in prop::collection::vec((0u64..700, 0u64..200, any::<bool>()), 0..60),
        ) {
            let words: Vec<AtomicU64> = (0..words_for(640)).map(|_| AtomicU64::new(0)).collect();
            for page in &marked {
                let (index, bit) = place(*page);
                words[index].fetch_or(bit, Ordering::SeqCst);
            }
            let (bits, mut model): (_, BTreeSet<u64>) = (Bits(&words), marked);
            for (page, length, unmark) in steps {
                if unmark {
                    bits.unmark(page);
                    model.remove(&page);
                }
                let pages = page..page + length;
                prop_assert_eq!(bits.next(pages.clone()), model.range(pages).next().copied());
            }
        }
    }
}
