//! Close to open: what the host changes, and what a cache costs.

use super::*;

/// How often the kernel has asked for something.
fn asked(m: &Mounted, what: &str) -> u64 {
    let requests = m.engine.stats().requests;
    let of = |(name, count): &(&str, u64)| (*name == what).then_some(*count);
    requests.iter().find_map(of).unwrap_or(0)
}

/// Opens, reads and asks for no attributes, which would show the kernel a change by themselves.
fn read_only(path: &Path) -> String {
    let mut text = [0; 64];
    let length = File::open(path).unwrap().read(&mut text).unwrap();
    String::from_utf8_lossy(&text[..length]).into_owned()
}

#[test]
fn what_the_host_wrote_is_read_by_the_next_open() {
    let m = Mounted::new(CACHED);
    let path = |name: &str| m.host(name);
    let write_at_start = |name: &str, text: &str| {
        let file = File::options().write(true).open(path(name)).unwrap();
        file.write_all_at(text.as_bytes(), 0).unwrap();
    };
    let stamps = |name: &str| fs::metadata(path(name)).unwrap().modified().unwrap();
    type Change<'a> = Box<dyn Fn(&str) + 'a>;
    let ways: [(&str, &str, Change); 9] = [
        (
            "rewritten",
            "NEW",
            Box::new(|name| write_at_start(name, "NEW")),
        ),
        (
            "grown",
            "old and more",
            Box::new(|name| {
                let mut file = File::options().append(true).open(path(name)).unwrap();
                file.write_all(b" and more").unwrap();
            }),
        ),
        (
            "shrunk",
            "o",
            Box::new(|name| {
                File::options()
                    .write(true)
                    .open(path(name))
                    .unwrap()
                    .set_len(1)
                    .unwrap();
            }),
        ),
        (
            "truncated and written",
            "NEW",
            Box::new(|name| fs::write(path(name), "NEW").unwrap()),
        ),
        (
            "rewritten with the old time",
            "NEW",
            Box::new(|name| {
                let before = stamps(name);
                let file = File::options().write(true).open(path(name)).unwrap();
                file.write_all_at(b"NEW", 0).unwrap();
                file.set_modified(before).unwrap();
            }),
        ),
        (
            "replaced",
            "NEW",
            Box::new(|name| {
                fs::write(path("new"), "NEW").unwrap();
                fs::rename(path("new"), path(name)).unwrap();
            }),
        ),
        (
            "replaced with the old time",
            "NEW",
            Box::new(|name| {
                let before = stamps(name);
                fs::write(path("new"), "NEW").unwrap();
                let file = File::options().write(true).open(path("new")).unwrap();
                file.set_modified(before).unwrap();
                fs::rename(path("new"), path(name)).unwrap();
            }),
        ),
        (
            "moved away and replaced",
            "NEW",
            Box::new(|name| {
                fs::rename(path(name), path("old")).unwrap();
                fs::write(path(name), "NEW").unwrap();
            }),
        ),
        (
            "removed and made again",
            "NEW",
            Box::new(|name| {
                fs::remove_file(path(name)).unwrap();
                fs::write(path(name), "NEW").unwrap();
            }),
        ),
    ];
    for (name, new, change) in &ways {
        fs::create_dir_all(m.host("dir")).unwrap();
        let name = format!("dir/{name}");
        fs::write(m.host(&name), "old").unwrap();
        assert_eq!(read_only(&m.at(&name)), "old");
        // Time stamps of the host are as coarse as its clock's tick.
        std::thread::sleep(std::time::Duration::from_millis(20));
        change(&name);
        assert_eq!(read_only(&m.at(&name)), *new, "{name}");
    }
    // By a mapping: the host's kernel stamps the file when the page is written to first.
    fs::write(m.host("mapped"), vec![b'a'; 8192]).unwrap();
    assert_eq!(fs::read(m.at("mapped")).unwrap()[0], b'a');
    std::thread::sleep(std::time::Duration::from_millis(20));
    let file = File::options()
        .read(true)
        .write(true)
        .open(m.host("mapped"))
        .unwrap();
    map(&file, libc::MAP_SHARED)[0] = b'm';
    assert_eq!(fs::read(m.at("mapped")).unwrap()[0], b'm');
    // And a mapping inside, made by a new open.
    std::thread::sleep(std::time::Duration::from_millis(20));
    fs::write(m.host("plain"), vec![b'a'; 8192]).unwrap();
    assert_eq!(fs::read(m.at("plain")).unwrap()[0], b'a');
    std::thread::sleep(std::time::Duration::from_millis(20));
    fs::write(m.host("plain"), vec![b'b'; 8192]).unwrap();
    let file = File::options()
        .read(true)
        .write(true)
        .open(m.at("plain"))
        .unwrap();
    assert_eq!(map(&file, libc::MAP_SHARED)[0], b'b');
}

