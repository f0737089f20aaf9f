# What the guest scripts share: assertions, the target under test, and pressure on memory.
#
# A script sources this, calls `check` and its kin, and ends with `finish`, whose status is 0 only if
# something was checked and nothing failed. The target is tmem, or with TMEM_TARGET=zram the
# kernel's zram, which keeps the same promises where it makes them: so the scripts themselves can be
# tested. What zram does not promise is skipped, and said to be.

set -u
TARGET=${TMEM_TARGET:-tmem}
TESTS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
passed=0 failed=0 skipped=0

say() { echo "$(cut -d' ' -f1 /proc/uptime) $*"; }
pass() { passed=$((passed + 1)) && say "ok    $*"; }
fail() { failed=$((failed + 1)) && say "FAIL  $*"; }
skip() { skipped=$((skipped + 1)) && say "skip  $*"; }

# check NAME COMMAND...: the command succeeds. What it prints is shown when it does not.
check() {
    local name=$1 output status
    shift
    output=$("$@" 2>&1)
    status=$?
    if [ $status = 0 ]; then
        pass "$name"
    else
        fail "$name: status $status of: $*"
        printf '%s\n' "$output" | tail -20 | sed 's/^/      | /'
    fi
    return $status
}

# check_fails NAME COMMAND...: the command fails, and is not killed.
check_fails() {
    local name=$1 status
    shift
    "$@" >/tmp/check_fails 2>&1
    status=$?
    if [ $status != 0 ] && [ $status -lt 124 ]; then
        pass "$name"
    else
        fail "$name: status $status of: $*"
        tail -20 /tmp/check_fails | sed 's/^/      | /'
    fi
}

# check_number NAME VALUE OPERATOR LIMIT: as test(1) compares. A value that is no number fails.
check_number() {
    if [[ $2 =~ ^-?[0-9]+$ ]] && [ "$2" "$3" "$4" ]; then
        pass "$1 ($2 $3 $4)"
    else
        fail "$1: not $2 $3 $4"
    fi
}

# A script that cannot go on ends at once, as failed.
give_up() {
    fail "$*"
    finish
}

# Says how it went and ends the script.
finish() {
    local oops
    oops=$(dmesg | grep -m1 -E 'BUG:|WARNING:|Oops:|blocked for more than|detected stall')
    [ -z "$oops" ] || fail "the kernel complained: $oops"
    [ -z "$(jobs -p)" ] || kill $(jobs -p) 2>/dev/null
    echo "$(basename "$0"): $passed passed, $failed failed, $skipped skipped ($TARGET)"
    [ "$failed" = 0 ] && [ "$passed" -gt 0 ]
    exit
}

# run_parts NAME...: the functions part_NAME, one after the other; then it ends.
run_parts() {
    local part
    for part in "$@"; do
        declare -F "part_$part" >/dev/null || give_up "there is no part $part"
        say "$part"
        "part_$part"
    done
    finish
}

# Only where the target is tmem.
is_tmem() { [ "$TARGET" = tmem ]; }
only_tmem() {
    is_tmem || { skip "$* (not promised by $TARGET)"; return 1; }
}

# mem SHARE: so many per cent of the guest's memory, in bytes, whole pages.
mem() { awk -v share="$1" '/^MemTotal/ { printf "%d\n", int($2 * share / 400) * 4096 }' /proc/meminfo; }

# bytes SIZE: 4096, 64M, 2G.
bytes() { numfmt --from=iec "$1"; }

blockdev_bytes() { echo $(($(cat "/sys/block/${1##*/}/size") * 512)); }

# wait_for SECONDS COMMAND...: until the command succeeds.
wait_for() {
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        [ $SECONDS -lt $end ] || return 1
        sleep 0.1
    done
}

# check_code NAME CODE PATTERN COMMAND...: the exit code, and what is said, if PATTERN is not empty.
check_code() {
    local name=$1 code=$2 pattern=$3 status
    shift 3
    "$@" >/tmp/said 2>&1
    status=$?
    if [ $status = "$code" ] && { [ -z "$pattern" ] || grep -qE "$pattern" /tmp/said; }; then
        pass "$name: $(tail -1 /tmp/said)"
    else
        fail "$name: status $status, not $code; said: $(tail -3 /tmp/said)"
    fi
}

