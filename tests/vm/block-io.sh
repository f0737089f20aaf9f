# block-io.sh: the device as a disk: what is written is read back, whatever the size and order of
# requests, a file system survives on it, and what is discarded or zeroed is gone and gives its
# memory back.

. "$(dirname "$0")/lib.sh"
cd /tmp

# fio_verify NAME ARGS...: writes the area and reads all of it back against checksums.
fio_verify() {
    local name=$1
    shift
    check "fio: $name" timeout 300 fio --name=verify --filename="$DEVICE" --direct=1 --thread \
        --ioengine="${FIO_ENGINE:-io_uring}" --size=32M --verify=crc32c --verify_fatal=1 \
        --do_verify=1 --verify_state_save=0 --refill_buffers --buffer_compress_percentage=60 \
        --output-format=terse "$@"
}

# same_at OFFSET FILE: the device holds the file's bytes at so many MiB, read past the page cache.
same_at() {
    dd if="$DEVICE" iflag=direct bs=1M skip="$1" count=$(($(stat -c %s "$2") >> 20)) status=none |
        cmp - "$2"
}

start_tmem 512M 60%
# Fields 41 and 19 are the scheduling policy (3 is SCHED_BATCH) and the nice value.
scheduled() {
    awk -v server="$1" '/\(tmem-(b0q[0-9]+|ublkh[0-9]+|supply|pulse)\)/ == server && ($41 == 3 && $19 == -20) == server { n++ }
        END { print n + 0 }' "/proc/$(pid_of tmem-worker)"/task/*/stat
}
if is_tmem; then
    all_scheduled() {
        local threads
        threads=$(ls "/proc/$(pid_of tmem-worker)/task" | wc -l)
        [ $(($(scheduled 1) + $(scheduled 0))) = "$threads" ]
    }
    check "who serves requests, and nobody else, is of the batch class and the highest weight" \
        wait_for 10 all_scheduled
    check_number "that is a thread for each queue and some to help" "$(scheduled 1)" -ge 3
fi

for bs in 4k 16k 64k 128k 1m; do
    fio_verify "sequential $bs" --rw=write --bs=$bs --iodepth=8
    fio_verify "random $bs" --rw=randwrite --bs=$bs --iodepth=16
done
fio_verify "random sizes" --rw=randwrite --bsrange=4k-256k --iodepth=16
fio_verify "reads and writes" --rw=randrw --bs=4k --iodepth=32
fio_verify "two writers" --rw=randwrite --bs=4k --iodepth=16 --numjobs=2 --size=16M \
    --offset_increment=64M
fio_verify "one at a time, synchronous" --rw=randwrite --bs=4k --ioengine=psync --size=8M
show_stats
# By processors that were idle while one had much to write.
is_tmem && check_number "helpers did pages" \
    "$(tmem stats --json | tmem-guest json devices.0.io.helped_pages)" -gt 100
check_frames "after fio"
check "blkdiscard of everything" blkdiscard "$DEVICE"
check_empty "after the discard"

# Discard and write-zeroes of a part: that part is zeros, its neighbours are not touched.
dd if=/dev/urandom of=a bs=1M count=8 status=none
dd if=/dev/zero of=zeros bs=1M count=2 status=none
for how in "" -z; do
    name="blkdiscard${how:+ }$how"
    dd if=a of="$DEVICE" oflag=direct bs=1M seek=16 status=none
    check "$name: the data is there" same_at 16 a
    before=$(stat_of orig_data_size)
    check "$name of a part" blkdiscard $how -o 20M -l 2M "$DEVICE"
    dd if=a of=head bs=1M count=4 status=none
    dd if=a of=tail bs=1M skip=6 status=none
    check "$name: the part is zeros" same_at 20 zeros
    check "$name: what is before it stays" same_at 16 head
    check "$name: what is behind it stays" same_at 22 tail
    if [ -z "$how" ] || is_tmem; then
        check_number "$name: its memory is free" \
            $((before - $(stat_of orig_data_size))) -ge $((2 << 20))
    fi
    check "$name: it can be written again" dd if=head of="$DEVICE" oflag=direct bs=1M seek=20 status=none
    check "$name: and is what was written" same_at 20 head
done
dd if=a of="$DEVICE" oflag=direct bs=1M seek=16 status=none
check "an odd discard" blkdiscard -o 16M -l 12K "$DEVICE"
dd if=a of=rest bs=4k skip=3 status=none
check "an odd discard leaves the rest" eval \
    'dd if="$DEVICE" iflag=direct bs=4k skip=$((4096 + 3)) count=2045 status=none | cmp - rest'
check "blkdiscard after it all" blkdiscard "$DEVICE"
check_empty "after the partial discards"
rm -f a head tail rest zeros

# A file system with a real tree on it.
check "mkfs.ext4" mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0 "$DEVICE"
check "mount" mount -t ext4 -o discard "$DEVICE" /mnt
check "copy a tree" cp -a /usr /mnt/usr
check "umount" umount /mnt
check "e2fsck finds nothing" e2fsck -f -n "$DEVICE"
check "mount again" mount -t ext4 -o discard "$DEVICE" /mnt
check "the tree is the same" diff -r --no-dereference /usr /mnt/usr
show_stats
full=$(stat_of orig_data_size)
check "remove the tree" rm -rf /mnt/usr
check "sync" sync
check "umount after the removal" umount /mnt
check_number "removing files gives memory back" "$(stat_of orig_data_size)" -lt $((full / 4))
check "e2fsck finds nothing after the removal" e2fsck -f -n "$DEVICE"
check "blkdiscard at the end" blkdiscard "$DEVICE"
check_empty "at the end"

stop_tmem
finish
