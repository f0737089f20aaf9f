#!/usr/bin/env bash
# self-test.sh: the harness finds what it is there to find. Run on the host:
#
#   tests/vm/self-test.sh [CASE...]
#
# Each case boots guests through scripts/vm and looks at their exit status and output: statuses come
# through, a guest that panics, hangs, stops or takes too long is a failure (125), lost and damaged
# pages are found and named, and failed checks fail a script. In a guest, it runs one of those parts.

cd "$(dirname "${BASH_SOURCE[0]}")" || exit 1

# The parts that run in a guest.
if [ -n "${TMEM_GUEST:-}" ]; then
    case $1 in
        status)
            echo "arguments: $2, environment: $WORD, disk: $(cat /sys/block/vdb/size)"
            echo "a file" >/results/file
            exit "$2"
            ;;
        panic) echo c >/proc/sysrq-trigger ;;
        stop) reboot -f ;;
        sleep) sleep 1000 ;;
        hang)
            echo 5 >/proc/sys/kernel/hung_task_timeout_secs
            mkfs.ext4 -q /dev/vdb && mount /dev/vdb /mnt && fsfreeze --freeze /mnt && touch /mnt/file
            ;;
        bad-check) . ./lib.sh && check "one that fails" false; check "one that does not" true; finish ;;
        no-check) . ./lib.sh && finish ;;
    esac
    [ "$1" = damage ] || exit 0

    # Swap on a disk of which blocks are then damaged behind the kernel's back.
    . ./lib.sh
    group=/sys/fs/cgroup/swapped
    mkdir $group
    echo 16M >$group/memory.max
    size=$(cat /sys/block/vdb/size)
    dmsetup create swap --table "0 $size linear /dev/vdb 0"
    dmsetup mknodes
    device=/dev/mapper/swap

    # damage NAME EXPECTED COMMAND...: swaps pages out, damages, and has the program look at them.
    damage() {
        local name=$1 expected=$2 pid status
        shift 2
        rm -f /tmp/go /tmp/out
        touch /tmp/out
        swap_on $device
        (echo $BASHPID >$group/cgroup.procs && exec tmem-guest pressure --memory 64M \
            --passes 1 --until /tmp/go >/tmp/out 2>/dev/null) &
        pid=$!
        wait_for 120 grep -q waiting /tmp/out || give_up "$name: pressure did not get through"
        "$@"
        touch /tmp/go
        wait $pid
        status=$?
        tail -1 /tmp/out
        if [ -z "$expected" ]; then
            check_number "$name: all is well" $status -eq 0
        else
            check_number "$name: the program fails" $status -eq 1
            check "$name: and says why" grep "$expected" /tmp/out
            check_fails "$name: and does not claim to be right" grep 'errors=0' /tmp/out
        fi
        dmsetup resume swap
        swapoff $device
    }
    blocks() { dd "$@" of=/dev/vdb oflag=direct conv=notrunc bs=64k status=none; }
    unreadable() {
        dmsetup suspend --noflush --nolockfs swap
        dmsetup reload swap --table "0 $size error"
        dmsetup resume swap
    }
    damage "nothing damaged" "" true
    damage "zeroed blocks" "lost: it reads as zeros" blocks if=/dev/zero seek=64 count=64
    damage "garbage" "corrupt: .* bytes differ" blocks if=/dev/urandom seek=64 count=64
    damage "moved blocks" "misplaced: it holds page" blocks if=/dev/vdb iflag=direct skip=64 \
        seek=128 count=64
    damage "an unreadable disk" "unreadable" unreadable
    finish
fi

# On the host.
vm=../../scripts/vm
cases=${*:-status options panic stop sleep hang checks damage}
passed=0 failed=0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# expect NAME STATUS TEXT VM_ARGS...: scripts/vm ends so, and its output has that line.
expect() {
    local name=$1 wanted=$2 text=$3 status
    shift 3
    "$vm" "$@" >"$work/log" 2>&1
    status=$?
    if [ $status = "$wanted" ] && grep -q -E -- "$text" "$work/log"; then
        passed=$((passed + 1))
        echo "ok    $name"
    else
        failed=$((failed + 1))
        echo "FAIL  $name: status $status, not $wanted, or no line has: $text"
        tail -30 "$work/log" | sed 's/^/      | /'
    fi
}

for case in $cases; do
    case $case in
        status)
            expect "status 0" 0 'arguments: 0, environment: a .b, disk: 8192' --disk 4M \
                --env "WORD=a 'b" --results "$work/results" -- self-test.sh status 0
            expect "results come out" 0 'arguments' --disk 4M --env WORD= \
                --results "$work/results" -- self-test.sh status 0
            cmp -s "$work/results/file" <(echo "a file") || { failed=$((failed + 1)); echo "FAIL  no results"; }
            expect "status 7" 7 'exit status 7' --disk 4M --env WORD= -- self-test.sh status 7
            ;;
        options)
            expect "an unknown option" 125 'unknown option' --no-such-thing
            expect "a missing script" 125 'cannot read' -- no-such-script.sh
            ;;
        panic) expect "a panic" 125 'FAILED.*Kernel panic.*sysrq' -- self-test.sh panic ;;
        stop) expect "an end without a status" 125 'FAILED.*without reporting' -- self-test.sh stop ;;
        sleep) expect "too slow" 125 'FAILED.*no end after 40 s' --timeout 40 -- self-test.sh sleep ;;
        hang)
            expect "a hung task" 125 'FAILED.*Kernel panic.*hung_task' --disk 64M -- self-test.sh hang
            ;;
        checks)
            expect "a failed check" 1 '1 passed, 1 failed' -- self-test.sh bad-check
            expect "no check at all" 1 '0 passed, 0 failed' -- self-test.sh no-check
            ;;
        damage)
            expect "damaged pages" 0 '13 passed, 0 failed' --disk 256M -- self-test.sh damage
            ;;
        *) echo "there is no case $case" && exit 2 ;;
    esac
done
echo "self-test.sh: $passed passed, $failed failed"
[ $failed = 0 ]
