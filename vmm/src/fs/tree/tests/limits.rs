//! What a guest may hold, and that it is let go.

use super::*;

#[test]
fn the_caps_hold_and_nothing_is_made_past_them() {
    let mut guest = Guest::with_limits(Limits {
        inodes: 5,
        handles: 3,
    });
    let mkdir = MkdirIn {
        mode: 0o755,
        umask: 0,
    };
    for number in 0..5 {
        let name = format!("d{number}\0");
        guest
            .call::<EntryOut>(
                Opcode::Mkdir as u32,
                ROOT_ID,
                &[mkdir.as_slice(), name.as_bytes()],
            )
            .unwrap();
    }
    let past = guest.call::<EntryOut>(
        Opcode::Mkdir as u32,
        ROOT_ID,
        &[mkdir.as_slice(), b"past\0"],
    );
    assert_eq!(past.err(), Some(Errno::ENFILE));
    assert!(!guest.host("past").exists());
    let create = CreateIn {
        flags: 0,
        mode: 0o600,
        ..Default::default()
    };
    assert_eq!(
        guest.bytes(
            Opcode::Create as u32,
            ROOT_ID,
            &[create.as_slice(), b"past\0"],
            &[]
        ),
        Err(Errno::ENFILE)
    );
    assert!(!guest.host("past").exists());
    let opendir =
        |guest: &mut Guest| guest.call::<OpenOut>(Opcode::Opendir as u32, ROOT_ID, &[&[0; 8]]);
    for _ in 0..3 {
        opendir(&mut guest).unwrap();
    }
    assert_eq!(opendir(&mut guest).err(), Some(Errno::ENFILE));
}

#[test]
fn no_descriptor_is_left_behind() {
    let count = || -> io::Result<usize> {
        let own = File::open("/proc/thread-self/fd")?;
        let dir = format!("/proc/self/fd/{}", own.as_raw_fd());
        Ok(fs::read_dir(dir)?
            .filter(|e| {
                let link = e.as_ref().ok().and_then(|e| fs::read_link(e.path()).ok());
                link.is_some_and(|link| link.to_string_lossy().contains("left-behind"))
            })
            .count())
    };
    let mut guest = Guest::new();
    for number in 0..50 {
        fs::write(guest.host(&format!("left-behind-{number}")), "").unwrap();
        let entry = guest
            .lookup(ROOT_ID, &format!("left-behind-{number}"))
            .unwrap();
        guest.open(entry.nodeid, 0).unwrap();
    }
    assert_eq!(count().unwrap(), 100);
    guest.bytes(Opcode::Destroy as u32, 0, &[], &[]).unwrap();
    assert_eq!(count().unwrap(), 0);
}