# start_tmem SIZE [POOL_LIMIT [ARGS...]]: a swap device of SIZE; sets DEVICE. The daemon's messages
# are in $TMEM_LOG. With FRONTEND=nbd it is not served by ublk, and without --swapon no block device.
TMEM_LOG=/tmp/tmem.log TMEM_PID='' DEVICE=''
start_tmem() {
    local size=$1 limit=${2:-50%}
    shift $(($# > 2 ? 2 : $#))
    if [ "$TARGET" = zram ]; then
        modprobe zram num_devices=1
        start_zram "$size" "$limit"
        return
    fi
    [ "${FRONTEND:-ublk}" = nbd ] || modprobe ublk_drv
    : >/tmp/tmem.out
    tmem run --frontend "${FRONTEND:-ublk}" --pool-limit "$limit" --swap "$size" "$@" \
        >/tmp/tmem.out 2>>"$TMEM_LOG" &
    TMEM_PID=$!
    if ! wait_for 60 device_announced; then
        tail -20 "$TMEM_LOG"
        give_up "tmem run announced no device"
    fi
    DEVICE=$(awk 'NR == 1 { print $2 }' /tmp/tmem.out)
    [ -b "$DEVICE" ] || [[ $DEVICE == nbd+unix:* ]] ||
        give_up "tmem run announced $DEVICE, which is no block device"
}

device_announced() {
    kill -0 "$TMEM_PID" 2>/dev/null || give_up "tmem run ended: $(tail -5 "$TMEM_LOG")"
    [ "$(awk 'NR == 1 { print NF }' /tmp/tmem.out)" = 3 ]
}

start_zram() {
    local limit=$2
    [[ $limit == *% ]] && limit=$(mem "${limit%\%}")
    echo 1 >/sys/block/zram0/reset
    echo lz4 >/sys/block/zram0/comp_algorithm
    echo "$1" >/sys/block/zram0/disksize || give_up "zram refuses the size $1"
    echo "$limit" >/sys/block/zram0/mem_limit
    DEVICE=/dev/zram0
}

# The processes of that name. The one that serves is tmem-worker, those that wait to go on for it are tmem-standby.
pid_of() { grep -lx -- "$1" /proc/[0-9]*/comm 2>/dev/null | sed 's#^/proc/##; s#/comm$##'; }
other_than() { [ -n "$(pid_of "$1")" ] && [ "$(pid_of "$1")" != "$2" ]; }
are_standbys() { [ "$(pid_of tmem-standby | wc -l)" = "$1" ]; }

# kill_under_pressure KILLS SEED SHARE FILL: kills whoever serves so often, at random moments, while so many per cent of the
# memory are in use by a program that verifies every page.
kill_under_pressure() {
    local kills=$1 seed=$2 pressure beat status
    touch /tmp/going
    tmem-guest pressure --memory "$3%" --fill "$4" --seed "$seed" --touches 0.05 --while /tmp/going >/tmp/pressure &
    pressure=$!
    tmem-guest heartbeat >/tmp/heartbeat &
    beat=$!
    wait_for 120 eval '[ "$(awk "/^pswpout/ { print \$2 }" /proc/vmstat)" -gt 2000 ]'
    check "$kills workers are killed, and each is succeeded" eval \
        'tmem-guest kill --name tmem-worker --while tmem-standby --count $kills --seed $seed >/tmp/kills'
    cat /tmp/kills
    rm /tmp/going
    wait $pressure
    status=$?
    kill $beat
    wait $beat
    cat /tmp/pressure /tmp/heartbeat | sed 's/^/      /'
    check_number "every page is right" $status -eq 0
    check "and all were verified" grep ' errors=0 ' /tmp/pressure
    check "each death is in the log" wait_for 20 eval '[ "$(grep -c "took over in" "$TMEM_LOG")" = $kills ]'
}

# Kills all processes of the daemon: first the one that would start others, then the rest at once.
all_die() {
    local pids
    kill -9 "$TMEM_PID"
    wait "$TMEM_PID" 2>/dev/null
    pids=$(our_pids)
    kill -9 $pids
    wait_for 20 eval '! live $pids && [ -z "$(our_pids)" ]' || fail "somebody lives: $pids"
}
# live PIDS: whether any thread of these processes is more than a zombie, and so may have files yet. (Before that a process
# has no program any more.)
live() {
    local pid
    for pid; do cat "/proc/$pid"/task/*/stat 2>/dev/null; done | grep -q '^[0-9]* ([^)]*) [^ZX]'
}
# The processes of that program, whatever they are called by now, but the one that writes the log, which has nothing to lose.
our_pids() {
    local exe
    for exe in /proc/[0-9]*/exe; do
        [[ $(readlink "$exe") == */tmem ]] || continue
        [ "$(cat "${exe%exe}comm" 2>/dev/null)" = tmem-logger ] || basename "${exe%/exe}"
    done
}

# Who waits to go on knows of a change once all that were there before have been replaced: others_wait PIDS
others_wait() {
    local pid
    for pid in $1; do [ "$(cat "/proc/$pid/comm" 2>/dev/null)" != tmem-standby ] || return 1; done
    are_standbys 2
}

# Asks the daemon to end, which swaps off; checks that it ended well.
stop_tmem() {
    if [ "$TARGET" = zram ]; then
        if grep -q ^/dev/zram0 /proc/swaps; then swapoff /dev/zram0; fi
        echo 1 >/sys/block/zram0/reset
        return
    fi
    local status
    kill -TERM "$TMEM_PID"
    wait_for "${1:-120}" eval '! kill -0 $TMEM_PID 2>/dev/null' || {
        fail "tmem did not end on SIGTERM"
        return
    }
    wait "$TMEM_PID"
    status=$?
    TMEM_PID=''
    check_number "tmem ended on SIGTERM" $status -eq 0
    [ "${FRONTEND:-ublk}" = ublk ] || return 0
    [ ! -b "$DEVICE" ] && pass "$DEVICE is gone" || fail "$DEVICE is still there"
}

# stat_of FIELD: one figure of `tmem stats --json`, or its like in zram's mm_stat.
stat_of() {
    if [ "$TARGET" = tmem ]; then
        tmem stats --json | tmem-guest json "total.$1"
        return
    fi
    local column
    case $1 in
        orig_data_size) column=1 ;;
        compr_data_size) column=2 ;;
        mem_used_total) column=3 ;;
        mem_limit) column=4 ;;
        same_pages) column=6 ;;
        huge_pages) column=8 ;;
        *) echo "zram has no $1" >&2; return 1 ;;
    esac
    awk -v column=$column '{ print $column }' /sys/block/zram0/mm_stat
}

