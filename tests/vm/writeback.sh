# writeback.sh [PART...]: a pool that is smaller than what is swapped, and the rest on a backing file.
#
#   pressure   a program that fits neither memory nor the pool; nothing of it is readable on the disk
#   failing    a smaller one, while the disk refuses writes for a time, and then does not answer
#   enduring   that of `pressure`, while the disk does the same, twice
#   unreadable a disk that has lost a part, or gives back what was not written: pages there are errors, and no others
#   vanishing  a disk that is pulled out
#   leaving    swap that is mostly on the disk is brought back by `tmem del` and by the end of the daemon
#   queueing   by NBD what is in memory is read while the disk does not answer, until too much waits for it; no other process goes
#              on for that
#   file       a file on a file system takes the place of the disk
#   settings   what `tmem set` changes is in force at once, and still is when another process goes on
#   refusals   what is no backing file, and what must not become one
#
# Needs a disk of its own: scripts/vm --mem 256M --disk 1G. What is on it is lost.

. "$(dirname "$0")/lib.sh"
is_tmem || give_up "zram has no such backing file"
cd /tmp || give_up "there is no /tmp"
disk=/dev/vdb
[ -b $disk ] || give_up "needs a second disk: scripts/vm --disk 1G"
modprobe -a dm-mod dm-flakey || give_up "this kernel has no dm-flakey: a disk cannot be made to fail"
readonly sectors=$(cat /sys/block/vdb/size)

# Raw pages carry the program's seed as it is. As bytes this one is a word that can be looked for.
word=tmemseed
seed=7234299922871577972

# figures FIELD...: of one report.
figures() { tmem stats --json | tmem-guest json "${@/#/total.}"; }
# as_expected FIELD OPERATOR VALUE: what wait_for waits for.
as_expected() { test "$(stat_of "$1")" "$2" "$3"; }
check_stat() { check_number "$1" "$(stat_of "$2")" "$3" "$4"; }

show_writeback() {
    local count reads writes live written cleaned failed
    read -r count reads writes live written cleaned failed < <(figures bd_{count,reads,writes} \
        log_{live_bytes,written_bytes,cleaner_written_bytes,failed_jobs})
    show_stats
    say "on the disk $count pages ($live bytes), written $writes pages, read $reads; $written bytes of" \
        "log, $cleaned by the cleaner; $failed failed;" \
        "$(dmesg | grep -c 'Write-error on swap-device') errors of swap"
}

# What holds whatever happened, and is looked at last of all in a part.
check_sane() {
    local limit most corrupt
    read -r limit most corrupt < <(figures mem_limit mem_used_max corrupt_gets)
    check_number "$1: memory stayed within the limit" "$most" -le "$limit"
    check_number "$1: nothing came back changed" "$corrupt" -eq 0
    check_frames "$1"
}

# gone NAME: the device is empty, and so is the log.
check_gone() {
    check_empty "$1"
    check_stat "$1: no page is left on the disk" bd_count -eq 0
    check_stat "$1: nor anything alive in the log" log_live_bytes -eq 0
}

# words_on FILE: how often the word is found in its first 16 MiB, of which 15 are the log's.
words_on() { dd if="$1" iflag=direct bs=1M count=16 status=none | tr '\0' '\n' | grep -c $word; }

# The disk by way of the device mapper, which can make it fail: table TABLE... replaces what it does.
table() {
    { printf '%s\n' "$@" | dmsetup load backing; } && dmsetup suspend --noflush --nolockfs backing &&
        dmsetup resume backing && return
    give_up "the disk's table cannot be changed"
}
healthy() { table "0 $sectors linear $disk 0"; }
# Up for no second, down for an hour.
refuses() { table "0 $sectors flakey $disk 0 0 3600 1 $1"; }
map_disk() {
    dmsetup create backing --table "0 $sectors linear $disk 0" || give_up "the device mapper does not work"
    dmsetup mknodes
    disk_mapped=/dev/mapper/backing
}
unmap_disk() { check "nobody holds the disk any more" dmsetup remove --retry backing; }

