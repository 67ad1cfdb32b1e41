"""The lab's verbs: what the user typed -> what the modules need."""

import argparse
import os
import signal
import sys
from pathlib import Path

from . import debian, disks, image, machine, session
from .qemu import Size
from .report import LabError, say

# Like docker's: the tool itself failed, not the command.
EXIT_LAB_FAILED = 125


def _parser():
    parser = argparse.ArgumentParser(prog="lab", description="a virtual Debian 13 host with a nested /dev/kvm")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--share", metavar="DIR", help="a writable copy of DIR appears at /share")
    options.add_argument("--out", metavar="DIR", help="what the command leaves in /out comes back to DIR")
    size = argparse.ArgumentParser(add_help=False)
    size.add_argument("--mem", metavar="MIB", type=_positive(int), default=Size().memory_mib,
                      help="memory of the lab (default %(default)s); each size has a snapshot of its own")
    size.add_argument("--cpus", metavar="N", type=_positive(int), default=Size().processors,
                      help="processors of the lab (default %(default)s)")
    options.add_argument("--install", metavar="DIR",
                         help="tree that is merged over /usr/local (default: $BULKHEAD_STAGE, else the checkout's stage/)")
    options.add_argument("--cold", action="store_true", help="boot instead of restoring a snapshot")

    run = verbs.add_parser("exec", parents=[options, size], help="run a command in a fresh lab",
                           description="Runs CMD as root in a fresh lab and exits with its status (128+n for signal n, 124 after "
                                       "a timeout, 125 when the lab itself failed).")
    run.add_argument("--timeout", metavar="SECONDS", type=_positive(float), default=1800,
                     help="kill a command that runs longer (default %(default)s)")
    run.add_argument("--silence", metavar="SECONDS", type=_positive(float), default=session.SILENCE_SECONDS,
                     help="stop a lab whose kernel has not answered for so long, with its processors' registers (default %(default)s)")
    run.add_argument("command", metavar="CMD", nargs=argparse.REMAINDER, help="after --: the command and its arguments")
    shell = verbs.add_parser("shell", parents=[options, size], help="an interactive root shell in a fresh lab")
    shell.add_argument("command", metavar="CMD", nargs=argparse.REMAINDER, help="after --: instead of bash")
    verbs.add_parser("build", parents=[size], help="prepare the image and the snapshot, run nothing")
    verbs.add_parser("deps", help="install what this host lacks, by package name, asking nothing")
    root = verbs.add_parser("root", help="print the path of a cached Debian 13 root directory with the packages listed")
    root.add_argument("packages_file", metavar="PACKAGES_FILE", help="package names, # starts a comment")
    return parser


def _positive(kind):
    def parse(text):
        value = kind(text)
        if value <= 0:
            raise ValueError(text)
        return value
    parse.__name__ = "positive number"
    return parse


def _install_tree(explicit):
    """The tree for /usr/local, or None."""
    if explicit or os.environ.get("BULKHEAD_STAGE"):
        return explicit or os.environ["BULKHEAD_STAGE"]
    stage = Path(image.LAB_DIR).parent.parent / "stage"
    return stage if stage.is_dir() else None


def _run(arguments):
    """Runs a command in a fresh lab; returns the exit status."""
    terminal = arguments.verb == "shell"
    argv = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if terminal and not sys.stdin.isatty():
        raise LabError("lab shell needs a terminal on stdin: use lab exec in scripts")
    if not argv and not terminal:
        raise LabError("lab exec needs a command after --")
    image_files = image.ensure()
    carried = disks.Disks(image_files.tools, machine.scratch_directory())
    carried.add_repository()
    install = _install_tree(arguments.install)
    if install:
        carried.add_tree("install", install)
    if arguments.share:
        carried.add_share(arguments.share)
    if arguments.out:
        carried.add_out()
    begin = machine.boot if arguments.cold else machine.start
    lab = begin(image_files, Size(arguments.mem, arguments.cpus), carried.slots)
    try:
        limits = (None, session.SILENCE_SECONDS) if terminal else (arguments.timeout, arguments.silence)
        status, out_bytes = session.Session(lab, carried.slots, *limits).run(argv or ["bash", "-l"], terminal)
    except session.Unresponsive as error:
        say(str(error))
        return session.EXIT_TIMEOUT
    finally:
        lab.qemu.stop()
    if arguments.out:
        carried.take_out(out_bytes, arguments.out)
    return status


def _dispatch(arguments):
    if arguments.verb == "deps":
        debian.ensure_host_packages()
    elif arguments.verb == "root":
        print(debian.ensure_root(arguments.packages_file))
    elif arguments.verb == "build":
        machine.ensure_snapshot(image.ensure(), Size(arguments.mem, arguments.cpus))
    else:
        return _run(arguments)
    return 0


def main():
    """Parses the command line and returns the exit status."""
    # Cleaning up happens in `finally` blocks, so a termination signal has to become an exception.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda caught, _frame: sys.exit(128 + caught))
    try:
        return _dispatch(_parser().parse_args())
    except LabError as error:
        say(str(error))
        return EXIT_LAB_FAILED
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
