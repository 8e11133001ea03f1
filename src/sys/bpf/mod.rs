//! Programs and maps of the kernel's BPF machine, by bpf(2) itself.
//!
//! What steering needs and no more: a program that picks a socket of a
//! SO_REUSEPORT group, the array of sockets that it picks from, and pages that
//! it shares with processes. Loading takes CAP_BPF (or root); attaching,
//! filling an array and mapping a page take nothing but the descriptor.
//!
//! Each is owned by its descriptor, close-on-exec. A program keeps its maps,
//! and a group its program, so steering outlives the process that set it up.

pub mod assembler;
pub mod classic;

use std::ffi::CStr;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU32};

// Numbers of linux/bpf.h.
const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE_ELEM: libc::c_int = 2;
const PROG_LOAD: libc::c_int = 5;
const ENABLE_STATS: libc::c_int = 32;
const MAP_TYPE_ARRAY: u32 = 2;
const MAP_TYPE_REUSEPORT_SOCKARRAY: u32 = 20;
const F_MMAPABLE: u32 = 1 << 10;
const PROG_TYPE_SK_REUSEPORT: u32 = 21;
const SK_REUSEPORT_SELECT: u32 = 39;
const SK_REUSEPORT_SELECT_OR_MIGRATE: u32 = 40;

/// No helper that steering calls asks for a GPL program (Linux 5.8 and newer).
const LICENSE: &CStr = c"MIT OR Apache-2.0";
/// As much of the verifier's words as is kept.
const VERIFIER_LOG_BYTES: usize = 64 * 1024;

#[repr(C)]
#[derive(Default)]
struct MapCreate {
    map_type: u32,
    key_bytes: u32,
    value_bytes: u32,
    max_entries: u32,
    flags: u32,
    inner_map: u32,
    numa_node: u32,
    name: [u8; 16],
}

#[repr(C)]
#[derive(Default)]
struct MapElement {
    map: u32,
    _padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct ProgramLoad {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_bytes: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    expected_attach_type: u32,
}

/// A structure that is one form of `union bpf_attr`: no padding that is not
/// a field, and any pointer in it valid for the call.
trait Attribute {}
impl Attribute for MapCreate {}
impl Attribute for MapElement {}
impl Attribute for ProgramLoad {}
impl Attribute for u32 {}

/// # Safety
/// Every address in `attribute` points to memory that lives through the call
/// and is as long as the command reads or writes there.
unsafe fn bpf<A: Attribute>(command: libc::c_int, attribute: &A) -> io::Result<libc::c_int> {
    // SAFETY: the kernel reads `size` bytes behind `attribute`; what these
    // point to is the caller's promise.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attribute as *const A, size_of::<A>()) };
    super::check(result as libc::c_int)
}

/// # Safety
/// As for `bpf`; and the command is one that answers a new descriptor.
unsafe fn bpf_fd<A: Attribute>(command: libc::c_int, attribute: &A) -> io::Result<OwnedFd> {
    // SAFETY: passed on to the caller.
    let fd = unsafe { bpf(command, attribute)? };
    // SAFETY: the kernel made it for this call just now, close-on-exec.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A name as the kernel takes it: 15 letters, digits, `_` or `.`.
fn name(text: &str) -> [u8; 16] {
    let mut name = [0; 16];
    for (to, from) in name[..15].iter_mut().zip(text.bytes()) {
        *to = if from.is_ascii_alphanumeric() { from } else { b'_' };
    }
    name
}

fn create_map(attribute: &MapCreate) -> io::Result<OwnedFd> {
    // SAFETY: holds no addresses; the answer is a descriptor.
    unsafe { bpf_fd(MAP_CREATE, attribute) }
}

/// The sockets of one group by number; a closed socket leaves by itself.
#[derive(Debug)]
pub struct SocketArray {
    fd: OwnedFd,
}

impl SocketArray {
    /// An empty array of so many places.
    pub fn create(places: u32) -> io::Result<SocketArray> {
        let fd = create_map(&MapCreate {
            map_type: MAP_TYPE_REUSEPORT_SOCKARRAY,
            key_bytes: 4,
            value_bytes: 8,
            max_entries: places,
            name: name("evenkeel_socks"),
            ..MapCreate::default()
        })?;
        Ok(SocketArray { fd })
    }

    /// One that the image before this one made.
    pub fn from_fd(fd: OwnedFd) -> SocketArray {
        SocketArray { fd }
    }

    /// Puts a socket in its place: bound, with SO_REUSEPORT, listening if it
    /// is TCP, and in no other array.
    pub fn put(&self, place: u32, socket: impl AsFd) -> io::Result<()> {
        let value = socket.as_fd().as_raw_fd() as u64;
        let element = MapElement {
            map: self.fd.as_raw_fd() as u32,
            key: (&raw const place) as u64,
            value: (&raw const value) as u64,
            ..MapElement::default()
        };
        // SAFETY: a key of four and a value of eight bytes, as `create` said;
        // both live through the call.
        unsafe { bpf(MAP_UPDATE_ELEM, &element) }.map(drop)
    }
}

impl AsFd for SocketArray {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Memory that a program and processes share: an array map with one value,
/// mapped. It is zero at first, and never shrinks.
#[derive(Debug)]
pub struct Page {
    fd: OwnedFd,
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the memory is only ever reached as atomics, which are Sync, and the
// pointer belongs to this value alone.
unsafe impl Send for Page {}
// SAFETY: as above.
unsafe impl Sync for Page {}

impl Page {
    /// A new one of so many bytes.
    pub fn create(bytes: usize) -> io::Result<Page> {
        let fd = create_map(&MapCreate {
            map_type: MAP_TYPE_ARRAY,
            key_bytes: 4,
            value_bytes: u32::try_from(bytes).map_err(|_| io::ErrorKind::InvalidInput)?,
            max_entries: 1,
            flags: F_MMAPABLE,
            name: name("evenkeel_page"),
            ..MapCreate::default()
        })?;
        Page::open(fd, bytes)
    }

    /// Maps one that another process made; an error where it is smaller.
    pub fn open(fd: OwnedFd, bytes: usize) -> io::Result<Page> {
        // SAFETY: a new mapping at an address of the kernel's choice. The
        // kernel refuses a length over the map's own (EINVAL), and a map's
        // memory never shrinks.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Page { fd, base, bytes })
    }

    /// The four bytes at an offset; others may change them at any time.
    pub fn word(&self, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4) && offset + 4 <= self.bytes, "a word outside of the page");
        // SAFETY: within the mapping and aligned (checked above; the mapping
        // begins at a page); atomics may be shared with processes and kernel.
        unsafe { AtomicU32::from_ptr(self.base.as_ptr().add(offset).cast()) }
    }

    /// The byte at an offset; others may change it at any time.
    pub fn byte(&self, offset: usize) -> &AtomicU8 {
        assert!(offset < self.bytes, "a byte outside of the page");
        // SAFETY: within the mapping (checked above); atomics may be shared.
        unsafe { AtomicU8::from_ptr(self.base.as_ptr().add(offset)) }
    }
}

impl AsFd for Page {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: this mapping was made by `open` with this length and no
        // reference to it outlives `self`.
        let result = unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
        debug_assert_eq!(result, 0);
    }
}

/// A loaded program that picks a socket for each connection or datagram.
#[derive(Debug)]
pub struct Program {
    fd: OwnedFd,
}

impl Program {
    /// Loads a program, for picking and, where the kernel can (5.14), for
    /// taking over what a closing socket leaves in its queue.
    ///
    /// Errors: EPERM without CAP_BPF; otherwise with the verifier's words.
    pub fn load(instructions: &[u64]) -> io::Result<Program> {
        let attach_type = match Program::load_as(SK_REUSEPORT_SELECT_OR_MIGRATE, instructions, &mut []) {
            // An older kernel does not know it.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => SK_REUSEPORT_SELECT,
            Err(error) if error.raw_os_error() != Some(libc::EPERM) => SK_REUSEPORT_SELECT_OR_MIGRATE,
            result => return result,
        };
        let mut log = vec![0; VERIFIER_LOG_BYTES];
        Program::load_as(attach_type, instructions, &mut log).map_err(|error| {
            let length = log.iter().position(|byte| *byte == 0).unwrap_or(log.len());
            match String::from_utf8_lossy(&log[..length]).trim() {
                "" => error,
                words => io::Error::new(error.kind(), format!("{error}: {words}")),
            }
        })
    }

