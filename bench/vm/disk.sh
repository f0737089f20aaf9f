# disk.sh: the disk behind the swap of the part writeback, in the guest's own memory (null_blk), with a real one's latency and
# bandwidth. Sourced behind lib.sh and contenders.sh.
#
# Each request is answered by a timer, so a single one takes its time as well; QEMU's limits on a disk, which are
# budgets for a span of time, delay no request as long as there are few, User-mode Linux's own disk has none, and dm-delay
# counts in milliseconds. Bandwidth is a budget too, but one of 20 ms.

# make_disk SIZE NANOSECONDS MIB_PER_SECOND: sets SWAP_DISK. It is written once from end to end, so that it has all its memory
# from then on: none of it is allocated while programs run, and how much a contender writes changes nothing for it.
make_disk() {
    local set=/sys/kernel/config/nullb/nullb0
    load null_blk nr_devices=0
    grep -q " configfs " /proc/mounts || mount -t configfs configfs /sys/kernel/config
    mkdir $set 2>/dev/null || give_up "the kernel has no null_blk"
    echo $(($(bytes "$1") >> 20)) >$set/size && echo 4096 >$set/blocksize && echo 1 >$set/memory_backed &&
        echo 2 >$set/irqmode && echo "$2" >$set/completion_nsec && echo "$3" >$set/mbps &&
        echo 64 >$set/hw_queue_depth && echo 1 >$set/submit_queues && echo 1 >$set/power || give_up "null_blk refuses"
    SWAP_DISK=/dev/nullb0
    echo none >/sys/block/nullb0/queue/scheduler
    dd if=/dev/zero of=$SWAP_DISK bs=1M count=$(($(bytes "$1") >> 20)) oflag=direct status=none || give_up "null_blk cannot be filled"
}

# show_disk: what it really gives, for who reads the figures.
show_disk() {
    local what way mean p50 kib before after
    for what in randread:4k:1 randwrite:4k:1 randread:4k:32 write:128k:1 write:128k:8 read:128k:8; do
        IFS=: read -r way size depth <<<"$what"
        read -ra before < <(disk_bytes)
        fio --name=disk --filename="$SWAP_DISK" --direct=1 --ioengine=io_uring --iodepth="$depth" --size=128m \
            --runtime=1500ms --time_based --rw="$way" --bs="$size" --lat_percentiles=1 \
            --output-format=json --output=/tmp/fio.json >/dev/null 2>&1 || give_up "the disk does not work"
        read -ra after < <(disk_bytes)
        read -r mean p50 kib total < <(tmem-guest json \
            "jobs.0.${way#rand}".{lat_ns.mean,lat_ns.percentile.50.000000,bw,io_kbytes} </tmp/fio.json)
        say "the disk alone, $way of $size at depth $depth: mean $(us "$mean") us, p50 $(us "$p50") us," \
            "$((kib / 1024)) MiB/s; fio moved $((total >> 10)) MiB, counted are" \
            "$(mib $((after[0] - before[0]))) read, $(mib $((after[1] - before[1]))) written"
    done
}