group=/sys/fs/cgroup/swapped
make_group() { mkdir $group || give_up "there is no memory cgroup"; }
# in_group COMMAND...: to be started in the background, for it takes the place of this shell.
in_group() { echo "$BASHPID" >$group/cgroup.procs && exec "$@"; }
# start_grouped ARGS...: `tmem-guest pressure` in the group, in the background.
start_grouped() {
    rm -f /tmp/go /tmp/going
    touch /tmp/going
    : >/tmp/grouped
    in_group tmem-guest pressure "$@" >/tmp/grouped 2>/tmp/grouped.err &
    grouped=$!
}
# end_grouped NAME: every page was right.
end_grouped() {
    local status
    touch /tmp/go
    rm -f /tmp/going
    wait "$grouped"
    status=$?
    sed 's/^/      /' /tmp/grouped
    if [ $status = 0 ] && grep -q '^pressure: .* errors=0 ' /tmp/grouped; then
        pass "$1: every page is right"
    else
        fail "$1: status $status: $(tail -3 /tmp/grouped.err)"
    fi
}

# 600 MiB that compress to two fifths: with all memory and the pool full, most of it is on the disk.
part_pressure() {
    local reads
    start_tmem 700M 64M --swapon --backing $disk
    pressure "pressure: every page is right" --memory "${PRESSURE:-600M}" --seed $seed --passes 1 --touches 0.05
    show_writeback
    check_stat "pressure: pages went to the disk" bd_writes -gt 40000
    check_stat "pressure: and came back" bd_reads -gt 20000
    check_stat "pressure: the disk never failed" log_failed_jobs -eq 0
    check_stat "pressure: not a read either" bd_errors -eq 0
    reads=$(stat_of bd_reads)
    check "pressure: each read back is timed" wait_for 20 as_expected readback_latency.count -ge "$reads"
    check_number "pressure: nothing of it can be read on the disk" "$(words_on $disk)" -eq 0
    check_sane pressure
    check "pressure: swapoff" swapoff "$DEVICE"
    check "pressure: blkdiscard" blkdiscard "$DEVICE"
    check_gone pressure
    stop_tmem
}

# While writes fail the pool takes no more than it has room for, and the kernel keeps what is refused. So that the
# program lives on, all of it fits the guest's memory beside the pool: what makes it swap is a limit of its cgroup
# that may be exceeded (memory.high). And nobody else swaps: while the disk does not answer, this script must run.
part_failing() {
    local before second
    map_disk
    make_group
    bytes 32M >$group/memory.high
    start_tmem 200M 16M --swapon --backing $disk_mapped
    start_grouped --memory 100M --seed $seed --while /tmp/going --touches 0.05
    check "failing: pages go to the disk" wait_for 300 as_expected bd_writes -gt 5000
    check "failing: and come back" wait_for 300 as_expected bd_reads -gt 500
    check_number "failing: the disk is known to work" "$(stat_of log_failed_jobs)" -eq 0
    check "failing: and said to" state_is ok

    refuses error_writes
    check "failing: the refusing disk is noticed" wait_for 120 state_is failing
    before=$(stat_of bd_reads)
    check "failing: pages still come back from it" wait_for 300 as_expected bd_reads -gt $((before + 200))
    check_stat "failing: failed writes are counted" log_failed_jobs -gt 0
    check_stat "failing: no read failed" bd_errors -eq 0
    show_writeback
    check_frames "failing: while writes fail"
    before=$(stat_of bd_writes)
    healthy
    check "failing: the disk that works again is used again" \
        wait_for 120 as_expected bd_writes -gt $((before + 1000))
    check "failing: and known to work" wait_for 120 state_is ok
    check "failing: that was told" wait_for 20 eval "dmesg | grep 'tmem: the backing file works again'"

    # The first program soon waits for a page on the disk. Another one has only pages to write.
    dmsetup suspend --noflush --nolockfs backing
    in_group tmem-guest pressure --memory 40M --passes 0 --until /tmp/go >/tmp/second &
    second=$!
    check "silent: the disk that does not answer is noticed" wait_for 120 state_is slow
    check "silent: the program lives" kill -0 "$grouped"
    before=$(stat_of bd_writes)
    dmsetup resume backing
    check "silent: once it answers it is used again" wait_for 120 as_expected bd_writes -gt $((before + 1000))
    check "silent: and known to work" wait_for 120 state_is ok
    end_grouped failing
    wait $second
    check_number "silent: every page of the other is right" $? -eq 0
    show_writeback
    check_sane failing
    rmdir $group
    check "failing: swapoff" swapoff "$DEVICE"
    check "failing: blkdiscard" blkdiscard "$DEVICE"
    check_gone failing
    stop_tmem
    unmap_disk
}
state_is() { [ "$(stat_of backing_state)" = "$1" ]; }

