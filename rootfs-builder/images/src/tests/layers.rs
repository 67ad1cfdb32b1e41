//! One layer: what it may do beneath its root, and nowhere else.

use super::*;

/// What no maker of images may reach, and whoever unpacks one must find untouched.
#[test]
fn no_entry_leaves_the_root() {
    let outside = tempfile::tempdir().unwrap();
    let victim = outside.path().join("victim");
    fs::write(&victim, "untouched").unwrap();
    let outside = outside.path().to_str().unwrap();
    let up = "../../../../../../../../../..".to_owned() + outside;
    let attacks: &[&[Line<'_>]] = &[
        &[(FILE, "../victim", "evil", 0o644)],
        &[(FILE, &format!("{up}/victim"), "evil", 0o644)],
        &[
            (LINK, "l", outside, 0o777),
            (FILE, "l/victim", "evil", 0o644),
        ],
        &[(LINK, "l", &up, 0o777), (FILE, "l/victim", "evil", 0o644)],
        &[(LINK, "l", outside, 0o777), (FILE, "l/.wh.victim", "", 0)],
        &[(LINK, "l", outside, 0o777), (FILE, "l/.wh..wh..opq", "", 0)],
        &[(LINK, "l", outside, 0o777), (FILE, ".wh.l", "", 0)],
        &[
            (LINK, "l", &format!("{outside}/victim"), 0o777),
            (FILE, "l", "evil", 0o644),
        ],
        &[(LINK, "l", outside, 0o777), (DIRECTORY, "l", "", 0o777)],
        &[
            (HARD, "l", &format!("{up}/victim"), 0),
            (FILE, "l", "evil", 0o644),
        ],
        &[(LINK, "d", outside, 0o777), (HARD, "l", "d/victim", 0)],
        &[
            (LINK, "a", "b", 0o777),
            (LINK, "b", "a", 0o777),
            (FILE, "a/x", "evil", 0o644),
        ],
        &[(FILE, ".wh.", "", 0)],
        &[(FILE, ".wh...", "", 0)],
        &[
            (LINK, "p", "/proc/self/root", 0o777),
            (FILE, "p/victim", "evil", 0o644),
        ],
        &[
            (LINK, "p", "/proc/self/cwd", 0o777),
            (FILE, "p/victim", "evil", 0o644),
        ],
    ];
    for attack in attacks {
        let dir = tempfile::tempdir().unwrap();
        // A refusal is as good as something made within.
        let _ = Root::at(dir.path())
            .unwrap()
            .apply(1, layer(attack).as_slice());
        assert_eq!(text(&victim), "untouched", "{attack:?}");
        let data = victim.metadata().unwrap();
        assert_eq!(
            (data.nlink(), data.permissions().mode() & 0o777),
            (1, 0o644),
            "{attack:?}"
        );
        assert_eq!(fs::read_dir(outside).unwrap().count(), 1, "{attack:?}");
        // Nor what is above the root.
        let beside = dir.path().parent().unwrap().join("victim");
        assert!(!beside.exists(), "{attack:?}");
    }
}

#[test]
fn owners_nodes_and_attributes_are_the_images() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("NOT RUN: owners_nodes_and_attributes_are_the_images needs root");
        return;
    }
    let mut archive = tar::Builder::new(Vec::new());
    let mut header = Header::new_ustar();
    header.set_path("ping").unwrap();
    header.set_size(0);
    header.set_uid(7);
    header.set_gid(8);
    header.set_mode(0o6755);
    header.set_mtime(0);
    header.set_cksum();
    // VFS_CAP_REVISION_2, CAP_NET_RAW.
    let capability = [1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let extensions: [(&str, &[u8]); 3] = [
        ("SCHILY.xattr.security.capability", &capability),
        ("SCHILY.xattr.user.note", b"a note"),
        ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
    ];
    archive.append_pax_extensions(extensions).unwrap();
    archive.append(&header, &[][..]).unwrap();
    for (kind, path) in [(EntryType::Fifo, "pipe"), (EntryType::Char, "null")] {
        let mut header = Header::new_ustar();
        header.set_entry_type(kind);
        header.set_path(path).unwrap();
        header.set_size(0);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_mode(0o620);
        header.set_device_major(1).unwrap();
        header.set_device_minor(3).unwrap();
        header.set_cksum();
        archive.append(&header, &[][..]).unwrap();
    }
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let root = Root::at(dir.path()).unwrap();
    root.apply(1, archive.into_inner().unwrap().as_slice())
        .unwrap();
    let data = dir.path().join("ping").metadata().unwrap();
    assert_eq!(
        (data.uid(), data.gid(), data.mode() & 0o7777),
        (7, 8, 0o6755)
    );
    let listed = std::process::Command::new("getfattr");
    let listed = { listed }
        .args(["-d", "-m", "-", "ping"])
        .current_dir(dir.path())
        .output();
    if let Ok(listed) = listed {
        let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
        assert!(listed.contains("user.note=\"a note\""), "{listed}");
        assert!(listed.contains("security.capability="), "{listed}");
        assert!(!listed.contains("trusted.overlay"), "{listed}");
    }
    let data = dir.path().join("null").metadata().unwrap();
    assert!(data.file_type().is_char_device());
    assert_eq!(
        (data.rdev(), data.mode() & 0o7777),
        (nix::sys::stat::makedev(1, 3), 0o620)
    );
    assert!(
        dir.path()
            .join("pipe")
            .metadata()
            .unwrap()
            .file_type()
            .is_fifo()
    );
}

