//! Where a session begins and what its messages can be.

use super::*;

#[test]
fn init_again_starts_over_and_other_versions_are_answered() {
    let mut guest = Guest::new();
    fs::write(guest.host("f"), "").unwrap();
    let entry = guest.lookup(ROOT_ID, "f").unwrap();
    guest.open(entry.nodeid, 0).unwrap();
    let newer = InitIn {
        major: 8,
        minor: 0,
        ..Default::default()
    };
    assert_eq!(
        guest
            .call::<InitOut>(Opcode::Init as u32, 0, &[newer.as_slice()])
            .unwrap()
            .major,
        7
    );
    let older = InitIn {
        major: 7,
        minor: 12,
        ..Default::default()
    };
    assert!(
        guest
            .call::<InitOut>(Opcode::Init as u32, 0, &[older.as_slice()])
            .is_err()
    );
    let same = InitIn {
        major: 7,
        minor: 45,
        ..Default::default()
    };
    guest
        .call::<InitOut>(Opcode::Init as u32, 0, &[same.as_slice()])
        .unwrap();
    let stats = guest.engine.stats();
    assert_eq!((stats.inodes, stats.handles), (1, 0));
    assert_eq!(guest.open(entry.nodeid, 0), Err(Errno::ESTALE));
}
