#!/usr/bin/env python3
"""One measurement inside a fresh lab; prints one JSON object. Called by tests/bench/run, once for each sample.

usage: inlab.py NAME [SMALL_FILES]
"""

import glob
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

LIBEXEC = "/usr/local/libexec/bulkhead"
KERNEL, INITRAMFS = f"{LIBEXEC}/vmlinux", f"{LIBEXEC}/initramfs"
CGROUPS = "/sys/fs/cgroup"
ANNOUNCE_PORT = 0x8900  # vmm/config
AGENT_PORT = 1024  # where the agent dials its host
MEMORY = 128
SMALL_FILES = int(sys.argv[2]) if len(sys.argv) > 2 else 5000


def bundle(args, extra=None):
    """A busybox bundle by `runc spec`."""
    directory = "/tmp/bench-bundle"
    shutil.rmtree(directory, ignore_errors=True)
    os.makedirs(f"{directory}/rootfs/bin")
    for name in ("proc", "sys", "dev", "tmp"):
        os.makedirs(f"{directory}/rootfs/{name}")
    shutil.copy("/bin/busybox", f"{directory}/rootfs/bin/busybox")
    for name in ("true", "sh", "cat", "sleep"):
        os.symlink("busybox", f"{directory}/rootfs/bin/{name}")
    subprocess.run(["runc", "spec"], cwd=directory, check=True)
    with open(f"{directory}/config.json") as file:
        config = json.load(file)
    config["process"]["terminal"] = False
    config["process"]["args"] = args
    if extra:
        extra(config)
    with open(f"{directory}/config.json", "w") as file:
        json.dump(config, file)
    return directory


def warm():
    """Files that either side reads are read once before timing. All sides that boot have seen one guest before, as `command_line`
    boots one: the host's KVM is as warm for the one as for the other."""
    for path in [KERNEL, INITRAMFS, f"{LIBEXEC}/bulkhead-vmm", "/usr/local/bin/bulkhead", "/usr/sbin/runc", "/bin/busybox"]:
        subprocess.run(["cat", path], stdout=subprocess.DEVNULL, check=False)
    subprocess.run(["qemu-system-x86_64", "--version"], stdout=subprocess.DEVNULL, check=True)
    for path in glob.glob("/usr/share/qemu/qboot.rom") + glob.glob("/usr/share/qemu/bios-microvm.bin"):
        subprocess.run(["cat", path], stdout=subprocess.DEVNULL, check=False)
    subprocess.run(["bulkhead", "--version"], stdout=subprocess.DEVNULL, check=True)
    subprocess.run(["runc", "--version"], stdout=subprocess.DEVNULL, check=True)


def timeline(directory, words=()):
    file = "/tmp/timeline.json"
    since = time.monotonic()
    subprocess.run(
        ["bulkhead", "run", "--memory", str(MEMORY), "--timeline-json", file, *words, "--bundle", directory, "bench"],
        check=True, stdin=subprocess.DEVNULL,
    )
    took = (time.monotonic() - since) * 1000
    with open(file) as text:
        return {"whole_ms": took, "moments": json.load(text)}


