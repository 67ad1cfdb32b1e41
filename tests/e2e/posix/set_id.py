"""Which set-id bits and file capabilities are left when the content or the owner of a file changes, by whom and how.

usage: set_id.py DIRECTORY [few]        few: a tenth of the cases, one of each kind
"""

import ctypes
import errno
import mmap
import os
import stat
import sys

from users import as_user, call

USERS = {
    "root": (0, 0, [], True),
    "root without CAP_FSETID": (0, 0, [], False),
    "user": (1000, 1000, [], False),
    "user in the group": (1000, 1000, [3000], False),
    "user with CAP_FSETID": (1000, 1000, [], True),
}
# cap_net_bind_service+ep, revision 2.
CAPABILITY = bytes([1, 0, 0, 2, 0, 4] + [0] * 14)


def opened(action, flags=os.O_RDWR):
    def run(path):
        fd = os.open(path, flags)
        action(fd)
        os.close(fd)

    return run


def fallocate(mode):
    return opened(lambda fd: call("fallocate", fd, mode, ctypes.c_long(0), ctypes.c_long(4096)))


def copied(fd):
    source = os.open("source", os.O_RDONLY)
    assert os.copy_file_range(source, fd, 4096) > 0


def spliced(fd):
    here, there = os.pipe()
    os.write(there, b"x" * 100)
    assert os.splice(here, fd, 100) == 100


def sent(fd):
    source = os.open("source", os.O_RDONLY)
    assert os.sendfile(fd, source, 0, 4096) > 0


def mapped(fd):
    with mmap.mmap(fd, 4096) as pages:
        pages[0:1] = b"m"
        pages.flush()


WAYS = {
    "write": opened(lambda fd: os.write(fd, b"y")),
    "write of nothing": opened(lambda fd: os.write(fd, b"")),
    "append": opened(lambda fd: os.write(fd, b"y"), os.O_WRONLY | os.O_APPEND),
    "pwritev": opened(lambda fd: os.pwritev(fd, [b"a", b"b"], 10)),
    "direct write": opened(lambda fd: os.write(fd, mmap.mmap(-1, 4096)), os.O_RDWR | os.O_DIRECT),
    "open with O_TRUNC": opened(lambda fd: None, os.O_WRONLY | os.O_TRUNC),
    "truncate": lambda path: os.truncate(path, 100),
    "truncate to a larger size": lambda path: os.truncate(path, 10000),
    "ftruncate": opened(lambda fd: os.ftruncate(fd, 100)),
    "fallocate": fallocate(0),
    "fallocate that keeps the size": fallocate(1),
    "fallocate that punches a hole": fallocate(3),
    "fallocate that zeroes": fallocate(0x10),
    "copy_file_range": opened(copied),
    "splice": opened(spliced),
    "sendfile": opened(sent),
    "shared mapping": opened(mapped),
    "chown to oneself": lambda path: os.chown(path, os.geteuid(), -1),
    "chown of the group": lambda path: os.chown(path, -1, 1000 if os.geteuid() else 7),
    "chown of nothing": lambda path: os.chown(path, -1, -1),
    "chmod": lambda path: os.chmod(path, stat.S_IMODE(os.stat(path).st_mode)),
    "utime": lambda path: os.utime(path),
    "read": opened(lambda fd: os.read(fd, 10)),
}

FEW = (
    ("root", "root without CAP_FSETID", "user"),
    ("write", "open with O_TRUNC", "ftruncate", "fallocate", "fallocate that punches a hole", "copy_file_range", "splice", "chown to oneself"),
)


def has_capability(path):
    try:
        os.getxattr(path, "security.capability")
        return "with capability"
    except OSError as error:
        assert error.errno == errno.ENODATA, error
        return "without capability"


def main():
    os.chdir(sys.argv[1])
    with open("source", "wb") as source:
        source.write(b"s" * 8192)
    few = sys.argv[2:] == ["few"]
    for way, action in WAYS.items():
        for name, user in USERS.items():
            if few and (name not in FEW[0] or way not in FEW[1]):
                continue
            # The owner changes the owner; anybody may write.
            owner = user[0] if way.startswith("ch") or way == "utime" else 0
            # A set-group-id bit without the group's execute bit gives no rights, and a share leaves it alone.
            for mode, capability in ((0o6777, False), (0o2777, False), (0o777, True)):
                if capability and action is WAYS["shared mapping"]:
                    continue  # a share drops it when the pages are written back
                with open("f", "wb") as file:
                    file.write(b"f" * 8192)
                os.chown("f", owner, 3000)
                if capability:
                    os.setxattr("f", "security.capability", CAPABILITY)
                os.chmod("f", mode)
                answer = as_user(user, lambda: action("f"))
                left = f"{stat.S_IMODE(os.stat('f').st_mode):04o}"
                kept = has_capability("f") if capability else "-"
                print(f"{way} by {name}: {mode:04o} -> {left} {kept} {answer}")
                os.unlink("f")


if __name__ == "__main__":
    main()
