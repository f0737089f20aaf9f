//! The programs that the kernel runs for us, instruction by instruction.
//!
//! [`mark`] runs whenever slots of any swap area are freed, under the lock that keeps them from being given away again until it
//! has ended. It sets a bit for each of them where the area is the whole of one certain device, and asks for proof of everything
//! it relies on: a mark that is missing wastes a page of memory, and one that should not be there loses the page. [`look_up`]
//! runs once, and says where the kernel keeps its list of swap areas. Sources: `include/uapi/linux/bpf.h` and
//! `Documentation/bpf/standardization/instruction-set.rst`.

use std::os::fd::{AsRawFd, BorrowedFd};

use zerocopy::{Immutable, IntoBytes, KnownLayout};

use super::plan::{Fields, Hook, Plan};

/// Swap areas that there can be: `MAX_SWAPFILES` is less than this by what else is encoded as one.
const AREAS_MAX: i32 = 32;

/// Slots marked by one run, which are all: more than a cluster is never freed at once.
pub(super) const SLOTS_MAX: u32 = 512;

/// Bytes of the name of a symbol, with its end.
const SYMBOL_BYTES: usize = 16;

const CALL_MAP_LOOKUP: i32 = 1;
const CALL_READ_KERNEL: i32 = 113;
const CALL_SYMBOL: i32 = 179;

/// A register.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
enum Register {
    /// What a call returns, and the program.
    R0,
    /// The first argument, and what the program begins with. This and the next four are lost by a call.
    R1,
    R2,
    R3,
    R4,
    R6 = 6,
    R7,
    R8,
    R9,
    /// The end of the stack.
    Frame,
}
use Register::{Frame, R0, R1, R2, R3, R4, R6, R7, R8, R9};

/// How many bytes are loaded or stored.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
enum Width {
    Four = 0x00,
    One = 0x10,
    Eight = 0x18,
}
use Width::{Eight, Four, One};

/// What is calculated.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
enum Operation {
    Add = 0x00,
    Subtract = 0x10,
    Divide = 0x30,
    And = 0x50,
    ShiftLeft = 0x60,
    ShiftRight = 0x70,
    Remainder = 0x90,
    Move = 0xb0,
}

/// When to jump. Numbers have no sign.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
enum When {
    Equal = 0x10,
    Greater = 0x20,
    GreaterOrEqual = 0x30,
    NotEqual = 0x50,
}

const CLASS_LOAD_WIDE: u8 = 0x18;
const CLASS_LOAD: u8 = 0x61;
const CLASS_STORE: u8 = 0x63;
const CLASS_ATOMIC: u8 = 0xc3;
const CLASS_JUMP: u8 = 0x05;
const CLASS_JUMP_NARROW: u8 = 0x06;
const CLASS_NARROW: u8 = 0x04;
const CLASS_WIDE: u8 = 0x07;
const BY_REGISTER: u8 = 0x08;
const JUMP_CALL: u8 = 0x80;
const JUMP_EXIT: u8 = 0x90;
/// A number that is loaded is that of a map.
const NUMBER_OF_MAP: u8 = 1;
const ATOMIC_OR: i32 = 0x40;

/// One instruction, `struct bpf_insn`.
#[derive(Clone, Copy, Debug, Eq, Immutable, IntoBytes, KnownLayout, PartialEq)]
#[repr(C)]
pub(super) struct Instruction {
    code: u8,
    /// The destination in the lower half, the source in the upper, on machines of little endian.
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// Where the kernel has what a function was called with, for those who look in: its registers of the first four arguments
/// in `struct pt_regs`. None for a machine that this was not made for.
pub(super) const ARGUMENTS: Option<[i16; 4]> = if cfg!(target_arch = "x86_64") {
    Some([112, 104, 96, 88])
} else if cfg!(all(target_arch = "aarch64", target_endian = "little")) {
    Some([0, 8, 16, 24])
} else {
    None
};

/// A program while it is written. Jumps are all forward to its end, but for the one that closes a loop.
#[derive(Default)]
struct Writer {
    instructions: Vec<Instruction>,
    to_end: Vec<usize>,
}

impl Writer {
    fn put(&mut self, code: u8, to: Register, from: Register, offset: i16, immediate: i32) {
        let registers = to as u8 | (from as u8) << 4;
        self.instructions.push(Instruction { code, registers, offset, immediate });
    }

