"""PID 1 of the lab's host: runs one command for the tool outside, over a virtio-serial port.

A frame is one byte of kind, four bytes of length (big endian) and the payload. Kinds, host to guest:
  R  run: JSON, see `Command`           I  input for the terminal      W  window size: JSON {"rows", "cols"}
  K  kill the command and all its children               P  answer with A
guest to host:
  A  alive                              O  bytes of stdout             E  bytes of stderr
  X  exit: JSON {"status", "out_bytes"} F  the agent failed: text
What was written to the command's pipes before it exited is delivered; what background children write later is not waited for.
"""

import ctypes
import errno
import fcntl
import json
import os
import pty
import resource
import select
import signal
import struct
import subprocess
import sys
import termios
import time
import traceback

PORT_NAME = "lab.channel"
COMMAND_GROUP = "/sys/fs/cgroup/command"
CHUNK = 32 * 1024  # what virtio-serial takes in one write
ENV = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root", "USER": "root", "LOGNAME": "root", "SHELL": "/bin/bash", "LANG": "C.UTF-8",
}
RNDADDENTROPY = 0x40085203  # _IOW('R', 0x03, int[2])
RNDRESEEDCRNG = 0x5207  # _IO('R', 0x07)
MS_RDONLY, MS_NOATIME = 1, 1024
LIBC = ctypes.CDLL(None, use_errno=True)


class Port:
    """The framed channel to the host."""

    def __init__(self):
        self.fd = os.open(find_port(), os.O_RDWR | os.O_CLOEXEC)
        self._buffer = bytearray()

    def send(self, kind, payload=b""):
        data = memoryview(kind + struct.pack(">I", len(payload)) + payload)
        while data:
            data = data[os.write(self.fd, data):]

    def receive(self):
        """Frames that have arrived; called when the port is readable."""
        data = os.read(self.fd, 65536)
        if not data:
            # The host side is gone, and with it whoever wanted this lab.
            power_off()
        self._buffer += data
        while len(self._buffer) >= 5:
            length = struct.unpack_from(">I", self._buffer, 1)[0]
            if len(self._buffer) < 5 + length:
                return
            kind, payload = bytes(self._buffer[:1]), bytes(self._buffer[5:5 + length])
            del self._buffer[:5 + length]
            yield kind, payload


def find_port():
    """The device node of our port; there is no udev that would make a link by name."""
    ports = "/sys/class/virtio-ports"
    for port in os.listdir(ports):
        with open(f"{ports}/{port}/name") as name:
            if name.read().strip() == PORT_NAME:
                return f"/dev/{port}"
    raise RuntimeError(f"no virtio-serial port is called {PORT_NAME}")


def find_disk(serial):
    """The device node of the disk that the host gave this serial number."""
    for disk in os.listdir("/sys/block"):
        try:
            with open(f"/sys/block/{disk}/serial") as text:
                if text.read().strip() == serial:
                    return f"/dev/{disk}"
        except FileNotFoundError:
            continue
    raise RuntimeError(f"no disk has the serial {serial}")


class Command:
    """The one command of this lab. `spec` has: argv, env, cwd, tty (null or {"rows", "cols"})."""

    def __init__(self, spec):
        self.is_tty = spec["tty"] is not None
        self.streams = {}  # our end of each output -> frame kind
        self.terminal = None
        if self.is_tty:
            self.terminal, child_end = pty.openpty()
            self.resize(spec["tty"])
            self.streams[self.terminal] = b"O"
            ends = (child_end, child_end, child_end)
        else:
            out, out_end = os.pipe()
            err, err_end = os.pipe()
            self.streams = {out: b"O", err: b"E"}
            ends = (os.open("/dev/null", os.O_RDONLY), out_end, err_end)
        self.pid = os.fork()
        if self.pid == 0:
            run_child(spec, ends, self.is_tty)
        for end in set(ends):
            # Drop our copy now: the pipe reaches EOF only when the last writer exits.
            os.close(end)
        for fd in self.streams:
            os.set_blocking(fd, False)

    def resize(self, size):
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", size["rows"], size["cols"], 0, 0))

    def write_terminal(self, data):
        """Input from the user; the terminal's queue is small, so this waits when it is full."""
        while data:
            try:
                data = data[os.write(self.terminal, data):]
            except BlockingIOError:
                select.select([], [self.terminal], [], 0.05)
            except OSError:
                return  # the shell has closed its side

    def forward(self, fd, port):
        """Passes on what one stream holds now; False when it holds nothing or has ended."""
        try:
            data = os.read(fd, CHUNK)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno != errno.EIO:  # a terminal whose last user exited
                raise
            data = b""
        if not data:
            os.close(fd)
            del self.streams[fd]
            return False
        port.send(self.streams[fd], data)
        return True

    def drain(self, port):
        """Sends what was written before the command's exit; a background child may write for ever, so no more than that."""
        for fd in list(self.streams):
            if self.is_tty:
                # The line discipline hands over asynchronously: a pause means that it is done.
                while select.select([fd], [], [], 0.05)[0] and self.forward(fd, port):
                    pass
                continue
            left = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))[0]
            while left > 0:
                data = os.read(fd, min(left, CHUNK))
                port.send(self.streams[fd], data)
                left -= len(data)

    def kill(self):
        with open(f"{COMMAND_GROUP}/cgroup.kill", "w") as control:
            control.write("1")


