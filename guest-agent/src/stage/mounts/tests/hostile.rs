//! What an image tries to get out of its root or to deceive the agent with.

use super::*;

#[test]
fn the_old_root_is_gone_after_the_pivot() {
    let image = image();
    fs::write(image.beside.join("secret"), "of the host").expect("write");
    let spec = image.spec(vec![proc()]);
    in_mount_namespace(|| {
        let proc_fd = proc_fd();
        enter(&spec);
        let mounts = mountinfo(&proc_fd);
        let mut points: Vec<&str> = mounts.keys().map(String::as_str).collect();
        points.sort_unstable();
        assert_eq!(points, ["/", "/proc"]);
        assert_eq!(std::env::current_dir().expect("cwd"), Path::new("/"));
        let secret = image.beside.join("secret");
        assert!(fs::read(&secret).is_err() && fs::read(Path::new("/..").join(&secret)).is_err());
        // A second chroot and climbing out of it, the classic way back.
        fs::create_dir("/jail").expect("mkdir");
        nix::unistd::chroot("/jail").expect("chroot");
        for _ in 0..64 {
            nix::unistd::chdir("..").expect("chdir");
        }
        nix::unistd::chroot(".").expect("chroot");
        assert!(fs::read(&secret).is_err());
        String::new()
    });
}

#[test]
fn links_in_destinations_never_lead_out_of_the_root() {
    let image = image();
    let source = image.directory("source");
    fs::write(image.beside.join("source/mark"), "").expect("write");
    let canary = image.directory("canary");
    let canary_inside = format!("root{canary}");
    symlink(&canary, image.root.join("absolute")).expect("symlink");
    symlink(
        "../../../../../../../../beside/canary",
        image.root.join("relative"),
    )
    .expect("symlink");
    symlink("/proc/self/root", image.root.join("magic")).expect("symlink");
    let error = refusal(&image.spec(vec![proc(), new("tmpfs", "/magic/c", 0, "")]));
    assert!(
        error.contains("ELOOP"),
        "a link that only the kernel understands: {error}"
    );
    symlink(&canary, image.root.join("dev")).expect("symlink");
    let spec = image.spec(vec![
        proc(),
        bind(&source, "/absolute/a", 0),
        bind(&source, "/relative/b", 0),
        bind(&source, "/../../../d", 0),
    ]);
    let outside = image.root.parent().expect("a parent").join(canary_inside);
    in_mount_namespace(|| {
        let proc_fd = proc_fd();
        enter(&spec);
        let mounts = mountinfo(&proc_fd);
        for point in [
            format!("{canary}/a"),
            "/beside/canary/b".to_owned(),
            "/d".to_owned(),
        ] {
            assert!(mounts.contains_key(&point), "{point}: {:?}", mounts.keys());
        }
        assert!(Path::new(&canary).join("a/mark").exists());
        assert!(
            Path::new(&canary).join("null").exists(),
            "/dev leads there too"
        );
        String::new()
    });
    assert_eq!(
        fs::read_dir(&canary).expect("read").count(),
        0,
        "nothing was made outside"
    );
    assert!(
        outside.join("a").exists(),
        "the mount points were made inside the root"
    );
}

#[test]
fn a_bind_source_behind_a_link_is_refused() {
    let image = image();
    image.directory("real");
    symlink(image.source("real"), image.beside.join("link")).expect("symlink");
    let error = refusal(&image.spec(vec![bind(&image.source("link"), "/x", 0)]));
    assert!(
        error.contains("mount /x (bind of ") && error.contains("symbolic link"),
        "{error}"
    );
    let error = refusal(&image.spec(vec![bind(&image.source("none"), "/x", 0)]));
    assert!(
        error.contains("open of the source failed: ENOENT"),
        "{error}"
    );
}

