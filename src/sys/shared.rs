//! Memory that several processes see: a sealed-size memfd, mapped as atomic
//! words.
//!
//! Owned by whoever holds the `Region`; unmapped with it. The size is fixed
//! at creation (sealed), so a mapping can never fault because another process
//! shrank the file.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// A mapping of a shared memfd as 64-bit words.
#[derive(Debug)]
pub struct Region {
    fd: OwnedFd,
    base: NonNull<AtomicU64>,
    word_count: usize,
}

// SAFETY: the memory is only ever reached as `&[AtomicU64]`, which is Sync,
// and the pointer belongs to this value alone.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// New memory of so many words, all zero, that may be read and written.
    pub fn create(name: &str, word_count: usize) -> io::Result<Region> {
        let fd = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        let bytes = word_count.checked_mul(8).ok_or(io::ErrorKind::InvalidInput)?;
        nix::unistd::ftruncate(&fd, bytes as i64)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&fd, FcntlArg::F_ADD_SEALS(seals))?;
        Region::map(fd, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)
    }

    /// Maps memory that another process passed, to read and write.
    pub fn open(fd: OwnedFd) -> io::Result<Region> {
        Region::map(fd, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)
    }

    /// Maps memory that another process passed, to read only: a write would
    /// end this process.
    pub fn open_read_only(fd: OwnedFd) -> io::Result<Region> {
        Region::map(fd, ProtFlags::PROT_READ)
    }

    /// A descriptor of the same memory through which nobody can map it
    /// writable: for processes that only read.
    pub fn read_only_fd(&self) -> io::Result<OwnedFd> {
        Ok(File::open(format!("/proc/self/fd/{}", self.fd.as_raw_fd()))?.into())
    }

    fn map(fd: OwnedFd, protection: ProtFlags) -> io::Result<Region> {
        let seals = SealFlag::from_bits_truncate(fcntl(&fd, FcntlArg::F_GET_SEALS)?);
        if !seals.contains(SealFlag::F_SEAL_SHRINK) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "shared memory that could shrink"));
        }
        let bytes = nix::sys::stat::fstat(&fd)?.st_size as usize;
        let length = NonZeroUsize::new(bytes).ok_or(io::ErrorKind::InvalidData)?;
        // SAFETY: a new mapping at an address of the kernel's choice; the
        // file cannot shrink below `length` (checked seal).
        let base = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, &fd, 0)? };
        Ok(Region { fd, base: base.cast(), word_count: bytes / 8 })
    }

    /// The words. Other processes may change them at any time.
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: `base` is a live, page-aligned mapping of at least
        // `word_count` words for as long as `self` lives; atomics may be
        // shared with other processes.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.word_count) }
    }
}

impl AsFd for Region {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: this mapping was made by `map` with this length and no
        // reference to it outlives `self`.
        let result = unsafe { munmap(self.base.cast(), self.word_count * 8) };
        debug_assert!(result.is_ok());
    }
}

/// A sealed memfd with these bytes: a message too large for a channel.
pub fn sealed(name: &str, bytes: &[u8]) -> io::Result<OwnedFd> {
    use std::io::Write;
    let fd = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    let mut file = File::from(fd);
    file.write_all(bytes)?;
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::all()))?;
    Ok(file.into())
}

/// An empty memfd that somebody else will write.
pub fn unsealed(name: &str) -> io::Result<OwnedFd> {
    Ok(memfd_create(name, MFdFlags::MFD_CLOEXEC)?)
}

/// The bytes of a sealed memfd from a process that is trusted.
pub fn read_sealed(fd: OwnedFd) -> io::Result<Vec<u8>> {
    read_sealed_up_to(fd, usize::MAX)
}

/// The bytes of a sealed memfd; an error where there are more than `most`.
pub fn read_sealed_up_to(fd: OwnedFd, most: usize) -> io::Result<Vec<u8>> {
    use std::os::unix::fs::FileExt;
    let file = File::from(fd);
    let length = file.metadata()?.len() as usize;
    if length > most {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{length} bytes where {most} may be"),
        ));
    }
    let mut bytes = vec![0; length];
    // By position: the file offset is shared with every other holder.
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering::Relaxed;

    #[test]
    fn two_mappings_see_the_same_words() {
        let a = Region::create("test", 100).unwrap();
        let b = Region::open_read_only(a.read_only_fd().unwrap()).unwrap();
        a.words()[99].store(7, Relaxed);
        assert_eq!(b.words().len(), 100);
        assert_eq!(b.words()[99].load(Relaxed), 7);
    }

    #[test]
    fn a_read_only_descriptor_cannot_be_mapped_for_writing() {
        let a = Region::create("test", 1).unwrap();
        assert!(Region::open(a.read_only_fd().unwrap()).is_err());
    }

    #[test]
    fn a_file_that_could_shrink_is_refused() {
        let fd = memfd_create("test", MFdFlags::MFD_ALLOW_SEALING).unwrap();
        nix::unistd::ftruncate(&fd, 4096).unwrap();
        assert!(Region::open(fd).is_err());
    }

    #[test]
    fn sealed_bytes_come_back() {
        let fd = sealed("test", b"bytes").unwrap();
        assert_eq!(read_sealed(fd).unwrap(), b"bytes");
    }
}
