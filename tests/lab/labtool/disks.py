"""What one run brings along, as disk images: the installed build, the repository, a copy of --share, and room for /out."""

import os
import subprocess
from pathlib import Path

from .image import LAB_DIR
from .qemu import SLOT_BYTES, unlinked_file
from .report import LabError

# Left in the guest's copy of --share beyond what it holds; the file behind it is sparse.
SHARE_FREE_MIB = 8192


class Disks:
    """The disk slots of one run: name -> descriptor of an unlinked image file."""

    def __init__(self, tools, scratch):
        self._tools = tools
        self._scratch = scratch
        self.slots = {}

    def add_tree(self, name, directory):
        """A read-only copy of a directory as it is, owned by root."""
        directory = existing_directory(directory)
        fd = self._new(name)
        self._tools.run("usr/bin/mkfs.erofs", "--quiet", "--all-root", f"/proc/{os.getpid()}/fd/{fd}", directory)
        os.truncate(fd, SLOT_BYTES)

    def add_repository(self):
        """The checkout that this tool belongs to: what git tracks or would track, as it is in the work tree now."""
        fd = self._new("src")
        top, names = repository_files()
        tar = subprocess.Popen(
            # A file may vanish between the listing and now: the work tree is alive.
            ["tar", "--create", "--file=-", f"--directory={top}", "--ignore-failed-read", "--null", "--no-recursion",
             "--verbatim-files-from", "--files-from=-"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        maker = subprocess.Popen(
            self._tools.command("usr/bin/mkfs.erofs", "--quiet", "--all-root", "--tar=f",
                                f"/proc/{os.getpid()}/fd/{fd}"),
            stdin=tar.stdout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        tar.stdout.close()
        tar.stdin.write(b"\0".join(names))
        tar.stdin.close()
        said = maker.stdout.read().decode(errors="replace").strip()
        if maker.wait() != 0 or tar.wait() != 0:
            raise LabError(f"cannot pack the repository {top} for /src: {said[-1000:]}")
        os.truncate(fd, SLOT_BYTES)

    def add_share(self, directory):
        """A writable copy of a directory, with owners, modes, xattrs and hard links, and free room."""
        directory = existing_directory(directory)
        fd = self._new("share")
        os.truncate(fd, SLOT_BYTES)
        used = subprocess.run(["du", "--summarize", "--block-size=1M", str(directory)], capture_output=True, text=True)
        if used.returncode != 0:
            raise LabError(f"cannot read all of --share {directory}: {used.stderr.strip()}")
        size = int(used.stdout.split()[0]) * 5 // 4 + SHARE_FREE_MIB
        if size > SLOT_BYTES >> 20:
            raise LabError(f"--share {directory} is too large for the lab: {used.stdout.split()[0]} MiB")
        # No journal: the lab does not outlive a crash. The inode tables are zero already, the file being new.
        self._tools.run("usr/sbin/mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0",
                        "-E", "assume_storage_prezeroed=1,root_owner=0:0", "-d", directory, "-F", f"/proc/{os.getpid()}/fd/{fd}",
                        f"{size}M")

    def add_out(self):
        """Room for what the command leaves in /out."""
        os.truncate(self._new("out"), SLOT_BYTES)

    def take_out(self, length, target):
        """Unpacks what the guest wrote to the out disk into a directory on this host."""
        target = Path(target)
        target.mkdir(parents=True, exist_ok=True)
        if length == 0:
            return
        fd = self.slots["out"]
        os.truncate(fd, length)
        os.lseek(fd, 0, os.SEEK_SET)
        unpack = ["tar", "--extract", "--sparse", "--no-same-owner", "--no-overwrite-dir", "--file=-", f"--directory={target}"]
        done = subprocess.run(unpack, stdin=fd, capture_output=True, text=True)
        if done.returncode != 0:
            raise LabError(f"cannot unpack /out into {target}: {done.stderr.strip()[-1000:]}")

    def _new(self, name):
        self.slots[name] = unlinked_file(self._scratch)
        return self.slots[name]


def existing_directory(path):
    """The path, or a clear error when it is no directory."""
    path = Path(path).absolute()
    if not path.is_dir():
        raise LabError(f"{path} is not a directory")
    return path


def repository_files():
    """The top of the checkout and the names beneath it (bytes) that /src shows."""
    git = ["git", "-c", "safe.directory=*", "-C", str(LAB_DIR)]
    top = subprocess.run([*git, "rev-parse", "--show-toplevel"], capture_output=True, text=True)
    if top.returncode != 0:
        raise LabError(f"{LAB_DIR} is in no git checkout, so /src cannot be made: {top.stderr.strip()}")
    top = top.stdout.strip()
    listing = subprocess.run([*git, "-C", top, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--deduplicate"],
                             capture_output=True)
    if listing.returncode != 0:
        raise LabError(f"git cannot list the files of {top}: {listing.stderr.decode(errors='replace').strip()}")
    # A file that is deleted but still in the index is listed too.
    top_bytes = os.fsencode(top) + b"/"
    names = [name for name in listing.stdout.split(b"\0") if name and os.path.lexists(top_bytes + name)]
    # git lists no directories, and mkfs.erofs would make those up as mode 0777.
    parents = {b"."}
    for name in names:
        while name := os.path.dirname(name):
            parents.add(name)
    return top, [*sorted(parents), *names]
