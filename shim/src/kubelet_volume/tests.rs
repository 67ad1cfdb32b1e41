use std::{
    fs,
    os::{
        fd::AsFd,
        unix::{
            fs::{PermissionsExt, symlink},
            net::UnixListener,
        },
    },
};

use super::{
    changes::{Step, steps},
    host::{Directory, MAX_BYTES, MAX_ENTRIES, Node, look, open},
    *,
};

/// A volume on the host, written as kubelet does.
struct Volume {
    dir: tempfile::TempDir,
    version: u32,
}

impl Volume {
    fn new(files: &[(&str, &str)]) -> Volume {
        let dir = tempfile::tempdir().unwrap();
        let mut volume = Volume { dir, version: 0 };
        volume.write(files);
        volume
    }

    fn at(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    fn current(&self) -> String {
        format!("..2026_{}", self.version)
    }

    /// A new version, without removing the old one.
    fn add(&mut self, files: &[(&str, &str)]) {
        self.version += 1;
        for (path, text) in files {
            let path = self.at(&self.current()).join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        fs::create_dir_all(self.at(&self.current())).unwrap();
        symlink(self.current(), self.at("..data_tmp")).unwrap();
        fs::rename(self.at("..data_tmp"), self.at("..data")).unwrap();
        for (path, _) in files {
            let name = path.split('/').next().unwrap();
            let _ = symlink(format!("..data/{name}"), self.at(name));
        }
    }

    fn write(&mut self, files: &[(&str, &str)]) {
        let old = self.current();
        self.add(files);
        let _ = fs::remove_dir_all(self.at(&old));
    }

    fn look(&self) -> Result<Directory, Error> {
        self.look_with(|_| false)
    }

    fn look_with(&self, has: impl Fn(&str) -> bool) -> Result<Directory, Error> {
        look(fs::File::open(self.dir.path()).unwrap().as_fd(), has)
    }

    #[track_caller]
    fn refuses(&self, path: &str, reason: &str) {
        let error = self.look().unwrap_err().to_string();
        assert!(error.contains(path) && error.contains(reason), "{error}");
    }
}

/// A step without numbers that differ from run to run.
fn word(step: &Step) -> String {
    match step {
        Step::Directory(path) => format!("mkdir {path}"),
        Step::File(path, _) => format!("write {path}"),
        Step::Link(path, target) => format!("link {path} to {target}"),
        Step::Rename(from, to) => format!("rename {from} to {to}"),
        Step::Remove(path) => format!("remove {path}"),
        Step::Attributes(path, ..) => format!("set {path}"),
    }
}

fn words(has: &Directory, wants: &Directory) -> Vec<String> {
    let all = steps(has, wants);
    let links =
        |step: &&Step| !matches!(step, Step::Attributes(path, ..) if !path.starts_with("..2"));
    all.iter().filter(links).map(word).collect()
}

#[test]
fn an_update_is_repeated_in_kubelets_order() {
    let mut volume = Volume::new(&[("-a", "1"), ("gone", "1"), ("dir/b", "1")]);
    let first = volume.look().unwrap();
    assert_eq!(
        words(&Directory::default(), &first),
        [
            "mkdir ..2026_1",
            "write ..2026_1/-a",
            "set ..2026_1/-a",
            "mkdir ..2026_1/dir",
            "write ..2026_1/dir/b",
            "set ..2026_1/dir/b",
            "set ..2026_1/dir",
            "write ..2026_1/gone",
            "set ..2026_1/gone",
            "set ..2026_1",
            "link ..data_tmp to ..2026_1",
            "rename ..data_tmp to ..data",
            "link -a to ..data/-a",
            "link dir to ..data/dir",
            "link gone to ..data/gone",
        ]
    );
    volume.write(&[("-a", "2"), ("new", "2")]);
    fs::remove_file(volume.at("gone")).unwrap();
    fs::remove_file(volume.at("dir")).unwrap();
    let second = volume
        .look_with(|name| first.entries.contains_key(name))
        .unwrap();
    assert_eq!(
        words(&first, &second),
        [
            "mkdir ..2026_2",
            "write ..2026_2/-a",
            "set ..2026_2/-a",
            "write ..2026_2/new",
            "set ..2026_2/new",
            "set ..2026_2",
            "link ..data_tmp to ..2026_2",
            "rename ..data_tmp to ..data",
            "link new to ..data/new",
            "remove dir",
            "remove gone",
            "remove ..2026_1",
        ]
    );
    assert!(words(&second, &second).is_empty());
}

#[test]
fn the_old_version_stays_as_long_as_on_the_host_and_a_half_written_one_is_not_taken() {
    let mut volume = Volume::new(&[("key", "1")]);
    let first = volume.look().unwrap();
    fs::create_dir(volume.at("..2026_half")).unwrap();
    volume.add(&[("key", "2")]);
    let has = |name: &str| first.entries.contains_key(name);
    let both = volume.look_with(has).unwrap();
    let names: Vec<_> = both.entries.keys().collect();
    assert_eq!(names, ["..2026_1", "..2026_2", "..data", "key"]);
    fs::remove_dir_all(volume.at("..2026_1")).unwrap();
    let later = volume.look_with(has).unwrap();
    assert_eq!(words(&both, &later), ["remove ..2026_1"]);
}

#[test]
fn a_new_mode_is_repeated_without_the_bytes() {
    let volume = Volume::new(&[("key", "1")]);
    let before = volume.look().unwrap();
    let file = volume.at("..2026_1/key");
    fs::set_permissions(file, fs::Permissions::from_mode(0o440)).unwrap();
    let after = volume.look().unwrap();
    assert_eq!(words(&before, &after), ["set ..2026_1/key"]);
}

#[test]
fn what_has_failed_on_the_way_is_made_anew_or_removed() {
    let volume = Volume::new(&[("key", "1")]);
    let wants = volume.look().unwrap();
    let mut has = Directory::default();
    for name in [
        "..2026_0",
        "..2026_1",
        "..data",
        "..data_tmp",
        "key",
        "stale",
    ] {
        has.entries.insert(name.into(), Node::Unsure);
    }
    assert_eq!(
        words(&has, &wants),
        [
            "mkdir ..2026_1",
            "write ..2026_1/key",
            "set ..2026_1/key",
            "set ..2026_1",
            "link ..data_tmp to ..2026_1",
            "rename ..data_tmp to ..data",
            "link key to ..data/key",
            "remove ..2026_0",
            "remove ..data_tmp",
            "remove stale",
        ]
    );
}

#[test]
fn a_version_that_goes_while_it_is_read_is_read_again() {
    let mut volume = Volume::new(&[("key", "1")]);
    let wants = volume.look().unwrap();
    let Some(Node::Directory(version)) = wants.entries.get("..2026_1") else {
        panic!("{wants:?}")
    };
    let Some(Node::File(_, stamp)) = version.entries.get("key") else {
        panic!("{version:?}")
    };
    let fd = fs::File::open(volume.dir.path()).unwrap();
    let file = volume.at("..2026_1/key");
    assert!(open(fd.as_fd(), "..2026_1/key", stamp).is_ok());
    fs::write(&file, "torn!").unwrap();
    let torn = open(fd.as_fd(), "..2026_1/key", stamp);
    assert!(matches!(torn, Err(Error::Moving)), "{torn:?}");
    volume.write(&[("key", "2")]);
    let gone = open(fd.as_fd(), "..2026_1/key", stamp);
    assert!(matches!(gone, Err(Error::Moving)), "{gone:?}");
    fs::remove_dir_all(volume.at("..2026_2")).unwrap();
    assert!(matches!(volume.look(), Err(Error::Moving)));
}

/// While the host replaces version after version, what a look finds is one of them, whole.
#[test]
fn a_look_never_finds_half_of_the_version_that_counts() {
    const KEYS: usize = 40;
    let names: Vec<String> = (0..KEYS).map(|nth| format!("key{nth}")).collect();
    let files: Vec<(&str, &str)> = names.iter().map(|name| (&**name, "x")).collect();
    let mut volume = Volume::new(&files);
    let directory = fs::File::open(volume.dir.path()).unwrap();
    let has_ended = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let looking = scope.spawn(|| {
            let (mut whole, mut moving) = (0, 0);
            while !has_ended.load(std::sync::atomic::Ordering::Relaxed) {
                // The guest has all of them: the old one is walked too.
                match look(directory.as_fd(), |_| true) {
                    Err(Error::Moving) => moving += 1,
                    Err(error) => panic!("{error}"),
                    Ok(top) => {
                        let Some(Node::Link(version, _)) = top.entries.get("..data") else {
                            panic!("{top:?}")
                        };
                        let Some(Node::Directory(version)) = top.entries.get(version) else {
                            panic!("{top:?}")
                        };
                        assert_eq!(version.entries.len(), KEYS, "half of a version");
                        whole += 1;
                    }
                }
            }
            (whole, moving)
        });
        for _ in 0..1500 {
            volume.write(&files);
        }
        has_ended.store(true, std::sync::atomic::Ordering::Relaxed);
        let (whole, moving) = looking.join().expect("it finds whole versions");
        println!("{whole} looks found a version, {moving} were too early");
        assert!(whole > 0 && moving > 0);
    });
}

