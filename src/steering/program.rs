//! The steering program for the kernel's eBPF machine.
//!
//! One program for all ways of steering, without a loop: what to do stands in
//! the listener's page, so that a change is a store. It runs for each new
//! connection, and for each datagram, in the packet's own context. What it
//! finds nobody for, the kernel's hash decides.

use std::os::fd::BorrowedFd;

use super::bucket::{FOLD, LAST_MULTIPLIER, MULTIPLIER};
use super::page::{
    LINE_SHIFT, PICK, ROW_MASK, ROW_SHIFT, SEED, SESSIONS, SLOW_LEVEL, SLOW_SHIFT, SLOW_UNTIL, STUCK_TICKS,
    TABLE, TICK_SHIFT, TURN_SINCE,
};
use super::slowness::MOST;
use super::table::BUCKET_COUNT;
use super::{MAX_SLOTS, Pick};
use crate::sys::bpf::assembler::Register::{Fp, R0, R1, R2, R3, R4, R5, R6, R7, R8, R9};
use crate::sys::bpf::assembler::{Assembler, Helper, Register};

// Fields of `struct sk_reuseport_md` (linux/bpf.h).
const PACKET_PROTOCOL: i16 = 20;
const PACKET_HASH: i16 = 32;
/// BPF_HDR_START_NET: offsets count from the IP header.
const FROM_IP_HEADER: i32 = 1;
/// Where the client's address lies in an IP header, and how long it is.
const SOURCE_V4: (i32, i32) = (12, 4);
const SOURCE_V6: (i32, i32) = (8, 16);

// On the stack: the client's address and port, then the two slots.
const ADDRESS: i16 = -32;
const PORT: i16 = -16;
const FIRST: i16 = -8;
const SECOND: i16 = -4;

const BUCKET_MASK: i32 = BUCKET_COUNT as i32 - 1;
const SLOT_MASK: i32 = MAX_SLOTS as i32 - 1;
/// Above every level of slowness, as these are above every count of sessions.
const STUCK: i32 = (MOST as i32 + 1) << SLOW_SHIFT;

/// The program's instructions for one address: its sockets, its listener's
/// page, the daemon's loads.
pub fn program(sockets: BorrowedFd, page: BorrowedFd, loads: BorrowedFd) -> Vec<u64> {
    // R6 the packet, R7 the page, R8 the hash, R9 what the page says.
    let program = Assembler::default()
        .mov64(R6, R1)
        .map_value(R7, page)
        .load_word(R8, R6, PACKET_HASH)
        .load_word(R9, R7, PICK as i16)
        .jeq(R9, Pick::Connection as i32, "table")
        .jeq(R9, Pick::TwoChoices as i32, "table")
        .jeq(R9, Pick::Random as i32, "random")
        .jeq(R9, Pick::Cpu as i32, "cpu");
    let program = own_hash(program)
        .goto("table")
        .label("random")
        .call(Helper::GetPrandomU32)
        .mov_r(R8, R0)
        .goto("table")
        // A row for each CPU, the hash within it.
        .label("cpu")
        .call(Helper::GetSmpProcessorId)
        .load_word(R1, R7, ROW_SHIFT as i16)
        .lsh_r(R0, R1)
        .load_word(R1, R7, ROW_MASK as i16)
        .and_r(R8, R1)
        .or_r(R8, R0);
    let program = look_up(program.label("table"), R8, FIRST)
        .store_word(Fp, SECOND, R2)
        .jne(R9, Pick::TwoChoices as i32, "select")
        .rsh(R8, BUCKET_COUNT.trailing_zeros() as i32);
    let program = two_choices(look_up(program, R8, SECOND), loads).label("select");
    let program = select(program, sockets, FIRST).jeq(R0, 0, "selected");
    // Nobody there: the other slot, where it is another one.
    select(program, sockets, SECOND)
        .goto("end")
        // A burst comes faster than workers tell their loads: count it here.
        .label("selected")
        .load_word(R1, R7, PICK as i16)
        .jne(R1, Pick::TwoChoices as i32, "end")
        .load_word(R1, Fp, FIRST)
        .and(R1, SLOT_MASK)
        .lsh(R1, LINE_SHIFT as i32)
        .map_value(R2, loads)
        .add64_r(R2, R1)
        .mov(R1, 1)
        .atomic_add(R2, SESSIONS as i16, R1)
        // SK_PASS.
        .label("end")
        .mov(R0, 1)
        .exit()
        .finish()
}

