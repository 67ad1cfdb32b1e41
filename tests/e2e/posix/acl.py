"""Access control lists: who may do what by them, what is inherited, and how they change; by several users.

usage: acl.py outside DIRECTORY     makes files with lists, on the host
       acl.py inside DIRECTORY      tries them, makes more; prints one line each
       acl.py few DIRECTORY         the same with one umask and fewer users
"""

import os
import socket
import stat
import struct
import sys

from users import as_user, call

ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"
TAGS = {"u": 1, "U": 2, "g": 4, "G": 8, "m": 16, "o": 32}
ALICE = (1000, 1000, [], False)
BOB = (1001, 1001, [], False)
IN_GROUP = (1002, 1002, [5, 2000], False)
ROOT = (0, 0, [], True)
USERS = {"root": ROOT, "alice": ALICE, "bob": BOB, "in group 2000": IN_GROUP}


def packed(text):
    """`u:7 U1000:6 g:5 G2000:4 m:7 o:0`: capital letters are named users and groups."""
    data = struct.pack("<I", 2)
    for entry in text.split():
        name, rights = entry.split(":")
        data += struct.pack("<HHI", TAGS[name[0]], int(rights), int(name[1:] or 0xFFFFFFFF))
    return data


def acl(path, which=ACCESS):
    try:
        data = os.getxattr(path, which, follow_symlinks=False)
    except OSError as error:
        return os.strerror(error.errno)
    letters = {tag: letter for letter, tag in TAGS.items()}
    entries = struct.iter_unpack("<HHI", data[4:])
    return " ".join(f"{letters[tag]}{'' if id == 0xFFFFFFFF else id}:{rights}" for tag, rights, id in entries)


def put(path, mode=0o644, list=None, owner=(0, 0), default=None):
    with open(path, "w") as file:
        file.write("content of " + path)
    dress(path, mode, list, owner, default)


def folder(path, mode=0o755, list=None, owner=(0, 0), default=None):
    os.mkdir(path)
    dress(path, mode, list, owner, default)


def dress(path, mode, list, owner, default):
    os.chown(path, *owner)
    os.chmod(path, mode)
    if list:
        os.setxattr(path, ACCESS, packed(list))
    if default:
        os.setxattr(path, DEFAULT, packed(default))


def outside():
    put("denied to alice", 0o644, "u:6 U1000:0 g:4 m:4 o:4")
    put("for alice", 0o600, "u:6 U1000:4 g:0 m:4 o:0")
    put("for group 2000", 0o600, "u:6 g:0 G2000:6 m:6 o:0")
    put("denied to group 2000", 0o666, "u:6 g:6 G2000:0 m:6 o:6")
    put("masked", 0o600, "u:6 U1000:7 g:7 m:4 o:0")
    put("run by alice", 0o700, "u:7 U1000:5 g:0 m:5 o:0")
    with open("run by alice", "w") as file:
        file.write("#!/bin/sh\nexit 0\n")
    folder("closed to alice", 0o755, "u:7 U1000:0 g:5 m:5 o:5")
    put("closed to alice/f")
    folder("of alice", 0o700, "u:7 U1000:7 g:0 m:7 o:0")
    put("of alice/f")
    folder("heirs", 0o777, None, (0, 0), "u:7 U1000:7 g:5 G2000:6 m:7 o:0")
    folder("plain", 0o777)


def opened(path, flags):
    return lambda: os.close(os.open(path, flags)) or "ok"


def ran(path):
    def run():
        status = os.spawnl(os.P_WAIT, "./" + path, path)
        return f"status {status}"

    return run


def show(path):
    info = os.lstat(path)
    default = acl(path, DEFAULT) if stat.S_ISDIR(info.st_mode) else "-"
    print(f"    {path}: {info.st_mode:o} {info.st_uid}:{info.st_gid} access [{acl(path)}] default [{default}]")


def try_what_the_host_has_set():
    for path in sorted(os.listdir(".")):
        show(path)
        for name, user in USERS.items():
            if os.path.isdir(path):
                answers = [
                    as_user(user, lambda: os.listdir(path) and "ok"),
                    as_user(user, lambda: os.stat(path + "/f") and "ok"),
                    as_user(user, lambda: os.mkdir(path + "/new") or os.rmdir(path + "/new") or "ok"),
                    as_user(user, lambda: os.chdir(path) or "ok"),
                ]
            else:
                answers = [
                    as_user(user, opened(path, os.O_RDONLY)),
                    as_user(user, opened(path, os.O_WRONLY)),
                    as_user(user, lambda: os.truncate(path, 0 if "run" not in path else 18) or "ok"),
                    as_user(user, ran(path)) if "run" in path else "-",
                ]
            answers += [as_user(user, lambda: [os.access(path, mask) for mask in (os.R_OK, os.W_OK, os.X_OK)])]
            print(f"{path} by {name}:", *answers)


