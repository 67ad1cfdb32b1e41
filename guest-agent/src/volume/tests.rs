use std::os::unix::fs::{MetadataExt, symlink};

use bulkhead_agent_protocol::agent::{self, Empty};
use protobuf::Message as _;
use tempfile::TempDir;

use super::*;

fn change(path: &str, kind: Kind) -> VolumeChange {
    VolumeChange {
        path: path.into(),
        kind: Some(kind),
        ..Default::default()
    }
}

fn directory() -> Kind {
    Kind::Directory(Empty::new())
}

fn file(text: &str) -> Kind {
    Kind::File(text.into())
}

fn link(target: &str) -> Kind {
    Kind::Link(target.into())
}

fn remove() -> Kind {
    Kind::Remove(Empty::new())
}

/// A volume that is a plain directory.
struct Volume(TempDir);

impl Volume {
    fn new() -> Volume {
        Volume(tempfile::tempdir().unwrap())
    }

    fn at(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    fn apply(&self, path: &str, kind: Kind) -> Result<(), VolumeError> {
        let fd = std::fs::File::open(self.0.path()).unwrap();
        apply(fd.as_fd(), &change(path, kind))
    }
}

#[test]
fn a_version_is_written_and_takes_the_place_of_another() {
    let volume = Volume::new();
    for (version, text) in [("..1", "old"), ("..2", "new")] {
        volume.apply(version, directory()).unwrap();
        let key = format!("{version}/key");
        volume.apply(&key, file(text)).unwrap();
        volume.apply(&key, Kind::Append(b"!".to_vec())).unwrap();
        volume.apply("..data_tmp", link(version)).unwrap();
        let rename = Kind::Rename("..data".into());
        volume.apply("..data_tmp", rename).unwrap();
    }
    volume.apply("key", link("..data/key")).unwrap();
    volume.apply("..1", remove()).unwrap();
    // What is gone is removed: a repetition after half of an attempt.
    volume.apply("..1", remove()).unwrap();
    assert_eq!(std::fs::read_to_string(volume.at("key")).unwrap(), "new!");
    let mut names: Vec<_> = std::fs::read_dir(volume.0.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["..2", "..data", "key"]);
}

#[test]
fn what_is_made_takes_the_place_of_whatever_was_there() {
    let volume = Volume::new();
    std::fs::create_dir(volume.at("name")).unwrap();
    std::fs::write(volume.at("name/inside"), "").unwrap();
    for kind in [file("text"), link("target"), directory(), file("again")] {
        volume.apply("name", kind).unwrap();
    }
    assert_eq!(std::fs::read(volume.at("name")).unwrap(), b"again");
}

#[test]
fn attributes_are_those_of_the_host() {
    let volume = Volume::new();
    volume.apply("file", file("")).unwrap();
    let found = std::fs::metadata(volume.at("file")).unwrap();
    assert_eq!(found.mode() & 0o7777, 0o600);
    let wanted = VolumeAttributes {
        mode: 0o440,
        uid: found.uid(),
        gid: found.gid(),
        modified_ns: 1_500_000_000_000_000_007,
        ..Default::default()
    };
    volume.apply("file", Kind::Attributes(wanted)).unwrap();
    let found = std::fs::metadata(volume.at("file")).unwrap();
    assert_eq!(found.mode() & 0o7777, 0o440);
    assert_eq!((found.mtime(), found.mtime_nsec()), (1_500_000_000, 7));
}

#[test]
fn a_name_that_leads_out_is_refused() {
    let volume = Volume::new();
    std::fs::create_dir(volume.at("a")).unwrap();
    for path in [
        "",
        "/",
        "..",
        "../x",
        "a/../../x",
        "/etc/x",
        "a//x",
        "a/",
        ".",
        "a\0",
    ] {
        for kind in [directory(), file(""), link("x"), remove()] {
            let refused = volume.apply(path, kind);
            assert!(
                matches!(refused, Err(VolumeError::Invalid { .. })),
                "{path:?}: {refused:?}"
            );
        }
    }
    for name in ["", "..", "../x", "a/x"] {
        let refused = volume.apply("a", Kind::Rename(name.into()));
        assert!(
            matches!(refused, Err(VolumeError::Invalid { .. })),
            "{name:?}"
        );
    }
    let refused = volume.apply("a", Kind::Attributes(VolumeAttributes::default()));
    assert!(refused.is_ok(), "{refused:?}");
}

#[test]
fn a_link_that_a_container_planted_is_not_followed() {
    let (volume, outside) = (Volume::new(), tempfile::tempdir().unwrap());
    let kept = outside.path().join("kept");
    std::fs::write(&kept, "kept").unwrap();
    let before = std::fs::metadata(&kept).unwrap();
    symlink(outside.path(), volume.at("..1")).unwrap();
    symlink(&kept, volume.at("file")).unwrap();
    for (path, kind) in [
        ("..1/kept", file("torn")),
        ("..1/kept", remove()),
        ("..1/new", directory()),
        ("file", Kind::Append(b"torn".to_vec())),
    ] {
        let refused = volume.apply(path, kind);
        assert!(
            matches!(refused, Err(VolumeError::System { .. })),
            "{path}: {refused:?}"
        );
    }
    let attributes = VolumeAttributes {
        mode: 0o777,
        uid: before.uid(),
        gid: before.gid(),
        modified_ns: 1,
        ..Default::default()
    };
    volume.apply("file", Kind::Attributes(attributes)).unwrap();
    // Removing and replacing concern the link itself.
    volume.apply("..1", remove()).unwrap();
    volume.apply("file", file("mine")).unwrap();
    assert_eq!(std::fs::read_to_string(&kept).unwrap(), "kept");
    let after = std::fs::metadata(&kept).unwrap();
    assert_eq!(
        (after.mode(), after.mtime()),
        (before.mode(), before.mtime())
    );
}

/// Any changes of a volume that has links out of it: what is outside stays as it is.
fn changes(data: &[u8]) {
    let outside = tempfile::tempdir().unwrap();
    let canary = outside.path().join("canary");
    std::fs::write(&canary, "untouched").unwrap();
    let path = outside.path().join("volume");
    std::fs::create_dir_all(path.join("d")).unwrap();
    symlink(outside.path(), path.join("out")).unwrap();
    symlink("../..", path.join("d/up")).unwrap();
    symlink("../canary", path.join("canary")).unwrap();
    let before = std::fs::metadata(&canary).unwrap();
    let Ok(request) = agent::ChangeVolumeRequest::parse_from_bytes(data) else {
        return;
    };
    let fd = std::fs::File::open(&path).unwrap();
    for change in &request.changes {
        let _ = apply(fd.as_fd(), change);
    }
    let after = std::fs::metadata(&canary).unwrap();
    assert_eq!(std::fs::read(&canary).unwrap(), b"untouched");
    assert_eq!(
        (after.ino(), after.mode(), after.uid(), after.ctime_nsec()),
        (
            before.ino(),
            before.mode(),
            before.uid(),
            before.ctime_nsec()
        )
    );
    assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 2);
}

#[test]
fn fuzz_agent_volume() {
    bulkhead_fuzz::run("agent_volume", changes);
}
