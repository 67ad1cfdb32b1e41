"""The lab: a virtual Debian 13 host with a nested /dev/kvm, run under QEMU's software emulation.

One module a noun, from the bottom up: `cache` (keyed directories on this host), `debian` (a Debian 13 root made by
mmdebstrap), `hosttools` (programs of that root, run on this host), `image` (kernel, initramfs and root image of the lab),
`disks` (what one run brings along), `qemu` (one QEMU process and its QMP), `channel` (frames to and from the guest's agent),
`machine` (a booted or restored lab), `cli` (the verbs).
"""