# The program of `pressure`, and a disk that refuses and then does not answer in the middle of it: once while the program
# writes its pages for the first time, once while it goes through them. It may exceed its memory, slowly: what is refused stays
# there, and where all of the machine's memory is short the kernel would kill it.
part_enduring() {
    local before refused=0 round reads
    map_disk
    make_group
    bytes 64M >$group/memory.high
    start_tmem 700M 64M --swapon --backing $disk_mapped
    start_grouped --memory 600M --seed $seed --passes 1 --touches 0.05
    for round in 20000 150000; do
        check "enduring: pages go to the disk" wait_for 600 as_expected bd_writes -gt $round
        check "enduring: the program goes on" kill -0 "$grouped"
        refuses error_writes
        check "enduring: the refusing disk is noticed" wait_for 120 state_is failing
        check "enduring: writes are refused" wait_for 120 eval '[ "$(refusals)" -gt '$refused' ]'
        sleep 3
        refused=$(refusals)
        reads=$(stat_of bd_reads)
        # At first nobody asks for any.
        [ $round = 20000 ] || check "enduring: pages still come back from it" wait_for 120 as_expected bd_reads -gt $((reads + 50))
        before=$(stat_of bd_writes)
        healthy
        check "enduring: the disk that works again is used again" \
            wait_for 120 as_expected bd_writes -gt $((before + 1000))
        dmsetup suspend --noflush --nolockfs backing
        check "enduring: the disk that does not answer is noticed" wait_for 120 state_is slow
        sleep 3
        dmsetup resume backing
        check "enduring: and known to work" wait_for 120 state_is ok
    done
    check "enduring: the program was in the middle" kill -0 "$grouped"
    end_grouped enduring
    show_writeback
    check_stat "enduring: no read failed" bd_errors -eq 0
    check_sane enduring
    rmdir $group
    check "enduring: swapoff" swapoff "$DEVICE"
    stop_tmem
    unmap_disk
}
refusals() { tmem stats --json | tmem-guest json devices.0.io.enospc_errors; }

# read_all NAME REQUEST RIGHT UNREADABLE: reads every page, of which no fewer are right, and so many, as
# OPERATOR VALUE, unreadable; none is wrong.
read_all() {
    local right wrong unreadable
    tmem-guest device --path "$DEVICE" --pages "$pages" --read 1 --request "$2" >/tmp/device
    tail -1 /tmp/device | sed 's/^/      /'
    read -r right wrong unreadable < <(sed -n \
        's/^device:.* right=\([0-9]*\) wrong=\([0-9]*\) unreadable=\([0-9]*\) .*/\1 \2 \3/p' /tmp/device)
    check_number "$1: right" "${right:-none}" -ge "$3"
    check_number "$1: wrong" "${wrong:-none}" -eq 0
    # shellcheck disable=SC2086 # two words
    check_number "$1: unreadable" "${unreadable:-none}" $4
    check_number "$1: that is all" $((right + wrong + unreadable)) -eq "$pages"
    lost=${unreadable:-0}
}

