//! A tiny eBPF assembler: the instructions that steering needs, with labels.
//!
//! Pure: calls build a list of instructions, `finish` fills in the jumps. The
//! verifier of the kernel has the last word on what came out, and its words
//! reach the operator (`Program::load`). Encoding: linux/bpf.h, `struct
//! bpf_insn`; a map's address takes two instructions.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, BorrowedFd};

/// A register. R0 is what a call answers, R1 to R5 are its arguments and lost
/// in it, R6 to R9 stay, Fp is the end of the stack, to read only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Register {
    R0,
    R1,
    R2,
    R3,
    R4,
    R5,
    R6,
    R7,
    R8,
    R9,
    Fp,
}

/// A function of the kernel that a program may call (linux/bpf.h,
/// `__BPF_FUNC_MAPPER`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
#[allow(missing_docs)]
pub enum Helper {
    KtimeGetNs = 5,
    GetPrandomU32 = 7,
    GetSmpProcessorId = 8,
    SkbLoadBytes = 26,
    SkbLoadBytesRelative = 68,
    SkSelectReuseport = 82,
}

/// A program in the making.
#[derive(Debug, Default)]
pub struct Assembler {
    code: Vec<u64>,
    labels: HashMap<&'static str, usize>,
    jumps: Vec<(usize, &'static str)>,
}

// Classes and modes of linux/bpf_common.h and linux/bpf.h.
const ALU: u8 = 0x04;
const ALU64: u8 = 0x07;
const JMP: u8 = 0x05;
const JMP32: u8 = 0x06;
const FROM_REGISTER: u8 = 0x08;
const LOAD_WORD: u8 = 0x61;
const LOAD_BYTE: u8 = 0x71;
const STORE_WORD: u8 = 0x63;
const STORE_NUMBER: u8 = 0x62;
const ATOMIC_WORD: u8 = 0xc3;
const LOAD_ADDRESS: u8 = 0x18;
const PSEUDO_MAP: u8 = 1;
const PSEUDO_MAP_VALUE: u8 = 2;

/// Pairs of methods: with a number, and with a register. 32 bits, unsigned,
/// the upper half of the register becomes zero.
macro_rules! arithmetic {
    ($($number:ident $register:ident $op:literal $what:literal),* $(,)?) => { $(
        #[doc = concat!($what, " a number.")]
        pub fn $number(self, to: Register, number: i32) -> Self {
            self.put($op | ALU, to as u8, 0, 0, number)
        }
        #[doc = concat!($what, " a register.")]
        pub fn $register(self, to: Register, from: Register) -> Self {
            self.put($op | ALU | FROM_REGISTER, to as u8, from as u8, 0, 0)
        }
    )* };
}

/// The same for jumps; the lower 32 bits are compared.
macro_rules! jumps {
    ($($number:ident $register:ident $op:literal $what:literal),* $(,)?) => { $(
        #[doc = concat!("Jumps where the register is ", $what, " a number.")]
        pub fn $number(self, a: Register, number: i32, label: &'static str) -> Self {
            self.jump(label).put($op | JMP32, a as u8, 0, 0, number)
        }
        #[doc = concat!("Jumps where the register is ", $what, " another.")]
        pub fn $register(self, a: Register, b: Register, label: &'static str) -> Self {
            self.jump(label).put($op | JMP32 | FROM_REGISTER, a as u8, b as u8, 0, 0)
        }
    )* };
}

impl Assembler {
    arithmetic! {
        mov mov_r 0xb0 "Sets the lower half to",
        add add_r 0x00 "Adds",
        sub sub_r 0x10 "Takes away",
        or or_r 0x40 "Or with",
        and and_r 0x50 "And with",
        lsh lsh_r 0x60 "Shifts left by",
        rsh rsh_r 0x70 "Shifts right by",
        mul mul_r 0x20 "Multiplies by",
        xor xor_r 0xa0 "Exclusive-or with",
    }

    jumps! {
        jeq jeq_r 0x10 "equal to",
        jne jne_r 0x50 "not equal to",
        jge jge_r 0x30 "at least, unsigned,",
        jlt jlt_r 0xa0 "less than, unsigned,",
        jsle jsle_r 0xd0 "at most, signed,",
    }

    /// Copies all 64 bits: addresses.
    pub fn mov64(self, to: Register, from: Register) -> Self {
        self.put(0xb0 | ALU64 | FROM_REGISTER, to as u8, from as u8, 0, 0)
    }

    /// Adds all 64 bits: an offset to an address.
    pub fn add64_r(self, to: Register, from: Register) -> Self {
        self.put(ALU64 | FROM_REGISTER, to as u8, from as u8, 0, 0)
    }

