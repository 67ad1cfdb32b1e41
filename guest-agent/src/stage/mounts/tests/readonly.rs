//! What must not be written or seen.

use super::*;

#[test]
fn masked_and_readonly_paths_hide_and_hold() {
    let image = image();
    for directory in ["secrets", "config/deep", "proc"] {
        fs::create_dir_all(image.root.join(directory)).expect("mkdir");
    }
    fs::write(image.root.join("secrets/key"), "secret").expect("write");
    fs::write(image.root.join("file"), "secret").expect("write");
    fs::write(image.root.join("config/deep/value"), "old").expect("write");
    let mut spec = image.spec(vec![proc(), new("tmpfs", "/config/deep/t", 0, "")]);
    spec.masked_paths = ["/secrets", "/file", "/proc/kcore", "/none", "/file/below"]
        .map(String::from)
        .to_vec();
    spec.readonly_paths = ["/config", "/proc/sys", "/none"].map(String::from).to_vec();
    in_mount_namespace(|| {
        let proc_fd = proc_fd();
        enter(&spec);
        assert_eq!(fs::read_dir("/secrets").expect("read").count(), 0);
        assert!(fs::write("/secrets/new", "").is_err());
        assert_eq!(fs::read("/file").expect("read"), b"");
        assert!(
            fs::set_permissions("/file", fs::Permissions::from_mode(0o0)).is_err(),
            "the agent's /dev/null"
        );
        assert!(fs::write("/config/deep/value", "new").is_err());
        assert!(
            fs::write("/config/deep/t/new", "new").is_err(),
            "mounts beneath are read-only too"
        );
        assert!(fs::write("/proc/sys/vm/swappiness", "60").is_err());
        let mounts = mountinfo(&proc_fd);
        assert!(
            mounts["/proc/sys"].has("nosuid") && mounts["/proc/sys"].has("noexec"),
            "flags are kept"
        );
        fs::write("/writable", "").expect("the root itself is writable");
        String::new()
    });
}

#[test]
fn a_readonly_root_and_dev_still_get_their_mount_points() {
    let image = image();
    let mut spec = image.spec(vec![
        new("tmpfs", "/dev", MS_RDONLY | MS_NOSUID, "mode=755"),
        new("tmpfs", "/dev/shm", 0, ""),
        new("tmpfs", "/made/below", 0, ""),
    ]);
    spec.root_readonly = true;
    in_mount_namespace(|| {
        let proc_fd = proc_fd();
        enter(&spec);
        assert!(fs::write("/x", "").is_err() && fs::write("/dev/x", "").is_err());
        fs::write("/dev/shm/x", "").expect("write");
        fs::write("/made/below/x", "").expect("write");
        fs::write("/dev/null", "x").expect("devices work");
        let mounts = mountinfo(&proc_fd);
        assert!(mounts["/"].has("ro") && mounts["/dev"].has("ro") && mounts["/dev/shm"].has("rw"));
        String::new()
    });
}

#[test]
fn a_mount_point_missing_in_a_readonly_volume_is_a_clear_error() {
    let image = image();
    let volume = image.directory("volume");
    let error = refusal(&image.spec(vec![
        bind(&volume, "/volume", MS_RDONLY),
        new("tmpfs", "/volume/nested", 0, ""),
    ]));
    assert!(
        error.contains("mount /volume/nested (tmpfs)") && error.contains("read-only file system"),
        "{error}"
    );
    image.directory("volume/nested");
    let spec = image.spec(vec![
        bind(&volume, "/volume", MS_RDONLY),
        new("tmpfs", "/volume/nested", 0, ""),
    ]);
    in_mount_namespace(|| {
        enter(&spec);
        fs::write("/volume/nested/x", "").expect("write");
        assert!(fs::write("/volume/x", "").is_err());
        String::new()
    });
}