# No swap: the reads are our own, so each error is seen.
part_unreadable() {
    # Four segments of the log, in which a block is of six pages at most.
    local pages=16384 most=$((4 * 256 * 6)) lost at
    map_disk
    start_tmem 64M 12M --backing $disk_mapped
    check "unreadable: fill" tmem-guest device --path "$DEVICE" --pages $pages --write 1 --request 32
    show_writeback
    check_stat "unreadable: much of it is on the disk" bd_count -gt 6000
    read_all "unreadable: nothing yet" 32 $pages "-eq 0"

    table "0 4096 linear $disk 0" "4096 8192 error" "12288 $((sectors - 12288)) linear $disk 12288"
    read_all "unreadable: a part, by single pages" 1 $((pages - most)) "-gt 100"
    check_stat "unreadable: errors are counted" bd_errors -ge "$lost"
    check "unreadable: it is an input/output error" grep -i 'input/output error' /tmp/device
    read_all "unreadable: a part, by 32 pages" 32 $((pages - most)) "-gt 100"
    refuses error_reads
    read_all "unreadable: all of the disk" 1 2000 "-gt 2000"
    check "unreadable: that the disk fails is told" wait_for 20 state_is failing
    healthy
    read_all "unreadable: the disk is back" 1 $pages "-eq 0"
    check "unreadable: and known to work" wait_for 60 state_is ok
    check_sane unreadable

    # Every other segment of the log has what nobody wrote there.
    check "unreadable: fill once more" tmem-guest device --path "$DEVICE" --pages $pages --write 1 --request 32
    most=$(stat_of bd_count)
    for at in $(seq 0 2 62); do
        dd if=/dev/urandom of=$disk bs=1M seek="$at" count=1 oflag=direct conv=notrunc status=none || give_up "the disk cannot be changed"
    done
    read_all "unreadable: what was changed, by single pages" 1 $((pages - most)) "-gt 100"
    check_stat "unreadable: each is counted" corrupt_gets -ge "$lost"
    read_all "unreadable: what was changed, by 32 pages" 32 $((pages - most)) "-gt 100"
    check "unreadable: the disk is not given up" state_is ok
    # By force, or it looks first what is there.
    check "unreadable: blkdiscard" blkdiscard --force "$DEVICE"
    check_gone unreadable
    stop_tmem
    unmap_disk
    # Or it would be taken for somebody's.
    dd if=/dev/zero of=$disk bs=1M count=64 oflag=direct status=none || give_up "the disk cannot be written"
}

# hold NAME: a program whose pages are mostly on the disk, and for which there is memory enough by now. Its limit may be exceeded: at
# another the kernel kills it now and then, when all that it could take is on its way to the disk.
hold() {
    local swapped
    bytes 16M >$group/memory.high
    start_grouped --memory 100M --seed $seed --passes 0 --until /tmp/go
    wait_for 300 eval 'grep -q waiting /tmp/grouped || ! kill -0 $grouped 2>/dev/null'
    check "$1: the program gets through" grep waiting /tmp/grouped
    swapped=$(($(cat $group/memory.swap.current) / 4096))
    check_number "$1: most of it is swapped" "$swapped" -gt 15000
    check_stat "$1: most of that is on the disk" bd_count -gt $((swapped / 2))
    echo max >$group/memory.high
}

# The pages that return need memory: the program had little only by its cgroup's limit.
part_leaving() {
    local before reads read_before read_after
    make_group
    start_tmem 200M,name=swap0 12M --swapon
    check_code "leaving: a disk is given to a daemon that runs" 0 '' tmem set backing=$disk
    hold del
    read -r before _ read_before _ </sys/block/vdb/stat
    check_code "del: brings everything back" 0 '' tmem del swap0
    read -r reads _ read_after _ </sys/block/vdb/stat
    reads=$((reads - before))
    check_number "del: and more than a block, in sectors" $(((read_after - read_before) / reads)) -ge 12
    check_number "del: a read of the disk brings several pages (in tenths)" $(($(stat_of bd_reads) * 10 / reads)) -ge 15
    check_number "del: it was read from the disk" "$(stat_of bd_reads)" -gt 5000
    end_grouped del
    check_gone del

    check_code "stop: another device" 0 . tmem add swap --size 200M --name swap1
    DEVICE=$(tmem list --noheadings --raw --output NAME,PATH | awk '$1 == "swap1" { print $2 }')
    hold stop
    check_sane leaving
    stop_tmem 300
    check_fails "stop: swap is off" grep -q "^$DEVICE" /proc/swaps
    end_grouped stop
    rmdir $group
}

