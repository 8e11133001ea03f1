//! Users, groups and capabilities: looking them up, becoming one for good,
//! and giving up the rest.

use std::io;

use nix::sys::prctl;
use nix::unistd::{Gid, Group, Uid, User, getegid, geteuid, setgroups, setresgid, setresuid};
use serde::{Deserialize, Serialize};

/// A user and a group by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Account {
    /// The user.
    pub uid: u32,
    /// The group; supplementary groups are given up.
    pub gid: u32,
}

/// Looks up names or numbers; what is not named stays as it is now.
///
/// Errors: a text for the operator.
pub fn lookup(user: Option<&str>, group: Option<&str>) -> Result<Option<Account>, String> {
    if user.is_none() && group.is_none() {
        return Ok(None);
    }
    let mut account = Account { uid: geteuid().as_raw(), gid: getegid().as_raw() };
    if let Some(name) = user {
        let found = match name.parse() {
            Ok(uid) => User::from_uid(Uid::from_raw(uid)),
            Err(_) => User::from_name(name),
        };
        match (found, name.parse()) {
            (Ok(Some(user)), _) => account = Account { uid: user.uid.as_raw(), gid: user.gid.as_raw() },
            // A number without an entry is a user all the same; its group
            // cannot be guessed.
            (_, Ok(uid)) if group.is_some() => account.uid = uid,
            (Ok(None), _) => return Err(format!("user \"{name}\" does not exist on this host")),
            (Err(error), _) => return Err(format!("user \"{name}\" could not be looked up: {error}")),
        }
    }
    if let Some(name) = group {
        account.gid = match (name.parse(), Group::from_name(name)) {
            (Ok(gid), _) => gid,
            (_, Ok(Some(group))) => group.gid.as_raw(),
            (_, Ok(None)) => return Err(format!("group \"{name}\" does not exist on this host")),
            (_, Err(error)) => return Err(format!("group \"{name}\" could not be looked up: {error}")),
        };
    }
    Ok(Some(account))
}

/// Whether this process is the account already.
pub fn is_current(account: Account) -> bool {
    geteuid().as_raw() == account.uid && getegid().as_raw() == account.gid
}

/// This process's effective user.
pub fn current_uid() -> u32 {
    geteuid().as_raw()
}

/// What a process keeps of its capabilities.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Nothing.
    Nothing,
    /// That to leave from addresses which are not this host's: CAP_NET_RAW,
    /// or CAP_NET_ADMIN where it has only that (ip(7), IP_TRANSPARENT).
    ForeignAddresses,
}

/// Gives up this process's user and groups for the account's, for good.
/// Nothing is done where it is that account already. What is to be kept is
/// permitted afterwards, and in force after `drop_capabilities`.
pub fn become_account(account: Account, keep: Keep) -> io::Result<()> {
    if is_current(account) {
        return Ok(());
    }
    prctl::set_keepcaps(keep == Keep::ForeignAddresses)?;
    let (uid, gid) = (Uid::from_raw(account.uid), Gid::from_raw(account.gid));
    // Groups first: without the user's privilege they could not be changed.
    setgroups(&[gid])?;
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)?;
    Ok(())
}

/// Gives up the capabilities that this process has, but for those to keep,
/// for good together with `process::set_no_new_privileges`. Root keeps what
/// its uid is worth: files.
pub fn drop_capabilities(keep: Keep) -> io::Result<()> {
    const NET_ADMIN: u32 = 1 << 12;
    const NET_RAW: u32 = 1 << 13;
    let mut sets = [Capabilities::default(); 2];
    if keep == Keep::ForeignAddresses {
        let permitted = capget()?[0].permitted;
        let kept = if permitted & NET_RAW != 0 { NET_RAW } else { permitted & NET_ADMIN };
        sets[0] = Capabilities { effective: kept, permitted: kept, inheritable: 0 };
    }
    capset(&sets)
}

/// linux/capability.h: _LINUX_CAPABILITY_VERSION_3, two words of each set.
const VERSION: u32 = 0x2008_0522;

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

/// Half of the sets; the first half has the capabilities 0 to 31.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Capabilities {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

fn capget() -> io::Result<[Capabilities; 2]> {
    let mut header = Header { version: VERSION, pid: 0 };
    let mut sets = [Capabilities::default(); 2];
    // SAFETY: needed because no library here wraps capget(2). The kernel reads
    // and writes one header and, for this version, writes two data records; all
    // have the layout of linux/capability.h and live through the call.
    let result = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, sets.as_mut_ptr()) };
    super::check(result as libc::c_int)?;
    Ok(sets)
}

fn capset(sets: &[Capabilities; 2]) -> io::Result<()> {
    let header = Header { version: VERSION, pid: 0 };
    // SAFETY: needed because no library here wraps capset(2). The kernel reads
    // one header and, for this version, two data records; both have the layout
    // of linux/capability.h and live through the call. Ambient capabilities go
    // with the permitted ones (capabilities(7)).
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()) };
    super::check(result as libc::c_int).map(drop)
}