    /// Adds a number to an address.
    pub fn add64(self, to: Register, number: i32) -> Self {
        self.put(ALU64, to as u8, 0, 0, number)
    }

    /// Shifts all 64 bits right, unsigned.
    pub fn rsh64(self, to: Register, number: i32) -> Self {
        self.put(0x70 | ALU64, to as u8, 0, 0, number)
    }

    /// Loads 32 bits from an address.
    pub fn load_word(self, to: Register, address: Register, offset: i16) -> Self {
        self.put(LOAD_WORD, to as u8, address as u8, offset, 0)
    }

    /// Loads one byte from an address.
    pub fn load_byte(self, to: Register, address: Register, offset: i16) -> Self {
        self.put(LOAD_BYTE, to as u8, address as u8, offset, 0)
    }

    /// Stores 32 bits at an address.
    pub fn store_word(self, address: Register, offset: i16, from: Register) -> Self {
        self.put(STORE_WORD, address as u8, from as u8, offset, 0)
    }

    /// Stores a number as 32 bits at an address.
    pub fn store_number(self, address: Register, offset: i16, number: i32) -> Self {
        self.put(STORE_NUMBER, address as u8, 0, offset, number)
    }

    /// Adds to 32 bits at an address, atomically.
    pub fn atomic_add(self, address: Register, offset: i16, from: Register) -> Self {
        self.put(ATOMIC_WORD, address as u8, from as u8, offset, 0)
    }

    /// The address of a map, for helpers.
    pub fn map(self, to: Register, map: BorrowedFd) -> Self {
        self.address(to, PSEUDO_MAP, map)
    }

    /// The address of the first value of an array map: no look-up, no check.
    pub fn map_value(self, to: Register, map: BorrowedFd) -> Self {
        self.address(to, PSEUDO_MAP_VALUE, map)
    }

    /// Calls the kernel.
    pub fn call(self, helper: Helper) -> Self {
        self.put(0x80 | JMP, 0, 0, 0, helper as i32)
    }

    /// Jumps always.
    pub fn goto(self, label: &'static str) -> Self {
        self.jump(label).put(JMP, 0, 0, 0, 0)
    }

    /// Ends the program with R0 as its answer.
    pub fn exit(self) -> Self {
        self.put(0x90 | JMP, 0, 0, 0, 0)
    }

    /// The place where jumps with this name arrive. Jumps go forward only.
    pub fn label(mut self, label: &'static str) -> Self {
        let earlier = self.labels.insert(label, self.code.len());
        assert!(earlier.is_none(), "label {label} is there twice");
        self
    }

    /// The instructions.
    pub fn finish(mut self) -> Vec<u64> {
        for (at, label) in &self.jumps {
            let target = self.labels.get(label).unwrap_or_else(|| panic!("no label {label}"));
            // Loops would cost the verifier much and the packet more.
            let distance = target.checked_sub(at + 1).expect("jumps go forward only");
            self.code[*at] |= u64::from(distance as u16) << 16;
        }
        self.code
    }

    fn put(mut self, op: u8, to: u8, from: u8, offset: i16, number: i32) -> Self {
        self.code.push(
            u64::from(op)
                | u64::from(to) << 8
                | u64::from(from) << 12
                | u64::from(offset as u16) << 16
                | u64::from(number as u32) << 32,
        );
        self
    }

    fn address(self, to: Register, kind: u8, map: BorrowedFd) -> Self {
        self.put(LOAD_ADDRESS, to as u8, kind, 0, map.as_raw_fd()).put(0, 0, 0, 0, 0)
    }

    fn jump(mut self, label: &'static str) -> Self {
        self.jumps.push((self.code.len(), label));
        self
    }
}

#[cfg(test)]
mod tests {
    use super::Register::{R0, R1, R2};
    use super::*;

    #[test]
    fn instructions_are_encoded_as_the_kernel_reads_them() {
        let code = Assembler::default().mov(R0, 1).xor_r(R1, R2).load_word(R2, R1, 32).exit().finish();
        assert_eq!(code, [0x0000_0001_0000_00b4, 0x21ac, 0x0020_1261, 0x95]);
    }

    #[test]
    fn a_jump_counts_what_lies_between() {
        let code = Assembler::default().jeq(R1, 7, "end").mov(R0, 0).mov(R0, 1).label("end").exit().finish();
        assert_eq!(code[0] >> 16 & 0xffff, 2);
    }

    #[test]
    #[should_panic(expected = "no label nowhere")]
    fn a_jump_to_nowhere_is_a_bug() {
        Assembler::default().goto("nowhere").finish();
    }
}