# begin_spread: begins to read eight pages from all over the device, of which the kernel has chosen somewhere to begin, and used
# half; have_read tells how many of them were read.
begin_spread() {
    local pages n
    pages=$(($(blockdev_bytes "$DEVICE") / 4096))
    rm -f /tmp/spread.*
    for n in 1 2 3 4 5 6 7 8; do
        dd if="$DEVICE" of=/tmp/spread.$n iflag=direct bs=4k skip=$((pages * n / 9)) count=1 status=none &
        reading+=($!)
    done
}
have_read() { find /tmp -name 'spread.*' -size 4096c | wc -l; }
# reads_stand: no read ends for a moment.
reads_ended() { awk '{ print $1 }' "/sys/block/${DEVICE#/dev/}/stat"; }
reads_stand() {
    local before
    before=$(reads_ended)
    sleep 2
    [ "$(reads_ended)" = "$before" ]
}
writes_begun() { tmem stats --json | tmem-guest json devices.0.io.writes; }

# By NBD there is one connection. It goes on without reads that the disk does not answer, as long as they are few;
# then whatever comes behind them waits as well. No other process would fare better, so none is to go on after the minute that
# is enough elsewhere.
part_queueing() {
    local worker second writes reading=()
    map_disk
    make_group
    modprobe nbd nbds_max=4 2>/dev/null
    # As it has to be where swap is on NBD.
    echo 0 >/proc/sys/vm/watermark_boost_factor
    echo 16384 >/proc/sys/vm/min_free_kbytes
    FRONTEND=nbd start_tmem 200M,name=swap0 12M --swapon --backing $disk_mapped
    hold queueing
    worker=$(pid_of tmem-worker)
    dmsetup suspend --noflush --nolockfs backing
    touch /tmp/go
    bytes 16M >$group/memory.high
    in_group tmem-guest pressure --memory 40M --passes 0 >/tmp/second &
    second=$!
    check "queueing: the disk that does not answer is noticed" wait_for 120 state_is slow
    begin_spread
    check "queueing: what needs no disk is read" wait_for 20 eval '[ "$(have_read)" -ge 3 ]'
    writes=$(writes_begun)
    check "queueing: and writes do not wait" wait_for 60 eval '[ "$(writes_begun)" -gt $((writes + 100)) ]'
    # What is not to come takes so long at most. The kernel's client waits as well, to send, and so does what the kernel
    # does about a timeout (it waits for all that dispatch requests): 61 s would be a hung task, and a panic.
    echo 0 >/proc/sys/kernel/hung_task_timeout_secs
    fio --name=many --filename="$DEVICE" --readonly --direct=1 --ioengine=io_uring --iodepth=32 --rw=randread --bs=64k --size=200m --io_size=64m \
        >/tmp/many 2>&1 &
    reading+=($!)
    check "queueing: then much waits for the disk" wait_for 60 eval '[ "$(awk "{ print \$1 }" "/sys/block/${DEVICE#/dev/}/inflight")" -gt 16 ]'
    check "queueing: and for each other" wait_for 60 reads_stand
    begin_spread
    sleep 80
    check_number "queueing: so all waits" "$(have_read)" -eq 0
    check "queueing: the same process serves" [ "$(pid_of tmem-worker)" = "$worker" ]
    check "queueing: and the disk is still slow" state_is slow
    dmsetup resume backing
    check "queueing: it is known to work" wait_for 120 state_is ok
    echo 60 >/proc/sys/kernel/hung_task_timeout_secs
    end_grouped queueing
    wait $second
    check_number "queueing: every page of the other is right" $? -eq 0
    # With an error, where a write was refused: the page is not what it was.
    check "queueing: all that waited has ended" wait_for 60 eval '! kill -0 "${reading[@]}" 2>/dev/null'
    check_sane queueing
    rmdir $group
    FRONTEND=nbd stop_tmem 300
    unmap_disk
}

