# kill-writeback.sh [KILLS [SEED]]: the process that serves is killed while it writes to a backing file and reads from it:
#
# - on a disk as it is, and on one on which each write takes a tenth of a second, so that something is under way at nearly
#   every death;
# - once on a disk that does not answer.
#
# What the dead process was writing may land after its death, and must not land in what the next one has written: that one
# writes nothing until it is sure.

. "$(dirname "$0")/lib.sh"
is_tmem || give_up "this is about tmem's own processes"
kills=${1:-20}
seed=${2:-1}
pages=32768
disk=/dev/vdb
readonly sectors=$(cat /sys/block/vdb/size)
modprobe -a dm-mod dm-delay || give_up "this kernel has no dm-delay: a disk cannot be made slow"
device() { tmem-guest device --path "$DEVICE" --pages $pages --request 32 "$@"; }
# write_all VERSION: all of it anew. A page that gets no memory within a second is refused, which may be on a slow disk: then
# all of it once more, as often as is meant.
tries=1
write_all() {
    local try
    for try in $(seq $tries); do
        device --write "$1" >/tmp/written 2>&1 && return
        grep -q 'No space left' /tmp/written || break
    done
    cat /tmp/written
    return 1
}

# Milliseconds: since the start, and in which the slow disk had something to do.
uptime_ms() { awk '{ printf "%d\n", $1 * 1000 }' /proc/uptime; }
busy_ms() { awk "{ print \$10 }" "/sys/block/$(dmsetup info -c --noheadings -o blkdevname slow)/stat"; }

# begin DISK: a device of which more is written than memory may hold.
begin() {
    start_tmem 512M 40M --backing "$1"
    check "$1: there are two standbys" wait_for 60 are_standbys 2
    version=1
    check "$1: more is written than memory may hold" write_all $version
    check_number "$1: some of it to the file" "$(stat_of bd_count)" -gt 1000
}

# kill_workers COUNT: workers are killed while the device is read and written.
kill_workers() {
    tmem-guest kill --name tmem-worker --while tmem-standby --count "$1" --seed "$seed" >/tmp/kills &
    local killer=$!
    while kill -0 $killer 2>/dev/null; do
        check "version $version is read" device --read $version
        version=$((version + 1))
        check "version $version is written" write_all $version
    done
    wait $killer
    check_number "$1 workers were killed, and each was succeeded" $? -eq 0
    cat /tmp/kills
}

# end DISK: all is there, and nothing failed.
end() {
    check "$1: version $version is read at last" device --read $version
    check_number "$1: no job failed" "$(stat_of log_failed_jobs)" -eq 0
    check_number "$1: the last one writes, too" "$(stat_of log_written_bytes)" -gt 0
    check_frames "$1: after all"
    stop_tmem
}

begin $disk
kill_workers "$kills"
end $disk

dmsetup create slow --table "0 $sectors delay $disk 0 0 $disk 0 100" ||
    give_up "the device mapper does not work"
dmsetup mknodes
tries=20
begin /dev/mapper/slow
begun=$(uptime_ms) busy=$(busy_ms)
kill_workers "$kills"
# Most of the time, as a rule; how much of it is a matter of the machine.
check_number "the disk had something to do" $(($(busy_ms) - busy)) -gt $((($(uptime_ms) - begun) / 10))
end /dev/mapper/slow
check "nobody holds the slow disk any more" dmsetup remove --retry slow

tries=1
dmsetup create silent --table "0 $sectors linear $disk 0" || give_up "the device mapper does not work"
dmsetup mknodes
begin /dev/mapper/silent
dmsetup suspend --noflush --nolockfs silent
few() { tmem-guest device --path "$DEVICE" --pages $few --request 32 "$@"; }
times_said() { dmesg | grep -cF "still held by the process that died"; }
said=$(times_said)
# Bit by bit, until what is left is so little that writing begins, and no less: nothing makes room.
few=0 under_way=0
while [ "$under_way" = 0 ] && [ $few -lt 4000 ]; do
    few=$((few + 200))
    check "$few pages are written anew" few --write 2
    sleep 1
    under_way=$(stat_of outstanding_writeback_pages)
done
check_number "a part of that does not get to the disk" "$under_way" -gt 0
worker=$(pid_of tmem-worker)
kill -9 "$worker"
check "another process serves" wait_for 60 other_than tmem-worker "$worker"
check "that part is read" few --read 2
check "and written" few --write 3
check "it is said that the disk is held by the dead process" wait_for 30 eval '[ "$(times_said)" -gt $said ]'
check_number "the other one has written nothing" "$(stat_of outstanding_writeback_pages)" -eq 0
check "the state is plain" [ "$(stat_of backing_state)" = slow ]
check "that part is read again" few --read 3
before=$(stat_of bd_writes)
dmsetup resume silent
check "the disk that answers is written to" wait_for 60 eval '[ "$(stat_of bd_writes)" -gt $before ]'
check "and the state is plain" wait_for 60 eval '[ "$(stat_of backing_state)" = ok ]'
version=4
check "version $version is written" write_all $version
end /dev/mapper/silent
check "nobody holds the silent disk any more" dmsetup remove --retry silent
finish