def run_child(spec, ends, is_tty):
    """Between fork and exec: never returns."""
    try:
        with open(f"{COMMAND_GROUP}/cgroup.procs", "w") as group:
            group.write("0")
        os.setsid()
        for number, end in enumerate(ends):
            os.dup2(end, number)
        if is_tty:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        # Python ignores SIGPIPE, and PID 1's mask is its own business.
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.RLIM_INFINITY))
        os.chdir(spec["cwd"])
        os.execvpe(spec["argv"][0], spec["argv"], {**ENV, **spec["env"]})
    except OSError as error:
        os.write(2, f"lab: cannot run {spec['argv'][0]}: {error.strerror}\n".encode())
        os._exit(127 if error.errno == errno.ENOENT else 126)
    finally:
        os._exit(126)


def prepare(spec):
    """What a fresh lab needs from its host: the time, randomness of its own, and the disks of this run."""
    time.clock_settime_ns(time.CLOCK_REALTIME, spec["time_ns"])
    # Every lab restored from one snapshot has the same generator state.
    seed = bytes.fromhex(spec["entropy"])
    with open("/dev/urandom", "wb") as device:
        fcntl.ioctl(device, RNDADDENTROPY, struct.pack("ii", len(seed) * 8, len(seed)) + seed)
        fcntl.ioctl(device, RNDRESEEDCRNG)
    disks = spec["disks"]
    if "src" in disks:
        mount(find_disk("lab-src"), "/src", "erofs", MS_RDONLY)
    if "share" in disks:
        mount(find_disk("lab-share"), "/share", "ext4", MS_NOATIME)
        if os.path.isdir("/share/lost+found"):
            os.rmdir("/share/lost+found")
    if "install" in disks:
        os.makedirs("/run/lab/install")
        mount(find_disk("lab-install"), "/run/lab/install", "erofs", MS_RDONLY)
        os.makedirs("/run/lab/upper/local")
        os.makedirs("/run/lab/upper/local-work")
        layers = "lowerdir=/run/lab/install:/run/lab/image/usr/local"
        mount("local", "/usr/local", "overlay", 0,
              f"{layers},upperdir=/run/lab/upper/local,workdir=/run/lab/upper/local-work")


def mount(source, target, fs_type, flags, data=""):
    """mount(2): starting the program mount would take longer than all the rest of a restored lab's start."""
    if LIBC.mount(source.encode(), target.encode(), fs_type.encode(), ctypes.c_ulong(flags), data.encode()) != 0:
        raise OSError(ctypes.get_errno(), f"cannot mount {source} on {target}: {os.strerror(ctypes.get_errno())}")


def save_out():
    """Writes /out as a tar stream onto the out disk; returns its length."""
    if not os.listdir("/out"):
        return 0
    disk = find_disk("lab-out")
    tar = subprocess.Popen(["tar", "--create", "--sparse", "--one-file-system", "--file=-", "--directory=/out", "."],
                           stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=ENV)
    total = 0
    with open(disk, "r+b", buffering=0) as device:
        while True:
            data = tar.stdout.read(1 << 20)
            if not data:
                break
            total += len(data)
            while data:
                data = data[device.write(data):]
        os.fsync(device.fileno())
    if tar.wait() > 1:  # 1: a file changed while it was read; background children may still write
        raise RuntimeError(f"tar could not save /out, status {tar.returncode}")
    return total


def reap(command):
    """Collects every dead child (PID 1 inherits orphans); the command's exit status once it is among them, else None."""
    status = None
    while True:
        try:
            pid, wait_status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status
        if pid == 0:
            return status
        if command is not None and pid == command.pid:
            code = os.waitstatus_to_exitcode(wait_status)
            status = 128 - code if code < 0 else code


def serve(port):
    """Waits for the run frame, runs it, reports its end; then stays until the host stops the machine."""
    wake, wake_end = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(wake_end, False)
    signal.set_wakeup_fd(wake_end, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    port.send(b"A")
    command = None
    finished = False
    while True:
        streams = list(command.streams) if command and not finished else []
        for fd in select.select([port.fd, wake, *streams], [], [])[0]:
            if fd == port.fd:
                for kind, payload in port.receive():
                    if kind == b"R":
                        spec = json.loads(payload)
                        prepare(spec)
                        command = Command(spec)
                    elif kind == b"I":
                        command.write_terminal(payload)
                    elif kind == b"P":
                        port.send(b"A")
                    elif kind == b"W":
                        command.resize(json.loads(payload))
                    elif kind == b"K" and command:
                        command.kill()
            elif fd == wake:
                os.read(wake, 4096)
                status = reap(command)
                if status is not None:
                    finished = True
                    command.drain(port)
                    out_bytes = save_out()
                    port.send(b"X", json.dumps({"status": status, "out_bytes": out_bytes}).encode())
            elif fd in command.streams:
                command.forward(fd, port)


def power_off():
    with open("/proc/sysrq-trigger", "w") as trigger:
        trigger.write("o")
    time.sleep(60)


def main():
    port = Port()
    try:
        serve(port)
    except Exception:
        text = traceback.format_exc()
        sys.stderr.write(text)
        port.send(b"F", text.encode())
        # The host reads the text and stops the machine; ending PID 1 now would only add a panic to it.
        time.sleep(60)
        raise


main()