# The last of all, for it takes the disk away: as if it were pulled out.
part_vanishing() {
    local device worker version pages=20000
    start_tmem 200M 16M --backing $disk
    check "vanishing: more is written than memory may hold" \
        tmem-guest device --path "$DEVICE" --pages $pages --request 32 --write 1
    check_stat "vanishing: most of it is on the disk" bd_count -gt $((pages / 4))
    device=$(readlink -f /sys/block/vdb/device/..)
    echo 1 >"$device/remove"
    check_fails "vanishing: the disk is gone" test -e $disk
    read_all "vanishing: what was there is an error, and the rest right" 32 100 "-gt 1000"
    check "vanishing: it is said that the disk fails" wait_for 60 state_is failing
    check "vanishing: what is written now is taken" \
        tmem-guest device --path "$DEVICE" --pages 200 --request 8 --write 2
    check "vanishing: and read" tmem-guest device --path "$DEVICE" --pages 200 --request 8 --read 2
    check_stat "vanishing: and counted" bd_errors -gt 1000
    # Those that go on had the disk open when it went, and then one that never had.
    for version in 3 4 5; do
        check "vanishing: a process can go on" wait_for 60 are_standbys 2
        worker=$(pid_of tmem-worker)
        kill -9 "$worker"
        check "vanishing: and does" wait_for 60 other_than tmem-worker "$worker"
        check "vanishing: what is in memory is read" \
            tmem-guest device --path "$DEVICE" --pages 200 --request 8 --read $((version - 1))
        check "vanishing: and written" tmem-guest device --path "$DEVICE" --pages 200 --request 8 --write $version
        check "vanishing: it is still said that the disk fails" wait_for 60 state_is failing
    done
    check_frames vanishing
    # By force: its first page cannot be read.
    check "vanishing: blkdiscard" blkdiscard --force "$DEVICE"
    check_gone vanishing
    stop_tmem
}

# Not encrypted here: what is looked for on the disk elsewhere is found.
part_file() {
    check "file: mkfs.ext4" mkfs.ext4 -q -F $disk
    check "file: mount" mount -t ext4 $disk /mnt
    start_tmem 200M 12M --swapon --backing /mnt/backing,size=200M --no-encrypt-backing
    check_number "file: it is made as large as it shall be" "$(stat -c %s /mnt/backing)" -eq "$(bytes 200M)"
    make_group
    hold file
    end_grouped file
    rmdir $group
    show_writeback
    check_stat "file: pages went to it" bd_writes -gt 5000
    check_stat "file: and came back" bd_reads -gt 5000
    check_number "file: they can be read there" "$(words_on /mnt/backing)" -gt 0
    check_sane file
    check "file: swapoff" swapoff "$DEVICE"
    check "file: blkdiscard" blkdiscard "$DEVICE"
    check_gone file
    stop_tmem
    check "file: umount" umount /mnt
    check "file: the file system is whole" e2fsck -f -n $disk
}

# set_to NAME VALUE SHOWN: `tmem set` says what is in force then.
set_to() { check_code "settings: $1" 0 "^writeback-$1=$3" tmem set "writeback-$1=$2"; }