/// open(2) walks its path again once only: what goes on changing opens all the same.
#[test]
fn a_file_that_the_host_writes_all_the_time_can_be_opened() {
    use std::sync::atomic::{AtomicBool, Ordering};

    let m = Mounted::new(CACHED);
    fs::write(m.host("log"), "").unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut log = File::options().append(true).open(m.host("log")).unwrap();
            while !stop.load(Ordering::Relaxed) {
                log.write_all(b"x").unwrap();
            }
        });
        let opened = std::panic::catch_unwind(|| {
            std::thread::scope(|scope| {
                for _ in 0..3 {
                    scope.spawn(|| {
                        for _ in 0..1000 {
                            File::open(m.at("log")).unwrap();
                        }
                    });
                }
            });
        });
        stop.store(true, Ordering::Relaxed);
        writer.join().unwrap();
        opened.unwrap();
    });
}

#[test]
fn what_the_guest_changes_itself_costs_it_no_cache_at_each_open() {
    let m = Mounted::new(CACHED);
    let content = vec![7; 1 << 20];
    fs::write(m.at("f"), &content).unwrap();
    let read = || assert!(fs::read(m.at("f")).unwrap() == content);
    // The kernel drops the pages that it has written itself when it learns their modification time.
    read();
    let cached = |what: &str, change: &dyn Fn()| {
        change();
        let (reads, opens) = (asked(&m, "read"), asked(&m, "open"));
        read();
        assert_eq!(asked(&m, "read"), reads, "{what}");
        assert_eq!(asked(&m, "open"), opens + 1, "{what}: opened again");
    };
    cached("nothing", &|| {});
    let mode = |mode| fs::set_permissions(m.at("f"), fs::Permissions::from_mode(mode)).unwrap();
    cached("chmod", &|| mode(0o600));
    cached("chown", &|| {
        std::os::unix::fs::chown(m.at("f"), Some(5), None).unwrap()
    });
    cached("link", &|| fs::hard_link(m.at("f"), m.at("g")).unwrap());
    cached("rename", &|| {
        fs::rename(m.at("f"), m.at("h")).unwrap();
        fs::rename(m.at("h"), m.at("f")).unwrap();
    });
    cached("attribute", &|| {
        let path = c_path(&m.at("f"));
        // SAFETY: the strings are NUL-terminated and the value is readable for its length.
        let set = unsafe {
            libc::setxattr(
                path.as_ptr(),
                c"user.a".as_ptr(),
                c"v".as_ptr().cast(),
                1,
                0,
            )
        };
        Errno::result(set).unwrap();
    });
    // A write is read back once, however often the file is opened.
    File::options()
        .write(true)
        .open(m.at("f"))
        .unwrap()
        .write_all_at(&[7; 10], 0)
        .unwrap();
    read();
    for _ in 0..3 {
        cached("after a write", &|| {});
    }
    // Removed and open: the kernel opens it again through /proc.
    let file = File::open(m.at("f")).unwrap();
    fs::remove_file(m.at("f")).unwrap();
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
}
