//! Guests of a few instructions: an initramfs whose /init is a hand-made ELF executable that talks to the announce port.

use bulkhead_vmm_config::{ANNOUNCE_PORT, announce};

const SERIAL_PORT: u32 = 0x3f8;

/// What /init does after it has announced itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// Announces power-off, then sleeps.
    PowerOff,
    /// Announces a reboot and resets.
    Reboot,
    /// Resets without a word.
    Reset,
    /// Exits, which PID 1 must not.
    Panic,
    /// Announces a reboot, then panics instead.
    AnnounceThenPanic,
    /// Sleeps.
    Idle,
    /// Computes for ever.
    Spin,
    /// Writes [`Told`] to the serial port, then powers off.
    Tell,
    /// Announces itself and nonsense, a thousand times each, then powers off.
    Chatter,
    /// Waits until it has [`GROWN`] bytes of memory, writes to [`TOUCHED`] bytes of it, lets go of
    /// them, announces nonsense and sleeps.
    Grow,
}

/// See [`Act::Grow`].
pub const GROWN: u32 = 320 << 20;
/// See [`Act::Grow`].
pub const TOUCHED: u32 = 64 << 20;

/// What a guest says of itself: sched_getaffinity(2)'s mask, then sysinfo(2)'s structure.
#[derive(Debug)]
pub struct Told {
    pub processors: u32,
    pub memory: u64,
}

impl Told {
    const SIZE: usize = 256;
    const SYSINFO: usize = 128;

    /// From the end of a serial console's output.
    pub fn read(console: &[u8]) -> Option<Told> {
        let bytes = &console[console.len().checked_sub(Told::SIZE)?..];
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        Some(Told {
            processors: word(0).count_ones(),
            memory: word(Told::SYSINFO + 32),
        })
    }
}

/// x86-64 instructions, a line each.
struct Code(Vec<u8>);

impl Code {
    fn bytes(mut self, bytes: &[u8]) -> Code {
        self.0.extend(bytes);
        self
    }

    /// `syscall` with up to four arguments.
    fn syscall(mut self, number: u32, arguments: &[u32]) -> Code {
        // mov edi / esi / edx, imm32; mov r10d, imm32
        const REGISTERS: [&[u8]; 4] = [&[0xbf], &[0xbe], &[0xba], &[0x41, 0xba]];
        for (register, argument) in REGISTERS.iter().zip(arguments) {
            self.0.extend(*register);
            self.0.extend(argument.to_le_bytes());
        }
        self.0.push(0xb8);
        self.0.extend(number.to_le_bytes());
        self.bytes(&[0x0f, 0x05])
    }

    /// `mov dx, port; mov al, byte; out dx, al`
    fn announce(mut self, byte: u8) -> Code {
        self.0.extend([0x66, 0xba]);
        self.0.extend(ANNOUNCE_PORT.to_le_bytes());
        self.bytes(&[0xb0, byte, 0xee])
    }

    fn reset(self) -> Code {
        // LINUX_REBOOT_MAGIC1, MAGIC2, CMD_RESTART
        self.syscall(
            libc::SYS_reboot as u32,
            &[0xfee1_dead, 672_274_793, 0x0123_4567],
        )
    }

    fn sleep(self) -> Code {
        // pause(); jmp to it
        self.syscall(libc::SYS_pause as u32, &[])
            .bytes(&[0xeb, 0xf7])
    }
}

