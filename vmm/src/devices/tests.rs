//! The devices at ports and the interrupt controller, told anything at any width.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use nix::fcntl::OFlag;
use vmm_sys_util::eventfd::EventFd;

use super::announce::AnnouncePort;
use super::clock::{self, ClockPort};
use super::ioapic::{Ioapic, Message, Router};
use super::serial::SerialConsole;
use crate::bus::{Bus, BusDevice};
use crate::irq::IrqFd;

/// Routes that are asked for; no more pins than there are.
struct Counted(Arc<AtomicUsize>);

impl Router for Counted {
    fn set_routes(&mut self, messages: &[Option<Message>]) {
        assert_eq!(messages.len(), 4);
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

fn console() -> (OwnedFd, SerialConsole) {
    let (reader, writer) = nix::unistd::pipe2(OFlag::O_NONBLOCK).unwrap();
    let line = IrqFd::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
    (reader, SerialConsole::new(File::from(writer), line))
}

/// A device at the base of its range, and how long the range is.
type Place = (u64, u64, Arc<Mutex<dyn BusDevice>>);

fn places() -> (OwnedFd, Vec<Place>) {
    let (reader, console) = console();
    let heard = AnnouncePort::new(Arc::new(|_| {}));
    let ioapic = Ioapic::new(1, 4, Counted(Arc::default()));
    let places: Vec<Place> = vec![
        (0x3f8, 8, Arc::new(Mutex::new(console))),
        (0x8900, 1, Arc::new(Mutex::new(heard))),
        (0x8904, clock::SIZE, Arc::new(Mutex::new(ClockPort))),
        (0xfec0_0000, 0x1000, Arc::new(Mutex::new(ioapic))),
    ];
    (reader, places)
}

#[test]
fn every_offset_width_and_value() {
    let (_reader, places) = places();
    let mut bus = Bus::default();
    for (base, length, device) in places.clone() {
        bus.insert(base, length, device).unwrap();
    }
    for (base, length, _) in places {
        for address in base - 8..base + length + 8 {
            for width in 0..=8 {
                let mut inside = false;
                for value in [0, 1, 0x10, u64::MAX, 0x0123_4567_89ab_cdef] {
                    let bytes = &value.to_le_bytes()[..width];
                    inside = bus.write(address, bytes);
                    let mut data = vec![0xee; width];
                    assert_eq!(bus.read(address, &mut data), inside);
                    assert!(inside || data.iter().all(|&byte| byte == 0), "{address:#x}");
                }
                let end = address + width as u64;
                let fits = address >= base && end <= base + length;
                assert!(
                    inside == fits || address < 0xf000,
                    "{width} at {address:#x}"
                );
            }
        }
    }
}

/// CVE-2020-27174's class: a console that keeps what it is fed. Ours has no input but what a guest
/// sends itself in the loop mode.
#[test]
fn cve_2020_27174_a_console_in_loop_mode_keeps_no_more_than_its_fifo() {
    let (reader, mut console) = console();
    const LOOP: [u8; 1] = [0x10];
    const READY: u8 = 1;
    console.write(4, &LOOP);
    for nth in 0..1 << 20 {
        console.write(0, &[nth as u8]);
    }
    let mut kept = 0;
    loop {
        let mut status = [0];
        console.read(5, &mut status);
        if status[0] & READY == 0 {
            break;
        }
        console.read(0, &mut [0]);
        kept += 1;
        assert!(kept <= 64, "it keeps what it is fed");
    }
    // It is a console again, and nothing of that came out.
    console.write(4, &[0]);
    console.write(0, b"x");
    let mut out = Vec::new();
    let _ = File::from(reader).read_to_end(&mut out);
    assert_eq!(out, b"x");
}

/// Interrupt routes cost the host a look at every vCPU: only what changes one asks for it.
#[test]
fn a_storm_of_the_same_entry_asks_once_for_routes() {
    let asked = Arc::new(AtomicUsize::new(0));
    let mut ioapic = Ioapic::new(1, 4, Counted(asked.clone()));
    for nth in 0..100_000_u32 {
        ioapic.write(0, &(nth % 256).to_le_bytes());
        ioapic.write(0x10, &0_u32.to_le_bytes());
    }
    assert_eq!(asked.load(Ordering::SeqCst), 4, "each pin is unmasked once");
}
