//! A kernel that is a virtio driver and nothing else: its rings and buffers are in its image as the
//! test has put them there, and what it does is a list of stores to registers, of accesses to ports
//! and of waits. What no driver of Linux does, it can.

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
const DIRECTORY: u64 = 0x110_0000;
const RINGS: u64 = 0x111_0000;
/// Buffers of the test's.
pub const BUFFERS: u64 = 0x140_0000;
const END: u64 = 0x142_0000;

/// Descriptors of each queue: as many as the smallest, the events of vsock, may have.
pub const SIZE: u16 = 8;

pub const WRITE: u16 = VRING_DESC_F_WRITE as u16;
pub const NEXT: u16 = VRING_DESC_F_NEXT as u16;
pub const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

// A step is four words. 0: the end, announced as a power-off. 1, address, value: stores. 2,
// address, mask, value: waits until the masked word is the value. 3, port, value: writes to a port.
// 4, port: reads from it. 5, address, value, width: stores 1, 2 or 8 bytes. 6, address, unused,
// width: loads.
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
    "mov edx, edi",
    "cmp eax, 1",
    "je 21f",
    "cmp eax, 2",
    "je 22f",
    "cmp eax, 3",
    "je 23f",
    "cmp eax, 4",
    "je 24f",
    "cmp eax, 5",
    "je 25f",
    "cmp eax, 6",
    "je 26f",
    "mov dx, {port}",
    "mov al, {power_off}",
    "out dx, al",
    "5:",
    "hlt",
    "jmp 5b",
    "21:",
    "mov [rdi], ecx",
    "jmp 2b",
    "22:",
    "mov edx, [rdi]",
    "and edx, ecx",
    "cmp edx, esi",
    "je 2b",
    "pause",
    "jmp 22b",
    "23:",
    "mov eax, ecx",
    "out dx, al",
    "jmp 2b",
    "24:",
    "in al, dx",
    "jmp 2b",
    "25:",
    "cmp esi, 2",
    "jb 27f",
    "je 28f",
    "mov [rdi], rcx",
    "jmp 2b",
    "27:",
    "mov [rdi], cl",
    "jmp 2b",
    "28:",
    "mov [rdi], cx",
    "jmp 2b",
    "26:",
    "cmp esi, 2",
    "jb 29f",
    "je 30f",
    "mov rcx, [rdi]",
    "jmp 2b",
    "29:",
    "mov cl, [rdi]",
    "jmp 2b",
    "30:",
    "mov cx, [rdi]",
    "jmp 2b",
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
    /// The rings of each start are others, all in place from the beginning, a page each.
    first_page: u64,
    next_page: u64,
    available: Vec<u16>,
}

impl Driver {
    pub fn new() -> Driver {
        let mut driver = Driver {
            image: vec![0; (END - IMAGE) as usize],
            script: Vec::new(),
            window: 0,
            queues: 0,
            first_page: 0,
            next_page: 0,
            available: Vec::new(),
        };
        driver.put(IMAGE, code());
        const LARGE_WRITABLE: u64 = 0x83;
        for page in 0..512_u64 {
            let entry = 3 << 30 | page << 21 | LARGE_WRITABLE;
            driver.put(DIRECTORY + 8 * page, &entry.to_le_bytes());
        }
        driver
    }

    /// What follows is for the device of the `nth` window, which has so many queues.
    pub fn select(&mut self, nth: usize, queues: u32) {
        self.window = layout::virtio_window(nth);
        self.queues = queues;
    }

    /// Puts bytes into guest memory.
    pub fn put(&mut self, address: u64, bytes: &[u8]) {
        let at = (address - IMAGE) as usize;
        self.image[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Where a register is (VIRTIO 1.2 §4.2.2).
    pub fn register(&self, register: u32) -> u64 {
        self.window + u64::from(register)
    }

    /// Stores to a register.
    pub fn store(&mut self, register: u32, value: u32) {
        let address = self.register(register) as u32;
        self.script.extend([1, address, value, 0]);
    }

    /// Stores and loads so many bytes, 1, 2 or 8, anywhere below 4 GiB.
    pub fn touch(&mut self, address: u64, width: u32, value: u32) {
        self.script.extend([5, address as u32, value, width]);
        self.script.extend([6, address as u32, 0, width]);
    }

    /// Writes to a port, and reads from it.
    pub fn port(&mut self, port: u16, value: u8) {
        self.script.extend([3, port.into(), value.into(), 0]);
        self.script.extend([4, port.into(), 0, 0]);
    }

    fn wait(&mut self, address: u64, mask: u32, value: u32) {
        self.script.extend([2, address as u32, mask, value]);
    }

    /// The handshake from a reset on, with VERSION_1 and these features, and new rings for all
    /// queues.
    pub fn start(&mut self, features: u32) {
        self.first_page = self.next_page;
        self.next_page += u64::from(self.queues);
        assert!(self.ring(self.queues) <= BUFFERS, "too many starts");
        self.available = vec![0; self.queues as usize];
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
        RINGS + (self.first_page + u64::from(queue)) * 0x1000
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
