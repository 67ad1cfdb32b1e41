//! Requests as they lie in a guest's memory, cut up and described by descriptors of any kind.

use std::fs;
use std::os::fd::OwnedFd;

use bulkhead_fuzz::{Unstructured, arbitrary};
use bulkhead_vmm_config::CachePolicy;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::*;
use crate::fs::transport::lent::tests::memory;
use crate::fs::tree::Limits;
use crate::fs::wire::{InHeader, InitIn, Opcode};

const RAM: u64 = 1 << 20;
const SIZE: u16 = 64;
const TABLE: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const INDIRECT: u64 = 0x4000;
const REQUESTS: u64 = 0x8_0000;
const REPLIES: u64 = 0xc_0000;
/// No descriptor names it.
const CANARY: u64 = 0xf_0000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT_FLAG: u16 = 4;

/// A request's bytes: its header, and arguments that begin with a small number or a name.
fn request(input: &mut Unstructured<'_>) -> arbitrary::Result<Vec<u8>> {
    let mut args = Vec::new();
    for _ in 0..input.arbitrary::<u8>()? % 12 {
        match input.arbitrary::<u8>()? {
            byte @ 0..=0x9f => args.extend(u64::from(byte % 8).to_ne_bytes()),
            0xa0..=0xcf => args.extend(b"f\0"),
            0xd0..=0xdf => args.extend(b"../canary\0"),
            _ => args.extend(input.arbitrary::<u64>()?.to_ne_bytes()),
        }
    }
    let header = InHeader {
        len: (HEADER + args.len()) as u32,
        opcode: u32::from(input.arbitrary::<u8>()?) % 54,
        unique: 1,
        nodeid: u64::from(input.arbitrary::<u8>()? % 4),
        ..InHeader::default()
    };
    // What fills the host's disk, or waits for it, is no part of this.
    let too_much = [Opcode::Fallocate as u32, Opcode::CopyFileRange as u32, 50];
    if too_much.contains(&header.opcode) {
        return Err(arbitrary::Error::IncorrectFormat);
    }
    Ok([header.as_slice(), &args].concat())
}

/// Describes a chain: the request in pieces, then room for the reply; some of it wrong.
fn chain(memory: &GuestMemory, first: u16, input: &mut Unstructured<'_>) -> arbitrary::Result<u16> {
    let bytes = request(input)?;
    let base = REQUESTS + u64::from(first) * 0x400;
    memory.write_slice(&bytes, GuestAddress(base)).unwrap();
    let mut pieces: Vec<(u64, u32, u16)> = Vec::new();
    let mut at = 0;
    while at < bytes.len() && pieces.len() < 6 {
        let length = match input.arbitrary::<u8>()? {
            0 => 0,
            byte => usize::from(byte).min(bytes.len() - at),
        };
        pieces.push((base + at as u64, length as u32, 0));
        at += length;
    }
    for _ in 0..input.arbitrary::<u8>()? % 4 {
        let place = REPLIES + u64::from(input.arbitrary::<u16>()?);
        pieces.push((place, input.arbitrary::<u16>()?.into(), WRITE));
    }
    if input.arbitrary::<u8>()? < 32 {
        // Past RAM, into the rings, or of the wrong direction.
        let address = *input.choose(&[RAM - 8, RAM, USED, u64::MAX - 7, REPLIES])?;
        let flags = u16::from(input.arbitrary::<u8>()? % 4) & WRITE;
        let length = match input.arbitrary::<u8>()? {
            byte @ 0..=0x7f => byte.into(),
            _ => input.arbitrary::<u32>()?,
        };
        if !(address..address.saturating_add(length.into())).contains(&CANARY) {
            pieces.push((address, length, flags));
        }
    }
    let indirect = input.arbitrary::<u8>()? % 4 == 0;
    let table = if indirect {
        INDIRECT
    } else {
        TABLE + 16 * u64::from(first)
    };
    let wrong_next = input.arbitrary::<u8>()? == 0;
    for (nth, &(address, length, flags)) in (0_u16..).zip(&pieces) {
        let last = usize::from(nth) + 1 == pieces.len();
        let index = if indirect { nth + 1 } else { first + nth + 1 };
        let next = if wrong_next {
            input.arbitrary()?
        } else {
            index
        };
        let flags = if last && !wrong_next {
            flags
        } else {
            flags | NEXT
        };
        let descriptor = Descriptor::new(address, length, flags, next);
        let place = GuestAddress(table + 16 * u64::from(nth));
        memory.write_obj(descriptor, place).unwrap();
    }
    if indirect {
        let length = 16 * pieces.len() as u32 + u32::from(input.arbitrary::<u8>()? % 17);
        let descriptor = Descriptor::new(INDIRECT, length, INDIRECT_FLAG, 0);
        let place = GuestAddress(TABLE + 16 * u64::from(first));
        memory.write_obj(descriptor, place).unwrap();
    }
    Ok(first)
}

