"""The lab's verbs: what the user typed -> what the modules need."""

import argparse
import signal
import sys

from . import debian
from .report import LabError, say


def _parser():
    parser = argparse.ArgumentParser(prog="lab", description="a virtual Debian 13 host with a nested /dev/kvm")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verbs.add_parser("deps", help="install what this host lacks, by package name, asking nothing")
    root = verbs.add_parser("root", help="print the path of a cached Debian 13 root directory with the packages listed")
    root.add_argument("packages_file", metavar="PACKAGES_FILE", help="package names, # starts a comment")
    return parser


def _run(arguments):
    if arguments.verb == "deps":
        debian.ensure_host_packages()
        return 0
    print(debian.ensure_root(arguments.packages_file))
    return 0


def main():
    """Parses the command line and returns the exit status."""
    # Cleaning up happens in `finally` blocks, so a termination signal has to become an exception.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    signal.signal(signal.SIGHUP, lambda number, _frame: sys.exit(128 + number))
    try:
        return _run(_parser().parse_args())
    except LabError as error:
        say(str(error))
        return EXIT_LAB_FAILED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


# Like docker's: the tool itself failed, not the command.
EXIT_LAB_FAILED = 125
