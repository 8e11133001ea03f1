//! How the kernel shares its CPUs out to the calling thread (sched(7)).

use std::io;

/// The two ordinary ways, between which every thread may go to and fro.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// SCHED_OTHER: who wakes up may take the CPU from who has it.
    Normal,
    /// SCHED_BATCH: who wakes up waits until the other's turn is over.
    Batch,
}

impl Policy {
    fn number(self) -> libc::c_int {
        match self {
            Policy::Normal => libc::SCHED_OTHER,
            Policy::Batch => libc::SCHED_BATCH,
        }
    }
}

/// The calling thread's; `None` = another one, which somebody chose for it.
pub fn policy() -> io::Result<Option<Policy>> {
    // The call itself: the C library's function of musl refuses.
    // SAFETY: needed because nix has no such call. It takes no pointer.
    let number = super::check(unsafe { libc::syscall(libc::SYS_sched_getscheduler, 0) } as libc::c_int)?;
    Ok([Policy::Normal, Policy::Batch].into_iter().find(|policy| policy.number() == number))
}

/// Gives the calling thread another one; its niceness stays.
pub fn set_policy(policy: Policy) -> io::Result<()> {
    // One integer, of which these two policies ask that it be 0.
    let priority: libc::c_int = 0;
    // SAFETY: needed because nix has no such call. The kernel reads one
    // integer (struct sched_param), which lives longer than the call.
    let result =
        unsafe { libc::syscall(libc::SYS_sched_setscheduler, 0, policy.number(), &raw const priority) };
    super::check(result as libc::c_int).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_goes_to_and_fro() {
        // On a thread of its own: it is the test's alone.
        std::thread::spawn(|| {
            if policy().unwrap() != Some(Policy::Normal) {
                return println!("SKIPPED: somebody chose another policy for the tests");
            }
            for wanted in [Policy::Batch, Policy::Normal] {
                set_policy(wanted).unwrap();
                assert_eq!(policy().unwrap(), Some(wanted));
            }
        })
        .join()
        .unwrap();
    }
}