#[test]
fn a_volume_without_a_version_is_empty() {
    let volume = Volume::new(&[]);
    fs::remove_file(volume.at("..data")).unwrap();
    assert!(volume.look().unwrap().entries.is_empty());
    // Where kubelet will mount another volume.
    fs::create_dir_all(volume.at("cache/deep")).unwrap();
    let words = words(&Directory::default(), &volume.look().unwrap());
    assert_eq!(words, ["mkdir cache", "mkdir cache/deep"]);
}

#[test]
fn a_link_out_of_the_volume_is_refused() {
    for target in ["/etc/shadow", "../other", "..data/../../x", "./x", ""] {
        let volume = Volume::new(&[]);
        // Linux makes no link to nowhere.
        if !target.is_empty() {
            symlink(target, volume.at("key")).unwrap();
            volume.refuses("key", "leads out of the volume");
        }
    }
    for target in ["..2026_1/x", "key"] {
        let volume = Volume::new(&[]);
        fs::remove_file(volume.at("..data")).unwrap();
        symlink(target, volume.at("..data")).unwrap();
        volume.refuses("..data", "no version");
    }
    let volume = Volume::new(&[]);
    symlink("/etc/shadow", volume.at("..2026_1/key")).unwrap();
    volume.refuses("..2026_1/key", "symbolic link");
}