fn ring(data: &[u8]) {
    let dir = tempfile::tempdir().unwrap();
    let canary = dir.path().join("canary");
    fs::write(&canary, "untouched").unwrap();
    fs::create_dir(dir.path().join("share")).unwrap();
    fs::write(dir.path().join("share/f"), "text").unwrap();
    let root = OwnedFd::from(File::open(dir.path().join("share")).unwrap());
    let cache = CachePolicy {
        entry_ms: 0,
        attr_ms: 0,
        keep_data: false,
    };
    let limits = Limits {
        inodes: 100,
        handles: 100,
    };
    let engine = Engine::new(root, cache, limits).unwrap();
    let mut worker = Worker::new().expect("tests of the file system need root");
    let memory = memory(&[(0, RAM as usize)]);
    memory
        .write_slice(&[0xc5; 256], GuestAddress(CANARY))
        .unwrap();
    let mut queue = Queue::new(SIZE).unwrap();
    queue
        .try_set_desc_table_address(GuestAddress(TABLE))
        .unwrap();
    queue
        .try_set_avail_ring_address(GuestAddress(AVAILABLE))
        .unwrap();
    queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
    queue.set_ready(true);
    let mut buffers = Buffers::new(&memory);
    let init = InitIn {
        major: 7,
        minor: 38,
        ..InitIn::default()
    };
    let header = InHeader {
        len: (HEADER + size_of::<InitIn>()) as u32,
        opcode: Opcode::Init as u32,
        ..InHeader::default()
    };
    let greeting = [header.as_slice(), init.as_slice()].concat();
    memory
        .write_slice(&greeting, GuestAddress(REQUESTS))
        .unwrap();
    let read = Descriptor::new(REQUESTS, greeting.len() as u32, NEXT, 1);
    let write = Descriptor::new(REPLIES, 4096, WRITE, 0);
    memory.write_obj(read, GuestAddress(TABLE)).unwrap();
    memory.write_obj(write, GuestAddress(TABLE + 16)).unwrap();
    let mut input = Unstructured::new(data);
    let mut available: u16 = 0;
    let mut head = Ok(0);
    while let Ok(first) = head {
        let slot = GuestAddress(AVAILABLE + 4 + 2 * u64::from(available % SIZE));
        memory.write_obj::<u16>(first, slot).unwrap();
        available += 1;
        memory
            .write_obj(available, GuestAddress(AVAILABLE + 2))
            .unwrap();
        while let Some(chain) = queue.pop_descriptor_chain(&memory) {
            let head = chain.head_index();
            let used = buffers.serve(chain, &engine, &mut worker);
            assert!(used as usize <= buffers.writable.total(), "{used}");
            queue.add_used(&memory, head, used).unwrap();
        }
        if input.is_empty() || available > 60 {
            break;
        }
        head = chain(&memory, (available * 12) % 48, &mut input);
    }
    let mut bytes = [0; 256];
    memory.read_slice(&mut bytes, GuestAddress(CANARY)).unwrap();
    assert_eq!(bytes, [0xc5; 256]);
    assert_eq!(fs::read(&canary).unwrap(), b"untouched");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
}

#[test]
fn fuzz_fs_ring() {
    bulkhead_fuzz::run("fs_ring", ring);
}