    fn load(&mut self, width: Width, to: Register, base: Register, offset: i16) {
        self.put(CLASS_LOAD | width as u8, to, base, offset, 0);
    }

    fn store(&mut self, width: Width, base: Register, offset: i16, from: Register) {
        self.put(CLASS_STORE | width as u8, base, from, offset, 0);
    }

    /// Sets bits in memory that others write as well.
    fn set_bits(&mut self, base: Register, bits: Register) {
        self.put(CLASS_ATOMIC | Eight as u8, base, bits, 0, ATOMIC_OR);
    }

    fn number(&mut self, to: Register, number: u64) {
        self.put(CLASS_LOAD_WIDE, to, R0, 0, number as u32 as i32);
        self.put(0, R0, R0, 0, (number >> 32) as u32 as i32);
    }

    fn map(&mut self, to: Register, map: BorrowedFd<'_>) {
        self.number(to, u64::from(map.as_raw_fd() as u32));
        let at = self.instructions.len() - 2;
        self.instructions[at].registers |= NUMBER_OF_MAP << 4;
    }

    fn calculate(&mut self, operation: Operation, to: Register, number: i32) {
        self.put(CLASS_WIDE | operation as u8, to, R0, 0, number);
    }

    fn calculate_with(&mut self, operation: Operation, to: Register, with: Register) {
        self.put(CLASS_WIDE | BY_REGISTER | operation as u8, to, with, 0, 0);
    }

    /// Forgets all but the lower 32 bits.
    fn narrow(&mut self, register: Register) {
        let code = CLASS_NARROW | BY_REGISTER | Operation::Move as u8;
        self.put(code, register, register, 0, 0);
    }

    fn call(&mut self, function: i32) {
        self.put(CLASS_JUMP | JUMP_CALL, R0, R0, 0, function);
    }

    fn end_if(&mut self, when: When, register: Register, number: i32) {
        self.to_end.push(self.instructions.len());
        self.put(CLASS_JUMP | when as u8, register, R0, 0, number);
    }

    /// Of the lower 32 bits.
    fn end_if_narrow(&mut self, when: When, register: Register, number: u32) {
        self.to_end.push(self.instructions.len());
        self.put(CLASS_JUMP_NARROW | when as u8, register, R0, 0, number as i32);
    }

    fn end_if_than(&mut self, when: When, register: Register, other: Register) {
        self.to_end.push(self.instructions.len());
        self.put(CLASS_JUMP | BY_REGISTER | when as u8, register, other, 0, 0);
    }

    fn back_to(&mut self, start: usize, when: When, register: Register, number: i32) {
        let offset = start as i64 - self.instructions.len() as i64 - 1;
        self.put(CLASS_JUMP | when as u8, register, R0, offset as i16, number);
    }

    /// Reads the kernel's memory at R3 and `offset` behind it to [`SCRATCH`], and ends where it cannot be read.
    fn read_kernel(&mut self, width: Width, offset: u32) {
        if offset != 0 {
            self.calculate(Operation::Add, R3, offset as i32);
        }
        self.calculate_with(Operation::Move, R1, Frame);
        self.calculate(Operation::Add, R1, i32::from(SCRATCH));
        let bytes = match width {
            One => 1,
            Four => 4,
            Eight => 8,
        };
        self.calculate(Operation::Move, R2, bytes);
        self.call(CALL_READ_KERNEL);
        self.end_if(When::NotEqual, R0, 0);
    }

