use std::{
    fs::{self, File},
    io::{Read, Write},
    os::unix::fs::{PermissionsExt, symlink},
    path::PathBuf,
    time::{Duration, SystemTime},
};

use super::{
    Basis, Begun, Building, Host, Identity, Key, Origin, Shape, Store,
    store::{BACK_OFF, MOST},
};

struct World {
    dir: tempfile::TempDir,
    store: Store,
}

impl World {
    fn new() -> World {
        let dir = tempfile::tempdir().unwrap();
        for part in ["vmm", "kernel", "initrd"] {
            fs::write(dir.path().join(part), part).unwrap();
        }
        fs::create_dir(dir.path().join("state")).unwrap();
        let store = Store::at(&dir.path().join("state"));
        World { dir, store }
    }

    fn basis(&self, vcpus: u32) -> Basis {
        let identity = |name: &str| {
            let path = self.dir.path().join(name);
            Identity::of(&path, &path.metadata().unwrap())
        };
        let files = ["vmm", "kernel", "initrd"].map(identity);
        Basis::new(files, Host::here().unwrap(), shape(vcpus))
    }

    fn path(&self, name: impl ToString) -> PathBuf {
        self.dir
            .path()
            .join("state/.templates")
            .join(name.to_string())
    }

    fn begin(&self, basis: Basis) -> Building {
        // It goes with the last template.
        fs::create_dir_all(self.dir.path().join("state")).unwrap();
        match self.store.begin(basis).unwrap() {
            Begun::Building(building) => *building,
            other => panic!("{other:?}"),
        }
    }

    fn make(&self, vcpus: u32) -> Key {
        let building = self.begin(self.basis(vcpus));
        let [mut state, mut memory, _] = building.files().each_ref();
        state.write_all(b"state").unwrap();
        memory.write_all(b"memory").unwrap();
        building.publish().unwrap()
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.path("")).into_iter().flatten();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = names.collect();
        names.sort();
        names
    }
}

fn shape(vcpus: u32) -> Shape {
    Shape {
        vcpus,
        spare_vcpus: 1,
        memory_mib: 128,
        spare_memory_mib: 1024,
        kernel_arguments: vec!["quiet".into()],
        share_tag: "share".into(),
        share_queues: 1,
        net_slots: 12,
        balloon: true,
    }
}

#[test]
fn each_part_of_what_it_is_made_of_changes_its_name() {
    let world = World::new();
    let basis = world.basis(1);
    assert_eq!(basis.key(), world.basis(1).key(), "it says the same twice");
    assert_eq!(Key::parse(&basis.key().to_string()), Some(basis.key()));
    let text = serde_json::to_value(&basis).unwrap();
    let mut changed = 0;
    // All values of the manifest, one after the other.
    let mut todo: Vec<String> = vec![String::new()];
    while let Some(pointer) = todo.pop() {
        let value = text.pointer(&pointer).unwrap();
        if let Some(fields) = value.as_object() {
            todo.extend(fields.keys().map(|name| format!("{pointer}/{name}")));
            continue;
        }
        let mut other = text.clone();
        *other.pointer_mut(&pointer).unwrap() = match value {
            serde_json::Value::Number(number) => (number.as_i64().unwrap() + 1).into(),
            serde_json::Value::String(text) => format!("{text}.").into(),
            serde_json::Value::Bool(value) => (!value).into(),
            serde_json::Value::Array(_) => vec!["loud"].into(),
            other => panic!("{other}"),
        };
        let other: Basis = serde_json::from_value(other).unwrap();
        assert_ne!(other.key(), basis.key(), "{pointer}");
        changed += 1;
    }
    assert_eq!(changed, 1 + 3 * 6 + 3 + 9);
    for name in [
        "",
        "0",
        "..",
        &"0".repeat(31),
        &"A".repeat(32),
        &"g".repeat(32),
    ] {
        assert_eq!(Key::parse(name), None, "{name}");
    }
}

#[test]
fn what_is_written_again_or_replaced_is_another_file() {
    let world = World::new();
    let (basis, host) = (world.basis(1), Host::here().unwrap());
    assert_eq!(basis.outdated(&host), None);
    let path = world.dir.path().join("kernel");
    let before = path.metadata().unwrap().modified().unwrap();
    // As long as before, and with the same time.
    fs::write(&path, "kernal").unwrap();
    File::open(&path).unwrap().set_modified(before).unwrap();
    assert_ne!(basis.key(), world.basis(1).key());
    assert!(
        basis
            .outdated(&host)
            .unwrap()
            .contains("kernel has changed")
    );
    let elsewhere = Host {
        kernel: "6.1.0".into(),
        ..host
    };
    assert!(
        basis
            .outdated(&elsewhere)
            .unwrap()
            .contains("another kernel")
    );
}

