//! A kernel that is a virtio driver and nothing else: its rings and buffers are in its image as the test has put them there, and
//! what it does is a list of stores to registers and of waits. What no driver of Linux does, it can.

use std::arch::global_asm;

use bulkhead_vmm::arch::x86_64::layout;
use bulkhead_vmm::devices::virtio::signal::NEEDS_RESET;
use bulkhead_vmm_config::{ANNOUNCE_PORT, announce};
use virtio_bindings::bindings::virtio_mmio::*;
use virtio_bindings::bindings::virtio_ring::{
    VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};

use super::guest::elf_at;

/// Where the image is, and its first instruction.
const IMAGE: u64 = 0x100_1000;
const SCRIPT: u64 = 0x100_2000;
/// A page directory for the fourth GiB, which has the devices.
const DIRECTORY: u64 = 0x101_0000;
const RINGS: u64 = 0x102_0000;
/// Buffers of the test's.
pub const BUFFERS: u64 = 0x104_0000;
const END: u64 = 0x106_0000;

/// Descriptors of each queue.
pub const SIZE: u16 = 16;

pub const WRITE: u16 = VRING_DESC_F_WRITE as u16;
pub const NEXT: u16 = VRING_DESC_F_NEXT as u16;
pub const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

// A step is four words: 1, address, value, unused: stores. 2, address, mask, value: waits until the masked word is the value.
// 0: the end, announced as a power-off.
global_asm!(
    ".pushsection .rodata.bulkhead_driver, \"a\"",
    "bulkhead_driver_start:",
    "mov rax, {directory}",
    "mov [{directory_pointer}], rax",
    "mov ebx, {script}",
    "2:",
    "mov eax, [rbx]",
    "mov edi, [rbx + 4]",
    "mov ecx, [rbx + 8]",
    "mov esi, [rbx + 12]",
    "add rbx, 16",
    "cmp eax, 1",
    "je 3f",
    "ja 4f",
    "mov dx, {port}",
    "mov al, {power_off}",
    "out dx, al",
    "5:",
    "hlt",
    "jmp 5b",
    "3:",
    "mov [rdi], ecx",
    "jmp 2b",
    "4:",
    "mov edx, [rdi]",
    "and edx, ecx",
    "cmp edx, esi",
    "je 2b",
    "pause",
    "jmp 4b",
    "bulkhead_driver_end:",
    ".popsection",
    directory = const DIRECTORY | 3,
    // The fourth entry of the table below the top.
    directory_pointer = const layout::PAGE_TABLES + layout::PAGE + 3 * 8,
    script = const SCRIPT,
    port = const ANNOUNCE_PORT,
    power_off = const announce::POWER_OFF,
);

unsafe extern "C" {
    static bulkhead_driver_start: u8;
    static bulkhead_driver_end: u8;
}

fn code() -> &'static [u8] {
    let (start, end) = (
        &raw const bulkhead_driver_start,
        &raw const bulkhead_driver_end,
    );
    // SAFETY: the symbols enclose the instructions above, which are constant.
    unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
}

/// The kernel while it is being made.
pub struct Driver {
    image: Vec<u8>,
    script: Vec<u32>,
    window: u64,
    queues: u32,
    /// The rings of each start are others, all in place from the beginning.
    generation: u64,
    available: Vec<u16>,
}

impl Driver {
    /// For the device of the `nth` window, which has so many queues.
    pub fn new(nth: usize, queues: u32) -> Driver {
        let mut driver = Driver {
            image: vec![0; (END - IMAGE) as usize],
            script: Vec::new(),
            window: layout::virtio_window(nth),
            queues,
            generation: 0,
            available: vec![0; queues as usize],
        };
        driver.put(IMAGE, code());
        const LARGE_WRITABLE: u64 = 0x83;
        for page in 0..512_u64 {
            let entry = 3 << 30 | page << 21 | LARGE_WRITABLE;
            driver.put(DIRECTORY + 8 * page, &entry.to_le_bytes());
        }
        driver
    }

