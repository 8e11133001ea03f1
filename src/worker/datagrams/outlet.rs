//! Sends batches through one socket, with the live fall-back of UDP_SEGMENT.
//!
//! Joined datagrams leave in one piece for the kernel to cut. Where that fails
//! (a device or a route that cannot), the socket never tries again, and the
//! same datagrams go out one by one at once: nothing is lost by it.

use std::io;
use std::os::fd::AsFd;

use crate::sys::datagram::{MAX_BYTES, MAX_SEGMENTS, Outgoing, Sender};

/// What one socket's batch came to.
#[derive(Debug, Default)]
pub struct Sent {
    pub datagrams: u64,
    pub bytes: u64,
    /// Datagrams longer than the way allows.
    pub too_long: u64,
    /// Datagrams that were not taken for another reason.
    pub refused: u64,
    /// The last such reason.
    pub error: Option<io::Error>,
    /// The kernel could not cut, and will not be asked again.
    pub offload_failed: bool,
}

/// A sender, and room to remember what is to go out again.
#[derive(Debug, Default)]
pub struct Outlet {
    sender: Sender,
    again: Vec<usize>,
}

impl Outlet {
    /// Sends all items; `can_cut` is the socket's, and may become false.
    pub fn send<'a>(
        &mut self,
        socket: &impl AsFd,
        can_cut: &mut bool,
        items: impl Iterator<Item = Outgoing<'a>> + Clone,
    ) -> Sent {
        let mut sent = Sent::default();
        let cuts = *can_cut;
        let all = items.flat_map(move |item| pieces(item, cuts));
        let (mut walk, again) = (all.clone(), &mut self.again);
        again.clear();
        self.sender.send(socket, all.clone(), |number, result| {
            let piece = walk.next().expect("each piece is told of once");
            match result {
                Err(error) if piece.segment.is_some() && is_offload_failure(&error) => again.push(number),
                result => sent.note(&piece, result),
            }
        });
        for number in std::mem::take(&mut self.again) {
            sent.offload_failed = true;
            *can_cut = false;
            let piece = all.clone().nth(number).expect("it was sent before");
            let mut walk = pieces(piece, false);
            self.sender.send(socket, walk.clone(), |_, result| {
                sent.note(&walk.next().expect("each piece is told of once"), result);
            });
        }
        sent
    }
}

impl Sent {
    fn note(&mut self, piece: &Outgoing, result: io::Result<()>) {
        let count = piece.segment.map_or(1, |segment| piece.bytes.len().div_ceil(segment) as u64);
        match result {
            Ok(()) => {
                self.datagrams += count;
                // A head stands in front of single datagrams alone.
                self.bytes += (piece.head.len() + piece.bytes.len()) as u64;
            }
            Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => self.too_long += count,
            Err(error) => {
                self.refused += count;
                self.error = Some(error);
            }
        }
    }
}

/// An item as the kernel takes it: whole, or in what it cuts by itself, or
/// datagram by datagram.
fn pieces<'a>(item: Outgoing<'a>, can_cut: bool) -> impl Iterator<Item = Outgoing<'a>> + Clone {
    let segment = item.segment.filter(|segment| item.bytes.len() > *segment);
    // Something in front of each would have to be in front of each piece.
    let cuts = can_cut && item.head.is_empty();
    let step = match segment {
        None => usize::MAX,
        Some(segment) if cuts => segment * MAX_SEGMENTS.min(MAX_BYTES / segment).max(1),
        Some(segment) => segment,
    };
    let empty = item.bytes.is_empty().then_some(item.bytes);
    empty.into_iter().chain(item.bytes.chunks(step)).map(move |bytes| Outgoing {
        bytes,
        segment: segment.filter(|segment| cuts && bytes.len() > *segment),
        ..item
    })
}

/// What udp_send_skb and the devices below answer (net/ipv4/udp.c).
fn is_offload_failure(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINVAL | libc::EIO | libc::EMSGSIZE | libc::EOPNOTSUPP | libc::ENOPROTOOPT)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn pieces_are_the_same_datagrams(
            length in 0usize..5_000,
            segment in prop::option::of(1usize..3_000),
            can_cut: bool,
            has_head: bool,
        ) {
            let bytes: Vec<u8> = (0..length).map(|i| i as u8).collect();
            let head: &[u8] = if has_head { b"head" } else { &[] };
            let item = Outgoing { head, bytes: &bytes, to: None, from: None, segment };
            let mut datagrams: Vec<&[u8]> = Vec::new();
            for piece in pieces(item, can_cut) {
                match piece.segment {
                    Some(segment) => {
                        prop_assert!(can_cut && !has_head);
                        prop_assert!(piece.bytes.len().div_ceil(segment) <= MAX_SEGMENTS);
                        datagrams.extend(piece.bytes.chunks(segment));
                    }
                    None => datagrams.push(piece.bytes),
                }
            }
            let expected: Vec<&[u8]> = match segment {
                Some(segment) if length > 0 => bytes.chunks(segment).collect(),
                _ => vec![&bytes],
            };
            prop_assert_eq!(datagrams, expected);
        }
    }
}
