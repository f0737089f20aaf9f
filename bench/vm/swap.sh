# swap.sh: the same programs in the same memory, on one kind of swap after the other.
#
# There are two kinds of pressure, and both are here. `touch` has the whole guest: what its swap takes
# of memory is missing to it, as on a user's machine. `sort` and `python` are in a memory cgroup, which
# is steadier: their memory is the same whatever else the guest does, and how much is swapped does not
# hang on the last megabyte. What the swap itself takes is not theirs there, but for zswap: the kernel
# charges its pool to the cgroup. Where there is a POOL_LIMIT all have the same memory in all: the cgroup of those that have no
# pool beside it is larger by that.
#
# The device is made before a run and removed after it; the kinds take turns within each case, round
# after round.
#
#   touch    a program that touches its memory at random, verifies each page and times each fault
#   sort     sort(1) of text with a buffer that is larger than memory
#   python   dictionaries, strings and lists, grouped, changed and sorted
#
# A run counts only if its result is right and pages were really swapped out and in.
#
# Contenders that have a disk have it to themselves, in turn. What is written to it is counted by its driver, from the
# start of the program to its end. tmem also says itself how many pages that were, and how many bytes of log.
#
#   ROUNDS (5); PLAN: words CASE=CONTENDER,CONTENDER..., where CASE is a program and its page-cluster,
#   as touch-pc0; SIZE of the devices; LONGEST, seconds that a program may take; TOUCH_MEMORY, TOUCHES, SORT_LINES, PYTHON_RECORDS: how large the programs are; GROUP_MEMORY, of
#   the cgroup, and POOL_LIMIT: a size or a percentage of the guest's memory; DISK, SIZE:NANOSECONDS:MIB, has one made
#   (disk.sh), else it is /dev/vdb; SORT_SUM, PYTHON_SUM: what they say where memory is enough

. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/contenders.sh"
. "$(dirname "$0")/disk.sh"
HERE=$(cd "$(dirname "$0")" && pwd)
SWAP_DISK=/dev/vdb SIZE=${SIZE:-256M} LONGEST=${LONGEST:-180}
declare -A LEFT_OUT
cd /tmp

# All that the virtual memory system has moved to and from swap, be it a device or zswap's pool: what
# zswap writes to its device later has left memory already. And pages of files that were read again.
pages_moved() {
    awk '{ n[$1] = $2 }
        END { print n["pswpout"] + n["zswpout"] - n["zswpwb"], n["pswpin"] + n["zswpin"],
            n["workingset_refault_file"] }' /proc/vmstat
}

# disk_bytes: read from the disk and written to it so far.
disk_bytes() { awk '{ print $3 * 512, $7 * 512 }' "/sys/block/${SWAP_DISK#/dev/}/stat"; }

# log_of CONTENDER: pages that tmem has written back so far, and bytes of log: those of their frames, and those that the
# cleaner has written again.
log_of() {
    tmem stats --json --control "/run/tmem/$1.sock" |
        tmem-guest json total.{bd_writes,log_written_bytes,log_cleaner_written_bytes}
}

uses_disk() { case $1 in zswap | disk | tmem-backed | zram-writeback) ;; *) false ;; esac; }

# swap_to CONTENDER PAGE_CLUSTER: swap is on it, and on nothing else.
swap_to() {
    local options=()
    start "$1" $SIZE || return
    # tmem needs to be told of freed swap, and zram-generator does the same; a disk is left alone.
    case $1 in tmem-* | zram-*) options=(--discard=pages) ;; esac
    zswap "$([ "$1" = zswap ] && echo Y || echo N)" || { reason="zswap cannot be set up"; return 1; }
    mkswap "$DEVICE" >/dev/null 2>&1 && swapon "${options[@]}" "$DEVICE" || give_up "swapon $DEVICE"
    echo "$2" >/proc/sys/vm/page-cluster
}

# zswap Y|N: with the compressor and allocator that zram uses, and the pool that others have; else its own (20 % of memory).
zswap() {
    local set=/sys/module/zswap/parameters percent=${POOL_LIMIT:-20%}
    percent=${percent%\%}
    [ -d $set ] || { [ "$1" = N ]; return; }
    if [ "$1" = Y ]; then
        load lz4
        load zsmalloc
        echo lz4 >$set/compressor && echo "$percent" >$set/max_pool_percent || return
        [ "$(cat $set/compressor)" = lz4 ] || return
        # Newer kernels have no other allocator, and no choice.
        [ ! -e $set/zpool ] || { echo zsmalloc >$set/zpool && [ "$(cat $set/zpool)" = zsmalloc ]; } || return
    fi
    echo "$1" >$set/enabled
}

