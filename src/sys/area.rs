//! Memory that outlives the process that writes it: one sealed memfd, whose
//! front is atomic words and whose rest is plain bytes.
//!
//! Owned by the one process that writes it; unmapped with it. Whoever reads
//! what a dead process left maps the words anew (`shared::Region::open`) and
//! reads the bytes by their place (`read_at`), so that no two references in a
//! process ever mean the same bytes. Sparse: a page that was never written
//! costs nothing, so the size is that of an address, not of memory. The size
//! is fixed at creation.

use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, munmap};

/// Bytes begin at a border of this, so that they can be given back to the
/// system by the page, whatever its size.
const ALIGNMENT: usize = 1 << 16;

/// Words and bytes that this process writes.
#[derive(Debug)]
pub struct Area {
    fd: OwnedFd,
    base: NonNull<u8>,
    length: usize,
    word_count: usize,
    bytes_at: usize,
}

// SAFETY: needed because of the pointer. It belongs to this value alone, and
// what it leads to is reached as `&[AtomicU64]`, which is Sync, or through
// `&mut self`.
unsafe impl Send for Area {}

impl Area {
    /// New memory, all zero, of at least so many words and bytes.
    pub fn create(name: &str, word_count: usize, byte_count: usize) -> io::Result<Area> {
        let too_large = || io::Error::from(io::ErrorKind::InvalidInput);
        let bytes_at = bytes_at(word_count).ok_or_else(too_large)?;
        let length = bytes_at.checked_add(byte_count).and_then(|sum| sum.checked_next_multiple_of(ALIGNMENT));
        let length = length.filter(|&length| isize::try_from(length).is_ok()).ok_or_else(too_large)?;
        let fd = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        nix::unistd::ftruncate(&fd, length as i64)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&fd, FcntlArg::F_ADD_SEALS(seals))?;
        let size = NonZeroUsize::new(length).ok_or_else(too_large)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice; the file
        // cannot shrink below `length` (sealed above).
        let base = unsafe { mmap(None, size, protection, MapFlags::MAP_SHARED, &fd, 0)? };
        Ok(Area { fd, base: base.cast(), length, word_count, bytes_at })
    }

    /// The words.
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: `base` is a live, page-aligned mapping of more than
        // `word_count` words for as long as `self` lives, and no other
        // reference leads there but atomic ones.
        unsafe { std::slice::from_raw_parts(self.base.cast().as_ptr(), self.word_count) }
    }

    /// The bytes.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        let length = self.length - self.bytes_at;
        // SAFETY: the part behind the words, within the mapping (`create`);
        // only this method leads there, and it borrows `self` exclusively.
        // Other processes read it when this one is dead.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr().add(self.bytes_at), length) }
    }

    /// The same, to read.
    pub fn bytes(&self) -> &[u8] {
        let length = self.length - self.bytes_at;
        // SAFETY: as in `bytes_mut`, and `self` is borrowed.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().add(self.bytes_at), length) }
    }

    /// Gives the memory of bytes back to the system: they are zero afterwards.
    /// Only whole pages within the range.
    pub fn discard(&mut self, range: Range<usize>) -> io::Result<()> {
        let start = range.start.next_multiple_of(ALIGNMENT);
        let end = range.end.min(self.length - self.bytes_at) / ALIGNMENT * ALIGNMENT;
        if start >= end {
            return Ok(());
        }
        // SAFETY: within the mapping, behind the words, and `self` is borrowed
        // exclusively, so no reference sees the bytes change.
        unsafe {
            let at = self.base.add(self.bytes_at + start);
            madvise(at.cast(), end - start, MmapAdvise::MADV_REMOVE)?;
        }
        Ok(())
    }
}

/// Where the bytes of an area with so many words begin in its file.
fn bytes_at(word_count: usize) -> Option<usize> {
    word_count.checked_mul(8)?.max(1).checked_next_multiple_of(ALIGNMENT)
}

/// Reads bytes of an area with so many words through its descriptor.
pub fn read_at(fd: BorrowedFd, word_count: usize, at: usize, into: &mut [u8]) -> io::Result<()> {
    let begin = bytes_at(word_count).ok_or(io::ErrorKind::InvalidInput)? + at;
    let mut done = 0;
    while done < into.len() {
        match nix::sys::uio::pread(fd, &mut into[done..], (begin + done) as i64)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => done += count,
        }
    }
    Ok(())
}

impl AsFd for Area {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Area {
    fn as_raw_fd(&self) -> i32 {
        self.fd.as_raw_fd()
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: this mapping was made by `create` with this length, and no
        // reference to it outlives `self`.
        let result = unsafe { munmap(self.base.cast(), self.length) };
        debug_assert!(result.is_ok());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::shared::Region;
    use std::sync::atomic::Ordering::Relaxed;

    #[test]
    fn what_is_written_is_read_through_the_descriptor() {
        let mut area = Area::create("test", 10_000, 100_000).unwrap();
        area.words()[9_999].store(7, Relaxed);
        area.bytes_mut()[99_990..100_000].copy_from_slice(b"0123456789");
        let region = Region::open(area.as_fd().try_clone_to_owned().unwrap()).unwrap();
        assert_eq!(region.words()[9_999].load(Relaxed), 7);
        let mut bytes = [0; 10];
        read_at(region.as_fd(), 10_000, 99_990, &mut bytes).unwrap();
        assert_eq!(&bytes, b"0123456789");
    }

    #[test]
    fn a_terabyte_costs_nothing_before_it_is_written_and_nothing_after_it_is_given_back() {
        let mut area = Area::create("test", 1, 1 << 40).unwrap();
        let used = |area: &Area| nix::sys::stat::fstat(area).unwrap().st_blocks;
        area.bytes_mut()[1 << 39..(1 << 39) + (1 << 20)].fill(1);
        assert!(used(&area) >= 2048, "512-byte blocks: {}", used(&area));
        area.discard(1 << 39..(1 << 39) + (1 << 20)).unwrap();
        assert_eq!(used(&area), 0);
        assert_eq!(area.bytes()[1 << 39], 0);
    }
}