def make_all(place):
    os.close(os.open(f"{place}/file", os.O_CREAT | os.O_WRONLY, 0o666))
    os.close(os.open(f"{place}/private", os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600))
    os.mkdir(f"{place}/dir", 0o777)
    os.mkdir(f"{place}/dir/dir", 0o770)
    os.close(os.open(f"{place}/dir/dir/file", os.O_CREAT | os.O_WRONLY, 0o777))
    os.mkfifo(f"{place}/fifo", 0o666)
    os.mknod(f"{place}/node", 0o666 | stat.S_IFREG)
    os.symlink("file", f"{place}/symlink")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{place}/socket")
    fd = os.open(place, os.O_TMPFILE | os.O_RDWR, 0o666)
    call("linkat", -100, f"/proc/self/fd/{fd}".encode(), -100, f"{place}/unnamed".encode(), 0x400)
    os.close(fd)
    return "ok"


def what_is_inherited(masks):
    for mask in masks:
        for parent in ("heirs", "plain"):
            for name, user in USERS.items():
                place = f"{parent}/{mask:o} {name}"
                os.mkdir(place)
                os.chmod(place, 0o777)

                def make():
                    os.umask(mask)
                    return make_all(place)

                print(f"made in {place}:", as_user(user, make))
                for path, dirs, files in sorted(os.walk(place)):
                    for entry in sorted(dirs + files):
                        show(os.path.join(path, entry))


def change_what_there_is():
    def step(what, user, action):
        answer = as_user(user, lambda: action() or "ok")
        print(what + ":", answer)
        show(path)

    path = "changed"
    put(path, 0o640, "u:6 U1000:7 g:4 m:6 o:0", owner=(1000, 3000))
    step("chmod 600 sets the mask", ALICE, lambda: os.chmod(path, 0o600))
    print("    by the named user's list:", as_user(BOB, opened(path, os.O_RDONLY)))
    step("chmod 664", ALICE, lambda: os.chmod(path, 0o664))
    step("bob may not chmod", BOB, lambda: os.chmod(path, 0o666))
    step("bob may not set a list", BOB, lambda: os.setxattr(path, ACCESS, packed("u:6 U1001:6 g:4 m:6 o:0")))
    step("alice lets bob in", ALICE, lambda: os.setxattr(path, ACCESS, packed("u:6 U1001:6 g:4 m:6 o:0")))
    print("    bob:", as_user(BOB, opened(path, os.O_RDWR)))
    step("a list that is none", ALICE, lambda: os.setxattr(path, ACCESS, packed("u:6 U1001:6 g:4 o:0")))
    step("no list but a mode", ALICE, lambda: os.setxattr(path, ACCESS, packed("u:6 g:4 o:4")))
    print("    bob:", as_user(BOB, opened(path, os.O_RDWR)))
    step("a default list on a file", ALICE, lambda: os.setxattr(path, DEFAULT, packed("u:6 g:4 o:0")))
    step("root's list", ROOT, lambda: os.setxattr(path, ACCESS, packed("u:6 G2000:6 g:4 m:6 o:0")))
    print("    in group 2000:", as_user(IN_GROUP, opened(path, os.O_RDWR)))
    step("bob may not remove it", BOB, lambda: os.removexattr(path, ACCESS))
    step("removed", ALICE, lambda: os.removexattr(path, ACCESS))
    step("chown keeps the rest", ROOT, lambda: os.chown(path, 1001, -1))


def set_group_id_goes_with_a_list():
    for kind in ("file", "dir"):
        for list in ("u:7 U5:7 g:5 m:7 o:5", "u:7 g:5 o:5"):
            for which in (ACCESS, DEFAULT) if kind == "dir" else (ACCESS,):
                for name, groups in (("outside of the group", []), ("in the group", [3000])):
                    (put if kind == "file" else folder)("sgid", owner=(1000, 3000))
                    os.chmod("sgid", 0o2755)
                    user = (1000, 1000, groups, False)
                    answer = as_user(user, lambda: os.setxattr("sgid", which, packed(list)) or "ok")
                    print(f"{kind} [{list}] {which} by the owner {name}:", answer)
                    show("sgid")
                    (os.unlink if kind == "file" else os.rmdir)("sgid")
    # What a member makes in a directory of the group may have the bit.
    folder("shared", 0o2777, owner=(0, 3000))
    for name, groups in (("outside of the group", []), ("in the group", [3000])):

        def make():
            os.umask(0)
            os.close(os.open("shared/" + name, os.O_CREAT | os.O_WRONLY, 0o2755))
            return "ok"

        print("made with the bit", name + ":", as_user((1000, 1000, groups, False), make))
        show("shared/" + name)


if __name__ == "__main__":
    phase, directory = sys.argv[1:]
    os.umask(0o022)
    os.chdir(directory)
    os.chmod(".", 0o777)
    if phase == "outside":
        outside()
    else:
        if phase == "few":
            del USERS["root"], USERS["bob"]
        try_what_the_host_has_set()
        what_is_inherited((0o027,) if phase == "few" else (0o000, 0o027, 0o077))
        change_what_there_is()
        set_group_id_goes_with_a_list()
