//! Images: memory that blocks of the backing file are read into, page aligned.
//!
//! Neighbours are taken together for a read, and come back together. While the kernel may write them
//! nobody looks at them, and they are not freed, whatever becomes of their owner. (All memory of the daemon is locked.)
//! A block is opened where it lies, once, whichever of its pages is wanted first.

use std::ptr::NonNull;

use tmem::{Image, Opened, PAGE_SIZE, Page};

/// Images that there are: a bit each of a word.
pub const IMAGES: usize = u64::BITS as usize;

/// See the module's description.
pub struct Images {
    start: NonNull<Page>,
    /// A bit for each that nobody has taken.
    free: u64,
    /// A bit for each that the kernel may write.
    reading: u64,
    opened: [Opened; IMAGES],
}

// SAFETY: the memory is this value's alone, but for reads under way, which it is told of.
unsafe impl Send for Images {}

#[repr(C, align(4096))]
#[derive(Clone)]
struct Aligned(Page);

impl Images {
    /// All of them free.
    pub fn new() -> Self {
        let images: Box<[Aligned]> = vec![Aligned([0; PAGE_SIZE]); IMAGES].into();
        let start = NonNull::new(Box::into_raw(images).cast()).expect("a box is somewhere");
        Self { start, free: u64::MAX, reading: 0, opened: [Opened::default(); IMAGES] }
    }

    /// Takes neighbours that are free, for a read: the first one's number.
    pub fn take(&mut self, count: usize) -> Option<usize> {
        let starts = (1..count).fold(self.free, |starts, n| starts & self.free >> n);
        let first = (starts != 0).then(|| starts.trailing_zeros() as usize)?;
        self.free &= !mask(first, count);
        self.reading |= mask(first, count);
        self.opened[first..first + count].fill(Opened::default());
        Some(first)
    }

    /// The read of these has ended.
    pub fn are_read(&mut self, first: usize, count: usize) {
        self.reading &= !mask(first, count);
    }

    /// Gives neighbours back.
    ///
    /// # Panics
    ///
    /// If they are being read.
    pub fn give_back(&mut self, first: usize, count: usize) {
        assert_eq!(self.reading & mask(first, count), 0, "images are freed that are being read");
        self.free |= mask(first, count);
    }

    /// Whether what was read is not what was written, as far as anybody has looked.
    pub fn is_bad(&self, image: usize) -> bool {
        self.opened[image].is_bad()
    }

    /// So many bytes behind the start of an image, for the kernel to write from there on.
    pub fn at(&self, image: usize, bytes: usize) -> NonNull<u8> {
        let offset = image * PAGE_SIZE + bytes;
        assert!(offset < IMAGES * PAGE_SIZE, "beyond the images");
        // SAFETY: there is so much memory.
        unsafe { self.start.cast::<u8>().add(offset) }
    }

    /// What was read.
    ///
    /// # Panics
    ///
    /// If it is being read.
    pub fn image(&mut self, image: usize) -> Image<'_> {
        assert_eq!(self.reading & mask(image, 1), 0, "an image is looked at that is being read");
        let mut page = self.at(image, 0).cast::<Page>();
        // SAFETY: it is there and was initialised; the kernel has done with it, and it is borrowed as this is.
        Image::new(unsafe { page.as_mut() }, &mut self.opened[image])
    }
}

impl Drop for Images {
    /// What the kernel still writes stays where it is.
    fn drop(&mut self) {
        if self.reading == 0 {
            let start = self.start.as_ptr().cast::<Aligned>();
            // SAFETY: it was made of such a box, and is freed once.
            drop(unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(start, IMAGES)) });
        }
    }
}

/// A bit for each of so many images.
fn mask(first: usize, count: usize) -> u64 {
    debug_assert!((1..IMAGES).contains(&count) && first + count <= IMAGES);
    ((1 << count) - 1) << first
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_taken_together_and_come_back() {
        let mut images = Images::new();
        assert_eq!(images.take(8), Some(0));
        assert_eq!(images.take(1), Some(8));
        assert_eq!(images.take(8), Some(9));
        images.are_read(0, 8);
        assert_eq!(images.take(8), Some(17), "what is read is not free by that");
        images.give_back(0, 8);
        assert_eq!(images.take(3), Some(0));
        assert_eq!(images.take(6), Some(25));
        assert_eq!(images.take(5), Some(3));
        let rest: Vec<_> = std::iter::from_fn(|| images.take(8)).collect();
        assert_eq!(rest, [31, 39, 47, 55]);
        assert_eq!((images.take(1), images.take(1)), (Some(63), None));
    }

    #[test]
    #[should_panic(expected = "being read")]
    fn what_is_being_read_is_not_looked_at() {
        let mut images = Images::new();
        images.take(3);
        images.are_read(0, 1);
        images.image(0);
        images.image(1);
    }
}
