//! Which processes have a socket open, and its reuse options.
//!
//! /proc/PID/fd names sockets by inode. The options are in no table: a
//! duplicate of the descriptor is fetched (pidfd_getfd(2)), asked and closed
//! at once. Both need the rights of ptrace(2) over the process, so the own
//! user or root; what is refused stays unknown.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use socket2::Socket;

/// A process that has one of the sockets open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Its number in this pid namespace.
    pub pid: i32,
    /// Its command line, cut to a readable length, without control
    /// characters: another user may have chosen it.
    pub command: String,
    /// The systemd unit that it runs in.
    pub unit: Option<String>,
}

/// The reuse options of a socket, `None` where they could not be read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Reuse {
    pub address: Option<bool>,
    pub port: Option<bool>,
}

#[derive(Debug, Default)]
pub(super) struct Owned {
    pub processes: Vec<Process>,
    pub reuse: Reuse,
}

/// Longest command line shown.
const COMMAND_CHARS: usize = 80;

/// The owners of the sockets with these inodes, in one pass over /proc.
pub(super) fn find(inodes: &BTreeSet<u64>) -> BTreeMap<u64, Owned> {
    let mut found: BTreeMap<u64, Owned> = BTreeMap::new();
    if inodes.is_empty() {
        return found;
    }
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else {
            continue;
        };
        // Not ours and we are not root: the folder cannot be read.
        let Ok(descriptors) = fs::read_dir(entry.path().join("fd")) else {
            continue;
        };
        let mut process = None;
        for descriptor in descriptors.flatten() {
            let inode = fs::read_link(descriptor.path()).ok().and_then(|link| socket_inode(&link));
            let Some(inode) = inode.filter(|inode| inodes.contains(inode)) else {
                continue;
            };
            let process = process.get_or_insert_with(|| describe(pid));
            let owned = found.entry(inode).or_default();
            if !owned.processes.contains(process) {
                owned.processes.push(process.clone());
            }
            if owned.reuse.port.is_none() {
                let number = descriptor.file_name().to_string_lossy().parse();
                owned.reuse = number.ok().and_then(|fd| reuse(pid, fd).ok()).unwrap_or_default();
            }
        }
    }
    found
}

fn socket_inode(link: &Path) -> Option<u64> {
    link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

fn describe(pid: i32) -> Process {
    let folder = Path::new("/proc").join(pid.to_string());
    let line = fs::read(folder.join("cmdline")).unwrap_or_default();
    let mut command = String::from_utf8_lossy(&line).trim_end_matches('\0').replace('\0', " ");
    if command.trim().is_empty() {
        command = fs::read_to_string(folder.join("comm")).unwrap_or_default();
    }
    let cgroup = fs::read_to_string(folder.join("cgroup")).unwrap_or_default();
    Process { pid, command: shown(command.trim()), unit: unit(&cgroup) }
}

fn shown(command: &str) -> String {
    let clean = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    let mut text: String = command.chars().map(clean).take(COMMAND_CHARS).collect();
    if command.chars().count() > COMMAND_CHARS {
        text.push('…');
    }
    text
}

/// The innermost unit in the path of the unified hierarchy or of systemd's
/// own: `0::/system.slice/nginx.service/worker` is nginx.service.
fn unit(cgroup: &str) -> Option<String> {
    let is_unit = |part: &&str| [".service", ".scope", ".socket"].iter().any(|kind| part.ends_with(kind));
    // On hosts with both hierarchies either one may be the one in use.
    cgroup.lines().filter_map(path_of).find_map(|path| path.rsplit('/').find(is_unit).map(shown))
}

/// The path of a line of /proc/PID/cgroup, if systemd uses its hierarchy.
fn path_of(line: &str) -> Option<&str> {
    let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
    matches!(controllers, "" | "name=systemd").then_some(path)
}

fn reuse(pid: i32, descriptor: i32) -> io::Result<Reuse> {
    let socket = Socket::from(fetch(pid, descriptor)?);
    Ok(Reuse { address: socket.reuse_address().ok(), port: socket.reuse_port().ok() })
}

/// A duplicate, close-on-exec, of another process's descriptor.
fn fetch(pid: i32, descriptor: i32) -> io::Result<OwnedFd> {
    let number = i64::from;
    let process = descriptor_from(libc::SYS_pidfd_open, [number(pid), 0, 0])?;
    let arguments = [number(process.as_raw_fd()), number(descriptor), 0];
    descriptor_from(libc::SYS_pidfd_getfd, arguments)
}

/// Makes one of the two calls that no library of ours wraps.
fn descriptor_from(call: libc::c_long, arguments: [i64; 3]) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open(2) and pidfd_getfd(2) take plain integers, three at
    // most, and touch no memory of ours.
    let result = unsafe { libc::syscall(call, arguments[0], arguments[1], arguments[2]) };
    let number = i32::try_from(result).ok().filter(|number| *number >= 0);
    let number = number.ok_or_else(io::Error::last_os_error)?;
    // SAFETY: a result of zero or more is a new descriptor, and nothing else
    // owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_innermost_unit_of_either_hierarchy_is_found() {
        assert_eq!(unit("0::/system.slice/nginx.service/worker\n").as_deref(), Some("nginx.service"));
        assert_eq!(
            unit("12:pids:/x\n1:name=systemd:/user.slice/user@1.service/app.slice/a.scope\n0::/\n")
                .as_deref(),
            Some("a.scope")
        );
        assert_eq!(unit("0::/init\n"), None);
        assert_eq!(unit(""), None);
    }

    #[test]
    fn a_command_line_cannot_drive_the_terminal() {
        assert_eq!(shown("a\u{1b}[2Jb"), "a\u{fffd}[2Jb");
        assert_eq!(shown(&"x".repeat(200)).chars().count(), COMMAND_CHARS + 1);
    }
}
