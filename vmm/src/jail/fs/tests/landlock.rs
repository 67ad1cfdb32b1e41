//! Landlock around the share: what leads out of it opens nothing, what is beneath it works.

use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;

use nix::sched::CloneFlags;
use nix::unistd::{ForkResult, fork, pipe};

use super::*;
use crate::jail::tests::{as_without_landlock, expect, has_landlock};

fn text<E: std::fmt::Debug>(error: E) -> String {
    format!("{error:?}")
}

/// A path through what a descriptor is open on.
fn through(fd: &impl AsRawFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

fn path_only(path: &str) -> Result<OwnedFd, String> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    open(path, flags, Mode::empty()).map_err(text)
}

/// In the jail, with descriptors from outside: how many of the ways out open.
fn ways_out(accepted: &[Layer]) -> Result<(usize, usize), String> {
    disk()?;
    fs::create_dir_all("/mnt/share/in").map_err(text)?;
    fs::create_dir("/mnt/outside").map_err(text)?;
    for name in ["secret", "victim"] {
        fs::write(format!("/mnt/outside/{name}"), "root:").map_err(text)?;
    }
    let directory = path_only("/mnt/outside")?;
    let secret = path_only("/mnt/outside/secret")?;
    enter("/mnt/share", accepted).map_err(text)?;
    let outside = through(&directory);
    let ways = [
        fs::read(format!("{outside}/secret")).map(drop),
        fs::read(through(&secret)).map(drop),
        File::options().write(true).open(through(&secret)).map(drop),
        fs::read_dir(&outside).map(drop),
        fs::write(format!("{outside}/new"), ""),
        fs::create_dir(format!("{outside}/made")),
        symlink("x", format!("{outside}/link")),
        fs::rename(format!("{outside}/victim"), format!("{outside}/moved")),
        fs::hard_link(format!("{outside}/secret"), format!("{outside}/two")),
        fs::remove_file(format!("{outside}/secret")),
        File::open("/proc/self/exe").map(drop),
        File::options().write(true).open("/proc/self/mem").map(drop),
    ];
    let opened = ways.iter().filter(|way| way.is_ok()).count();
    let refused = |way: &&io::Result<()>| matches!(way, Err(error) if error.raw_os_error() == Some(libc::EACCES));
    match ways.iter().filter(refused).count() + opened {
        all if all == ways.len() => Ok((opened, all)),
        _ => Err(format!("{ways:?}")),
    }
}

#[test]
fn a_descriptor_from_outside_of_the_share_leads_nowhere() {
    if !has_landlock() {
        return;
    }
    isolated(|| match ways_out(&[])? {
        (0, _) => Ok(()),
        ways => Err(format!("ESCAPED: {ways:?}")),
    });
}

/// So that the test above proves something.
#[test]
fn without_landlock_it_leads_everywhere() {
    isolated(|| {
        as_without_landlock()?;
        match ways_out(&[Layer::Landlock])? {
            (opened, all) if opened == all => Ok(()),
            ways => Err(format!("{ways:?}")),
        }
    });
}

#[test]
fn a_kernel_without_landlock_is_refused() {
    isolated(|| {
        as_without_landlock()?;
        disk()?;
        match enter("/mnt", &[]) {
            Err(error @ JailError::NoLandlock(_)) => {
                let says = error.to_string();
                let all = ["booted without it", "lsm=", "accept_missing"];
                expect(all.iter().all(|word| says.contains(word)), &says)
            }
            other => Err(format!("{other:?}")),
        }
    });
}

