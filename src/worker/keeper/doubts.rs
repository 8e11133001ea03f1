//! Who has what was between two processes when one of them died.
//!
//! An acknowledgement that the dead worker was about to give is given (again),
//! unless its sender has cut the channel, and says what it has heard. A bundle
//! of the dead worker's own is cut off here, and what lies in the channel says
//! whether it was taken. So each session is with one process.

use std::collections::HashSet;
use std::io;
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::control::{self, PeerMessage};
use crate::handover::protocol::PATIENCE;
use crate::keep::{self, Heir, Receipt, Remains};
use crate::sys::channel::Channel;
use crate::sys::table;

/// Bundles that were on their way when the worker died.
#[derive(Debug, Default)]
pub struct Doubts {
    /// The receiver of what this worker sent has these.
    pub moved: HashSet<keep::Item>,
    /// Whether what came from others and was not acknowledged is theirs.
    pub arrivals_are_theirs: bool,
}

impl Doubts {
    /// Whether somebody else has this session.
    pub fn is_elsewhere(&self, heir: &Heir) -> bool {
        self.moved.contains(&keep::Item::Session(heir.session))
            || heir.is_arriving && self.arrivals_are_theirs
    }
}

/// Decides who has what was between two processes.
pub fn settle(remains: &Remains) -> Doubts {
    let mut doubts = Doubts { moved: HashSet::new(), arrivals_are_theirs: true };
    if let Some(receipt) = remains.receipt()
        && let Ok(channel) = table::take(receipt.channel).map(Channel::from_fd)
    {
        let _ = channel.set_nonblocking();
        doubts.arrivals_are_theirs = !is_heard(&receipt, &channel);
    }
    if let Some(bundle) = remains.bundle()
        && let Ok(channel) = table::take(bundle.channel).map(Channel::from_fd)
    {
        // After this nobody acknowledges anything any more.
        channel.hush();
        let _ = channel.set_nonblocking();
        let (mut errors, mut heard) = (0, bundle.number.saturating_sub(1));
        while errors < 2 {
            match control::receive::<PeerMessage>(&channel) {
                Ok(None) => break,
                Ok(Some((PeerMessage::Taken { refused, number }, _)))
                    if number == 0 || number == bundle.number =>
                {
                    let items = bundle.items.iter().enumerate();
                    let taken = items.filter(|(at, _)| !refused.contains(at)).map(|(_, item)| *item);
                    doubts.moved.extend(taken);
                    heard = bundle.number;
                }
                Ok(Some(_)) => {}
                Err(_) => errors += 1,
            }
        }
        let _ = control::send(&channel, &PeerMessage::Done { heard }, &[]);
    }
    doubts
}

/// Whether the sender of a bundle knows that it was taken, or is told now. Who
/// was about to say so when it died may have said it, and the sender may have
/// cut the channel before or after that: then it says what it heard.
fn is_heard(receipt: &Receipt, channel: &Channel) -> bool {
    let refused = |at: &usize| receipt.refused[at / 64] >> (at % 64) & 1 == 1;
    let refused: Vec<usize> = (0..256).filter(refused).collect();
    let message = PeerMessage::Taken { refused, number: receipt.number };
    let mut is_cut = false;
    loop {
        match control::receive::<PeerMessage>(channel) {
            Ok(Some((PeerMessage::Done { heard }, _))) => return heard >= receipt.number,
            // Nobody goes on who has not heard.
            Ok(Some((
                PeerMessage::Sessions { .. } | PeerMessage::Flows { .. } | PeerMessage::FlowsDone,
                _,
            ))) => return true,
            Ok(Some(_)) => {}
            Ok(None) => return false,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && !is_cut => {
                // Perhaps again: the sender knows by its number.
                if control::send(channel, &message, &[]).is_ok() {
                    return true;
                }
                is_cut = true;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let mut fds = [PollFd::new(channel.as_fd(), PollFlags::POLLIN)];
                let timeout = PollTimeout::from(PATIENCE as u16);
                if !matches!(poll(&mut fds, timeout), Ok(1..) | Err(Errno::EINTR)) {
                    return false;
                }
            }
            Err(_) => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a receiver's keeper makes of what its sender did.
    fn heard(sender: impl FnOnce(Channel)) -> bool {
        let (ours, theirs) = Channel::pair().unwrap();
        sender(theirs);
        ours.set_nonblocking().unwrap();
        is_heard(&Receipt { channel: 0, number: 7, refused: [0b10, 0, 0, 1 << 61] }, &ours)
    }

    fn say(channel: &Channel, message: &PeerMessage) {
        control::send(channel, message, &[]).unwrap();
    }

    #[test]
    fn whoever_listens_still_is_told() {
        let mut kept = None;
        assert!(heard(|channel| kept = Some(channel)));
        let (message, _) = control::receive::<PeerMessage>(&kept.unwrap()).unwrap().unwrap();
        assert_eq!(message, PeerMessage::Taken { refused: vec![1, 253], number: 7 });
    }

    #[test]
    fn whoever_has_gone_on_has_heard() {
        for message in [
            PeerMessage::Sessions { count: 1, number: 8 },
            PeerMessage::Flows { count: 1, number: 8 },
            PeerMessage::FlowsDone,
            PeerMessage::Done { heard: 7 },
        ] {
            assert!(heard(|channel| say(&channel, &message)), "{message:?}");
        }
    }

    #[test]
    fn whoever_has_cut_the_channel_says_what_it_heard() {
        for (number, is_heard) in [(7, true), (6, false), (0, false)] {
            let cut = |channel: Channel| {
                channel.hush();
                say(&channel, &PeerMessage::Done { heard: number });
            };
            assert_eq!(heard(cut), is_heard, "{number}");
        }
        // A moment later, too.
        assert!(heard(|channel| {
            channel.hush();
            std::thread::spawn(move || {
                std::thread::park_timeout(std::time::Duration::from_millis(50));
                say(&channel, &PeerMessage::Done { heard: 7 });
            });
        }));
    }

    #[test]
    fn whoever_is_gone_without_a_word_has_heard_nothing() {
        assert!(!heard(drop));
    }
}
