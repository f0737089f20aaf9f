# nbd.sh: the front end for kernels without ublk: the kernel's own NBD client on our socket.
#
# First as swap, under the same pressure as swap by ublk, with no ublk driver in the kernel at all;
# then as a disk that several clients use at the same time, one of them by way of ublk.

. "$(dirname "$0")/lib.sh"
is_tmem || give_up "this is about tmem's own front end"
SOCKET=/run/tmem/nbd.sock

list() { tmem list --noheadings --raw --output "$1"; }

# attach DEVICE EXPORT ARGS...: the kernel's client, by hand.
attach() {
    local device=$1 export=$2
    shift 2
    nbd-client -unix $SOCKET "$device" -N "$export" -timeout 1000000 "$@" && wait_for 10 connected "$device"
}
connected() { [ -e "/sys/block/${1#/dev/}/pid" ]; }
detach() { nbd-client -d "$1" && wait_for 10 eval "! connected $1"; }

check_code "TCP is refused, with the reason" 2 'TCP' tmem run --nbd tcp:127.0.0.1:10809 --swap 64M
[ ! -e /dev/ublk-control ] && pass "there is no ublk driver" || fail "the ublk driver is loaded"

check_code "a reserve that could deadlock is refused" 1 'sysctl vm.watermark_boost_factor=0' \
    tmem run --frontend nbd --swapon --swap 64M
echo 0 >/proc/sys/vm/watermark_boost_factor
echo 16384 >/proc/sys/vm/min_free_kbytes
FRONTEND=nbd start_tmem "$(mem 135)" 58% --swapon
check "the device is the kernel's client" eval '[[ $DEVICE == /dev/nbd* ]]'
check "swapped on" grep -q "^$DEVICE" /proc/swaps
check_number "with one connection, which another can be put in the place of" "$(list CONNECTIONS)" -eq 1
check_number "no request is longer than can be answered with an error" \
    "$(cat "/sys/block/${DEVICE#/dev/}/queue/max_sectors_kb")" -le 128
# Field 41 is the scheduling policy: 2 is SCHED_RR.
check_number "the NBD workers, and nobody else but the watchdog, are real-time threads" \
    "$(awk '$41 == 2 && /\(tmem-nbd[0-9]\)/ { n++ } $41 == 2 && !/\(tmem-(nbd[0-9]|watchdog)\)/ { n += 100 }
        END { print n + 0 }' "/proc/$(pid_of tmem-worker)"/task/*/stat)" -eq "$(nproc)"
check_number "the socket is its owner's alone" "$(stat -c %a $SOCKET)" -eq 600
pressure "every page is right" --memory 130% --fill heap=60,same=25,text=15 --seed 5 --passes 1 \
    --touches 0.05
check_number "it was really swapped" "$(awk '/^pswpout/ { print $2 }' /proc/vmstat)" -gt 5000
check_number "and read back" "$(awk '/^pswpin/ { print $2 }' /proc/vmstat)" -gt 1000
show_stats
check_frames "after the pressure"
check_code "a device added later is swapped on too" 0 /dev/nbd tmem add swap --size 32M --name second
second=$(list NAME,PATH | awk '$1 == "second" { print $2 }')
check_code "del swaps it off and detaches it" 0 '' tmem del second
connected "$second" && fail "$second is still connected" || pass "$second is disconnected"
FRONTEND=nbd stop_tmem
connected "$DEVICE" && fail "$DEVICE is still connected" || pass "$DEVICE is disconnected"
check_fails "and swap is off" grep -q "^$DEVICE" /proc/swaps

# One device by three ways at the same time: ublk, and two clients of its export.
start_tmem 256M,name=disk 60% --nbd unix:$SOCKET
check "attach, with two connections" attach /dev/nbd0 disk -b 4096 -C 2
check "attach, with small blocks" attach /dev/nbd1 disk -b 512
check_number "three connections" "$(list CONNECTIONS)" -eq 3
check_code "a device with NBD clients is not removed" 5 '3 connections' tmem del disk
dd if=/dev/urandom of=/tmp/a bs=1M count=8 status=none
check "write by ublk" dd if=/tmp/a of="$DEVICE" oflag=direct bs=1M seek=16 status=none
for node in /dev/nbd0 /dev/nbd1; do
    check "read by $node" eval "dd if=$node iflag=direct bs=1M skip=16 count=8 status=none | cmp - /tmp/a"
done
check "write a sector by $node" dd if=/tmp/a of=/dev/nbd1 oflag=direct bs=512 count=3 skip=100 seek=32771 status=none
dd if=/tmp/a of=/tmp/a bs=512 count=3 skip=100 seek=3 conv=notrunc status=none
check "read what became of the page by ublk" eval \
    'dd if="$DEVICE" iflag=direct bs=1M skip=16 count=8 status=none | cmp - /tmp/a'
check "discard by /dev/nbd0" blkdiscard -o 16M -l 8M /dev/nbd0
dd if=/dev/zero of=/tmp/a bs=1M count=8 status=none
check "it is gone by ublk" eval 'dd if="$DEVICE" iflag=direct bs=1M skip=16 count=8 status=none | cmp - /tmp/a'
check_empty "after the discard"
for job in "write 128k" "randwrite 4k" "randrw 1m"; do
    check "fio verifies: $job" timeout 300 fio --name=verify --filename=/dev/nbd0 --direct=1 --thread \
        --ioengine=io_uring --size=24M --verify=crc32c --verify_fatal=1 --do_verify=1 \
        --verify_state_save=0 --refill_buffers --buffer_compress_percentage=60 --iodepth=16 \
        --rw="${job% *}" --bs="${job#* }" --output-format=terse
done
check "mkfs.ext4" mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0 /dev/nbd0
check "mount" mount -t ext4 -o discard /dev/nbd0 /mnt
check "copy a tree" cp -a /usr/sbin /mnt/sbin
check "umount" umount /mnt
check "e2fsck finds nothing, by another way" e2fsck -f -n "$DEVICE"
check "detach" detach /dev/nbd0
check "detach the other" detach /dev/nbd1
check "every connection ends" wait_for 10 eval '[ "$(list CONNECTIONS)" = 0 ]'
check_code "then it is removed" 0 '' tmem del disk
stop_tmem
check_fails "the socket is gone" test -e $SOCKET
finish
