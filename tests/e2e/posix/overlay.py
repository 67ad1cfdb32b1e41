"""overlayfs and `trusted.*` attributes on a directory: what mounts, and what it leaves in its upper layer.

usage: overlay.py DIRECTORY        in a mount namespace of its own, with CAP_SYS_ADMIN
"""

import errno
import os
import stat
import subprocess
import sys

from users import as_user, call

NOBODY = (1000, 1000, [], False)


def answer(action):
    try:
        return action()
    except OSError as error:
        return errno.errorcode[error.errno]


def put(path, text="1"):
    with open(path, "w") as file:
        file.write(text)


def get(path):
    with open(path) as file:
        return file.read()


def mount(options, point="m"):
    done = subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, point], stderr=subprocess.DEVNULL)
    print(f"mount {options}: status {done.returncode}")
    return done.returncode == 0


def unmount(point="m"):
    call("umount2", point.encode(), 0)


def show(top):
    """Types, and the attributes by which overlayfs knows; their values where they are not handles or random."""
    for path, dirs, files in sorted(os.walk(top)):
        for name in sorted(dirs + files):
            entry = os.path.join(path, name)
            info = os.lstat(entry)
            device = f" {os.major(info.st_rdev)}:{os.minor(info.st_rdev)}" if stat.S_ISCHR(info.st_mode) else ""
            names = sorted(answer(lambda: os.listxattr(entry, follow_symlinks=False)))
            # Where the upper layer has no file handles (a share), nothing has an origin.
            known = {n: answer(lambda: os.getxattr(entry, n, follow_symlinks=False)) for n in names if "opaque" in n or "redirect" in n}
            print(f"    {entry}: {info.st_mode:o}{device}", known)


def layers():
    for path in ("l", "u", "w", "m"):
        os.mkdir(path)
    for name in ("a", "b", "c", "linked"):
        put("l/" + name, name)
    os.link("l/linked", "l/other name")
    os.symlink("a", "l/symlink")
    os.mkfifo("l/fifo")
    os.makedirs("l/d/e")
    put("l/d/x")
    os.makedirs("l/moved")
    put("l/moved/y")
    os.setxattr("l/b", "user.colour", b"blue")


def work(name):
    os.unlink("m/a")
    print("whiteout:", os.path.exists("m/a"), stat.S_ISCHR(os.lstat("u/a").st_mode), os.lstat("u/a").st_rdev)
    put("m/a", "new")
    os.unlink("m/a")
    os.rename("m/c", "m/renamed")
    put("m/b", "changed")
    print("attribute copied up:", os.getxattr("m/b", "user.colour"))
    os.chmod("m/linked", 0o600)
    os.lchown("m/symlink", 7, 7)
    os.chmod("m/fifo", 0o600)
    subprocess.run(["rm", "-r", "m/d"], check=True)
    os.mkdir("m/d")
    print("opaque:", os.listdir("m/d"))
    print("rename of a directory below:", answer(lambda: os.rename("m/moved", "m/there")))
    put("m/made")
    os.mkdir("m/dir")
    put("m/dir/f")
    os.rename("m/dir", "m/dir2")
    fd = os.open("m", os.O_TMPFILE | os.O_RDWR, 0o600)
    os.close(fd)


def check_overlay(options):
    print(f"== {options or 'defaults'}")
    here = options.replace(",", " ") or "defaults"
    os.mkdir(here)
    os.chdir(here)
    layers()
    both = "lowerdir=l,upperdir=u,workdir=w" + (options and "," + options)
    if mount(both):
        work(options)
        unmount()
        show("u")
        # What was left in the upper layer means the same to the next mount.
        if mount(both):
            print("again:", sorted(os.listdir("m")), sorted(os.listdir("m/d")), get("m/b"))
            unmount()
    os.chdir("..")


def check_trusted():
    print("== trusted.*")
    put("f")
    os.setxattr("f", "trusted.t", b"1")
    os.setxattr("f", "user.u", b"2")
    print(os.getxattr("f", "trusted.t"), sorted(os.listxattr("f")))
    print("flags:", answer(lambda: os.setxattr("f", "trusted.t", b"2", os.XATTR_CREATE)), answer(lambda: os.setxattr("f", "trusted.n", b"2", os.XATTR_REPLACE)))
    print("by a user:", as_user(NOBODY, lambda: os.getxattr("f", "trusted.t")), as_user(NOBODY, lambda: os.setxattr("f", "trusted.t", b"3")))
    os.removexattr("f", "trusted.t")
    print("removed:", answer(lambda: os.getxattr("f", "trusted.t")), answer(lambda: os.removexattr("f", "trusted.t")))
    print("large:", answer(lambda: os.setxattr("f", "trusted.large", b"l" * 2000)), len(os.getxattr("f", "trusted.large")))
    os.mkdir("dir")
    os.setxattr("dir", "trusted.d", b"d")
    print("directory:", os.listxattr("dir"))


def check_in_a_user_namespace():
    print("== userxattr in a user namespace")
    os.mkdir("userns")
    os.chdir("userns")
    layers()
    script = """mount -t overlay o -o userxattr,lowerdir=l,upperdir=u,workdir=w m && rm m/a && rm -r m/d && mkdir m/d
        stat -c '%F %t:%T' u/a; ls m/d; umount m"""
    done = subprocess.run(["unshare", "-Urm", "sh", "-c", script], stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True)
    print(done.returncode, done.stdout)
    print(os.getxattr("u/d", "user.overlay.opaque"))
    os.chdir("..")


def main():
    os.chdir(sys.argv[1])
    os.umask(0o022)
    check_trusted()
    for options in ("", "redirect_dir=on", "metacopy=on,redirect_dir=on", "volatile"):
        check_overlay(options)
    check_in_a_user_namespace()


if __name__ == "__main__":
    main()
