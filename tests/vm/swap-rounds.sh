# swap-rounds.sh [ROUNDS [WHOLE]]: swap under real pressure, verified page by page, and given back whole.
#
# Each round: swapon, a program of twice the guest's memory whose every page is verified, swapoff.
# After WHOLE rounds (all) the program only fills its memory and verifies it, without random
# touches, frees and forks between, and with the readahead that the kernel does by itself: that takes
# a third of the time.
# After a swapoff nothing may be left in the pool. Then the same pressure in a memory cgroup, with a
# swapoff while the program lives. A hang panics the guest.

. "$(dirname "$0")/lib.sh"
rounds=${1:-10}
whole=${2:-$rounds}
share=${SHARE:-200}
# Compresses fourfold: with less, twice the memory of a small guest cannot be held in it.
fill=${FILL:-heap=60,same=25,text=15}

# The device is hardly larger than what can be swapped: freed slots that the kernel does not tell us
# of are then used again before they fill the pool.
start_tmem "$(mem $((share + 5)))" 58%
say "$TARGET: $DEVICE, $(mem 100) bytes of memory, $share % of it in use"

for round in $(seq "$rounds"); do
    swap_on "$DEVICE"
    # Single pages and readahead in turn.
    echo $((round > whole || round % 2 ? 3 : 0)) >/proc/sys/vm/page-cluster
    pressure "round $round: every page is right" --memory "$share%" --fill "$fill" \
        --seed "$round" --passes $((round <= whole)) --touches "${TOUCHES:-0.25}"
    show_stats
    check_number "round $round: it was really swapped" \
        "$(awk '/^pswpout/ { print $2 }' /proc/vmstat)" -gt $((round * 10000))
    check_frames "round $round"
    check "round $round: swapoff" swapoff "$DEVICE"
    check "round $round: blkdiscard" blkdiscard "$DEVICE"
    check_empty "round $round"
done

# What the rounds have freed goes back to the system by and by. The program that comes next needs it:
# a swapoff that finds no memory is killed.
given_back() { [ "$(stat_of frames_free)" -lt $(($(mem 10) / 4096)) ]; }
if only_tmem "what was freed is given back"; then
    check "what was freed is given back" wait_for 90 given_back
fi

# The cgroup's pages are swapped while the rest of the guest has memory; they return by swapoff,
# under the eyes of the program that they belong to.
swap_on "$DEVICE"
group=/sys/fs/cgroup/swapped
mkdir $group
echo "$(mem 15)" >$group/memory.max
rm -f /tmp/go
: >/tmp/grouped
(
    echo $BASHPID >$group/cgroup.procs
    exec tmem-guest pressure --memory 50% --seed 77 --until /tmp/go >/tmp/grouped
) &
grouped=$!
wait_for 300 eval 'grep -q waiting /tmp/grouped || ! kill -0 $grouped 2>/dev/null'
check "cgroup: the program gets through" grep waiting /tmp/grouped
check_number "cgroup: most of it is swapped" "$(cat $group/memory.swap.current)" -gt "$(mem 25)"
echo max >$group/memory.max
check "cgroup: swapoff while the program lives" swapoff "$DEVICE"
touch /tmp/go
wait $grouped
check_number "cgroup: every page is right after swapoff" $? -eq 0
tail -1 /tmp/grouped
rmdir $group
check "cgroup: blkdiscard" blkdiscard "$DEVICE"
check_empty "cgroup"

stop_tmem
finish
