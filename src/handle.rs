//! The names of tmem: client, pool, object, index.
//!
//! A [`Handle`] is how a front end names a page. It says nothing of where the page is; that is the
//! slot's business. The seed's object ids had 192 bits because file systems have large inode
//! numbers; a block device's pages are numbered densely, so here an object is simply a run of
//! [`OBJECT_PAGES`] consecutive pages.

/// Bytes of a page, of a frame, and of the block size that every device reports.
pub const PAGE_SIZE: usize = 4096;

/// A page's contents.
pub type Page = [u8; PAGE_SIZE];

/// Pages of an object.
///
/// 512 pages are 2 MiB: the cluster in which the kernel allocates swap and discards it, so a
/// freed cluster is a whole object, and 512 slot words of 8 bytes fill one frame exactly.
pub const OBJECT_PAGES: u32 = 512;

/// Pages that a pool can have: 2^32, which is 16 TiB.
pub const POOL_PAGES_MAX: u64 = 1 << 32;

/// Who owns pools. The seed's clients were guests and cluster nodes; here each device is one.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct ClientId(pub(crate) u16);

/// A pool of an engine.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct PoolId(pub(crate) u16);

impl PoolId {
    /// Its number, by which another process finds the pool again.
    pub fn number(self) -> u16 {
        self.0
    }
}

/// What a pool promises.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PoolKind {
    /// Cache: a page may vanish at any time, and a get that hits removes it.
    Ephemeral,
    /// Swap: a page that was put is there until it is flushed.
    Persistent,
}

/// The tmem name of a page: {pool, object, index}.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Handle {
    /// The pool.
    pub pool: PoolId,
    /// The object in the pool.
    pub object: u32,
    /// The page in the object, below [`OBJECT_PAGES`].
    pub index: u32,
}

impl Handle {
    /// The handle of page number `page` of a block device on `pool`.
    ///
    /// # Panics
    ///
    /// If `page` is not below [`POOL_PAGES_MAX`].
    pub fn from_page(pool: PoolId, page: u64) -> Self {
        assert!(page < POOL_PAGES_MAX, "page {page} is beyond what a pool can name");
        let object = (page / u64::from(OBJECT_PAGES)) as u32;
        let index = (page % u64::from(OBJECT_PAGES)) as u32;
        Self { pool, object, index }
    }

    /// The page number within the pool; the inverse of [`Handle::from_page`].
    pub fn page(self) -> u64 {
        u64::from(self.object) * u64::from(OBJECT_PAGES) + u64::from(self.index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handle_and_page_number_are_inverse() {
        for page in [0, 1, 511, 512, 513, POOL_PAGES_MAX - 1] {
            let handle = Handle::from_page(PoolId(3), page);
            assert!(handle.index < OBJECT_PAGES);
            assert_eq!(handle.page(), page);
        }
    }
}