# zswap has no record of its highest: its pool is looked at while the program runs.
watch_zswap() {
    local name kib most=0 never
    exec {never}<> <(:)
    while :; do
        while read -r name kib _; do
            [ "$name" != Zswap: ] || { [ "$kib" -gt $most ] && most=$kib && echo "$kib" >/tmp/zswap; }
        done </proc/meminfo
        read -r -t 0.2 -u "$never"
    done
}

# A program of the user: unlike the tests around it, it may be killed when memory ends. One that swaps
# itself to a standstill is ended, and fails the run. (By name, busybox's timeout prefers its own sort.)
GROUP=/sys/fs/cgroup/limited
limit_group() {
    local pool=0
    case $1 in zswap | disk) [ -z "${POOL_LIMIT:-}" ] || pool=$(size_bytes "$POOL_LIMIT") ;; esac
    echo $(($(size_bytes "$GROUP_MEMORY") + pool)) >$GROUP/memory.max || give_up "there is no memory cgroup"
}

as_user() {
    [ "$1" = tmem-guest ] || echo $BASHPID >$GROUP/cgroup.procs
    echo 0 >/proc/self/oom_score_adj
    exec timeout "$LONGEST" "$(type -P "$1")" "${@:2}"
}

run_touch() {
    (as_user tmem-guest touch --memory "$TOUCH_MEMORY" --touches "$TOUCHES" --seed 1 \
        --fill heap=75,same=5,text=10,random=10) >/tmp/said && [[ $(cat /tmp/said) == *' errors=0 '* ]]
}

run_sort() {
    local sum
    sum=$(tmem-guest lines --count "$SORT_LINES" |
        (LC_ALL=C as_user sort -S "$SORT_BUFFER" --parallel=1 -T /nowhere) | md5sum)
    [ "${sum%% *}" = "$SORT_SUM" ] || { echo "the digest is ${sum%% *}" >/tmp/said; false; }
}

run_python() {
    (as_user python3 -I -B "$HERE/job.py" "$PYTHON_RECORDS") >/tmp/said && [ "$(cat /tmp/said)" = "$PYTHON_SUM" ]
}

# How often a program in the cgroup was killed for want of memory.
kills() { awk '$1 == "oom_kill" { print $2 }' $GROUP/memory.events; }

