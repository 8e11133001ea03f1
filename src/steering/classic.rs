//! Steering by classic BPF, which any user may attach: no table and no loads.
//!
//! The answer is an index into the group. Sockets are opened slot by slot and
//! held for as long as the daemon runs, so index and slot are the same. A hash
//! over all slots comes first, so that it stays where it is while slots come
//! and go; only what falls to a slot that is away is hashed again, over those
//! that are there. After every change the program is attached anew.

use super::bucket::{FOLD, LAST_MULTIPLIER, MULTIPLIER};
use super::{MAX_SLOTS, Pick};
use crate::sys::bpf::classic::Instruction;

// linux/bpf_common.h, by what they do.
const LOAD_WORD: u16 = 0x20;
const LOAD_HALF_INDEXED: u16 = 0x48;
const LOAD_HALF: u16 = 0x28;
const LOAD_MEMORY: u16 = 0x60;
const LOAD_X_HEADER_LENGTH: u16 = 0xb1;
const STORE_MEMORY: u16 = 0x02;
const A_TO_X: u16 = 0x07;
const MULTIPLY: u16 = 0x24;
const DIVIDE: u16 = 0x34;
const REST: u16 = 0x94;
const SHIFT_RIGHT: u16 = 0x74;
const XOR: u16 = 0xa4;
const XOR_X: u16 = 0xac;
const JUMP: u16 = 0x05;
const JUMP_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;
const RETURN_A: u16 = 0x16;

/// SKF_NET_OFF: offsets count from the IP header.
const FROM_IP_HEADER: u32 = -0x10_0000_i32 as u32;
/// SKF_AD_OFF: what is no byte of the packet.
const ABOUT_PACKET: u32 = -0x1000_i32 as u32;
const CPU: u32 = ABOUT_PACKET + 36;
const RANDOM: u32 = ABOUT_PACKET + 56;

/// What a program is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request<'r> {
    /// How the slot is chosen; `TwoChoices` is chosen as `Connection`.
    pub pick: Pick,
    /// Whether the group's address is an IPv6 one.
    pub is_ipv6: bool,
    /// Keys the hash.
    pub seed: u32,
    /// How many slots there are, and which of them take something.
    pub live: &'r [bool],
    /// With `Pick::Cpu`: the CPU of slot i is `cpus[i % cpus.len()]`.
    pub cpus: &'r [usize],
}

/// The program; `None` where no slot takes anything.
pub fn program(request: &Request) -> Option<Vec<Instruction>> {
    assert!((1..=MAX_SLOTS).contains(&request.live.len()), "1 to 64 slots");
    let live: Vec<usize> = (0..request.live.len()).filter(|&slot| request.live[slot]).collect();
    if live.is_empty() {
        return None;
    }
    let mut code = Vec::new();
    match request.pick {
        Pick::Random => code.push(op(LOAD_WORD, RANDOM)),
        Pick::Source => hash(&mut code, request, false),
        Pick::Connection | Pick::TwoChoices | Pick::Flow | Pick::Cpu => hash(&mut code, request, true),
    }
    // M[0] is the hash from here on.
    code.push(op(STORE_MEMORY, 0));
    if request.pick == Pick::Cpu {
        by_cpu(&mut code, request, &live);
        code.push(op(LOAD_MEMORY, 0));
    }
    over_slots(&mut code, request.live.len(), &live);
    Some(code)
}

fn op(code: u16, k: u32) -> Instruction {
    Instruction { code, jump_true: 0, jump_false: 0, k }
}

/// Skips so many instructions where A is not the number.
fn unless(number: usize, skip: usize) -> Instruction {
    let jump_false = u8::try_from(skip).expect("at most 64 slots of two instructions lie between");
    Instruction { code: JUMP_EQUAL, jump_true: 0, jump_false, k: number as u32 }
}

/// A = a hash of the client's address, and of its port.
fn hash(code: &mut Vec<Instruction>, request: &Request, with_port: bool) {
    // M[0] is the hash so far.
    if with_port && request.is_ipv6 {
        // After the plain header; extension headers count as the port then.
        code.push(op(LOAD_HALF, FROM_IP_HEADER.wrapping_add(40)));
    } else if with_port {
        code.push(op(LOAD_X_HEADER_LENGTH, FROM_IP_HEADER));
        code.push(op(LOAD_HALF_INDEXED, FROM_IP_HEADER));
    } else {
        // Nothing of the packet: the seed alone.
        code.push(op(0x00, 0));
    }
    code.push(op(XOR, request.seed));
    fold(code, MULTIPLIER);
    let words: &[u32] = if request.is_ipv6 { &[8, 12, 16, 20] } else { &[12] };
    for word in words {
        code.push(op(STORE_MEMORY, 0));
        code.push(op(LOAD_WORD, FROM_IP_HEADER.wrapping_add(*word)));
        code.push(op(A_TO_X, 0));
        code.push(op(LOAD_MEMORY, 0));
        code.push(op(XOR_X, 0));
        fold(code, MULTIPLIER);
    }
    fold(code, LAST_MULTIPLIER);
}

/// A = A times a number, folded onto itself.
fn fold(code: &mut Vec<Instruction>, multiplier: u32) {
    code.extend([
        op(MULTIPLY, multiplier),
        op(STORE_MEMORY, 1),
        op(SHIFT_RIGHT, FOLD),
        op(A_TO_X, 0),
        op(LOAD_MEMORY, 1),
        op(XOR_X, 0),
    ]);
}