def command_line():
    """The product's command line without the words that name Bulkhead's own devices."""
    text = subprocess.run(
        ["bulkhead", "run", "--bundle", bundle(["/bin/cat", "/proc/cmdline"]), "cmdline"], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return " ".join(word for word in text.split() if not word.startswith(("virtio_mmio.", "ramoops.")))


def qemu_command(line, marker, extra=(), initramfs=INITRAMFS, memory=MEMORY):
    return [
        "/usr/bin/qemu-system-x86_64", "-M", "microvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=off", "-accel", "kvm", "-cpu", "host",
        "-m", str(memory), "-smp", "1", "-nodefaults", "-no-user-config", "-nographic", "-no-reboot",
        "-kernel", KERNEL, "-initrd", initramfs, "-append", line,
        "-chardev", f"file,id=marker,path={marker}", "-device", f"isa-debugcon,iobase={ANNOUNCE_PORT:#x},chardev=marker",
        *extra,
    ]  # fmt: skip


def qemu(line, extra=()):
    """Starts QEMU microvm; returns its pid and the time to the marker in ms."""
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    command = qemu_command(line, f"/dev/fd/{writer}", extra)
    since = time.monotonic()
    pid = os.posix_spawn(command[0], command, os.environ)
    os.close(writer)
    byte = os.read(reader, 1)
    marker = time.monotonic()
    if byte != b"\x01":
        raise SystemExit(f"qemu: marker {byte!r} instead of 01")
    return pid, (marker - since) * 1000


def kvm_exits(pid):
    total = {}
    for name in ("exits", "irq_exits"):
        (path,) = glob.glob(f"/sys/kernel/debug/kvm/{pid}-*/{name}")
        with open(path) as file:
            total[name] = int(file.read())
    return total["exits"] - total["irq_exits"]


def end(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def memory(cgroup):
    """anon + shmem + kernel in MiB, and the PSS of its processes."""
    with open(f"{cgroup}/memory.stat") as file:
        stat = dict(line.split() for line in file)
    pss = 0
    for directory, _, _ in os.walk(cgroup):
        with open(f"{directory}/cgroup.procs") as file:
            for pid in file.read().split():
                with open(f"/proc/{pid}/smaps_rollup") as rollup:
                    pss += sum(int(line.split()[1]) for line in rollup if line.startswith("Pss:"))
    charged = sum(int(stat[name]) for name in ("anon", "shmem", "kernel"))
    return {"charged_mib": charged / 2**20, "pss_mib": pss / 1024, "stat": {name: int(stat[name]) >> 10 for name in ("anon", "shmem", "kernel")}}


def boot_bulkhead():
    command_line()
    warm()
    report = timeline(bundle(["/bin/true"]))
    moments = {moment["name"]: moment for moment in report["moments"]}
    at = {name: moment["at_ns"] / 1e6 for name, moment in moments.items()}
    return {
        # From main of the VMM: what exec itself costs is not in it.
        "boot_ms": at["kernel to init"] - at["vmm start"],
        "exits": moments["kernel to init"]["exits"] - moments["first guest instruction"]["exits"],
        "whole_ms": report["whole_ms"],
        "container_ms": at["container exited"] - at["agent ready"],
        "phases": {name: ms - at["command start"] for name, ms in at.items()},
    }


def boot_qemu():
    line = command_line()
    warm()
    pid, took = qemu(line)
    exits = kvm_exits(pid)
    end(pid)
    return {"boot_ms": took, "exits": exits}


def runc():
    command_line()
    directory = bundle(["/bin/true"])
    warm()
    since = time.monotonic()
    subprocess.run(["runc", "run", "--bundle", directory, "bench"], check=True, stdin=subprocess.DEVNULL)
    return {"whole_ms": (time.monotonic() - since) * 1000}


SETTLE = 3  # seconds of idleness after ready


def memory_bulkhead():
    """A pod with one sleeping container."""
    directory = bundle(["/bin/sh", "-c", "echo up; exec sleep 1000"])
    warm()
    process = subprocess.Popen(
        ["bulkhead", "run", "--memory", str(MEMORY), "--bundle", directory, "bench"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )
    if process.stdout.readline() != b"up\n":
        raise SystemExit("bulkhead: the container did not come up")
    time.sleep(SETTLE)
    figures = memory(f"{CGROUPS}/bulkhead/default/bench")
    process.kill()
    process.wait()
    subprocess.run(["bulkhead", "gc"], check=True, stdout=subprocess.DEVNULL)
    return figures


def memory_qemu():
    """The same guest up to the agent that waits for its host: without a container."""
    line = command_line()
    warm()
    subprocess.run(["modprobe", "vhost_vsock"], check=True)
    listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    listener.bind((socket.VMADDR_CID_ANY, AGENT_PORT))
    listener.listen()
    listener.settimeout(60)
    cgroup = f"{CGROUPS}/bench-qemu"
    os.mkdir(cgroup)
    command = qemu_command(line, "/tmp/marker", ["-device", "vhost-vsock-device,guest-cid=3"])
    # The shell enters the cgroup before it becomes QEMU, so that every page of QEMU's is charged there.
    process = subprocess.Popen(["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', cgroup, *command], stdin=subprocess.DEVNULL)
    agent, _ = listener.accept()
    time.sleep(SETTLE)
    figures = memory(cgroup)
    process.kill()
    process.wait()
    agent.close()
    return figures


def stdio_bulkhead():
    directory = bundle(["/bin/cat"])
    size = 256 << 20
    since = time.monotonic()
    script = f"head -c {size} /dev/zero | bulkhead run --bundle {directory} bench | wc -c"
    count = int(subprocess.run(["sh", "-c", script], check=True, stdout=subprocess.PIPE, text=True).stdout)
    if count != size:
        raise SystemExit(f"{count} bytes of {size} came back")
    return {"mib_per_s": 256 / (time.monotonic() - since)}


def tools_root():
    """A root with the lab's programs and an empty data directory; the same for both sides."""
    root = "/tmp/root"
    for name in ("usr", "data", "proc", "sys", "dev", "tmp", "etc"):
        os.makedirs(f"{root}/{name}")
    for name in ("bin", "sbin", "lib", "lib64"):
        os.symlink(f"usr/{name}", f"{root}/{name}")
    subprocess.run(["mount", "--bind", "/usr", f"{root}/usr"], check=True)
    return root


def qemu_over(root, workload, prepare="", devices=(), inside=()):
    """Starts QEMU with the root as its virtio-fs share, by virtiofsd, and a guest that does `prepare` (busybox at /busybox, the share
    at /mnt) and then the workload, whose output is data/result of the root. `inside` is a command that QEMU is started by."""
    line = command_line()
    init = "/tmp/init"
    os.makedirs(f"{init}/mnt")
    shutil.copy("/bin/busybox", f"{init}/busybox")
    with open(f"{init}/init", "w") as file:
        file.write(
            "#!/busybox sh\n/busybox mount -t virtiofs share /mnt && /busybox mount -t proc proc /mnt/proc && /busybox mount -t devtmpfs dev /mnt/dev\n"
            f"{prepare}\n/busybox chroot /mnt /bin/sh {workload} > /mnt/data/result 2>&1\n/busybox sync; /busybox reboot -f\n"
        )
    os.chmod(f"{init}/init", 0o755)
    initramfs, socket_path = "/tmp/initramfs", "/tmp/virtiofsd.sock"
    subprocess.run(["sh", "-c", f"cd {init} && find . | busybox cpio -o -H newc > {initramfs} 2>/dev/null"], check=True)
    # It ends with QEMU.
    subprocess.Popen(
        ["/usr/libexec/virtiofsd", f"--socket-path={socket_path}", f"--shared-dir={root}", "--cache=auto", "--announce-submounts", "--sandbox=namespace"],
        stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not os.path.exists(socket_path):
        time.sleep(0.05)
    share = [
        "-object", "memory-backend-memfd,id=mem,size=512M,share=on", "-machine", "memory-backend=mem",
        "-chardev", f"socket,id=fs,path={socket_path}", "-device", "vhost-user-fs-device,chardev=fs,tag=share",
    ]  # fmt: skip
    command = [*inside, *qemu_command(line, "/tmp/marker", [*share, *devices], initramfs=initramfs, memory=512)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL)


def file_tree():
    """The root, with small files in a tar in its data directory."""
    root = tools_root()
    # On an ext4 disk: tmpfs knows no O_DIRECT.
    script = "truncate -s 400M /tmp/data.img && mkfs.ext4 -q -N 20000 /tmp/data.img && mount -o loop /tmp/data.img $0/data"
    subprocess.run(["sh", "-c", script, root], check=True)
    small = "mkdir /tmp/s; i=0; while [ $i -lt $1 ]; do echo content of file $i > /tmp/s/file-$i; i=$((i+1)); done; tar -cf $0/data/small.tar -C /tmp/s ."
    subprocess.run(["sh", "-c", small, root, str(SMALL_FILES)], check=True)
    shutil.copy("/src/tests/bench/files.sh", f"{root}/data/files.sh")
    subprocess.run(["fio", "--version"], stdout=subprocess.DEVNULL, check=True)
    return root


REQUESTS = (2 << 20) // 4096  # of rand-read-direct1: io_size by block size in files.sh


class FileFigures:
    """The workload's lines as they come, with the exits of the guest between "begin" and "end"."""

    def __init__(self):
        self.figures, self.exits, self.last = {}, {}, ""

    def take(self, line, pid):
        words = line.split()
        self.last = line
        if words[:1] == ["begin"]:
            self.exits[words[1]] = kvm_exits(pid)
        elif words[:1] == ["end"] and len(words) == 2:
            self.exits[words[1]] = kvm_exits(pid) - self.exits[words[1]]
        elif len(words) == 3:
            self.figures[words[0]] = float(words[1])

    def finish(self):
        if len(self.figures) < 7:
            raise SystemExit(f"only {self.figures}; the last line was {self.last!r}")
        return {**self.figures, "exits/4k-direct-read": self.exits["rand-read-direct1"] / REQUESTS}


def files_bulkhead():
    root = file_tree()

    def change(config):
        config["root"] = {"path": root, "readonly": False}
        config["linux"]["readonlyPaths"] = []
        for capabilities in ("bounding", "effective", "permitted"):
            config["process"]["capabilities"][capabilities] += ["CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE", "CAP_CHOWN", "CAP_FOWNER"]

    directory = bundle(["/bin/sh", "/data/files.sh", "/data"], extra=change)
    command = ["bulkhead", "run", "--memory", "512", "--bundle", directory, "bench"]
    figures, vmm = FileFigures(), None
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            vmm = vmm or int(subprocess.run(["pgrep", "-f", "bulkhead-vmm run"], check=True, stdout=subprocess.PIPE, text=True).stdout)
            figures.take(line, vmm)
    return figures.finish()


def files_qemu():
    root = file_tree()
    figures, result = FileFigures(), f"{root}/data/result"
    with qemu_over(root, "/data/files.sh /data") as process:
        while not os.path.exists(result) and process.poll() is None:
            time.sleep(0.05)
        with open(result) as file:
            rest, alive = "", True
            while alive:
                alive = process.poll() is None
                *lines, rest = (rest + file.read()).split("\n")
                for line in lines:
                    figures.take(line, process.pid)
                time.sleep(0.05)
    return figures.finish()


PEER, POD = "10.99.0.1", "10.99.0.2"


def wire():
    """The namespaces `pod` and `peer` with a pair of interfaces between them, and iperf3's server at the far end."""
    script = f"""ip netns add pod && ip netns add peer && ip -n pod link add eth0 type veth peer name peer0 netns peer
        ip -n pod addr add {POD}/24 dev eth0 && ip -n peer addr add {PEER}/24 dev peer0
        ip -n pod link set eth0 up && ip -n peer link set peer0 up && ip -n peer link set lo up
        ip netns exec peer iperf3 --server --daemon"""
    subprocess.run(["sh", "-ec", script], check=True)


def net_root():
    """The root with the network's workload."""
    root = tools_root()
    shutil.copy("/src/tests/bench/net.sh", f"{root}/data/net.sh")
    return root


class NetFigures:
    """The workload's lines."""

    def __init__(self):
        self.figures, self.last = {}, ""

    def take(self, line):
        words, self.last = line.split(), line
        if len(words) == 3:
            self.figures[words[0]] = float(words[1])

    def finish(self):
        if len(self.figures) < 5:
            raise SystemExit(f"only {self.figures}; the last line was {self.last!r}")
        return self.figures


def in_pod_network(config):
    for namespace in config["linux"]["namespaces"]:
        if namespace["type"] == "network":
            namespace["path"] = "/run/netns/pod"


def net_bulkhead():
    root = net_root()
    wire()

    def change(config):
        in_pod_network(config)
        config["root"] = {"path": root, "readonly": False}
        for capabilities in ("bounding", "effective", "permitted"):
            config["process"]["capabilities"][capabilities] += ["CAP_NET_RAW"]

    directory = bundle(["/bin/sh", "/data/net.sh", PEER], extra=change)
    command = ["bulkhead", "run", "--memory", "512", "--bundle", directory, "bench"]
    figures = NetFigures()
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            figures.take(line)
    return figures.finish()


def net_qemu():
    """QEMU's own user-space device on a tap, redirected to the same interface in the same way."""
    root = net_root()
    wire()
    in_pod = ["ip", "netns", "exec", "pod"]
    script = """ip tuntap add tap0 mode tap vnet_hdr && ip link set tap0 up
        for pair in "tap0 eth0" "eth0 tap0"; do set -- $pair
            tc qdisc add dev $1 ingress
            tc filter add dev $1 parent ffff: protocol all u32 match u32 0 0 action mirred egress redirect dev $2
        done
        cat /sys/class/net/eth0/address"""
    mac = subprocess.run([*in_pod, "sh", "-ec", script], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    prepare = f"""/busybox mount -t tmpfs tmp /mnt/tmp
        /busybox ip link set lo up; /busybox ip addr add {POD}/24 dev eth0; /busybox ip link set eth0 up"""
    devices = ["-netdev", "tap,id=net,ifname=tap0,script=no,downscript=no,vhost=off", "-device", f"virtio-net-device,netdev=net,mac={mac}"]
    status = qemu_over(root, f"/data/net.sh {PEER}", prepare, devices, inside=["timeout", "300", *in_pod]).wait()
    if status != 0:
        raise SystemExit(f"qemu: ended with {status}")
    figures = NetFigures()
    with open(f"{root}/data/result") as file:
        for text in file:
            figures.take(text)
    return figures.finish()


def boot_with_nic():
    """Agent ready with and without an interface, in turn in one lab."""
    command_line()
    warm()
    wire()
    ready = {}
    # The first guest with an interface has the host load its modules.
    timeline(bundle(["/bin/true"], extra=in_pod_network))
    for name, change in (("without", None), ("with", in_pod_network)) * 5:
        report = timeline(bundle(["/bin/true"], extra=change))
        at = {moment["name"]: moment["at_ns"] / 1e6 for moment in report["moments"]}
        ready.setdefault(name, []).append(at["agent ready"] - at["command start"])
    return {f"ready_{name}_ms": sorted(times)[2] for name, times in ready.items()}


def template():
    """A pod that boots, one from a template and runc, in turn in one lab."""
    directory = bundle(["/bin/true"])
    configuration = "/tmp/bench-cold.toml"
    with open(configuration, "w") as file:
        file.write('template = "off"\n')
    warm()
    since = time.monotonic()
    subprocess.run(["bulkhead", "template", "build", "--run", "--memory", str(MEMORY)], check=True, stdout=subprocess.DEVNULL)
    figures = {"build_ms": [(time.monotonic() - since) * 1000]}

    def take(name, value):
        figures.setdefault(name, []).append(value)

    # The first of each kind warms up.
    for nth in range(6):
        for name, words in (("cold", ["--config", configuration]), ("clone", [])):
            report = timeline(directory, words)
            at = {moment["name"]: moment["at_ns"] / 1e6 for moment in report["moments"]}
            if ("kernel to init" in at) != (name == "cold"):
                raise SystemExit(f"{name}: {sorted(at)}")
            if nth:
                take(f"{name}_whole_ms", report["whole_ms"])
                take(f"{name}_ready_ms", at["agent ready"] - at["command start"])
                take(f"{name}_dialled_ms", max(at["agent dialled"], at["first guest instruction"]) - at["vmm start"])
        since = time.monotonic()
        subprocess.run(["runc", "run", "--bundle", directory, "bench"], check=True, stdin=subprocess.DEVNULL)
        if nth:
            take("runc_whole_ms", (time.monotonic() - since) * 1000)
    return {name: sorted(values)[len(values) // 2] for name, values in figures.items()}


MEASUREMENTS = {f.__name__: f for f in (boot_bulkhead, boot_qemu, runc, memory_bulkhead, memory_qemu, stdio_bulkhead, files_bulkhead, files_qemu, net_bulkhead, net_qemu, boot_with_nic, template)}

if __name__ == "__main__":
    print(json.dumps(MEASUREMENTS[sys.argv[1]]()))
