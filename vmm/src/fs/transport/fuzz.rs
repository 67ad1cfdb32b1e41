//! A VMM that a guest has taken, and what it says to the fs process.

use std::os::fd::{AsFd, AsRawFd, RawFd};

use bulkhead_fuzz::{Unstructured, arbitrary};
use linux::packet;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::*;

const RAM: u64 = 1 << 20;

/// A number that may be an address, a size or an index.
fn number(input: &mut Unstructured<'_>) -> arbitrary::Result<u64> {
    Ok(match input.arbitrary::<u8>()? {
        byte @ 0..=0x3f => byte.into(),
        byte @ 0x40..=0x9f => u64::from(byte & 0x1f) << 12,
        0xa0..=0xaf => RAM,
        0xb0..=0xbf => RAM - u64::from(input.arbitrary::<u8>()?),
        0xc0..=0xdf => 1 << (input.arbitrary::<u8>()? % 64),
        _ => input.arbitrary()?,
    })
}

/// A message as the front end writes it, mostly of the size that its kind has.
fn message(input: &mut Unstructured<'_>) -> arbitrary::Result<Vec<u8>> {
    // Numbers of the messages that the vhost crate knows, and a few that it does not.
    let request = u32::from(input.arbitrary::<u8>()?) % 46;
    let mut body = Vec::new();
    let words = match request {
        2 | 16 => 1,
        5 => {
            let regions = u32::from(input.arbitrary::<u8>()? % 4);
            body.extend(regions.to_ne_bytes());
            body.extend([0; 4]);
            4 * regions as usize
        }
        8 | 10 | 11 | 18 => 0,
        9 => 4,
        12..=14 => 1,
        _ => usize::from(input.arbitrary::<u8>()? % 8),
    };
    if matches!(request, 8..=11 | 18) {
        body.extend((u32::from(input.arbitrary::<u8>()? % 4)).to_ne_bytes());
        body.extend((number(input)? as u32).to_ne_bytes());
    }
    for _ in 0..words {
        body.extend(number(input)?.to_ne_bytes());
    }
    if matches!(request, 12..=14) {
        // The index, and whether there is no descriptor.
        body[0] %= 4;
        body[1] %= 2;
        body[2..].fill(0);
    }
    let size = match input.arbitrary::<u8>()? {
        0 => input.arbitrary()?,
        1 => body.len() as u32 + 1,
        _ => body.len() as u32,
    };
    let flags = match input.arbitrary::<u8>()? {
        0 => input.arbitrary()?,
        byte => 1 | u32::from(byte & 1) << 3,
    };
    let mut bytes = [request, flags, size].map(u32::to_ne_bytes).concat();
    bytes.extend(body);
    Ok(bytes)
}

/// Messages and descriptors. What the back end believes afterwards holds: its memory is the files',
/// and a queue that it would serve lies in it.
fn vhost_messages(data: &[u8]) {
    let ram = File::from(memfd_create(c"ram", MFdFlags::MFD_CLOEXEC).unwrap());
    ram.set_len(RAM).unwrap();
    let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).unwrap();
    let (front, back) = UnixStream::pair().unwrap();
    let backend = Backend {
        servers: Vec::new(),
        vrings: (0..3).map(|_| Vring::default()).collect(),
        memory: Arc::new(GuestMemory::new()),
        lending: Lending::new(None),
        mappings: Vec::new(),
        features: 0,
    };
    let backend = Arc::new(Mutex::new(backend));
    front.set_nonblocking(true).unwrap();
    let mut input = Unstructured::new(data);
    let mut say = || -> arbitrary::Result<()> {
        let bytes = message(&mut input)?;
        let given: Vec<RawFd> = match input.arbitrary::<u8>()? % 8 {
            0..=2 => vec![ram.as_raw_fd()],
            3 | 4 => vec![event.as_raw_fd()],
            5 => vec![ram.as_raw_fd(); 2],
            6 => vec![ram.as_raw_fd(), event.as_raw_fd(), ram.as_raw_fd()],
            _ => Vec::new(),
        };
        // A full socket ends the script; answers are not read.
        packet::send(front.as_fd(), &bytes, &given).map_err(|_| arbitrary::Error::EmptyChoose)
    };
    for _ in 0..64 {
        if say().is_err() {
            break;
        }
    }
    front.shutdown(std::net::Shutdown::Write).unwrap();
    let mut handler = BackendReqHandler::from_stream(back, backend.clone());
    while let Ok(()) | Err(Error::InvalidParam | Error::ReqHandlerError(_)) =
        handler.handle_request()
    {
        let backend = backend.lock().unwrap();
        for mapping in &backend.mappings {
            assert!(mapping.size <= RAM);
        }
        for vring in &backend.vrings {
            assert!(vring.size == 0 || vring.size.is_power_of_two());
            assert!(vring.size <= MAX_QUEUE_SIZE);
            if vring.size != 0
                && let Ok(queue) = vring.queue(&backend.memory, true)
            {
                assert!(queue.is_valid(&*backend.memory));
            }
        }
    }
}

#[test]
fn fuzz_vhost_messages() {
    bulkhead_fuzz::run("vhost_messages", vhost_messages);
}