    /// The end, where it returns nothing.
    fn finish(mut self) -> Vec<Instruction> {
        let end = self.instructions.len();
        for at in self.to_end {
            self.instructions[at].offset = (end - at - 1) as i16;
        }
        let end = [(CLASS_WIDE | Operation::Move as u8, 0), (CLASS_JUMP | JUMP_EXIT, 0)];
        for (code, immediate) in end {
            let instruction = Instruction { code, registers: 0, offset: 0, immediate };
            self.instructions.push(instruction);
        }
        self.instructions
    }
}

/// What is read is put there on the stack.
const SCRATCH: i16 = -8;

/// The number of a map's element.
const KEY: i16 = -16;

/// The program that marks freed slots of the swap area on `device`, which has so many pages, in `map`.
pub(super) fn mark(
    plan: &Plan,
    arguments: [i16; 4],
    device: u32,
    pages: u64,
    map: BorrowedFd<'_>,
) -> Vec<Instruction> {
    let mut writer = Writer::default();
    // R7: the first slot. R8: the last. R9: the area, which has to be what we take it for.
    match plan.hook {
        Hook::Range { areas, number, .. } => begin_range(&mut writer, arguments, areas, number),
        Hook::Cluster { clusters, cluster_bytes, slots_log } => {
            begin_cluster(&mut writer, arguments, clusters, cluster_bytes as i32, slots_log as i32);
        }
    }
    check_area(&mut writer, plan.fields, plan.block_device_flag, device);
    // R9: how often each slot is in use.
    if let Hook::Range { uses, .. } = plan.hook {
        writer.calculate_with(Operation::Move, R3, R9);
        writer.read_kernel(Eight, uses);
        writer.load(Eight, R9, Frame, SCRATCH);
    }
    // R6: how many more slots.
    writer.calculate(Operation::Move, R6, SLOTS_MAX as i32);
    let start = writer.instructions.len();
    writer.number(R1, pages);
    writer.end_if_than(When::GreaterOrEqual, R7, R1);
    if let Hook::Range { .. } = plan.hook {
        writer.calculate_with(Operation::Move, R3, R9);
        writer.calculate_with(Operation::Add, R3, R7);
        writer.read_kernel(One, 0);
        writer.load(One, R1, Frame, SCRATCH);
        writer.end_if(When::NotEqual, R1, 0);
    }
    writer.calculate_with(Operation::Move, R1, R7);
    writer.calculate(Operation::ShiftRight, R1, 6);
    writer.store(Four, Frame, KEY, R1);
    writer.map(R1, map);
    writer.calculate_with(Operation::Move, R2, Frame);
    writer.calculate(Operation::Add, R2, i32::from(KEY));
    writer.call(CALL_MAP_LOOKUP);
    writer.end_if(When::Equal, R0, 0);
    writer.calculate_with(Operation::Move, R1, R7);
    writer.calculate(Operation::And, R1, 63);
    writer.calculate(Operation::Move, R2, 1);
    writer.calculate_with(Operation::ShiftLeft, R2, R1);
    writer.set_bits(R0, R2);
    writer.calculate(Operation::Add, R7, 1);
    writer.end_if_than(When::Greater, R7, R8);
    writer.calculate(Operation::Add, R6, -1);
    writer.back_to(start, When::NotEqual, R6, 0);
    writer.finish()
}

/// Gets all from the area's number and the slots in it.
fn begin_range(writer: &mut Writer, arguments: [i16; 4], areas: u64, number: u32) {
    for (register, offset) in [R6, R7, R8].into_iter().zip(arguments) {
        writer.load(Eight, register, R1, offset);
    }
    writer.narrow(R6);
    writer.end_if(When::GreaterOrEqual, R6, AREAS_MAX);
    writer.end_if_than(When::Greater, R7, R8);
    writer.number(R3, areas);
    writer.calculate_with(Operation::Move, R1, R6);
    writer.calculate(Operation::ShiftLeft, R1, 3);
    writer.calculate_with(Operation::Add, R3, R1);
    writer.read_kernel(Eight, 0);
    writer.load(Eight, R9, Frame, SCRATCH);
    writer.end_if(When::Equal, R9, 0);
    writer.calculate_with(Operation::Move, R3, R9);
    writer.read_kernel(One, number);
    writer.load(One, R1, Frame, SCRATCH);
    writer.end_if_than(When::NotEqual, R1, R6);
}

/// Gets all from the area, one of its clusters, and the slots in that.
fn begin_cluster(
    writer: &mut Writer,
    arguments: [i16; 4],
    clusters: u32,
    cluster_bytes: i32,
    slots_log: i32,
) {
    for (register, offset) in [R9, R6, R7, R8].into_iter().zip(arguments) {
        writer.load(Eight, register, R1, offset);
    }
    writer.narrow(R7);
    writer.narrow(R8);
    // The slots are all in the cluster.
    let slots = 1 << slots_log;
    writer.end_if(When::GreaterOrEqual, R7, slots);
    writer.end_if(When::Equal, R8, 0);
    writer.end_if(When::Greater, R8, slots);
    writer.calculate_with(Operation::Add, R8, R7);
    writer.end_if(When::Greater, R8, slots);
    // Which cluster it is of the area's.
    writer.calculate_with(Operation::Move, R3, R9);
    writer.read_kernel(Eight, clusters);
    writer.load(Eight, R1, Frame, SCRATCH);
    writer.end_if_than(When::Greater, R1, R6);
    writer.calculate_with(Operation::Subtract, R6, R1);
    writer.calculate_with(Operation::Move, R1, R6);
    writer.calculate(Operation::Remainder, R1, cluster_bytes);
    writer.end_if(When::NotEqual, R1, 0);
    writer.calculate(Operation::Divide, R6, cluster_bytes);
    writer.end_if(When::Greater, R6, i32::MAX);
    writer.calculate(Operation::ShiftLeft, R6, slots_log);
    writer.calculate_with(Operation::Add, R7, R6);
    writer.calculate_with(Operation::Add, R8, R6);
    writer.calculate(Operation::Add, R8, -1);
}

/// Ends unless the area at R9 is the whole of that device.
fn check_area(writer: &mut Writer, fields: Fields, flag: u32, device: u32) {
    writer.calculate_with(Operation::Move, R3, R9);
    writer.read_kernel(Eight, fields.flags);
    writer.load(Eight, R1, Frame, SCRATCH);
    writer.calculate(Operation::And, R1, flag as i32);
    writer.end_if(When::Equal, R1, 0);
    writer.calculate_with(Operation::Move, R3, R9);
    writer.read_kernel(Eight, fields.device);
    writer.load(Eight, R3, Frame, SCRATCH);
    writer.read_kernel(Four, fields.device_number);
    writer.load(Four, R1, Frame, SCRATCH);
    writer.end_if_narrow(When::NotEqual, R1, device);
}

/// The program that says where the kernel has something of that name: it writes eight bytes of address, and then eight of
/// what the look-up returned, to what it is run with.
pub(super) fn look_up(name: &str) -> Vec<Instruction> {
    let mut symbol = [0; SYMBOL_BYTES];
    let length = name.len().min(SYMBOL_BYTES - 1);
    symbol[..length].copy_from_slice(&name.as_bytes()[..length]);
    let [low, high] = zerocopy::transmute!(symbol);
    let mut writer = Writer::default();
    writer.calculate_with(Operation::Move, R6, R1);
    for (number, offset) in [(low, -16), (high, -8), (0, -24)] {
        writer.number(R1, number);
        writer.store(Eight, Frame, offset, R1);
    }
    writer.calculate_with(Operation::Move, R1, Frame);
    writer.calculate(Operation::Add, R1, -16);
    writer.calculate(Operation::Move, R2, length as i32 + 1);
    writer.calculate(Operation::Move, R3, 0);
    writer.calculate_with(Operation::Move, R4, Frame);
    writer.calculate(Operation::Add, R4, -24);
    writer.call(CALL_SYMBOL);
    writer.store(Eight, R6, 8, R0);
    writer.load(Eight, R1, Frame, -24);
    writer.store(Eight, R6, 0, R1);
    writer.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    fn bytes(instructions: &[Instruction]) -> Vec<[u8; 8]> {
        instructions.as_bytes().chunks(8).map(|chunk| chunk.try_into().unwrap()).collect()
    }

    #[test]
    fn instructions_are_those_of_the_kernel() {
        let mut writer = Writer::default();
        // As an assembler writes them.
        writer.load(Eight, R6, R1, 112);
        writer.store(Four, Frame, -16, R1);
        writer.number(R3, 0xffff_ffff_8163_e3b0);
        writer.narrow(R6);
        writer.calculate(Operation::Add, R1, -8);
        writer.calculate_with(Operation::ShiftLeft, R2, R1);
        writer.set_bits(R0, R2);
        writer.call(CALL_READ_KERNEL);
        writer.end_if(When::NotEqual, R0, 0);
        writer.end_if_narrow(When::NotEqual, R1, 0x8000_0001);
        writer.end_if_than(When::Greater, R7, R8);
        writer.back_to(0, When::NotEqual, R6, 0);
        assert_eq!(
            bytes(&writer.finish()),
            [
                [0x79, 0x16, 112, 0, 0, 0, 0, 0],
                [0x63, 0x1a, 0xf0, 0xff, 0, 0, 0, 0],
                [0x18, 0x03, 0, 0, 0xb0, 0xe3, 0x63, 0x81],
                [0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff],
                [0xbc, 0x66, 0, 0, 0, 0, 0, 0],
                [0x07, 0x01, 0, 0, 0xf8, 0xff, 0xff, 0xff],
                [0x6f, 0x12, 0, 0, 0, 0, 0, 0],
                [0xdb, 0x20, 0, 0, 0x40, 0, 0, 0],
                [0x85, 0, 0, 0, 113, 0, 0, 0],
                [0x55, 0x00, 3, 0, 0, 0, 0, 0],
                [0x56, 0x01, 2, 0, 0x01, 0, 0, 0x80],
                [0x2d, 0x87, 1, 0, 0, 0, 0, 0],
                [0x55, 0x06, 0xf3, 0xff, 0, 0, 0, 0],
                [0xb7, 0, 0, 0, 0, 0, 0, 0],
                [0x95, 0, 0, 0, 0, 0, 0, 0],
            ]
        );
    }

    const RANGE: Hook = Hook::Range { areas: 0xffff_ffff_8200_0000, number: 20, uses: 40 };
    const CLUSTER: Hook = Hook::Cluster { clusters: 48, cluster_bytes: 48, slots_log: 9 };

    fn plan(hook: Hook) -> Plan {
        let fields = Fields { flags: 8, device: 64, device_number: 32 };
        Plan { hook, fields, block_device_flag: 64 }
    }

    #[test]
    fn every_jump_stays_in_the_program() {
        let file = tempfile::tempfile().unwrap();
        for hook in [RANGE, CLUSTER] {
            let program = mark(&plan(hook), [112, 104, 96, 88], 1 << 20, u64::MAX, file.as_fd());
            let mut jumps = 0;
            for (at, instruction) in program.iter().enumerate() {
                let is_jump = matches!(instruction.code & 7, 5 | 6);
                if is_jump && instruction.code & 0xf0 != JUMP_CALL && instruction.code != 0x95 {
                    let to = at as i64 + 1 + i64::from(instruction.offset);
                    assert!((0..program.len() as i64 - 1).contains(&to), "{at} to {to}");
                    // And not into the middle of a number of 64 bits.
                    assert!(program[to as usize].code != 0, "{at} to {to}");
                    jumps += 1;
                }
            }
            assert!(jumps > 10);
            assert_eq!(program.last().unwrap().code, 0x95);
        }
    }

    #[test]
    fn the_map_is_named_as_one() {
        let file = tempfile::tempfile().unwrap();
        let program = mark(&plan(RANGE), [112, 104, 96, 88], 1 << 20, 64, file.as_fd());
        let maps: Vec<_> = (program.iter())
            .filter(|each| each.code == CLASS_LOAD_WIDE && each.registers >> 4 == NUMBER_OF_MAP)
            .map(|each| each.immediate)
            .collect();
        assert_eq!(maps, [file.as_raw_fd()]);
    }

    #[test]
    fn a_symbol_is_asked_for_with_its_end() {
        let program = bytes(&look_up("swap_info"));
        assert_eq!(&program[1][4..], b"swap");
        assert_eq!(&program[2][4..], b"_inf");
        assert_eq!(&program[4][4..], b"o\0\0\0");
        let lengths = program.iter().filter(|each| each[..2] == [0xb7, 0x02]);
        assert_eq!(lengths.map(|each| each[4]).collect::<Vec<_>>(), [10]);
    }
}
