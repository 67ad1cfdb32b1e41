"""What boots: Debian's kernel as a bare vmlinux, a small initramfs, and the root image, all out of one Debian 13 root."""

import lzma
import secrets
import struct
from pathlib import Path

from . import cache, debian
from .hosttools import HostTools
from .report import LabError, say, say_since_start

LAB_DIR = Path(__file__).resolve().parent.parent
PACKAGES = LAB_DIR / "lab.packages"
GUEST_DIR = LAB_DIR / "guest"
# Large and of no use in the lab: what Mesa brings for QEMU's graphics, udev's hardware database, Podman's own tests.
LEFT_OUT = "^(usr/lib/udev/hwdb[.]bin|usr/lib/x86_64-linux-gnu/(libLLVM|libgallium|libz3|dri/).*|usr/libexec/podman/podman-testing)"
# Debian's cloud kernel has virtio-pci and virtio-console built in. (Its built-in NVMe would make a root disk without any
# module, but QEMU's NVMe device refuses to be saved in a snapshot.)
MODULES = GUEST_DIR / "modules"
# Busybox starts in a third of the time that Debian's dynamic programs take.
APPLETS = ("sh", "mount", "insmod", "mkdir", "cp", "switch_root", "ln", "chown", "chmod", "cat", "tr", "ip", "reboot")


class Image:
    """The cached files of the lab's host."""

    def __init__(self, root, directory):
        self.tools = HostTools(root)
        self.kernel = directory / "vmlinux"
        self.root_image = directory / "root.erofs"
        self._base_initramfs = directory / "initramfs-base"
        # Changes with every build of the image: a snapshot holds cached blocks of exactly one.
        self.identity = (directory / "identity").read_text()

    def initramfs(self):
        """The whole initramfs: the cached part with busybox and modules, then this checkout's guest programs."""
        return self._base_initramfs.read_bytes() + guest_archive()


def ensure():
    """Returns the lab's image, made when it is missing."""
    root_entry = debian.root_entry(PACKAGES)
    root = debian.ensure_root(PACKAGES, root_entry)
    key = cache.key_of(root_entry.path.name, Path(__file__), MODULES)
    directory = cache.Entry("lab", "image", key).ensure(lambda partial: _make(partial, root))
    return Image(root, directory)


def _make(target, root):
    say("making the lab's image")
    tools = HostTools(root)
    (target / "vmlinux").write_bytes(_vmlinux(root, tools))
    (target / "initramfs-base").write_bytes(_base_archive(root))
    # Uncompressed: emulated CPUs inflate slowly, and the image lies in this host's page cache anyway.
    tools.run("usr/bin/mkfs.erofs", "--quiet", f"--exclude-regex={LEFT_OUT}",
              target / "root.erofs", root)
    (target / "identity").write_text(secrets.token_hex(16))
    say_since_start("lab image made")


def _vmlinux(root, tools):
    """The ELF file in Debian's compressed kernel: emulated CPUs take seconds to inflate what this host does at once."""
    images = sorted((root / "boot").glob("vmlinuz-*"))
    if len(images) != 1:
        raise LabError(f"{root}/boot holds {len(images)} kernels, expected 1: remove {root} and run again")
    data = images[0].read_bytes()
    # Linux boot protocol (Documentation/arch/x86/boot.rst): setup_sects at 0x1f1, payload_offset and payload_length
    # at 0x248, relative to the protected-mode code; the payload ends with its inflated size in 4 bytes.
    setup_sectors = data[0x1F1] or 4
    offset, length = struct.unpack_from("<II", data, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    payload = data[start:start + length - 4]
    if not payload.startswith(b"\x28\xb5\x2f\xfd"):
        raise LabError(f"{images[0]} is not compressed with zstd, which is all that the lab knows: adapt image.py")
    elf = tools.run("usr/bin/zstd", "--decompress", "--stdout", data=payload)
    if not elf.startswith(b"\x7fELF"):
        raise LabError(f"{images[0]} holds no ELF kernel")
    return elf


def _base_archive(root):
    """Busybox with the links that the init scripts use, and the modules in loading order."""
    entries = [("bin", 0o040755, b""), ("modules", 0o040755, b""), ("lab", 0o040755, b"")]
    entries += [(name, 0o040755, b"") for name in ("dev", "proc", "sys")]
    entries.append(("bin/busybox", 0o100755, (root / "usr/bin/busybox").read_bytes()))
    entries += [(f"bin/{applet}", 0o120777, b"busybox") for applet in APPLETS]
    order = _module_order(root)
    for path in order:
        entries.append((f"modules/{path.name.removesuffix('.xz')}", 0o100644, lzma.decompress(path.read_bytes())))
    names = "".join(path.name.removesuffix(".xz") + "\n" for path in order)
    entries.append(("modules/order", 0o100644, names.encode()))
    return newc(entries)


def _module_order(root):
    """Paths of the listed modules, each after what it depends on (modules.dep lists the deepest dependency last)."""
    listing, = (root / "usr/lib/modules").glob("*/modules.dep")
    dependencies = {}
    for line in listing.read_text().splitlines():
        path, needed = line.split(":")
        dependencies[Path(path).name.split(".")[0].replace("-", "_")] = [*reversed(needed.split()), path]
    order = {}
    for name in debian.read_names(MODULES):
        if name not in dependencies:
            raise LabError(f"{MODULES} names {name}, which {listing.parent.name} does not have as a module")
        order.update(dict.fromkeys(dependencies[name]))
    return [listing.parent / path for path in order]


def guest_archive():
    """This checkout's guest programs."""
    entries = [("init", 0o100755, (GUEST_DIR / "initramfs-init").read_bytes())]
    for name in ("host-init", "agent.py"):
        entries.append((f"lab/{name}", 0o100755, (GUEST_DIR / name).read_bytes()))
    return newc(entries)


def newc(entries):
    """A cpio archive in "newc" format of (name, mode, data), with its trailer, padded to 512 bytes.

    Documentation/driver-api/early-userspace/buffer-format.rst: archives may follow one another, each 4-byte aligned.
    """
    archive = bytearray()
    for number, (name, mode, data) in enumerate([*entries, ("TRAILER!!!", 0, b"")], 1):
        path = name.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0)
        archive += b"070701" + b"".join(b"%08x" % field for field in fields) + path
        archive += bytes(-len(archive) % 4) + data
        archive += bytes(-len(archive) % 4)
    return bytes(archive + bytes(-len(archive) % 512))