# A device of which half would fit the pool, so what is written is written for one setting or the other.
part_settings() {
    local before began pages=8192 version
    device() { tmem-guest device --path "$DEVICE" --pages $pages --request 32 "$@"; }
    # By force, for there was a file system.
    start_tmem 64M 24M --backing $disk --force
    check "settings: fill" device --write 1
    check_stat "settings: there is room for all of it" bd_writes -eq 0
    set_to high 50% 50%
    set_to low 49.9% 49.9%
    check "settings: what is above the watermark goes" wait_for 60 as_expected bd_count -gt 200
    sleep 2
    check_stat "settings: and no more" bd_count -lt $((pages / 2))
    set_to low 6% 6%
    set_to age 1s 1
    check "settings: what is so old goes" wait_for 60 as_expected zpages -eq 0

    set_to rate 1M 1048576
    before=$(log_written)
    began=$SECONDS
    check "settings: version 2" device --write 2
    check "settings: it goes slowly" wait_for 60 eval '[ $(log_written) -gt $((before + 4000000)) ]'
    check_number "settings: no more than so much a second" $(($(log_written) - before)) -lt $(((SECONDS - began + 4) << 20))
    set_to rate none none

    set_to keep yes yes
    check "settings: version 3" device --write 3
    check "settings: what was written is in memory, too" wait_for 60 as_expected pers_clean_pageframes -gt 200
    set_to keep no no

    check "settings: there are two standbys" wait_for 60 are_standbys 2
    kill -9 "$(stat_of worker_pid)"
    check "settings: another process goes on" wait_for 60 as_expected takeovers -eq 1
    check "settings: version 4" device --write 4
    check "settings: what is so old goes there, too" wait_for 60 as_expected zpages -eq 0

    set_to daily 64M 67108864
    version=5
    while [ $version -lt 15 ] && ! state_is spent; do
        check "settings: version $version" device --write $version
        wait_for 60 eval 'as_expected zpages -eq 0 || state_is spent'
        version=$((version + 1))
    done
    check "settings: as much is written as may be in a day" state_is spent
    check "settings: the last version" device --write 15
    before=$(log_written)
    sleep 3
    check_number "settings: and no more" "$(log_written)" -eq "$before"
    check "settings: there are two standbys again" wait_for 60 are_standbys 2
    kill -9 "$(stat_of worker_pid)"
    check "settings: a third process goes on" wait_for 60 as_expected takeovers -eq 2
    check "settings: which knows it too" wait_for 60 state_is spent
    sleep 2
    check_number "settings: and writes nothing" "$(log_written)" -eq 0
    set_to daily none none
    check "settings: until it may be" wait_for 60 eval '[ $(log_written) -gt 0 ]'
    check "settings: it is known" wait_for 60 state_is ok
    check "settings: every page is right" device --read 15
    check_sane settings
    stop_tmem
}
# All that was written to the log.
log_written() {
    local bytes cleaned
    read -r bytes cleaned < <(figures log_{written,cleaner_written}_bytes)
    echo $((bytes + cleaned))
}

# refused NAME CODE PATTERN BACKING [ARGS...]: by a daemon beside another that may run.
refused() {
    local name=$1 code=$2 pattern=$3
    shift 3
    check_code "refusals: $name" "$code" "$pattern" timeout 60 \
        tmem run --control /run/tmem/refused.sock --swap 64M --pool-limit 32M --backing "$@"
}

part_refusals() {
    modprobe ublk_drv
    check "refusals: mkfs.ext4" mkfs.ext4 -q -F $disk
    refused "a disk with a file system" 12 'ext4.*--force' $disk
    check "refusals: which is whole" e2fsck -f -n $disk
    mount -t ext4 $disk /mnt || give_up "cannot mount $disk"
    refused "a mounted disk" 5 'mounted' $disk
    refused "a mounted disk, by force" 5 'mounted' $disk --force
    refused "a new file without a size" 2 'size' /mnt/new
    check_fails "refusals: which is not made" test -e /mnt/new
    refused "a folder" 2 'folder|directory' /mnt
    refused "a file in no folder" 1 '/mnt/none/new' /mnt/none/new,size=64M
    refused "a file for which there is no room" 8 'no room' /mnt/new,size=16G
    check_fails "refusals: which is not left there" test -e /mnt/new
    refused "a file in memory" 2 'memory' /tmp/new,size=64M
    umount /mnt
    { mkswap $disk >/dev/null && swapon $disk; } || give_up "cannot swap on $disk"
    refused "a disk that the kernel swaps to" 5 'swapped on' $disk --force
    swapoff $disk
    refused "a disk with a swap area" 12 'swap.*--force' $disk
    start_tmem 64M 32M --backing $disk --force
    check "refusals: by force it is taken" tmem-guest device --path "$DEVICE" --pages 256 --write 1
    refused "a disk that another daemon has" 5 'use' $disk --force
    check "refusals: which is not disturbed" tmem-guest device --path "$DEVICE" --pages 256 --read 1
    stop_tmem
    start_tmem 64M 32M --backing $disk
    pass "refusals: what an earlier daemon has left is no hindrance"
    stop_tmem
}

[ $# -gt 0 ] || set -- pressure failing enduring unreadable leaving queueing file settings refusals vanishing
run_parts "$@"