#[test]
fn mounts_over_proc_are_refused_but_for_files_that_only_inform() {
    let image = image();
    let directory = image.directory("directory");
    let file = image.source("file");
    fs::write(&file, "fake").expect("write");
    symlink("/proc/self", image.root.join("alias")).expect("symlink");
    symlink("/proc", image.root.join("p")).expect("symlink");
    for (mount, word) in [
        (bind(&directory, "/proc", 0), "only a proc file system"),
        (new("tmpfs", "/./proc/", 0, ""), "only a proc file system"),
        (bind(&directory, "/proc/sys", 0), "inside /proc"),
        (bind(&file, "/proc/self/attr/exec", 0), "inside /proc"),
        (bind(&file, "/alias/attr/exec", 0), "inside /proc"),
        (new("tmpfs", "/p", 0, ""), "inside /proc"),
        (
            bind(&file, "/p/../proc/sys/kernel/core_pattern", 0),
            "inside /proc",
        ),
        (new("tmpfs", "/proc/net", 0, ""), "inside /proc"),
    ] {
        let destination = mount.destination.clone();
        let error = refusal(&image.spec(vec![proc(), mount]));
        assert!(error.contains(word), "{destination}: {error}");
    }
    let spec = image.spec(vec![
        proc(),
        bind(&file, "/proc/meminfo", MS_RDONLY),
        bind(&file, "/proc/net/dev", 0),
    ]);
    in_mount_namespace(|| {
        enter(&spec);
        assert_eq!(fs::read_to_string("/proc/meminfo").expect("read"), "fake");
        String::new()
    });
}

#[test]
fn proc_behind_a_link_of_the_image_is_refused() {
    let image = image();
    fs::create_dir(image.root.join("elsewhere")).expect("mkdir");
    symlink("elsewhere", image.root.join("proc")).expect("symlink");
    let error = refusal(&image.spec(vec![proc()]));
    assert!(error.contains("symbolic link"), "{error}");
}

#[test]
fn descriptors_of_another_spec_are_refused() {
    let image = image();
    let spec = image.spec(vec![bind(&image.directory("source"), "/x", 0)]);
    let mut fds = Sources::open(&spec).expect("sources").into_fds();
    fds.pop();
    let error = Sources::from_fds(&spec, fds).expect_err("one is missing");
    assert_eq!(
        error.to_string(),
        "mount sources: got 1 descriptors, the spec needs 2"
    );
}

#[test]
fn the_terminal_is_bound_to_a_console_inside_the_root() {
    use nix::pty::{grantpt, posix_openpt, ptsname_r, unlockpt};
    let image = image();
    let canary = image.source("console");
    fs::write(&canary, "untouched").expect("write");
    fs::create_dir(image.root.join("dev")).expect("mkdir");
    symlink(&canary, image.root.join("dev/console")).expect("symlink");
    let spec = image.spec(vec![new(
        "devpts",
        "/dev/pts",
        0,
        "newinstance,ptmxmode=0666",
    )]);
    in_mount_namespace(|| {
        let entered = build(&spec).and_then(Prepared::enter_root);
        let entered = entered.unwrap_or_else(|e| panic!("{e}"));
        let master = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY).expect("the container's ptmx");
        grantpt(&master)
            .and_then(|()| unlockpt(&master))
            .expect("unlock");
        let name = ptsname_r(&master).expect("name");
        let flags = OFlag::O_RDWR | OFlag::O_NOCTTY;
        let terminal = nix::fcntl::open(name.as_str(), flags, Mode::empty()).expect("open");
        entered
            .bind_console(terminal.as_fd())
            .unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(name, "/dev/pts/0", "the first of an instance of its own");
        let number = |path: &str| fs::metadata(path).expect("stat").rdev();
        assert_eq!(number("/dev/console"), number(&name));
        assert!(
            fs::symlink_metadata(&canary)
                .expect("inside")
                .file_type()
                .is_char_device()
        );
        entered.seal(&spec).unwrap_or_else(|e| panic!("{e}"));
        String::new()
    });
    assert_eq!(fs::read_to_string(&canary).expect("read"), "untouched");
}
