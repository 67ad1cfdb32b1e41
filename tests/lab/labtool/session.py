"""One command in one lab: its input and output passed through, its exit status back."""

import contextlib
import fcntl
import json
import os
import secrets
import select
import signal
import struct
import sys
import termios
import time
import tty

from .channel import EXIT, FAILED, INPUT, KILL, PING, RESIZE, RUN, STDERR, STDOUT, ChannelClosed
from .report import LabError, say

EXIT_TIMEOUT = 124
# How long the agent may take to kill the command and save /out after a timeout.
GRACE_SECONDS = 60
# A lab that says nothing is asked whether it is there, this often.
PING_SECONDS = 30
# Without an answer for so long its kernel stands still: on the busiest host the agent needed seconds.
SILENCE_SECONDS = 300
# A pipe that poll() calls writable takes this much without blocking (PIPE_BUF), so a slow reader delays no timeout.
WRITE_CHUNK = 4096


class Session:
    """Runs `argv` in a machine whose agent is alive (or was, when its snapshot was taken)."""

    def __init__(self, machine, slots, timeout=None, silence=SILENCE_SECONDS):
        self._machine = machine
        self._silence = silence
        self._ask_after = min(PING_SECONDS, silence / 2)
        self._heard = self._asked = time.monotonic()
        self._channel = machine.channel
        self._slots = slots
        self._timeout = timeout
        self._deadline = None
        self._timed_out = False

    def run(self, argv, terminal=False):
        """Returns (exit status, length of the tar on the out disk)."""
        size = window_size() if terminal else None
        spec = {
            "argv": argv, "env": {"TERM": os.environ.get("TERM", "linux")} if terminal else {}, "tty": size,
            "cwd": "/src" if "src" in self._slots else "/root", "disks": sorted(self._slots),
            "entropy": secrets.token_hex(64), "time_ns": time.time_ns(),
        }
        if self._timeout is not None:
            self._deadline = time.monotonic() + self._timeout
        try:
            self._channel.send(RUN, json.dumps(spec).encode())
            if not terminal:
                return self._loop()
            with raw_terminal(self._channel):
                return self._loop(stdin=sys.stdin.fileno())
        except ChannelClosed:
            self._machine.qemu.process.wait()
            raise self._machine.failure("the lab ended while the command ran") from None

    def _loop(self, stdin=None):
        watched = [] if stdin is None else [stdin]
        while True:
            frames, ready = self._channel.receive(self._next_look(), watched)
            if frames:
                self._heard = time.monotonic()
            for kind, payload in frames:
                if kind == STDOUT:
                    self._write(1, payload)
                elif kind == STDERR:
                    self._write(2, payload)
                elif kind == EXIT:
                    end = json.loads(payload)
                    return EXIT_TIMEOUT if self._timed_out else end["status"], end["out_bytes"]
                elif kind == FAILED:
                    raise self._machine.failure(f"the lab's agent failed: {payload.decode(errors='replace').strip()}")
            if ready:
                data = os.read(stdin, 4096)
                if data:
                    self._channel.send(INPUT, data)
                else:
                    watched = []
            self._check_deadline()
            self._check_silence()

    def _next_look(self):
        times = [self._asked + self._ask_after, self._heard + self._silence]
        return min(times if self._deadline is None else [*times, self._deadline])

    def _check_silence(self):
        """A lab whose kernel stands still stops the clocks of the tests in it: only the host can tell."""
        now = time.monotonic()
        if now - self._heard >= self._silence:
            raise self._machine.frozen(f"the lab has not answered for {self._silence:g} s: its kernel stands still")
        if now - self._asked >= self._ask_after:
            self._asked = now
            self._channel.send(PING)

    def _check_deadline(self):
        if self._deadline is None or time.monotonic() < self._deadline:
            return
        if self._timed_out:
            raise Unresponsive
        say(f"the command ran longer than {self._timeout:g} s: killed")
        self._timed_out = True
        self._deadline = time.monotonic() + GRACE_SECONDS
        self._channel.send(KILL)

    def _write(self, fd, data):
        data = memoryview(data)
        while data:
            wait = None if self._deadline is None else max(0, self._deadline - time.monotonic())
            if select.select([], [fd], [], wait)[1]:
                # EPIPE ends the lab: nobody reads what the command writes.
                data = data[os.write(fd, data[:WRITE_CHUNK]):]
            else:
                self._check_deadline()
        # A slow reader of ours is no silence of the lab's.
        self._heard = time.monotonic()


class Unresponsive(LabError):
    """After a timeout even the agent did not answer: the guest hangs."""

    def __init__(self):
        super().__init__(f"the lab did not answer within {GRACE_SECONDS} s after the timeout: stopped, /out is lost")


def window_size():
    """The size of the terminal on stdin."""
    rows, cols, _, _ = struct.unpack("HHHH", fcntl.ioctl(sys.stdin.fileno(), termios.TIOCGWINSZ, bytes(8)))
    return {"rows": rows, "cols": cols}


@contextlib.contextmanager
def raw_terminal(channel):
    """Keys go to the guest as they are, window changes follow; the terminal is put back at the end."""
    fd = sys.stdin.fileno()
    saved = termios.tcgetattr(fd)
    previous = signal.signal(signal.SIGWINCH, lambda *_: channel.send(RESIZE, json.dumps(window_size()).encode()))
    tty.setraw(fd)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, saved)
        signal.signal(signal.SIGWINCH, previous)
