"""Programs of the Debian 13 root, run on this host through that root's own dynamic loader, without being installed."""

import subprocess
from pathlib import Path

from .report import LabError


class HostTools:
    """Makes command lines for programs of a root directory."""

    def __init__(self, root):
        self.root = Path(root)

    def command(self, program, *arguments):
        """The argv that runs `program` ("usr/bin/zstd") of the root here."""
        libraries = self.root / "usr/lib/x86_64-linux-gnu"
        # --inhibit-cache: this host's ld.so.cache describes this host's libraries.
        return [str(self.root / "usr/lib64/ld-linux-x86-64.so.2"), "--inhibit-cache", "--library-path", str(libraries),
                str(self.root / program), *map(str, arguments)]

    def run(self, program, *arguments, stdin=subprocess.DEVNULL, data=None):
        """Runs a program to its end and returns its stdout (bytes); a failure carries what it said."""
        source = {"input": data} if data is not None else {"stdin": stdin}
        done = subprocess.run(self.command(program, *arguments), capture_output=True, **source)
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace").strip() or done.stdout.decode(errors="replace").strip()
            raise LabError(f"{program} failed with status {done.returncode}: {said[-2000:]}")
        return done.stdout
