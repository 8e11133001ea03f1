//! The access log's two ends, which outlive every process of the daemon, and
//! its file, which is opened with the supervisor's rights.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::Refusal;
use super::upgrade::{AccessLogState, Packer, Unpacker};
use crate::config::{AccessLog as Target, Config};
use crate::sys::channel::Channel;

/// Lines that may wait for a steward that is busy or away, in bytes; the
/// kernel may grant less (net.core.wmem_max).
const WAITING_BYTES: usize = 1 << 20;

/// From the workers to the steward.
#[derive(Debug)]
pub struct AccessLog {
    workers_end: OwnedFd,
    stewards_end: OwnedFd,
    file: Option<File>,
}

/// Opens what a configuration names; for the others there is nothing to open.
pub fn open(config: &Config) -> Result<Option<File>, Refusal> {
    let Target::File(path) = &config.log.access else { return Ok(None) };
    open_file(path).map(Some).map_err(|error| {
        let advice = match error.kind() {
            io::ErrorKind::NotFound => "make its folder first",
            io::ErrorKind::PermissionDenied => "the supervisor's own user opens it: let it write there",
            _ => "",
        };
        Refusal::new(1, format!("the access log {} cannot be opened: {error}", path.display()), advice)
    })
}

fn open_file(path: &Path) -> io::Result<File> {
    // Never waits: neither for the reader of a FIFO nor for a terminal.
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    OpenOptions::new().append(true).create(true).mode(0o640).custom_flags(flags).open(path)
}

impl AccessLog {
    pub fn new(config: &Config) -> Result<AccessLog, Refusal> {
        let (ours, theirs) = Channel::pair().map_err(Refusal::of_system)?;
        ours.set_nonblocking().map_err(Refusal::of_system)?;
        ours.set_send_buffer(WAITING_BYTES);
        Ok(AccessLog { workers_end: ours.into_fd(), stewards_end: theirs.into_fd(), file: open(config)? })
    }

    /// As the next image of the supervisor is to find it.
    pub fn pack<'a>(&'a self, packer: &mut Packer<'a>) -> AccessLogState {
        AccessLogState {
            workers_end: packer.keep(&self.workers_end),
            stewards_end: packer.keep(&self.stewards_end),
            file: self.file.as_ref().map(|file| packer.keep(file)),
        }
    }

    /// As the image before this one left it.
    pub fn unpack(state: &AccessLogState, unpacker: &mut Unpacker) -> Result<AccessLog, String> {
        Ok(AccessLog {
            workers_end: unpacker.take(state.workers_end)?,
            stewards_end: unpacker.take(state.stewards_end)?,
            file: state.file.map(|number| unpacker.take(number).map(File::from)).transpose()?,
        })
    }

    /// Goes on with what `open` opened.
    pub fn set_file(&mut self, file: Option<File>) {
        self.file = file;
    }

    /// Where a worker sends its lines, if there is to be a log.
    pub fn workers_end(&self, config: &Config) -> Option<BorrowedFd<'_>> {
        (config.log.access != Target::Off).then(|| self.workers_end.as_fd())
    }

    /// What the steward needs: its end, and the file where there is one.
    pub fn of_steward(&self) -> Vec<BorrowedFd<'_>> {
        [self.stewards_end.as_fd()].into_iter().chain(self.file.as_ref().map(AsFd::as_fd)).collect()
    }
}