/// All that the tree does with names, between directories too.
fn work_in(place: &str) -> Result<(), String> {
    let at = |name: &str| format!("{place}/{name}");
    for name in ["a", "b", "a/d"] {
        fs::create_dir(at(name)).map_err(text)?;
    }
    fs::write(at("a/f"), "12345").map_err(text)?;
    let object = path_only(&at("a/f"))?;
    fs::rename(at("a/f"), at("b/f")).map_err(text)?;
    expect(
        fs::read(through(&object)).map_err(text)? == b"12345",
        "a renamed file",
    )?;
    fs::hard_link(at("b/f"), at("a/g")).map_err(text)?;
    fs::rename(at("a/d"), at("b/d")).map_err(text)?;
    symlink("f", at("b/s")).map_err(text)?;
    fs::rename(at("b/s"), at("a/s")).map_err(text)?;
    nix::unistd::mkfifo(&*at("a/p"), Mode::S_IRWXU).map_err(text)?;
    fs::rename(at("a/p"), at("b/p")).map_err(text)?;
    drop(UnixListener::bind(at("a/u")).map_err(text)?);
    // overlayfs's whiteout; on an overlay itself nobody makes one.
    let char_device = nix::sys::stat::SFlag::S_IFCHR;
    match nix::sys::stat::mknod(&*at("a/w"), char_device, Mode::empty(), 0) {
        Err(Errno::EPERM) if place == "/share/root" => {}
        made => {
            made.map_err(text)?;
            fs::rename(at("a/w"), at("b/w")).map_err(text)?;
        }
    }
    // truncate(2), and by open(2) and ftruncate(2) what fs::write and set_len do.
    nix::unistd::truncate(&*through(&object), 3).map_err(text)?;
    let file = File::options()
        .write(true)
        .open(through(&object))
        .map_err(text)?;
    file.set_len(2).map_err(text)?;
    fs::write(at("a/g"), "1").map_err(text)?;
    expect(file.metadata().map_err(text)?.nlink() == 2, "links")?;
    // What has no name any more, in a directory that has none, is still opened by who knows it.
    fs::write(at("b/d/f"), "unlinked").map_err(text)?;
    let (directory, object) = (path_only(&at("b/d"))?, path_only(&at("b/d/f"))?);
    fs::remove_file(at("b/d/f")).map_err(text)?;
    fs::remove_dir(at("b/d")).map_err(text)?;
    expect(
        fs::read(through(&object)).map_err(text)? == b"unlinked",
        "an unlinked file",
    )?;
    File::options()
        .write(true)
        .open(through(&object))
        .map_err(text)?;
    expect(
        fs::read_dir(through(&directory)).map_err(text)?.count() == 0,
        "a removed directory",
    )?;
    // A file that never had a name gets one.
    let flags = OFlag::O_TMPFILE | OFlag::O_RDWR;
    let nameless = open(&*at("a"), flags, Mode::S_IRWXU).map_err(text)?;
    let here = nix::fcntl::AT_FDCWD;
    let follow = nix::fcntl::AtFlags::AT_SYMLINK_FOLLOW;
    nix::unistd::linkat(here, &*through(&nameless), here, &*at("b/named"), follow).map_err(text)?;
    fs::remove_dir_all(at("a")).map_err(text)?;
    fs::remove_dir_all(at("b")).map_err(text)
}

/// The host's side: mounts beneath the share when it is told to, and once more moves a file out of
/// a volume.
fn host(mut told: File, mut tell: File) -> Result<(), String> {
    const NONE: Option<&str> = None;
    let next = |told: &mut File| told.read_exact(&mut [0]).map_err(text);
    next(&mut told)?;
    mount(
        Some("volume"),
        "/mnt/share/later",
        Some("tmpfs"),
        MsFlags::empty(),
        NONE,
    )
    .map_err(text)?;
    fs::write("/mnt/share/later/f", "later").map_err(text)?;
    mount(
        Some("/mnt/host/sub"),
        "/mnt/share/bound",
        NONE,
        MsFlags::MS_BIND,
        NONE,
    )
    .map_err(text)?;
    mount(
        Some("/mnt/host/file"),
        "/mnt/share/file",
        NONE,
        MsFlags::MS_BIND,
        NONE,
    )
    .map_err(text)?;
    let layers = "lowerdir=/mnt/host/lower,upperdir=/mnt/host/upper,workdir=/mnt/host/work";
    if let Err(error) = mount(
        Some("overlay"),
        "/mnt/share/root",
        Some("overlay"),
        MsFlags::empty(),
        Some(layers),
    ) {
        eprintln!("SKIPPED: no overlay here ({error}); its place is a plain directory");
    }
    tell.write_all(b"m").map_err(text)?;
    next(&mut told)?;
    fs::rename("/mnt/host/sub/f", "/mnt/host/f").map_err(text)?;
    fs::rename("/mnt/host/sub/d", "/mnt/host/d").map_err(text)?;
    tell.write_all(b"r").map_err(text)
}

