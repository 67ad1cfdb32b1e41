"""What the lab tells its user: progress on stderr, and failures as one exception type."""

import sys
import time

_START = time.monotonic()


class LabError(Exception):
    """The lab itself failed (not the command in it); the message says what failed, on what, and what to do."""


def say(message):
    """Prints one progress line on stderr: stdout belongs to the command in the lab, or to a verb's result."""
    sys.stderr.write(f"lab: {message}\n")
    sys.stderr.flush()


def say_since_start(message):
    """Like `say`, with the seconds since the program started."""
    say(f"{message} ({time.monotonic() - _START:.2f} s)")
