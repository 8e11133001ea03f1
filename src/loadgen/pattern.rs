//! The payload: bytes that say where they belong.
//!
//! One block of seeded noise, made once and shared by all threads. Byte `n` of
//! a connection is byte `start + n` of the endless repetition of the block, so
//! sending and checking are a copy and a comparison, and a byte that is lost,
//! doubled, changed, or from another connection is found where it stands.

use super::arrivals::Random;

/// The noise repeats after so many bytes. A prime, so that no power of two
/// (a buffer's size) hides a displacement.
const PERIOD: usize = 65_521;

/// The longest piece that is handed out; the largest datagram fits.
pub const LONGEST: usize = 65_536;

/// Bytes in front of a datagram's noise: the flow's tag and the number.
pub const HEADER: usize = 8;

/// The block.
pub struct Noise(Vec<u8>);

impl Noise {
    /// The noise of this seed.
    pub fn new(seed: u64) -> Noise {
        let mut random = Random::new(seed);
        // No byte is an `e`, with which an identify line begins.
        let mut block: Vec<u8> = (0..PERIOD).map(|_| random.next() as u8).collect();
        block.iter_mut().filter(|byte| **byte == b'e').for_each(|byte| *byte = b'E');
        let turn = block.clone();
        while block.len() < PERIOD + LONGEST {
            let missing = (PERIOD + LONGEST - block.len()).min(PERIOD);
            block.extend_from_slice(&turn[..missing]);
        }
        Noise(block)
    }

    /// The piece at a position of the endless repetition.
    pub fn piece(&self, at: u64, length: usize) -> &[u8] {
        let start = (at % PERIOD as u64) as usize;
        &self.0[start..start + length.min(LONGEST)]
    }

    /// Where bytes differ from what belongs at this position.
    pub fn first_difference(&self, at: u64, bytes: &[u8]) -> Option<usize> {
        let mut offset = 0;
        for chunk in bytes.chunks(LONGEST) {
            let wanted = self.piece(at + offset as u64, chunk.len());
            if wanted != chunk {
                let inner = wanted.iter().zip(chunk).position(|(a, b)| a != b);
                return Some(offset + inner.expect("unequal slices of one length differ somewhere"));
            }
            offset += chunk.len();
        }
        None
    }
}

/// Where a connection's bytes start in the noise.
pub fn start_of(connection: u64) -> u64 {
    Random::new(connection).next() % PERIOD as u64
}

/// A datagram's first bytes. The top bit keeps it from looking like text.
pub fn header(tag: u32, number: u32) -> [u8; HEADER] {
    let mut out = [0; HEADER];
    out[..4].copy_from_slice(&(tag | 0x8000_0000).to_be_bytes());
    out[4..].copy_from_slice(&number.to_be_bytes());
    out
}

/// Where the noise after that header starts.
pub fn start_of_datagram(tag: u32, number: u32) -> u64 {
    start_of(u64::from(tag) << 32 | u64::from(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_single_wrong_byte_is_found_where_it_stands() {
        let noise = Noise::new(3);
        for at in [0, 1, 65_520, 65_521, 1 << 40] {
            let good = noise.piece(at, 5000).to_vec();
            assert_eq!(noise.first_difference(at, &good), None);
            for wrong in [0, 1, 2499, 4999] {
                let mut bad = good.clone();
                bad[wrong] ^= 1;
                assert_eq!(noise.first_difference(at, &bad), Some(wrong));
            }
        }
    }

    #[test]
    fn displaced_bytes_are_not_taken_for_the_right_ones() {
        let noise = Noise::new(3);
        for shift in [1, 2, 64, 4096, 65_536, 1 << 20] {
            assert!(noise.first_difference(0, noise.piece(shift, 64)).is_some(), "{shift}");
        }
    }

    #[test]
    fn a_long_run_is_the_pieces_in_a_row() {
        let noise = Noise::new(9);
        let mut long = Vec::new();
        while long.len() < 300_000 {
            long.extend_from_slice(noise.piece(77 + long.len() as u64, 1000));
        }
        assert_eq!(noise.first_difference(77, &long), None);
        long[200_000] ^= 0x80;
        assert_eq!(noise.first_difference(77, &long), Some(200_000));
    }

    #[test]
    fn no_payload_begins_like_an_identify_line() {
        let noise = Noise::new(1);
        assert!((0..PERIOD as u64).all(|at| noise.piece(at, 1) != b"e"));
        assert!((0..1000).all(|tag| header(tag, 0)[0] != b'e'));
    }
}
