"""Debian 13 roots made by mmdebstrap, and the few packages that this host itself needs."""

import os
import shutil
import subprocess
from pathlib import Path

from . import cache
from .report import LabError, say, say_since_start

SUITE = "trixie"
# Program -> the package of Debian 12 and 13 that brings it.
HOST_PROGRAMS = {"mmdebstrap": "mmdebstrap", "git": "git", "tar": "tar"}
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

# What never matters in a lab, a build root or a test image.
EXCLUDED = ["/usr/share/man/*", "/usr/share/doc/*", "/usr/share/locale/*", "/usr/share/info/*", "/usr/share/lintian/*"]
RECIPE = [
    "--mode=root",
    "--variant=essential",
    "--format=directory",
    "--architectures=amd64",
    '--aptopt=APT::Install-Recommends "false"',
    # apt's own user may not reach the cache directory, which often lies in root's home.
    '--aptopt=APT::Sandbox::User "root"',
    # The partial directory is thrown away whole when anything fails, so dpkg need not fsync.
    "--dpkgopt=force-unsafe-io",
    *[f"--dpkgopt=path-exclude={pattern}" for pattern in EXCLUDED],
]


def missing_host_packages():
    """The packages that must be installed on this host before a root can be made."""
    missing = [package for program, package in HOST_PROGRAMS.items() if shutil.which(program) is None]
    if not KEYRING.exists():
        missing.append("debian-archive-keyring")
    return missing


def ensure_host_packages():
    """Installs what this host lacks by name with apt-get, asking nothing; its output goes to stderr."""
    missing = missing_host_packages()
    if not missing:
        return
    if shutil.which("apt-get") is None:
        raise LabError(f"this host lacks {' '.join(missing)} and has no apt-get: install them, or use Debian 12 or 13")
    if os.geteuid() != 0:
        raise LabError(f"installing {' '.join(missing)} needs root: run it as root, or install them first")
    say(f"installing {' '.join(missing)}")
    env = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
    install = ["apt-get", "install", "-y", "-qq", "-o", "Dpkg::Use-Pty=0", "--no-install-recommends", *missing]
    # stdout is for a verb's result, so apt-get's goes to stderr. An old package list is the usual first failure.
    if subprocess.run(install, env=env, stdin=subprocess.DEVNULL, stdout=2).returncode != 0:
        subprocess.run(["apt-get", "update", "-q"], env=env, stdin=subprocess.DEVNULL, stdout=2)
        if subprocess.run(install, env=env, stdin=subprocess.DEVNULL, stdout=2).returncode != 0:
            raise LabError(f"apt-get could not install {' '.join(missing)}: its lines above say why")


def read_names(path):
    """The names in a list file, in its order: one or more a line, `#` starts a comment."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as error:
        raise LabError(f"cannot read the list {path}: {error.strerror}") from error
    return [name for line in lines for name in line.split("#")[0].split()]


def read_packages(path):
    """The package names in a list file, sorted: their order does not matter."""
    names = sorted(set(read_names(path)))
    if not names:
        raise LabError(f"the package list {path} names no package")
    return names


def root_entry(packages_file):
    """The cache entry of the root with the packages that the file names; the file's stem is the entry's name."""
    packages = read_packages(packages_file)
    key = cache.key_of(SUITE, "\n".join(RECIPE), "\n".join(packages))
    return cache.Entry("debian", Path(packages_file).stem, key)


def ensure_root(packages_file, entry=None):
    """Returns the path of a Debian 13 root directory with the packages that the file names, made when missing.

    Treat it as read-only: it is shared by every later run. Build in it from a mount namespace with a scratch directory.
    """
    entry = entry or root_entry(packages_file)
    packages = read_packages(packages_file)
    return entry.ensure(lambda partial: _make_root(partial, packages))


def _make_root(target, packages):
    if os.geteuid() != 0:
        raise LabError("making a Debian root needs root (chroot, mounts, device nodes): run the lab as root once")
    ensure_host_packages()
    say(f"making a Debian 13 root with {len(packages)} packages and what they need (about a minute)")
    command = ["mmdebstrap", *RECIPE, *_proxy_options(), f"--include={','.join(packages)}", SUITE, str(target), *_sources()]
    # INITRD=No: Debian's kernel hooks would build an initramfs of their own, for a quarter of a minute and for nobody.
    env = dict(os.environ, INITRD="No")
    if _run_to_its_end(command, env) != 0:
        raise LabError("mmdebstrap failed: its lines above say why; is Debian's archive reachable from here?")
    # apt's lists and dpkg's log differ from run to run and serve nobody.
    for leftover in ("var/log/dpkg.log", "var/log/alternatives.log", "var/log/bootstrap.log"):
        (target / leftover).unlink(missing_ok=True)
    say_since_start("Debian 13 root made")


def _run_to_its_end(command, env):
    """Runs mmdebstrap; when we are interrupted, lets it unmount and end its children before the target is removed."""
    process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=2)
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def _sources():
    """apt source lines for our suite on the mirrors that this host uses; none lets mmdebstrap choose its default."""
    listing = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(ORIGIN)|$(LABEL)|$(SITE)|$(COMPONENT)"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout
    main, security = [], []
    for line in listing.splitlines():
        origin, label, site, component = (line.split("|") + [""] * 4)[:4]
        if origin == "Debian" and component == "main":
            (security if label == "Debian-Security" else main).append(site)
    if not main:
        return []
    if not security and "//deb.debian.org/" in main[0]:
        # A minimal host may do without; the kernel's source comes from there within days of a fix.
        security = ["http://deb.debian.org/debian-security"]
    suites = [(main[0], SUITE), (main[0], f"{SUITE}-updates")]
    suites += [(security[0], f"{SUITE}-security")] if security else []
    return [f"deb [signed-by={KEYRING}] {site} {suite} main" for site, suite in suites]


def _proxy_options():
    """The proxy that this host's apt uses, handed to the one that mmdebstrap runs."""
    dump = subprocess.run(["apt-config", "dump"], stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout
    lines = [line for line in dump.splitlines() if line.startswith(("Acquire::http::Proxy ", "Acquire::https::Proxy "))]
    return [f"--aptopt={line.rstrip(';')}" for line in lines if not line.endswith('"";')]