/// A mount that comes with the host's own flags is not noexec.
fn executes_nothing(path: &str) -> Result<(), String> {
    fs::write(path, "of no format, so that it never runs").map_err(text)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).map_err(text)?;
    let path = CString::new(path).map_err(text)?;
    match nix::unistd::execv(&path, &[&path]) {
        Err(Errno::EACCES) => Ok(()),
        // The kernel looks at a file's format once it may be executed.
        other => Err(format!("EXECUTED: {other:?}")),
    }
}

fn serve_what_comes_later() -> Result<(), String> {
    disk()?;
    let (shared, none) = (MsFlags::MS_SHARED, None::<&str>);
    mount(none, "/mnt", none, shared, none).map_err(text)?;
    for place in ["share/later", "share/bound", "share/root", "host/sub/d"] {
        fs::create_dir_all(format!("/mnt/{place}")).map_err(text)?;
    }
    for place in ["lower", "upper", "work"] {
        fs::create_dir(format!("/mnt/host/{place}")).map_err(text)?;
    }
    for place in ["share/file", "host/file", "host/sub/f", "host/lower/f"] {
        fs::write(format!("/mnt/{place}"), place).map_err(text)?;
    }
    let (told, tell_host) = pipe().map_err(text)?;
    let (mut told_us, tell) = pipe().map(|(a, b)| (File::from(a), b)).map_err(text)?;
    // SAFETY: this process has one thread; the child leaves by _exit.
    if let ForkResult::Child = unsafe { fork() }.map_err(text)? {
        drop(tell_host);
        let done = host(told.into(), tell.into()).inspect_err(|error| eprintln!("{error}"));
        // SAFETY: ends the child.
        unsafe { libc::_exit(i32::from(done.is_err())) }
    }
    drop((told, tell));
    let mut tell_host = File::from(tell_host);
    let mut ask = |word: &[u8]| {
        tell_host.write_all(word).map_err(text)?;
        told_us.read_exact(&mut [0]).map_err(text)
    };
    nix::sched::unshare(CloneFlags::CLONE_NEWNS).map_err(text)?;
    enter("/mnt/share", &[]).map_err(text)?;
    work_in(SHARE)?;
    ask(b"m")?;
    expect(
        fs::read("/share/later/f").map_err(text)? == b"later",
        "a mount that came",
    )?;
    for volume in ["later", "bound", "root"] {
        work_in(&format!("{SHARE}/{volume}")).map_err(|error| format!("{volume}: {error}"))?;
    }
    executes_nothing("/share/later/program")?;
    fs::write("/share/file", "a bound file").map_err(text)?;
    // Copied up, on an overlay.
    if std::path::Path::new("/share/root/f").exists() {
        fs::write("/share/root/f", "changed").map_err(text)?;
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").map_err(text)?;
    expect(mounts.contains("/share/later"), &mounts)?;
    let object = path_only("/share/bound/f")?;
    let directory = path_only("/share/bound/d")?;
    let open_file = File::open("/share/bound/f").map_err(text)?;
    ask(b"r")?;
    // Files that the host has moved out of the mount by which they came: what is open stays open,
    // and whether they open anew is the kernel's to say (ADR 13).
    expect(
        io::read_to_string(&open_file).map_err(text)? == "host/sub/f",
        "an open file",
    )?;
    let again = [
        fs::read(through(&object)).map(drop),
        fs::read_dir(through(&directory)).map(drop),
        fs::write(format!("{}/new", through(&directory)), ""),
    ];
    eprintln!("moved out of the mount: {again:?}");
    let is_told = |outcome: &io::Result<()>| match outcome {
        Ok(()) => true,
        Err(error) => error.raw_os_error() == Some(libc::EACCES),
    };
    expect(again.iter().all(is_told), &format!("{again:?}"))
}

#[test]
fn beneath_the_share_everything_works() {
    if !has_landlock() {
        return;
    }
    isolated(serve_what_comes_later);
}