    fn load_as(attach_type: u32, instructions: &[u64], log: &mut [u8]) -> io::Result<Program> {
        let attribute = ProgramLoad {
            program_type: PROG_TYPE_SK_REUSEPORT,
            instruction_count: instructions.len() as u32,
            instructions: instructions.as_ptr() as u64,
            license: LICENSE.as_ptr() as u64,
            log_level: u32::from(!log.is_empty()),
            log_bytes: log.len() as u32,
            log: if log.is_empty() { 0 } else { log.as_mut_ptr() as u64 },
            name: name("evenkeel_steer"),
            expected_attach_type: attach_type,
            ..ProgramLoad::default()
        };
        // SAFETY: instructions, licence and log live through the call and have
        // the lengths that are told; the answer is a descriptor.
        let fd = unsafe { bpf_fd(PROG_LOAD, &attribute)? };
        Ok(Program { fd })
    }

    /// One that the image before this one loaded.
    pub fn from_fd(fd: OwnedFd) -> Program {
        Program { fd }
    }

    /// Steers the socket's whole group by this program, in place of any other.
    pub fn attach(&self, socket: impl AsFd) -> io::Result<()> {
        let program = self.fd.as_raw_fd();
        // SAFETY: the kernel reads one int, which lives through the call.
        let result = unsafe {
            libc::setsockopt(
                socket.as_fd().as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_ATTACH_REUSEPORT_EBPF,
                (&raw const program).cast(),
                size_of::<libc::c_int>() as u32,
            )
        };
        super::check(result).map(drop)
    }
}

impl AsFd for Program {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Whether this process may make maps: the same that loading takes.
pub fn is_permitted() -> bool {
    SocketArray::create(1).is_ok()
}

/// Has the kernel take the time of every program's run, as long as the
/// descriptor lives: for measuring. Needs CAP_SYS_ADMIN.
pub fn measure_runs() -> io::Result<OwnedFd> {
    const RUN_TIME: u32 = 0;
    // SAFETY: holds no addresses; the answer is a descriptor.
    unsafe { bpf_fd(ENABLE_STATS, &RUN_TIME) }
}

/// How often the steering programs of a process ran and the nanoseconds that
/// they took, while somebody measured.
pub fn runs_of(pid: u32) -> io::Result<(u64, u64)> {
    let mut sum = (0, 0);
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))?.flatten() {
        let Ok(text) = fs::read_to_string(entry.path()) else { continue };
        let field =
            |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok());
        if field("prog_type:") == Some(u64::from(PROG_TYPE_SK_REUSEPORT)) {
            sum.0 += field("run_cnt:").unwrap_or(0);
            sum.1 += field("run_time_ns:").unwrap_or(0);
        }
    }
    Ok(sum)
}