#[test]
fn a_template_is_found_by_what_it_was_made_of_and_its_files_are_read_only() {
    let world = World::new();
    assert!(world.store.open(&world.basis(1)).is_none());
    let key = world.make(1);
    let [mut state, mut memory, _] = world.store.open(&world.basis(1)).unwrap();
    let mut text = String::new();
    state.read_to_string(&mut text).unwrap();
    memory.read_to_string(&mut text).unwrap();
    assert_eq!(text, "statememory");
    assert!(state.write(b"x").is_err() && memory.write(b"x").is_err());
    assert!(world.store.open(&world.basis(2)).is_none());
    let mode = |name: &str| world.path(name).metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(""), mode(&key.to_string())), (0o700, 0o700));
    for name in ["state", "memory", "manifest.json"] {
        assert_eq!(mode(&format!("{key}/{name}")), 0o400, "{name}");
    }
    assert_eq!(world.names(), [key.to_string()], "nothing else is left");
    // Whoever has it open keeps it.
    assert!(world.store.drop(&key).unwrap() && !world.store.drop(&key).unwrap());
    assert_eq!(memory.metadata().unwrap().len(), 6);
    assert!(!world.dir.path().join("state").exists());
}

#[test]
fn damage_at_any_place_is_noticed_and_ends_the_template() {
    type Damage = fn(&World, PathBuf);
    let cases: [(&str, Damage); 9] = [
        ("state written to", |_, path| {
            let file = File::options().append(true).open(path.join("state"));
            file.unwrap().write_all(b"x").unwrap();
        }),
        (
            "memory of the same length, with the same time",
            |_, path| {
                let path = path.join("memory");
                let before = path.metadata().unwrap().modified().unwrap();
                fs::write(&path, "MEMORY").unwrap();
                File::open(&path).unwrap().set_modified(before).unwrap();
            },
        ),
        ("memory replaced", |_, path| {
            fs::remove_file(path.join("memory")).unwrap();
            fs::write(path.join("memory"), "memory").unwrap();
        }),
        ("state gone", |_, path| {
            fs::remove_file(path.join("state")).unwrap()
        }),
        ("memory behind a link", |world, path| {
            let elsewhere = world.dir.path().join("elsewhere");
            fs::rename(path.join("memory"), &elsewhere).unwrap();
            symlink(elsewhere, path.join("memory")).unwrap();
        }),
        ("memory a directory", |_, path| {
            fs::remove_file(path.join("memory")).unwrap();
            fs::create_dir(path.join("memory")).unwrap();
        }),
        ("no manifest", |_, path| {
            fs::remove_file(path.join("manifest.json")).unwrap()
        }),
        ("a manifest that is cut off", |_, path| {
            fs::set_permissions(path.join("manifest.json"), PermissionsExt::from_mode(0o600))
                .unwrap();
            fs::write(path.join("manifest.json"), "{").unwrap();
        }),
        ("another one's manifest", |world, path| {
            let other = world.make(2);
            fs::remove_file(path.join("manifest.json")).unwrap();
            let manifest = world.path(other).join("manifest.json");
            fs::rename(manifest, path.join("manifest.json")).unwrap();
        }),
    ];
    for (what, damage) in cases {
        let world = World::new();
        let key = world.make(1);
        damage(&world, world.path(&key));
        let listed = world.store.list().unwrap();
        let listed = listed.iter().find(|listed| listed.key == key).unwrap();
        assert!(
            listed.refused.is_some() || what.starts_with("another"),
            "{what}"
        );
        assert!(world.store.open(&world.basis(1)).is_none(), "{what}");
        assert!(!world.path(&key).exists(), "{what}");
        if what == "memory a directory" {
            // Nothing is removed that is not a template's, and that is said.
            let swept = world.store.sweep(false).unwrap();
            assert!(swept.len() == 1 && swept[0].left.is_some(), "{swept:?}");
        } else {
            assert!(
                !world.names().iter().any(|name| name.contains("tmp")),
                "{what}"
            );
            world.make(1);
            assert!(
                world.store.open(&world.basis(1)).is_some(),
                "{what}: made again"
            );
        }
    }
}

#[test]
fn two_builders_make_one_template_and_nobody_sees_a_half() {
    let world = World::new();
    let building = world.begin(world.basis(1));
    let key = building.key();
    assert!(matches!(
        world.store.begin(world.basis(1)).unwrap(),
        Begun::Busy
    ));
    assert!(
        world
            .store
            .hold_off(&key)
            .unwrap()
            .contains("somebody makes it")
    );
    // Others are not in its way.
    world.make(2);
    let [mut state, memory, _] = building.files().each_ref();
    state.write_all(b"state").unwrap();
    assert!(world.store.open(&world.basis(1)).is_none());
    assert!(!world.store.has(&key));
    assert!(
        world.store.sweep(false).unwrap().is_empty(),
        "its builder lives"
    );
    let mut memory = memory;
    memory.write_all(b"memory").unwrap();
    building.publish().unwrap();
    assert!(world.store.open(&world.basis(1)).is_some());
    assert!(matches!(
        world.store.begin(world.basis(1)).unwrap(),
        Begun::There
    ));
    assert_eq!(world.store.hold_off(&key), None);
    assert_eq!(world.names().len(), 2);
}