# run CASE CONTENDER [TRIES]: a program in the cgroup may be killed though there is swap enough: the kernel gives up
# when all that it could take is on its way to a slow disk at that moment. Then it is run again, twice.
run() {
    local case=$1 contender=$2 tries=${3:-2} program=${1%-pc*} began ended before out in again memory watcher='' disk log=() killed
    swap_to "$contender" "${case#*-pc}" || {
        not_run "$contender" "$reason"
        LEFT_OUT[$contender]=yes
        return
    }
    limit_group "$contender"
    echo 3 >/proc/sys/vm/drop_caches
    : >/tmp/said
    killed=$(kills)
    echo 0 >/tmp/zswap
    if [ "$contender" = zswap ]; then
        watch_zswap &
        watcher=$!
    fi
    read -ra before < <(pages_moved)
    ! uses_disk "$contender" || read -ra disk < <(disk_bytes)
    began=${EPOCHREALTIME/./}
    "run_$program" || {
        show_trouble "$contender"
        dmesg | tail -5 | sed 's/^/      | /'
        [ -z "$watcher" ] || { kill $watcher; wait $watcher 2>/dev/null; }
        # What a killed program said until then is not wrong.
        [ "$(kills)" = "$killed" ] || : >/tmp/said
        if [ "$(kills)" -gt "$killed" ] && [ "$tries" -gt 0 ]; then
            say "      $case on $contender: killed by the cgroup, once more"
            swapoff "$DEVICE" || give_up "swapoff $DEVICE"
            stop "$contender"
            run "$case" "$contender" $((tries - 1))
            return
        fi
        case " ${MAY_FAIL:-} " in
            *" $contender "*) failed_run "$case" "$contender"; return ;;
        esac
        give_up "$case on $contender: wrong, failed, or no end after $LONGEST s: $(cat /tmp/said)"
    }
    ended=${EPOCHREALTIME/./}
    read -r out in again < <(pages_moved)
    ! uses_disk "$contender" || read -ra disk < <(disk_bytes | awk -v r="${disk[0]}" -v w="${disk[1]}" \
        '{ print $1 - r, $2 - w }')
    [ "$contender" != tmem-backed ] || read -ra log < <(log_of "$contender")
    out=$((out - before[0])) in=$((in - before[1])) again=$((again - before[2]))
    memory=$(memory_of "$contender")
    show_trouble "$contender"
    [ -z "$watcher" ] || { kill $watcher; wait $watcher 2>/dev/null; memory=$(($(cat /tmp/zswap) * 1024)); }
    swapoff "$DEVICE" || give_up "swapoff $DEVICE"
    stop "$contender"
    [ "$out" -gt 1000 ] && [ "$in" -gt 500 ] || fail "$case on $contender: it hardly swapped ($out out, $in in)"
    record "$case" "$contender" "$((ended - began))" "$out" "$in" "$memory" "$again" "${disk[@]}"
    [ ${#log[@]} = 0 ] || record_log "$case" "$contender" "${log[@]}"
}

# failed_run CASE CONTENDER: its program was killed or did not end, which is a result; a wrong page is none.
failed_run() {
    ! grep -q 'errors=[1-9]\|digest' /tmp/said || give_up "$1 on $2: wrong: $(cat /tmp/said)"
    swapoff "$DEVICE" || give_up "swapoff $DEVICE"
    stop "$2"
    not_run_in "$1" "$2" "its program was killed for want of memory, or did not end in $LONGEST s"
}

# What tmem had to make the kernel wait for, or refuse: none of it belongs into a good run.
show_trouble() {
    local deferred ns longest full starved
    [ "${1%%-*}" = tmem ] || return 0
    read -r deferred ns longest full starved < <(tmem stats --json --control "/run/tmem/$1.sock" |
        tmem-guest json devices.0.io.{deferred_writes,deferred_ns_total,deferred_ns_max,enospc_errors,starved_errors})
    [ "$((deferred + full + starved))" = 0 ] ||
        say "      $deferred writes waited for memory, $((ns / 1000000)) ms in all, $((longest / 1000000)) ms" \
            "at most; $full were refused by a full pool, $starved for want of memory"
}

# record CASE CONTENDER MICROSECONDS OUT IN MEMORY REREAD [DISK_READ DISK_WRITTEN]
record() {
    local faults p50 p99 latency=''
    sample "$1" "$2" wall "$(awk -v us="$3" 'BEGIN { printf "%.2f", us / 1e6 }')"
    sample "$1" "$2" pages_out "$4"
    sample "$1" "$2" pages_in "$5"
    sample "$1" "$2" memory_used "$6"
    if [ $# -gt 7 ]; then
        sample "$1" "$2" disk_read "$8"
        sample "$1" "$2" disk_written "$9"
        latency=", disk read $(mib "$8") MiB, written $(mib "$9")"
    fi
    if [ "${1%-pc*}" = touch ]; then
        read -r faults p50 p99 < <(sed -n \
            's/^touch:.* faults=\([0-9]*\) .*p50_ns=\([0-9]*\) p99_ns=\([0-9]*\).*/\1 \2 \3/p' /tmp/said)
        check_number "$1 on $2: enough faults for a percentile" "${faults:-none}" -ge 500 >/dev/null
        sample "$1" "$2" fault_p50 "$(us "$p50")"
        sample "$1" "$2" fault_p99 "$(us "$p99")"
        latency+=", $faults major faults, p50 $(us "$p50") us, p99 $(us "$p99") us"
    fi
    pass "$(printf '%-10s %-14s %6.2f s, out %6d, in %6d, files again %5d, swap took %5.1f MiB%s' "$1" "$2" \
        "$(awk -v us="$3" 'BEGIN { print us / 1e6 }')" "$4" "$5" "$7" \
        "$(mib "$6")" "$latency")"
}

# record_log CASE CONTENDER PAGES BYTES CLEANED: bytes of log for a byte of the pages that were written back.
record_log() {
    local ratio
    check_number "$1 on $2: enough pages written back for a ratio" "${3:-none}" -gt 1000 >/dev/null
    ratio=$(awk -v pages="$3" -v bytes="$(($4 + $5))" 'BEGIN { printf "%.4f", bytes / (pages * 4096) }')
    sample "$1" "$2" written_per_byte "$ratio"
    say "      $3 pages written back, for which $(mib "$4") MiB of log were written and $(mib "$5") by the cleaner: $ratio"
}

mib() { awk -v b="$1" 'BEGIN { printf "%.1f", b / 1048576 }'; }
us() { awk -v ns="$1" 'BEGIN { printf "%.1f", ns / 1000 }'; }

echo 100 >/proc/sys/vm/swappiness
mkdir $GROUP && limit_group none
say "$(mem 100) bytes of memory, $(nproc) cpus, swappiness 100, huge pages:" \
    "$(cat /sys/kernel/mm/transparent_hugepage/enabled 2>/dev/null || echo none), zswap: lz4 in zsmalloc"
if [ -n "${DISK:-}" ]; then make_disk ${DISK//:/ }; fi
case $PLAN in *zswap* | *disk* | *backed* | *writeback*) show_disk ;; esac
for round in $(seq "${ROUNDS:-5}"); do
    say "round $round"
    for entry in $PLAN; do
        for contender in $(tr , ' ' <<<"${entry#*=}"); do
            [ -n "${LEFT_OUT[$contender]:-}" ] || run "${entry%%=*}" "$contender"
        done
    done
done
finish
