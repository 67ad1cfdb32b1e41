"""A lab that is up: restored from a snapshot where possible, else booted; the snapshot itself is made here too."""

import os
import time
from pathlib import Path

from . import cache, qemu
from .channel import ALIVE, FAILED, PING, Channel, ChannelClosed
from .image import guest_archive
from .report import LabError, say

BOOT_SECONDS = 300
RESTORE_SECONDS = 120


def scratch_directory():
    """Where the unlinked files of a run live; /var/tmp is on a disk where /tmp may be memory."""
    return os.environ.get("TMPDIR") or "/var/tmp"


class Machine:
    """A running lab whose agent waits for a command."""

    def __init__(self, process):
        self.qemu = process
        self.channel = Channel(process.channel_socket)

    def failure(self, reason):
        """An error with the reason and the console's last lines."""
        self.qemu.stop()
        status = self.qemu.process.returncode
        ended = "" if status == -9 else f" (QEMU ended with status {status})"
        tail = self.qemu.console_tail()
        lines = "\n".join(f"lab: console: {line}" for line in tail) or "lab: console: (it printed nothing)"
        return LabError(f"{reason}{ended}; the console's last lines:\n{lines}")

    def frozen(self, reason):
        """The same, with what the processors do: three looks, a second apart, tell a loop from a halt."""
        seen = []
        try:
            for _ in range(3):
                seen.append(self.qemu.monitor("info registers -a"))
                time.sleep(1)
            seen += [self.qemu.monitor(question) for question in ("info status", "info lapic")]
        except LabError as error:
            seen.append(str(error))
        wide = ("FPR", "XMM", "YMM", "ZMM", "Opmask", "MXCSR", "FCW")
        told = (line.rstrip() for text in seen for line in text.splitlines() if not line.startswith(wide))
        lines = "\n".join(f"lab: monitor: {line}" for line in told if line)
        return self.failure(f"{reason}; its processors:\n{lines}\nlab: it was stopped")

    def wait_alive(self, seconds):
        """Waits for the agent to say that it is there."""
        deadline = time.monotonic() + seconds
        try:
            while True:
                frames, _ = self.channel.receive(deadline)
                for kind, payload in frames:
                    if kind == ALIVE:
                        return
                    if kind == FAILED:
                        raise self.failure(f"the lab's agent failed: {payload.decode(errors='replace').strip()}")
                if time.monotonic() > deadline:
                    raise self.failure(f"the lab's agent did not answer within {seconds} s")
        except ChannelClosed:
            self.qemu.process.wait()
            raise self.failure("the lab did not boot") from None


def boot(image, size, slots):
    """Boots a lab from cold."""
    machine = Machine(qemu.Qemu(image, size, slots, scratch_directory(), image.initramfs()))
    try:
        machine.wait_alive(BOOT_SECONDS)
        return machine
    except BaseException:
        machine.qemu.stop()
        raise


def start(image, size, slots):
    """Restores a lab from its snapshot; when that fails, says why and boots."""
    try:
        return _restore(image, size, slots, ensure_snapshot(image, size))
    except LabError as error:
        # One line: the reason, and the console's last word on it.
        lines = str(error).removesuffix(":").splitlines()
        say("booting a lab, since none came from a snapshot: " + " ".join(dict.fromkeys([lines[0], lines[-1]])))
        return boot(image, size, slots)


def _set_migration(process):
    # mapped-ram gives each page a fixed place in the file, so two threads read it at once.
    capabilities = [{"capability": name, "state": True} for name in ("mapped-ram", "multifd")]
    process.execute("migrate-set-capabilities", capabilities=capabilities)
    process.execute("migrate-set-parameters", **{"multifd-channels": 2, "max-bandwidth": 1 << 40})


def _restore(image, size, slots, snapshot):
    machine = Machine(qemu.Qemu(image, size, slots, scratch_directory(), image.initramfs(), ["-incoming", "defer"]))
    try:
        _set_migration(machine.qemu)
        machine.qemu.execute("migrate-incoming", uri=f"file:{snapshot}")
        machine.qemu.wait_migration(RESTORE_SECONDS)
        machine.qemu.execute("cont")
    except LabError as error:
        raise machine.failure(str(error)) from error
    except BaseException:
        machine.qemu.stop()
        raise
    try:
        machine.channel.send(PING)
        machine.wait_alive(RESTORE_SECONDS)
        return machine
    except BaseException:
        machine.qemu.stop()
        raise


def ensure_snapshot(image, size):
    """The snapshot file for this image, size, command line and host, made when missing."""
    key = cache.key_of(image.identity, str(size), _host(), guest_archive(), Path(qemu.__file__), Path(__file__))
    directory = cache.Entry("lab", f"snapshot-{size}", key).ensure(
        lambda partial: _save(image, size, partial / "state"))
    return directory / "state"


def _save(image, size, target):
    say(f"booting a lab with {size.memory_mib} MiB and {size.processors} processors once, for its snapshot")
    started = time.monotonic()
    machine = boot(image, size, {})
    booted = time.monotonic()
    try:
        machine.qemu.execute("stop")
        _set_migration(machine.qemu)
        machine.qemu.execute("migrate", uri=f"file:{target}")
        machine.qemu.wait_migration(BOOT_SECONDS)
    except LabError as error:
        raise machine.failure(f"cannot save the snapshot: {error}") from error
    finally:
        machine.qemu.stop()
    size = target.stat().st_blocks * 512 >> 20
    say(f"booted in {booted - started:.2f} s, saved {size} MiB in {time.monotonic() - booted:.2f} s")


def _host():
    """What of this host a snapshot depends on: its processor, and this boot of it.

    The guest counts time in ticks of the host's TSC, whose rate no file here tells; a reboot may have moved us to another.
    """
    with open("/proc/cpuinfo") as text:
        lines = text.read().split("\n\n")[0].splitlines()
    processor = [line for line in lines if line.startswith(("vendor_id", "cpu family", "model", "stepping", "flags"))]
    return "\n".join([*processor, Path("/proc/sys/kernel/random/boot_id").read_text()])