#[test]
fn what_could_not_be_made_is_not_tried_again_at_once() {
    let world = World::new();
    let key = world.basis(1).key();
    // The VMM has written nothing.
    assert!(world.begin(world.basis(1)).publish().is_err());
    let building = world.begin(world.basis(1));
    building.fail("the guest's kernel panicked");
    drop(building);
    assert_eq!(world.names(), [format!("{key}.lock")]);
    let reason = world.store.hold_off(&key).unwrap();
    assert!(reason.contains("panicked"), "{reason}");
    let (origin, files) = Origin::find(&world.store, world.basis(1));
    assert!(files.is_none());
    assert!(
        matches!(origin, Origin::Cold { missing: None, .. }),
        "{origin:?}"
    );
    let later = || {
        let lock = File::open(world.path(format!("{key}.lock"))).unwrap();
        let before = SystemTime::now() - BACK_OFF - Duration::from_secs(1);
        lock.set_modified(before).unwrap();
    };
    assert!(
        world.store.sweep(false).unwrap().is_empty(),
        "the reason stays"
    );
    later();
    assert_eq!(world.store.hold_off(&key), None);
    let (origin, _) = Origin::find(&world.store, world.basis(1));
    assert!(
        matches!(
            origin,
            Origin::Cold {
                missing: Some(_),
                ..
            }
        ),
        "{origin:?}"
    );
    assert_eq!(world.store.sweep(false).unwrap().len(), 1);
    assert!(!world.path("").exists());
    // One that the VMM refuses is one that could not be made.
    world.make(1);
    world.store.refuse(&key, "KVM has no such register");
    assert!(
        world
            .store
            .hold_off(&key)
            .unwrap()
            .contains("no such register")
    );
    assert!(!world.store.has(&key));
}

#[test]
fn when_there_are_too_many_those_that_nobody_has_used_go() {
    let world = World::new();
    let keys: Vec<Key> = (1..=MOST as u32).map(|vcpus| world.make(vcpus)).collect();
    for (age, key) in keys.iter().rev().enumerate() {
        let manifest = File::open(world.path(key).join("manifest.json")).unwrap();
        let before = SystemTime::now() - Duration::from_secs(100 * (age as u64 + 1));
        manifest.set_modified(before).unwrap();
    }
    let (origin, _) = Origin::find(&world.store, world.basis(1));
    assert!(origin.is_template());
    let last = world.make(MOST as u32 + 1);
    let listed = world.store.list().unwrap();
    let left: Vec<&Key> = listed.iter().map(|listed| &listed.key).collect();
    assert_eq!(left.len(), MOST);
    assert!(left.contains(&&keys[0]) && left.contains(&&last) && !left.contains(&&keys[1]));
    assert!(
        listed
            .iter()
            .all(|listed| listed.refused.is_none() && listed.bytes > 0)
    );
}

#[test]
fn gc_takes_what_fits_nothing_and_what_the_dead_have_left() {
    let world = World::new();
    let [old, kept] = [1, 2].map(|vcpus| world.basis(vcpus));
    let key = world.make(1);
    let building = world.begin(kept.clone());
    let half = world.path(format!("{}.tmp-{}", building.key(), std::process::id()));
    assert!(half.exists());
    // As a kill does: the lock goes, what was written stays.
    drop(building);
    fs::write(world.dir.path().join("vmm"), "another one").unwrap();
    fs::write(world.path("README"), "nobody's").unwrap();
    let planned = world.store.sweep(true).unwrap();
    assert!(
        world.path(&key).exists() && half.exists(),
        "a dry run removes nothing"
    );
    let swept = world.store.sweep(false).unwrap();
    let names =
        |swept: &[super::Swept]| swept.iter().map(|one| one.name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&planned), names(&swept));
    assert_eq!(swept.len(), 3, "{swept:?}");
    assert!(swept[0].reason.contains("vmm has changed"), "{swept:?}");
    assert!(swept.iter().all(|one| one.left.is_none()));
    assert_eq!(world.names(), ["README"]);
    assert!(world.store.open(&old).is_none());
    // The next builder needs no gc.
    fs::create_dir(&half).unwrap();
    fs::write(half.join("memory"), "half").unwrap();
    let building = world.begin(kept);
    assert_eq!(building.files()[1].metadata().unwrap().len(), 0);
}