/// R8 = our hash of the client's address and, for flows, its port; left as it
/// is where the packet cannot be read (a connection that moves from a closing
/// socket has none).
fn own_hash(program: Assembler) -> Assembler {
    let mut program = program
        .store_number(Fp, ADDRESS, 0)
        .store_number(Fp, ADDRESS + 4, 0)
        .store_number(Fp, ADDRESS + 8, 0)
        .store_number(Fp, ADDRESS + 12, 0)
        .store_number(Fp, PORT, 0)
        .load_word(R1, R6, PACKET_PROTOCOL)
        .mov(R2, SOURCE_V4.0)
        .mov(R4, SOURCE_V4.1)
        .jeq(R1, i32::from(in_packet(ETH_P_IP)), "address")
        .mov(R2, SOURCE_V6.0)
        .mov(R4, SOURCE_V6.1)
        .jne(R1, i32::from(in_packet(ETH_P_IPV6)), "table")
        .label("address")
        .mov64(R1, R6)
        .mov64(R3, Fp)
        .add64(R3, i32::from(ADDRESS))
        .mov(R5, FROM_IP_HEADER);
    program =
        program.call(Helper::SkbLoadBytesRelative).jne(R0, 0, "table").jne(R9, Pick::Flow as i32, "mix");
    // The packet begins with its TCP or UDP header here: the source port.
    program = program
        .mov64(R1, R6)
        .mov(R2, 0)
        .mov64(R3, Fp)
        .add64(R3, i32::from(PORT))
        .mov(R4, 2)
        .call(Helper::SkbLoadBytes)
        .jne(R0, 0, "table")
        .label("mix")
        .load_word(R8, R7, SEED as i16);
    for word in [ADDRESS, ADDRESS + 4, ADDRESS + 8, ADDRESS + 12, PORT] {
        program = fold(program.load_word(R1, Fp, word).xor_r(R8, R1).mul(R8, MULTIPLIER as i32));
    }
    fold(program.mul(R8, LAST_MULTIPLIER as i32))
}

fn fold(program: Assembler) -> Assembler {
    program.mov_r(R1, R8).rsh(R1, FOLD as i32).xor_r(R8, R1)
}

const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86DD;

/// A protocol as the packet has it: in network order.
fn in_packet(protocol: u16) -> u16 {
    protocol.to_be()
}

/// R2 and a place on the stack = the slot of the hash's bucket.
fn look_up(program: Assembler, hash: Register, place: i16) -> Assembler {
    program
        .mov_r(R1, hash)
        .and(R1, BUCKET_MASK)
        .add64_r(R1, R7)
        .load_byte(R2, R1, TABLE as i16)
        .store_word(Fp, place, R2)
}

/// Exchanges the two slots where the second is less loaded.
fn two_choices(program: Assembler, loads: BorrowedFd) -> Assembler {
    let program = program
        .load_word(R1, Fp, FIRST)
        .jeq_r(R1, R2, "select")
        .call(Helper::KtimeGetNs)
        .rsh64(R0, TICK_SHIFT as i32)
        .mov_r(R9, R0)
        .map_value(R8, loads);
    let program = load(program, FIRST, R4, ["first not stuck", "first"]);
    let program = load(program, SECOND, R5, ["second not stuck", "second"]);
    program
        .jge_r(R5, R4, "select")
        .load_word(R1, Fp, FIRST)
        .load_word(R2, Fp, SECOND)
        .store_word(Fp, FIRST, R2)
        .store_word(Fp, SECOND, R1)
}

/// A register = how loaded a slot is: whether `page::is_stuck`, then how slow
/// where `page::is_slow`, then its sessions.
fn load(program: Assembler, place: i16, to: Register, labels: [&'static str; 2]) -> Assembler {
    let [slow, end] = labels;
    program
        .load_word(R1, Fp, place)
        .and(R1, SLOT_MASK)
        .lsh(R1, LINE_SHIFT as i32)
        .add64_r(R1, R8)
        .load_word(to, R1, SESSIONS as i16)
        .load_word(R2, R1, TURN_SINCE as i16)
        .jeq(R2, 0, slow)
        .mov_r(R3, R9)
        .sub_r(R3, R2)
        .jsle(R3, STUCK_TICKS as i32 - 1, slow)
        .or(to, STUCK)
        .label(slow)
        .load_word(R2, R1, SLOW_UNTIL as i16)
        .jeq(R2, 0, end)
        .sub_r(R2, R9)
        .jsle(R2, 0, end)
        .load_word(R2, R1, SLOW_LEVEL as i16)
        .or_r(to, R2)
        .label(end)
}

/// R0 = 0 where the slot's socket was there to be selected.
fn select(program: Assembler, sockets: BorrowedFd, place: i16) -> Assembler {
    program
        .mov64(R1, R6)
        .map(R2, sockets)
        .mov64(R3, Fp)
        .add64(R3, i32::from(place))
        .mov(R4, 0)
        .call(Helper::SkSelectReuseport)
}