    /// Puts bytes into guest memory.
    pub fn put(&mut self, address: u64, bytes: &[u8]) {
        let at = (address - IMAGE) as usize;
        self.image[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Where a register is (VIRTIO 1.2 §4.2.2).
    fn register(&self, register: u32) -> u64 {
        self.window + u64::from(register)
    }

    fn store(&mut self, register: u32, value: u32) {
        let address = self.register(register) as u32;
        self.script.extend([1, address, value, 0]);
    }

    fn wait(&mut self, address: u64, mask: u32, value: u32) {
        self.script.extend([2, address as u32, mask, value]);
    }

    /// The handshake from a reset on, with VERSION_1 and these features, and new rings for all queues.
    pub fn start(&mut self, features: u32) {
        self.generation += 1;
        self.available.fill(0);
        for status in [0, 1, 3] {
            self.store(VIRTIO_MMIO_STATUS, status);
        }
        for (half, bits) in [(0, features), (1, 1)] {
            self.store(VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
            self.store(VIRTIO_MMIO_DRIVER_FEATURES, bits);
        }
        self.store(VIRTIO_MMIO_STATUS, 0xb);
        for queue in 0..self.queues {
            self.store(VIRTIO_MMIO_QUEUE_SEL, queue);
            self.store(VIRTIO_MMIO_QUEUE_NUM, SIZE.into());
            for (register, part) in [
                (VIRTIO_MMIO_QUEUE_DESC_LOW, 0),
                (VIRTIO_MMIO_QUEUE_AVAIL_LOW, AVAILABLE),
                (VIRTIO_MMIO_QUEUE_USED_LOW, USED),
            ] {
                let address = self.ring(queue) + part;
                self.store(register, address as u32);
                self.store(register + 4, (address >> 32) as u32);
            }
            self.store(VIRTIO_MMIO_QUEUE_READY, 1);
        }
        self.store(VIRTIO_MMIO_STATUS, 0xf);
        self.wait(self.register(VIRTIO_MMIO_STATUS), !0, 0xf);
    }

    fn ring(&self, queue: u32) -> u64 {
        RINGS + (self.generation * u64::from(self.queues) + u64::from(queue)) * 0x1000
    }

    /// Writes a descriptor.
    pub fn descriptor(&mut self, queue: u32, index: u16, piece: (u64, u32, u16), next: u16) {
        let (address, length, flags) = piece;
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(length.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.put(self.ring(queue) + 16 * u64::from(index), &bytes);
    }

    /// Makes the chain at `head` available.
    pub fn publish(&mut self, queue: u32, head: u16) {
        let count = self.available[queue as usize];
        let slot = self.ring(queue) + AVAILABLE + 4 + 2 * u64::from(count % SIZE);
        self.put(slot, &head.to_le_bytes());
        self.set_available(queue, count + 1);
    }

    /// Says how many there are.
    pub fn set_available(&mut self, queue: u32, count: u16) {
        self.available[queue as usize] = count;
        self.put(self.ring(queue) + AVAILABLE + 2, &count.to_le_bytes());
    }

    /// A chain of pieces in the first descriptors, made available.
    pub fn chain(&mut self, queue: u32, pieces: &[(u64, u32, u16)]) {
        for (index, &(address, length, flags)) in (0..).zip(pieces) {
            let last = usize::from(index) + 1 == pieces.len();
            let flags = if last { flags } else { flags | NEXT };
            self.descriptor(queue, index, (address, length, flags), index + 1);
        }
        self.publish(queue, 0);
    }

    /// Kicks a queue.
    pub fn kick(&mut self, queue: u32) {
        self.store(VIRTIO_MMIO_QUEUE_NOTIFY, queue);
    }

    /// Waits until the device asks for a reset.
    pub fn wait_for_refusal(&mut self) {
        let status = self.register(VIRTIO_MMIO_STATUS);
        self.wait(status, NEEDS_RESET, NEEDS_RESET);
    }

    /// Waits until the device has used so many chains.
    pub fn wait_for_used(&mut self, queue: u32, count: u16) {
        let index = self.ring(queue) + USED;
        self.wait(index, 0xffff_0000, u32::from(count) << 16);
    }

    /// The kernel's file; it ends with a power-off.
    pub fn elf(mut self) -> Vec<u8> {
        let script: Vec<u8> = self
            .script
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect();
        assert!(SCRIPT + script.len() as u64 + 16 <= DIRECTORY);
        self.put(SCRIPT, &script);
        elf_at(IMAGE, &self.image)
    }
}

/// Offsets within a queue's page.
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x800;
