"""One QEMU process: its command line, its QMP control socket, and its end."""

import json
import os
import socket
import subprocess
import tempfile
import time
from typing import NamedTuple

from .report import LabError

# TCG is deterministic about what it offers, so `max` means the same machine on every host with the same QEMU. Fast string
# operations are what it has not: it runs REP MOVSB and STOSB byte by byte, where a processor that announces ERMS and FSRM
# moves whole cache lines. Without the announcement the kernels copy by words, which is nearer to what such a processor costs.
MACHINE = [
    "-machine", "q35,smm=off,vmport=off,hpet=off", "-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max,-erms,-fsrm",
    "-nodefaults", "-no-user-config", "-nographic", "-no-reboot",
]
# mitigations=off is for this host only, whose CPUs are emulated; the product's guests boot with theirs on.
# lpj saves a second of calibration that emulation makes useless anyway: delays are counted in TSC ticks. The crypto library's
# self-tests and the jitter entropy source's would take another.
KERNEL_ARGUMENTS = ("console=ttyS0 quiet panic=-1 mitigations=off random.trust_cpu=on lpj=10000000 no_timer_check "
                    "cryptomgr.notests initcall_blacklist=jent_mod_init")
CONSOLE_LINES = 30
REASON_LINES = 3
QMP_SECONDS = 180
# Every disk slot has this size whatever it carries, so that a restored snapshot finds the geometry it knows.
SLOT_BYTES = 64 << 30
SLOTS = ("install", "src", "share", "out")


def unlinked_file(directory, data=b""):
    """The descriptor of a file without a name: it goes away with its last user, however that one ends."""
    with tempfile.TemporaryFile(dir=directory) as file:
        file.write(data)
        file.flush()
        return os.dup(file.fileno())


class Size(NamedTuple):
    """How large a lab is. Each size has a snapshot of its own."""

    memory_mib: int = 4096
    processors: int = 1  # README.md, Pitfalls: with more, guests are lost

    def __str__(self):
        return f"{self.memory_mib}m-{self.processors}p"


class Qemu:
    """A running QEMU. It dies with this process (parent-death signal); `stop` ends it earlier."""

    def __init__(self, image, size, slots, scratch, initramfs, extra=()):
        self._console = unlinked_file(scratch)
        initrd = unlinked_file(scratch, initramfs)
        qmp, qmp_end = socket.socketpair()
        channel, channel_end = socket.socketpair()
        passed = [self._console, initrd, qmp_end.fileno(), channel_end.fileno(), *slots.values()]
        command = [
            # setpriv is part of util-linux, which no Debian lacks.
            "setpriv", "--pdeathsig", "KILL", *image.tools.command("usr/bin/qemu-system-x86_64"),
            "-L", str(image.tools.root / "usr/share/qemu"), "-L", str(image.tools.root / "usr/share/seabios"),
            *MACHINE, "-m", str(size.memory_mib), "-smp", str(size.processors),
            "-kernel", str(image.kernel), "-initrd", f"/proc/self/fd/{initrd}", "-append", KERNEL_ARGUMENTS,
            "-chardev", f"file,id=console,path=/proc/self/fd/{self._console}", "-serial", "chardev:console",
            "-chardev", f"socket,id=qmp,fd={qmp_end.fileno()}", "-mon", "chardev=qmp,mode=control",
            "-device", "virtio-serial-pci-non-transitional,max_ports=2",
            "-chardev", f"socket,id=channel,fd={channel_end.fileno()}",
            "-device", "virtserialport,chardev=channel,name=lab.channel",
            *_disk("root", f"driver=file,filename={image.root_image},read-only=on"),
            *[argument for name in SLOTS for argument in _disk(name, _backend(slots.get(name)))],
            *extra,
        ]
        # QEMU's own complaints belong with the console's: one place to look when a boot fails.
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self._console, stderr=self._console,
                                        pass_fds=passed)
        for end in (qmp_end, channel_end):
            end.close()
        os.close(initrd)
        self.channel_socket = channel
        # A hanging QEMU must become an error: the longest command that it answers late is a migration's start.
        qmp.settimeout(QMP_SECONDS)
        self._qmp = qmp.makefile("rwb", buffering=0)
        self._qmp_lines = qmp.makefile("rb")
        self._negotiated = False

    def execute(self, name, **arguments):
        """Runs one QMP command and returns its result."""
        try:
            if not self._negotiated:
                self._qmp_lines.readline()  # the greeting
                self._negotiated = True
                self.execute("qmp_capabilities")
            self._qmp.write(json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n")
            while True:
                line = self._qmp_lines.readline()
                if not line:
                    raise LabError(f"QEMU ended during {name}")
                reply = json.loads(line)
                if "error" in reply:
                    raise LabError(f"QEMU refused {name}: {reply['error']['desc']}")
                if "return" in reply:
                    return reply["return"]
        except OSError as error:
            raise LabError(f"QEMU does not answer {name}: {error}") from error

    def monitor(self, question):
        """What QEMU's monitor for people answers."""
        return self.execute("human-monitor-command", **{"command-line": question})

    def wait_migration(self, seconds):
        """Waits until saving or restoring has completed."""
        end = time.monotonic() + seconds
        while True:
            state = self.execute("query-migrate")
            if state.get("status") == "completed":
                return
            if state.get("status") in ("failed", "cancelled"):
                raise LabError(f"migration failed: {state.get('error-desc', 'QEMU gives no reason')}")
            if time.monotonic() > end:
                raise LabError(f"migration took longer than {seconds} s")
            time.sleep(0.003)

    def console_tail(self):
        """The console's last lines (QEMU's own messages among them), led by the line that names a panic or a failed step."""
        with open(f"/proc/self/fd/{self._console}", "rb") as file:
            text = file.read().decode(errors="replace")
        lines = [line.rstrip() for line in text.replace("\r", "\n").split("\n") if line.strip()]
        # A panic's call trace can push its reason, and what led to it, out of the tail.
        for number, line in enumerate(lines[:-CONSOLE_LINES]):
            if "Kernel panic" in line or line.startswith("lab: "):
                return [*lines[max(0, number - REASON_LINES):number + 1], *lines[max(number + 1, len(lines) - CONSOLE_LINES):]]
        return lines[-CONSOLE_LINES:]

    def stop(self):
        """Ends QEMU at once: a lab keeps nothing, so there is nothing to shut down."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def _backend(fd):
    # An empty slot reads as zeros.
    if fd is None:
        return f"driver=null-co,size={SLOT_BYTES},read-zeroes=on"
    return f"driver=file,filename=/proc/self/fd/{fd},locking=off,cache.no-flush=on"


def _disk(name, backend):
    return ["-blockdev", f"{backend},node-name={name}",
            "-device", f"virtio-blk-pci-non-transitional,drive={name},serial=lab-{name},logical_block_size=512"]