/// A PAX record.
fn record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let length = (rest..)
        .find(|length| rest + length.to_string().len() == *length)
        .unwrap();
    [format!("{length} {key}=").as_bytes(), value, b"\n"].concat()
}

/// A layer with a description and an entry.
fn described(kind: EntryType, text: &[u8], next: &Line<'_>) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_size(text.len() as u64);
    header.set_cksum();
    archive.append(&header, text).unwrap();
    let mut bytes = archive.into_inner().unwrap();
    bytes.truncate(bytes.len() - 1024);
    bytes.extend(layer(&[*next]));
    bytes
}

#[test]
fn descriptions_of_entries_are_read_as_they_are_meant_and_with_a_limit() {
    let applied = |bytes: &[u8]| {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let done = Root::at(dir.path()).unwrap().apply(1, bytes);
        done.map(|_| dir).map_err(|error| {
            let why = std::error::Error::source(&error).map(ToString::to_string);
            format!("{error}: {}", why.unwrap_or_default())
        })
    };
    let entry = (FILE, "short", "text", 0o644);
    // A newline is a part of a value, and a record within another's value is none.
    let records = [
        record("comment", b"x\n9 path=b\n"),
        record("path", b"a\nb"),
        record("mtime", b"-1.5"),
    ];
    let dir = applied(&described(EntryType::XHeader, &records.concat(), &entry)).unwrap();
    let data = dir.path().join("a\nb").metadata().unwrap();
    assert_eq!(data.mtime(), -2);
    let long = "d/".repeat(90) + "file";
    for (kind, bytes) in [
        (EntryType::GNULongName, [long.as_bytes(), b"\0"].concat()),
        (EntryType::XHeader, record("path", long.as_bytes())),
    ] {
        let dir = applied(&described(kind, &bytes, &entry)).unwrap();
        assert_eq!(text(dir.path().join(&long)), "text");
    }
    let whole = vec![b'x'; (1 << 20) + 1];
    for (kind, text, why) in [
        (EntryType::GNULongName, whole.clone(), "more than"),
        (EntryType::XHeader, whole, "more than"),
        (EntryType::XHeader, b"7 a=b".to_vec(), "damaged"),
        (EntryType::XHeader, record("uid", b"4294967295"), "uid"),
        (EntryType::XHeader, record("uid", b"x"), "no number"),
        (
            EntryType::XHeader,
            record("GNU.sparse.major", b"1"),
            "sparse",
        ),
        (EntryType::XHeader, record("size", b"9000000000"), "8 GiB"),
    ] {
        let error = applied(&described(kind, &text, &entry)).unwrap_err();
        assert!(error.contains(why), "{why}: {error}");
    }
    // Of before 1988.
    let dir = applied(&layer(&[(EntryType::new(0), "old/", "", 0o755)])).unwrap();
    assert!(dir.path().join("old").is_dir());
}

#[test]
fn what_is_opaque_hides_at_every_depth() {
    let dir = tempfile::tempdir().unwrap();
    let root = Root::at(dir.path()).unwrap();
    let lower = layer(&[
        (FILE, "o/d/secret", "x", 0o644),
        (FILE, "o/e/secret", "x", 0o644),
    ]);
    let upper = layer(&[
        (FILE, "o/d/new", "x", 0o644),
        (FILE, "o/.wh..wh..opq", "", 0),
    ]);
    root.apply(1, lower.as_slice()).unwrap();
    root.apply(2, upper.as_slice()).unwrap();
    let there = |name: &str| dir.path().join(name).exists();
    assert!(there("o/d/new") && !there("o/d/secret") && !there("o/e"));
}

#[test]
fn a_tree_of_any_depth_is_removed() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let top = dir.path().join("top");
    fs::create_dir(&top).unwrap();
    // Deeper than a path may be long, and than a process has descriptors.
    let mut at = nix::fcntl::open(
        &top,
        nix::fcntl::OFlag::O_RDONLY,
        nix::sys::stat::Mode::empty(),
    )
    .unwrap();
    for _ in 0..3000 {
        let mode = nix::sys::stat::Mode::S_IRWXU;
        for name in ["d", "f"] {
            nix::sys::stat::mkdirat(&at, name, mode).unwrap();
        }
        at = nix::fcntl::openat(&at, "d", nix::fcntl::OFlag::O_RDONLY, mode).unwrap();
    }
    symlink("/", top.join("link")).unwrap();
    tree::remove(&top).unwrap();
    assert!(!top.exists() && Path::new("/usr").exists());
    tree::remove(&top).unwrap();
}

/// Any bytes are a layer or an error, and touch nothing else.
#[test]
fn fuzz_image_layer() {
    bulkhead_fuzz::run("image_layer", |bytes| {
        let dir = tempfile::tempdir().unwrap();
        let inside = dir.path().join("root");
        fs::create_dir(&inside).unwrap();
        fs::write(dir.path().join("beside"), "untouched").unwrap();
        if let Ok(from) = unpacked(bytes) {
            let limited = from.take(1 << 20);
            let _ = Root::at(&inside).unwrap().apply(1, limited);
        }
        assert_eq!(text(dir.path().join("beside")), "untouched");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    });
}