/// Returns a slot of the packet's CPU; goes on where it has none.
fn by_cpu(code: &mut Vec<Instruction>, request: &Request, live: &[usize]) {
    for (at, cpu) in request.cpus.iter().enumerate() {
        let own: Vec<usize> = live.iter().copied().filter(|slot| slot % request.cpus.len() == at).collect();
        if own.is_empty() {
            continue;
        }
        let mut block = vec![op(LOAD_MEMORY, 0), op(REST, own.len() as u32)];
        one_of(&mut block, &own);
        code.push(op(LOAD_WORD, CPU));
        code.push(unless(*cpu, block.len()));
        code.append(&mut block);
    }
}

/// A is the hash: its slot where that is live, else a live one.
fn over_slots(code: &mut Vec<Instruction>, slot_count: usize, live: &[usize]) {
    code.push(op(REST, slot_count as u32));
    let away: Vec<usize> = (0..slot_count).filter(|slot| !live.contains(slot)).collect();
    if away.is_empty() {
        code.push(op(RETURN_A, 0));
        return;
    }
    for (at, slot) in away.iter().enumerate() {
        // To the second choice, past the checks that follow and the return.
        let past = (away.len() - at - 1) * 2 + 1;
        code.push(unless(*slot, 1));
        code.push(op(JUMP, past as u32));
    }
    code.push(op(RETURN_A, 0));
    code.extend([op(LOAD_MEMORY, 0), op(DIVIDE, slot_count as u32), op(REST, live.len() as u32)]);
    one_of(code, live);
}

/// Returns the slot whose place in the list A is.
fn one_of(code: &mut Vec<Instruction>, slots: &[usize]) {
    let (last, others) = slots.split_last().expect("not asked for none");
    for (at, slot) in others.iter().enumerate() {
        code.push(unless(at, 1));
        code.push(op(RETURN, *slot as u32));
    }
    code.push(op(RETURN, *last as u32));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel's machine would answer, with every load a given number.
    fn run(code: &[Instruction], packet: u32, cpu: u32) -> u32 {
        let (mut a, mut x, mut memory, mut at) = (0u32, 0u32, [0u32; 16], 0);
        loop {
            let i = code[at];
            at += 1;
            match i.code {
                LOAD_WORD if i.k == CPU => a = cpu,
                LOAD_WORD | LOAD_HALF | LOAD_HALF_INDEXED => a = packet,
                0x00 => a = i.k,
                LOAD_MEMORY => a = memory[i.k as usize],
                LOAD_X_HEADER_LENGTH => x = 20,
                STORE_MEMORY => memory[i.k as usize] = a,
                A_TO_X => x = a,
                MULTIPLY => a = a.wrapping_mul(i.k),
                DIVIDE => a /= i.k,
                REST => a %= i.k,
                SHIFT_RIGHT => a >>= i.k,
                XOR => a ^= i.k,
                XOR_X => a ^= x,
                JUMP => at += i.k as usize,
                JUMP_EQUAL => at += usize::from(if a == i.k { i.jump_true } else { i.jump_false }),
                RETURN => return i.k,
                RETURN_A => return a,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    fn request(pick: Pick, live: &[bool]) -> Request<'_> {
        Request { pick, is_ipv6: false, seed: 77, live, cpus: &[0, 1, 2] }
    }

    const PICKS: [Pick; 5] = [Pick::Connection, Pick::Source, Pick::Flow, Pick::Random, Pick::Cpu];

    #[test]
    fn an_away_slot_is_never_chosen_and_nothing_else_moves_for_it() {
        for pick in PICKS {
            for slot_count in [2, 5, 64] {
                let mut live = vec![true; slot_count];
                let all = program(&request(pick, &live)).unwrap();
                for away in [0, slot_count - 1, slot_count / 2] {
                    live[away] = false;
                    let without = program(&request(pick, &live)).unwrap();
                    for packet in (0..500u32).map(|i| i.wrapping_mul(0x0101_0307)) {
                        let (before, after) =
                            (run(&all, packet, packet % 5), run(&without, packet, packet % 5));
                        assert_ne!(after as usize, away);
                        assert!((after as usize) < slot_count);
                        if before as usize != away && pick != Pick::Cpu {
                            assert_eq!(before, after, "{pick:?} {slot_count}");
                        }
                    }
                    live[away] = true;
                }
            }
        }
    }

    #[test]
    fn a_cpu_has_its_own_slots() {
        let live = [true; 6];
        let request = Request { pick: Pick::Cpu, is_ipv6: true, seed: 1, live: &live, cpus: &[2, 5] };
        let code = program(&request).unwrap();
        for packet in 0..200 {
            assert_eq!(run(&code, packet, 2) % 2, 0);
            assert_eq!(run(&code, packet, 5) % 2, 1);
        }
    }

    #[test]
    fn nobody_there_is_no_program_and_the_largest_one_fits() {
        let live = [false; 64];
        assert_eq!(program(&request(Pick::Cpu, &live)), None);
        let mut most = [true; 64];
        for slot in (0..64).step_by(2) {
            most[slot] = false;
        }
        // BPF_MAXINSNS.
        assert!(program(&request(Pick::Cpu, &most)).unwrap().len() < 4096);
    }
}