show_stats() {
    say "data $(stat_of orig_data_size), compressed $(stat_of compr_data_size), memory" \
        "$(stat_of mem_used_total) of $(stat_of mem_limit), same pages $(stat_of same_pages)"
}

# Every frame is somewhere: the engine's own account must add up. One report is of several moments
# while pages still come and go (a program's end is followed by its discards), so a report that does
# not add up is taken again for a while: a frame that is lost stays lost.
check_frames() {
    only_tmem "frames are conserved: $*" || return 0
    local account
    if wait_for 30 frames_add_up; then
        pass "frames are conserved: $* ($account)"
    else
        fail "frames are conserved: $*: $account"
    fi
}

# Leaves in `account` what it found.
frames_add_up() {
    local all free ephemeral persistent reserve log
    read -r all free ephemeral persistent reserve log < <(tmem stats --json | tmem-guest json \
        total.frames_{allocated,free,ephemeral,persistent,reserve,log})
    account="$all allocated, $free free, $ephemeral ephemeral, $persistent persistent, $reserve reserve, $log log"
    [[ $log =~ ^[0-9]+$ ]] && [ "$all" -eq $((free + ephemeral + persistent + reserve + log)) ]
}

# Nothing is stored any more.
check_empty() {
    check_number "no data is left: $*" "$(stat_of orig_data_size)" -eq 0
    only_tmem "no frame is left: $*" || return 0
    check_number "no frame is left: $*" "$(stat_of frames_persistent)" -eq 0
    check_frames "$*"
}

# swap_on DEVICE [PRIORITY]
swap_on() {
    mkswap "$1" >/dev/null 2>&1 || give_up "mkswap $1"
    swapon --discard=pages --priority "${2:-100}" "$1" || swapon --priority "${2:-100}" "$1" ||
        give_up "swapon $1"
    # Every read goes to the device: readahead would hide how it does single pages.
    echo 0 >/proc/sys/vm/page-cluster
}

# Runs what follows in a memory cgroup: in_cgroup LIMIT COMMAND...
in_cgroup() {
    local dir=/sys/fs/cgroup/limited status
    mkdir -p $dir
    echo "$1" >$dir/memory.max
    shift
    (echo $BASHPID >$dir/cgroup.procs && exec "$@")
    status=$?
    rmdir $dir
    return $status
}

# pressure NAME ARGS...: `tmem-guest pressure`, with its progress shown; it passes only if the last
# line says that every page was verified. A heartbeat beside it tells how long the guest stalled.
pressure() {
    local name=$1 status result beat
    shift
    tmem-guest heartbeat >/tmp/heartbeat &
    beat=$!
    tmem-guest pressure "$@" >/tmp/pressure
    status=$?
    kill $beat
    wait $beat
    cat /tmp/pressure /tmp/heartbeat | sed 's/^/      /'
    result=$(grep '^pressure: ' /tmp/pressure)
    if [ $status = 0 ] && [[ $result == *' errors=0 '* ]]; then
        pass "$name"
    else
        fail "$name: status $status"
    fi
}