#[test]
fn a_directory_that_becomes_a_link_is_not_followed() {
    let (volume, outside) = (Volume::new(&[("key", "1")]), tempfile::tempdir().unwrap());
    let wants = volume.look().unwrap();
    let Some(Node::Directory(version)) = wants.entries.get("..2026_1") else {
        panic!("{wants:?}")
    };
    let Some(Node::File(_, stamp)) = version.entries.get("key") else {
        panic!("{version:?}")
    };
    fs::rename(volume.at("..2026_1"), outside.path().join("it")).unwrap();
    symlink(outside.path().join("it"), volume.at("..2026_1")).unwrap();
    let fd = fs::File::open(volume.dir.path()).unwrap();
    let followed = open(fd.as_fd(), "..2026_1/key", stamp);
    assert!(matches!(followed, Err(Error::Read { .. })), "{followed:?}");
}

#[test]
fn what_kubelet_does_not_make_is_refused_by_its_name() {
    let volume = Volume::new(&[]);
    fs::write(volume.at("plain"), "").unwrap();
    volume.refuses("plain", "beside the versions");
    let volume = Volume::new(&[]);
    let _socket = UnixListener::bind(volume.at("..2026_1/socket")).unwrap();
    volume.refuses("..2026_1/socket", "socket");
    let volume = Volume::new(&[]);
    let pipe = volume.at("..2026_1/pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRUSR).unwrap();
    volume.refuses("..2026_1/pipe", "pipe");
    let volume = Volume::new(&[]);
    let name = <std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(b"\xff");
    fs::write(volume.at("..2026_1").join(name), "").unwrap();
    volume.refuses("..2026_1", "not text");
}

#[test]
fn what_is_too_large_is_refused_by_its_name() {
    let volume = Volume::new(&[("largest", "")]);
    let file = fs::File::create(volume.at("..2026_1/largest")).unwrap();
    file.set_len(MAX_BYTES).unwrap();
    assert!(volume.look().is_ok());
    fs::write(volume.at("..2026_1/more"), "1").unwrap();
    volume.refuses("..2026_1/", "more than 16 MiB");
    let volume = Volume::new(&[]);
    for n in 0..=MAX_ENTRIES {
        fs::write(volume.at(&format!("..2026_1/{n}")), "").unwrap();
    }
    volume.refuses("..2026_1/", "more than 4096 files");
    let deep = format!("..2026_1{}", "/d".repeat(20));
    let volume = Volume::new(&[]);
    fs::create_dir_all(volume.at(&deep)).unwrap();
    volume.refuses("..2026_1/d", "directories deep");
}
