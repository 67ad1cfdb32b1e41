//! Whatever a guest and the host's programs do.

use std::collections::HashMap;

use bulkhead_fuzz::{Unstructured, arbitrary};

use super::super::super::fuzz::Hostile;
use super::*;

/// Nearly right, or it would be refused at once.
fn header(input: &mut Unstructured<'_>) -> arbitrary::Result<Header> {
    let mut word = |usual: u32| -> arbitrary::Result<u32> {
        Ok(match input.arbitrary::<u8>()? {
            0xf8..=0xff => input.arbitrary()?,
            0xf0..=0xf7 => usual.wrapping_add(1),
            _ => usual,
        })
    };
    let (src, dst) = (word(GUEST_CID as u32)?, word(HOST_CID as u32)?);
    let kind = word(TYPE_STREAM.into())? as u16;
    let mut number = || -> arbitrary::Result<u32> {
        Ok(match input.arbitrary::<u8>()? {
            0xe0..=0xff => input.arbitrary()?,
            small => u32::from(small) * 8,
        })
    };
    let (len, buf_alloc, fwd_cnt) = (number()? / 8, number()?, number()?);
    Ok(Header {
        src_cid: src.into(),
        dst_cid: dst.into(),
        src_port: u32::from(input.arbitrary::<u8>()? % 3),
        dst_port: u32::from(input.arbitrary::<u8>()? % 4),
        len,
        kind,
        op: u16::from(input.arbitrary::<u8>()? % 9),
        flags: u32::from(input.arbitrary::<u8>()? % 4),
        buf_alloc,
        fwd_cnt,
    })
}

fn step(
    guest: &mut Guest,
    hosts: &mut HashMap<u32, UnixStream>,
    input: &mut Unstructured<'_>,
) -> arbitrary::Result<()> {
    let kind: u8 = input.arbitrary()?;
    if kind % 16 < 6 {
        let header = header(input)?;
        // Mostly as many bytes as the header says.
        let bytes = match input.arbitrary::<u8>()? {
            short @ 0xe0..=0xff => usize::from(short & 0x1f),
            _ => header.len.min(4096) as usize,
        };
        guest.send_raw(&header, &vec![7; bytes]);
        return Ok(());
    }
    let port = u32::from(input.arbitrary::<u8>()? % 4);
    match kind % 16 {
        6..=8 => {
            let (ours, theirs) = UnixStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            if guest.ports.offer(port, theirs.into()).is_ok() {
                hosts.insert(port, ours);
            }
        }
        9 => drop(guest.ports.withdraw(port)),
        10 | 11 => {
            let count = usize::from(input.arbitrary::<u8>()?).pow(2) * 5;
            if let Some(host) = hosts.get_mut(&port) {
                let _ = host.write(&vec![9; count]);
            }
        }
        12 => {
            if let Some(host) = hosts.get_mut(&port) {
                let _ = host.read(&mut [0; 4096]);
            }
        }
        13 => drop(hosts.remove(&port)),
        14 => {
            for nth in 0..=u64::from(port) * 2 {
                let buffer = (HIGH_RAM + nth * RX_BUFFER, RX_BUFFER as u32, WRITE);
                guest.driver.queues[0].add(&[buffer]);
            }
            guest.driver.notify(RX.into());
        }
        _ => drop(guest.driver.queues[0].take_used()),
    }
    guest.events.settle();
    Ok(())
}

/// The device works after a reset, whatever came before.
fn revives(guest: &mut Guest) {
    guest.driver.start();
    guest.offer_buffers(8);
    for port in 0..4 {
        guest.ports.withdraw(port);
    }
    let mut host = guest.connect();
    guest.send_bytes(b"alive");
    assert_eq!(host_input(&mut host), (b"alive".to_vec(), false));
}

/// Packets of every kind, and hosts that offer, write, read and go.
fn packets(data: &[u8]) {
    let mut guest = Guest::without_buffers();
    let mut hosts = HashMap::new();
    let mut input = Unstructured::new(data);
    while !input.is_empty() && step(&mut guest, &mut hosts, &mut input).is_ok() {}
    assert!(guest.events.is_quiet());
    drop(hosts);
    revives(&mut guest);
}

/// Any rings, with a host that has something to say.
fn rings(data: &[u8]) {
    let mut guest = Guest::without_buffers();
    let mut host = guest.offer(PORT);
    host.write_all(b"input").unwrap();
    let request = guest.header(op::REQUEST);
    guest.put(&request, &[]);
    let mut input = Unstructured::new(data);
    let mut hostile = Hostile::new(&mut guest.driver, &mut input);
    while !hostile.input.is_empty() && hostile.step().is_ok() {
        guest.events.settle();
    }
    hostile.finish();
    assert!(guest.events.is_quiet());
    guest.ports.withdraw(PORT);
    revives(&mut guest);
}

#[test]
fn fuzz_vsock_packets() {
    bulkhead_fuzz::run("vsock_packets", packets);
}

#[test]
fn fuzz_vsock_rings() {
    bulkhead_fuzz::run("vsock_rings", rings);
}
