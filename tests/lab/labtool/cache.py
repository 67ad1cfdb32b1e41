"""Directories on this host that are expensive to make, keyed by a hash of their inputs.

An entry is `<cache>/<kind>/<name>-<key>`. It is made in `<entry>.partial` under an exclusive lock on `<entry>.lock` and renamed
into place, so a reader sees a whole entry or none and two builders do not clash. Users hold the lock shared, so that
pruning (which needs it exclusive) never takes an entry away from a running lab.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
from pathlib import Path

from .report import say

KEY_DIGITS = 16
# Entries of one name that stay: the current one and those of a branch or two.
KEEP = 3
# `lab root` hands out a path and ends, so its lock says nothing about who still works in it: recent use does.
RECENT_SECONDS = 6 * 3600


def base():
    """The cache directory: $BULKHEAD_CACHE, else $XDG_CACHE_HOME/bulkhead, else ~/.cache/bulkhead."""
    explicit = os.environ.get("BULKHEAD_CACHE")
    if explicit:
        return Path(explicit).absolute()
    parent = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(parent).absolute() / "bulkhead"


def key_of(*parts):
    """A short hash over strings, bytes and files (given as Path: their content counts, not their place)."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.read_bytes() if isinstance(part, Path) else part
        data = data.encode() if isinstance(data, str) else data
        # The length keeps ("ab", "c") and ("a", "bc") apart.
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()[:KEY_DIGITS]


class Entry:
    """One cached directory, by kind ("debian", "lab"), name ("kernel-root") and key."""

    def __init__(self, kind, name, key):
        self.kind_dir = base() / kind
        self.name = name
        self.path = self.kind_dir / f"{name}-{key}"
        self._lock_path = self.kind_dir / f"{name}-{key}.lock"
        self._partial = self.kind_dir / f"{name}-{key}.partial"
        self._lock = None

    def ensure(self, make):
        """Returns the entry's path, held shared until `release` or exit; `make(partial_dir)` fills it when it is missing."""
        self.kind_dir.mkdir(parents=True, exist_ok=True)
        while True:
            self._take(fcntl.LOCK_SH)
            if self.path.is_dir():
                os.utime(self.path)
                return self.path
            self.release()
            self._build(make)

    def release(self):
        """Gives the shared lock back: pruning may take the entry when it is old enough."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _build(self, make):
        self._take(fcntl.LOCK_EX)
        try:
            if self.path.is_dir():
                return  # another process made it while we waited
            # Under the exclusive lock a partial directory can only be what a killed build left.
            remove_tree(self._partial)
            self._partial.mkdir()
            try:
                make(self._partial)
                os.rename(self._partial, self.path)
            except BaseException:
                remove_tree(self._partial)
                raise
        finally:
            self.release()
        prune(self.kind_dir, self.name, self.path)

    def _take(self, how):
        """Locks the lock file that has the name now: a pruner may have removed the one that was opened."""
        while True:
            fd = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(fd, how | fcntl.LOCK_NB)
            except BlockingIOError:
                if how == fcntl.LOCK_EX or not self.path.is_dir():
                    say(f"waiting for another process that prepares {self.path.name}")
                fcntl.flock(fd, how)
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(fd).st_ino == os.stat(self._lock_path).st_ino:
                    self._lock = fd
                    return
            os.close(fd)


def prune(kind_dir, name, current):
    """Removes entries of `name` that nobody used lately: all but the newest, never a locked or a recent one."""
    entries = []
    for path in kind_dir.iterdir():
        # The key has a fixed length, so "lab" does not match "lab-extra-<key>".
        is_entry = path.name.startswith(f"{name}-") and len(path.name) == len(name) + 1 + KEY_DIGITS
        if is_entry and path != current:
            entries.append((path.stat().st_mtime, path))
    for mtime, path in sorted(entries, reverse=True)[KEEP - 1:]:
        if time.time() - mtime > RECENT_SECONDS:
            _remove_unlocked(path)


def _remove_unlocked(path):
    lock_path = path.with_name(path.name + ".lock")
    fd = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        say(f"pruning {path.name}, unused for {(time.time() - path.stat().st_mtime) / 3600:.0f} hours")
        remove_tree(path)
        lock_path.unlink()
    except (BlockingIOError, FileNotFoundError):
        pass  # in use, or another pruner was faster
    finally:
        os.close(fd)


def remove_tree(path):
    """Removes a directory tree that may not exist."""
    if path.exists():
        shutil.rmtree(path)
