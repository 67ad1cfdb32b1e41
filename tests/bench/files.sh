#!/bin/sh
# The file workload, run inside the guest by either side: DIR holds small.tar; one line "name value unit" a figure. The lines
# "begin name" and "end name" around each are for whoever counts exits meanwhile.
# A run as init (QEMU's side) has no /proc/sys/vm/drop_caches read-only, a container neither (tests/bench/inlab.py).
set -eu
cd "$1"
drop() { sync; echo 3 > /proc/sys/vm/drop_caches; }
figure() { # name, fio words
  name=$1; shift
  drop
  echo "begin $name"
  fio --name=x --filename=big --size=64m --ioengine=psync --thread --invalidate=0 --minimal "$@" > fio.out
  echo "end $name"
  # fio's terse format 3: field 7 is read KiB/s, 8 read IOPS, 48 write KiB/s.
  case $name in
  rand*) echo "$name $(cut -d';' -f8 fio.out) iops" ;;
  *read*) echo "$name $(cut -d';' -f7 fio.out) KiB/s" ;;
  *write*) echo "$name $(cut -d';' -f48 fio.out) KiB/s" ;;
  esac
}
for direct in 0 1; do
  figure seq-write-direct$direct --rw=write --bs=1m --direct=$direct --end_fsync=1
  figure seq-read-direct$direct --rw=read --bs=1m --direct=$direct
  figure rand-read-direct$direct --rw=randread --bs=4k --io_size=2m --direct=$direct
done
drop
now() { read -r up _ < /proc/uptime; echo "$up" | tr -d .; }
echo "begin untar"
since=$(now)
mkdir tree; tar -xf small.tar -C tree; rm -r tree
echo "untar-rm $(( ($(now) - since) * 10 )) ms"