/// An initramfs whose /init does `act`.
pub fn initramfs(act: Act) -> Vec<u8> {
    let port = u32::from(ANNOUNCE_PORT);
    let code = Code(Vec::new())
        .syscall(libc::SYS_ioperm as u32, &[port, 1, 1])
        .announce(announce::INIT);
    let code = match act {
        Act::PowerOff => code.announce(announce::POWER_OFF).sleep(),
        Act::Reboot => code.announce(announce::REBOOT).reset().sleep(),
        Act::Reset => code.reset().sleep(),
        Act::Panic => code.syscall(libc::SYS_exit as u32, &[7]),
        Act::AnnounceThenPanic => code
            .announce(announce::REBOOT)
            .syscall(libc::SYS_exit as u32, &[7]),
        Act::Idle => code.sleep(),
        Act::Spin => code.bytes(&[0xeb, 0xfe]),
        Act::Tell => code
            .syscall(libc::SYS_ioperm as u32, &[SERIAL_PORT, 8, 1])
            // sub rsp, 512; lea rdi, [rsp + 128]
            .bytes(&[0x48, 0x81, 0xec, 0, 2, 0, 0])
            .bytes(&[0x48, 0x8d, 0xbc, 0x24, 0x80, 0, 0, 0])
            .syscall(libc::SYS_sysinfo as u32, &[])
            // xor edi, edi; mov esi, 128; mov rdx, rsp
            .bytes(&[0x31, 0xff, 0xbe, 0x80, 0, 0, 0, 0x48, 0x89, 0xe2])
            .syscall(libc::SYS_sched_getaffinity as u32, &[])
            // mov rsi, rsp; mov ecx, 256; mov dx, 0x3f8; rep outsb
            .bytes(&[0x48, 0x89, 0xe6, 0xb9, 0, 1, 0, 0])
            .bytes(&[0x66, 0xba, 0xf8, 0x03, 0xf3, 0x6e])
            .announce(announce::POWER_OFF)
            .sleep(),
        Act::Grow => code
            // sub rsp, 256; 1: mov rdi, rsp
            .bytes(&[0x48, 0x81, 0xec, 0, 1, 0, 0, 0x48, 0x89, 0xe7])
            .syscall(libc::SYS_sysinfo as u32, &[])
            // cmp qword ptr [rsp + 32], GROWN
            .bytes(&[0x48, 0x81, 0x7c, 0x24, 32])
            .bytes(&GROWN.to_le_bytes())
            // jae 2f; (sched_yield) mov eax, 24; syscall; jmp 1b; 2:
            .bytes(&[0x73, 9, 0xb8, 24, 0, 0, 0, 0x0f, 0x05, 0xeb, 0xe2])
            // mov r8d, -1; xor r9d, r9d
            .bytes(&[0x41, 0xb8, 0xff, 0xff, 0xff, 0xff, 0x45, 0x31, 0xc9])
            .syscall(
                libc::SYS_mmap as u32,
                &[
                    0,
                    TOUCHED,
                    (libc::PROT_READ | libc::PROT_WRITE) as u32,
                    (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE) as u32,
                ],
            )
            // mov rdi, rax; mov esi, TOUCHED; mov eax, munmap; syscall
            .bytes(&[0x48, 0x89, 0xc7, 0xbe])
            .bytes(&TOUCHED.to_le_bytes())
            .bytes(&[0xb8, libc::SYS_munmap as u8, 0, 0, 0, 0x0f, 0x05])
            .announce(0xee)
            .sleep(),
        Act::Chatter => {
            let mut code = code;
            for _ in 0..1000 {
                code = code.announce(announce::INIT).announce(0xee);
            }
            code.announce(announce::POWER_OFF).sleep()
        }
    };
    cpio(&[("init", 0o100_755, &elf(&code.0))])
}

/// An initramfs with a whole program as its /init. Rust's start-up code wants /dev/null where there
/// is no console.
pub fn initramfs_with(program: &[u8]) -> Vec<u8> {
    cpio(&[
        ("dev", 0o040_755, b""),
        ("dev/null", NULL, b""),
        ("init", 0o100_755, program),
    ])
}

/// Mode of the only device in an archive.
const NULL: u32 = 0o020_666;

/// A static executable of one segment, to be run by Linux.
fn elf(code: &[u8]) -> Vec<u8> {
    elf_at(0x40_0000 + ELF_HEADERS, code)
}

/// Bytes before the code of [`elf_at`].
const ELF_HEADERS: u64 = 64 + 56;

/// The same, whose code is at this address, behind the headers.
pub fn elf_at(entry: u64, code: &[u8]) -> Vec<u8> {
    let address = entry - ELF_HEADERS;
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    for half in [2_u16, 62] {
        file.extend(half.to_le_bytes());
    }
    file.extend(1_u32.to_le_bytes());
    for word in [entry, 64, 0] {
        file.extend(word.to_le_bytes());
    }
    file.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, 1, 64, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    for word in [1_u32, 5] {
        file.extend(word.to_le_bytes());
    }
    let size = ELF_HEADERS + code.len() as u64;
    for word in [0, address, address, size, size, 4096] {
        file.extend(word.to_le_bytes());
    }
    file.extend(code);
    file
}

/// An archive in the "newc" format (Documentation/driver-api/early-userspace/buffer-format.rst).
fn cpio(files: &[(&str, u32, &[u8])]) -> Vec<u8> {
    let mut archive = Vec::new();
    let trailer: (&str, u32, &[u8]) = ("TRAILER!!!", 0, &[]);
    for (inode, (name, mode, content)) in files.iter().chain([&trailer]).enumerate() {
        archive.extend(b"070701");
        let size = content.len() as u32;
        let name_size = name.len() as u32 + 1;
        let (major, minor) = if *mode == NULL { (1, 3) } else { (0, 0) };
        for field in [
            inode as u32,
            *mode,
            0,
            0,
            1,
            0,
            size,
            0,
            0,
            major,
            minor,
            name_size,
            0,
        ] {
            archive.extend(format!("{field:08x}").bytes());
        }
        archive.extend(name.bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend(*content);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    archive
}
