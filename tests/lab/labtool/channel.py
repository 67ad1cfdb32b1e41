"""The host's end of the channel to the guest's agent: frames over a socket that QEMU joins to a virtio-serial port."""

import select
import struct
import time

# guest/agent.py documents the frames.
RUN, INPUT, RESIZE, KILL, PING = b"R", b"I", b"W", b"K", b"P"
ALIVE, STDOUT, STDERR, EXIT, FAILED = b"A", b"O", b"E", b"X", b"F"


class ChannelClosed(Exception):
    """QEMU ended."""


class Channel:
    """One framed stream each way."""

    def __init__(self, sock):
        self.socket = sock
        self._buffer = bytearray()

    def send(self, kind, payload=b""):
        """Sends one frame, or raises ChannelClosed."""
        try:
            self.socket.sendall(kind + struct.pack(">I", len(payload)) + payload)
        except OSError as error:
            raise ChannelClosed from error

    def receive(self, deadline=None, also=()):
        """Waits for frames or for one of the descriptors in `also`.

        Returns (frames, ready descriptors); both empty when `deadline` (time.monotonic) has passed.
        """
        frames = list(self._whole_frames())
        if frames:
            return frames, []
        wait = None if deadline is None else max(0, deadline - time.monotonic())
        ready = select.select([self.socket, *also], [], [], wait)[0]
        if self.socket in ready:
            ready.remove(self.socket)
            try:
                data = self.socket.recv(1 << 18)
            except ConnectionResetError:
                data = b""
            if not data:
                raise ChannelClosed
            self._buffer += data
        return list(self._whole_frames()), ready

    def _whole_frames(self):
        while len(self._buffer) >= 5:
            length = struct.unpack_from(">I", self._buffer, 1)[0]
            if len(self._buffer) < 5 + length:
                return
            yield bytes(self._buffer[:1]), bytes(self._buffer[5:5 + length])
            del self._buffer[:5 + length]
