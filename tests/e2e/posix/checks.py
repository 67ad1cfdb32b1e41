"""What programs expect of a file system; run inside a container on a directory, prints one line a check.

usage: checks.py DIRECTORY ENTRIES
"""

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import sys
import threading

libc = ctypes.CDLL(None, use_errno=True)
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2


def renameat2(old, new, flags):
    if libc.renameat2(-100, old.encode(), -100, new.encode(), flags) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def fails(expected, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except OSError as error:
        assert error.errno == expected, f"{errno.errorcode[error.errno]} instead of {errno.errorcode[expected]}"
        return
    raise AssertionError(f"no {errno.errorcode[expected]}")


def put(path, data=b"x"):
    with open(path, "wb") as file:
        file.write(data)


def get(path):
    with open(path, "rb") as file:
        return file.read()


def as_user(uid, gid, groups, action):
    """Runs action in a child with these credentials; its assertion failures become ours."""
    child = os.fork()
    if child == 0:
        try:
            os.setgroups(groups)
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
            action()
            os._exit(0)
        except BaseException as error:  # the child's verdict is its exit status
            print(f"uid {uid}: {error!r}", file=sys.stderr)
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def check_modes_and_umask():
    os.umask(0o027)
    put("f")
    os.mkdir("d")
    assert stat.S_IMODE(os.stat("f").st_mode) == 0o640
    assert stat.S_IMODE(os.stat("d").st_mode) == 0o750
    os.chmod("f", 0o4711)
    assert stat.S_IMODE(os.stat("f").st_mode) == 0o4711
    os.umask(0o022)


def check_ownership_by_the_calling_user():
    os.mkdir("open", 0o777)
    os.chmod("open", 0o777)

    def make():
        put("open/theirs")
        os.mkdir("open/dir")
        os.symlink("theirs", "open/link")
        os.mkfifo("open/fifo")

    as_user(1234, 4321, [], make)
    for name in ("theirs", "dir", "link", "fifo"):
        owner = os.lstat(f"open/{name}")
        assert (owner.st_uid, owner.st_gid) == (1234, 4321), name
    os.chown("open/theirs", 7, 8)
    assert (os.stat("open/theirs").st_uid, os.stat("open/theirs").st_gid) == (7, 8)


def check_permissions_are_enforced():
    put("secret")
    os.chmod("secret", 0o600)
    put("group")
    os.chown("group", 0, 500)
    os.chmod("group", 0o060)
    os.mkdir("closed", 0o700)
    as_user(1000, 1000, [], lambda: fails(errno.EACCES, open, "secret"))
    as_user(1000, 1000, [], lambda: fails(errno.EACCES, put, "closed/new"))
    as_user(1000, 1000, [], lambda: fails(errno.EACCES, os.stat, "closed/any"))
    as_user(1000, 1000, [500], lambda: get("group"))
    as_user(1000, 1000, [], lambda: fails(errno.EPERM, os.chmod, "secret", 0o777))


def check_setgid_directories():
    os.mkdir("sg")
    os.chown("sg", 0, 600)
    os.chmod("sg", 0o2777)

    def make():
        put("sg/f")
        os.mkdir("sg/d")

    as_user(1000, 1000, [], make)
    assert os.stat("sg/f").st_gid == 600
    assert os.stat("sg/d").st_gid == 600 and os.stat("sg/d").st_mode & stat.S_ISGID


def check_setuid_is_cleared_by_a_write():
    put("suid")
    os.chown("suid", 1000, 1000)
    os.chmod("suid", 0o6777)

    def write():
        with open("suid", "ab") as file:
            file.write(b"more")

    as_user(2000, 2000, [], write)
    assert stat.S_IMODE(os.stat("suid").st_mode) == 0o777


def check_sticky_directories():
    os.mkdir("sticky")
    os.chmod("sticky", 0o1777)
    put("sticky/f")
    as_user(1000, 1000, [], lambda: fails(errno.EPERM, os.unlink, "sticky/f"))


def check_hard_links():
    put("a", b"one")
    os.link("a", "b")
    assert os.stat("a").st_ino == os.stat("b").st_ino and os.stat("a").st_nlink == 2
    put("b", b"two")
    assert get("a") == b"two"
    os.unlink("a")
    assert os.stat("b").st_nlink == 1


def check_symbolic_links():
    os.symlink("target/" + "x" * 200, "l")
    assert os.readlink("l") == "target/" + "x" * 200
    os.symlink("loop", "loop")
    fails(errno.ELOOP, open, "loop")
    os.symlink("/etc/passwd", "abs")
    assert b"root" in get("abs")


def check_rename_flags():
    put("x", b"x")
    put("y", b"y")
    fails(errno.EEXIST, renameat2, "x", "y", RENAME_NOREPLACE)
    renameat2("x", "y", RENAME_EXCHANGE)
    assert (get("x"), get("y")) == (b"y", b"x")
    renameat2("x", "z", RENAME_NOREPLACE)
    os.rename("z", "y")
    assert get("y") == b"y" and not os.path.exists("z")
    os.mkdir("full")
    put("full/f")
    os.mkdir("e")
    fails(errno.ENOTEMPTY, os.rename, "e", "full")
    fails(errno.EINVAL, os.rename, "full", "full/in")


def check_rename_over_an_open_file():
    put("old", b"old")
    put("new", b"new")
    with open("old", "rb") as file:
        os.rename("new", "old")
        assert file.read() == b"old"
    assert get("old") == b"new"


def check_extended_attributes():
    put("f")
    os.setxattr("f", "user.one", b"1")
    os.setxattr("f", "user.big", b"b" * 3000)
    assert os.getxattr("f", "user.big") == b"b" * 3000
    assert sorted(os.listxattr("f")) == ["user.big", "user.one"]
    fails(errno.EEXIST, os.setxattr, "f", "user.one", b"2", os.XATTR_CREATE)
    fails(errno.ENODATA, os.setxattr, "f", "user.two", b"2", os.XATTR_REPLACE)
    os.removexattr("f", "user.one")
    fails(errno.ENODATA, os.getxattr, "f", "user.one")


def check_sparse_files():
    with open("sparse", "wb") as file:
        file.truncate(1 << 30)
        file.seek(512 << 20)
        file.write(b"data")
        file.flush()
        os.fsync(file.fileno())
        assert os.lseek(file.fileno(), 0, os.SEEK_DATA) in range((512 << 20) - 65536, (512 << 20) + 1)
        assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == 0
        fails(errno.ENXIO, os.lseek, file.fileno(), 1 << 30, os.SEEK_DATA)
    assert os.stat("sparse").st_blocks * 512 < 1 << 20


def check_fallocate():
    with open("f", "wb+") as file:
        fd = file.fileno()
        os.posix_fallocate(fd, 0, 1 << 20)
        assert os.fstat(fd).st_size == 1 << 20 and os.fstat(fd).st_blocks * 512 >= 1 << 20
        os.pwrite(fd, b"a" * 8192, 0)
        assert libc.fallocate(fd, 3, ctypes.c_long(0), ctypes.c_long(4096)) == 0  # KEEP_SIZE | PUNCH_HOLE
        assert os.pread(fd, 8192, 0) == b"\0" * 4096 + b"a" * 4096


def check_tmpfile():
    fd = os.open(".", os.O_TMPFILE | os.O_RDWR, 0o600)
    os.write(fd, b"unnamed")
    assert os.fstat(fd).st_nlink == 0 and os.listdir(".") == []
    # os.link does not pass AT_SYMLINK_FOLLOW.
    assert libc.linkat(-100, f"/proc/self/fd/{fd}".encode(), -100, b"named", 0x400) == 0
    os.close(fd)
    assert get("named") == b"unnamed"


def check_mmap_shared_and_private():
    put("m", b"0" * 10000)
    with open("m", "r+b") as file:
        with mmap.mmap(file.fileno(), 10000, mmap.MAP_PRIVATE) as private:
            private[0:4] = b"priv"
        assert get("m")[:4] == b"0000"
        with mmap.mmap(file.fileno(), 10000) as shared:
            shared[5000:5006] = b"shared"
            shared.flush()
    assert get("m")[5000:5006] == b"shared"


def check_append_and_truncate():
    put("log")
    writers = [os.open("log", os.O_WRONLY | os.O_APPEND) for _ in range(4)]
    for i in range(100):
        os.write(writers[i % 4], b"%04d\n" % i)
    assert len(get("log")) == 501
    os.truncate("log", 10)
    assert os.stat("log").st_size == 10
    os.truncate("log", 20)
    assert get("log")[10:] == b"\0" * 10
    for fd in writers:
        os.close(fd)


def check_times():
    put("t")
    os.utime("t", ns=(1_000_000_001, 2_000_000_002))
    seen = os.stat("t")
    assert (seen.st_atime_ns, seen.st_mtime_ns) == (1_000_000_001, 2_000_000_002)
    put("t", b"new")
    assert os.stat("t").st_mtime_ns > 2_000_000_002


def check_many_entries():
    count = int(sys.argv[2])
    os.mkdir("many")
    here = os.open("many", os.O_RDONLY)
    for i in range(count):
        os.close(os.open(f"entry-{i:06}", os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=here))
    names = os.listdir("many")
    assert len(names) == count and len(set(names)) == count
    for name in names:
        os.unlink(name, dir_fd=here)
    os.close(here)
    os.rmdir("many")


def check_names_of_255_bytes():
    put("n" * 255)
    fails(errno.ENAMETOOLONG, put, "n" * 256)
    put("\u00e9" * 127)
    put(b"\xff\xfe raw \n name".decode("utf-8", "surrogateescape"))
    assert len(os.listdir(".")) == 3


def check_more_files_open_than_1024():
    files = [os.open(f"f{i}", os.O_CREAT | os.O_RDWR) for i in range(3000)]
    for i, fd in enumerate(files):
        os.write(fd, str(i).encode())
    assert os.pread(files[2999], 10, 0) == b"2999"
    for fd in files:
        os.close(fd)


def check_a_file_deleted_while_open():
    fd = os.open("gone", os.O_CREAT | os.O_RDWR)
    os.write(fd, b"still here")
    os.unlink("gone")
    assert os.pread(fd, 20, 0) == b"still here" and os.fstat(fd).st_nlink == 0
    os.fchmod(fd, 0o600)
    os.ftruncate(fd, 5)
    assert os.fstat(fd).st_size == 5
    os.close(fd)


def check_a_directory_removed_while_open():
    os.mkdir("d")
    fd = os.open("d", os.O_RDONLY)
    os.rmdir("d")
    fails(errno.ENOENT, os.open, "x", os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=fd)
    os.close(fd)


def check_locks_exclude():
    put("lock")
    one, two = os.open("lock", os.O_RDWR), os.open("lock", os.O_RDWR)
    fcntl.flock(one, fcntl.LOCK_EX)
    fails(errno.EAGAIN, fcntl.flock, two, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(one, fcntl.LOCK_UN)
    fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(two, fcntl.LOCK_UN)
    fcntl.lockf(one, fcntl.LOCK_EX, 10, 0)

    def other():
        fd = os.open("lock", os.O_RDWR)
        fails(errno.EAGAIN, fcntl.lockf, fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 5, 0)
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 5, 20)

    as_user(0, 0, [], other)
    os.close(one)
    os.close(two)


def check_special_files():
    os.mkfifo("fifo")
    got = []
    reader = threading.Thread(target=lambda: got.append(get("fifo")))
    reader.start()
    put("fifo", b"through")
    reader.join()
    assert got == [b"through"]
    import socket

    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind("socket")
        server.listen()
        client.connect("socket")
        client.send(b"hi")
        assert server.accept()[0].recv(2) == b"hi"


def check_big_sequential_io():
    block = os.urandom(1 << 20)
    with open("big", "wb", buffering=0) as file:
        for _ in range(64):
            file.write(block)
    with open("big", "rb", buffering=0) as file:
        for _ in range(64):
            assert file.read(1 << 20) == block
        assert file.read(1) == b""


def check_direct_io():
    fd = os.open("direct", os.O_CREAT | os.O_RDWR | os.O_DIRECT)
    buffer = mmap.mmap(-1, 65536)
    buffer[:] = b"d" * 65536
    assert os.pwritev(fd, [buffer], 0) == 65536
    buffer[:] = b"\0" * 65536
    assert os.preadv(fd, [buffer], 0) == 65536 and buffer[:10] == b"d" * 10
    os.close(fd)


def check_statfs_and_access():
    assert os.statvfs(".").f_bsize > 0 and os.statvfs(".").f_namemax == 255
    put("x")
    os.chmod("x", 0o644)
    assert not os.access("x", os.X_OK)


def check_errors():
    fails(errno.ENOENT, open, "absent")
    fails(errno.ENOTDIR, open, "/etc/passwd/x")
    os.mkdir("d")
    fails(errno.EISDIR, put, "d")
    fails(errno.EEXIST, os.mkdir, "d")
    fails(errno.EPERM if sys.platform != "linux" else errno.EISDIR, os.unlink, "d")
    put("f")
    fails(errno.ENOTDIR, os.rmdir, "f")
    fails(errno.EEXIST, os.open, "f", os.O_CREAT | os.O_EXCL)


def main():
    root = sys.argv[1]
    failed = 0
    for name, check in list(globals().items()):
        if not name.startswith("check_"):
            continue
        home = os.path.join(root, name)
        os.mkdir(home)
        os.chdir(home)
        os.umask(0o022)
        try:
            check()
            print("ok", name[6:])
        except BaseException as error:  # a failure of one check must not hide the others
            failed += 1
            print("FAILED", name[6:], repr(error))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
